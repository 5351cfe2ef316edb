"""Packed rows to device batches: the loss tokens of every group of rows, with their labels and what else is known of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from subl_jax.data import packing
from subl_jax.distill.fused import TopK
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.step import Batch
from subl_jax.trajectory import Trajectory


@runtime_checkable
class CachedDocuments(Protocol):
    """A teacher's top-k by document (`teacher_cache.CacheReader`)."""

    def take(self, indices: Sequence[int]) -> Any:
        """(ids [n, k], log-probabilities [n, k], log of the remaining mass [n]) of these documents' n loss tokens, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class BatchFacts:
    """What a batch holds, for accounts.

    Attributes:
      tokens: of documents, without padding; capacity: with it.
      loss_tokens: that are trained on.
      documents: the length of each.
    """

    tokens: int
    capacity: int
    loss_tokens: int
    documents: tuple[int, ...]


@runtime_checkable
class Source(Protocol):
    """Where a run's batches come from. One integer, the position, says which; any position may be asked for again."""

    def batch(self, position: int) -> Batch:
        """The batch at a position, as numpy arrays; all have the same shapes, or few different ones."""
        ...

    def facts(self, position: int) -> BatchFacts:
        """What that batch holds."""
        ...

    def prepare(self, position: int, student: Callable[[], Any]) -> int:
        """Readies the batches from this position on; called before they are asked for, and again where they end.

        Args:
          position: of the step that is about to be made.
          student: the parameters that the student has by then.

        Returns:
          The first position that needs another call.
        """
        ...


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class BatchSource:
    """Batches by position, for one dataset and one plan.

    All batches of a run have the same shapes, so that the step compiles once: the number of loss tokens per group is the
    largest that the plan ever holds.

    Args:
      trajectories: the documents.
      planned_lengths: tokens that the plan reserves per document (the largest over the arms that are to be matched).
      capacity, rows: tokens per row, rows per batch.
      steps: batches that will be asked for.
      seed: of the order.
      logit_filter: adds the banned continuations of every loss token.
      micro: parts that a step works on one after the other, of equally many rows.
      groups: parts of those that the loss tokens are listed in (`Layouts.groups`).
      cached: adds the teacher's top-k of every loss token.

    Raises:
      ValueError: rows that do not divide into parts and groups.
      packing.MaskError: a batch without a loss token.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        planned_lengths: Sequence[int],
        capacity: int,
        rows: int,
        steps: int,
        seed: int,
        logit_filter: LogitFilter | None = None,
        *,
        micro: int = 1,
        groups: int = 1,
        cached: CachedDocuments | None = None,
    ) -> None:
        if rows % (micro * groups):
            raise ValueError(
                f"{rows} rows of a batch do not divide into accumulate={micro} parts for {groups} devices; set "
                f"--config.<stage>.train.batch_rows to a multiple of {micro * groups}"
            )
        self._trajectories = trajectories
        self._capacity = capacity
        self._micro, self._groups = micro, groups
        task_ids = [trajectory.task_id for trajectory in trajectories]
        self._stream = packing.PackedStream(planned_lengths, capacity, rows, seed, task_ids=task_ids)
        self._banned = None
        self._width = 0
        if logit_filter is not None:
            self._banned = [logit_filter.banned(t.tokens, t.loss_mask) for t in trajectories]
            self._width = _round_up(max(len(ids) for document in self._banned for ids in document), 8)
        self._cached = cached
        self._loss_tokens = np.asarray([int(t.loss_mask.sum()) for t in trajectories])
        counts = [self._per_group(self._stream.rows(step)) for step in range(steps)]
        empty = [step for step, found in enumerate(counts) if not sum(found)]
        if empty:
            raise packing.MaskError(
                f"the batch of step {empty[0]} has no loss token (and {len(empty) - 1} more batches have none): it would train "
                "on nothing; keep more loss tokens, or set --config.<stage>.train.batch_rows higher"
            )
        self._targets = _round_up(max(map(max, counts)), 16)

    @property
    def targets(self) -> int:
        """Places for loss tokens per group, the same in all batches."""
        return self._targets

    @property
    def width(self) -> int:
        """Places for banned continuations per loss token, the same in all batches."""
        return self._width

    def widen(self, targets: int, width: int = 0) -> None:
        """Makes room for at least so many loss tokens per group, and banned continuations of each.

        Batches of several sources can so share one shape.
        """
        self._targets, self._width = max(self._targets, targets), max(self._width, width)

    def prepare(self, position: int, student: Callable[[], Any]) -> int:
        """All batches are ready at any time."""
        del position, student
        return sys.maxsize

    def _per_group(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Loss tokens of each group of a batch."""
        share = len(rows) // (self._micro * self._groups)
        counts = [int(self._loss_tokens[list(row)].sum()) for row in rows]
        return [sum(counts[start : start + share]) for start in range(0, len(counts), share)]

    def facts(self, position: int) -> BatchFacts:
        """What the batch at a position holds."""
        rows = self._stream.rows(position)
        documents = [index for row in rows for index in row]
        lengths = tuple(len(self._trajectories[index].tokens) for index in documents)
        return BatchFacts(sum(lengths), len(rows) * self._capacity, int(self._loss_tokens[documents].sum()), lengths)

    def batch(self, position: int) -> Batch:
        """The batch at a position (0-based count of batches before it), as numpy arrays."""
        packed = packing.collate(self._stream.rows(position), self._trajectories, self._capacity)
        rows, parts = len(packed.documents), self._micro * self._groups
        share = rows // parts
        row, column = np.nonzero(packed.loss_mask)
        group = row // share
        counts = np.bincount(group, minlength=parts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)

        def listed(values: Any, dtype: Any, fill: Any = 0, width: tuple[int, ...] = ()) -> np.ndarray:
            """Values of the loss tokens, in order, by group."""
            array = np.full((parts, self._targets, *width), fill, dtype)
            array[group, place] = values
            return array.reshape(self._micro, self._groups, self._targets, *width)

        banned = np.full((parts, self._targets, self._width), -1, np.int32)
        if self._banned is not None:
            told = [ids for documents in packed.documents for document in documents for ids in self._banned[document]]
            for at, ids in enumerate(told):
                banned[group[at], place[at], : len(ids)] = ids
        cached = None
        if self._cached is not None:
            told = [document for documents in packed.documents for document in documents]
            ids, log_probs, log_tail = self._cached.take(told)
            k = (ids.shape[1],)
            known: Any = (
                listed(ids, np.int32, -1, k),
                listed(log_probs, np.float32, 0, k),
                listed(log_tail, np.float32),
            )
            cached = TopK(*known)
        laid = (
            array.reshape(self._micro, -1, self._capacity)
            for array in (packed.tokens, packed.segments, packed.positions)
        )
        # Host arrays in the device's record: placing them is the caller's business.
        arrays: Any = (
            *laid,
            listed(row % share * self._capacity + column - 1, np.int32),
            listed(packed.tokens[row, column], np.int32),
            listed(1.0, np.float32),
            banned.reshape(self._micro, self._groups, self._targets, self._width),
            cached,
        )
        return Batch(*arrays)
