"""What a model holds and says at chosen places of documents: states between the layers, and next-token probabilities.

Sequences of ids and, for each, the places that are looked at in; arrays on the host out. Documents are padded, a few at a
time; only what was asked for leaves the device, and no array [rows, time, vocab] exists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from subl_jax.distill.loop import Model
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import on_host

# Sequences of a pass; their states are what memory is needed for. Rows are padded in steps, so that few programs are made.
ROWS, STEP = 8, 32


class _Block(NamedTuple):
    """Some sequences side by side: padded ids, the place of each (row, column) that is looked at, and which those are."""

    tokens: Int[np.ndarray, "rows time"]
    segments: Int[np.ndarray, "rows time"]
    rows: Int[np.ndarray, " looks"]
    columns: Int[np.ndarray, " looks"]
    weights: Float[np.ndarray, " looks"]


def _blocks(sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Iterator[_Block]:
    """Blocks of `ROWS` sequences, all of one shape; looks that fill a block up have weight 0.

    Raises:
      ValueError: a place that is not in its sequence.
    """
    for number, (ids, own) in enumerate(zip(sequences, places, strict=True)):
        if len(own) and not 0 <= min(own) <= max(own) < len(ids):
            raise ValueError(f"sequence {number} has {len(ids)} tokens and no place {min(own)} … {max(own)}")
    time = -(-max(map(len, sequences)) // STEP) * STEP
    starts = range(0, len(sequences), ROWS)
    most = max(sum(len(own) for own in places[start : start + ROWS]) for start in starts)
    most = -(-max(most, 1) // STEP) * STEP
    for start in starts:
        tokens = np.zeros((ROWS, time), np.int32)
        segments = np.zeros((ROWS, time), np.int32)
        rows, columns = np.zeros(most, np.int32), np.zeros(most, np.int32)
        weights = np.zeros(most, np.float32)
        cursor = 0
        for row, (ids, own) in enumerate(
            zip(sequences[start : start + ROWS], places[start : start + ROWS], strict=True)
        ):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
            here = slice(cursor, cursor + len(own))
            rows[here], columns[here], weights[here] = row, list(own), 1
            cursor += len(own)
        yield _Block(tokens, segments, rows, columns, weights)


def _positions(tokens: Array) -> Int[Array, "rows time"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


# --- States -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _state_program(config: ModelConfig):
    @jax.jit
    def run(params, tokens, segments, rows, columns, weights) -> Float[Array, "depths rows d_model"]:
        states = decoder.residual_stream(config, params, tokens, _positions(tokens), segments)
        looked = states[:, rows, columns].astype(jnp.float32) * weights[:, None]
        sums = jax.ops.segment_sum(jnp.swapaxes(looked, 0, 1), rows, num_segments=tokens.shape[0])
        counts = jax.ops.segment_sum(weights, rows, num_segments=tokens.shape[0])
        return jnp.swapaxes(sums / jnp.maximum(counts, 1)[:, None, None], 0, 1)

    return run


def mean_states(
    model: Model, sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> Float[np.ndarray, "depths sequences d_model"]:
    """Per sequence the mean, over its places, of the states between the layers (see `decoder.residual_stream`).

    Args:
      model: whole, adapters among its parameters.
      sequences: ids.
      places: per sequence the indices of the tokens whose states are looked at, at least one.

    Raises:
      ValueError: nothing to look at, or a place outside its sequence.
    """
    if not len(sequences) or not all(len(own) for own in places):
        raise ValueError(f"{len(sequences)} sequences, of which one has no place to look at; leave such ones out")
    found = [
        on_host(_state_program(model.config)(model.params, *block)) for block in _blocks(sequences, places)
    ]  # [depths, ROWS, d_model] each
    return np.concatenate(found, axis=1)[:, : len(sequences)]


# --- Next tokens ------------------------------------------------------------------------------------------------------


class NextTokens(NamedTuple):
    """What a model would say next at every place that was looked at, in the order of the sequences and their places.

    Attributes:
      ids: the likeliest tokens, the likeliest first.
      log_probs: their log-probabilities in nats.
      listed: the log-probabilities of the tokens that were asked for; minus infinity where fewer were.
    """

    ids: Int[np.ndarray, "looks top"]
    log_probs: Float[np.ndarray, "looks top"]
    listed: Float[np.ndarray, "looks width"]


@functools.lru_cache(maxsize=32)
def _next_program(config: ModelConfig, top: int):
    @jax.jit
    def run(params, tokens, segments, rows, columns, asked: Int[Array, "looks width"]) -> Any:
        hidden, _ = decoder.apply(config, params, {}, tokens, _positions(tokens), segments)
        log_probs = jax.nn.log_softmax(decoder.logits(config, params, hidden[rows, columns]), axis=-1)
        values, ids = jax.lax.top_k(log_probs, top)
        listed = jnp.take_along_axis(log_probs, jnp.maximum(asked, 0), axis=1)
        return ids, values, jnp.where(asked >= 0, listed, -jnp.inf)

    return run


def next_tokens(
    model: Model,
    sequences: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    asked: Sequence[Sequence[int]] = (),
    top: int = 5,
) -> NextTokens:
    """What a model says behind chosen tokens, at temperature 1.

    Args:
      model: whole, adapters among its parameters.
      sequences: ids.
      places: per sequence the indices of the tokens that have just been read; a sequence may have none.
      asked: per place, all sequences' one after the other, ids whose probabilities are wanted; empty: none anywhere.
      top: how many of the likeliest tokens are given.

    Raises:
      ValueError: as many `asked` as places are needed, or none; or more `top` tokens than there are.
    """
    looks = sum(map(len, places))
    if len(asked) not in (0, looks) or not 0 < top <= model.config.known_tokens:
        raise ValueError(
            f"{looks} places and {len(asked)} lists of tokens asked for (all or none), top={top} of "
            f"{model.config.known_tokens} tokens"
        )
    width = max((len(ids) for ids in asked), default=0)
    table = np.full((looks, width), -1, np.int32)
    for row, ids in enumerate(asked):
        table[row, : len(ids)] = ids
    found, cursor = [], 0
    for block in _blocks(sequences, places):
        count = int(block.weights.sum())
        here = np.full((len(block.rows), width), -1, np.int32)
        here[:count] = table[cursor : cursor + count]
        told = _next_program(model.config, top)(model.params, *block[:4], here)
        found.append(NextTokens(*(on_host(each)[:count] for each in told)))
        cursor += count
    return NextTokens(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
