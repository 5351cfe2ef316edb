"""What the teacher cache stores of one loss token: a record of fixed size, made of the teacher's top k and read again.

At k = 64 of 152064 ids a record takes 246 bytes: 106 for the ids, 128 for their probabilities, 12 for three floats.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Shaped

from subl_jax.distill.teacher_cache import packed_ids

# Probabilities are stored as drops below the likeliest, log(p_max / p), in steps of the token's largest drop / 65535: for
# k = 64 some 1e-4 nats. Measured at V = 152064 against float16 (Zipf's law / normal logits of deviation 4), mean change of
# a KL: drops in these steps 6e-7 / 5e-7, float16 drops 1e-5 / 7e-6, float16 log-probabilities 7e-5 / 9e-5, which do not
# even sum to 1. A finer grid near the likeliest (steps of the root) gains nothing.
_LEVELS = 65535


class Targets(NamedTuple):
    """The teacher at each loss token, as atoms of probability: k ids, and all others together. They sum to 1.

    Attributes:
      ids: ascending, all different.
      log_probs: of the ids, in nats, at the cache's temperature.
      log_tail: of all others together; -inf where there are none.
    """

    ids: Int[np.ndarray, "tokens k"]
    log_probs: Float[np.ndarray, "tokens k"]
    log_tail: Float[np.ndarray, " tokens"]


def record_type(k: int, vocab: int) -> np.dtype:
    """The record of a token whose top `k` are ids below `vocab`."""
    return np.dtype(
        [
            ("ids", "u1", (packed_ids.width(k, vocab),)),
            ("levels", "<u2", (k,)),
            ("largest_drop", "<f4"),
            ("log_tail", "<f4"),
            ("log_normaliser", "<f4"),
        ]
    )


def encode(
    ids: Int[np.ndarray, "tokens k"],
    drops: Float[np.ndarray, "tokens k"],
    log_tail: Float[np.ndarray, " tokens"],
    log_normaliser: Float[np.ndarray, " tokens"],
    vocab: int,
) -> Shaped[np.ndarray, " tokens"]:
    """Records of tokens.

    Args:
      ids: ascending; drops: log(p_max / p) of each.
      log_tail: log of what all other ids have; log_normaliser: logsumexp of the logits.
      vocab: ids are below it.

    Raises:
      ValueError: ids that do not ascend, or numbers that no softmax gives (a NaN in the teacher's logits).
    """
    bad = ~(np.isfinite(drops).all(axis=1) & np.isfinite(log_normaliser) & (log_tail <= 0))
    if bad.any():
        raise ValueError(
            f"the teacher's logits at {int(bad.sum())} of {len(ids)} loss tokens are not finite; check its weights, or "
            "use compute_dtype=float32"
        )
    records = np.empty(len(ids), record_type(ids.shape[1], vocab))
    largest = drops.max(axis=1).astype(np.float32)
    records["ids"] = packed_ids.pack(ids, vocab)
    records["levels"] = np.rint(drops * (_LEVELS / np.where(largest > 0, largest, 1).astype(np.float64))[:, None])
    records["largest_drop"], records["log_tail"], records["log_normaliser"] = largest, log_tail, log_normaliser
    return records


def decode(records: Shaped[np.ndarray, " tokens"], vocab: int) -> Targets:
    """Inverse of `encode`, but for the grid of the probabilities.

    The top k share what the tail leaves in the ratios that were stored: the atoms sum to 1 by construction.

    Raises:
      ValueError: damaged ids.
    """
    k = records.dtype["levels"].shape[0]
    ids = packed_ids.unpack(records["ids"], k, vocab)
    log_tail = records["log_tail"].astype(np.float32)
    log_probs = records["levels"] * (records["largest_drop"] * np.float32(-1 / _LEVELS))[:, None]
    top = np.log(-np.expm1(log_tail)) - np.log(np.exp(log_probs).sum(axis=1))
    log_probs += top[:, None]
    return Targets(ids, log_probs, log_tail)


def atoms_kl(
    log_probs: Float[np.ndarray, "tokens k"],
    log_tail: Float[np.ndarray, " tokens"],
    other_log_probs: Float[np.ndarray, "tokens k"],
    other_log_tail: Float[np.ndarray, " tokens"],
) -> Float64[np.ndarray, " tokens"]:
    """KL between two distributions over the same k ids and the tail, in nats; an atom of no weight counts 0."""
    left = np.concatenate([log_probs, log_tail[:, None]], axis=1, dtype=np.float64)
    right = np.concatenate([other_log_probs, other_log_tail[:, None]], axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # -inf minus -inf where both tails are empty
        return np.where(np.isneginf(left), 0.0, np.exp(left) * (left - right)).sum(axis=1)
