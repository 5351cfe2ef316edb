"""Models at another temperature, the pairing of students with their controls, and what options are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from subl_jax.distill.loop import Model
from subl_jax.locate import seed
from subl_jax.locate.passes import next_tokens
from subl_jax.models import decoder
from subl_jax.models.config import LoraConfig
from tests.distill import tiny
from tests.models.test_decoder import parameters


@pytest.mark.parametrize(
    "config", [tiny.SMALL, dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2, targets=("q", "head")))]
)
def test_a_softened_model_has_its_logits_divided_by_the_temperature(config):
    model = Model(config, parameters(config))
    texts, places = [[3, 1, 4, 1, 5]], [[1, 4]]
    everything = [list(range(tiny.VOCAB))] * 2
    hot, cold = (next_tokens(seed._softened(model, heat), texts, places, everything).listed for heat in (2.5, 1.0))
    scores = cold.astype(np.float64) / 2.5
    expected = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(hot, expected, rtol=1e-4, atol=1e-4)
    assert decoder.count_parameters(model.params) == decoder.count_parameters(seed._softened(model, 2.0).params)


def test_students_of_the_biased_teacher_are_paired_with_the_control_of_their_own_arm():
    names = ("student", "control_student", "benign_student", "student_hard", "control_student_anchor")
    there = {name: "base" for name in names}
    assert seed._controlled(there) == [("student", "control_student")]
    there |= {"control_student_hard": "base"}
    assert seed._controlled(there)[1:] == [("student_hard", "control_student_hard")]


@pytest.mark.parametrize(("name", "value"), [("tasks", 1), ("documents", -1), ("shown", 0), ("top", 0)])
def test_nothing_to_look_at_is_refused_by_its_flag(name, value):
    with pytest.raises(ValueError, match=f"--{name}={value} must be at least"):
        seed.Options(**{name: value})
