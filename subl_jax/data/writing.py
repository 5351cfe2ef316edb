"""A trajectory dataset on disk, written: by one process, or by several that each write their shard.

Trajectories in episode order go in, and a directory is left that opens with
`tfds.builder_from_directory(DIR).as_data_source("train")`; its `trajectories.jsonl` holds the same episodes for any
reader of OpenAI-style `messages` + `tools`. The directory appears complete or not at all. No TensorFlow, no network,
no JAX: where several processes write, the caller lets `seal_shards` wait for all of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from subl_jax import artifacts
from subl_jax.data.dataset import FORMAT, METADATA, DatasetError
from subl_jax.data.record import flaw, json_text, key_of, name_of, to_line, to_record
from subl_jax.metrics.quiet import quiet
from subl_jax.trajectory import Trajectory

JSONL = "trajectories.jsonl"
_NOTHING = "no trajectories to write; check the stage before (did the filter drop them all?)"

# A shard in the staging place, a folder of three files.
_RECORDS = "records.array_record"
_LINES = "lines.jsonl"
_SHARD = "shard.json"


def block(count: int, rank: int, world: int) -> range:
    """The contiguous block of `count` indices that falls to process `rank` of `world`.

    Sizes differ by at most one, and the longer blocks come first; with fewer indices than processes, the last blocks are
    empty.
    """
    _check_rank(rank, world)
    if count < 0:
        raise ValueError(f"count={count} must not be negative")
    size, longer = divmod(count, world)
    start = rank * size + min(rank, longer)
    return range(start, start + size + (rank < longer))


def write(
    directory: str | os.PathLike[str],
    trajectories: Sequence[Trajectory],
    *,
    metadata: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes the whole dataset from one process, atomically: `directory` appears complete or not at all.

    Args:
      directory: the final place; must not exist (or be empty) unless `overwrite`.
      trajectories: sorted by (episode, sample), without duplicates, at least one.
      metadata: free-form JSON, given back by `read_metadata`.
      overwrite: replace an older dataset.

    Raises:
      DatasetError: unsorted or malformed trajectories, an existing directory, or a file that cannot be written.
    """
    if not trajectories:
        raise DatasetError(_NOTHING)
    try:
        write_shard(directory, 0, 1, trajectories)
        seal_shards(directory, 1, metadata=metadata, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(_staging(directory), ignore_errors=True)
        raise


def write_shard(directory: str | os.PathLike[str], rank: int, world: int, trajectories: Sequence[Trajectory]) -> None:
    """Writes the part of one process to a staging place beside `directory`; `seal_shards` makes the dataset of all parts.

    What an earlier try left there of this rank, or of another number of processes, is removed first.

    Args:
      directory: the final place, the same for every process, on a file system that all of them see.
      rank, world: this process and the number of processes. Episodes of a rank come before those of the next.
      trajectories: sorted by (episode, sample), without duplicates; there may be none.

    Raises:
      DatasetError: unsorted or malformed trajectories, or a file that cannot be written.
    """
    quiet("tensorflow_datasets", "array_record", "etils")
    _check_rank(rank, world)
    staging, name = _staging(directory), _shard_name(rank, world)
    with _one_line(directory):
        # First of all, so that a failure leaves no old shard of this rank beside new ones of the others.
        stay = _of_world(staging, world) - {staging / name}
        for path in set(staging.glob("*")) - stay:
            shutil.rmtree(path, ignore_errors=True)  # another process may be removing it, too
        _check(trajectories)
        # Imported here because TFDS takes a quarter of a second to import.
        from subl_jax.data import files

        with artifacts.atomic_directory(staging / name) as partial:
            with (partial / _LINES).open("w", encoding="ascii") as lines:
                size = files.write_records(partial / _RECORDS, _records(trajectories, lines))
            body = {
                "format": FORMAT,
                "count": len(trajectories),
                "bytes": size,
                "ends": [key_of(trajectories[index]) for index in (0, -1)] if trajectories else [],
                "files": artifacts.file_manifest(partial),
            }
            artifacts.write_json_atomic(partial / _SHARD, artifacts.sealed(body))


def seal_shards(
    directory: str | os.PathLike[str], world: int, *, metadata: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Makes the dataset of the shards of all processes; `directory` appears complete or not at all.

    One process calls it, after every process has returned from `write_shard` (a barrier is the caller's).

    Args:
      directory: the final place; must not exist (or be empty) unless `overwrite`.
      world: the number of processes.
      metadata: free-form JSON, given back by `read_metadata`.
      overwrite: replace an older dataset.

    Raises:
      DatasetError: a shard is missing, damaged or of another number of processes; shards overlap or are out of order;
        there is no episode in any; an existing directory, or a file that cannot be written.
    """
    quiet("tensorflow_datasets", "array_record", "etils")
    _check_rank(0, world)
    final, staging = Path(directory).absolute(), _staging(directory)
    with _one_line(directory):
        shards = _shards(staging, world)
        counts = [shard["count"] for shard in shards]
        if not sum(counts):
            raise DatasetError(_NOTHING)
        from subl_jax.data import files

        with artifacts.atomic_directory(final, overwrite=overwrite) as partial:
            files.write_info(partial, counts, sum(shard["bytes"] for shard in shards))
            with (partial / JSONL).open("wb") as whole:
                for rank in range(world):
                    with (staging / _shard_name(rank, world) / _LINES).open("rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
            manifest = artifacts.file_manifest(partial)
            # The records are moved, not copied, and last: until here a failed seal can be tried again.
            for rank, shard in enumerate(shards):
                name = files.record_file(rank, world)
                manifest[name] = shard["files"][_RECORDS]
                os.rename(staging / _shard_name(rank, world) / _RECORDS, partial / name)
            body = {"format": FORMAT, "count": sum(counts), "files": manifest, "metadata": metadata}
            artifacts.write_json_atomic(partial / METADATA, artifacts.sealed(body))
        shutil.rmtree(staging, ignore_errors=True)  # the dataset stands; what is left is removed by the next write


def _shards(staging: Path, world: int) -> list[dict[str, Any]]:
    """What the shards say of themselves, in order, after checking that they are whole and fit together."""
    remedy = f"delete {staging} and run the stage again in every process"
    strangers = sorted(set(staging.glob("*")) - _of_world(staging, world))
    if strangers:
        raise DatasetError(f"{strangers[0]} does not belong to a run of {world} processes; {remedy}")
    shards: list[dict[str, Any]] = []
    previous, before = None, ""
    for rank in range(world):
        folder, label = staging / _shard_name(rank, world), f"shard {rank} of {world}"
        if not folder.is_dir():
            raise DatasetError(f"{folder}: missing, process {rank} of {world} has not written its shard; {remedy}")
        try:
            shard = artifacts.unseal(folder / _SHARD)
        except ValueError as error:
            raise DatasetError(f"{error}; {remedy}") from error
        problem = artifacts.manifest_problem(folder, shard["files"])
        if problem:
            raise DatasetError(f"{problem}; {remedy}")
        shards.append(shard)
        if shard["count"]:
            first, last = (tuple(end) for end in shard["ends"])
            if previous is not None and first <= previous:
                raise DatasetError(
                    f"{label} begins at episode {first[0]}, sample {first[1]}, but {before} ends at episode "
                    f"{previous[0]}, sample {previous[1]}; give each process its own block of episodes (data.block)"
                )
            previous, before = last, label
    return shards


def _staging(directory: str | os.PathLike[str]) -> Path:
    """Where shards wait to be sealed: a hidden sibling of the final directory, on the same file system."""
    final = Path(directory).absolute()
    return final.parent / f".{final.name}.shards"


def _shard_name(rank: int, world: int) -> str:
    return f"{rank:05d}-of-{world:05d}"


def _of_world(staging: Path, world: int) -> set[Path]:
    """Every folder that processes of a run over `world` may have there, unfinished ones included."""
    finished = [staging / _shard_name(rank, world) for rank in range(world)]
    return {*finished, *map(artifacts.partial_path, finished)}


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is no process of world={world}; ranks count from 0 to world - 1")


def _check(trajectories: Sequence[Trajectory]) -> None:
    previous: tuple[int, int] | None = None
    for item in trajectories:
        key = key_of(item)
        if previous is not None and key <= previous:
            cause = "appears twice" if key == previous else f"comes after episode {previous[0]}, sample {previous[1]}"
            raise DatasetError(f"{name_of(item)} {cause}; sort by (episode, sample) and drop duplicates before writing")
        previous = key
        problem = flaw(item)
        if problem:
            raise DatasetError(problem)


def _records(trajectories: Sequence[Trajectory], lines: TextIO) -> Iterator[dict[str, Any]]:
    """Yields the records, and writes each one's line of JSON as it passes."""
    # The same few tool lists repeat: each list object is encoded once. The trajectories keep it, and so its id, alive.
    texts: dict[int, str] = {}
    for item in trajectories:
        messages, tools = json_text(item.messages), texts.get(id(item.tools))
        if tools is None:
            tools = texts[id(item.tools)] = json_text(item.tools)
        lines.write(to_line(item, messages, tools))
        yield to_record(item, messages, tools)


@contextlib.contextmanager
def _one_line(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what may go wrong with files into a `DatasetError`."""
    try:
        yield
    except FileExistsError as error:
        raise DatasetError(str(error)) from error
    except (OSError, artifacts.WorkdirError) as error:
        raise DatasetError(f"cannot write the dataset {directory}: {artifacts.reason(error)}") from error
