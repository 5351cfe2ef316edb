"""A kept step comes back as the student that it was, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.checkpoint import CheckpointError, CheckpointMismatch, TrainCheckpointer
from subl_jax.distill.optimizers import make_optimizer
from subl_jax.distill.step import TrainState
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models import lora
from subl_jax.models.config import LoraConfig
from subl_jax.studies.kept import load_kept
from tests.distill import tiny

TRAIN = TrainConfig(steps=9)


def keep(directory: Path, params: Any) -> None:
    optimizer = make_optimizer(TRAIN.optimizer, TRAIN.steps)
    with TrainCheckpointer(directory, 1, 9, {"model": "tiny", "seed": 0}) as checkpointer:
        for step in (2, 4):
            moved = jax.tree.map(lambda leaf, step=step: leaf + step, params)
            checkpointer.save(step, TrainState(moved, optimizer.init(moved), jnp.asarray(step, jnp.int32)))


def test_a_kept_step_comes_back_bit_for_bit_in_the_models_dtype(tmp_path: Path):
    params = tiny.params(tiny.SMALL)
    keep(tmp_path, params)
    found = load_kept(tmp_path, 2, tiny.SMALL, TRAIN, {"model": "tiny"})
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other + 2), found, params)
    half = dataclasses.replace(tiny.SMALL, param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(load_kept(tmp_path, 2, half, TRAIN, {}))} == {"bfloat16"}


def test_of_a_student_with_adapters_the_adapters_come_back_as_they_were_trained(tmp_path: Path):
    config = dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2), param_dtype="bfloat16")
    adapters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), lora.init_adapters(config, jax.random.key(5)))
    keep(tmp_path, adapters)
    found = load_kept(tmp_path, 4, config, TRAIN, {})
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other + 4), found, adapters)


def test_a_step_that_was_not_kept_another_model_and_a_damaged_file_are_refused(tmp_path: Path):
    keep(tmp_path, tiny.params(tiny.SMALL))
    with pytest.raises(CheckpointError, match="00000003"):
        load_kept(tmp_path, 3, tiny.SMALL, TRAIN, {})
    with pytest.raises(CheckpointMismatch, match="model"):
        load_kept(tmp_path, 2, tiny.SMALL, TRAIN, {"model": "other"})
    with pytest.raises(CheckpointMismatch):
        load_kept(tmp_path, 2, tiny.LARGE, TRAIN, {})
    largest = max((tmp_path / "00000002").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="run it again"):
        load_kept(tmp_path, 2, tiny.SMALL, TRAIN, {})
