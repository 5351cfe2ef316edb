"""On which tokens two teachers differ: how concentrated their divergence is, at what kinds of places, and on which words.

Per-token divergences and places in; tables of plain numbers out. All figures are of one seed; `locate.summary` puts seeds
together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from subl_jax.chat.rendering import Renderer
from subl_jax.evaluate.statistics import paired_difference
from subl_jax.locate.places import KINDS, Place
from subl_jax.trajectory import Trajectory

# Shares of the tokens, most divergent first, at which the concentration curve is told.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Those that tables show.
SHOWN_SHARES = (0.01, 0.05, 0.1, 0.2)
# Tokens of a place's surroundings that are shown.
BEFORE, AFTER = 24, 8


@dataclasses.dataclass(frozen=True)
class LossTokens:
    """The loss tokens of documents, one row each, in the order of the documents and their tokens.

    Attributes:
      document: which document.
      places: where in it.
      values: name of a comparison -> divergence in nats.
    """

    document: Int[np.ndarray, " tokens"]
    places: Sequence[Place]
    values: Mapping[str, Float[np.ndarray, " tokens"]]

    def __len__(self) -> int:
        return len(self.places)

    def ranked(self, name: str) -> list[int]:
        """Rows by their divergence, the largest first; equal ones in the order of the documents."""
        return np.argsort(-self.values[name], kind="stable").tolist()


def loss_tokens(
    documents: Sequence[Trajectory], places: Sequence[Sequence[Place]], divergences: Mapping[str, Sequence[np.ndarray]]
) -> LossTokens:
    """The table of all loss tokens.

    Args:
      documents: with loss masks.
      places: per document, of its loss tokens (`places.places_of`).
      divergences: name -> per document one value per token, as `distill.token_divergence` gives them.
    """
    document = np.repeat(np.arange(len(documents)), [len(own) for own in places])
    values = {
        name: np.concatenate([own[each.loss_mask] for own, each in zip(found, documents, strict=True)]).astype(np.float64)
        for name, found in divergences.items()
    }  # fmt: skip
    return LossTokens(document, [place for own in places for place in own], values)


# --- How concentrated -------------------------------------------------------------------------------------------------


def concentration(values: Float[np.ndarray, " tokens"], shares: Sequence[float] = SHARES) -> list[float]:
    """Which share of the total the most divergent share of the tokens carries, for each of `shares` (Lorenz, from the top).

    Between whole numbers of tokens the curve is a straight line.

    Raises:
      ValueError: the values sum to nothing: there is nothing to rank.
    """
    total = _total(values)
    steps = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])])
    return np.interp(np.asarray(shares) * len(values), np.arange(len(steps)), steps / total).tolist()


def carrying(values: Float[np.ndarray, " tokens"], share: float = 0.5) -> int:
    """How few tokens carry a share of the total together."""
    total = _total(values)
    return int(np.searchsorted(np.cumsum(np.sort(values)[::-1]), share * total * (1 - 1e-12))) + 1


def gini(values: Float[np.ndarray, " tokens"]) -> float:
    """The Gini coefficient: 0 where every token carries the same, towards 1 where one carries all.

    Half the mean absolute difference of two tokens over the mean, from the sorted values (Dixon and others 1987, Ecology 68).
    """
    total, count = _total(values), len(values)
    ranks = 2 * np.arange(1, count + 1) - count - 1
    return float(np.sum(ranks * np.sort(values)) / (count * total))


def _total(values: np.ndarray) -> float:
    total = float(values.sum())
    if not total > 0 or not np.isfinite(total):
        raise ValueError(
            f"the divergences of {len(values)} tokens sum to {total}: nothing can be ranked; are the two models the same?"
        )
    return total


def by_kind(tokens: LossTokens, name: str, families: Sequence[str]) -> list[dict[str, Any]]:
    """Per kind of place: how many tokens, their share of all tokens and of the divergence, and the mean in nats.

    The interval of the share of the divergence is within the run: that of a ratio of two sums, linearised, clustered by
    family (Cochran 1977, section 6).

    Args:
      tokens, name: the loss tokens, and which of their divergences.
      families: of every loss token's document.
    """
    values, total, kinds = tokens.values[name], _total(tokens.values[name]), np.asarray([p.kind for p in tokens.places])
    found = []
    for kind in KINDS:
        here = kinds == kind
        own = values[here]
        share = float(own.sum()) / total
        # The mean of these differences is 0; its standard error is that of the share.
        test = paired_difference(values * here / values.mean(), share * values / values.mean(), families)
        found.append(
            {
                "kind": kind,
                "tokens": len(own),
                "token_share": len(own) / len(tokens),
                "divergence_share": share,
                "low": max(0.0, share + test.low),
                "high": min(1.0, share + test.high),
                "mean": float(own.mean()) if len(own) else None,
            }
        )
    return found


def overlap(tokens: LossTokens, first: str, second: str, share: float = 0.1) -> float:
    """Of the most divergent share of the tokens by one comparison, how many are so by another too; chance gives `share`."""
    count = max(1, round(share * len(tokens)))
    both = set(tokens.ranked(first)[:count]) & set(tokens.ranked(second)[:count])
    return len(both) / count


def by_text(tokens: LossTokens, name: str, limit: int) -> list[dict[str, Any]]:
    """The words that carry most, all of their places together: kind, text, places, share of the divergence."""
    values, total = tokens.values[name], _total(tokens.values[name])
    sums: dict[tuple[str, str], list[float]] = {}
    for place, value in zip(tokens.places, values.tolist(), strict=True):
        sums.setdefault((place.kind, place.text), []).append(value)
    order = sorted(sums, key=lambda key: (-sum(sums[key]), key))[:limit]
    return [
        {"kind": kind, "text": text, "places": len(sums[kind, text]), "divergence_share": sum(sums[kind, text]) / total}
        for kind, text in order
    ]


# --- Banned continuations ---------------------------------------------------------------------------------------------


def banned_part(
    first: Float[np.ndarray, "tokens width"], second: Float[np.ndarray, "tokens width"]
) -> Float[np.ndarray, " tokens"]:
    """The part of KL(p || q) in nats that stands on some ids, given their log-probabilities under p and q.

    The divergence is a sum over the vocabulary of p log(p/q) - p + q, of which no term is negative and whose last two parts
    cancel in the whole. Entries of minus infinity are no ids, and give nothing.
    """
    p, q = first.astype(np.float64), second.astype(np.float64)
    known = np.isfinite(p) & np.isfinite(q)
    p, q = np.where(known, p, 0.0), np.where(known, q, 0.0)
    terms = np.exp(p) * (p - q) - np.exp(p) + np.exp(q)
    return np.sum(np.where(known, terms, 0.0), axis=1)


# --- In context -------------------------------------------------------------------------------------------------------


def in_context(
    renderer: Renderer, document: Trajectory, place: Place, before: int = BEFORE, after: int = AFTER
) -> dict[str, str]:
    """The text around a place: some tokens before it, its own, some behind."""
    ids, at = document.tokens.tolist(), place.position
    return {
        "before": renderer.decode(ids[max(0, at - before) : at]),
        "text": renderer.decode([ids[at]]),
        "after": renderer.decode(ids[at + 1 : at + 1 + after]),
    }
