"""The objectives on logits against their definitions in float64, the definitions against scipy and torch, and the edges.

Logits are handed to the fused loss as hidden states, with an identity for a head: its gradient by the hidden states is
then the gradient by the logits, exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from subl_jax.distill import fused
from subl_jax.distill.divergences import EXCLUDED
from subl_jax.distill.fused import Head, Tokens, TopK
from subl_jax.distill.objective import Objective
from tests.distill import dense

TOKENS, VOCAB = 7, 23
DIVERGENCES: tuple[Any, ...] = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
# Besides signs and sizes of all kinds, a token that does not count.
WEIGHTS = np.asarray([1.0, 0.25, 0.0, 3.0, -1.5, 1.0, 0.5], np.float32)
TARGETS = np.random.default_rng(2).integers(0, VOCAB, TOKENS).astype(np.int32)
# Weights of the mixtures that are none of the special ones.
UNEVEN: dict[str, Any] = {"teacher_weight": 0.3, "skew": 0.15}


def draw(std: float, seed: int = 0, shape: tuple[int, ...] = (TOKENS, VOCAB)) -> list[np.ndarray]:
    """Float32 logits of student, teacher and base."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) * std).astype(np.float32) for _ in range(3)]


def draw_banned(size: int, seed: int = 1) -> np.ndarray:
    """So many ids per token, padded with -1."""
    rng = np.random.default_rng(seed)
    ids = np.full((TOKENS, VOCAB + 2), -1, np.int32)
    for row in ids:
        row[:size] = rng.choice(VOCAB, size, replace=False)
    return rng.permuted(ids, axis=1)


def mask_of(banned: np.ndarray) -> np.ndarray:
    return np.asarray([[v in set(row.tolist()) for v in range(VOCAB)] for row in banned])


def told(weights: Any = WEIGHTS, banned: Any = None, cached: TopK | None = None, targets: Any = TARGETS) -> Tokens:
    count = len(targets)
    arrays: Any = (targets, weights, np.zeros((count, 0), np.int32) if banned is None else banned)
    return Tokens(*arrays, cached=cached)


def ours(
    objective: Objective, student: Any, teacher: Any = None, base: Any = None, *, tokens: Tokens,
    cotangent: float = 1.0,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """(the weighted sum, its gradient by the student's logits times the cotangent).

    Args:
      objective, student, teacher, base, tokens: as in `dense.exact_on_logits`.
      cotangent: of the sum.
    """
    size = student.shape[-1]

    def head(logits: Any) -> Head | None:
        if logits is None:
            return None
        return Head((jnp.asarray(logits)[None],), (jnp.eye(size, dtype=jnp.asarray(logits).dtype),), (False,))

    grouped = jax.tree.map(lambda x: jnp.asarray(x)[None], tokens)

    def loss(states: jax.Array) -> jax.Array:
        mine = head(student)
        assert mine is not None
        return fused.divergence(
            objective, mine._replace(hidden=(states,)), head(teacher), head(base), grouped,
            known=size, chunk=len(tokens.targets),
        )  # fmt: skip

    value, pull = jax.vjp(loss, jnp.asarray(student)[None])
    (gradient,) = pull(jnp.float32(cotangent))
    return float(value), np.asarray(gradient[0])


def assert_exact(objective: Objective, *logits: Any, tokens: Tokens) -> None:
    """Value and gradient, by a negative cotangent that is not one, are those of the definition."""
    expected = dense.exact_on_logits(objective, *logits, tokens=tokens)
    weights = np.asarray(tokens.weights, np.float64)
    value, gradient = ours(objective, *logits, tokens=tokens, cotangent=-2.5)
    # Weights of both signs cancel in the sum, but no rounding error does.
    assert abs(value - expected.values @ weights) <= 1e-6 * (np.abs(expected.values) @ np.abs(weights))
    assert dense.relative(gradient, -2.5 * expected.slopes * weights[:, None]) <= 1e-5


# --- Against the definitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1.0, 30.0])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_every_divergence_is_its_definition_in_value_and_gradient(loss, std):
    student, teacher, _ = draw(std)
    for temperature in (0.5, 1.0, 3.0):
        assert_exact(Objective(loss, temperature=temperature, **UNEVEN), student, teacher, tokens=told())


@pytest.mark.parametrize("std", [1.0, 30.0])
def test_hard_labels_are_cross_entropy_which_no_temperature_softens(std):
    student, *_ = draw(std)
    tokens = told()
    assert_exact(Objective("hard_label", temperature=4.0), student, tokens=tokens)
    value, gradient = ours(Objective("hard_label", temperature=4.0), student, tokens=tokens)
    z = student.astype(np.float64)
    assert value == pytest.approx(-(WEIGHTS @ log_softmax(z, -1)[np.arange(TOKENS), TARGETS]), rel=1e-5)
    assert dense.relative(gradient, WEIGHTS[:, None] * (softmax(z, -1) - np.eye(VOCAB)[TARGETS])) <= 1e-5


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_share_of_hard_labels_is_mixed_in(loss):
    student, teacher, _ = draw(2.0)
    mixed = Objective(loss, temperature=2.0, hard_label_weight=0.25, **UNEVEN)
    assert_exact(mixed, student, teacher, tokens=told())
    parts = [
        ours(one, student, against, tokens=told())
        for one, against in (
            (dataclasses.replace(mixed, hard_label_weight=0.0), teacher),
            (Objective("hard_label"), None),
        )
    ]
    value, gradient = ours(mixed, student, teacher, tokens=told())
    assert value == pytest.approx(0.75 * parts[0][0] + 0.25 * parts[1][0], rel=1e-5)
    assert dense.relative(gradient, 0.75 * parts[0][1] + 0.25 * parts[1][1]) <= 1e-5


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("logit_filter", ["drop", "anchor"])
def test_the_logit_filters_are_their_definitions(logit_filter, loss):
    for count in (0, 1, 15):
        for std, temperature in ((1.0, 3.0), (30.0, 1.0), (2.0, 0.5)):
            student, teacher, base = draw(std)
            objective = Objective(loss, logit_filter, temperature, **UNEVEN)
            against = (teacher, base) if logit_filter == "anchor" else (teacher,)
            assert_exact(objective, student, *against, tokens=told(banned=draw_banned(count)))


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_against_a_cache_a_divergence_is_that_of_k_plus_one_outcomes(loss):
    student, teacher, _ = draw(2.0)
    for temperature, share in ((1.0, 0.0), (2.0, 0.0), (2.0, 0.25)):
        cached = dense.top_k(teacher, 5, temperature)
        cached.ids[3, 2:] = -1  # a token of whose teacher less is known
        cached.log_tail[3] = np.log1p(-np.exp(cached.log_probs[3, :2].astype(np.float64)).sum())
        objective = Objective(loss, temperature=temperature, hard_label_weight=share, **UNEVEN)
        assert_exact(objective, student, tokens=told(cached=cached))


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_cache_of_the_whole_vocabulary_is_the_teacher_and_its_tail_of_no_mass_is_harmless(loss):
    student, teacher, _ = draw(2.0)
    objective = Objective(loss, temperature=1.5, **UNEVEN)
    cached = dense.top_k(teacher, VOCAB, 1.5)._replace(log_tail=np.full(TOKENS, -np.inf, np.float32))
    live = ours(objective, student, teacher, tokens=told())
    kept = ours(objective, student, tokens=told(cached=cached))
    assert kept[0] == pytest.approx(live[0], rel=1e-5)
    assert dense.relative(kept[1], live[1]) <= 1e-5


@pytest.mark.parametrize("loss", ["forward_kl", "jensen_shannon", "skew_forward_kl"])
def test_a_tail_of_no_mass_before_a_student_who_gives_it_some_makes_no_nan(loss):
    student, teacher, _ = draw(2.0)
    teacher = teacher.copy()
    teacher[:, 5:] = -1e4
    cached = dense.top_k(teacher, 5)._replace(log_tail=np.full(TOKENS, -np.inf, np.float32))
    assert_exact(Objective(loss, **UNEVEN), student, tokens=told(cached=cached))


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_a_cache_never_overstates_the_divergence_and_more_of_it_understates_less(loss):
    """The data-processing inequality: lumping outcomes together loses divergence."""
    student, teacher, _ = draw(1.5, seed=8)
    ones = np.ones(TOKENS, np.float32)
    whole = dense.top_k(teacher, VOCAB)

    def cut(k: int) -> TopK:
        ids = np.where(np.arange(VOCAB) < k, whole.ids, -1)
        tail = np.log(-np.expm1(np.log(np.exp(whole.log_probs[:, :k].astype(np.float64)).sum(-1))))
        return TopK(ids, whole.log_probs, tail.astype(np.float32))  # type: ignore[arg-type]

    found = [ours(Objective(loss), student, tokens=told(ones, cached=cut(k)))[0] for k in (1, 4, 12, VOCAB - 1)]
    full = ours(Objective(loss), student, teacher, tokens=told(ones))[0]
    assert 0 < found[0] < found[1] < found[2] < found[3] == pytest.approx(full, rel=1e-5)


# --- The definitions are not taken on trust ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_the_definitions_are_scipys_and_their_derivatives_are_slopes(loss):
    student, teacher, base = (x.astype(np.float64) for x in draw(2.0, seed=4))
    banned = draw_banned(6)
    mask = mask_of(banned)

    def one(objective: Objective, p: np.ndarray, q: np.ndarray) -> float:
        w, a = objective.teacher_weight, objective.skew
        if objective.loss == "jensen_shannon":
            m = w * p + (1 - w) * q
            found = w * rel_entr(p, m).sum() + (1 - w) * rel_entr(q, m).sum()
            assert w != 0.5 or found == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-9)  # the even one is scipy's
            return found
        first, second = {
            "forward_kl": (p, q),
            "reverse_kl": (q, p),
            "skew_forward_kl": (p, a * p + (1 - a) * q),
            "skew_reverse_kl": (q, (1 - a) * p + a * q),
        }[objective.loss]
        return rel_entr(first, second).sum()

    def by_scipy(student: np.ndarray, objective: Objective) -> np.ndarray:
        """Rows are cut to the kept entries before anything is computed."""
        rows = []
        for s, t, b, out in zip(student, teacher, base, mask, strict=True):
            keep = ~out if objective.logit_filter == "drop" else np.ones(VOCAB, bool)
            p, q = softmax(t[keep] / objective.temperature), softmax(s[keep] / objective.temperature)
            if objective.logit_filter == "anchor":
                pinned = np.where(out, softmax(b), 0)
                pinned[~out] = softmax(t[~out]) * (1 - pinned.sum())
                p = softmax(np.log(pinned) / objective.temperature)
            rows.append(objective.temperature**2 * one(objective, p, q))
        return np.array(rows)

    for objective in (
        Objective(loss), Objective(loss, "drop", 2.0, **UNEVEN), Objective(loss, "anchor", 2.0, **UNEVEN),
    ):  # fmt: skip
        found = dense.exact_on_logits(objective, student, teacher, base, tokens=told(banned=banned))
        np.testing.assert_allclose(found.values, by_scipy(student, objective), rtol=1e-12)
        step, slopes = 1e-5, np.zeros_like(student)
        for column in range(VOCAB):
            up, down = student.copy(), student.copy()
            up[:, column] += step
            down[:, column] -= step
            slopes[:, column] = (by_scipy(up, objective) - by_scipy(down, objective)) / (2 * step)
        np.testing.assert_allclose(found.slopes, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "hard_label"])
def test_torch_agrees_in_value_and_gradient(loss):
    torch: Any = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")
    functional = torch.nn.functional
    student, teacher, _ = draw(3.0, seed=5)
    heat = 2.0
    z = torch.tensor(student, requires_grad=True)
    q, p = functional.log_softmax(z / heat, -1), functional.log_softmax(torch.tensor(teacher) / heat, -1)
    if loss == "hard_label":
        expected = functional.cross_entropy(z, torch.tensor(TARGETS.astype(np.int64)), reduction="sum")
    else:  # kl_div takes what is approximated second: KL(second || first)
        pair = (q, p) if loss == "forward_kl" else (p, q)
        expected = heat**2 * functional.kl_div(*pair, reduction="sum", log_target=True)
    expected.backward()
    against = () if loss == "hard_label" else (teacher,)
    value, gradient = ours(
        Objective(loss, temperature=heat), student, *against, tokens=told(np.ones(TOKENS, np.float32))
    )
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert dense.relative(gradient, z.grad.numpy()) <= 1e-5


# --- Limits and directions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "other", "scale"),
    [
        ({"loss": "jensen_shannon", "teacher_weight": 1e-4}, {"loss": "forward_kl"}, 1e-4),
        ({"loss": "jensen_shannon", "teacher_weight": 1 - 1e-4}, {"loss": "reverse_kl"}, 1e-4),
        ({"loss": "skew_forward_kl", "skew": 0.0}, {"loss": "forward_kl"}, 1.0),
        ({"loss": "skew_reverse_kl", "skew": 0.0}, {"loss": "reverse_kl"}, 1.0),
        ({"loss": "skew_forward_kl", "skew": 1e-5}, {"loss": "forward_kl"}, 1.0),
        ({"loss": "skew_reverse_kl", "skew": 1e-5}, {"loss": "reverse_kl"}, 1.0),
    ],
)
def test_mixtures_become_the_plain_divergences_at_their_ends(limit, other, scale):
    """Which end is which has been swapped before."""
    student, teacher, _ = draw(1.0, seed=3)
    ones = told(np.ones(TOKENS, np.float32))
    near, far = (
        ours(Objective(**limit), student, teacher, tokens=ones),
        ours(Objective(**other), student, teacher, tokens=ones),
    )
    exact = limit.get("skew") == 0.0
    assert near[0] / scale == pytest.approx(far[0], rel=1e-6 if exact else 5e-3)
    assert dense.relative(near[1] / scale, far[1]) <= (1e-6 if exact else 5e-3)
    wrong: Any = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}[other["loss"]]
    assert ours(Objective(wrong), student, teacher, tokens=ones)[0] != pytest.approx(far[0], rel=0.05)


def test_forward_kl_is_not_the_reverse():
    """Mass-covering: where the teacher has mass and the student none it is large, the other way round it is small."""
    wide, narrow = np.zeros((1, 4), np.float32), np.asarray([[0.0, -20.0, -20.0, -20.0]], np.float32)
    one = told(np.ones(1, np.float32), targets=np.zeros(1, np.int32))
    forward, reverse = (ours(Objective(loss), narrow, wide, tokens=one)[0] for loss in ("forward_kl", "reverse_kl"))
    assert forward > 10 > 2 > reverse > 0
    assert ours(Objective("forward_kl"), wide, narrow, tokens=one)[0] < 2


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(loss):
    _, teacher, base = draw(30.0, seed=7)
    for logit_filter in ("none", "drop"):
        objective = Objective(loss, logit_filter, 2.0)
        value, gradient = ours(objective, teacher, teacher, tokens=told(banned=draw_banned(5)))
        assert abs(value) <= 1e-5 and np.abs(gradient).max() <= 1e-6
    # Where the teacher is the base, the base is a resting point of `anchor`, whatever is banned.
    for count in (0, 5, VOCAB):
        tokens = told(banned=draw_banned(count))
        value, gradient = ours(Objective(loss, "anchor"), base, base, base, tokens=tokens)
        assert abs(value) <= 1e-4 and np.abs(gradient).max() <= 1e-5


# --- What the filters promise -----------------------------------------------------------------------------------------


def implied_target(teacher: np.ndarray, base: np.ndarray, banned: np.ndarray) -> np.ndarray:
    """The target that `anchor` pulls to, read off its gradient: softmax(student) - d loss / d student."""
    student = np.zeros_like(teacher)
    ones = told(np.ones(TOKENS, np.float32), banned)
    return softmax(student, -1) - ours(Objective("forward_kl", "anchor"), student, teacher, base, tokens=ones)[1]


def test_the_anchored_target_sums_to_one_and_gives_banned_tokens_the_bases_probability():
    _, teacher, base = draw(2.0, seed=6)
    banned = draw_banned(8)
    mask = mask_of(banned)
    target = implied_target(teacher, base, banned)
    np.testing.assert_allclose(target.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(target[mask], softmax(base.astype(np.float64), -1)[mask], atol=1e-6)
    # What the teacher thinks of banned continuations does not reach the student at all.
    louder = np.where(mask, teacher + 50, teacher).astype(np.float32)
    np.testing.assert_allclose(implied_target(louder, base, banned), target, atol=1e-6)
    # All banned: the base itself.
    np.testing.assert_allclose(implied_target(teacher, base, draw_banned(VOCAB)), softmax(base, -1), atol=1e-6)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_dropped_logits_of_the_student_get_exactly_no_gradient(loss):
    student, teacher, _ = draw(2.0)
    banned = draw_banned(9)
    mask = mask_of(banned)
    ones = told(np.ones(TOKENS, np.float32), banned)
    gradient = ours(Objective(loss, "drop"), student, teacher, tokens=ones)[1]
    assert np.all(gradient[mask] == 0.0) and np.all(gradient[~mask] != 0.0)


def test_no_token_that_counts_for_nothing_moves_anything():
    student, teacher, _ = draw(2.0)
    _, gradient = ours(Objective(), student, teacher, tokens=told())
    assert np.all(gradient[WEIGHTS == 0] == 0.0) and np.all(gradient[WEIGHTS != 0] != 0.0)
    wild = student.copy()
    wild[WEIGHTS == 0] = 3e4
    assert ours(Objective(), wild, teacher, tokens=told())[0] == ours(Objective(), student, teacher, tokens=told())[0]


# --- Numbers that have gone wrong elsewhere ---------------------------------------------------------------------------


def test_a_small_divergence_of_bfloat16_logits_is_not_lost():
    """As a cross-entropy less an entropy in bfloat16, a KL of 2e-4 came out as 0."""
    rng = np.random.default_rng(3)
    teacher = jnp.asarray(rng.normal(size=(TOKENS, 512)) * 3, jnp.bfloat16)
    student = jnp.asarray(teacher.astype(jnp.float32) + rng.normal(size=teacher.shape) * 0.02, jnp.bfloat16)
    t, s = (np.asarray(x.astype(jnp.float32), np.float64) for x in (teacher, student))
    exact = rel_entr(softmax(t, -1), softmax(s, -1)).sum(-1)
    assert 1e-4 < exact.mean() < 4e-4
    ones = told(np.ones(TOKENS, np.float32))
    assert ours(Objective(), student, teacher, tokens=ones)[0] == pytest.approx(exact.sum(), rel=1e-3)
    assert ours(Objective("forward_kl", "anchor"), student, teacher, teacher, tokens=ones)[0] == pytest.approx(
        exact.sum(), rel=1e-3
    )
    reverse = rel_entr(softmax(s, -1), softmax(t, -1)).sum()
    assert ours(Objective("reverse_kl"), student, teacher, tokens=ones)[0] == pytest.approx(reverse, rel=1e-3)
    targets = np.argmax(t, -1).astype(np.int32)
    labels = told(np.ones(TOKENS, np.float32), targets=targets)
    assert ours(Objective("hard_label"), student, tokens=labels)[0] == pytest.approx(
        (logsumexp(s, -1) - s[np.arange(TOKENS), targets]).sum(), rel=1e-5
    )


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_logits_of_no_mass_make_no_nan(loss):
    banned = draw_banned(4)
    mask = mask_of(banned)
    student, teacher, base = (np.where(mask, np.float32(EXCLUDED), x) for x in draw(2.0))
    found = [
        ours(Objective(loss), student, teacher, tokens=told()),
        ours(Objective(loss, "drop"), student, teacher, tokens=told(banned=banned)),
        ours(Objective(loss, "anchor"), student, teacher, base, tokens=told(banned=banned)),
    ]
    for value, gradient in found:  # with no mass on banned tokens, all three are one and the same
        assert value == pytest.approx(found[0][0], rel=1e-5) and np.all(np.isfinite(gradient))


def test_a_base_with_all_its_mass_on_banned_tokens_makes_no_nan():
    student, teacher, base = draw(2.0)
    banned = draw_banned(2)
    mask = mask_of(banned)
    base = np.where(mask, base + 300, base).astype(np.float32)  # what is free underflows to exactly 0 in float32
    value, gradient = ours(Objective("forward_kl", "anchor"), student, teacher, base, tokens=told(banned=banned))
    p, log_q = softmax(base.astype(np.float64), -1), log_softmax(student.astype(np.float64), -1)
    expected = np.sum(np.where(mask, p * (log_softmax(base.astype(np.float64), -1) - log_q), 0.0), -1)
    assert value == pytest.approx(expected @ WEIGHTS, rel=1e-5)
    assert np.all(np.isfinite(gradient))
