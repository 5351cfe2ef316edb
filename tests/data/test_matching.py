"""Matched arms: the same tasks in the same order with equal loss tokens, and one packing plan for all."""

from __future__ import annotations

import numpy as np
import pytest

from subl_jax.data import packing
from subl_jax.data.matching import match_arms
from tests.distill import tiny


def arms(count: int = 12) -> dict:
    """Three arms over shuffled tasks, of different lengths and loss tokens, with two samples of some tasks."""
    found = {}
    for arm in range(3):
        rng = np.random.default_rng(arm)
        pairs = [(f"safe/train/x/0/{task}", sample) for task in range(count) for sample in range(1 + task % 2)]
        documents = []
        for place in rng.permutation(len(pairs)):
            length = int(rng.integers(8, 20))
            loss = sorted(rng.choice(np.arange(2, length), int(rng.integers(1, length - 3)), replace=False).tolist())
            documents.append(tiny.document(rng.integers(0, 30, length).tolist(), loss, *pairs[place]))
        found[f"arm{arm}"] = documents
    return found


SURVIVING = [(f"safe/train/x/0/{task}", 0) for task in (11, 3, 4, 7, 9)] + [("safe/train/x/0/3", 1)]


def test_every_arm_holds_the_surviving_pairs_in_one_order_with_equal_loss_tokens():
    given = arms()
    matched = match_arms(given, SURVIVING)
    for row in zip(*matched.documents.values(), strict=True):
        assert len({(document.task_id, document.sample) for document in row}) == 1
        originals = [
            next(d for d in given[arm] if (d.task_id, d.sample) == (row[0].task_id, row[0].sample)) for arm in given
        ]
        counts = {int(document.loss_mask.sum()) for document in row}
        assert counts == {min(int(document.loss_mask.sum()) for document in originals)}
        for document, original in zip(row, originals, strict=True):
            np.testing.assert_array_equal(document.tokens, original.tokens)  # cut tokens stay as context
            kept = np.flatnonzero(original.loss_mask)[: counts.copy().pop()]
            np.testing.assert_array_equal(np.flatnonzero(document.loss_mask), kept)  # the first ones stay
    assert {(d.task_id, d.sample) for d in matched.documents["arm0"]} == set(SURVIVING)


def test_planned_lengths_are_the_longest_over_the_arms_and_give_one_plan():
    matched = match_arms(arms(), SURVIVING)
    columns = zip(*matched.documents.values(), strict=True)
    assert matched.planned_lengths == [max(len(document.tokens) for document in column) for column in columns]
    rows = packing.PackedStream(matched.planned_lengths, 40, 2, 0).rows(1)
    batches = [packing.collate(rows, documents, 40) for documents in matched.documents.values()]  # all fit
    assert len({batch.documents for batch in batches}) == 1
    assert len({int(batch.loss_mask.sum()) for batch in batches}) == 1


def test_the_order_of_the_input_does_not_matter():
    given = arms()
    turned = {name: documents[::-1] for name, documents in given.items()}
    left, right = match_arms(given, SURVIVING), match_arms(turned, SURVIVING[::-1])
    assert left.planned_lengths == right.planned_lengths
    assert [d.task_id for d in left.documents["arm1"]] == [d.task_id for d in right.documents["arm1"]]


def test_loss_tokens_and_the_share_cut_are_counted():
    short = tiny.document(range(10), [2, 3, 4], "a")
    long = tiny.document(range(10), [2, 3, 4, 6, 7, 8], "a")
    matched = match_arms({"short": [short], "long": [long]}, {("a", 0)})
    assert matched.loss_tokens == 3
    assert matched.cut == {"short": 0.0, "long": 0.5}
    assert long.loss_mask.sum() == 6  # the given trajectory is left as it was


def test_an_arm_that_lacks_a_surviving_pair_is_named_with_it():
    given = arms()
    given["arm2"] = [document for document in given["arm2"] if document.task_id != "safe/train/x/0/7"]
    with pytest.raises(ValueError, match=r"arm arm2 has no trajectory of \('safe/train/x/0/7', 0\)"):
        match_arms(given, SURVIVING)


def test_nothing_surviving_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match="no task survives.*student.safe_tasks"):
        match_arms(arms(), [])
