"""Divergences of a student from a teacher: per token the value, and its gradient by the student's logits, in closed form.

Float32 logits over (a part of) the vocabulary come in. Sums and maxima over the vocabulary go through `Vocabulary`, which
knows over which mesh axes it is split: nothing else here cares, and only scalars per token cross devices. Per-token results
keep the vocabulary's dimension at size 1.

Derivations use dq_v/dz_u = q_v (1[u=v] - q_u): a loss f(q) has df/dz_v = q_v (g_v - sum_u q_u g_u) with g = df/dq, in which
constants in g cancel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subl_jax.distill.objective import Objective

# The logit of a continuation that is left out: probability exactly 0, and no arithmetic on it gives infinity or NaN.
EXCLUDED = -1e30

_Logits = Float[Array, "tokens vocab"]
_PerToken = Float[Array, "tokens 1"]
_Result = tuple[_PerToken, _Logits]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Where the vocabulary of a chunk of logits [tokens, vocab] lies.

    Attributes:
      mesh_axes: over which it is split, inside a `shard_map`; empty: it is whole.
    """

    mesh_axes: tuple[str, ...] = ()

    def sum(self, x: _Logits) -> _PerToken:
        """Over the whole vocabulary."""
        part = jnp.sum(x, 1, keepdims=True)
        return jax.lax.psum(part, self.mesh_axes) if self.mesh_axes else part

    def max(self, x: _Logits) -> _PerToken:
        """Over the whole vocabulary."""
        part = jnp.max(x, 1, keepdims=True)
        return jax.lax.pmax(part, self.mesh_axes) if self.mesh_axes else part

    def ids(self, size: int) -> Int[Array, "1 vocab"]:
        """The token ids of this part of the vocabulary."""
        return (jnp.arange(size) + self.offset(size))[None]

    def offset(self, size: int) -> Int[Array, ""] | int:
        """The first id of this part, of `size` ids."""
        return jax.lax.axis_index(self.mesh_axes) * size if self.mesh_axes else 0

    def log_softmax(self, logits: _Logits) -> tuple[_Logits, _PerToken]:
        """(z - max z, log of the sum of their exponentials): the difference of the two is the log-softmax.

        Apart, because the first is exact and the second small: a divergence of two close distributions with large logits
        keeps its digits.
        """
        shifted = logits - self.max(logits)
        return shifted, jnp.log(self.sum(jnp.exp(shifted)))


def forward_kl(objective: Objective, student: _Logits, teacher: _Logits, vocabulary: Vocabulary) -> _Result:
    """KL(p || q); its gradient is q - p."""
    del objective
    a, log_a = vocabulary.log_softmax(student)
    b, log_b = vocabulary.log_softmax(teacher)
    p = jnp.exp(b - log_b)
    value = vocabulary.sum(p * (b - a)) + log_a - log_b
    return value, jnp.exp(a - log_a) - p


def reverse_kl(objective: Objective, student: _Logits, teacher: _Logits, vocabulary: Vocabulary) -> _Result:
    """KL(q || p); g = log q/p."""
    del objective
    a, log_a = vocabulary.log_softmax(student)
    b, log_b = vocabulary.log_softmax(teacher)
    return _pull(jnp.exp(a - log_a), (a - b) + (log_b - log_a), vocabulary)


def jensen_shannon(objective: Objective, student: _Logits, teacher: _Logits, vocabulary: Vocabulary) -> _Result:
    """Of the mixture m, w KL(p || m) + (1-w) KL(q || m); g = (1-w) log q/m + constant: the terms through m add up to -(1-w)."""
    weight = objective.teacher_weight
    p, q, ratio = _compared(student, teacher, vocabulary)
    odds, from_teacher, from_student = _mixed(ratio, weight)
    value = vocabulary.sum(weight * p * from_teacher + (1 - weight) * q * from_student)
    # log q/m but for the constant: where p is small beside q, it keeps digits that log q/m has lost.
    return value, (1 - weight) * _pull(q, -jax.nn.softplus(odds), vocabulary)[1]


def skew_forward_kl(objective: Objective, student: _Logits, teacher: _Logits, vocabulary: Vocabulary) -> _Result:
    """KL(p || a p + (1-a) q); g = -(1-a) p/m, and a p/m is the teacher's share in the mixture."""
    skew = objective.skew
    if skew == 0:
        return forward_kl(objective, student, teacher, vocabulary)
    p, q, ratio = _compared(student, teacher, vocabulary)
    odds, from_teacher, _ = _mixed(ratio, skew)
    g = -(1 - skew) / skew * jax.nn.sigmoid(odds)
    return vocabulary.sum(p * from_teacher), _pull(q, g, vocabulary)[1]


def skew_reverse_kl(objective: Objective, student: _Logits, teacher: _Logits, vocabulary: Vocabulary) -> _Result:
    """KL(q || (1-a) p + a q); g = log q/m - a q/m, and a q/m is 1 less the teacher's share in the mixture."""
    skew = objective.skew
    if skew == 0:
        return reverse_kl(objective, student, teacher, vocabulary)
    _, q, ratio = _compared(student, teacher, vocabulary)
    odds, _, from_student = _mixed(ratio, 1 - skew)
    g = jax.nn.sigmoid(odds) - jax.nn.softplus(odds)
    return vocabulary.sum(q * from_student), _pull(q, g, vocabulary)[1]


def _compared(student: _Logits, teacher: _Logits, vocabulary: Vocabulary) -> tuple[_Logits, _Logits, _Logits]:
    """(p, q, log p/q)."""
    (a, log_a), (b, log_b) = vocabulary.log_softmax(student), vocabulary.log_softmax(teacher)
    return jnp.exp(b - log_b), jnp.exp(a - log_a), (b - a) + (log_a - log_b)


def _mixed(ratio: _Logits, share: float) -> tuple[_Logits, _Logits, _Logits]:
    """Of the mixture m = w p + (1-w) q: (log of w p / ((1-w) q), log p/m, log q/m), from log p/q and w.

    Each from the larger term of the mixture: no large numbers cancel, and of close distributions none at all.
    """
    own, other = math.log(share), math.log1p(-share)
    odds = ratio + (own - other)
    rest = jnp.log1p(jnp.exp(-jnp.abs(odds)))
    larger = odds > 0
    return odds, jnp.where(larger, -own, ratio - other) - rest, jnp.where(larger, -own - ratio, -other) - rest


def _pull(q: _Logits, g: _Logits, vocabulary: Vocabulary) -> _Result:
    """(sum q g, q (g - sum q g)).

    A student that is nearly sure has a small gradient: the difference of two numbers that are nearly g where it is surest.
    The mean is therefore taken twice, the second time of what the first has left: the difference keeps its digits.
    """
    mean = vocabulary.sum(q * g)
    g = g - mean
    rest = vocabulary.sum(q * g)
    return mean + rest, q * (g - rest)


DIVERGENCES: Mapping[str, Callable[[Objective, _Logits, _Logits, Vocabulary], _Result]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def hard_label(student: _Logits, targets: Int[Array, " tokens"], vocabulary: Vocabulary) -> _Result:
    """-log q(target); its gradient is q - 1[target]."""
    a, log_a = vocabulary.log_softmax(student)
    # A sum over the vocabulary, not a look-up in it: where it is split over devices, each sums its part.
    chosen = vocabulary.ids(student.shape[1]) == targets[:, None]
    value = log_a - vocabulary.sum(jnp.where(chosen, a, 0.0))
    return value, jnp.exp(a - log_a) - chosen


def anchored(teacher: _Logits, base: _Logits, banned: Bool[Array, "tokens vocab"], vocabulary: Vocabulary) -> _Logits:
    """The `anchor` filter's target as log-probabilities: the teacher, with the banned pinned to the base.

    target(v) = base(v) for banned v; for the others (1 - base(banned)) * teacher(v) / teacher(not banned). So nothing that
    the teacher thinks of a banned continuation reaches the student, and the student's own value for it is held still.
    """
    a, log_a = vocabulary.log_softmax(base)
    log_base = a - log_a
    b, log_b = vocabulary.log_softmax(jnp.where(banned, EXCLUDED, teacher))
    free = vocabulary.sum(jnp.where(banned, 0.0, jnp.exp(log_base)))
    return jnp.where(banned, log_base, (b - log_b) + jnp.log(jnp.maximum(free, jnp.finfo(jnp.float32).tiny)))


def against_cache(
    objective: Objective,
    student: _Logits,
    ids: Int[Array, "tokens k"],
    log_probs: Float[Array, "tokens k"],
    log_tail: Float[Array, " tokens"],
    vocabulary: Vocabulary,
) -> _Result:
    """A divergence on k + 1 outcomes: each of the teacher's top-k, and everything else together.

    It is at most the full divergence (forward and reverse KL: data-processing inequality). The student spreads the tail as
    it likes: with A the student's mass on it and f' the gradient by its log, df/dz_v = (q_v / A) f' for every v of the tail.

    Args:
      objective, vocabulary: as everywhere.
      student: logits, softened as the cache was.
      ids: of the teacher's top-k; -1: not an outcome.
      log_probs: the teacher's log-probabilities of them, over the whole vocabulary.
      log_tail: the teacher's log of the remaining mass.
    """
    size = student.shape[1]
    place = ids - vocabulary.offset(size)
    inside = (ids >= 0) & (place >= 0) & (place < size)
    rows = jnp.broadcast_to(jnp.arange(ids.shape[0])[:, None], ids.shape)
    # Out of range both ways is dropped by the scatter; a negative index would count from the end.
    column = jnp.where(inside, place, size)
    top = jnp.where(inside, student[rows, jnp.clip(place, 0, size - 1)], 0.0)
    if vocabulary.mesh_axes:
        top = jax.lax.psum(top, vocabulary.mesh_axes)
    top = jnp.where(ids >= 0, top, EXCLUDED)
    tail = student.at[rows, column].set(EXCLUDED, mode="drop")
    shifted, log_sum = vocabulary.log_softmax(tail)
    log_mass = vocabulary.max(tail) + log_sum
    outcomes = jnp.concatenate([top, log_mass], axis=1)
    teacher = jnp.concatenate([jnp.where(ids >= 0, log_probs, EXCLUDED), log_tail[:, None]], axis=1)
    value, gradient = DIVERGENCES[objective.loss](objective, outcomes, jnp.maximum(teacher, EXCLUDED), Vocabulary())
    spread = jnp.exp(shifted - log_sum) * gradient[:, -1:]
    return value, spread.at[rows, column].set(gradient[:, :-1], mode="drop")
