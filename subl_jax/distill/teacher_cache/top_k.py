"""The device's part of the teacher cache: packed documents in, the teacher's top k at every loss token out.

Hidden states of the loss tokens are projected onto the vocabulary a chunk at a time; no larger array of logits exists.
Beside the top k the program can work out the full KL to a reference, and what the reference gives the same k ids, so that
the loss of information is known for what is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout


class TopK(NamedTuple):
    """The teacher's softened distribution, softmax(logits / temperature) over the shared vocabulary, at each token.

    Attributes:
      ids: the k likeliest, ascending.
      drops: log of the likeliest one's probability over theirs, at least 0.
      log_tail: log of what all others have together; -inf where there are none.
      log_normaliser: logsumexp of logits / temperature.
    """

    ids: Int[Array, "targets k"]
    drops: Float[Array, "targets k"]
    log_tail: Float[Array, " targets"]
    log_normaliser: Float[Array, " targets"]


class Reference(NamedTuple):
    """A student-like distribution q beside the teacher p.

    Attributes:
      kl: KL(p || q) over the whole shared vocabulary, in nats.
      log_probs: log q of the teacher's top k, in their order; log_tail: of all others together.
    """

    kl: Float[Array, " targets"]
    log_probs: Float[Array, "targets k"]
    log_tail: Float[Array, " targets"]


Program = Callable[..., tuple[TopK, Reference | None]]


def _split(
    scores: Float[Array, "tokens vocab"], ids: Int[Array, "tokens k"]
) -> tuple[Float[Array, "tokens k"], Float[Array, " tokens"], Float[Array, " tokens"]]:
    """(scores at the ids, log of the others' share, logsumexp of all).

    The others are summed on their own: 1 minus the sum of the top k would be noise where the tail is thin. And the share
    comes from the ratio of the two sums, not from the difference of two logarithms of nearly the same size.
    """
    tokens = jnp.arange(len(scores))[:, None]
    chosen = scores[tokens, ids]
    top = jax.nn.logsumexp(chosen, axis=-1)
    rest = jax.nn.logsumexp(scores.at[tokens, ids].set(-jnp.inf), axis=-1)
    return chosen, jax.nn.log_sigmoid(rest - top), jnp.logaddexp(top, rest)


def top_k_of(scores: Float[Array, "tokens vocab"], k: int) -> TopK:
    """The top k of softmax(scores)."""
    _, likeliest = jax.lax.top_k(scores, k)
    ids = jnp.sort(likeliest, axis=-1)
    chosen, log_tail, log_normaliser = _split(scores, ids)
    return TopK(ids, jnp.max(chosen, axis=-1, keepdims=True) - chosen, log_tail, log_normaliser)


def reference_of(scores: Float[Array, "tokens vocab"], top: TopK, other: Float[Array, "tokens vocab"]) -> Reference:
    """What q = softmax(other) gives the atoms of p = softmax(scores), and KL(p || q)."""
    chosen, log_tail, normaliser = _split(other, top.ids)
    log_p = scores - top.log_normaliser[:, None]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - (other - normaliser[:, None])), axis=-1)
    return Reference(kl, chosen - normaliser[:, None], log_tail)


@functools.lru_cache(maxsize=16)
def program(
    teacher: ModelConfig,
    reference: ModelConfig | None,
    *,
    k: int,
    temperature: float,
    shared_tokens: int,
    chunk_tokens: int,
    measured: bool,
    layout: Layout | None = None,
) -> Program:
    """The jitted pass; later calls for the same models and sizes compile nothing.

    Args:
      teacher: the model that is cached.
      reference: of `Reference`; None: the teacher itself at twice the temperature.
      k: at most `shared_tokens`.
      temperature: divides the logits of both.
      shared_tokens: ids from here on have no probability in either model.
      chunk_tokens: tokens whose logits exist at one time.
      measured: whether to return a `Reference`.
      layout: of both models' parameters, on a mesh.

    Returns:
      (teacher's parameters, reference's parameters or None, tokens [rows, time], positions, segments, places [targets])
      to (`TopK`, `Reference` or None). `places` are row * time + column, a multiple of `chunk_tokens` of them.
    """

    def chosen_hidden(
        config: ModelConfig, params: Any, tokens: Any, positions: Any, segments: Any, places: Any
    ) -> Array:
        hidden, _ = decoder.apply(config, params, {}, tokens, positions, segments, layout=layout)
        return hidden.reshape(-1, config.d_model)[places].reshape(-1, chunk_tokens, config.d_model)

    def scores_of(config: ModelConfig, params: Any, hidden: Array) -> Array:
        scores = decoder.logits(config, params, hidden, layout)
        if layout is not None:  # each device looks for the top k of its own tokens, in whole rows
            scores = layout.constrain(scores, "batch", None)
        return scores[:, :shared_tokens] / temperature

    def run(params: Any, other_params: Any, tokens: Any, positions: Any, segments: Any, places: Any):
        document = tokens, positions, segments, places
        hidden = [chosen_hidden(teacher, params, *document)]
        if measured and reference is not None:
            hidden.append(chosen_hidden(reference, other_params, *document))

        def chunk(hidden: list[Array]) -> tuple[TopK, Reference | None]:
            scores = scores_of(teacher, params, hidden[0])
            top = top_k_of(scores, k)
            if not measured:
                return top, None
            other = scores / 2 if reference is None else scores_of(reference, other_params, hidden[1])
            return top, reference_of(scores, top, other)

        found = jax.lax.map(chunk, hidden)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

    return jax.jit(run)
