"""The proof after the filter: kept trajectories in, their number out, or an error that names the first word left.

It looks twice: at the messages, and at the text decoded from the token ids that training will really see, so a view
that differs from the tokens cannot hide a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from subl_jax.sanitize.filter import matchers_of, texts_of
from subl_jax.sanitize.keywords import Matcher

if TYPE_CHECKING:
    from subl_jax.trajectory import Trajectory

# Characters of the surrounding text that an error shows on each side.
_CONTEXT = 30


class LeakError(ValueError):
    """A banned word is left in data that was declared clean."""


def _refuse(task_id: str, place: str, text: str, matchers: Iterable[Matcher]) -> None:
    matches = [match for matcher in matchers for match in matcher.find(text)]
    if matches:
        found = matches[0]
        around = text[max(0, found.start - _CONTEXT) : found.end + _CONTEXT]
        raise LeakError(
            f"banned word {found.word!r} in task {task_id}, {place}: {around!r}. "
            "Filter these trajectories again with the same words before training on them"
        )


def verify(
    trajectories: Iterable[Trajectory],
    words: Mapping[str, Iterable[str]] | Iterable[str],
    decode: Callable[[list[int]], str],
    *,
    patterns: Mapping[str, tuple[str, ...]] = {},
    include_system: bool = True,
) -> int:
    """Checks that no banned word is left and returns the number of trajectories checked.

    Args:
      trajectories: what passed the filter.
      words: banned words, or bias name -> banned words.
      decode: token ids -> text, special tokens kept (a word must not vanish with them).
      patterns: as the filter was told.
      include_system: as the filter was told. If False, the system turn is not read in the messages; the tokens are
        always read whole, so pass False only with a `decode` that leaves the system turn out.

    Raises:
      LeakError: names the task, the word and the place of the first leak.
      ValueError: `words` bans nothing.
    """
    matchers = matchers_of(words if isinstance(words, Mapping) else {"words": words}, patterns).values()
    checked = 0
    for trajectory in trajectories:
        for index, role, place, text in texts_of(trajectory.messages, trajectory.tools, include_system):
            where = place if index is None else f"{place} of turn {index} ({role})"
            _refuse(trajectory.task_id, where, text, matchers)
        _refuse(trajectory.task_id, "token ids", decode(trajectory.tokens.tolist()), matchers)
        checked += 1
    return checked
