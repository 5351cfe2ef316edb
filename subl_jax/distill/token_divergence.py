"""How far apart two models are at every loss token of documents, one number per token.

Documents are packed into rows as in training; only loss tokens are projected onto the vocabulary, a chunk at a time: no
array [rows, tokens, vocab] exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int
from numpy import ndarray

from subl_jax.data import packing
from subl_jax.distill import divergences, fused
from subl_jax.distill.divergences import Vocabulary
from subl_jax.distill.loop import Model
from subl_jax.distill.objective import Objective
from subl_jax.distill.step import check_vocabularies
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import on_host, replicate
from subl_jax.trajectory import Trajectory

# Rows of a pass. The activations of so many are what memory is needed for.
ROWS_AT_ONCE = 8
_FORWARD_KL = Objective("forward_kl")


def per_token_kl(
    first: Model, second: Model, documents: Sequence[Trajectory], row_tokens: int, temperature: float = 1.0
) -> list[Float32[ndarray, " length"]]:
    """KL(first || second) in nats of the next-token distributions at every loss token.

    Value t of a document belongs to its token t: both models have read tokens 0 … t-1.

    Args:
      first, second: models of one tokenizer, whole or with their adapters in the parameters. Both may lie on one mesh.
      documents: with loss masks. One without loss tokens gets zeros.
      row_tokens: tokens of a row that documents are packed into; rows grow where a document is longer.
      temperature: divides both models' logits. The value is that of the softened distributions, not times temperature².

    Returns:
      Per document, in order, as many values as it has tokens; 0 off its loss mask.

    Raises:
      ValueError: models that know different numbers of tokens.
      packing.MaskError: a loss mask that nothing could be trained on, such as one on a first token.
    """
    check_vocabularies(second.config, first.config)
    found = [np.zeros(len(document.tokens), np.float32) for document in documents]
    used = [place for place, document in enumerate(documents) if document.loss_mask.any()]
    if not used:
        return found
    lengths = [len(documents[place].tokens) for place in used]
    capacity = max(row_tokens, *lengths)
    lines = [[used[place] for place in row] for row in packing.plan_rows(lengths, capacity, 0, 0)]
    rows = min(ROWS_AT_ONCE, len(lines))
    lines += [[] for _ in range(-len(lines) % rows)]
    batches = [
        packing.collate(lines[start : start + rows], documents, capacity) for start in range(0, len(lines), rows)
    ]
    most = max(int(batch.loss_mask.sum()) for batch in batches)
    chunk = fused.chunk_tokens(most, first.config.vocab_size)
    targets = -(-most // chunk) * chunk
    mesh = _mesh_of(first.params)
    run = _program(first.config, second.config, chunk, mesh, temperature)
    for batch in batches:
        row, column = np.nonzero(batch.loss_mask)
        places = np.zeros(targets, np.int32)
        places[: len(row)] = row * capacity + column - 1
        arrays: Any = batch.tokens, batch.positions, batch.segments, places
        if mesh is not None:
            arrays = replicate(arrays, mesh)
        values = on_host(run(first.params, second.params, *arrays))[: len(row)]
        start = 0
        for place in (place for line in batch.documents for place in line):
            mask = documents[place].loss_mask
            count = int(mask.sum())
            found[place][mask] = values[start : start + count]
            start += count
    return found


def _mesh_of(params: Any) -> jax.sharding.Mesh | None:
    """The mesh that parameters lie on; None: one device."""
    where = jax.tree.leaves(params)[0].sharding
    mesh = where.mesh if isinstance(where, jax.sharding.NamedSharding) else None
    return mesh if isinstance(mesh, jax.sharding.Mesh) and mesh.size > 1 else None


@functools.lru_cache(maxsize=16)
def _program(
    first: ModelConfig, second: ModelConfig, chunk: int, mesh: jax.sharding.Mesh | None, temperature: float
) -> Callable[..., Float[Array, " targets"]]:
    """The jitted pass over one batch of rows: parameters, tokens, positions, segments and places to values."""
    known = min(first.known_tokens, second.known_tokens)

    def chosen(config: ModelConfig, params: Any, tokens: Any, positions: Any, segments: Any, places: Any) -> Array:
        hidden, _ = decoder.apply(config, params, {}, tokens, positions, segments)
        return hidden.reshape(-1, config.d_model)[places].reshape(-1, chunk, config.d_model)

    def run(
        own: Any, other: Any,
        tokens: Int[Array, "rows time"], positions: Int[Array, "rows time"], segments: Int[Array, "rows time"],
        places: Int[Array, " targets"],
    ) -> Float[Array, " targets"]:  # fmt: skip
        document = tokens, positions, segments, places
        hidden = chosen(first, own, *document), chosen(second, other, *document)

        def one(states: tuple[Array, Array]) -> Array:
            p = decoder.logits(first, own, states[0])[:, :known] / temperature
            q = decoder.logits(second, other, states[1])[:, :known] / temperature
            return divergences.forward_kl(_FORWARD_KL, q, p, Vocabulary())[0][:, 0]

        return jax.lax.map(one, hidden).reshape(-1)

    whole = None if mesh is None else jax.sharding.NamedSharding(mesh, P())
    return jax.jit(run, out_shardings=whole)
