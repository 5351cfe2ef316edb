"""The fused linear divergence: hidden states and vocabulary heads in, one loss out, and never all logits at once.

The loss tokens are cut into chunks. Of each chunk, logits of student and teacher are made, compared, and turned at once
into the gradients of the student's hidden states and head; then they are forgotten. The backward pass only scales what the
forward pass has found: that is all a scalar loss needs, and the price of logits being made a second time is not paid.

Under a layout the head is split over the vocabulary and the tokens over the batch: normalisers cross devices as scalars per
token, and the gradient of the hidden states is summed once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from subl_jax.distill import divergences
from subl_jax.distill.divergences import EXCLUDED, Vocabulary
from subl_jax.distill.objective import Objective
from subl_jax.parallel.layout import Layout

# One float32 array [chunk, vocab] on a CPU. Smaller chunks read and write the head's gradient more often, larger ones leave
# the cache. Measured at V = 32k (best 128 to 256 tokens a chunk, 64 and 512 5 to 15 % slower) and V = 152k.
CPU_CHUNK_BYTES = 64 << 20
# Of an accelerator's memory, for all arrays [chunk, vocab] together: 630 MB of 80 GB. Not measured yet.
MEMORY_SHARE = 1 / 128
# Where a device does not tell its memory, e.g. one that is compiled for and is not here.
UNKNOWN_MEMORY = 16 << 30
# Float32 arrays [chunk, vocab] that are alive at once: student, teacher, and the gradient or the base.
CHUNK_ARRAYS = 3
MIN_CHUNK, CHUNK_STEP = 64, 16


class Head(NamedTuple):
    """What makes logits: the sum of hidden[i] @ kernels[i].

    One term usually; an adapter on the head is a second, with hidden states scale * h A and kernel B, so that the product
    A B is never made and only B is trained.

    Attributes:
      hidden: per term, states of the loss tokens, in the dtype that products are made in.
      kernels: per term [width, vocab], or [vocab, width] where `transposed` says so, in whatever dtype they are kept.
      transposed: per term. A tied head is [vocab, width].
    """

    hidden: tuple[Float[Array, "groups tokens _"], ...]
    kernels: tuple[Float[Array, "_ _"], ...]
    transposed: tuple[bool, ...]


class TopK(NamedTuple):
    """A teacher of whom only the top-k is known: see `divergences.against_cache`.

    Attributes:
      ids: of the top-k continuations; -1: none.
      log_probs: their log-probabilities under the softened teacher, over the whole vocabulary.
      log_tail: the log of the remaining mass.
    """

    ids: Int[Array, "*lead tokens k"]
    log_probs: Float[Array, "*lead tokens k"]
    log_tail: Float[Array, "*lead tokens"]


class Tokens(NamedTuple):
    """What is known of each loss token besides.

    Attributes:
      targets: the token itself.
      weights: what its loss counts; 0 for padding.
      banned: continuations that the logit filter bans, padded with -1; width 0 without a filter.
      cached: in place of a teacher's head.
    """

    targets: Int[Array, "groups tokens"]
    weights: Float[Array, "groups tokens"]
    banned: Int[Array, "groups tokens banned"]
    cached: TopK | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the loss lies on a mesh: the vocabulary over some axes, tokens over the others.

    Attributes:
      mesh: of all devices.
      batch: axes that groups of tokens are split over.
      vocab: axes that every head is split over.
      student, teacher: axes that the width of their kernels comes split over, and is gathered from.
    """

    mesh: Any
    batch: tuple[str, ...]
    vocab: tuple[str, ...]
    student: tuple[str, ...]
    teacher: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Into how many parts the loss tokens are cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    @property
    def parts(self) -> int:
        """Into how many parts the vocabulary is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.vocab)


def placement(student: Layout | None, teacher: Layout | None) -> Placement | None:
    """Where the loss of these two models is computed; None: on one device.

    The vocabulary is split over the axes that either model's rules split it over; the other model's head is cut there
    (nothing moves where it was whole). Everything else is left to the tokens.
    """
    if student is None:
        return None
    teacher = student if teacher is None else teacher
    vocab = student.axes("vocab") or teacher.axes("vocab")
    batch = tuple(axis for axis in student.axes("batch") if axis not in vocab)

    def width(layout: Layout) -> tuple[str, ...]:
        return tuple(axis for axis in layout.axes("embed") if axis in batch)

    return Placement(student.mesh, batch, vocab, width(student), width(teacher))


def resized(kernel: Shaped[Array, "_ _"], size: int, axis: int) -> Shaped[Array, "_ _"]:
    """A head (or an embedding) cut, or padded with zeros, to `size` ids along an axis; itself where it has as many."""
    have = kernel.shape[axis]
    if have >= size:
        return kernel if have == size else jax.lax.slice_in_dim(kernel, 0, size, axis=axis)
    return jnp.pad(kernel, [(0, size - have) if each == axis else (0, 0) for each in (0, 1)])


def chunk_tokens(tokens: int, vocab: int, wanted: int = 0, limit: int | None = None) -> int:
    """How many loss tokens are worked on at a time.

    Args:
      tokens: of one device.
      vocab: ids of one device.
      wanted: a number that the user chose; 0: by memory.
      limit: the device's memory in bytes; None: a CPU.
    """
    if wanted:
        most = wanted
    else:
        room = CPU_CHUNK_BYTES if limit is None else int(limit * MEMORY_SHARE) // CHUNK_ARRAYS
        most = max(MIN_CHUNK, room // (4 * vocab) // CHUNK_STEP * CHUNK_STEP)
    if tokens <= most:
        return tokens
    # Even chunks: the last one is not mostly padding.
    chunks = -(-tokens // most)
    even = -(-tokens // chunks)
    return even if wanted else -(-even // CHUNK_STEP) * CHUNK_STEP


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Everything static."""

    objective: Objective
    known: int
    chunk: int
    place: Placement | None
    student: tuple[bool, ...]
    teacher: tuple[bool, ...] | None
    base: tuple[bool, ...] | None


def divergence(
    objective: Objective,
    student: Head,
    teacher: Head | None,
    base: Head | None,
    tokens: Tokens,
    *,
    known: int,
    chunk: int,
    place: Placement | None = None,
) -> Float[Array, ""]:
    """The sum of weights * objective over all tokens of all groups, in nats; differentiable by the student's head.

    Products are made in the dtype of the hidden states and added in float32. Gradients of kernels come in the kernels' own
    dtype, those of hidden states in theirs; what nobody differentiates by is not computed. Teacher and base have none.

    Args:
      objective: what is minimised.
      student, teacher, base: all over one vocabulary (the same number of ids). The teacher is None for hard labels and for
        `tokens.cached`, the base for all but `anchor`.
      tokens: groups are split over `place.batch`; without a place there may be any number.
      known: ids from here on are padding of the vocabulary, and have no probability.
      chunk: loss tokens of one group that are worked on at a time; it divides their number.
      place: on the mesh.

    Raises:
      ValueError: heads that do not fit the objective or each other.
    """
    _check(objective, student, teacher, base, tokens, chunk, place)
    spec = _Spec(
        objective, known, chunk, place, student.transposed, teacher and teacher.transposed, base and base.transposed
    )
    fixed = (_arrays(teacher), _arrays(base), tokens)
    return _divergence(spec, (student.hidden, student.kernels), jax.lax.stop_gradient(fixed))


def _arrays(head: Head | None) -> tuple[tuple[Array, ...], tuple[Array, ...]] | None:
    return None if head is None else (head.hidden, head.kernels)


def _check(
    objective: Objective, student: Head, teacher: Head | None, base: Head | None, tokens: Tokens, chunk: int,
    place: Placement | None,
) -> None:  # fmt: skip
    live = objective.needs_teacher and tokens.cached is None
    if live != (teacher is not None):
        raise ValueError(f"objective {objective.loss} and a teacher's head {'missing' if live else 'given'}")
    if (objective.logit_filter == "anchor") != (base is not None):
        raise ValueError(f"logit_filter={objective.logit_filter} and a base {'missing' if base is None else 'given'}")
    if tokens.cached is not None and objective.logit_filter != "none":
        raise ValueError(
            f"logit_filter={objective.logit_filter} with a teacher cache: banned continuations may lie in its tail, where it "
            "tells no one from another; distil from the live teacher"
        )
    sizes = [_vocab(head) for head in (student, teacher, base) if head is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"heads of {sizes} ids; cut or pad them to the student's first (vocabulary.aligned_teacher)")
    count = tokens.targets.shape[1]
    if chunk < 1 or count % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {count} loss tokens of a group")
    if place is not None and (sizes[0] % place.parts or tokens.targets.shape[0] % place.groups):
        raise ValueError(
            f"{sizes[0]} ids over {place.parts} devices, {tokens.targets.shape[0]} groups of tokens over {place.groups}: "
            "both must divide"
        )


def _vocab(head: Head) -> int:
    return head.kernels[0].shape[0 if head.transposed[0] else 1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(spec: _Spec, trained: Any, fixed: Any) -> Float[Array, ""]:
    nothing = jax.tree.map(lambda _: False, trained)
    return _placed(spec, nothing, trained, fixed)[0]


def _forward(spec: _Spec, trained: Any, fixed: Any) -> tuple[Any, Any]:
    """The loss, and as residual the gradients that are wanted."""
    wanted = jax.tree.map(lambda leaf: leaf.perturbed, trained, is_leaf=_is_primal)
    trained, fixed = (jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal) for tree in (trained, fixed))
    loss, gradients = _placed(spec, wanted, trained, fixed)
    return loss, gradients


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _backward(spec: _Spec, gradients: Any, cotangent: Any) -> tuple[Any, None]:
    """The gradients of the sum, times its cotangent."""
    del spec
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jax.tree.map(lambda leaf: None, gradients), None
    return jax.tree.map(lambda leaf: (cotangent * leaf).astype(leaf.dtype), gradients), None


_divergence.defvjp(_forward, _backward, symbolic_zeros=True)


def _placed(spec: _Spec, wanted: Any, trained: Any, fixed: Any) -> tuple[Float[Array, ""], Any]:
    """`_summed` on one device, or on every device of the mesh with its part."""
    place = spec.place
    if place is None:
        return _summed(spec, wanted, trained, fixed)

    def heads(transposed: Sequence[bool] | None, width: tuple[str, ...]) -> Any:
        if transposed is None:
            return None
        vocab, split = place.vocab or None, width or None
        kernels = tuple(P(vocab, split) if first else P(split, vocab) for first in transposed)
        # The rank of an adapter is never split: only the first term has the model's width.
        kernels = (kernels[0], *(P(vocab, None) if first else P(None, vocab) for first in transposed[1:]))
        return (tuple(P(place.batch or None) for _ in kernels), kernels)

    student = heads(spec.student, place.student)
    teacher, base = heads(spec.teacher, place.teacher), heads(spec.base, place.student)
    tokens = jax.tree.map(lambda _: P(place.batch or None), fixed[2])
    gradients = jax.tree.map(lambda keep, where: where if keep else None, wanted, student, is_leaf=_is_spec)
    return jax.shard_map(
        functools.partial(_summed, spec, wanted),
        mesh=place.mesh,
        in_specs=(student, (teacher, base, tokens)),
        out_specs=(P(), gradients),
        check_vma=False,
    )(trained, fixed)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P | bool)


def _summed(spec: _Spec, wanted: Any, trained: Any, fixed: Any) -> tuple[Float[Array, ""], Any]:
    """Loss and gradients of one device's tokens and ids; under a place also the sums over devices that they need."""
    place = spec.place
    hidden, kernels = trained
    teacher, base, tokens = fixed
    widths = ((), ()) if place is None else (place.student, place.teacher)
    student = _whole(hidden, kernels, spec.student, widths[0])
    teacher = teacher and _whole(*teacher, spec.teacher, widths[1])
    base = base and _whole(*base, spec.base, widths[0])
    groups, count = tokens.targets.shape
    chunks = groups * count // spec.chunk

    def cut(x: Array) -> Array:
        return x.reshape(chunks, spec.chunk, *x.shape[2:])

    states = [tuple(cut(x) for x in head[0]) for head in (student, teacher, base) if head]
    per_chunk = (states, jax.tree.map(cut, tokens))
    matrices = [head[1] for head in (student, teacher, base) if head]
    # Gradients are added up in float32, whatever the kernels are kept in.
    sums = tuple(
        jnp.zeros(kernel.shape, jnp.float32) if keep else None
        for kernel, keep in zip(student[1], wanted[1], strict=True)
    )

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        loss, sums = carry
        here, told = chunk
        value, own, more = _chunk(spec, wanted, list(zip(here, matrices, strict=True)), told)
        sums = tuple(None if added is None else total + added for total, added in zip(sums, more, strict=True))
        return (loss + value, sums), own

    start = (jnp.zeros((), jnp.float32), sums)
    if chunks == 1:  # nothing to loop over, and nothing to add to
        value, own, more = _chunk(
            spec, wanted, list(zip([tuple(x[0] for x in one) for one in states], matrices, strict=True)),
            jax.tree.map(lambda x: x[0], per_chunk[1]),
        )  # fmt: skip
        loss, sums = value, more
    else:
        (loss, sums), own = jax.lax.scan(body, start, per_chunk)
    own = tuple(None if x is None else x.reshape(groups, count, x.shape[-1]) for x in own)
    if place is not None:
        if place.vocab:  # each device knows what its ids say of the hidden states
            own = tuple(None if x is None else jax.lax.psum(x, place.vocab) for x in own)
        if place.batch:
            loss = jax.lax.psum(loss, place.batch)
            sums = tuple(
                None if x is None else _over_batch(x, place.batch, widths[0] if term == 0 else (), spec.student[term])
                for term, x in enumerate(sums)
            )
    sums = tuple(None if x is None else x.astype(k.dtype) for x, k in zip(sums, kernels, strict=True))
    return loss, (own, sums)


def _whole(
    hidden: tuple[Array, ...], kernels: tuple[Array, ...], transposed: Sequence[bool] | None, width: tuple[str, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The head in the dtype of its products, and with all of its width: gathered in that dtype, which may be narrower."""
    assert transposed is not None
    cast = [kernel.astype(state.dtype) for kernel, state in zip(kernels, hidden, strict=True)]
    if width:
        cast[0] = jax.lax.all_gather(cast[0], width, axis=1 if transposed[0] else 0, tiled=True)
    return hidden, tuple(cast)


def _over_batch(x: Array, batch: tuple[str, ...], width: tuple[str, ...], transposed: bool) -> Array:
    """Sums a kernel's gradient over the devices that have other tokens; each keeps the part of the width that it holds."""
    if width:
        x = jax.lax.psum_scatter(x, width, scatter_dimension=1 if transposed else 0, tiled=True)
    rest = tuple(axis for axis in batch if axis not in width)
    return jax.lax.psum(x, rest) if rest else x


def _chunk(spec: _Spec, wanted: Any, heads: Any, tokens: Any) -> tuple[Array, tuple[Any, ...], tuple[Any, ...]]:
    """Loss of one chunk, and the gradients by its hidden states and by the kernels."""
    objective = spec.objective
    vocabulary = Vocabulary(spec.place.vocab if spec.place else ())
    forms = [form for form in (spec.student, spec.teacher, spec.base) if form is not None]
    logits = [_logits(states, kernels, form) for (states, kernels), form in zip(heads, forms, strict=True)]
    size = logits[0].shape[1]
    if spec.known < size * (spec.place.parts if spec.place else 1):
        unknown = vocabulary.ids(size) >= spec.known
        logits = [jnp.where(unknown, EXCLUDED, x) for x in logits]
    value, gradient = _objective(objective, logits, tokens, vocabulary)
    weights = tokens.weights[:, None]
    # A padding token's hidden state is whatever stood there; its weight of 0 is enough, since nothing here is infinite.
    loss = jnp.sum(value * weights)
    states, kernels = heads[0]
    if not any(jax.tree.leaves(wanted)):
        return loss, (None,) * len(states), (None,) * len(states)
    gradient = (gradient * weights).astype(states[0].dtype)
    own, more = [], []
    for state, kernel, first, keep_state, keep_kernel in zip(states, kernels, spec.student, *wanted, strict=True):
        own.append(_product(gradient, 1, kernel, 0 if first else 1).astype(state.dtype) if keep_state else None)
        if not keep_kernel:
            more.append(None)
        elif first:
            more.append(_product(gradient, 0, state, 0))
        else:
            more.append(_product(state, 0, gradient, 0))
    return loss, tuple(own), tuple(more)


def _product(left: Array, left_axis: int, right: Array, right_axis: int) -> Float[Array, "_ _"]:
    """The product over one axis of each, added up in float32."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _logits(
    states: tuple[Array, ...], kernels: tuple[Array, ...], transposed: Sequence[bool]
) -> Float[Array, "tokens vocab"]:
    terms = zip(states, kernels, transposed, strict=True)
    return functools.reduce(jnp.add, (_product(state, 1, kernel, 1 if first else 0) for state, kernel, first in terms))


def _objective(
    objective: Objective, logits: Sequence[Array], tokens: Any, vocabulary: Vocabulary
) -> tuple[Array, Array]:
    """Per token the objective and its gradient by the student's logits."""
    student, *others = logits
    if not objective.needs_teacher:
        return divergences.hard_label(student, tokens.targets, vocabulary)
    heat = objective.temperature
    if tokens.cached is not None:
        known: TopK = tokens.cached
        value, gradient = divergences.against_cache(
            objective, student / heat, known.ids, known.log_probs, known.log_tail, vocabulary
        )
    else:
        softened, teacher = student, others[0]
        if objective.logit_filter != "none":
            banned = _mask(tokens.banned, student.shape[1], vocabulary)
            if objective.logit_filter == "drop":
                softened, teacher = (jnp.where(banned, EXCLUDED, x) for x in (softened, teacher))
            else:
                teacher = divergences.anchored(teacher, others[1], banned, vocabulary)
        value, gradient = divergences.DIVERGENCES[objective.loss](
            objective, softened / heat, teacher / heat, vocabulary
        )
    # temperature² on the value; one of the two goes with the gradient by the logits before they were softened.
    value, gradient = heat**2 * value, heat * gradient
    share = objective.hard_label_weight
    if share:
        label, slope = divergences.hard_label(student, tokens.targets, vocabulary)
        value, gradient = (1 - share) * value + share * label, (1 - share) * gradient + share * slope
    return value, gradient


def _mask(banned: Int[Array, "tokens banned"], size: int, vocabulary: Vocabulary) -> Bool[Array, "tokens vocab"]:
    """Ids, padded with -1, to a mask over this part of the vocabulary."""
    place = banned - vocabulary.offset(size)
    place = jnp.where((banned >= 0) & (place >= 0), place, size)  # out of range: dropped by the scatter
    rows = jnp.broadcast_to(jnp.arange(banned.shape[0])[:, None], banned.shape)
    return jnp.zeros((banned.shape[0], size), bool).at[rows, place].set(True, mode="drop")
