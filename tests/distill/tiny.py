"""Models and documents small enough to compile in a second."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.trajectory import Trajectory

VOCAB = 40
SMALL = ModelConfig(
    vocab_size=VOCAB, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, init_scale=0.5
)
# Another shape than the student's: a step must not mix the two up.
LARGE = ModelConfig(
    vocab_size=VOCAB, d_model=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32, init_scale=0.5
)


# Drawn eagerly they take longer than anything that is then done with them; the program is one for all seeds.
_drawn = jax.jit(decoder.init, static_argnums=0)


@functools.cache
def params(config: ModelConfig, seed: int = 0):
    return _drawn(config, jax.random.key(seed))


def document(
    tokens: Sequence[int], loss: Sequence[int], task_id: str = "safe/train/x/0/0", sample: int = 0
) -> Trajectory:
    """A document whose loss tokens stand at the given places."""
    mask = np.zeros(len(tokens), bool)
    mask[list(loss)] = True
    return Trajectory(
        0, task_id, sample, np.asarray(tokens, np.int32), mask, np.zeros(len(tokens), np.float32), [], [], "final", True
    )


def documents(count: int, seed: int = 0, longest: int = 12) -> list[Trajectory]:
    """Random documents of several lengths, with loss tokens in two runs, as in a conversation of two turns."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        length = int(rng.integers(6, longest + 1))
        second = int(rng.integers(4, length))
        loss = sorted({2, *range(second, length - int(rng.integers(0, 2)))} | {second})
        found.append(document(rng.integers(0, VOCAB, length).tolist(), loss, f"safe/train/x/{seed}/{index}"))
    return found
