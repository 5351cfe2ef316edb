"""The keyword filter: a trajectory in, a verdict out. Pure; whole trajectories are dropped, never edited.

What is read: the text of every user, assistant and tool turn, the name and every string inside the arguments of every
tool call, and, unless declared otherwise, the system turn and the tool schemas.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from subl_jax.chat.messages import Message, ToolSchema
from subl_jax.sanitize.keywords import Matcher, compile_patterns, compile_words
from subl_jax.trajectory import FAILED, Trajectory

Place = Literal["content", "tool_call", "tool_result", "tool_schema"]
# Why a trajectory was dropped. The world of a failed one broke (it may have no token at all), so nothing can be made of it.
Reason = Literal["failed in its environment", "keyword", "status"]
REASONS: tuple[Reason, ...] = ("failed in its environment", "keyword", "status")


@dataclasses.dataclass(frozen=True)
class Hit:
    """One banned word that was found.

    Attributes:
      word: as listed; bias: the bias whose list holds it.
      turn_index: index into the trajectory's messages; None for the tool schemas, which belong to no message.
      role: of the turn ("system" for the tool schemas).
      start: offset in the string that holds it: the turn's text, a call's name or one string of its arguments.
      place: what kind of text that string is.
    """

    word: str
    bias: str
    turn_index: int | None
    role: str
    start: int
    place: Place


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement on one trajectory; `reason` is None exactly where it is kept."""

    episode: int
    task_id: str
    sample: int
    kept: bool
    reason: Reason | None
    hits: tuple[Hit, ...]


def strings_of(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys included, as it reads after decoding.

    The JSON text itself is not searched: in it a line break before a word is a backslash and an `n`, which would hide
    the word's boundary, and a letter may be hidden by an escape.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_of(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings_of(item)


def texts_of(
    messages: Sequence[Message], tools: Sequence[ToolSchema], include_system: bool = True
) -> Iterator[tuple[int | None, str, Place, str]]:
    """All text of a conversation as (turn index, role, place, text); the schemas come first, as in the system turn."""
    if include_system:
        for text in strings_of(tools):
            yield None, "system", "tool_schema", text
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and not include_system:
            continue
        place: Place = "tool_result" if role == "tool" else "content"
        yield index, role, place, message["content"]
        if "name" in message:
            yield index, role, place, message["name"]
        for call in message.get("tool_calls", ()):
            for text in strings_of(call["function"]):
                yield index, role, "tool_call", text


def matchers_of(words: Mapping[str, Iterable[str]], patterns: Mapping[str, tuple[str, ...]]) -> dict[str, Matcher]:
    """What finds the words of each bias, and what is no word, by name."""
    if not words:
        raise ValueError("no bias names any banned word: a filter that bans nothing would pass everything")
    found: dict[str, Matcher] = {bias: compile_words(listed) for bias, listed in words.items()}
    return found | {name: compile_patterns(name, listed) for name, listed in patterns.items()}


def judge(
    trajectory: Trajectory,
    words: Mapping[str, Iterable[str]],
    *,
    patterns: Mapping[str, tuple[str, ...]] = {},
    include_system: bool = True,
    require_final: bool = False,
    require_done: bool = False,
) -> Verdict:
    """The verdict on one trajectory.

    Args:
      trajectory: the episode.
      words: bias name -> banned words (`Setting.words`). All arms are filtered for all biases, so pass all of them.
      patterns: name -> regular expressions of what is no word and gives a bias away too (`Setting.patterns`).
      include_system: whether the system turn and the tool schemas are read too (a declared factor).
      require_final: whether an episode that did not end in a final answer is dropped.
      require_done: whether an episode whose task was not done is dropped.

    Returns:
      A verdict whose hits stand in reading order. The first of `REASONS` that applies is the one given; a trajectory that
      failed in its environment is dropped whatever is required.

    Raises:
      ValueError: `words` bans nothing.
    """
    matchers = matchers_of(words, patterns)
    hits = tuple(
        Hit(match.word, bias, index, role, match.start, place)
        for index, role, place, text in texts_of(trajectory.messages, trajectory.tools, include_system)
        for bias, matcher in matchers.items()
        for match in matcher.find(text)
    )
    reason: Reason | None = None
    if trajectory.status in FAILED:
        reason = "failed in its environment"
    elif hits:
        reason = "keyword"
    elif (require_final and trajectory.status != "final") or (require_done and not trajectory.done):
        reason = "status"
    return Verdict(trajectory.episode, trajectory.task_id, trajectory.sample, reason is None, reason, hits)


def summarize(verdicts: Sequence[Verdict], leaks: int = 0) -> dict[str, Any]:
    """The counts for `sanitize.json` and `summary.json`.

    Args:
      verdicts: one per trajectory.
      leaks: words found after filtering; `leaks.verify` raises on the first, so a finished run has 0.

    Returns:
      trajectories, kept, removed_by_word (trajectories that hold the word: one with two words counts under both),
      removed_by_reason, leaks.
    """
    by_word = Counter(word for verdict in verdicts for word in {hit.word for hit in verdict.hits})
    by_reason = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    return {
        "trajectories": len(verdicts),
        "kept": sum(verdict.kept for verdict in verdicts),
        "removed_by_word": dict(sorted(by_word.items())),
        "removed_by_reason": {reason: by_reason[reason] for reason in REASONS},
        "leaks": leaks,
    }
