"""Per-token objectives on logits: hard labels and forward KL to a teacher, with the logit filter's two forms.

All arithmetic is in float32. A masked-out entry is -inf and contributes exactly nothing, forward and backward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _masked_log_softmax(
    logits: Float[Array, "*tokens vocab"], excluded: Bool[Array, "*tokens vocab"] | None
) -> Float[Array, "*tokens vocab"]:
    """Log-softmax over the entries that are not excluded; the excluded ones come back as 0, to be multiplied by 0."""
    logits = logits.astype(jnp.float32)
    if excluded is None:
        return jax.nn.log_softmax(logits, axis=-1)
    floor = jnp.finfo(jnp.float32).min
    return jnp.where(excluded, 0.0, jax.nn.log_softmax(jnp.where(excluded, floor, logits), axis=-1))


def _expectation(
    log_weights: Float[Array, "*tokens vocab"], log_ratio: Float[Array, "*tokens vocab"]
) -> Float[Array, "*tokens"]:
    """Sum of exp(log_weights) * log_ratio; a continuation of no weight counts 0, also where its ratio is no number."""
    weights = jnp.exp(log_weights)
    return jnp.sum(weights * jnp.where(weights > 0, log_ratio, 0.0), axis=-1)


def hard_label(
    student_logits: Float[Array, "*tokens vocab"], targets: Int[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """Cross-entropy of the student at the sampled token, in nats."""
    logits = student_logits.astype(jnp.float32)
    # A sum over the vocabulary, not a look-up in it: where the vocabulary is split over devices, each sums its part.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def forward_kl(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    *,
    temperature: float = 1.0,
    dropped: Bool[Array, "*tokens vocab"] | None = None,
) -> Float[Array, "*tokens"]:
    """KL(teacher || student) per token, in nats, times temperature² (Hinton et al. 1503.02531, so gradients keep scale).

    Args:
      student_logits, teacher_logits: over the same vocabulary.
      temperature: divides both logits.
      dropped: the logit filter's `drop` form: these continuations leave both distributions, which are renormalised.
        What the student gives them is then unconstrained.
    """
    teacher = _masked_log_softmax(teacher_logits.astype(jnp.float32) / temperature, dropped)
    student = _masked_log_softmax(student_logits.astype(jnp.float32) / temperature, dropped)
    weighted = teacher if dropped is None else jnp.where(dropped, -jnp.inf, teacher)
    return temperature**2 * _expectation(weighted, teacher - student)


def anchored_kl(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    base_logits: Float[Array, "*tokens vocab"],
    banned: Bool[Array, "*tokens vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "*tokens"]:
    """KL(target || student) per token, times temperature²; the target is the teacher with the banned pinned to the base.

    target(v) = base(v) for banned v; for the others (1 - base(banned)) * teacher(v) / teacher(not banned). So nothing that
    the teacher thinks of a banned continuation reaches the student, and the student's own value for it is held still.

    Probabilities are pinned at temperature 1; target and student are then both softened by `temperature`, as in
    `forward_kl`. The minimum is the same student, the weight of improbable continuations is larger.
    """
    base = jax.nn.log_softmax(base_logits.astype(jnp.float32), axis=-1)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature, axis=-1)
    free = jnp.sum(jnp.where(banned, 0.0, jnp.exp(base)), axis=-1, keepdims=True)
    log_target = jnp.where(banned, base, _masked_log_softmax(teacher_logits, banned) + jnp.log(free))
    log_target = jax.nn.log_softmax(log_target / temperature, axis=-1)
    return temperature**2 * _expectation(log_target, log_target - student)
