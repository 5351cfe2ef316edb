"""How a token is drawn, and from which randomness: keys are named by (seed, policy, episode, sample, turn, step)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Limits and temperature of a rollout; part of the identity of every dataset.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it before drawing.
      max_turn_tokens: tokens of one assistant turn; a turn that reaches it is truncated, never parsed.
      max_turns: assistant turns of one episode.
      context: tokens of one episode, all turns together (the capacity of a cache slot).
      slots: episodes advanced together on one device. Floats depend on it, so it belongs to the run's identity.
      prefill_chunk: tokens per prefill pass. Fixed, so that an episode's arithmetic does not depend on its neighbours.
    """

    temperature: float = 1.0
    max_turn_tokens: int = 48
    max_turns: int = 6
    context: int = 256
    slots: int = 64
    prefill_chunk: int = 32

    def __post_init__(self) -> None:
        """Refuses limits under which no episode could run."""
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature} is negative; 0 is greedy, 1 is the model's own distribution"
            )
        for name in ("max_turn_tokens", "max_turns", "context", "slots", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")


def turn_key(
    seed: Int[Array, ""], policy: Int[Array, ""], episode: Int[Array, ""], sample: Int[Array, ""], turn: Int[Array, ""]
) -> Key[Array, ""]:
    """The key of one turn of one episode; nothing about batch, slot or device enters it."""
    key = jax.random.key(seed)
    for name in (policy, episode, sample, turn):
        key = jax.random.fold_in(key, name)
    return key


def draw(
    logits: Float[Array, "slots vocab"], keys: Key[Array, " slots"], step: Int[Array, ""], temperature: float
) -> tuple[Int[Array, " slots"], Float[Array, " slots"]]:
    """Draws one token per slot by the Gumbel-max trick.

    Returns:
      Tokens, and their log-probability in nats under the unmodified model (temperature 1).
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:]))(keys)
        tokens = jnp.argmax(logits / temperature + noise, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
