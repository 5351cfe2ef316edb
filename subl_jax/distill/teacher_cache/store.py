"""The teacher cache: the teacher's top k of a dataset on disk, so that many students are distilled without the teacher.

Trajectories and a teacher go in; a directory comes out with a record per loss token: the k likeliest ids of the softened
distribution, their log-probabilities, the log of the mass of all others, and the log-normaliser. It is bound to teacher,
tokenizer, dataset and temperature, and refused by name where one differs. The directory appears complete or not at all;
a killed `write` goes on with the shards that it had finished.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from subl_jax import artifacts
from subl_jax.distill.teacher_cache import identities as cache_identity
from subl_jax.distill.teacher_cache import records as cache_records
from subl_jax.distill.teacher_cache import shards as cache_shards
from subl_jax.distill.teacher_cache.identities import CacheError, CacheMismatch, Model
from subl_jax.distill.teacher_cache.records import Targets
from subl_jax.models import axes
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout
from subl_jax.trajectory import Trajectory

METADATA = "metadata.json"
_FORMAT = 1
_PLAN, _COUNTS = "plan.json", "counts.bin"
# What a run without the teacher knows as well, and must state; `teacher` and `k` are compared where they are given.
_REQUIRED = ("tokenizer", "dataset", "temperature", "shared_tokens")
# Float32 logits of one chunk: 128 MiB, small beside any teacher of a large vocabulary.
_CHUNK_LOGITS = 1 << 25


# --- Reading ----------------------------------------------------------------------------------------------------------


class CacheReader:
    """A cache on disk, opened for random access by document; its files are mapped, not read.

    Attributes:
      k: continuations per loss token.
      vocab: ids are below it (`shared_tokens`).
      temperature: at which the teacher was softened.
      identity: what it is bound to.
      figures: what `write` returned.
    """

    def __init__(self, directory: str | os.PathLike[str], expect: Mapping[str, Any]) -> None:
        """Checks every file against its size and checksum, and the identity against `expect`.

        Args:
          directory: of the cache.
          expect: from `identity`.

        Raises:
          CacheMismatch: the cache is of something else; every differing field is named.
          CacheError: no cache, or a missing, truncated or corrupt file.
        """
        root = Path(directory)
        missing = [name for name in _REQUIRED if name not in expect]
        if missing:
            raise CacheError(f"to open {root}, say what {', '.join(missing)} must be (teacher_cache.identity)")
        body = _unsealed(root)
        _compare(root, body["identity"], expect)
        problem = artifacts.manifest_problem(root, body["files"])
        if problem:
            raise CacheError(f"{problem}; {_remedy(root)}")
        about = body["identity"]
        self.k, self.vocab, self.temperature = about["k"], about["shared_tokens"], about["temperature"]
        self.identity, self.figures = about, _figures(root, body)
        record = cache_records.record_type(self.k, self.vocab)
        counts = np.fromfile(root / _COUNTS, "<u4").astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._shards = [np.memmap(root / cache_shards.records_file(i), record, "r") for i in range(body["shards"])]
        self._shard_starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._starts) - 1

    def counts(self) -> Int[np.ndarray, " documents"]:
        """Loss tokens of each document."""
        return np.diff(self._starts)

    def _slice(self, index: int) -> Shaped[np.ndarray, " tokens"]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        # Shards are cut between documents.
        shard = min(int(np.searchsorted(self._shard_starts, start, "right")) - 1, len(self._shards) - 1)
        before = int(self._shard_starts[shard])
        return self._shards[shard][start - before : stop - before]

    def document(self, index: int) -> Targets:
        """The teacher at each loss token of a document, in order: (ids, log_probs, log_tail)."""
        return self.take([index])

    def take(self, indices: Sequence[int]) -> Targets:
        """The loss tokens of several documents one after another; for short ones this is faster than one by one."""
        records = [np.asarray(self._slice(index)) for index in indices]
        return cache_records.decode(np.concatenate(records) if len(records) > 1 else records[0], self.vocab)

    def log_normaliser(self, index: int) -> Float[np.ndarray, " tokens"]:
        """Logsumexp of logits / temperature at each loss token: log_probs + this are the teacher's softened logits."""
        return self._slice(index)["log_normaliser"].astype(np.float32)


def _remedy(root: Path) -> str:
    return f"delete {root} and write the cache again"


def _unsealed(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise CacheError(f"{root}: no such teacher cache; write it first")
    try:
        body = artifacts.unseal(root / METADATA)
    except ValueError as error:
        raise CacheError(f"{error}; {_remedy(root)}") from error
    if body.get("format") != _FORMAT:
        raise CacheError(f"{root}: format {body.get('format')} where this version reads {_FORMAT}; {_remedy(root)}")
    return body


def _compare(root: Path, stored: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """Refuses a cache that differs in any field of `expect`."""
    wanted = artifacts.plain(expect)
    found = artifacts.differences({name: stored[name] for name in stored if name in wanted}, wanted)
    if found:
        what = artifacts.describe(found, "the cache", "this run", limit=len(found))
        raise CacheMismatch(
            f"{root} is the cache of something else ({what}); use another directory, or {_remedy(root)}"
        )


def _figures(root: Path, body: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured at writing, with the size of every file that is there because of the cache."""
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {**body["figures"], "bytes_per_token": size / body["figures"]["tokens"]}


# --- Writing ----------------------------------------------------------------------------------------------------------


def write(
    directory: str | os.PathLike[str],
    trajectories: Sequence[Trajectory],
    teacher: Model,
    *,
    k: int = 64,
    temperature: float = 1.0,
    shared_tokens: int,
    identity: Mapping[str, Any],
    reference: Model | None = None,
    layout: Layout | None = None,
    batch_tokens: int = 8192,
    chunk_tokens: int = 0,
    shard_tokens: int = 1 << 18,
    measured_tokens: int = 1 << 16,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the teacher's top k at every loss token of a dataset, and measures what that loses.

    Args:
      directory: the final place; must not exist (or be empty) unless `overwrite`.
      trajectories: the dataset. Documents without loss tokens have no records.
      teacher: run in its own dtype; logits are float32.
      k: continuations per token, at most the shared vocabulary (a larger k is clipped to it).
      temperature: divides the logits.
      shared_tokens: ids from here on have no probability.
      identity: of this very cache, from `identity`.
      reference: to which the KL is measured, e.g. the student's starting point, of the same tokenizer. None: the teacher
        itself at twice the temperature.
      layout: the mesh on which teacher and reference lie; None: one device.
      batch_tokens: tokens of a pass, or one row where a document is longer.
      chunk_tokens: loss tokens whose logits exist at one time; 0: as many as 128 MiB hold.
      shard_tokens: loss tokens per file, and what a killed run may have to do again.
      measured_tokens: about how many loss tokens the figures on the KL are measured on, spread over the dataset.
      overwrite: replace an older cache.

    Returns:
      documents, tokens, k, bytes_per_token (all files, index and metadata included), tail_mass (mean), and, in nats over
      `measured_tokens` tokens: kl_full = mean KL(teacher || reference) over the vocabulary, kl_atoms = the same between
      what is read back, k ids and a tail, and the reference; added_error and added_error_max = mean and largest
      |kl_full - kl_atoms| of a token; quantisation_error and quantisation_kl = how much of it the stored grid of
      probabilities makes, and the KL from the exact atoms to the stored ones; reference = what it was.

    Raises:
      CacheError: no loss tokens, an identity of something else, an existing directory, or a file that cannot be written.
      ValueError: a k, temperature or vocabulary that cannot be.
    """
    root = Path(directory).absolute()
    _check(teacher, reference, k, temperature, shared_tokens)
    k = min(k, shared_tokens)
    counts = np.array([int(item.loss_mask.sum()) for item in trajectories], np.int64)
    if not counts.sum():
        raise CacheError(f"no loss tokens in {len(trajectories)} documents; check the loss masks")
    own = cache_identity.identity(teacher, identity.get("tokenizer", ""), trajectories, temperature, k, shared_tokens)
    if found := artifacts.differences(artifacts.plain(identity), own):
        raise CacheError(f"the identity of {root} is not its own: {artifacts.describe(found, 'it', 'the arguments')}")
    parts = layout.split("batch") if layout is not None else 1
    longest = max(len(item.tokens) for item, count in zip(trajectories, counts, strict=True) if count)
    capacity = _round_up(max(longest, min(batch_tokens, 256)), 128)
    rows = _round_up(max(batch_tokens // capacity, 1), parts)
    shards = cache_shards.plan(trajectories, counts, capacity, rows, shard_tokens)
    most = max(int(counts[sum(batch, [])].sum()) for shard in shards for batch in shard.batches)
    chunk = chunk_tokens or min(max(_CHUNK_LOGITS // max(teacher.config.vocab_size, 1), 16), 1024)
    chunk = _round_up(min(chunk, _round_up(most, 16)), parts)
    work = cache_shards.Work(
        teacher=_placed(teacher, layout),
        reference=reference and _placed(reference, layout),
        trajectories=trajectories,
        k=k,
        temperature=temperature,
        shared_tokens=shared_tokens,
        capacity=capacity,
        targets=_round_up(most, chunk),
        chunk_tokens=chunk,
        layout=layout,
    )
    plan = {
        "format": _FORMAT,
        "identity": own,
        "rows": [rows, capacity],
        "shards": [[shard.documents.start, shard.documents.stop, shard.tokens] for shard in shards],
        "reference": "the teacher at twice the temperature"
        if reference is None
        else cache_identity.model_identity(reference),
        "every": max(1, math.ceil(int(counts.sum()) / measured_tokens)),
    }
    try:
        partial = _open_partial(root, plan, overwrite)
        notes, before = [], 0
        for number, shard in enumerate(shards):
            note = cache_shards.finished(partial, number)
            if note is None:
                note = cache_shards.write_shard(partial, number, work, shard, counts, before, plan["every"])
            notes.append(note)
            before += len(shard.batches)
        return _seal(partial, root, plan, counts, notes)
    except (OSError, artifacts.WorkdirError) as error:
        raise CacheError(f"cannot write the teacher cache {root}: {artifacts.reason(error)}") from error


def _check(teacher: Model, reference: Model | None, k: int, temperature: float, shared_tokens: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}; a cache holds at least 1 continuation per token")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")
    for name, model in (("teacher", teacher), ("reference", reference)):
        if model is not None and not 1 <= shared_tokens <= model.config.known_tokens:
            raise ValueError(
                f"shared_tokens={shared_tokens} where the {name} knows {model.config.known_tokens} tokens; use the number "
                "of ids that both tokenizers agree on"
            )
    if jax.process_count() > 1:
        raise CacheError(f"a teacher cache is written by one process, not {jax.process_count()}; run one")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _placed(model: Model, layout: Layout | None) -> Model:
    return model if layout is None else _Placed(model.config, axes.place(model.params, model.config, layout))


@dataclasses.dataclass(frozen=True)
class _Placed:
    config: ModelConfig
    params: Any


def _open_partial(root: Path, plan: Mapping[str, Any], overwrite: bool) -> Path:
    """The directory that is written to, with the finished shards of a killed run of the same plan, if there are any."""
    if root.exists() and not overwrite and not (root.is_dir() and not any(root.iterdir())):
        raise CacheError(f"{root} exists already; delete it or choose another directory")
    partial = artifacts.partial_path(root)
    try:
        same = artifacts.unseal(partial / _PLAN) == artifacts.plain(plan)
    except ValueError:
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        artifacts.write_json_atomic(partial / _PLAN, artifacts.sealed(plan))
    return partial


def _seal(
    partial: Path, root: Path, plan: Mapping[str, Any], counts: np.ndarray, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Makes the cache of its shards, and gives it its final name."""
    counts.astype("<u4").tofile(partial / _COUNTS)
    measured = sum(shard["measured"] for shard in shards)
    means = np.sum([shard["sums"] for shard in shards], axis=0) / measured
    reference = plan["reference"]
    tokens = int(counts.sum())
    figures = {
        "documents": len(counts),
        "tokens": tokens,
        "k": plan["identity"]["k"],
        "tail_mass": sum(shard["tail_mass"] for shard in shards) / tokens,
        "measured_tokens": measured,
        "reference": reference if isinstance(reference, str) else reference["parameters"],
        **dict(zip(cache_shards.ERRORS, means.tolist(), strict=True)),
        "added_error_max": max(shard["largest"][cache_shards.ERRORS.index("added_error")] for shard in shards),
    }
    files = {cache_shards.records_file(number): shard["file"] for number, shard in enumerate(shards)}
    files[_COUNTS] = cache_shards.file_entry(partial / _COUNTS)
    body = {
        "format": _FORMAT,
        "identity": plan["identity"],
        "shards": len(shards),
        "figures": figures,
        "files": files,
    }
    artifacts.write_json_atomic(partial / METADATA, artifacts.sealed(body))
    for name in (_PLAN, *(cache_shards.note_file(number) for number in range(len(shards)))):
        (partial / name).unlink()
    artifacts.publish(partial, root)
    return _figures(root, body)
