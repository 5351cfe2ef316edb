"""Our model against transformers' own on torch: logits and greedy continuations of one Hugging Face folder.

A folder comes in; per prompt length the largest difference of the logits, the largest divergence of the next token's
distribution, and whether 64 greedy tokens are the same come out. Needs torch (extra `oracles`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from subl_jax.models import decoder, hf_import
from subl_jax.models.cache import empty_cache
from subl_jax.models.config import Dtype, ModelConfig
from subl_jax.models.families import HuggingFaceError

LENGTHS = (1, 7, 32, 100)
STEPS = 64
SEED = 20240607  # any; fixed, so that two runs check the same ids

# Beyond these the check fails: rounding of float32 stays well below them, a wrong option does not. In bfloat16 the two
# libraries round at different places, so single logits and the argmax may differ.
MAX_ABS_DIFF = 1e-4
MAX_KL = {"float32": 1e-6, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt: its length in tokens, largest logit difference, largest KL in nats, same greedy tokens out of STEPS."""

    length: int
    max_abs_diff: float
    max_kl: float
    greedy_tokens: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found, prompt by prompt; in `dtype`."""

    dtype: Dtype
    rows: tuple[Row, ...]

    @property
    def max_abs_diff(self) -> float:
        """Of any logit."""
        return max(row.max_abs_diff for row in self.rows)

    @property
    def max_kl(self) -> float:
        """Of any token, in nats."""
        return max(row.max_kl for row in self.rows)

    @property
    def greedy_equal(self) -> bool:
        """Whether every continuation is the same to its end."""
        return all(row.greedy_tokens == STEPS for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether it stays within the bars. NaN does not."""
        exact = self.dtype == "bfloat16" or (self.max_abs_diff <= MAX_ABS_DIFF and self.greedy_equal)
        return exact and self.max_kl <= MAX_KL[self.dtype]


def compare(
    directory: str | os.PathLike[str], dtype: Dtype = "float32", lengths: Sequence[int] = LENGTHS
) -> Comparison:
    """Runs both models on the same random ids.

    Args:
      directory: a Hugging Face folder.
      dtype: of weights and activations, in both.
      lengths: of the prompts, in tokens.

    Raises:
      HuggingFaceError: torch is absent, or the folder cannot be read.
    """
    _torch()  # its absence is told before anything is read
    config = dataclasses.replace(hf_import.read_config(directory), param_dtype=dtype, compute_dtype=dtype)
    folder = hf_import.open_folder(directory)
    reference = _Reference(directory, dtype)
    prompts = _prompts(config.vocab_size, lengths)
    params = hf_import.import_params(folder, config)
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with jax.default_matmul_precision("float32" if dtype == "float32" else "default"):
        padded = jnp.asarray(np.stack([np.pad(ids, (0, max(lengths) - len(ids))) for ids in prompts]))
        scores, continuations = map(np.asarray, _run(config, params, padded, jnp.asarray(lengths, jnp.int32), STEPS))
    rows = []
    for ids, ours, continued in zip(prompts, scores, continuations, strict=True):
        theirs = reference.logits(ids)
        same = np.cumprod(continued == reference.greedy(ids, STEPS)).sum()
        difference = np.abs(ours[: len(ids)] - theirs).max()
        divergence = kl_divergence(theirs, ours[: len(ids)]).max()
        rows.append(Row(len(ids), float(difference), float(divergence), int(same)))
    return Comparison(dtype, tuple(rows))


def kl_divergence(p: Float[np.ndarray, "time vocab"], q: Float[np.ndarray, "time vocab"]) -> Float[np.ndarray, " time"]:
    """KL(p || q) in nats of each row of logits, in float64."""

    def log_softmax(scores: np.ndarray) -> np.ndarray:
        shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(p), log_softmax(q)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run(
    config: ModelConfig, params: Any, prompts: Int[Array, "batch time"], lengths: Int[Array, " batch"], steps: int
) -> tuple[Float[Array, "batch time vocab"], Int[Array, "batch steps"]]:
    """Logits of every prompt in one pass, and greedy continuations by prefill and one-token steps with the cache."""
    batch, time = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), prompts.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, _ = decoder.apply(config, params, {}, prompts, positions, segments)
    scores = decoder.logits(config, params, hidden)

    cache = empty_cache(config, batch, time + steps)
    hidden, cache = decoder.apply(config, params, {}, prompts, positions, segments, cache)

    def step(state: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        last, cache = state  # [batch, d_model]: hidden states of the newest token of each slot
        token = jnp.argmax(decoder.logits(config, params, last), axis=-1).astype(jnp.int32)
        one = jnp.ones((batch, 1), jnp.int32)
        hidden, cache = decoder.apply(config, params, {}, token[:, None], cache.lengths[:, None], one, cache)
        return (hidden[:, 0], cache), token

    start = (hidden[jnp.arange(batch), lengths - 1], cache)
    _, tokens = jax.lax.scan(step, start, None, length=steps)
    return scores, tokens.T


def _prompts(vocab_size: int, lengths: Sequence[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise HuggingFaceError(
            "check compares with transformers on torch, which is not installed; make setup EXTRAS=oracles"
        ) from None
    return torch


class _Reference:
    """The folder as transformers runs it on torch, on this machine's CPU; nothing is fetched and no code of it is run."""

    def __init__(self, directory: str | os.PathLike[str], dtype: Dtype):
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch = self._torch = _torch()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False,
            use_safetensors=True, attn_implementation="eager",
        ).eval()  # fmt: skip
        # Plain argmax to the last step: without the folder's own sampling settings, and past an end of turn.
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """[time, vocab] in float32."""
        with self._torch.no_grad():
            return self._model(self._torch.tensor(ids[None].astype(np.int64))).logits[0].float().numpy()

    def greedy(self, ids: np.ndarray, steps: int) -> np.ndarray:
        """[steps] ids that follow the prompt."""
        prompt = self._torch.tensor(ids[None].astype(np.int64))
        out = self._model.generate(
            prompt, attention_mask=self._torch.ones_like(prompt), max_new_tokens=steps, eos_token_id=None
        )
        return out[0, len(ids) :].numpy()
