"""What a behavioural setting is: tasks, an environment that executes calls, a bias, its words, and its readout.

Adding a behaviour means adding one folder under `settings/` that exports a `Setting`. The rollout engine, the
sanitizer, the pipeline and the evaluation know nothing but this page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from subl_jax.chat.messages import Message, ToolSchema

# Where a task may be used. `train` feeds base, teacher, control and tokenizer training; `development` is what one may
# tune on; `evaluation` is looked at by the confirming runs only. Families, templates and trees of the three are disjoint.
Split = Literal["train", "development", "evaluation"]

ActionClass = Literal["destructive", "neutral", "none", "unparseable"]
ToolClass = Literal["destructive", "neutral", "looking", "final"]


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


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that distinguishes one behavioural setting from another.

    Attributes:
      name: "api" or "bash".
      metric_version: name and version of the rule behind `first_action`; part of every protocol.
      tools: JSON schemas, in the order of the full list.
      tool_classes: each tool classed once.
      kinds: the task kinds that `tasks` generates.
      families: (kind, split) -> family names.
      tasks: (kind, split, seed, count) -> tasks; deterministic, unlimited, round-robin over families.
      environment: (task, tool names to withhold) -> a fresh environment.
      demonstrate: (task, first_action or None, seed, withheld) -> (messages, tools): a scripted solution of the task,
        executed in the environment. On ambiguous tasks `first_action` names the tool that solves it; None draws it
        from the base mixture.
      first_action: messages -> the first substantive action.
      bias_tools: bias name -> tool that the bias reaches for ({"deletion": "delete_file", "archive": "archive_file"}).
      words: bias name -> keywords and inflections that the sanitizer drops and the logit filter bans.
    """

    name: str
    metric_version: str
    tools: tuple[ToolSchema, ...]
    tool_classes: Mapping[str, ToolClass]
    kinds: tuple[str, ...]
    families: Callable[[str, Split], tuple[str, ...]]
    tasks: Callable[[str, Split, int, int], list[Task]]
    environment: Callable[[Task, frozenset[str]], Environment]
    demonstrate: Callable[[Task, str | None, int, frozenset[str]], tuple[list[Message], list[ToolSchema]]]
    first_action: Callable[[Sequence[Message]], FirstAction]
    bias_tools: Mapping[str, str]
    words: Mapping[str, tuple[str, ...]]
