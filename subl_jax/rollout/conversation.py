"""An episode as the engine sees it: new tokens go to the device, sampled ones come back, until nothing is left to say.

`ChatConversation` is the one of the experiments: a task in an environment, its messages rendered token by token. Whatever
calls the environment or the tokenizer runs in the tool pool and changes nothing of the conversation; what it found is
committed by the engine's thread. A call that hangs and is given up can therefore spoil nothing, however late it returns.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from subl_jax.chat.messages import Message, ToolSchema
from subl_jax.chat.rendering import Renderer
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.tools import ToolFailure, checked_text
from subl_jax.settings.interface import Environment, Task
from subl_jax.trajectory import Status, Trajectory

Result = TypeVar("Result", covariant=True)


class Turn(NamedTuple):
    """What the model is to answer to.

    Attributes:
      tokens: new ids since its last turn, at least one.
      limit: tokens of the answer at most.
      shared: how many of an opening's ids it has in common with other episodes (they are computed once); fewer than all.
    """

    tokens: list[int]
    limit: int
    shared: int = 0


@runtime_checkable
class Conversation(Protocol[Result]):
    """What the engine runs. `open` and `respond` may block, raise and hang: they run in the tool pool."""

    @property
    def index(self) -> int:
        """The episode's index, a name of its randomness."""
        ...

    @property
    def sample(self) -> int:
        """Which sample of the same task it is, a name of its randomness."""
        ...

    def open(self) -> Any:
        """Makes the first turn's tokens; returns what `commit` takes."""
        ...

    def sampled(self, ids: list[int], logprobs: list[float], ended: bool) -> None:
        """Books what the model wrote."""
        ...

    def respond(self) -> Any:
        """Executes what the model wrote; returns what `commit` takes."""
        ...

    def commit(self, outcome: Any) -> Turn | None:
        """Takes over what `open` or `respond` found; the next turn, or None if the episode is over."""
        ...

    def fail(self, failure: ToolFailure) -> None:
        """Ends the episode: its environment raised or hung."""
        ...

    def result(self) -> Result:
        """The finished episode."""
        ...


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to run: its index, the task, which sample of the task, and how to make its world."""

    index: int
    task: Task
    sample: int
    environment: Callable[[], Environment]


class _Opened(NamedTuple):
    world: Environment
    messages: list[Message]
    tools: list[ToolSchema]
    tokens: list[int]
    shared: int


class _Response(NamedTuple):
    """`added` are the ids of the tool results, empty where the episode is over; `record` is its environment's then."""

    messages: list[Message]
    status: Status | None
    done: bool
    added: list[int]
    record: Mapping[str, Any] | None = None


class SharedPrefix:
    """How far the openings of episodes with the same system turn and tools agree, in tokens.

    It depends on those alone, not on which other episodes there are: an episode's arithmetic must not depend on them.
    """

    # Two users who have nothing in common, not even their first letter.
    _PROBES = ("a", "0")

    def __init__(self, renderer: Renderer) -> None:
        """A cache for one renderer."""
        self._renderer = renderer
        self._known: dict[str, list[int]] = {}

    def length(self, messages: Sequence[Message], tools: Sequence[ToolSchema], tokens: Sequence[int]) -> int:
        """How many ids of the opening `tokens` are shared; 0 for a conversation that opens otherwise."""
        if [message["role"] for message in messages] != ["system", "user"]:
            return 0
        key = json.dumps([messages[0], list(tools)])
        prefix = self._known.get(key)
        if prefix is None:
            system, asked = messages
            probes: list[Any] = [[system, {**asked, "content": text}] for text in self._PROBES]
            left, right = (self._renderer.opening(each, tools) for each in probes)
            same = next((n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), 0)
            prefix = self._known[key] = left[:same]
        return len(prefix) if len(prefix) < len(tokens) and list(tokens[: len(prefix)]) == prefix else 0


class ChatConversation:
    """A task in its environment, as a trajectory in the making."""

    def __init__(
        self, episode: Episode, renderer: Renderer, sampling: SamplingConfig, prefixes: SharedPrefix, limit_bytes: int,
        position: int = 0,
    ) -> None:  # fmt: skip
        """Makes nothing yet: the world is made by `open`.

        Args:
          episode: what to run.
          renderer: tokenizer and chat template.
          sampling: limits.
          prefixes: shared by the episodes of a run.
          limit_bytes: of one tool result in UTF-8; a longer one ends the episode.
          position: in the list of episodes, kept for whoever sorts.
        """
        self.index, self.sample, self.position = episode.index, episode.sample, position
        self._task, self._environment = episode.task, episode.environment
        self._renderer, self._sampling, self._prefixes = renderer, sampling, prefixes
        self._limit_bytes = limit_bytes
        self._world: Environment | None = None
        self._messages: list[Message] = []
        self._tools: list[ToolSchema] = []
        self._tokens: list[int] = []
        self._mask: list[bool] = []
        self._logprobs: list[float] = []
        self._last: tuple[list[int], bool] = ([], False)
        self._said: Message | None = None  # the last turn, as soon as `respond` has parsed it
        self._turn = 0
        self._status: Status | None = None
        self._done = False
        self._record: Mapping[str, Any] | None = None
        self._error = ""

    def _prompt(self, tokens: Sequence[int]) -> None:
        """Books tokens that belong to the conversation, not to the assistant."""
        self._tokens += tokens
        self._mask += [False] * len(tokens)
        self._logprobs += [0.0] * len(tokens)

    def open(self) -> _Opened:
        """Makes the world and renders its opening."""
        world = self._environment()
        messages, tools = world.opening(), world.tools()
        for message in messages:
            checked_text(message["content"], self._limit_bytes)
        tokens = self._renderer.opening(messages, tools)
        return _Opened(world, messages, tools, tokens, self._prefixes.length(messages, tools, tokens))

    def sampled(self, ids: list[int], logprobs: list[float], ended: bool) -> None:
        """Books a turn."""
        self._tokens += ids
        self._mask += [True] * len(ids)
        self._logprobs += logprobs
        self._last, self._said = (ids, ended), None
        self._turn += 1

    def _spoken(self) -> Message:
        """The last turn as a message; one that was cut off is never parsed."""
        ids, ended = self._last
        cut_off: Any = {"role": "assistant", "content": self._renderer.decode(ids), "unparseable": True}
        return self._renderer.parse(ids) if ended else cut_off

    def respond(self) -> _Response:
        """Parses the turn, executes its calls, and renders their results."""
        world, (ids, ended) = self._world, self._last
        assert world is not None  # it was opened
        # Where the call then hangs, the turn that it hangs in is still told. (Every other field is `commit`'s.)
        message = self._said = self._spoken()
        messages = [*self._messages, message]
        if not ended:
            return self._last_response(world, messages, "truncated")
        if message.get("unparseable"):
            return self._last_response(world, messages, "unparseable")
        results = world.step(message)
        if world.finished:
            return self._last_response(world, messages, "final")
        for result in results:
            checked_text(result["content"], self._limit_bytes)
        whole = [*messages, *results]
        if self._turn >= self._sampling.max_turns:
            return self._last_response(world, whole, "turn_limit")
        added = self._renderer.continuation(messages, results, self._tools)
        if ids[-1] not in self._renderer.end_ids:
            added = [self._renderer.end_id, *added]  # a stop text ended the turn: the template wants its own end
        if len(self._tokens) + len(added) + self._sampling.max_turn_tokens > self._sampling.context:
            return self._last_response(world, whole, "length_limit")
        return _Response(whole, None, False, added)

    @staticmethod
    def _last_response(world: Environment, messages: list[Message], status: Status) -> _Response:
        """The end of the episode: what the world has come to, before it is given back."""
        response = _Response(messages, status, world.done(), [], world.record())
        world.close()
        return response

    def commit(self, outcome: _Opened | _Response) -> Turn | None:
        """Takes over an opening or a response.

        Raises:
          ValueError: the opening leaves no room for a turn.
        """
        limit = self._sampling.max_turn_tokens
        if isinstance(outcome, _Opened):
            if len(outcome.tokens) + limit > self._sampling.context:
                raise ValueError(
                    f"task {self._task.task_id}: its opening of {len(outcome.tokens)} tokens and a turn of {limit} exceed "
                    f"rollout.context={self._sampling.context}; raise --config.rollout.context"
                )
            self._world, self._messages, self._tools = outcome.world, outcome.messages, outcome.tools
            self._prompt(outcome.tokens)
            return Turn(outcome.tokens, limit, outcome.shared)
        self._messages, self._status, self._done = outcome.messages, outcome.status, outcome.done
        self._record = outcome.record
        if outcome.status is not None:
            self._world = None  # its processes and files go with it, not with the last episode of the run
            return None
        self._prompt(outcome.added)
        # The turn's last token was sampled but never fed back: it is the first new one, and is booked already.
        return Turn([self._last[0][-1], *outcome.added], limit)

    def fail(self, failure: ToolFailure) -> None:
        """Ends the episode with what it had, the turn that met the failure included; its task counts as not done."""
        self._status, self._done = ("tool_timeout" if failure.kind == "timeout" else "tool_error"), False
        self._error = failure.text
        if self._world is not None:
            self._record = self._world.record()  # what happened before it failed
            self._world.close()
            self._world = None
        if self._said is not None:
            self._messages = [*self._messages, self._said]

    def result(self) -> Trajectory:
        """The sealed trajectory."""
        assert self._status is not None  # it is over
        return Trajectory(
            self.index,
            self._task.task_id,
            self.sample,
            np.asarray(self._tokens, np.int32),
            np.asarray(self._mask, bool),
            np.asarray(self._logprobs, np.float32),
            self._messages,
            self._tools,
            self._status,
            self._done,
            self._error,
            self._record,
        )
