"""How a token is drawn, and from which randomness: keys are named by (seed, policy, episode, sample, turn, step)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

# Of all keys, whatever JAX's default is: `gumbel` goes on with it.
CIPHER = "threefry2x32"
# Far beyond any logit and far within PADDING_LOGIT: no bias and no temperature makes a padding row likely.
_LARGEST = 1e6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and turns end, and the limits of a rollout; part of the identity of every dataset.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it before drawing.
      max_turn_tokens: tokens of one assistant turn; a turn that reaches it is truncated, never parsed.
      max_turns: assistant turns of one episode.
      context: tokens of one episode, all turns together (the capacity of a cache slot).
      slots: episodes advanced together on one device (in one group of slots). Floats depend on it, so it belongs to the
        run's identity. 0: as many as the memory holds.
      prefill_chunk: tokens per row of a prefill pass; prefill_rows: rows, each of one episode. Fixed, so that an episode's
        arithmetic does not depend on its neighbours. A row that is not filled is computed all the same: few rows suit small
        batches and CPUs, more keep an accelerator busy.
      top_k: only the likeliest so many tokens are drawn; 0 is off.
      top_p: only the fewest likeliest tokens that hold this probability together are drawn; 1 is off.
      min_p: only tokens at least this fraction as likely as the likeliest one are drawn; 0 is off.
      logit_bias: (token id, nats added to its logit before the temperature); -1e6 bans a token.
      stop: texts that end a turn, besides the end-of-turn tokens; the turn includes the token that completes one.
    """

    temperature: float = 1.0
    max_turn_tokens: int = 48
    max_turns: int = 6
    context: int = 256
    slots: int = 64
    prefill_chunk: int = 32
    prefill_rows: int = 2
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = dataclasses.field(default=(), metadata={"flag": False})
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses limits under which no episode could run, and options under which no token could be drawn."""
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature} is negative; 0 is greedy, 1 is the model's own distribution"
            )
        for name in ("max_turn_tokens", "max_turns", "context", "prefill_chunk", "prefill_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.slots < 0:
            raise ValueError(f"slots={self.slots} is negative; give a number of episodes, or 0 for as many as fit")
        if self.temperature and not 1 / _LARGEST <= self.temperature <= _LARGEST:
            raise ValueError(
                f"temperature={self.temperature} is outside [{1 / _LARGEST:g}, {_LARGEST:g}]; 0 is greedy, 1 is the "
                "model's own distribution"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; give a number of tokens, or 0 for all of them")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; 1 is off, and temperature=0 is greedy")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is outside [0, 1]; 0 is off")
        ids = [token for token, _ in self.logit_bias]
        for token, nats in self.logit_bias:
            if token < 0:
                raise ValueError(f"logit_bias: token id {token} is negative; ids count from 0")
            if ids.count(token) > 1:
                raise ValueError(
                    f"logit_bias: token id {token} occurs {ids.count(token)} times; give it once, with the sum"
                )
            if not abs(nats) <= _LARGEST:
                raise ValueError(
                    f"logit_bias: {nats} for token id {token} is outside ±{_LARGEST:g}; {-_LARGEST:g} already bans a token"
                )
        if "" in self.stop:
            raise ValueError(
                "stop holds an empty text, which would end every turn at once; remove it (a flag takes the white space off "
                "each text: give one that is white space, such as a line break, from Python)"
            )


def turn_key(
    seed: Int[Array, ""], policy: Int[Array, ""], episode: Int[Array, ""], sample: Int[Array, ""], turn: Int[Array, ""]
) -> Key[Array, ""]:
    """The key of one turn of one episode; nothing about batch, slot or device enters it."""
    key = jax.random.key(seed, impl=CIPHER)
    for name in (policy, episode, sample, turn):
        key = jax.random.fold_in(key, name)
    return key


# Rotations of Threefry-2x32, and how often they are gone through: 20 rounds, the key injected after every 4 (Salmon et
# al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(
    key: UInt32[Array, "slots 2"], first: UInt32[Array, "slots #count"], second: UInt32[Array, "#slots count"]
) -> tuple[UInt32[Array, "slots count"], UInt32[Array, "slots count"]]:
    """Threefry-2x32 of counters (first, second): the cipher of `jax.random`, which on CPUs runs its rounds in a loop that
    is not vectorised: 2.8 ms for the noise of [64, 1536] on two cores, where this takes 0.5.
    """
    schedule = (key[:, :1], key[:, 1:], key[:, :1] ^ key[:, 1:] ^ jnp.uint32(0x1BD11BDA))
    x, y = first + schedule[0], second + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def gumbel(
    keys: Key[Array, " slots"], steps: Int[Array, " slots"], vocab_size: int, *, split: bool = False
) -> Float[Array, "slots vocab"]:
    """The noise of one draw: standard Gumbel, a function of each slot's key, its step, and the token's id.

    Args:
      keys, steps, vocab_size: of the draw.
      split: for a vocabulary that is split over devices. A counter gives the words of two ids, half a vocabulary apart; each
        device then computes those of its own ids and drops the other word, instead of being sent half of its noise.
    """
    half = -(-vocab_size // 2)
    words, step = jax.random.key_data(keys), steps.astype(jnp.uint32)[:, None]
    if split:
        ids = jnp.arange(vocab_size, dtype=jnp.uint32)[None]
        first, second = _threefry(words, step, jnp.where(ids < half, ids, ids - half))
        bits = [jnp.where(ids < half, first, second)]
    else:
        bits = _threefry(words, step, jnp.arange(half, dtype=jnp.uint32)[None])
    # The upper 23 bits as a number in (0, 1): never 0 or 1, whose noise would be infinite.
    uniform = ((jnp.concatenate(bits, axis=1)[:, :vocab_size] >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def check_vocabulary(sampling: SamplingConfig, vocab_size: int) -> None:
    """Refuses a bias on tokens that the model does not have.

    Raises:
      ValueError: an id of `logit_bias` is not below `vocab_size`.
    """
    for token, _ in sampling.logit_bias:
        if token >= vocab_size:
            raise ValueError(
                f"logit_bias: token id {token} is outside the vocabulary of {vocab_size} tokens; ids end at "
                f"{vocab_size - 1}: was it made with another tokenizer?"
            )


def _mirrored(bits: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Bits of float32, read as int32 -> integers in the floats' order; its own inverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _threshold(
    scores: Float[Array, "slots vocab"], weights: Float[Array, "slots vocab"], target: Float[Array, " slots"]
) -> Float[Array, " slots"]:
    """The largest score of each row such that what scores at least as much weighs `target` or more.

    Halves the interval between -inf and the row's maximum, in float32's own order, until one number is left: exact, and
    no sort. Measured on two cores, all in ms, at [64, 1536] and [16, 32000]: top-k 0.6 and 7.5, where lax.top_k(k=50)
    took 14 and 112; top-p 0.8 and 12, where a sort and its running sum took 17 and 118. The noise of a draw costs 3 and 16.
    """

    def halve(_: Int[Array, ""], interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        above = scores >= jax.lax.bitcast_convert_type(_mirrored(middle), jnp.float32)[:, None]
        heavy = jnp.sum(jnp.where(above, weights, 0.0), axis=-1) >= target
        return jnp.where(heavy, middle, low), jnp.where(heavy, high, middle - 1)

    high = _mirrored(jax.lax.bitcast_convert_type(jnp.max(scores, axis=-1), jnp.int32))
    low = _mirrored(jax.lax.bitcast_convert_type(jnp.full_like(target, -jnp.inf), jnp.int32))
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))  # fewer than 2^32 numbers lie between the two
    return jax.lax.bitcast_convert_type(_mirrored(low), jnp.float32)


def truncate(scores: Float[Array, "slots vocab"], sampling: SamplingConfig) -> Float[Array, "slots vocab"]:
    """Scores, with -inf for what top-k, top-p (of what top-k left) and min-p exclude."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    if 0 < sampling.top_k < scores.shape[1]:
        floor = _threshold(scores, jnp.ones_like(scores), jnp.full(scores.shape[:1], sampling.top_k, jnp.float32))
        scores = jnp.where(scores >= floor[:, None], scores, -jnp.inf)
    if sampling.top_p < 1:
        weights = jnp.exp(scores - best)
        floor = _threshold(scores, weights, sampling.top_p * jnp.sum(weights, axis=-1))
        scores = jnp.where(scores >= floor[:, None], scores, -jnp.inf)
    if sampling.min_p > 0:
        scores = jnp.where(scores >= best + math.log(sampling.min_p), scores, -jnp.inf)
    return scores


def draw(
    logits: Float[Array, "slots vocab"],
    keys: Key[Array, " slots"],
    steps: Int[Array, " slots"],
    sampling: SamplingConfig,
    *,
    split: bool = False,
) -> tuple[Int[Array, " slots"], Float[Array, " slots"]]:
    """Draws one token per slot by the Gumbel-max trick.

    In the order of transformers' `generate`: bias, temperature, top-k, top-p, min-p, each on what the one before it left.
    Tokens as likely as the last one that is kept are kept too (transformers' top-p drops some of them, as its sort has
    it). Temperature 0 is the argmax of the biased logits, at a tie the lowest id.

    Args:
      logits: of the next token; float32 is computed with. Padding rows of the vocabulary have `decoder.PADDING_LOGIT`.
      keys: one per turn, see `turn_key`.
      steps: tokens that each slot has drawn in its turn; noise depends on key and step only.
      sampling: static. What is off leaves no trace in the compiled program.
      split: whether the vocabulary is split over devices; see `gumbel`.

    Returns:
      Tokens, and their log-probability in nats under the unmodified model (temperature 1, no bias, nothing excluded).
    """
    logits = logits.astype(jnp.float32)
    scores = logits
    if sampling.logit_bias:
        ids, nats = zip(*sampling.logit_bias, strict=True)
        scores = logits.at[:, np.asarray(ids)].add(np.asarray(nats, np.float32))
    if sampling.temperature == 0:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        noise = gumbel(keys, steps, logits.shape[1], split=split)
        tokens = jnp.argmax(truncate(scores / sampling.temperature, sampling) + noise, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
