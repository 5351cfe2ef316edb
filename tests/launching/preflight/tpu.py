"""What tests that compile for TPUs share: libtpu or a reason to skip, a small case, and its compiled rows."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import pytest

from subl_jax.distill.objective import Objective
from subl_jax.distill.train_config import TrainConfig
from subl_jax.launching.preflight import environment, programs, topology
from subl_jax.launching.preflight.analysis import analyse
from subl_jax.launching.preflight.programs import Case
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import MeshConfig
from subl_jax.rollout.sampling import SamplingConfig

SLICE = "v5e:2x2"


def needs_libtpu() -> None:
    """Skips where libtpu is absent; fails there in CI, which installs it."""
    if importlib.util.find_spec("libtpu") is None:
        missing = "libtpu, the TPU's compiler, is not installed (pip install -e .[tpu])"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    environment.prepare([])


def model(layers: int = 2, **changes: Any) -> ModelConfig:
    """A decoder whose matrices have the proportions of a real one."""
    shape: dict[str, Any] = {
        "vocab_size": 2048, "d_model": 512, "num_layers": layers, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128,
        "d_ff": 2048, "param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full",
    }  # fmt: skip
    return ModelConfig(**shape | changes)


def case(layers: int = 2, mesh: tuple[int, int, int] = (1, 4, 1), rows: int = 8, row_tokens: int = 256) -> Case:
    """Full fine-tuning of a small student from a teacher of its shape with a head of its own."""
    return Case(
        teacher=model(layers, tie_embeddings=False),
        student=model(layers),
        objective=Objective("forward_kl"),
        train=TrainConfig(batch_rows=rows, row_tokens=row_tokens, accumulate=1, chunk_tokens=128),
        mesh=MeshConfig(*mesh),
        sampling=SamplingConfig(slots=8, context=256, prefill_chunk=64, max_turn_tokens=32),
    )


@functools.cache
def distilled(layers: int = 2, mesh: tuple[int, int, int] = (1, 4, 1)) -> dict[str, Any]:
    """The compiled training step's row."""
    place = topology.find(SLICE)
    return analyse(programs.distill(case(layers, mesh), place.devices), place, steps=100)
