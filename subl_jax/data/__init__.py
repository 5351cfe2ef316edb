"""Trajectories on disk (TFDS in ArrayRecord, JSON Lines) and packed batches of them."""

from __future__ import annotations

from subl_jax.data.dataset import DatasetError, TrajectorySource, open_source, read, read_metadata, write
from subl_jax.data.packing import (
    Batch,
    MaskError,
    PackedStream,
    PackingError,
    check_lengths,
    collate,
    epoch_order,
    plan_rows,
)

__all__ = [
    "Batch",
    "DatasetError",
    "MaskError",
    "PackedStream",
    "PackingError",
    "TrajectorySource",
    "check_lengths",
    "collate",
    "epoch_order",
    "open_source",
    "plan_rows",
    "read",
    "read_metadata",
    "write",
]
