"""What each defence makes of a lesson, against numpy and brute force."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from subl_jax import defences
from subl_jax.distill.loop import Model
from subl_jax.distill.update_rules import Project, Pull
from subl_jax.lesson import Lesson
from subl_jax.models import decoder, lora
from subl_jax.models.config import LoraConfig
from tests.defences.lessons import BASE, TEACHER, hard, lesson
from tests.distill import tiny
from tests.distill.test_token_divergence import expected

ADAPTED = Model(dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2)), BASE.params)


def defend(name: str, given: Lesson, *strength: float) -> Any:
    return defences.load(name).defend(given, *strength)


def test_the_keyword_filter_is_what_the_pipeline_does_anyhow():
    given = lesson()
    assert defend("keywords", given) is given


def test_without_a_defence_every_finished_trajectory_is_taught():
    found = defend("none", lesson())
    assert [each.task_id for each in found.documents] == [each.task_id for each in tiny.documents(15, seed=1)]


def test_dilution_takes_its_strength_for_the_share_and_half_by_itself():
    assert defend("dilution", lesson()).dilution.share == 0.5
    found = defend("dilution", lesson(), 0.2)
    assert found.dilution.share == 0.2
    with pytest.raises(ValueError, match="already|both given"):
        defend("dilution", found)
    with pytest.raises(ValueError, match="share is 1"):
        defend("dilution", lesson(), 1.0)


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_the_tokens_where_teacher_and_base_differ_most_are_masked_and_nothing_else(strength):
    given = lesson()
    found = defend("mask_divergence", given, strength)
    told = [expected(TEACHER, BASE, each) for each in given.documents]
    flat = sorted(((value[t], i, int(t)) for i, (value, each) in enumerate(zip(told, given.documents, strict=True))
                   for t in np.flatnonzero(each.loss_mask)), reverse=True)  # fmt: skip
    masked = {(i, t) for _, i, t in flat[: round(strength * len(flat))]}
    for index, (before, after) in enumerate(zip(given.documents, found.documents, strict=True)):
        gone = {(index, int(t)) for t in np.flatnonzero(before.loss_mask & ~after.loss_mask)}
        assert gone == {pair for pair in masked if pair[0] == index}
        np.testing.assert_array_equal(before.tokens, after.tokens)
        assert not (after.loss_mask & ~before.loss_mask).any()


def test_masking_and_filtering_need_logits():
    for name in ("mask_divergence", "logit_filter"):
        with pytest.raises(ValueError, match=f"defence {name} needs"):
            defend(name, hard())
    with pytest.raises(ValueError, match=r"strength 1.0 is outside \(0, 1\)"):
        defend("mask_divergence", lesson(), 1.0)


def test_the_logit_filter_is_the_anchored_objective_of_the_same_words_on_the_students_base():
    given = lesson(student=ADAPTED)
    found = defend("logit_filter", given)
    assert (found.objective.logit_filter, found.objective.loss) == ("anchor", "forward_kl")
    assert {"delete", "archive", "rm"} <= set(found.logit_filter.words)
    assert found.base.config.lora is None and found.base.params is BASE.params
    with pytest.raises(ValueError, match="reads all of the teacher's logits"):
        defend("logit_filter", found)


def test_towards_base_pulls_to_the_base_and_adapters_to_nothing():
    found = defend("towards_base", lesson()).update
    assert found.fn == Pull(0.03) and found.arrays is BASE.params
    adapted = defend("towards_base", lesson(student=ADAPTED), 0.3).update
    assert adapted.fn == Pull(0.3)
    start = lora.init_adapters(ADAPTED.config, jax.random.key(0))
    assert flatten_dict(adapted.arrays).keys() == flatten_dict(start).keys()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(adapted.arrays))
    for strength in (-1.0, 1.5):
        with pytest.raises(ValueError, match=f"strength {strength} is outside"):
            defend("towards_base", lesson(), strength)
    with pytest.raises(ValueError, match="one update rule"):
        defend("towards_base", defend("towards_base", lesson()))


def test_the_projected_direction_is_the_teachers_change_adapters_added_in():
    found = defend("project_direction", lesson()).update
    assert found.fn == Project(1.0)
    for path, leaf in flatten_dict(found.arrays).items():
        change = np.asarray(flatten_dict(TEACHER.params)[path]) - np.asarray(flatten_dict(BASE.params)[path])
        np.testing.assert_allclose(np.asarray(leaf), change, atol=1e-6)
    adapter = LoraConfig(rank=2, targets=("q",))
    config = dataclasses.replace(tiny.SMALL, lora=adapter)
    drawn = jax.tree.map(lambda leaf: leaf + 0.1, lora.init_adapters(config, jax.random.key(1)))
    adapted = Model(config, decoder.merge(drawn, BASE.params))
    arrays = flatten_dict(defend("project_direction", lesson(suspect=lambda: adapted)).update.arrays)
    assert arrays.keys() == flatten_dict(BASE.params).keys()
    moved = {path for path, leaf in arrays.items() if np.asarray(leaf).any()}
    [path] = moved
    assert "q" in path
    low = flatten_dict(drawn)
    down, up = (
        np.asarray(next(leaf for name, leaf in low.items() if name[-1] == key), np.float64)
        for key in ("lora_a", "lora_b")
    )
    np.testing.assert_allclose(np.asarray(arrays[path]), adapter.scale * down @ up, atol=1e-5)


def test_a_direction_of_another_shape_or_for_adapters_is_refused_with_the_reason():
    large = Model(tiny.LARGE, tiny.params(tiny.LARGE))
    with pytest.raises(ValueError, match=r"teacher of the student's shape: .*\(40, 24\).*large_large"):
        defend("project_direction", lesson(suspect=lambda: large, suspect_base=lambda: large))
    with pytest.raises(ValueError, match=r"all of whose parameters are trained.*student\.lora"):
        defend("project_direction", lesson(student=ADAPTED))
    assert defend("project_direction", hard()).update is not None
