"""The TFDS side of the trajectory dataset: the columns, the files of records, and the two JSON files beside them.

Record files are written one by one, by whichever process has the records; the JSON files then make a folder of them a
dataset that `tfds.builder_from_directory` reads. Imported only where a dataset is written, because importing TFDS takes
a moment. TensorFlow is never imported.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import dataset_info, example_serializer, splits

_NAME = "trajectories"
_SPLIT = "train"


def _features() -> tfds.features.FeaturesDict:
    """The columns; `messages` and `tools` are JSON texts, the rest is typed."""
    features = tfds.features
    return features.FeaturesDict(
        {
            "episode": np.int64,
            "task_id": features.Text(),
            "sample": np.int64,
            "tokens": features.Tensor(shape=(None,), dtype=np.int32),
            "loss_mask": features.Tensor(shape=(None,), dtype=np.bool_),
            "logprobs": features.Tensor(shape=(None,), dtype=np.float32),
            "messages": features.Text(),
            "tools": features.Text(),
            "status": features.Text(),
            "done": np.bool_,
            "error": features.Text(),
        }
    )


def record_file(shard: int, shards: int) -> str:
    """The name by which TFDS finds a file of records."""
    return f"{_NAME}-{_SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records, in the order given, to one ArrayRecord file; returns their size in bytes before compression.

    Raises:
      OSError: the file cannot be written.
    """
    features = _features()
    # cast: TFDS' annotation of the specification admits no dictionary of specifications.
    serializer = example_serializer.ExampleSerializer(cast(Any, features.get_serialized_info()))
    size = 0
    try:
        # One record per group, as TFDS writes them: random access then reads no other record.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            example = serializer.serialize_example(features.encode_example(record))
            writer.write(example)
            size += len(example)
        writer.close()
    except RuntimeError as error:
        # The writer knows no OSError; the cause stands in its text.
        causes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
        code = next((code for code in causes if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), str(path)) from error
    return size


def write_info(directory: Path, shard_lengths: Sequence[int], size: int) -> None:
    """Writes TFDS' `dataset_info.json` and `features.json` for the record files that stand, or will stand, beside them.

    Args:
      directory: of the dataset.
      shard_lengths: records per file; 0 for an empty one.
      size: of all records in bytes, from `write_records`.
    """
    version = tfds.core.Version("1.0.0")
    info = dataset_info.DatasetInfo(
        builder=dataset_info.DatasetIdentity(_NAME, version, data_dir=str(directory), module_name=""),
        description="Tool-use episodes as token ids with their loss mask; one record per episode.",
        features=_features(),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    split = splits.SplitInfo(name=_SPLIT, shard_lengths=list(shard_lengths), num_bytes=size)
    info.set_splits(splits.SplitDict([split]))
    info.write_to_directory(directory)
