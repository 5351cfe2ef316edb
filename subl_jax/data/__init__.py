"""Trajectories on disk (a journal while they are made; then TFDS in ArrayRecord, JSON Lines) and packed batches of them."""

from __future__ import annotations

from subl_jax.data.dataset import DatasetError, TrajectorySource, open_source, read, read_metadata
from subl_jax.data.journal import Journal, JournalError
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
from subl_jax.data.writing import block, seal_shards, write, write_shard

__all__ = [
    "Batch",
    "DatasetError",
    "Journal",
    "JournalError",
    "MaskError",
    "PackedStream",
    "PackingError",
    "TrajectorySource",
    "block",
    "check_lengths",
    "collate",
    "epoch_order",
    "open_source",
    "plan_rows",
    "read",
    "read_metadata",
    "seal_shards",
    "write",
    "write_shard",
]
