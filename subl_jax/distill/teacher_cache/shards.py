"""The teacher cache's files of records, one block of documents each: planned, computed, measured, written.

A shard is complete when its note lies beside it; a killed run goes on with those that are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from subl_jax import artifacts
from subl_jax.data import packing
from subl_jax.distill.teacher_cache import records as cache_records
from subl_jax.distill.teacher_cache import top_k as teacher_top_k
from subl_jax.distill.teacher_cache.identities import Model
from subl_jax.parallel.layout import Layout
from subl_jax.trajectory import Trajectory


def file_entry(path: Path) -> list[Any]:
    """A file as manifests have it: [bytes, SHA-256 in hex]."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def records_file(shard: int) -> str:
    """The file of a shard's records, back to back."""
    return f"records-{shard:05d}.bin"


def note_file(shard: int) -> str:
    """The file that says that a shard is complete, and what was measured on it."""
    return f"shard-{shard:05d}.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents whose records make one file, and the packed rows they are computed in."""

    documents: range
    tokens: int
    batches: list[list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Work:
    """What `write` computes with, the same for every batch."""

    teacher: Model
    reference: Model | None
    trajectories: Sequence[Trajectory]
    k: int
    temperature: float
    shared_tokens: int
    capacity: int
    targets: int
    chunk_tokens: int
    layout: Layout | None

    def dispatch(self, rows: list[list[int]], measured: bool) -> tuple[list[int], Any]:
        """Starts a batch on the device: (documents in the order of their loss tokens, its results)."""
        packed = packing.collate(rows, self.trajectories, self.capacity)
        row, column = np.nonzero(packed.loss_mask)
        places = np.zeros(self.targets, np.int32)
        places[: len(row)] = row * self.capacity + column - 1
        run = teacher_top_k.program(
            self.teacher.config,
            self.reference and self.reference.config,
            k=self.k,
            temperature=self.temperature,
            shared_tokens=self.shared_tokens,
            chunk_tokens=self.chunk_tokens,
            measured=measured,
            layout=self.layout,
        )
        arrays = packed.tokens, packed.positions, packed.segments
        if self.layout is not None:
            arrays = self.layout.shard_batch(arrays)
        found = run(self.teacher.params, self.reference and self.reference.params, *arrays, places)
        if self.layout is not None and self.layout.platform == "cpu":
            jax.block_until_ready(found)  # fake devices share a thread pool: programs in flight starve each other
        return [index for row in rows for index in row], found


def plan(
    trajectories: Sequence[Trajectory], counts: np.ndarray, capacity: int, rows: int, shard_tokens: int
) -> list[Shard]:
    """Cuts the dataset into blocks of documents, and packs each into batches of its own."""
    stops, tokens = [], 0
    for index, count in enumerate(counts.tolist()):
        tokens += count
        if tokens >= shard_tokens:
            stops.append(index + 1)
            tokens = 0
    if tokens:
        stops.append(len(counts))
    stops[-1] = len(counts)  # documents without loss tokens may follow the last one that has some
    shards = []
    for start, stop in itertools.pairwise([0, *stops]):
        used = [index for index in range(start, stop) if counts[index]]
        packed = packing.plan_rows([len(trajectories[index].tokens) for index in used], capacity, 0, 0)
        lines = [[used[place] for place in row] for row in packed]
        lines += [[] for _ in range(-len(lines) % rows)]
        batches = [lines[at : at + rows] for at in range(0, len(lines), rows)]
        shards.append(Shard(range(start, stop), int(counts[start:stop].sum()), batches))
    return shards


def finished(partial: Path, number: int) -> dict[str, Any] | None:
    """What a killed run noted of a shard, if its records are whole."""
    try:
        done = artifacts.unseal(partial / note_file(number))
    except ValueError:
        return None
    return None if artifacts.manifest_problem(partial, {records_file(number): done["file"]}) else done


def write_shard(
    partial: Path, number: int, work: Work, shard: Shard, counts: np.ndarray, before: int, every: int
) -> dict[str, Any]:
    """Computes and writes the records of a shard; `before` batches of the dataset precede it."""
    own = counts[shard.documents.start : shard.documents.stop]
    starts = np.cumsum(own) - own
    records = np.empty(shard.tokens, cache_records.record_type(work.k, work.shared_tokens))
    errors: list[np.ndarray] = []
    for documents, found in _one_ahead(work, shard, before, every):
        sizes = counts[documents]
        # Where each document's records go: the rows of a batch hold documents in no order.
        goal = np.repeat(starts[np.array(documents) - shard.documents.start] - (np.cumsum(sizes) - sizes), sizes)
        goal += np.arange(len(goal))
        used = slice(len(goal))
        top, reference = jax.tree.map(lambda leaf, used=used: np.asarray(leaf)[used], found)
        encoded = cache_records.encode(top.ids, top.drops, top.log_tail, top.log_normaliser, work.shared_tokens)
        records[goal] = encoded
        if reference is not None:
            errors.append(_errors(encoded, top, reference, work.shared_tokens))
    path = partial / records_file(number)
    with path.open("wb") as file:
        file.write(records.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    measured = np.concatenate(errors, axis=1) if errors else np.zeros((len(ERRORS), 0))
    done = {
        "file": file_entry(path),
        "tail_mass": float(np.exp(records["log_tail"], dtype=np.float64).sum()),
        "measured": measured.shape[1],
        "sums": measured.sum(axis=1).tolist(),
        "largest": measured.max(axis=1, initial=0.0).tolist(),
    }
    artifacts.write_json_atomic(partial / note_file(number), artifacts.sealed(done))
    return done


def _one_ahead(work: Work, shard: Shard, before: int, every: int) -> Iterator[tuple[list[int], Any]]:
    """Results of every batch of a shard; the device computes the next one while this one is packed."""
    waiting = None
    for number, rows in enumerate(shard.batches, before):
        started = work.dispatch(rows, number % every == 0)
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


# Rows of what `_errors` returns.
ERRORS = ("kl_full", "kl_atoms", "added_error", "quantisation_error", "quantisation_kl")


def _errors(
    records: np.ndarray, top: teacher_top_k.TopK, reference: teacher_top_k.Reference, vocab: int
) -> Float64[np.ndarray, "errors tokens"]:
    """What is lost at each token, in nats: from the bytes that are written, as a reader will see them."""
    stored = cache_records.decode(records, vocab)
    drops, tail = np.asarray(top.drops, np.float64), np.asarray(top.log_tail, np.float64)
    exact = (np.log(-np.expm1(tail)) - np.log(np.exp(-drops).sum(axis=1)))[:, None] - drops
    other = np.asarray(reference.log_probs), np.asarray(reference.log_tail)
    full = np.asarray(reference.kl, np.float64)
    atoms = cache_records.atoms_kl(stored.log_probs, stored.log_tail, *other)
    unrounded = cache_records.atoms_kl(exact, tail, *other)
    rounding = cache_records.atoms_kl(exact, tail, stored.log_probs, stored.log_tail)
    return np.stack([full, atoms, np.abs(full - atoms), np.abs(unrounded - atoms), rounding])
