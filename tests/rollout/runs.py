"""A policy that splits over two devices, and where two runs of one policy may part: only at a tie.

Other batch shapes and placements round otherwise, in the seventh digit. A token that is drawn by a maximum can change
only where two candidates are that close, which is recomputed here in float64 for every pair of runs that part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from subl_jax.models.config import ModelConfig
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.trajectory import Trajectory
from tests.models import numpy_llama
from tests.rollout import policies
from tests.rollout.policies import CALL, RENDERER, SAMPLING, VOCAB

# Heads, key/value heads, inner width and vocabulary are even; the vocabulary by a padding row where it was not.
CONFIG = dataclasses.replace(policies.CONFIG, vocab_size=VOCAB + VOCAB % 2, num_tokens=VOCAB, num_kv_heads=2)
SEED = 5
# Scores that lie closer than this may change places by rounding; the differences seen are below 1e-5.
TIE = 1e-4


def policy(seed: int = 0) -> dict[str, Any]:
    """Writes calls most of the time, and depends on its whole context; a padding row of the vocabulary looks likely."""
    params, rng = policies.scripted(CALL + "<|end|>", strength=13.0, restless=1.0), np.random.default_rng(seed)
    layers, width = CONFIG.num_layers, CONFIG.d_model

    def noise(*shape: int, scale: float) -> dict[str, Any]:
        return {"kernel": jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)}

    heads = CONFIG.num_kv_heads * CONFIG.head_dim
    changed = {
        "k": noise(layers, width, heads, scale=width**-0.5),
        "v": noise(layers, width, heads, scale=width**-0.5),
        "o": noise(layers, CONFIG.num_heads * CONFIG.head_dim, width, scale=0.02),
        "down": noise(layers, CONFIG.d_ff, width, scale=0.02),
    }
    padding = CONFIG.vocab_size - VOCAB
    return {
        **params,
        "embedding": jnp.pad(params["embedding"], ((0, padding), (0, 0))),
        "head": jnp.pad(params["head"], ((0, 0), (0, padding)), constant_values=1.0),
        "layers": {**params["layers"], **changed},
    }


def run(
    params: Any,
    todo: Sequence[Episode],
    sampling: SamplingConfig = SAMPLING,
    devices: int = 1,
    tensor: int = 1,
    config: ModelConfig = CONFIG,
    statistics: RolloutStatistics | None = None,
) -> list[Trajectory]:
    """The episodes, on the first so many devices."""
    return list(
        rollout(
            config, params, RENDERER, todo, sampling, seed=SEED, devices=jax.local_devices()[:devices],
            options=EngineConfig(tensor=tensor), statistics=statistics,
        )
    )  # fmt: skip


def noise(names: Sequence[int], step: int) -> np.ndarray:
    """[vocab]: Gumbel noise of one draw in float64, from JAX's own cipher; `names` are those of the turn."""
    key = jax.random.key(SEED)
    for name in names:
        key = jax.random.fold_in(key, name)
    half = (CONFIG.vocab_size + 1) // 2
    counters = jnp.concatenate([jnp.full(half, step, jnp.uint32), jnp.arange(half, dtype=jnp.uint32)])
    words = np.asarray(threefry_2x32(jax.random.key_data(key), counters))[: CONFIG.vocab_size]
    return -np.log(-np.log(((words >> 9) + 0.5) / 2**23))


def scores(params: Any, sampling: SamplingConfig, trajectory: Trajectory, place: int) -> np.ndarray:
    """[vocab]: what the token at `place` was the maximum of, in float64: logits / temperature + noise."""
    before = trajectory.loss_mask[:place]
    logits = numpy_llama.logits(CONFIG, params, trajectory.tokens[:place])[-1]
    logits[CONFIG.known_tokens :] = -np.inf
    if sampling.temperature == 0:
        return logits
    step = int(np.argmax(~before[::-1]))  # sampled tokens since the last prompt token
    turn = int(np.sum(before[:-1] & ~before[1:]))  # turns that are over
    return logits / sampling.temperature + noise((0, trajectory.episode, trajectory.sample, turn), step)


def parting(left: Trajectory, right: Trajectory) -> int | None:
    """The first place at which the tokens differ; None if they are the same."""
    both = min(len(left.tokens), len(right.tokens))
    different = np.flatnonzero(left.tokens[:both] != right.tokens[:both])
    if len(different):
        return int(different[0])
    return None if len(left.tokens) == len(right.tokens) else both


def assert_same_up_to_ties(
    params: Any, sampling: SamplingConfig, left: Sequence[Trajectory], right: Sequence[Trajectory]
) -> int:
    """Checks each pair of episodes up to its first tie, and that it is one; returns how many parted."""
    parted = 0
    for one, other in zip(left, right, strict=True):
        place = parting(one, other)
        shared = slice(place)
        np.testing.assert_array_equal(one.loss_mask[shared], other.loss_mask[shared])
        np.testing.assert_allclose(one.logprobs[shared], other.logprobs[shared], atol=1e-4)
        if place is None:
            assert (one.episode, one.messages, one.status) == (other.episode, other.messages, other.status)
            continue
        parted += 1
        assert one.loss_mask[place] and other.loss_mask[place], f"prompts of episode {one.episode} differ at {place}"
        found = scores(params, sampling, one, place)
        lost = found.max() - found[[one.tokens[place], other.tokens[place]]]
        assert lost.max() < TIE, f"episode {one.episode} parts at {place}, where the choices are {lost} from the best"
    return parted
