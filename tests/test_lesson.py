"""Doses, kept tokens and matched arms, against brute force on small made documents."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from subl_jax.data.matching import match_arms
from subl_jax.distill.train_config import TrainConfig
from subl_jax.lesson import dosed, keep_tokens, matched_again, with_room
from tests.distill import tiny

PAIRS = {(f"safe/train/x/0/{index}", 0) for index in range(40)}


def documents(seed: int, count: int = 8):
    found = tiny.documents(count, seed=seed)
    return [dataclasses.replace(each, task_id=f"safe/train/x/0/{index}") for index, each in enumerate(found)]


def loss_tokens(group) -> int:
    return sum(int(each.loss_mask.sum()) for each in group)


def test_smaller_doses_are_part_of_larger_ones_and_seeds_draw_different_ones():
    nested = [dosed(PAIRS, count, 3) for count in (1, 5, 20, 40)]
    assert [len(each) for each in nested] == [1, 5, 20, 40]
    assert all(small < large for small, large in itertools.pairwise(nested))
    assert dosed(PAIRS, 0, 3) == nested[-1] == PAIRS
    assert dosed(PAIRS, 20, 4) != nested[2]


def test_a_dose_depends_on_the_tasks_alone_so_every_arm_draws_the_same():
    assert dosed(sorted(PAIRS), 7, 3) == dosed(sorted(PAIRS, reverse=True), 7, 3)
    # A task that is drawn of many is drawn of fewer too, as long as it is there.
    fewer = PAIRS - {("safe/train/x/0/0", 0)}
    assert dosed(PAIRS, 7, 3) - {("safe/train/x/0/0", 0)} <= dosed(fewer, 7, 3)


def test_a_dose_beyond_what_survives_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"trajectories=41, but 40 trajectories survive.*safe_tasks"):
        dosed(PAIRS, 41, 0)


def test_divergent_tokens_are_the_largest_of_all_documents_together_and_others_are_the_rest():
    group = documents(1)
    rng = np.random.default_rng(0)
    values = [rng.random(len(each.tokens)).astype(np.float32) for each in group]
    kept = keep_tokens(group, values, "divergent", 0.25, 0)
    rest = keep_tokens(group, values, "others", 0.25, 0)
    flat = sorted(((float(v[t]), i, t) for i, (v, d) in enumerate(zip(values, group, strict=True))
                   for t in np.flatnonzero(d.loss_mask)), reverse=True)  # fmt: skip
    best = {(i, t) for _, i, t in flat[: round(0.25 * len(flat))]}
    for index, (document, own, other) in enumerate(zip(group, kept, rest, strict=True)):
        assert {(index, t) for t in np.flatnonzero(own.loss_mask)} == {pair for pair in best if pair[0] == index}
        np.testing.assert_array_equal(own.loss_mask | other.loss_mask, document.loss_mask)
        assert not (own.loss_mask & other.loss_mask).any()
        np.testing.assert_array_equal(own.tokens, document.tokens)
    assert any(not each.loss_mask.any() for each in kept)  # a document stays, as context


def test_random_tokens_are_as_many_and_the_same_places_in_arms_of_as_many_loss_tokens():
    matched = match_arms({"a": documents(1), "b": documents(2)}, {(d.task_id, 0) for d in documents(1)})
    drawn = {arm: keep_tokens(group, [], "random", 0.3, 5) for arm, group in matched.documents.items()}
    places = {
        arm: np.concatenate([own.loss_mask[d.loss_mask] for own, d in zip(group, matched.documents[arm], strict=True)])
        for arm, group in drawn.items()
    }
    np.testing.assert_array_equal(places["a"], places["b"])
    assert places["a"].sum() == round(0.3 * matched.loss_tokens)
    assert loss_tokens(keep_tokens(matched.documents["a"], [], "random", 0.3, 6)) == places["a"].sum()
    other = keep_tokens(matched.documents["a"], [], "random", 0.3, 6)
    assert any(not np.array_equal(x.loss_mask, y.loss_mask) for x, y in zip(other, drawn["a"], strict=True))


def test_at_least_one_token_is_kept_and_never_all():
    [one] = documents(1, 1)
    total, values = loss_tokens([one]), [np.zeros(len(one.tokens), np.float32)]
    assert loss_tokens(keep_tokens([one], values, "divergent", 0.001, 0)) == 1
    assert loss_tokens(keep_tokens([one], values, "others", 0.999, 0)) == 1
    assert loss_tokens(keep_tokens([one], values, "divergent", 0.999, 0)) == total - 1
    bare = dataclasses.replace(one, loss_mask=np.zeros(len(one.tokens), bool))
    with pytest.raises(ValueError, match="0 loss tokens in 1 documents"):
        keep_tokens([bare], values, "divergent", 0.5, 0)


def test_arms_that_a_defence_has_thinned_by_a_share_keep_their_choice_and_stay_equal():
    arms = {"a": documents(1), "b": documents(2)}
    matched = match_arms(arms, {(d.task_id, 0) for d in arms["a"]})
    rng = np.random.default_rng(1)
    thinned = {
        arm: keep_tokens(group, [rng.random(len(d.tokens)) for d in group], "others", 0.4, 0)
        for arm, group in matched.documents.items()
    }
    again = matched_again(thinned)
    assert again.loss_tokens == loss_tokens(thinned["a"]) == loss_tokens(thinned["b"])
    for arm, group in again.documents.items():
        for one, other in zip(group, sorted(thinned[arm], key=lambda d: d.task_id), strict=True):
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    assert again.planned_lengths == matched.planned_lengths
    assert set(again.cut.values()) == {0.0}


def test_arms_of_another_text_are_cut_to_the_tasks_and_loss_tokens_that_all_have():
    arms = {"a": documents(1), "b": documents(2)[2:], "c": documents(3)}
    again = matched_again(arms)
    tasks = [[d.task_id for d in group] for group in again.documents.values()]
    assert tasks[0] == tasks[1] == tasks[2] and len(tasks[0]) == 6
    for row in zip(*again.documents.values(), strict=True):
        assert len({int(d.loss_mask.sum()) for d in row}) == 1
    assert again.planned_lengths == [
        max(len(d.tokens) for d in row) for row in zip(*again.documents.values(), strict=True)
    ]
    with pytest.raises(ValueError, match="no task is left in all arms"):
        matched_again({"a": documents(1)[:2], "b": documents(2)[2:]})


def test_rows_grow_in_steps_that_kernels_like():
    assert with_room(TrainConfig(row_tokens=96), [97]).row_tokens == 128
    assert with_room(TrainConfig(row_tokens=256), [257]).row_tokens == 384
    assert with_room(TrainConfig(row_tokens=96), [96]).row_tokens == 96
