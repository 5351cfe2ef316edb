"""Counting, timing and writing down: FLOPs and utilisations, metric files, progress on the terminal."""

from __future__ import annotations

from subl_jax.metrics.flops import (
    Shape,
    count_params,
    decode_roofline,
    decode_step_bytes,
    forward_flops,
    kd_step_flops,
    kv_bytes_per_token,
    mbu,
    mfu,
    sft_step_flops,
)
from subl_jax.metrics.progress import Progress, progress
from subl_jax.metrics.quiet import quiet
from subl_jax.metrics.writers import MetricsWriter, read_metrics

__all__ = [
    "MetricsWriter",
    "Progress",
    "Shape",
    "count_params",
    "decode_roofline",
    "decode_step_bytes",
    "forward_flops",
    "kd_step_flops",
    "kv_bytes_per_token",
    "mbu",
    "mfu",
    "progress",
    "quiet",
    "read_metrics",
    "sft_step_flops",
]
