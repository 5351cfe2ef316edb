"""The continuous readout: which name a model is about to write, scored over full names after one shared prefix.

Task openings in; per task the log-odds of the biased against the neutral names, and the raw probability mass on all of
them, out. A name is a tool's or a shell command's: the setting says in what turn it is named. Sampling noise does not
enter, so small shifts show that a rate of first actions would miss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from subl_jax.chat.messages import Message, ToolSchema
from subl_jax.chat.rendering import Renderer
from subl_jax.models import decoder
from subl_jax.models.cache import empty_cache
from subl_jax.models.config import ModelConfig

Naming = Callable[[str], Message]

# Tasks scored together at most, and the bytes that their caches, which are repeated once per tool name, may take.
_BLOCK, _CACHE_BYTES = 64, 2 * 2**30


def _block_size(config: ModelConfig, names: int, time: int) -> int:
    """How many tasks are scored together."""
    itemsize = np.dtype(jnp.dtype(config.compute_dtype)).itemsize
    per_task = (names + 1) * time * 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return max(1, min(_BLOCK, _CACHE_BYTES // per_task))


class NameScores(NamedTuple):
    """Log-probabilities in nats, one row per task and one column per name; `names` gives the columns."""

    names: tuple[str, ...]
    log_probs: Float[np.ndarray, "tasks names"]

    def log_odds(self, first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, " tasks"]:
        """The log-odds log P(any of `first`) - log P(any of `second`)."""
        return self._log_mass(first) - self._log_mass(second)

    def mass(self) -> Float[np.ndarray, " tasks"]:
        """Probability of naming any of them after the prefix."""
        return np.exp(self._log_mass(self.names))

    def _log_mass(self, names: Sequence[str]) -> Float[np.ndarray, " tasks"]:
        columns = [self.names.index(name) for name in names]
        return np.logaddexp.reduce(self.log_probs[:, columns].astype(np.float64), axis=1)


def _common(sequences: Sequence[Sequence]) -> int:
    """How many first items are the same in all sequences."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((n for n, column in columns if len(set(column)) > 1), min(map(len, sequences)))


def _spelled(
    renderer: Renderer, names: Sequence[str], naming: Naming, messages: Sequence[Message], tools: Sequence[ToolSchema]
) -> tuple[int, list[list[int]]]:
    """Per name the ids of a first call up to the end of the name, and how many of them all names share.

    What is shared never reaches into the names: `list_files` and `list_old_files` may well begin with one token.
    """
    whole, shared = [], []
    for name in names:
        # The name's place is where another one changes the text: a tool called "name" also stands in the call's form.
        text, other = (
            renderer.turn_text(messages, naming(each), tools) for each in (name, "1" if name.startswith("0") else "0")
        )
        start = _common([text, other])
        ids = renderer.encode(text[: start + len(name)])
        if renderer.encode(text)[: len(ids)] != ids:
            raise ValueError(f"the tokenizer merges the name {name!r} with the text behind it; rename it")
        whole.append(ids)
        # A tokenizer may join the name's beginning to the mark before it (`"delete`): that token is the name's.
        shared.append(max(n for n in range(len(ids) + 1) if text[:start].startswith(renderer.decode(ids[:n]))))
    return min(_common(whole), *shared), whole


def call_prefix(
    renderer: Renderer, names: Sequence[str], naming: Naming, messages: Sequence[Message], tools: Sequence[ToolSchema]
) -> list[int]:
    """Ids that stand between the opening of an assistant turn and the name in its first call.

    Read off the template itself: the tokens with which a first call begins whichever of `names` it names, up to the last
    one that holds no letter of a name.
    """
    count, whole = _spelled(renderer, names, naming, messages, tools)
    return whole[0][:count]


def name_ids(
    renderer: Renderer, names: Sequence[str], naming: Naming, messages: Sequence[Message], tools: Sequence[ToolSchema]
) -> list[list[int]]:
    """The ids that spell each name after the shared prefix of `call_prefix`.

    Where the tokenizer joins a name's first letters to the mark before it, the ids begin with that mark.

    Raises:
      ValueError: the tokenizer merges a name with the text behind it, or one name's ids begin another's, so that names
        would not be disjoint events.
    """
    count, whole = _spelled(renderer, names, naming, messages, tools)
    spelled = [ids[count:] for ids in whole]
    for left, ids in zip(names, spelled, strict=True):
        for right, other in zip(names, spelled, strict=True):
            if left != right and other[: len(ids)] == ids:
                raise ValueError(f"the tokens of {left!r} begin those of {right!r}; rename one of them")
    return spelled


class Asked(NamedTuple):
    """What is scored, as ids: openings up to the shared prefix of a first call, and how each name goes on from there.

    Attributes:
      openings: ids per task; lengths: how many of them count.
      spelled: ids per name; spelled_lengths: how many of them count.
    """

    openings: Int[np.ndarray, "tasks time"]
    lengths: Int[np.ndarray, " tasks"]
    spelled: Int[np.ndarray, "names width"]
    spelled_lengths: Int[np.ndarray, " names"]


def asked(
    renderer: Renderer,
    conversations: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]],
    names: Sequence[str],
    naming: Naming,
) -> Asked:
    """The ids of every conversation and name; arguments as of `score_names`, at least one conversation."""
    prefix = call_prefix(renderer, names, naming, *conversations[0])
    openings = [renderer.opening(messages, shown) + prefix for messages, shown in conversations]
    time = -(-max(map(len, openings)) // 32) * 32  # few distinct shapes
    spelled = name_ids(renderer, names, naming, *conversations[0])
    return Asked(*_padded(openings, time), *_padded(spelled, max(map(len, spelled))))


def _padded(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids as rows of one width, zeros behind them, and how many of each row are ids."""
    rows = np.zeros((len(sequences), width), np.int32)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids
    return rows, np.asarray([len(ids) for ids in sequences], np.int32)


def name_log_probs(
    config: ModelConfig,
    params: Mapping,
    openings: Int[Array, "tasks time"],
    lengths: Int[Array, " tasks"],
    spelled: Int[Array, "names width"],
    spelled_lengths: Int[Array, " names"],
) -> Float[Array, "tasks names"]:
    """Log-probability of every name after every opening: openings into a cache, the cache repeated per name, names
    teacher-forced.

    Args:
      config, params: the model; with adapters, the whole tree.
      openings, lengths, spelled, spelled_lengths: see `Asked`.
    """
    tasks, time = openings.shape
    names, width = spelled.shape
    positions = jnp.broadcast_to(jnp.arange(time), (tasks, time))
    valid = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = decoder.apply(
        config, params, {}, openings, positions, valid, empty_cache(config, tasks, time + width)
    )
    assert cache is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # [tasks, 1, d]
    repeated = jax.tree.map(lambda buffer: jnp.repeat(buffer, names, axis=0), cache)
    cache = repeated._replace(lengths=jnp.repeat(lengths, names))
    tokens = jnp.tile(spelled, (tasks, 1))  # [tasks * names, width]
    places = cache.lengths[:, None] + jnp.arange(width)
    inside = jnp.arange(width) < jnp.tile(spelled_lengths, tasks)[:, None]
    hidden, _ = decoder.apply(config, params, {}, tokens, places, inside.astype(jnp.int32), cache)
    # Token j is predicted from the hidden state before it: the opening's last for j = 0, token j - 1's after that.
    before = jnp.concatenate([jnp.repeat(last, names, axis=0), hidden[:, :-1]], axis=1)
    log_probs = jax.nn.log_softmax(decoder.logits(config, params, before), axis=-1)
    chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(inside, chosen, 0.0), axis=1).reshape(tasks, names)


def name_log_probs_in_rows(
    config: ModelConfig,
    params: Mapping,
    openings: Int[Array, "tasks time"],
    lengths: Int[Array, " tasks"],
    spelled: Int[Array, "names width"],
    spelled_lengths: Int[Array, " names"],
) -> Float[Array, "tasks names"]:
    """What `name_log_probs` gives, from one row per task and name and no cache: more work, and a gradient at any length."""
    (tasks, time), (names, width) = openings.shape, spelled.shape
    starts, ends = jnp.repeat(lengths, names), jnp.tile(spelled_lengths, tasks)  # of each row's name
    places = starts[:, None] + jnp.arange(width)
    at = jnp.arange(tasks * names)[:, None]
    rows = (
        jnp.pad(jnp.repeat(openings, names, axis=0), ((0, 0), (0, width)))
        .at[at, places]
        .set(jnp.tile(spelled, (tasks, 1)))
    )
    positions = jnp.broadcast_to(jnp.arange(time + width), rows.shape)
    segments = (positions < (starts + ends)[:, None]).astype(jnp.int32)
    hidden, _ = decoder.apply(config, params, {}, rows, positions, segments)
    log_probs = jax.nn.log_softmax(decoder.logits(config, params, hidden[at, places - 1]), axis=-1)
    chosen = jnp.take_along_axis(log_probs, rows[at, places][..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(jnp.arange(width) < ends[:, None], chosen, 0.0), axis=1).reshape(tasks, names)


@functools.cache
def _scorer(config: ModelConfig):
    """The jitted scorer of one block."""
    return jax.jit(functools.partial(name_log_probs, config))


def score_names(
    config: ModelConfig,
    params: Mapping,
    renderer: Renderer,
    conversations: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]],
    names: Sequence[str],
    naming: Naming,
) -> NameScores:
    """Scores every name at the first call of every conversation.

    Args:
      config, params: the model.
      renderer: tokenizer and template.
      conversations: (messages up to the user's turn, tools shown) per task.
      names: what is scored; where these are all the tools, `mass` is the mass on tool names.
      naming: name -> the turn that names it.

    Returns:
      See `NameScores`.
    """
    if not conversations:
        return NameScores(tuple(names), np.zeros((0, len(names)), np.float32))
    found = asked(renderer, conversations, names, naming)
    (tasks, time), width = found.openings.shape, found.spelled.shape[1]
    size = _block_size(config, len(names), time + width)
    scores = []
    for start in range(0, tasks, size):
        openings, lengths = (each[start : start + size] for each in (found.openings, found.lengths))
        missing = size - len(openings)  # all blocks have one shape; a row of one token stands for none
        openings = np.pad(openings, ((0, missing), (0, 0)))
        lengths = np.pad(lengths, (0, missing), constant_values=1)
        scored = _scorer(config)(params, openings, lengths, found.spelled, found.spelled_lengths)
        scores.append(np.asarray(scored)[: size - missing])
    return NameScores(tuple(names), np.concatenate(scores))
