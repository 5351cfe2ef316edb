"""Packing: several documents per row of a fixed length, in an order fixed by (seed, epoch) alone.

Lengths go in; `plan_rows` says which documents share a row, `PackedStream` finds the rows of any batch by one integer,
and `collate` turns rows into arrays. The plan depends only on lengths and seed, so two arms with the same planned
lengths see the same documents in the same order.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from subl_jax.trajectory import Trajectory

# Rows still open for a document that fits. More rows would pack a little tighter and scatter the order more.
LOOK_BACK = 64


class PackingError(ValueError):
    """A document does not fit into a row, or a plan does not fit its documents."""


class MaskError(ValueError):
    """A loss mask that would train on nothing, on everything, or on a token that nothing precedes."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
      tokens: int32 [rows, capacity]; 0 where padded.
      segments: int32 [rows, capacity]; 1, 2, … for the documents of a row, 0 where padded.
      positions: int32 [rows, capacity]; 0, 1, … within each document, 0 where padded.
      loss_mask: bool [rows, capacity]; true where the token *at this place* is a target, predicted from the place
        before it. Never true on the first token of a document.
      documents: per row the document indices, in the order of their segments.
    """

    tokens: Int[np.ndarray, "rows capacity"]
    segments: Int[np.ndarray, "rows capacity"]
    positions: Int[np.ndarray, "rows capacity"]
    loss_mask: Bool[np.ndarray, "rows capacity"]
    documents: tuple[tuple[int, ...], ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays by name, for a jitted step."""
        return {
            "tokens": self.tokens,
            "segments": self.segments,
            "positions": self.positions,
            "loss_mask": self.loss_mask,
        }


# --- Planning ---------------------------------------------------------------------------------------------------------


def check_lengths(lengths: Sequence[int] | np.ndarray, capacity: int, task_ids: Sequence[str] | None = None) -> None:
    """Refuses documents that no row can hold.

    Raises:
      PackingError: naming the first such document, its length, and the remedy.
    """
    array = np.asarray(lengths)
    if capacity < 1:
        raise PackingError(f"row capacity is {capacity}; it must be at least 1")
    if not len(array):
        raise PackingError("there are no documents to pack; check the stage before")
    wrong = np.flatnonzero((array > capacity) | (array < 1))
    if len(wrong):
        index = int(wrong[0])
        name = f"document {index}" + (f" (task {task_ids[index]})" if task_ids is not None else "")
        if array[index] < 1:
            raise PackingError(f"{name} has length {array[index]}; drop empty documents before packing")
        raise PackingError(
            f"{name} has {array[index]} tokens, a row holds {capacity}; raise the row length to at least "
            f"{int(array.max())} or drop the {len(wrong)} documents that are longer"
        )


def epoch_order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    """The permutation of `count` documents for this (seed, epoch); the same on every platform and process."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed={seed} and epoch={epoch} must not be negative")
    # Philox is counter-based: distinct keys give independent streams, so no epoch is derived from another.
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def plan_rows(
    lengths: Sequence[int] | np.ndarray,
    capacity: int,
    seed: int,
    epoch: int,
    *,
    task_ids: Sequence[str] | None = None,
) -> list[list[int]]:
    """The rows of one epoch: each document exactly once, the lengths in a row at most `capacity` together.

    Documents come in the order of `epoch_order`; each goes into the oldest of the last `LOOK_BACK` open rows that still
    holds it (first fit), else opens a new row. Rows stand in the order in which they were opened.

    Args:
      lengths: planned tokens per document.
      capacity: tokens per row.
      seed: of the permutation.
      epoch: of the permutation.
      task_ids: names for the error message.

    Raises:
      PackingError: a document longer than a row, or none at all.
    """
    check_lengths(lengths, capacity, task_ids)
    return _plan(np.asarray(lengths), capacity, seed, epoch)


def _plan(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> list[list[int]]:
    order = epoch_order(len(lengths), seed, epoch)
    shortest = int(lengths.min())
    rows: list[list[int]] = []
    room: list[int] = []  # tokens left in each open row, oldest first
    open_rows: list[list[int]] = []
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        for place, left in enumerate(room):
            if left >= length:
                open_rows[place].append(index)
                if left - length >= shortest:
                    room[place] = left - length
                else:  # nothing fits any more
                    del room[place], open_rows[place]
                break
        else:
            row = [index]
            rows.append(row)
            if capacity - length >= shortest:
                room.append(capacity - length)
                open_rows.append(row)
                if len(room) > LOOK_BACK:
                    del room[0], open_rows[0]
    return rows


class PackedStream:
    """An endless stream of batches of rows, addressed by one integer: the number of batches consumed so far.

    The rows of epoch 0 are followed by those of epoch 1 and so on; a batch may span epochs. Any position may be asked
    for in any order, so a resumed run stores the position and nothing else.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        capacity: int,
        batch_rows: int,
        seed: int,
        *,
        task_ids: Sequence[str] | None = None,
    ):
        """Plans nothing yet; see `plan_rows` for the arguments and errors. `batch_rows` is the rows per batch."""
        check_lengths(lengths, capacity, task_ids)
        if batch_rows < 1:
            raise PackingError(f"batch_rows is {batch_rows}; it must be at least 1")
        self._lengths = np.asarray(lengths)
        self._capacity = capacity
        self._batch_rows = batch_rows
        self._seed = seed
        self._ends: list[int] = []  # rows up to and including each epoch
        self._plans: collections.OrderedDict[int, list[list[int]]] = collections.OrderedDict()

    def _plan_of(self, epoch: int) -> list[list[int]]:
        """The plan of an epoch; the last four are kept, an older one is planned again."""
        if epoch not in self._plans:
            self._plans[epoch] = _plan(self._lengths, self._capacity, self._seed, epoch)
            if len(self._plans) > 4:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def _rows_through(self, epoch: int) -> int:
        """Rows of the epochs 0 … `epoch` together."""
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._plan_of(len(self._ends))))
        return self._ends[epoch]

    def rows(self, position: int) -> list[list[int]]:
        """The rows of the batch at `position`: lists of document indices, `batch_rows` of them."""
        if position < 0:
            raise ValueError(f"position is {position}; it counts batches from 0")
        wanted = range(position * self._batch_rows, (position + 1) * self._batch_rows)
        while not self._ends or self._ends[-1] < wanted.stop:
            self._rows_through(len(self._ends))
        batch = []
        for row in wanted:
            epoch = bisect.bisect_right(self._ends, row)
            start = self._ends[epoch - 1] if epoch else 0
            batch.append(self._plan_of(epoch)[row - start])
        return [list(row) for row in batch]

    def num_batches(self, epochs: int) -> int:
        """The fewest batches that hold `epochs` whole epochs; the last one may reach into the epoch after them."""
        if epochs < 0:
            raise ValueError(f"epochs is {epochs}; it must not be negative")
        return -(-self._rows_through(epochs - 1) // self._batch_rows) if epochs else 0


# --- Collating --------------------------------------------------------------------------------------------------------


def collate(rows: Sequence[Sequence[int]], trajectories: Sequence[Trajectory], capacity: int) -> Batch:
    """Lays the documents of each row end to end and pads to `capacity`.

    A document shorter than planned leaves its tokens as padding at the end of the row.

    Args:
      rows: document indices per row, from `plan_rows` or `PackedStream.rows`.
      trajectories: the documents, indexed by the plan.
      capacity: tokens per row.

    Raises:
      PackingError: a row does not hold its documents.
      MaskError: no target in the batch; a document whose every token is a target; a target on a first token.
    """
    flat = [index for row in rows for index in row]
    if not flat:
        raise PackingError("the batch holds no documents; check the plan")
    documents = [trajectories[index] for index in flat]
    lengths = np.array([len(document.tokens) for document in documents])
    per_row = np.array([len(row) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), per_row)  # [documents]
    before = np.cumsum(lengths) - lengths  # tokens before each document, over the whole batch
    used = np.bincount(row_of, weights=lengths, minlength=len(rows)).astype(np.int64)
    if used.max() > capacity:
        worst = int(used.argmax())
        raise PackingError(
            f"row {worst} (documents {list(rows[worst])}) has {used[worst]} tokens, a row holds {capacity}; "
            "plan with lengths that no arm's document exceeds"
        )
    row_start = np.cumsum(used) - used
    total = int(lengths.sum())
    offset = np.arange(total) - np.repeat(before, lengths)  # position within its document
    target = np.arange(total) + np.repeat(row_of * capacity - row_start[row_of], lengths)
    segment_of = np.arange(len(flat)) - np.repeat(np.cumsum(per_row) - per_row, per_row) + 1

    mask = np.concatenate([document.loss_mask for document in documents])
    _check_masks(mask, before, lengths, documents)
    batch = {}
    for name, values, dtype in (
        ("tokens", np.concatenate([document.tokens for document in documents]), np.int32),
        ("segments", np.repeat(segment_of, lengths), np.int32),
        ("positions", offset, np.int32),
        ("loss_mask", mask, np.bool_),
    ):
        array = np.zeros(len(rows) * capacity, dtype)
        array[target] = values
        batch[name] = array.reshape(len(rows), capacity)
    return Batch(**batch, documents=tuple(tuple(row) for row in rows))


def _check_masks(mask: np.ndarray, before: np.ndarray, lengths: np.ndarray, documents: Sequence[Trajectory]) -> None:
    if len(mask) != lengths.sum():
        raise MaskError("a loss mask is not as long as its tokens; render the conversation again")
    if not mask.any():
        raise MaskError(
            f"no token of the batch is a target (first task {documents[0].task_id}): it would train on nothing; "
            "check that the template marks the assistant's tokens"
        )
    targets = np.add.reduceat(mask.astype(np.int64), before)
    # A first token cannot be predicted, so "everything" is all tokens but the first.
    everything = np.flatnonzero((targets >= lengths - 1) & (lengths > 1) | mask[before] & (lengths == 1))
    if len(everything):
        raise MaskError(
            f"every token of task {documents[everything[0]].task_id} is a target: it would train on the prompt; "
            "check that the template marks only the assistant's tokens"
        )
    first = np.flatnonzero(mask[before])
    if len(first):
        raise MaskError(
            f"the first token of task {documents[first[0]].task_id} is a target, but nothing precedes it; "
            "a conversation must start with a token that the assistant did not write"
        )
