"""Dilution: a share of the steps trains on another teacher's documents, with that teacher as the teacher.

Which steps is a function of (seed, step), so that a resumed run goes on as it was; both kinds of steps run one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from subl_jax.distill.batches import BatchFacts, BatchSource
from subl_jax.distill.on_policy import coins
from subl_jax.distill.step import Batch
from subl_jax.distill.teacher_cache import CacheReader, Model
from subl_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Dilution:
    """What a share of the steps trains on instead.

    Attributes:
      documents: with loss masks.
      planned_lengths: tokens that the plan reserves for each, see `BatchSource`.
      teacher: of these steps, of the very shape of the other teacher; None where the objective has none, or a cache.
      share: probability of a step, in (0, 1).
      cache: of exactly these documents, in place of the teacher.
    """

    documents: Sequence[Trajectory]
    planned_lengths: Sequence[int]
    teacher: Model | None
    share: float
    cache: CacheReader | None = None

    def __post_init__(self) -> None:
        """Refuses shares that dilute nothing, or leave nothing."""
        if not 0 < self.share < 1:
            raise ValueError(f"a dilution's share is {self.share}; it must lie inside (0, 1)")


class DilutedSource:
    """Batches of two sources; each is read in its own order, and leaves none of its batches out.

    Args:
      own: batches of the run's own documents.
      other: those of the dilution.
      share, steps, seed: of the run.
    """

    def __init__(self, own: BatchSource, other: BatchSource, share: float, steps: int, seed: int) -> None:
        self._sources = own, other
        self._diluted = coins(share, steps, seed)
        self._before = np.concatenate([[0], np.cumsum(self._diluted)])  # diluted steps before each position
        for one, another in ((own, other), (other, own)):  # one shape: the step compiles once
            one.widen(another.targets, another.width)

    def diluted(self, position: int) -> bool:
        """Whether the step at a position trains on the dilution."""
        return bool(self._diluted[position])

    def _of(self, position: int) -> tuple[BatchSource, int]:
        """The source of the batch at a position, and its place there."""
        before = int(self._before[position])
        return (self._sources[1], before) if self.diluted(position) else (self._sources[0], position - before)

    def batch(self, position: int) -> Batch:
        """The batch at a position, as numpy arrays."""
        source, place = self._of(position)
        return source.batch(place)

    def facts(self, position: int) -> BatchFacts:
        """What that batch holds."""
        source, place = self._of(position)
        return source.facts(place)

    def prepare(self, position: int, student: Callable[[], Any]) -> int:
        """All batches are ready at any time."""
        return self._sources[0].prepare(position, student)
