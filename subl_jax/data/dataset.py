"""A trajectory dataset on disk, read: every file is checked, then records are decoded as they are asked for.

A directory that `write` or `seal_shards` left goes in; `Trajectory` records come out, exactly as they went in. No
TensorFlow, no network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

from subl_jax import artifacts
from subl_jax.data.record import from_record
from subl_jax.metrics.quiet import quiet
from subl_jax.trajectory import Trajectory

METADATA = "metadata.json"
FORMAT = 1


class DatasetError(ValueError):
    """A trajectory dataset cannot be written or read; one line with file, cause and remedy."""


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
        return from_record(self._records[position])

    def __iter__(self) -> Iterator[Trajectory]:
        """All episodes in order, read in blocks."""
        for start in range(0, len(self), 512):
            yield from self.take(range(start, min(start + 512, len(self))))

    def take(self, indices: Sequence[int]) -> list[Trajectory]:
        """The episodes at `indices`, read from the file in one go."""
        return [from_record(record) for record in self._records.__getitems__(list(indices))]


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
    if body.get("format") != FORMAT:
        raise DatasetError(
            f"{directory / METADATA}: format {body.get('format')} where this version reads {FORMAT}; "
            f"{_remedy(directory)}"
        )
    return body


def _verified(directory: Path) -> dict[str, Any]:
    body = _unsealed(directory)
    problem = artifacts.manifest_problem(directory, body["files"])
    if problem:
        raise DatasetError(f"{problem}; {_remedy(directory)}")
    return body
