"""Trajectories on disk: a TFDS dataset in ArrayRecord, and the same episodes as JSON Lines for other tools.

`write` takes trajectories in episode order and leaves a directory; `read` and `open_source` give them back, exactly.
The directory opens with `tfds.builder_from_directory(DIR).as_data_source("train")`, and `trajectories.jsonl` with any
reader of OpenAI-style `messages` + `tools`. No TensorFlow, no network.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from subl_jax import artifacts
from subl_jax.chat.messages import ToolSchema
from subl_jax.metrics.quiet import quiet
from subl_jax.trajectory import Status, Trajectory

METADATA = "metadata.json"
JSONL = "trajectories.jsonl"
_FORMAT = 1


class DatasetError(ValueError):
    """A trajectory dataset cannot be written or read; one line with file, cause and remedy."""


# --- Writing ----------------------------------------------------------------------------------------------------------


def write(
    directory: str | os.PathLike[str],
    trajectories: Sequence[Trajectory],
    *,
    metadata: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes the dataset atomically: `directory` appears complete or not at all.

    Args:
      directory: the final place; must not exist (or be empty) unless `overwrite`.
      trajectories: sorted by (episode, sample), without duplicates, at least one.
      metadata: free-form JSON, given back by `read_metadata`.
      overwrite: replace an older dataset.

    Raises:
      DatasetError: unsorted or malformed trajectories, an existing directory, or a file that cannot be written.
    """
    quiet("tensorflow_datasets", "array_record", "etils")
    _check(trajectories)
    encode_tools = functools.cache(lambda index: _json(trajectories[index].tools))
    # The same few tool lists repeat: each list object is encoded once, under the index of its first appearance.
    first: dict[int, int] = {}
    texts = [
        (_json(item.messages), encode_tools(first.setdefault(id(item.tools), index)))
        for index, item in enumerate(trajectories)
    ]
    records = (_record(item, *text) for item, text in zip(trajectories, texts, strict=True))
    try:
        # The builder is imported here because TFDS takes a quarter of a second to import.
        from subl_jax.data import builder

        with artifacts.atomic_directory(directory, overwrite=overwrite) as partial:
            builder.build(records, partial)
            with (partial / JSONL).open("w", encoding="ascii") as file:
                file.writelines(_line(item, *text) for item, text in zip(trajectories, texts, strict=True))
            body = {
                "format": _FORMAT,
                "count": len(trajectories),
                "files": artifacts.file_manifest(partial),
                "metadata": metadata,
            }
            artifacts.write_json_atomic(partial / METADATA, artifacts.sealed(body))
    except FileExistsError as error:
        raise DatasetError(str(error)) from error
    except (OSError, artifacts.WorkdirError) as error:
        raise DatasetError(f"cannot write the dataset {directory}: {artifacts.reason(error)}") from error


def _check(trajectories: Sequence[Trajectory]) -> None:
    if not trajectories:
        raise DatasetError("no trajectories to write; check the stage before (did the filter drop them all?)")
    previous: tuple[int, int] | None = None
    for item in trajectories:
        name = f"episode {item.episode} (task {item.task_id}, sample {item.sample})"
        key = (item.episode, item.sample)
        if previous is not None and key <= previous:
            cause = "appears twice" if key == previous else f"comes after episode {previous[0]}, sample {previous[1]}"
            raise DatasetError(f"{name} {cause}; sort by (episode, sample) and drop duplicates before writing")
        previous = key
        for field, dtype in (("tokens", np.int32), ("loss_mask", np.bool_), ("logprobs", np.float32)):
            array = getattr(item, field)
            if array.dtype != dtype or array.ndim != 1:
                expected = f"{np.dtype(dtype)} [length]"
                raise DatasetError(f"{name}: {field} is {array.dtype} {list(array.shape)}, expected {expected}")
            if len(array) != len(item.tokens):
                raise DatasetError(f"{name}: {field} has {len(array)} entries for {len(item.tokens)} tokens")
        if not len(item.tokens):
            raise DatasetError(f"{name} has no tokens; drop it before writing")


def _json(value: Any) -> str:
    # ASCII: a model can write "\ud800" in a tool call, which decodes to a lone surrogate that UTF-8 cannot hold.
    return json.dumps(value, ensure_ascii=True)


def _record(item: Trajectory, messages: str, tools: str) -> dict[str, Any]:
    return {
        "episode": item.episode,
        "task_id": item.task_id,
        "sample": item.sample,
        "tokens": item.tokens,
        "loss_mask": item.loss_mask,
        "logprobs": item.logprobs,
        "messages": messages,
        "tools": tools,
        "status": item.status,
        "done": bool(item.done),
    }


def _line(item: Trajectory, messages: str, tools: str) -> str:
    rest = _json(
        {
            "task_id": item.task_id,
            "episode": int(item.episode),
            "sample": int(item.sample),
            "status": item.status,
            "done": bool(item.done),
        }
    )
    return f'{{"messages": {messages}, "tools": {tools}, {rest[1:]}\n'


# --- Reading ----------------------------------------------------------------------------------------------------------


class TrajectorySource(Sequence[Trajectory]):
    """Random access to a dataset on disk; a record is decoded when it is asked for.

    `metadata` is what `write` was given. Trajectories with equal tool lists share one list object.
    """

    def __init__(self, records: Any, metadata: dict[str, Any]):
        """Wraps a TFDS data source; use `open_source`."""
        self._records = records
        self.metadata = metadata

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...

    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        """The episode at `index`, or a list for a slice."""
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return _decode(self._records[position])

    def __iter__(self) -> Iterator[Trajectory]:
        """All episodes in order, read in blocks."""
        for start in range(0, len(self), 512):
            yield from self.take(range(start, min(start + 512, len(self))))

    def take(self, indices: Sequence[int]) -> list[Trajectory]:
        """The episodes at `indices`, read from the file in one go."""
        return [_decode(record) for record in self._records.__getitems__(list(indices))]


def open_source(directory: str | os.PathLike[str]) -> TrajectorySource:
    """Checks every file of the dataset against its size and checksum, and opens it for random access.

    Raises:
      DatasetError: a missing, truncated or corrupt file.
    """
    quiet("tensorflow_datasets", "array_record", "etils")
    directory = Path(directory)
    body = _verified(directory)
    import tensorflow_datasets as tfds

    # cast: TFDS' decorators hide the method's parameters from type checkers.
    source = cast(Any, tfds.builder_from_directory(str(directory))).as_data_source(split="train")
    if len(source) != body["count"]:
        raise DatasetError(
            f"{directory} holds {len(source)} records where {body['count']} were written; {_remedy(directory)}"
        )
    return TrajectorySource(source, body["metadata"])


def read(directory: str | os.PathLike[str]) -> list[Trajectory]:
    """All trajectories of a dataset, in episode order.

    Raises:
      DatasetError: a missing, truncated or corrupt file.
    """
    return list(open_source(directory))


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The free-form metadata that `write` was given; no record is read.

    Raises:
      DatasetError: the metadata file is missing or corrupt.
    """
    return _unsealed(Path(directory))["metadata"]


def _remedy(directory: Path) -> str:
    return f"delete {directory} and run its stage again"


def _unsealed(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise DatasetError(f"{directory}: no such dataset; run the stage that writes it")
    try:
        body = artifacts.unseal(directory / METADATA)
    except ValueError as error:
        raise DatasetError(f"{error}; {_remedy(directory)}") from error
    if body.get("format") != _FORMAT:
        raise DatasetError(
            f"{directory / METADATA}: format {body.get('format')} where this version reads {_FORMAT}; "
            f"{_remedy(directory)}"
        )
    return body


def _verified(directory: Path) -> dict[str, Any]:
    body = _unsealed(directory)
    problem = artifacts.manifest_problem(directory, body["files"])
    if problem:
        raise DatasetError(f"{problem}; {_remedy(directory)}")
    return body


@functools.lru_cache(maxsize=256)
def _tools(text: bytes) -> list[ToolSchema]:
    return json.loads(text)


def _decode(record: Mapping[str, Any]) -> Trajectory:
    return Trajectory(
        episode=record["episode"],
        task_id=record["task_id"].decode(),
        sample=record["sample"],
        tokens=record["tokens"],
        loss_mask=record["loss_mask"],
        logprobs=record["logprobs"],
        messages=json.loads(record["messages"]),
        tools=_tools(record["tools"]),
        status=cast(Status, record["status"].decode()),
        done=record["done"],
    )
