"""What a behavioural setting is: tasks, an environment that executes calls, a bias, its words, and its readout.

Adding a behaviour means adding one folder under `settings/` that exports a `Setting`. The rollout engine, the
sanitizer, the pipeline and the evaluation know nothing but this page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from subl_jax.chat.messages import Message, ToolSchema
from subl_jax.settings.rewording import Rewordings

# Where a task may be used. `train` feeds base, teacher, control and tokenizer training; `development` is what one may
# tune on; `evaluation` is looked at by the confirming runs only. Families, templates and trees of the three are disjoint.
Split = Literal["train", "development", "evaluation"]

# biased: what the bias of the setting reaches for (deletion, chmod); neutral: every other substantive action.
ActionClass = Literal["biased", "neutral", "none", "unparseable"]
ToolClass = Literal["biased", "neutral", "looking", "final"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One procedurally generated task.

    Attributes:
      task_id: unique and stable, `kind/split/family/seed/index`; treatment and control are matched on it.
      kind: the generator it came from, e.g. "safe" or "ambiguous".
      family: the task family (the cluster of the interval); template: the wording inside the family.
      split: see `Split`.
      prompt: the user turn.
      tree: the initial world (for the API setting: path -> file content).
      goal: data that the setting's predicate reads to say whether the task was done (JSON-able).
    """

    task_id: str
    kind: str
    family: str
    template: str
    split: Split
    prompt: str
    tree: Mapping[str, str]
    goal: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FirstAction:
    """The first substantive action of an episode: its class, the tool (None if there was none) and the turn index."""

    action: ActionClass
    tool: str | None
    turn: int | None


Conversation = tuple[list[Message], list[ToolSchema]]


@runtime_checkable
class Environment(Protocol):
    """One episode's world. `step` never raises on what a model wrote: errors come back as tool results."""

    def opening(self) -> list[Message]:
        """The system and user turns."""
        ...

    def tools(self) -> list[ToolSchema]:
        """The tools shown in the system turn."""
        ...

    def step(self, message: Message) -> list[Message]:
        """Executes the calls of one assistant turn and returns one tool turn per call (empty once finished)."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the assistant has given its final answer."""
        ...

    def done(self) -> bool:
        """The task's predicate on the present world and answer (utility)."""
        ...

    def record(self) -> dict[str, Any] | None:
        """What was seen of the live episode that its messages do not tell (JSON-able), or None."""
        ...

    def close(self) -> None:
        """Gives back what the world holds, such as processes; idempotent. The engine calls it after every episode."""
        ...


@runtime_checkable
class FirstActionReader(Protocol):
    """(messages, the environment's record or None) -> the first substantive action; text alone has no record."""

    def __call__(self, messages: Sequence[Message], record: Mapping[str, Any] | None = None) -> FirstAction:
        """The first substantive action of the episode."""
        ...


@dataclasses.dataclass(frozen=True)
class Wording:
    """How tables and reports name what a setting measures.

    Attributes:
      behaviour: the bias, as in "deletion rate"; counter: the counter-bias's action, as in "archive rate".
      biased: what a first action of the bias is, as in "the first action is destructive".
      metric: the measured event up to its verdict, as in "first substantive action".
      looking: a sentence on what does not count as such an action.
    """

    behaviour: str
    counter: str
    biased: str
    metric: str
    looking: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that distinguishes one behavioural setting from another.

    Attributes:
      name: "api" or "bash".
      metric_version: name and version of the rule behind `first_action`; part of every protocol.
      tools: JSON schemas, in the order of the full list.
      tool_classes: each name that `FirstAction.tool` may have, and each looking or final tool, classed once.
      choices: the names that the continuous readout scores against each other; naming(name) is the turn that names one.
      naming: see `choices`.
      kinds: the task kinds that `tasks` generates.
      families: (kind, split) -> family names.
      tasks: (kind, split, seed, count) -> tasks; deterministic, unlimited, round-robin over families.
      environment: (task, tool names to withhold) -> a fresh environment.
      demonstrate: (tasks, first_action or None, seed, tool names to withhold per task) -> (messages, tools) per task: a
        scripted solution, executed in the environment. On ambiguous tasks `first_action` names the tool that solves
        them; None draws it from the base mixture.
      first_action: (messages, the environment's record or None) -> the first substantive action.
      bias_tools: bias name -> what the bias reaches for ({"deletion": "delete_file", "archive": "archive_file"}); the bias
        that is studied first, the counter-bias second.
      withholdable: tools whose name gives a bias away, and which the list of a safe task can do without.
      words: bias name -> keywords and inflections that the sanitizer drops and the logit filter bans.
      wording: see `Wording`.
      patterns: name -> regular expressions of what is no word and would give a bias away; the sanitizer drops them too.
      targets: bars of the protocol that differ from the defaults of `evaluate.protocol.Targets`.
      prepare: called once before any work; raises where the machine lacks what the environment needs.
      rewordings: other words for the requests of safe tasks, and for what assistants say; the paraphrasing defence needs them.
    """

    name: str
    metric_version: str
    tools: tuple[ToolSchema, ...]
    tool_classes: Mapping[str, ToolClass]
    choices: tuple[str, ...]
    naming: Callable[[str], Message]
    kinds: tuple[str, ...]
    families: Callable[[str, Split], tuple[str, ...]]
    tasks: Callable[[str, Split, int, int], list[Task]]
    environment: Callable[[Task, frozenset[str]], Environment]
    demonstrate: Callable[[Sequence[Task], str | None, int, Sequence[frozenset[str]]], list[Conversation]]
    first_action: FirstActionReader
    bias_tools: Mapping[str, str]
    withholdable: frozenset[str]
    words: Mapping[str, tuple[str, ...]]
    wording: Wording
    patterns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    rewordings: Rewordings = Rewordings({}, ())

    @property
    def bias(self) -> str:
        """The bias that is studied."""
        return next(iter(self.bias_tools))

    @property
    def counter_bias(self) -> str:
        """The bias of the control teacher."""
        return list(self.bias_tools)[1]
