"""Batches by position: every loss token once, with its label and its own banned list; shapes that never change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from subl_jax.data import packing
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.logit_filter import LogitFilter
from tests.distill import tiny


class StandIn(LogitFilter):
    """Bans, for the loss token at a place, ids that tell the document's first token and the place."""

    def __init__(self) -> None:
        self.calls = 0

    def banned(self, tokens: Any, loss_mask: Any) -> list[np.ndarray]:
        self.calls += 1
        return [expected_ban(int(tokens[0]), int(place)) for place in np.flatnonzero(loss_mask)]


def expected_ban(first: int, place: int) -> np.ndarray:
    return np.arange(first * 100 + place, first * 100 + place + place % 4, dtype=np.int32)


def marked(count: int, seed: int = 0) -> list:
    """Documents whose first token is their index, so that a row tells which it holds."""
    found = tiny.documents(count, seed)
    for index, document in enumerate(found):
        document.tokens[0] = index
    return found


def loss_tokens(batch) -> list[tuple[int, int, int]]:
    """(document, place in it, label) of every weighted target, read off the arrays alone."""
    found = []
    tokens, segments, positions, places, targets, weights, _ = (np.asarray(field) for field in batch)
    for row, target in np.argwhere(weights > 0):
        at = places[row, target]
        assert segments[row, at] == segments[row, at + 1] > 0  # the predicted token is of the same document
        start = at - positions[row, at]
        found.append((int(tokens[row, start]), int(positions[row, at]) + 1, int(targets[row, target])))
    return found


def test_every_loss_token_of_an_epoch_appears_exactly_once_with_its_label_and_weight_one():
    documents = marked(24)
    lengths = [len(document.tokens) for document in documents]
    rows = len(packing.plan_rows(lengths, 30, 5, 0))
    source = BatchSource(documents, lengths, 30, rows, 1, 5)
    batch = source.batch(0)
    expected = Counter(
        (index, int(place), int(document.tokens[place]))
        for index, document in enumerate(documents)
        for place in np.flatnonzero(document.loss_mask)
    )
    assert Counter(loss_tokens(batch)) == expected
    assert set(np.unique(batch.loss_weights)) <= {0.0, 1.0}
    assert np.asarray(batch.loss_weights).sum() == expected.total()


def test_shapes_are_the_same_at_every_position_and_a_position_gives_the_same_batch_again():
    documents = marked(17, seed=3)
    lengths = [len(document.tokens) for document in documents]
    source = BatchSource(documents, lengths, 26, 4, 12, 1, StandIn())
    batches = [source.batch(position) for position in range(12)]
    assert len({tuple(np.shape(field) for field in batch) for batch in batches}) == 1
    again = BatchSource(documents, lengths, 26, 4, 12, 1, StandIn()).batch(7)
    for left, right in zip(batches[7], again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(not np.array_equal(batches[0].tokens, batch.tokens) for batch in batches[1:])


def test_banned_rows_stand_beside_their_loss_tokens_and_padding_bans_nothing():
    documents = marked(17)
    lengths = [len(document.tokens) for document in documents]
    standin = StandIn()
    source = BatchSource(documents, lengths, 30, 6, 3, 2, standin)
    for position in range(3):
        batch = source.batch(position)
        tokens = loss_tokens(batch)
        places = np.argwhere(np.asarray(batch.loss_weights) > 0)
        for (row, target), (first, place, _) in zip(places, tokens, strict=True):
            ids = np.asarray(batch.banned)[row, target]
            np.testing.assert_array_equal(ids[ids >= 0], expected_ban(first, place))
        assert np.all(np.asarray(batch.banned)[np.asarray(batch.loss_weights) == 0] == -1)
        assert batch.banned.shape[2] % 8 == 0
    assert standin.calls == len(documents)  # worked out once, not at every batch


def test_without_a_filter_nothing_is_carried_for_it():
    documents = marked(5)
    source = BatchSource(documents, [len(document.tokens) for document in documents], 40, 2, 2, 0)
    assert source.batch(0).banned.shape[2] == 0


def test_a_token_whose_mask_was_cut_is_context_and_not_a_target():
    document = tiny.document(range(10), [3, 4, 5])
    batch = BatchSource([document], [14], 16, 1, 1, 0).batch(0)
    assert sorted(loss_tokens(batch)) == [(0, 3, 3), (0, 4, 4), (0, 5, 5)]
    np.testing.assert_array_equal(np.asarray(batch.tokens)[0], [*range(10), *[0] * 6])
    assert np.asarray(batch.segments).sum() == 10


def test_documents_that_train_on_nothing_are_refused():
    with pytest.raises(packing.MaskError, match="train on nothing"):
        BatchSource([tiny.document(range(6), [])], [6], 8, 1, 1, 0).batch(0)
