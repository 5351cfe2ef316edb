"""Rules on updates against numpy, alone and inside the compiled step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from subl_jax.checkpoint import CheckpointMismatch
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.run_identity import fingerprint
from subl_jax.distill.train_config import TrainConfig
from subl_jax.distill.update_rules import Project, Pull, UpdateRule, check_arrays
from subl_jax.models.config import LoraConfig
from tests.distill import tiny

MODEL = Model(tiny.SMALL, tiny.params(tiny.SMALL))
OTHER = tiny.params(tiny.SMALL, 5)
CONFIG = TrainConfig(
    steps=4, batch_rows=4, row_tokens=24, checkpoint_every=2, log_every=1,
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.05, warmup_steps=0, schedule="constant", clip_norm=100.0),
)  # fmt: skip


def trained(root: Path, **more: Any) -> Any:
    return train(
        more.pop("student", MODEL), tiny.documents(9), more.pop("config", CONFIG), Objective("hard_label"),
        seed=1, directory=root / "model", stage="s", logs=root, metadata={"run": 1}, **more,
    )  # fmt: skip


def arrays_of(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(tree).items()}


def test_a_projected_update_is_orthogonal_to_each_leafs_direction_and_keeps_the_rest():
    rng = np.random.default_rng(0)
    updates = {"a": rng.normal(size=(3, 4, 5)), "b": {"c": rng.normal(size=7), "d": rng.normal(size=(2, 2))}}
    along = {"a": rng.normal(size=(3, 4, 5)), "b": {"c": rng.normal(size=7), "d": np.zeros((2, 2))}}
    given = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (updates, along)]
    whole = arrays_of(Project(1.0)(given[0], None, given[1]))
    half = arrays_of(Project(0.5)(given[0], None, given[1]))
    for path, direction in arrays_of(along).items():
        before = arrays_of(updates)[path]
        length = np.linalg.norm(direction)
        if not length:
            np.testing.assert_allclose(whole[path], before, rtol=1e-6)
            continue
        unit = (direction / length).ravel()
        assert abs(whole[path].ravel() @ unit) < 1e-5
        np.testing.assert_allclose(half[path].ravel() @ unit, before.ravel() @ unit / 2, rtol=1e-4)
        basis = np.linalg.svd(unit[None])[2][1:]  # whatever is orthogonal to the direction stays
        np.testing.assert_allclose(basis @ whole[path].ravel(), basis @ before.ravel(), atol=1e-5)


def test_a_pull_shrinks_the_way_from_the_base_by_its_share_whatever_the_update():
    now, start = {"w": jnp.asarray([2.0, -4.0])}, {"w": jnp.asarray([1.0, 0.0])}
    pulled = Pull(0.25)({"w": jnp.asarray([0.5, 0.5])}, now, start)
    np.testing.assert_allclose(np.asarray(now["w"] + pulled["w"]), [2.0 + 0.5 - 0.25, -4.0 + 0.5 + 1.0])


def test_of_adapters_only_the_factors_b_are_pulled():
    ones = {"q_adapter": {"lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    found = Pull(0.5)(zeros, ones, zeros)["q_adapter"]
    assert not np.asarray(found["lora_a"]).any()
    np.testing.assert_allclose(np.asarray(found["lora_b"]), -0.5)


def test_inside_the_step_a_student_is_pulled_as_a_loop_of_single_steps_says(tmp_path):
    """SGD: the gradient at a point does not depend on the rule, so a step without it tells every update."""
    share, start = 0.2, arrays_of(MODEL.params)
    rule = UpdateRule(Pull(share), MODEL.params)
    found = arrays_of(trained(tmp_path / "pulled", update=rule, config=dataclasses.replace(CONFIG, steps=1)).params)
    plain = arrays_of(trained(tmp_path / "plain", config=dataclasses.replace(CONFIG, steps=1)).params)
    for path, leaf in found.items():  # nothing to pull back yet at the base itself
        np.testing.assert_allclose(leaf, plain[path], rtol=1e-6, atol=1e-7)
    aside = UpdateRule(Pull(share), OTHER)
    found = arrays_of(trained(tmp_path / "aside", update=aside, config=dataclasses.replace(CONFIG, steps=1)).params)
    for path, leaf in found.items():
        expected = plain[path] - share * (start[path] - np.asarray(flatten_dict(OTHER)[path], np.float64))
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


def test_a_student_whose_updates_are_projected_never_moves_along_the_direction(tmp_path):
    direction = jax.tree.map(lambda a, b: a - b, OTHER, MODEL.params)
    plain = arrays_of(trained(tmp_path / "plain").params)
    found = arrays_of(trained(tmp_path / "projected", update=UpdateRule(Project(1.0), direction)).params)
    start, moved = arrays_of(MODEL.params), 0
    for path, leaf in arrays_of(direction).items():
        if not leaf.any():
            continue
        unit = (leaf / np.linalg.norm(leaf)).ravel()
        free = abs((plain[path] - start[path]).ravel() @ unit)
        assert abs((found[path] - start[path]).ravel() @ unit) < 2e-6
        moved += free > 1e-4
    assert moved > 3


def test_a_rule_is_part_of_a_runs_identity(tmp_path):
    pull = UpdateRule(Pull(0.5), MODEL.params)
    short = dataclasses.replace(CONFIG, steps=3, checkpoint_every=1)
    trained(tmp_path, update=pull, config=short)
    longer = dataclasses.replace(short, steps=3)
    for other in (
        UpdateRule(Pull(0.25), MODEL.params),
        UpdateRule(Pull(0.5), OTHER),
        UpdateRule(Project(0.5), OTHER),
        None,
    ):
        with pytest.raises(CheckpointMismatch, match="update"):
            trained(tmp_path, update=other, config=longer)
    assert UpdateRule(Pull(0.5), OTHER).identity() == {"rule": "subl_jax.distill.update_rules.Pull", "strength": 0.5}
    assert fingerprint(OTHER) != fingerprint(MODEL.params)


def test_arrays_that_do_not_fit_what_is_trained_are_refused_by_name(tmp_path):
    adapted = Model(dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2)), MODEL.params)
    with pytest.raises(ValueError, match="one array for each parameter that is trained"):
        trained(tmp_path, student=adapted, update=UpdateRule(Pull(0.5), MODEL.params))
    with pytest.raises(ValueError, match=r"\['w'\] is \(2,\), and the trained parameter \(3,\)"):
        check_arrays({"w": np.zeros(2)}, {"w": np.zeros(3)})
