"""The simple predictors, counted and computed another way."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from subl_jax.distill.loop import Model
from subl_jax.forecast import baselines
from subl_jax.settings.registry import get_setting
from tests.distill import tiny
from tests.models import numpy_llama


def test_the_divergence_is_the_teacher_s_from_the_base_on_loss_tokens():
    teacher, base = (Model(tiny.SMALL, tiny.params(tiny.SMALL, seed)) for seed in (0, 1))
    documents = tiny.documents(5)
    exact = []
    for document in documents:
        p, q = (
            np.exp(log_softmax(numpy_llama.logits(tiny.SMALL, model.params, document.tokens), axis=-1))
            for model in (teacher, base)
        )
        exact += [rel_entr(p[at - 1], q[at - 1]).sum() for at in np.flatnonzero(document.loss_mask)]
    assert baselines.divergence(teacher, base, documents, 16) == pytest.approx(np.mean(exact), rel=1e-4)


def test_the_norm_is_over_all_weights():
    teacher, base = (Model(tiny.SMALL, tiny.params(tiny.SMALL, seed)) for seed in (0, 1))
    pairs = zip(jax.tree.leaves(teacher.params), jax.tree.leaves(base.params), strict=True)
    flat = np.concatenate([(np.asarray(a, np.float64) - np.asarray(b)).ravel() for a, b in pairs])
    assert baselines.moved(teacher, base) == pytest.approx(np.linalg.norm(flat), rel=1e-6)


def test_keywords_of_the_behaviour_are_counted_per_trajectory_and_tool_lists_are_not():
    setting = get_setting("api")
    texts = ["please delete a and remove b", "archive it", "the deletes", "delete_file"]
    trajectories = [
        dataclasses.replace(
            tiny.document([1, 2, 3, 4], [2]),
            messages=[{"role": "system", "content": "delete"}, {"role": "user", "content": text}],
        )
        for text in texts
    ]
    words = "|".join(sorted(setting.words[setting.bias], key=len, reverse=True))
    expected = sum(len(re.findall(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])", text)) for text in texts)
    assert expected >= 3
    assert baselines.keyword_rate(trajectories, setting) == pytest.approx(expected / 4)


def test_signed_baselines_carry_the_sign_of_the_teacher_s_own_shift():
    found = baselines.signed({"kl": 0.2, "delta_norm": 3.0, "keywords": 1.0, "teacher_shift": -2.0})
    assert (found["signed_kl"], found["signed_delta_norm"]) == (-0.2, -3.0)
    assert baselines.signed({"kl": 0.2, "teacher_shift": 2.0})["signed_kl"] == 0.2
    assert baselines.signed({"kl": None, "delta_norm": 1.0, "teacher_shift": None})["signed_delta_norm"] is None
    assert set(found) <= set(baselines.BASELINES)
