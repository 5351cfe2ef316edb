"""The bytes that collectives move, told from shapes and sharding rules alone, before anything is compiled.

Models and layouts go in; one `Term` per cause comes out. `docs/PREFLIGHT.md` holds the derivation and the figures that were
written down before the first compilation. Nothing here is fitted to what a compiler does: gaps are reported beside it.

Bytes are those of one device, of the larger side of a collective: the result of an all-gather; the operand of a
reduce-scatter, an all-reduce, an all-to-all or a permutation. A look-up, a layer, a part of a batch count as often as they
are run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from subl_jax.distill.step import Layouts
from subl_jax.models.config import LAYER_TARGETS, ModelConfig
from subl_jax.parallel.layout import Layout

KINDS: tuple[str, ...] = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Bytes of the types that programs count in whatever they compute in: float32 sums, int32 ids.
_WORD = 4


class Term(NamedTuple):
    """One cause of traffic.

    Attributes:
      cause: in words.
      kind: of `KINDS`.
      axes: of the mesh that take part.
      bytes: of one device, in a whole step.
    """

    cause: str
    kind: str
    axes: tuple[str, ...]
    bytes: int


def by_kind(terms: Iterable[Term]) -> dict[str, int]:
    """The terms added up by kind; kinds without traffic are 0."""
    sums = dict.fromkeys(KINDS, 0)
    for term in terms:
        sums[term.kind] += term.bytes
    return sums


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int, str]]:
    """Of each matrix of a layer: the width that is d_model, the other one, and the name of the other one's dimension."""
    d, heads, kv = config.d_model, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    other = {"q": (heads, "heads"), "k": (kv, "kv_heads"), "v": (kv, "kv_heads"), "o": (heads, "heads")}
    other |= dict.fromkeys(("gate", "up", "down"), (config.d_ff, "mlp"))
    return {name: (d, *other[name]) for name in LAYER_TARGETS}


def layer_elements(config: ModelConfig, layout: Layout) -> int:
    """Elements of one layer's matrices after the gather over `embed`: whole in d_model, split in their other dimension."""
    return sum(d * (width // layout.split(name)) for d, width, name in _matrices(config).values())


def _item(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _gathers(who: str, config: ModelConfig, layout: Layout, passes: int) -> list[Term]:
    """Layers' matrices, collected over the axes of `embed` in the compute dtype, once in every loop that uses them."""
    axes = layout.axes("embed")
    size = passes * config.num_layers * layer_elements(config, layout) * _item(config.compute_dtype)
    return [Term(f"{who}: weights of layers, {passes}x", "all-gather", axes, size)]


def _look_up(who: str, config: ModelConfig, layout: Layout, tokens: int, held: str, differentiated: bool) -> list[Term]:
    """The embedding's rows: ids to the devices with other columns, sums over the vocabulary, rows back.

    Args:
      who, config, layout: of the model.
      tokens: of one device.
      held: dtype of the table, which the rows travel in.
      differentiated: the rows' gradients take the way back as well.
    """
    columns, vocab, rows = layout.axes("embed"), layout.axes("vocab"), tokens * config.d_model * _item(held)
    others = tuple(axis for axis in layout.axes("batch") if axis not in columns)
    table = config.vocab_size // layout.split("vocab") * config.d_model // layout.split("embed") * _WORD
    return [
        Term(f"{who}: ids of the look-up", "all-gather", columns, tokens * layout.split("embed") * _WORD),
        Term(f"{who}: rows of the look-up", "all-to-all", columns, rows * (1 + differentiated)),
        Term(f"{who}: rows of the look-up, over the vocabulary", "all-reduce", vocab, rows),
        *([Term(f"{who}: gradient of the table", "all-reduce", others, table)] if differentiated else []),
    ]


def _residual_sums(who: str, config: ModelConfig, layout: Layout, tokens: int, attention: int, mlp: int) -> list[Term]:
    """Activations [tokens, d_model] that are summed where a product's inner dimension is split over devices."""
    one = config.num_layers * tokens * config.d_model * _item(config.compute_dtype)
    return [
        Term(f"{who}: attention's residual, {attention}x", "all-reduce", layout.axes("heads"), attention * one),
        Term(f"{who}: MLP's residual, {mlp}x", "all-reduce", layout.axes("mlp"), mlp * one),
    ]


def _over_batch(cause: str, size: int, layout: Layout, split: bool = True) -> list[Term]:
    """A gradient of `size` bytes (whole in d_model), summed over the devices that have other rows of the batch.

    Where d_model is split it is reduced and scattered over those axes, and the part that is left summed over the others.
    """
    columns = layout.axes("embed") if split else ()
    others = tuple(axis for axis in layout.axes("batch") if axis not in columns)
    parts = math.prod(layout.mesh.shape[axis] for axis in columns)
    return [
        Term(cause, "reduce-scatter", columns, size if columns else 0),
        Term(f"{cause}, over other rows", "all-reduce", others, size // parts),
    ]


def _gradients(config: ModelConfig, layout: Layout) -> list[Term]:
    """Gradients of the layers, float32 (the dtype of the master copy and of `decoder._product`'s sum)."""
    size = config.num_layers * layer_elements(config, layout) * _WORD
    norms = (2 * config.num_layers + 1) * config.d_model * _WORD
    return [
        *_over_batch("student: gradients of layers", size, layout),
        *_over_batch("student: gradients of norms", norms, layout, split=False),
    ]


def _adapters(config: ModelConfig, layout: Layout, tokens: int) -> list[Term]:
    """Low-rank adapters on layers: A and B gathered like weights, their gradients summed like weights' (compute dtype)."""
    lora, item = config.lora, _item(config.compute_dtype)
    assert lora is not None
    terms: list[Term] = []
    for name in (target for target in LAYER_TARGETS if target in lora.targets):
        d, width, dimension = _matrices(config)[name]
        inner, outer = config.num_layers * d * lora.rank * item, width // layout.split(dimension) * lora.rank * item
        into = name in ("o", "down")
        sums = config.num_layers * tokens * lora.rank * item
        terms += [
            Term(f"adapter on {name}: its side of d_model, 2x", "all-gather", layout.axes("embed"), 2 * inner),
            *_over_batch(f"adapter on {name}: gradient on the side of d_model", inner, layout),
            *_over_batch(
                f"adapter on {name}: gradient on the other side", config.num_layers * outer, layout, split=False
            ),
            # h A where A's input is split over devices; where B's output is, its gradient is such a sum.
            Term(f"adapter on {name}: low-rank activations", "all-reduce", layout.axes(dimension), sums * (1 + into)),
        ]
    return terms


def _loss(student: ModelConfig, teacher: ModelConfig | None, layouts: Layouts, tokens: int) -> list[Term]:
    """The fused forward KL on `tokens` loss tokens of one device (its group)."""
    place, layout = layouts.loss, layouts.student
    assert place is not None and layout is not None
    ids, item = student.vocab_size // place.parts, _item(student.compute_dtype)
    terms = [Term("loss: student's head", "all-gather", place.student, ids * student.d_model * item)]
    scalars = 2  # maximum and sum of the student's softmax
    if teacher is not None:
        terms.append(Term("loss: teacher's head", "all-gather", place.teacher, ids * teacher.d_model * item))
        scalars = 5  # the teacher's too, and the divergence
    terms += [
        Term("loss: scalars per token", "all-reduce", place.vocab, scalars * tokens * _WORD),
        Term("loss: gradient of hidden states", "all-reduce", place.vocab, tokens * student.d_model * item),
    ]
    if student.lora is None:
        others = tuple(axis for axis in place.batch if axis not in place.student)
        head = ids * student.d_model * _WORD
        parts = math.prod(place.mesh.shape[axis] for axis in place.student)
        terms += [
            Term("loss: gradient of the head", "reduce-scatter", place.student, head if place.student else 0),
            Term("loss: gradient of the head, over other rows", "all-reduce", others, head // parts),
        ]
    return terms


def distill_terms(
    student: ModelConfig,
    teacher: ModelConfig | None,
    layouts: Layouts,
    rows: int,
    row_tokens: int,
    loss_tokens: int,
    accumulate: int,
    master_dtype: str = "float32",
) -> list[Term]:
    """Every collective of one training step by forward KL (or on hard labels, without a teacher).

    Args:
      student, teacher: shapes. A student with adapters trains these alone.
      layouts: both given.
      rows: of a batch, over all devices; row_tokens: tokens of a row.
      loss_tokens: of a batch, over all devices.
      accumulate: parts of a batch, one after the other: weights are gathered and gradients summed in each.
      master_dtype: of the student's trained parameters.
    """
    layout, above = layouts
    assert layout is not None and above is not None and layouts.loss is not None
    tokens = rows * row_tokens // accumulate // layout.split("batch")
    own = -(-loss_tokens // accumulate // layouts.loss.groups)
    trains_all = student.lora is None
    held = master_dtype if trains_all else student.param_dtype
    again = student.remat == "full"  # the attention's output product is made again; nothing needs the MLP's
    terms = [
        *_gathers("student", student, layout, 2),
        *_look_up("student", student, layout, tokens, held, trains_all),
        *_residual_sums("student", student, layout, tokens, 2 + again, 2),
        *(_gradients(student, layout) if trains_all else _adapters(student, layout, tokens)),
        *_loss(student, teacher, layouts, own),
    ]
    if teacher is not None:
        terms += [
            *_gathers("teacher", teacher, above, 1),
            *_look_up("teacher", teacher, above, tokens, teacher.param_dtype, False),
            *_residual_sums("teacher", teacher, above, tokens, 1, 1),
        ]
    return _real([term._replace(bytes=accumulate * term.bytes) for term in terms], layout)


def decode_terms(config: ModelConfig, layout: Layout, slots: int) -> list[Term]:
    """Every collective of one decode step of a replica with `slots` slots, split over the axis `tensor`."""
    vocab, parts = layout.axes("vocab"), layout.split("vocab")
    terms = [
        *_pass_terms(config, layout, slots),
        Term("draw: best value and id of each part", "all-gather", vocab, slots * parts * 2 * _WORD),
        Term("draw: log-probability (maximum, sum, chosen logit)", "all-reduce", vocab, 3 * slots * _WORD),
    ]
    return _real(terms, layout)


def prefill_terms(config: ModelConfig, layout: Layout, rows: int, chunk: int) -> list[Term]:
    """Every collective of one prefill pass of a replica, over `rows` rows of `chunk` tokens."""
    return _real(_pass_terms(config, layout, rows * chunk), layout)


def _pass_terms(config: ModelConfig, layout: Layout, tokens: int) -> list[Term]:
    rows = tokens * config.d_model * _item(config.param_dtype)
    return [
        Term("rows of the look-up, over the vocabulary", "all-reduce", layout.axes("vocab"), rows),
        *_residual_sums("policy", config, layout, tokens, 1, 1),
    ]


def _real(terms: Sequence[Term], layout: Layout) -> list[Term]:
    """Those terms that more than one device takes part in."""

    def count(term: Term) -> int:
        return math.prod(layout.mesh.shape[axis] for axis in term.axes)

    return [term for term in terms if term.bytes and count(term) > 1]
