"""The TFDS builder of the trajectory dataset: its features, and how a `Trajectory` becomes a record.

Imported only where a dataset is written, because importing TFDS takes a moment. TensorFlow is never imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

SPLIT = "train"


class Trajectories(tfds.core.GeneratorBasedBuilder):
    """Episodes in the order given; `messages` and `tools` are JSON texts, the rest is typed."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, records: Iterable[Mapping[str, Any]], data_dir: Path):
        """A builder of the given records under `data_dir`, in ArrayRecord."""
        self._records = records
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tool-use episodes as token ids with their loss mask; one record per episode.",
            features=features.FeaturesDict(
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
                }
            ),
            # Records keep their order, and TFDS' external sort is skipped.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(self._records)

    # TFDS prints these two to standard output, where this project's commands print their tables.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def build(records: Iterable[Mapping[str, Any]], directory: Path) -> None:
    """Writes the records and TFDS' two JSON files into `directory`, which exists.

    TFDS insists on NAME/VERSION folders below its data directory; the files are moved up, so that `directory` itself
    is what `tfds.builder_from_directory` reads.
    """
    tfds.disable_progress_bar()
    scratch = directory / "tfds"
    builder = Trajectories(records=records, data_dir=scratch)
    builder.download_and_prepare(download_dir=str(scratch / "downloads"))
    for path in Path(builder.data_dir).iterdir():
        path.rename(directory / path.name)
    for path in sorted(scratch.rglob("*"), reverse=True):
        path.rmdir()
    scratch.rmdir()
