"""Packed rows to device batches: the loss tokens of every row listed with their labels and banned continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from subl_jax.data import packing
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.step import Batch
from subl_jax.trajectory import Trajectory


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class BatchSource:
    """Batches by position, for one dataset and one plan.

    All batches of a run have the same shapes, so that the step compiles once: the number of loss tokens per row is the
    largest that the plan ever holds.

    Args:
      trajectories: the documents.
      planned_lengths: tokens that the plan reserves per document (the largest over the arms that are to be matched).
      capacity, rows: tokens per row, rows per batch.
      steps: batches that will be asked for.
      seed: of the order.
      logit_filter: adds the banned continuations of every loss token.
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
    ) -> None:
        self._trajectories = trajectories
        self._capacity = capacity
        task_ids = [trajectory.task_id for trajectory in trajectories]
        self._stream = packing.PackedStream(planned_lengths, capacity, rows, seed, task_ids=task_ids)
        self._banned = None
        self._width = 0
        if logit_filter is not None:
            self._banned = [logit_filter.banned(t.tokens, t.loss_mask) for t in trajectories]
            self._width = _round_up(max(len(ids) for document in self._banned for ids in document), 8)
        per_document = np.asarray([int(t.loss_mask.sum()) for t in trajectories])
        most = max(int(per_document[row].sum()) for step in range(steps) for row in self._stream.rows(step))
        self._targets = _round_up(most, 16)

    def batch(self, position: int) -> Batch:
        """The batch at a position (0-based count of batches before it), as numpy arrays."""
        packed = packing.collate(self._stream.rows(position), self._trajectories, self._capacity)
        rows = len(packed.documents)
        row, column = np.nonzero(packed.loss_mask)
        counts = np.bincount(row, minlength=rows)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        loss_places, loss_targets = (np.zeros((rows, self._targets), np.int32) for _ in range(2))
        loss_weights = np.zeros((rows, self._targets), np.float32)
        loss_places[row, place] = column - 1
        loss_targets[row, place] = packed.tokens[row, column]
        loss_weights[row, place] = 1.0
        banned = np.full((rows, self._targets, self._width), -1, np.int32)
        if self._banned is not None:
            for index, documents in enumerate(packed.documents):
                ids_per_token = [ids for document in documents for ids in self._banned[document]]
                for target, ids in enumerate(ids_per_token):
                    banned[index, target, : len(ids)] = ids
        # Host arrays in the device's record: placing them is the caller's business.
        arrays: Any = (
            packed.tokens,
            packed.segments,
            packed.positions,
            loss_places,
            loss_targets,
            loss_weights,
            banned,
        )
        return Batch(*arrays)
