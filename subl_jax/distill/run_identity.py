"""What the numbers of a training run depend on, as plain JSON: a checkpoint of other data, models or options is refused.

The mesh is left out: a run goes on there to rounding. So is whatever `TrainConfig.identity` leaves out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from subl_jax import artifacts
from subl_jax.distill.dilution import Dilution
from subl_jax.distill.teacher_cache.identities import dataset_digest
from subl_jax.models.config import ModelConfig
from subl_jax.trajectory import Trajectory


def _weighted_sum(leaf: Array) -> UInt32[Array, ""]:
    """Bits of every element times an odd number that tells its place, modulo 2^32.

    Integer sums do not depend on their order: every mesh and device gives the same.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):  # not of the flattened array, which would gather its parts
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _weighted_sums(leaves: list[Array]) -> list[Array]:
    return [_weighted_sum(leaf) for leaf in leaves]


def fingerprint(params: Any) -> str:
    """16 hex digits over names, shapes and values of placed parameters, in one pass over the devices' memory.

    It tells different models apart; unlike `parameters_digest` it is no proof against one made to have the same.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_weighted_sums([leaf for _, leaf in named]))
    described = [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype), int(found)]
        for (path, leaf), found in zip(named, sums, strict=True)
    ]
    return artifacts.digest(described)


def data_identity(trajectories: Sequence[Trajectory], planned_lengths: Sequence[int]) -> dict[str, Any]:
    """Tokens, loss masks and planned lengths of a dataset, in its order."""
    lengths = np.asarray(planned_lengths, "<i8").tobytes()
    return {
        "documents": len(trajectories),
        "tokens_and_masks": dataset_digest(trajectories)[:16],
        "planned_lengths": hashlib.sha256(lengths).hexdigest()[:16],
    }


def model_identity(config: ModelConfig, frozen: Any = None) -> dict[str, Any]:
    """A model's function, the precision that it is computed in, and the values of its parameters that stay as they are."""
    known = {
        **config.architecture(),
        "compute_dtype": config.compute_dtype,
        "dropout": config.dropout,
        "lora": config.lora,
    }
    if frozen is not None:
        known["parameters"] = fingerprint(frozen)
    return known


def dilution_identity(dilution: Dilution, placed: Any) -> dict[str, Any]:
    """How many steps are diluted, by which documents, and by which teacher or cache of one.

    Args:
      dilution: of the run.
      placed: the parameters of its teacher, where the run has one.
    """
    told = {"share": dilution.share, "data": data_identity(dilution.documents, dilution.planned_lengths)}
    if dilution.teacher is not None:
        told["teacher"] = model_identity(dilution.teacher.config, placed)
    if dilution.cache is not None:
        told["teacher_cache"] = dilution.cache.identity
    return told


def bound(metadata: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's metadata, and under `training` what the loop itself knows; absent parts are left out."""
    return {
        **metadata,
        "training": artifacts.plain({name: part for name, part in training.items() if part is not None}),
    }
