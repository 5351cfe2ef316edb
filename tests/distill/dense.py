"""The objectives as their definitions read: all logits at once, plain probabilities, no derivative worked out by hand.

The oracle of the fused loss, of which it shares nothing. In numpy (`exact`) it says what is true, in float64 and with slopes
by complex steps. In JAX (`loss`) it is the loss that holds an array [tokens, vocab], which no program of the package may
contain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax.distill.fused import Head, Tokens, TopK
from subl_jax.distill.objective import Objective


def relative_entropy(p: Any, q: Any, xp: Any) -> Any:
    """KL(p || q) in nats; what p gives no mass counts 0."""
    live = p.real > 0
    ratio = xp.log(xp.where(live, p, 1.0)) - xp.log(xp.where(live, q, 1.0))
    return xp.sum(xp.where(live, p * ratio, 0.0), -1)


def compare(objective: Objective, p: Any, q: Any, xp: Any) -> Any:
    """The named divergence of the student q from the teacher p, without temperature."""
    w, a = objective.teacher_weight, objective.skew
    if objective.loss == "jensen_shannon":
        m = w * p + (1 - w) * q
        return w * relative_entropy(p, m, xp) + (1 - w) * relative_entropy(q, m, xp)
    first, second = {
        "forward_kl": (p, q),
        "reverse_kl": (q, p),
        "skew_forward_kl": (p, a * p + (1 - a) * q),
        "skew_reverse_kl": (q, (1 - a) * p + a * q),
    }[objective.loss]
    return relative_entropy(first, second, xp)


def anchored(p: Any, base: Any, banned: Any, xp: Any) -> Any:
    """The anchor filter's target: the base's probability where banned, and the teacher's shape of the rest elsewhere."""
    kept = xp.where(banned, 0.0, p)
    total = xp.sum(kept, -1, keepdims=True)
    free = xp.sum(xp.where(banned, 0.0, base), -1, keepdims=True)
    return xp.where(banned, base, free * kept / xp.where(total > 0, total, 1.0))


def outcomes(p: Any, ids: Any, xp: Any) -> Any:
    """The mass of each listed id, and that of all others together."""
    chosen = ids[..., None] == xp.arange(p.shape[-1])  # -1 is nowhere
    tail = xp.sum(xp.where(chosen.any(1), 0.0, p), -1, keepdims=True)
    return xp.concatenate([xp.einsum("nkv,...nv->...nk", chosen.astype(p.dtype), p), tail], -1)


def per_token(objective: Objective, student: Any, teacher: Any, base: Any, tokens: Tokens, known: int, xp: Any) -> Any:
    """The objective of every token.

    Args:
      objective: what is minimised.
      student, teacher, base: logits [tokens, vocab] (the student's with any dimensions before them); None where the
        objective needs none.
      tokens: arrays without the dimension of groups.
      known: ids from here on have no probability.
      xp: numpy or jax.numpy.
    """
    ids = xp.arange(student.shape[-1])
    unknown = ids >= known

    def probabilities(logits: Any, temperature: float = 1.0, without: Any = False) -> Any:
        gone = unknown | without
        z = logits / temperature
        mass = xp.where(
            gone, 0.0, xp.exp(xp.where(gone, 0.0, z - xp.max(xp.where(gone, -1e30, z.real), -1, keepdims=True)))
        )
        return mass / xp.sum(mass, -1, keepdims=True)

    chosen = ids == tokens.targets[:, None]
    label = -xp.log(xp.sum(xp.where(chosen, probabilities(student), 0.0), -1))
    if objective.loss == "hard_label":
        return label
    heat = objective.temperature
    if tokens.cached is not None:
        listed, log_probs, log_tail = tokens.cached
        mass = xp.where(listed >= 0, xp.exp(log_probs), 0.0)
        p = xp.concatenate([mass, xp.exp(log_tail)[:, None]], -1)
        value = compare(objective, p, outcomes(probabilities(student, heat), listed, xp), xp)
    else:
        banned = (tokens.banned[..., None] == ids).any(1)
        out = banned if objective.logit_filter == "drop" else False
        p = probabilities(teacher, heat, out)
        if objective.logit_filter == "anchor":  # pinned before it is softened
            target = anchored(probabilities(teacher), probabilities(base), banned, xp) ** (1 / heat)
            p = target / xp.sum(target, -1, keepdims=True)
        value = compare(objective, p, probabilities(student, heat, out), xp)
    share = objective.hard_label_weight
    return (1 - share) * heat**2 * value + share * label


def logits(head: Head) -> Any:
    """[tokens, vocab], all tokens of all groups, in the dtype of the operands."""
    terms = [
        hidden.reshape(-1, hidden.shape[-1]) @ (kernel.T if transposed else kernel)
        for hidden, kernel, transposed in zip(*head, strict=True)
    ]
    return sum(terms[1:], terms[0])


def flat(tokens: Any) -> Any:
    """Without the dimension of groups."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tokens)


def loss(
    objective: Objective, student: Head, teacher: Head | None, base: Head | None, tokens: Tokens, *, known: int
) -> Any:
    """What `fused.divergence` computes, with everything in memory at once."""
    z, *others = (None if head is None else logits(head) for head in (student, teacher, base))
    return jnp.sum(per_token(objective, z, others[0], others[1], flat(tokens), known, jnp) * tokens.weights.reshape(-1))


class Exact(NamedTuple):
    """Per token the value and its slope by the student's logits, in float64, before weights."""

    values: np.ndarray
    slopes: np.ndarray


def exact_on_logits(
    objective: Objective, student: Any, teacher: Any = None, base: Any = None, *, tokens: Tokens, known: int = 1 << 30
) -> Exact:
    """In float64, from logits as they are given; `tokens` without groups.

    Slopes are imaginary parts: f(z + ih) = f(z) + ih f'(z), and no difference is taken that could lose a digit.
    """
    student, teacher, base = (None if x is None else double(x) for x in (student, teacher, base))
    assert student is not None
    step, vocab = 1e-30, student.shape[-1]
    nudged = student + 1j * step * np.eye(vocab)[:, None]  # one logit of every token at a time
    with np.errstate(divide="ignore"):
        values = per_token(objective, nudged, teacher, base, jax.tree.map(double, tokens), known, np)
    return Exact(values[0].real, values.imag.T / step)


def double(x: Any) -> np.ndarray:
    """Floating numbers as float64 numpy."""
    array = np.asarray(x)
    return array if array.dtype.kind in "iub" else array.astype(np.float64)


class Gradients(NamedTuple):
    """Of a weighted sum, by the student's head."""

    loss: float
    hidden: tuple[np.ndarray, ...]
    kernels: tuple[np.ndarray, ...]


def exact(
    objective: Objective, student: Head, teacher: Head | None, base: Head | None, tokens: Tokens, *, known: int
) -> Exact:
    """`loss` per token in float64, from operands as they are given (also bfloat16 ones)."""
    made = [
        None if head is None else np.asarray(logits(jax.tree.map(lambda x: x if isinstance(x, bool) else double(x), head)))
        for head in (student, teacher, base)
    ]  # fmt: skip
    return exact_on_logits(objective, *made, tokens=flat(tokens), known=known)


def weighted(found: Exact, student: Head, weights: Any) -> Gradients:
    """The weighted sum and its gradients, by the chain rule in numpy."""
    w = np.asarray(weights, np.float64).reshape(-1)
    slopes = found.slopes * w[:, None]
    hidden, kernels = [], []
    for state, kernel, transposed in zip(*student, strict=True):
        k, h = double(kernel), double(state).reshape(-1, state.shape[-1])
        hidden.append((slopes @ (k if transposed else k.T)).reshape(state.shape))
        kernels.append(slopes.T @ h if transposed else h.T @ slopes)
    return Gradients(float(found.values @ w), tuple(hidden), tuple(kernels))


def top_k(teacher: np.ndarray, k: int, temperature: float = 1.0, known: int | None = None) -> TopK:
    """What a cache knows of these logits, in numpy; `teacher` is [groups, tokens, vocab]."""
    z = np.asarray(teacher, np.float64)[..., :known] / temperature
    z = z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    ids = np.argsort(-p, -1)[..., :k]
    top = np.take_along_axis(p, ids, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - top.sum(-1), 0.0))
    arrays: Any = (ids.astype(np.int32), np.log(top).astype(np.float32), tail.astype(np.float32))
    return TopK(*arrays)


def relative(found: Any, expected: Any) -> float:
    """Relative L2 distance of two arrays or tuples of arrays."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
