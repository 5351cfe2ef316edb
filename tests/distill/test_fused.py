"""The fused loss from hidden states and heads against the same in float64, however it is cut: chunks, devices, tied or not.

That the objectives themselves are right is shown in test_divergences; here it is what is done around them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from subl_jax.distill import fused
from subl_jax.distill.fused import Head, Placement, Tokens
from subl_jax.distill.objective import Objective
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.distill import dense, sharded

ALL_TOKENS, VOCAB, KNOWN, WIDTH, TEACHER_WIDTH, BANNED, TOP_K = 48, 40, 37, 24, 16, 3, 5
DIVERGENCES: tuple[Any, ...] = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
UNEVEN: dict[str, Any] = {"teacher_weight": 0.3, "skew": 0.15}
# (data, fsdp, tensor), and the rules of student and teacher.
MESHES = {
    "one": None,
    "fsdp": ((1, 8, 1), "default", "default"),
    "tensor": ((1, 1, 8), "default", "default"),
    "data": ((8, 1, 1), "default", "default"),
    "tensor two": ((1, 1, 2), "default", "default"),
    "fsdp x tensor": ((1, 2, 4), "default", "default"),
    "all, a whole student": ((2, 2, 2), "replicated", "default"),
    "all, a gathered teacher": ((2, 2, 2), "default", "fsdp"),
    "all, both gathered": ((2, 2, 2), "fsdp", "fsdp"),
}


def place_of(mesh: str) -> Placement | None:
    if MESHES[mesh] is None:
        return None
    shape, *rules = MESHES[mesh]
    made = make_mesh(MeshConfig(*shape))
    return fused.placement(*(Layout(made, rule) for rule in rules))


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled program."""

    objective: Objective
    mesh: str = "one"
    student_tied: bool = False
    teacher_tied: bool = False
    chunks: int = 1  # per group
    adapted: bool = False
    cached: bool = False
    std: float = 2.0

    @functools.cached_property
    def place(self) -> Placement | None:
        return place_of(self.mesh)

    @property
    def groups(self) -> int:
        return self.place.groups if self.place else 1


def head_of(arrays: Any, transposed: Any) -> Head:
    hidden, kernels = arrays
    return Head(hidden, kernels, transposed)


def head(rng: np.random.Generator, groups: int, width: int, tied: bool, std: float, rank: int = 0) -> Head:
    """Logits of this standard deviation; with a rank, an adapter's term beside the kernel's."""

    def term(width: int, tied: bool) -> tuple[np.ndarray, np.ndarray]:
        kernel = rng.normal(size=(VOCAB, width) if tied else (width, VOCAB)) * std / np.sqrt(width)
        return (
            rng.normal(size=(groups, ALL_TOKENS // groups, width)).astype(np.float32),
            kernel.astype(np.float32),
        )

    terms = [(*term(width, tied), tied)] + [(*term(rank, False), False)] * bool(rank)
    hidden, kernels, transposed = zip(*terms, strict=True)
    return head_of(jax.tree.map(jnp.asarray, (hidden, kernels)), transposed)


def arguments(case: Case) -> tuple[Head, Head | None, Head | None, Tokens]:
    """Operands, drawn by numpy: the same for all cases but for their form."""
    rng, groups = np.random.default_rng(0), case.groups
    student = head(rng, groups, WIDTH, case.student_tied, case.std, 3 if case.adapted else 0)
    teacher = head(rng, groups, TEACHER_WIDTH, case.teacher_tied, case.std)
    base = head(rng, groups, WIDTH, case.student_tied, case.std)
    lead = (groups, ALL_TOKENS // groups)
    banned = rng.integers(-1, KNOWN, (*lead, BANNED))
    cached = None
    if case.cached:
        logits = np.asarray(dense.logits(teacher)).reshape(*lead, VOCAB)
        cached = dense.top_k(logits, TOP_K, case.objective.temperature, KNOWN)
        cached.ids[:, ::4, 3:] = -1
        left = np.exp(cached.log_probs[:, ::4, :3].astype(np.float64)).sum(-1)
        cached.log_tail[:, ::4] = np.log1p(-left)
    arrays: Any = (rng.integers(0, KNOWN, lead).astype(np.int32), np.ones(lead, np.float32), banned.astype(np.int32))
    arrays, cached = jax.tree.map(jnp.asarray, (arrays, cached))
    live = case.objective.needs_teacher and not case.cached
    anchor = case.objective.logit_filter == "anchor"
    return student, teacher if live else None, base if anchor else None, Tokens(*arrays, cached=cached)


def masks(groups: int) -> list[np.ndarray]:
    """All tokens; some, of unlike weight; only the first and only the last ones, so that whole groups have none."""
    rng = np.random.default_rng(1)
    some = rng.integers(0, 2, ALL_TOKENS) * rng.random(ALL_TOKENS)
    order = np.arange(ALL_TOKENS)
    found = (np.ones(ALL_TOKENS), some, order < 7, order >= ALL_TOKENS - 7)
    return [mask.astype(np.float32).reshape(groups, -1) for mask in found]


def loss_of(case: Case, student: Head, teacher: Head | None, base: Head | None) -> Callable[..., jax.Array]:
    """The fused loss as a function of arrays alone: (trained, fixed, tokens)."""
    forms = [one and one.transposed for one in (student, teacher, base)]

    def loss(trained: Any, fixed: Any, tokens: Tokens) -> jax.Array:
        heads = [one and head_of(one, form) for one, form in zip((trained, *fixed), forms, strict=True)]
        assert heads[0] is not None
        chunk = ALL_TOKENS // case.groups // case.chunks
        return fused.divergence(
            case.objective, heads[0], heads[1], heads[2], tokens, known=KNOWN, chunk=chunk, place=case.place
        )  # fmt: skip

    return loss


def program(case: Case) -> tuple[Any, Any]:
    """(compiled: (trained, fixed, tokens, cotangent) -> loss, gradients; its first two arguments)."""
    student, teacher, base, tokens = arguments(case)
    loss = loss_of(case, student, teacher, base)

    def value_and_pull(trained: Any, fixed: Any, tokens: Tokens, cotangent: jax.Array) -> Any:
        value, pull = jax.vjp(lambda arrays: loss(arrays, fixed, tokens), trained)
        return value, pull(cotangent)[0]

    operands = (student[:2], tuple(one and one[:2] for one in (teacher, base)))
    lowered = jax.jit(value_and_pull).lower(*operands, tokens, np.float32(1))
    return lowered.compile(sharded.COMPILER), operands


def assert_exact(case: Case) -> None:
    """Loss to 1e-6, gradients of hidden states and of kernels each to 1e-5, under every mask and cotangents besides 1."""
    student, teacher, base, tokens = arguments(case)
    compiled, operands = program(case)
    exact = dense.exact(case.objective, student, teacher, base, tokens, known=KNOWN)
    for mask, cotangent in zip(masks(case.groups), (1.0, -2.5, 7.0, 0.5), strict=True):
        value, (hidden, kernels) = compiled(*operands, tokens._replace(weights=mask), np.float32(cotangent))
        expected = dense.weighted(exact, student, mask)
        assert float(value) == pytest.approx(expected.loss, rel=1e-6)
        for found, true in ((hidden, expected.hidden), (kernels, expected.kernels)):
            assert dense.relative(found, jax.tree.map(lambda x, c=cotangent: c * x, true)) <= 1e-5


# --- The product of everything ----------------------------------------------------------------------------------------

FACTORS: dict[str, Sequence[Any]] = {
    "loss": DIVERGENCES,
    "mesh": ("one", "fsdp", "tensor", "data", "fsdp x tensor"),
    "chunks": (1, 2, 6),
    "temperature": (1.0, 2.5),
    "student_tied": (False, True),
    "teacher_tied": (False, True),
}


def pairs(row: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


@functools.cache
def covering() -> list[tuple[Any, ...]]:
    """Few combinations, chosen one after the other, in which every value of a factor meets every value of every other."""
    everything = list(itertools.product(*FACTORS.values()))
    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def case_of(row: Sequence[Any]) -> Case:
    values = dict(zip(FACTORS, row, strict=True))
    objective = Objective(values.pop("loss"), temperature=values.pop("temperature"), **UNEVEN)
    return Case(objective, **values)


@pytest.mark.parametrize("row", covering(), ids=lambda row: "-".join(map(str, row)))
def test_every_pair_of_loss_mesh_chunks_temperature_and_tying_is_exact(row):
    assert_exact(case_of(row))


@pytest.mark.soak  # 600 programs
@pytest.mark.parametrize("mesh", FACTORS["mesh"])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_every_combination_is_exact(loss, mesh):
    for row in itertools.product((loss,), (mesh,), *list(FACTORS.values())[2:]):
        assert_exact(case_of(row))


OTHERS = {
    "labels": Case(Objective("hard_label"), chunks=3),
    "labels, sharded, tied": Case(Objective("hard_label"), "fsdp x tensor", student_tied=True, chunks=2),
    "a share of labels": Case(
        Objective("jensen_shannon", temperature=2.0, hard_label_weight=0.25, **UNEVEN), "all, a whole student", chunks=2
    ),
    "drop": Case(Objective("reverse_kl", "drop", 2.0), student_tied=True, chunks=2),
    "drop, sharded": Case(Objective("forward_kl", "drop", 2.0), "tensor", student_tied=True, teacher_tied=True),
    "anchor": Case(Objective("forward_kl", "anchor", 2.0), chunks=2),
    "anchor, sharded": Case(Objective("skew_reverse_kl", "anchor", 1.5, **UNEVEN), "all, a gathered teacher", chunks=2),
    "both gathered": Case(Objective(), "all, both gathered", student_tied=True, chunks=3),
    "top-k": Case(Objective("forward_kl", temperature=2.0), cached=True, chunks=2),
    "top-k, tied, sharded": Case(
        Objective("reverse_kl", temperature=2.0), "fsdp x tensor", student_tied=True, cached=True, chunks=2
    ),
    "top-k with labels, over the whole tensor axis": Case(
        Objective("jensen_shannon", hard_label_weight=0.5, **UNEVEN), "tensor", cached=True, chunks=2
    ),
    "an adapter": Case(Objective(), chunks=2, adapted=True),
    "an adapter on a tied head, sharded": Case(
        Objective("reverse_kl"), "fsdp x tensor", student_tied=True, adapted=True, chunks=2
    ),
    "logits of deviation 30": Case(Objective(), chunks=2, std=30.0),
    "logits of deviation 30, sharded": Case(Objective("jensen_shannon", **UNEVEN), "tensor", chunks=2, std=30.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_labels_filters_caches_adapters_and_large_logits_are_exact(name):
    assert_exact(OTHERS[name])


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["one", "tensor"])
@pytest.mark.parametrize("std", [2.0, 30.0])
def test_bfloat16_operands_give_gradients_within_a_percent_of_float64(std, mesh):
    """The operands are rounded, for both sides the same; products are added up in float32."""
    for loss in ("forward_kl", "jensen_shannon"):
        case = Case(Objective(loss, **UNEVEN), mesh, chunks=2, std=std)
        student, teacher, base, tokens = arguments(case)
        assert teacher is not None
        half = [head_of(jax.tree.map(lambda x: x.astype(jnp.bfloat16), one[:2]), one[2]) for one in (student, teacher)]
        loss_fn = loss_of(case, student, teacher, base)
        (value, (hidden, kernels)) = (
            jax.jit(jax.value_and_grad(loss_fn))
            .lower(half[0][:2], (half[1][:2], None), tokens)
            .compile(sharded.COMPILER)(half[0][:2], (half[1][:2], None), tokens)
        )
        assert value.dtype == jnp.float32
        assert {leaf.dtype for leaf in (*hidden, *kernels)} == {jnp.dtype(jnp.bfloat16)}
        exact = dense.exact(case.objective, half[0], half[1], None, tokens, known=KNOWN)
        expected = dense.weighted(exact, half[0], tokens.weights)
        assert float(value) == pytest.approx(expected.loss, rel=1e-5)
        assert dense.relative(hidden, expected.hidden) <= 0.01
        assert dense.relative(kernels, expected.kernels) <= 0.01


def test_a_divergence_of_2e_4_between_heads_in_bfloat16_is_not_rounded_away():
    case = Case(Objective(), chunks=2)
    student, _, _, tokens = arguments(case)
    rng = np.random.default_rng(4)
    close = tuple(x + 0.01 * rng.normal(size=x.shape) for x in student.kernels)
    half = [
        head_of(jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student.hidden, kernels)), student.transposed)
        for kernels in (student.kernels, close)
    ]
    exact = dense.exact(case.objective, half[0], half[1], None, tokens, known=KNOWN)
    assert 1e-4 < exact.values.mean() < 2e-3
    value = fused.divergence(case.objective, half[0], half[1], None, tokens, known=KNOWN, chunk=ALL_TOKENS // 2)
    assert float(value) == pytest.approx(exact.values.sum(), rel=1e-2)


def test_kernels_kept_in_float32_get_float32_gradients_of_bfloat16_products():
    case = Case(Objective(), chunks=4)
    student, teacher, base, tokens = arguments(case)
    assert teacher is not None
    mixed = (tuple(x.astype(jnp.bfloat16) for x in student.hidden), student.kernels)
    gradient = jax.eval_shape(jax.grad(loss_of(case, student, teacher, base)), mixed, (teacher[:2], None), tokens)
    assert gradient[0][0].dtype == jnp.bfloat16 and gradient[1][0].dtype == jnp.float32


def test_a_padded_vocabulary_of_152064_ids_of_which_151665_are_known():
    """A student of 152064 rows beside a teacher of 151936, cut to one length; what no tokenizer knows has no probability."""
    rows, cut, known, width, count = 152_064, 151_936, 151_665, 4, 4
    rng = np.random.default_rng(0)
    # The rows of no token are loud, as unused rows of published heads are.
    kernels = [rng.normal(size=(size, width)).astype(np.float32) for size in (rows, cut)]
    for kernel in kernels:
        kernel[known:] *= 30
    states = [rng.normal(size=(1, count, width)).astype(np.float32) for _ in range(2)]
    targets = np.asarray([[0, known - 1, 7, 1000]], np.int32)
    tokens = Tokens(jnp.asarray(targets), jnp.ones((1, count)), jnp.zeros((1, count, 0), jnp.int32))
    padded = np.pad(kernels[1], ((0, rows - cut), (0, 0)))
    student, teacher = (
        Head((jnp.asarray(h),), (jnp.asarray(k),), (True,)) for h, k in zip(states, (kernels[0], padded), strict=True)
    )

    def loss(trained: Any) -> jax.Array:
        objective = Objective("forward_kl", hard_label_weight=0.5)
        return fused.divergence(
            objective, head_of(trained, (True,)), teacher, None, tokens, known=known, chunk=2
        )  # fmt: skip

    value, (hidden, gradient) = jax.jit(jax.value_and_grad(loss))(student[:2])
    s, t = (h[0].astype(np.float64) @ k[:known].T.astype(np.float64) for h, k in zip(states, kernels, strict=True))
    log_q, log_p = (log_softmax(x, -1) for x in (s, t))
    label = -log_q[np.arange(count), targets[0]]
    assert float(value) == pytest.approx(0.5 * np.sum(np.exp(log_p) * (log_p - log_q)) + 0.5 * label.sum(), rel=1e-6)
    slope = np.exp(log_q) - 0.5 * np.exp(log_p)
    slope[np.arange(count), targets[0]] -= 0.5
    assert dense.relative(hidden[0][0], slope @ kernels[0][:known]) <= 1e-5
    assert dense.relative(gradient[0][:known], slope.T @ states[0][0]) <= 1e-5
    assert not np.any(gradient[0][known:])


# --- What is worked out, and what is not ------------------------------------------------------------------------------


def products(jaxpr: Any) -> int:
    """Matrix products in a program, inside loops and calls too."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns"):
                    count += products(inner)
                elif hasattr(inner, "jaxpr"):
                    count += products(inner.jaxpr)
    return count


def test_what_nobody_trains_costs_no_product_and_gets_no_gradient():
    """Logits of student and teacher take a product each, every gradient that is wanted one more."""
    case = Case(Objective(), chunks=2, adapted=True)
    student, teacher, base, tokens = arguments(case)
    assert teacher is not None
    loss = loss_of(case, student, teacher, base)
    fixed = (teacher[:2], None)

    def count(function: Callable[..., Any], *operands: Any) -> int:
        return products(jax.make_jaxpr(function)(*operands).jaxpr)

    # The student has two terms here, so it makes its logits by two products.
    (states, kernels) = student[:2]
    assert count(lambda trained: loss(trained, fixed, tokens), student[:2]) == 3
    assert count(jax.grad(lambda trained: loss(trained, fixed, tokens)), student[:2]) == 3 + 4
    # An adapter's B alone; then B and the states that its A has made.
    only_b = jax.grad(lambda b: loss((states, (kernels[0], b)), fixed, tokens))
    assert count(only_b, kernels[1]) == 3 + 1
    adapter = jax.grad(lambda own: loss(((states[0], own[0]), (kernels[0], own[1])), fixed, tokens))
    assert count(adapter, (states[1], kernels[1])) == 3 + 2
    # The same numbers as among all gradients.
    everything = jax.jit(jax.grad(lambda trained: loss(trained, fixed, tokens)))(student[:2])
    np.testing.assert_allclose(jax.jit(only_b)(kernels[1]), everything[1][1], rtol=1e-6)
    # Nothing is learned by the teacher.
    of_teacher = jax.grad(lambda fixed: loss(student[:2], fixed, tokens), allow_int=True)
    assert count(of_teacher, fixed) <= 3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(of_teacher)(fixed)))


def test_the_gradient_reaches_the_matrix_that_made_an_adapters_hidden_states():
    """scale * h A is made outside, and A is trained through the gradient of those hidden states."""
    case = Case(Objective(), chunks=2, adapted=True)
    student, teacher, base, tokens = arguments(case)
    assert teacher is not None
    loss = loss_of(case, student, teacher, base)
    rng = np.random.default_rng(3)
    h, (kernel, b) = student.hidden[0], student.kernels
    a = rng.normal(size=(WIDTH, b.shape[0])).astype(np.float32) / 5

    def through(h: Any, a: Any, b: Any) -> jax.Array:
        return loss(((h, 2.0 * h @ a), (kernel, b)), (teacher[:2], None), tokens)

    def merged(h: Any, a: Any, b: Any) -> jax.Array:
        whole = Head((h,), (kernel + 2.0 * a @ b,), (False,))
        return dense.loss(case.objective, whole, teacher, None, tokens, known=KNOWN)

    found, expected = (jax.jit(jax.value_and_grad(one, (0, 1, 2)))(h, a, b) for one in (through, merged))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for mine, true in zip(found[1], expected[1], strict=True):
        assert dense.relative(mine, true) <= 1e-5


def test_a_loss_that_enters_a_larger_one_is_differentiated_through_it_and_next_to_nothing_is_exact_zero():
    """The cotangent of the loss depends on the loss itself; where it enters nothing, its gradient is zero."""
    case = Case(Objective(), chunks=2)
    student, teacher, base, tokens = arguments(case)
    assert teacher is not None
    loss = loss_of(case, student, teacher, base)
    fixed = (teacher[:2], None)
    value, plain = jax.jit(jax.value_and_grad(loss))(student[:2], fixed, tokens)
    squared = jax.jit(jax.grad(lambda trained: jnp.square(loss(trained, fixed, tokens)) / 3))(student[:2])
    assert dense.relative(squared, jax.tree.map(lambda x: x * 2 * value / 3, plain)) <= 1e-6
    unused = jax.grad(lambda trained: 0.0 * trained[1][0].sum() + (loss(trained, fixed, tokens), 0.0)[1])(student[:2])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(unused))


# --- Memory and traffic -----------------------------------------------------------------------------------------------


def elements(program: jax.stages.Compiled) -> int:
    """Of the largest array of a program."""
    text = program.as_text()
    assert text
    return max(math.prod(shape) for _, shape in sharded.shapes(text))


@pytest.mark.parametrize(("mesh", "tied"), [("one", False), ("one", True), ("tensor", False)])
def test_no_array_of_all_tokens_by_the_vocabulary_exists_and_the_dense_loss_has_one(mesh, tied):
    """The largest is a chunk's logits or a head; that the dense loss is found out shows that the search finds arrays."""
    case = Case(Objective("jensen_shannon"), mesh, student_tied=tied, teacher_tied=tied, chunks=6)
    parts = case.place.parts if case.place else 1
    compiled, _ = program(case)
    limit = ALL_TOKENS * VOCAB // parts
    expected = max(ALL_TOKENS // 6 * VOCAB // parts, WIDTH * VOCAB // parts, ALL_TOKENS * WIDTH)
    assert elements(compiled) == expected < limit or parts > 1
    if parts == 1:
        student, teacher, _, tokens = arguments(case)
        whole = jax.jit(
            jax.value_and_grad(
                lambda trained: dense.loss(
                    case.objective, head_of(trained, student.transposed), teacher, None, tokens, known=KNOWN
                )
            )
        )
        assert elements(whole.lower(student[:2]).compile(sharded.COMPILER)) >= limit


# Sums and maxima over the vocabulary: normalisers of both, what the objective sums, and where the student is surest.
SCALARS: dict[Any, int] = {
    "forward_kl": 5, "reverse_kl": 6, "jensen_shannon": 7, "skew_forward_kl": 7, "skew_reverse_kl": 7, "hard_label": 3,
}  # fmt: skip


@pytest.mark.parametrize("loss", SCALARS)
def test_a_split_vocabulary_sends_scalars_per_token_and_the_hidden_gradient_once(loss):
    """At most 32 bytes a token, besides one sum of the hidden gradient."""
    case = Case(Objective(loss, temperature=2.0), "tensor two", chunks=4)
    compiled, _ = program(case)
    chunk = ALL_TOKENS // 4
    found = sharded.collectives(compiled.as_text())
    assert {op.kind for op in found} == {"all-reduce"}
    shapes = [shape for op in found for shape in op.shapes]
    hidden = (1, ALL_TOKENS, WIDTH)
    assert shapes.count(hidden) == 1  # outside the loop
    scalars = [math.prod(shape) for shape in shapes if shape != hidden]
    assert set(scalars) == {chunk}
    assert len(scalars) <= SCALARS[loss] <= 8


# --- Chunks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(1, 100_000),
    vocab=st.integers(1, 300_000),
    wanted=st.integers(0, 5000),
    limit=st.none() | st.integers(1 << 28, 1 << 38),
)
def test_chunks_are_no_larger_than_wanted_no_more_than_needed_and_nearly_even(tokens, vocab, wanted, limit):
    chunk = fused.chunk_tokens(tokens, vocab, wanted, limit)
    assert 1 <= chunk <= tokens
    count = math.ceil(tokens / chunk)
    if wanted:
        assert chunk <= wanted
        assert count == math.ceil(tokens / wanted)
        assert count * chunk - tokens < count  # padding: at most one token short of a chunk each
        return
    # By memory: all arrays [chunk, vocab] fit their share, unless that is less than the smallest chunk worth its while.
    if chunk > fused.MIN_CHUNK:
        if limit is None:
            assert 4 * chunk * vocab <= fused.CPU_CHUNK_BYTES
        else:
            assert fused.CHUNK_ARRAYS * 4 * chunk * vocab <= limit * fused.MEMORY_SHARE
    if chunk < tokens:
        assert chunk % fused.CHUNK_STEP == 0
        assert count * chunk - tokens < fused.CHUNK_STEP * count
    # Twice the memory makes no smaller chunks, but for what evens them out.
    if limit is not None:
        assert math.ceil(tokens / fused.chunk_tokens(tokens, vocab, 0, 2 * limit)) <= count


def test_chunks_of_a_published_vocabulary_on_a_cpu_and_on_an_accelerator():
    assert fused.chunk_tokens(512, 32_000) == 512  # 64 MB of logits
    assert fused.chunk_tokens(512, 152_064) == 96  # 110 would fit; sixteens do
    assert fused.chunk_tokens(8192, 128_256, limit=80 << 30) == 432


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_heads_and_tokens_that_do_not_fit_are_refused_with_what_does_not():
    def call(case: Case, message: str, **changed: Any) -> None:
        student, teacher, base, tokens = arguments(case)
        operands = {
            "student": student, "teacher": teacher, "base": base, "tokens": tokens, "known": KNOWN, "chunk": ALL_TOKENS,
            "place": case.place,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fused.divergence(case.objective, **{**operands, **changed})

    live, labels, anchor = (
        Case(one) for one in (Objective(), Objective("hard_label"), Objective("forward_kl", "anchor"))
    )
    student, teacher, _, tokens = arguments(live)
    assert teacher is not None
    call(live, "objective forward_kl and a teacher's head missing", teacher=None)
    call(labels, "objective hard_label and a teacher's head given", teacher=teacher)
    call(dataclasses.replace(live, cached=True), "forward_kl and a teacher's head given", teacher=teacher)
    call(anchor, "logit_filter=anchor and a base missing", base=None)
    call(live, "logit_filter=none and a base given", base=student)
    drop = Case(Objective("forward_kl", "drop"), cached=True)
    call(drop, "logit_filter=drop with a teacher cache.*distil from the live teacher")
    short = teacher._replace(kernels=(teacher.kernels[0][:, :-3],))
    call(live, rf"heads of \[{VOCAB}, {VOCAB - 3}\] ids; cut or pad them", teacher=short)
    call(live, f"chunk=5 does not divide the {ALL_TOKENS} loss tokens", chunk=5)
    call(live, "chunk=0 does not divide", chunk=0)
    mesh = dataclasses.replace(live, mesh="tensor")
    odd = [one._replace(kernels=(one.kernels[0][:, :-1],)) for one in (student, teacher)]
    call(mesh, f"{VOCAB - 1} ids over 8 devices, 1 groups of tokens over 1", student=odd[0], teacher=odd[1])
    call(live, f"{VOCAB} ids over 1 devices, 1 groups of tokens over 8", place=place_of("data"))
