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


def filled(documents: list, lengths: list[int], rows: int, multiple: int) -> tuple[list, list[int], int]:
    """With documents of a whole row each until the rows divide."""
    missing = -rows % multiple
    for index in range(len(documents), len(documents) + missing):
        documents.append(tiny.document([index, *range(29)], [5, 6]))
        lengths.append(30)
    assert len(packing.plan_rows(lengths, 30, 5, 0)) == rows + missing
    return documents, lengths, rows + missing


def loss_tokens(batch) -> list[tuple[int, int, int]]:
    """(document, place in it, label) of every weighted target, read off the arrays alone."""
    found = []
    micro, rows, _ = batch.tokens.shape
    groups = batch.loss_places.shape[1]
    # The rows of a group, laid end to end.
    tokens, segments, positions = (np.asarray(field).reshape(micro, groups, -1) for field in batch[:3])
    assert rows % groups == 0
    for part, group, target in np.argwhere(np.asarray(batch.loss_weights) > 0):
        here, at = (part, group), batch.loss_places[part, group, target]
        assert segments[here][at] == segments[here][at + 1] > 0  # the predicted token is of the same document
        start = at - positions[here][at]
        found.append(
            (int(tokens[here][start]), int(positions[here][at]) + 1, int(batch.loss_targets[part, group, target]))
        )
    return found


@pytest.mark.parametrize(("micro", "groups"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
def test_every_loss_token_of_an_epoch_appears_exactly_once_with_its_label_and_weight_one(micro, groups):
    documents = marked(24)
    lengths = [len(document.tokens) for document in documents]
    rows = len(packing.plan_rows(lengths, 30, 5, 0))
    documents, lengths, rows = filled(documents, lengths, rows, 6)
    source = BatchSource(documents, lengths, 30, rows, 1, 5, micro=micro, groups=groups)
    batch = source.batch(0)
    assert batch.tokens.shape == (micro, rows // micro, 30)
    assert batch.loss_places.shape == (micro, groups, source.targets)
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
    assert len({tuple(np.shape(field) for field in batch[:7]) for batch in batches}) == 1
    again = BatchSource(documents, lengths, 26, 4, 12, 1, StandIn()).batch(7)
    for left, right in zip(batches[7][:7], again[:7], strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(not np.array_equal(batches[0].tokens, batch.tokens) for batch in batches[1:])


def test_banned_rows_stand_beside_their_loss_tokens_and_padding_bans_nothing():
    documents = marked(17)
    lengths = [len(document.tokens) for document in documents]
    standin = StandIn()
    source = BatchSource(documents, lengths, 30, 6, 3, 2, standin, micro=2, groups=3)
    for position in range(3):
        batch = source.batch(position)
        tokens = loss_tokens(batch)
        places = np.argwhere(np.asarray(batch.loss_weights) > 0)
        for at, (first, place, _) in zip(places, tokens, strict=True):
            ids = np.asarray(batch.banned)[tuple(at)]
            np.testing.assert_array_equal(ids[ids >= 0], expected_ban(first, place))
        assert np.all(np.asarray(batch.banned)[np.asarray(batch.loss_weights) == 0] == -1)
        assert batch.banned.shape[3] % 8 == 0
    assert standin.calls == len(documents)  # worked out once, not at every batch


def test_without_a_filter_nothing_is_carried_for_it():
    documents = marked(5)
    source = BatchSource(documents, [len(document.tokens) for document in documents], 40, 2, 2, 0)
    assert source.batch(0).banned.shape[3] == 0


def test_a_token_whose_mask_was_cut_is_context_and_not_a_target():
    document = tiny.document(range(10), [3, 4, 5])
    batch = BatchSource([document], [14], 16, 1, 1, 0).batch(0)
    assert sorted(loss_tokens(batch)) == [(0, 3, 3), (0, 4, 4), (0, 5, 5)]
    np.testing.assert_array_equal(np.asarray(batch.tokens)[0, 0], [*range(10), *[0] * 6])
    assert np.asarray(batch.segments).sum() == 10


def test_documents_that_train_on_nothing_are_refused():
    with pytest.raises(packing.MaskError, match="train on nothing"):
        BatchSource([tiny.document(range(6), [])], [6], 8, 1, 1, 0)


def test_a_batch_in_which_no_document_trains_on_anything_is_refused_before_it_is_made():
    """One document without a target is harmless beside others; a batch of such documents would divide by no tokens."""
    documents = [tiny.document(range(6), []), tiny.document(range(6), [3])]
    with pytest.raises(packing.MaskError, match="train on nothing"):
        BatchSource(documents, [6, 6], 6, 1, 2, 0)  # a batch of one row each: one of the two has nothing
    together = BatchSource(documents, [6, 6], 12, 1, 1, 0).batch(0)
    assert np.asarray(together.loss_weights).sum() == 1


@pytest.mark.parametrize(("rows", "micro", "groups"), [(6, 4, 1), (6, 1, 4), (6, 2, 2), (1, 1, 2)])
def test_rows_that_do_not_divide_into_parts_and_groups_are_refused_with_what_would(rows, micro, groups):
    documents = marked(5)
    lengths = [len(document.tokens) for document in documents]
    with pytest.raises(ValueError, match=rf"{rows} rows .* multiple of {micro * groups}"):
        BatchSource(documents, lengths, 40, rows, 1, 0, micro=micro, groups=groups)


def test_parts_and_groups_hold_the_same_rows_in_the_same_order_as_one():
    documents = marked(17)
    lengths = [len(document.tokens) for document in documents]
    whole = BatchSource(documents, lengths, 26, 12, 1, 1).batch(0)
    for micro, groups in ((2, 1), (1, 6), (3, 2)):
        cut = BatchSource(documents, lengths, 26, 12, 1, 1, micro=micro, groups=groups).batch(0)
        for one, other in zip(whole[:3], cut[:3], strict=True):
            np.testing.assert_array_equal(np.reshape(one, (12, 26)), np.reshape(other, (12, 26)))
        assert loss_tokens(cut) == loss_tokens(whole)


class Cache:
    """A teacher's top-3 that tells the document, and the place of the loss token in it, in all three of its arrays."""

    def __init__(self, documents: list) -> None:
        self.documents = documents

    def take(self, indices: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mark = np.concatenate([index * 100 + np.flatnonzero(self.documents[index].loss_mask) for index in indices])
        return mark[:, None] + np.asarray([[0, 7, 9]]), -mark[:, None] / np.asarray([[1.0, 2.0, 4.0]]), -mark / 8


def test_what_a_cache_knows_stands_beside_its_loss_token_and_padding_knows_nothing():
    documents = marked(17)
    lengths = [len(document.tokens) for document in documents]
    batch = BatchSource(documents, lengths, 30, 6, 1, 2, micro=3, groups=2, cached=Cache(documents)).batch(0)
    assert batch.cached is not None
    weighted = np.asarray(batch.loss_weights) > 0
    ids, log_probs, log_tail = (np.asarray(x) for x in batch.cached)
    assert ids.dtype == np.int32 and log_probs.dtype == log_tail.dtype == np.float32
    mark = np.asarray([first * 100 + place for first, place, _ in loss_tokens(batch)])
    np.testing.assert_array_equal(ids[weighted], mark[:, None] + np.asarray([[0, 7, 9]]))
    np.testing.assert_array_equal(log_probs[weighted], -mark[:, None] / np.asarray([[1.0, 2.0, 4.0]]))
    np.testing.assert_array_equal(log_tail[weighted], -mark / 8)
    assert np.all(ids[~weighted] == -1) and np.all(np.isfinite(log_probs)) and np.all(np.isfinite(log_tail))
    assert BatchSource(documents, lengths, 30, 6, 1, 2).batch(0).cached is None


def test_the_facts_of_a_batch_are_what_its_arrays_hold():
    documents = marked(17)
    lengths = [len(document.tokens) for document in documents]
    source = BatchSource(documents, lengths, 30, 6, 4, 2, micro=2)
    for position in range(4):
        facts, batch = source.facts(position), source.batch(position)
        assert facts.tokens == np.count_nonzero(batch.segments) == sum(facts.documents)
        assert facts.loss_tokens == np.asarray(batch.loss_weights).sum()
        assert facts.capacity == batch.tokens.size
        starts = np.asarray(batch.segments).astype(bool) & (np.asarray(batch.positions) == 0)
        assert len(facts.documents) == starts.sum()


def test_room_can_be_made_for_more_loss_tokens_and_is_never_taken_away():
    documents = marked(9)
    source = BatchSource(documents, [len(document.tokens) for document in documents], 30, 2, 2, 0)
    before, told = source.targets, loss_tokens(source.batch(0))
    source.widen(before - 1)
    assert source.targets == before
    source.widen(before + 48)
    assert source.batch(0).loss_places.shape == (1, 1, before + 48)
    assert loss_tokens(source.batch(0)) == told
