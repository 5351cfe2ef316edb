"""A student as it was at a step of its training, from the checkpoint that the run has kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from subl_jax import checkpoint
from subl_jax.distill.optimizers import make_optimizer
from subl_jax.distill.step import TrainState
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models import decoder, lora
from subl_jax.models.config import ModelConfig


def load_kept(
    directory: Path, step: int, config: ModelConfig, train_config: TrainConfig, expect: Mapping[str, Any]
) -> Any:
    """What was trained by then (all parameters, or the adapters), in the dtypes in which `train` hands back its result.

    Args:
      directory: of the run's checkpoints.
      step: a multiple of `train_config.keep_every`.
      config: the student's shape.
      train_config: what it was trained with.
      expect: what its checkpoint must say of itself.

    Raises:
      CheckpointError: no such checkpoint, or one of another model.
    """

    def state() -> TrainState:
        key = jax.random.key(0)
        params = decoder.init(config, key) if config.lora is None else lora.init_adapters(config, key)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, train_config.master_dtype), params)
        transformation = make_optimizer(train_config.optimizer, train_config.steps)
        return TrainState(params, transformation.init(params), jnp.zeros((), jnp.int32))

    params = checkpoint.load_step(directory, step, jax.eval_shape(state), expect=expect).params
    if config.lora is not None:  # adapters stay in the dtype that they are trained in
        return params
    return jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), params)
