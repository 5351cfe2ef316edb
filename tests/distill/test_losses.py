"""The objectives against float64 oracles made of scipy's own functions: values, gradients, and the edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from subl_jax.distill import losses

TOKENS, VOCAB = 7, 23


def draw(std: float, seed: int = 0, count: int = 3) -> list[np.ndarray]:
    """Float32 logits, given as float64, so that oracle and implementation start from the same numbers."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(TOKENS, VOCAB)) * std).astype(np.float32).astype(np.float64) for _ in range(count)]


def draw_banned(size: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((TOKENS, VOCAB), bool)
    for row in mask:
        row[rng.choice(VOCAB, size, replace=False)] = True
    return mask


def oracle_drop(student: np.ndarray, teacher: np.ndarray, temperature: float, banned: np.ndarray) -> np.ndarray:
    """Rows are cut to the kept entries before anything is computed."""
    rows = []
    for s, t, b in zip(student, teacher, banned, strict=True):
        rows.append(temperature**2 * rel_entr(softmax(t[~b] / temperature), softmax(s[~b] / temperature)).sum())
    return np.array(rows)


def oracle_target(teacher: np.ndarray, base: np.ndarray, banned: np.ndarray) -> np.ndarray:
    base_p, target = softmax(base, -1), np.zeros_like(teacher)
    for row, b in enumerate(banned):
        target[row, b] = base_p[row, b]
        target[row, ~b] = softmax(teacher[row, ~b]) * base_p[row, ~b].sum()
    return target


def relative(ours: jax.Array, oracle: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - oracle) / np.linalg.norm(oracle))


def pull(function, cotangent: np.ndarray, student: np.ndarray) -> jax.Array:
    """The vector-Jacobian product with respect to the student's logits."""
    _, vjp = jax.vjp(function, jnp.asarray(student, jnp.float32))
    return vjp(jnp.asarray(cotangent, jnp.float32))[0]


COTANGENT = np.random.default_rng(9).normal(size=TOKENS) * 3


@pytest.mark.parametrize("std", [1.0, 30.0])
def test_hard_label_is_cross_entropy_and_its_gradient_is_softmax_minus_one_hot(std):
    (logits,) = draw(std, count=1)
    targets = np.random.default_rng(2).integers(0, VOCAB, TOKENS)
    chosen = log_softmax(logits, -1)[np.arange(TOKENS), targets]
    ours = losses.hard_label(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(ours, -chosen, rtol=1e-5, atol=1e-6)
    gradient = COTANGENT[:, None] * (softmax(logits, -1) - np.eye(VOCAB)[targets])
    assert relative(pull(lambda s: losses.hard_label(s, jnp.asarray(targets)), COTANGENT, logits), gradient) < 1e-5


@pytest.mark.parametrize("banned", [None, 0, 1, 15])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_forward_kl_equals_float64_in_value_and_gradient(std, temperature, banned):
    student, teacher, _ = draw(std)
    mask = draw_banned(banned or 0)
    dropped = None if banned is None else jnp.asarray(mask)

    def ours(s):
        return losses.forward_kl(s, jnp.asarray(teacher, jnp.float32), temperature=temperature, dropped=dropped)

    np.testing.assert_allclose(
        ours(jnp.asarray(student, jnp.float32)), oracle_drop(student, teacher, temperature, mask), rtol=1e-5
    )
    gradient = np.zeros_like(student)  # T² · (1/T) · (q - p) over the kept entries
    for row, b in enumerate(mask):
        q, p = (softmax(x[row, ~b] / temperature) for x in (student, teacher))
        gradient[row, ~b] = COTANGENT[row] * temperature * (q - p)
    assert relative(pull(ours, COTANGENT, student), gradient) < 1e-5


def test_the_analytic_gradients_are_the_slopes_of_the_float64_oracles():
    """Central differences of the scipy oracles: the formulas above are not taken on trust."""
    student, teacher, base = draw(2.0, seed=4)
    banned = draw_banned(6)
    target = oracle_target(teacher, base, banned)

    def slopes(value):
        step, result = 1e-5, np.zeros_like(student)
        for column in range(VOCAB):
            up, down = student.copy(), student.copy()
            up[:, column] += step
            down[:, column] -= step
            result[:, column] = (value(up) - value(down)) / (2 * step)
        return COTANGENT[:, None] * result

    drop = slopes(lambda s: oracle_drop(s, teacher, 2.0, banned))
    ours = pull(
        lambda s: losses.forward_kl(s, jnp.float32(teacher), temperature=2.0, dropped=jnp.asarray(banned)),
        COTANGENT, student,
    )  # fmt: skip
    assert relative(ours, drop) < 1e-5
    anchor = slopes(lambda s: rel_entr(target, softmax(s, -1)).sum(-1))
    ours = pull(
        lambda s: losses.anchored_kl(s, jnp.float32(teacher), jnp.float32(base), jnp.asarray(banned)),
        COTANGENT, student,
    )  # fmt: skip
    assert relative(ours, anchor) < 1e-5


@pytest.mark.parametrize("banned", [0, 1, 15, VOCAB])
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_anchored_kl_equals_float64_in_value_and_gradient(std, banned):
    student, teacher, base = draw(std)
    mask = draw_banned(banned)
    target = oracle_target(teacher, base, mask) if banned < VOCAB else softmax(base, -1)

    def ours(s):
        return losses.anchored_kl(s, jnp.float32(teacher), jnp.float32(base), jnp.asarray(mask))

    # rel_entr of underflowing probabilities would be infinite: the oracle stays in logarithms.
    log_q = log_softmax(student, -1)
    value = np.sum(np.where(target > 0, target * (np.log(np.maximum(target, 1e-300)) - log_q), 0.0), -1)
    np.testing.assert_allclose(ours(jnp.asarray(student, jnp.float32)), value, rtol=1e-5)
    gradient = COTANGENT[:, None] * (softmax(student, -1) - target)
    assert relative(pull(ours, COTANGENT, student), gradient) < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_the_anchored_target_is_pinned_before_it_is_softened(temperature):
    student, teacher, base = draw(3.0, seed=11)
    banned = draw_banned(7)
    pinned = oracle_target(teacher, base, banned)
    target = softmax(np.log(pinned) / temperature, -1)
    soft = log_softmax(student / temperature, -1)
    value = temperature**2 * np.sum(target * (np.log(target) - soft), -1)

    def ours(s):
        return losses.anchored_kl(
            s, jnp.float32(teacher), jnp.float32(base), jnp.asarray(banned), temperature=temperature
        )

    np.testing.assert_allclose(ours(jnp.asarray(student, jnp.float32)), value, rtol=1e-5)
    gradient = COTANGENT[:, None] * temperature * (np.exp(soft) - target)
    assert relative(pull(ours, COTANGENT, student), gradient) < 1e-5


def implied_target(teacher, base, banned, student=None) -> np.ndarray:
    """The target that the loss pulls to, read off its gradient: softmax(student) - d loss / d student."""
    student = np.zeros_like(teacher) if student is None else student
    gradient = pull(
        lambda s: losses.anchored_kl(s, jnp.float32(teacher), jnp.float32(base), jnp.asarray(banned)),
        np.ones(TOKENS), student,
    )  # fmt: skip
    return softmax(student, -1) - np.asarray(gradient, np.float64)


def test_the_anchored_target_sums_to_one_and_gives_banned_tokens_the_bases_probability():
    _, teacher, base = draw(2.0, seed=6)
    banned = draw_banned(8)
    target = implied_target(teacher, base, banned)
    np.testing.assert_allclose(target.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(target[banned], softmax(base, -1)[banned], atol=1e-6)
    # What the teacher thinks of banned continuations does not reach the student at all.
    louder = np.where(banned, teacher + 50.0, teacher)
    np.testing.assert_allclose(implied_target(louder, base, banned), target, atol=1e-6)


def test_where_the_teacher_is_the_base_the_base_is_a_resting_point():
    _, base, _ = draw(3.0, seed=7)
    for size in (0, 5, VOCAB):
        banned = jnp.asarray(draw_banned(size))
        np.testing.assert_allclose(implied_target(base, base, np.asarray(banned)), softmax(base, -1), atol=1e-6)
        loss = losses.anchored_kl(jnp.float32(base), jnp.float32(base), jnp.float32(base), banned)
        np.testing.assert_allclose(loss, 0.0, atol=1e-6)
        gradient = pull(
            lambda s, banned=banned: losses.anchored_kl(s, jnp.float32(base), jnp.float32(base), banned),
            np.ones(TOKENS), base,
        )  # fmt: skip
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_dropped_logits_of_the_student_get_exactly_no_gradient():
    student, teacher, _ = draw(5.0)
    banned = draw_banned(9)
    gradient = pull(
        lambda s: losses.forward_kl(s, jnp.float32(teacher), dropped=jnp.asarray(banned)), COTANGENT, student
    )
    assert np.all(np.asarray(gradient)[banned] == 0.0)
    assert np.all(np.asarray(gradient)[~banned] != 0.0)


def test_a_small_divergence_of_bfloat16_logits_is_not_lost():
    rng = np.random.default_rng(3)
    teacher = jnp.asarray(rng.normal(size=(TOKENS, 512)) * 3, jnp.bfloat16)
    student = jnp.asarray(teacher.astype(jnp.float32) + rng.normal(size=teacher.shape) * 0.02, jnp.bfloat16)
    t, s = (np.asarray(x.astype(jnp.float32), np.float64) for x in (teacher, student))
    exact = rel_entr(softmax(t, -1), softmax(s, -1)).sum(-1)
    assert 2e-5 < exact.mean() < 2e-3  # the regime in which bfloat16 arithmetic gave 0
    ours = losses.forward_kl(student, teacher)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-2)
    banned = jnp.zeros(teacher.shape, bool)
    np.testing.assert_allclose(losses.anchored_kl(student, teacher, teacher, banned), exact, rtol=1e-2)
    targets = np.argmax(t, -1)
    np.testing.assert_allclose(
        losses.hard_label(student, jnp.asarray(targets)),
        logsumexp(s, -1) - s[np.arange(TOKENS), targets], rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [-1e30, -np.inf])
def test_logits_of_no_mass_make_no_nan(hidden):
    student, teacher, base = (np.array(x, np.float32) for x in draw(2.0))
    banned = draw_banned(4)
    for logits in (student, teacher, base):
        logits[banned] = hidden
    kept = oracle_drop(student.astype(np.float64), teacher.astype(np.float64), 1.0, banned)

    def plain(s):
        return losses.forward_kl(s, jnp.float32(teacher))

    def drop(s):
        return losses.forward_kl(s, jnp.float32(teacher), dropped=jnp.asarray(banned))

    def anchor(s):
        return losses.anchored_kl(s, jnp.float32(teacher), jnp.float32(base), jnp.asarray(banned))

    for function in (plain, drop, anchor):  # with no mass on banned tokens, all three are one and the same
        np.testing.assert_allclose(function(jnp.asarray(student)), kept, rtol=1e-5)
        assert np.all(np.isfinite(pull(function, COTANGENT, student)))


def test_a_base_with_all_its_mass_on_banned_tokens_makes_no_nan():
    student, teacher, base = (np.array(x, np.float32) for x in draw(2.0))
    banned = draw_banned(2)
    base[banned] += 300.0  # what is free underflows to exactly 0 in float32
    ours = losses.anchored_kl(jnp.asarray(student), jnp.float32(teacher), jnp.float32(base), jnp.asarray(banned))
    p, log_q = softmax(base.astype(np.float64), -1), log_softmax(student.astype(np.float64), -1)
    value = np.sum(np.where(banned, p * (log_softmax(base.astype(np.float64), -1) - log_q), 0.0), -1)
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    gradient = pull(
        lambda s: losses.anchored_kl(s, jnp.float32(teacher), jnp.float32(base), jnp.asarray(banned)),
        COTANGENT, student,
    )  # fmt: skip
    assert np.all(np.isfinite(gradient))


def test_forward_kl_is_not_the_reverse():
    """Mass-covering: where the teacher has mass and the student none it is large, the other way round it is small."""
    wide, narrow = jnp.zeros((1, 4)), jnp.asarray([[0.0, -20.0, -20.0, -20.0]])
    assert losses.forward_kl(narrow, wide)[0] > 10 > 2 > losses.forward_kl(wide, narrow)[0]
