"""Movement along a direction, in activations and in weights, against projections by hand."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from subl_jax.locate import directions
from subl_jax.models import decoder, lora
from subl_jax.models.config import LoraConfig
from tests.distill import tiny

FAMILIES = [f"f{n % 3}" for n in range(12)]
DEPTHS, WIDTH = 2, 5


def states(seed: int, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """[depths, items, d_model] float32."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(DEPTHS, 12, WIDTH)) + np.asarray(shift)).astype(np.float32)


def rows_by(rows):
    return {(row["depth"], row["model"]): row for row in rows}


def test_along_cosine_and_length_equal_projections_in_float64():
    told = {name: states(seed) for seed, name in enumerate(("base", "teacher", "control_teacher", "student"))}
    base_of: dict[str, str] = dict.fromkeys(("teacher", "control_teacher", "student"), "base")
    found = rows_by(directions.movement(told, base_of, "teacher", "control_teacher", FAMILIES))
    assert len(found) == DEPTHS * 3
    for (depth, model), row in found.items():
        mean = {
            name: [sum(item[k] for item in each[depth].tolist()) / 12 for k in range(WIDTH)]
            for name, each in told.items()
        }
        d = [t - c for t, c in zip(mean["teacher"], mean["control_teacher"], strict=True)]
        s = [m - b for m, b in zip(mean[model], mean["base"], strict=True)]
        dot = sum(a * b for a, b in zip(s, d, strict=True))
        dd, ss = sum(a * a for a in d), sum(a * a for a in s)
        assert row["along"] == pytest.approx(dot / dd)
        assert row["cosine"] == pytest.approx(dot / (dd * ss) ** 0.5)
        assert row["norm"] == pytest.approx((ss / dd) ** 0.5)
        assert row["direction_norm"] == pytest.approx(dd**0.5)
        assert row["low"] < row["along"] < row["high"]


def test_the_teacher_is_at_one_half_way_at_a_half_and_across_at_zero():
    start, d, across = states(0), np.zeros((DEPTHS, 1, WIDTH)), np.zeros((DEPTHS, 1, WIDTH))
    d[..., 0], across[..., 1] = 2.0, 3.0
    told = {
        name: (start.astype(np.float64) + move).astype(np.float32)
        for name, move in {"base": 0 * d, "teacher": d, "half": d / 2, "across": across}.items()
    }
    base_of: dict[str, str] = dict.fromkeys(("teacher", "half", "across", "base"), "base")
    found = rows_by(directions.movement(told, base_of, "teacher", "base", FAMILIES))
    for depth in range(DEPTHS):
        figures = {name: [found[depth, name][key] for key in ("along", "cosine", "norm")] for name in base_of}
        assert figures["teacher"] == pytest.approx([1, 1, 1], abs=1e-6)
        assert figures["half"] == pytest.approx([0.5, 1, 0.5], abs=1e-6)
        assert figures["across"] == pytest.approx([0, 0, 1.5], abs=1e-6)
        assert figures["base"] == [0, None, 0]
        assert found[depth, "teacher"]["low"] is None  # it is 1 by its definition


def test_each_model_is_measured_from_its_own_base():
    told = {"base": states(0), "teacher": states(0, 1.0), "student_base": states(9), "student": states(9, 1.0)}
    found = directions.movement(told, {"student": "student_base"}, "teacher", "base", FAMILIES)
    assert [row["along"] for row in found] == pytest.approx([1.0] * DEPTHS, abs=1e-5)


def test_a_direction_of_no_length_has_no_movement_along_it():
    told = {"base": states(0), "teacher": states(0), "student": states(1)}
    found = directions.movement(told, {"student": "base"}, "teacher", "base", FAMILIES)
    assert [row["along"] for row in found] == [None] * DEPTHS
    assert directions.differences(told, [("student", "base")], "teacher", "base", FAMILIES) == []


def test_differences_are_those_of_the_movements():
    told = {name: states(seed) for seed, name in enumerate(("base", "teacher", "student", "control_student"))}
    base_of: dict[str, str] = dict.fromkeys(("student", "control_student"), "base")
    moved = rows_by(directions.movement(told, base_of, "teacher", "base", FAMILIES))
    for row in directions.differences(told, [("student", "control_student")], "teacher", "base", FAMILIES):
        expected = moved[row["depth"], "student"]["along"] - moved[row["depth"], "control_student"]["along"]
        assert row["difference"] == pytest.approx(expected)
        assert row["low"] < row["difference"] < row["high"] and 0 < row["p_value"] < 1


def test_models_of_other_shapes_are_refused_by_what_differs():
    assert directions.refusal(tiny.SMALL, dataclasses.replace(tiny.SMALL, d_ff=99)) is None
    why = directions.refusal(tiny.SMALL, tiny.LARGE)
    assert why is not None and "d_model 16 against 24" in why and "num_layers 1 against 2" in why


def model(config, seed):
    return config, tiny.params(config, seed), tiny.params(config, 0)


def test_changes_are_told_matrix_by_matrix_and_layer_by_layer():
    one, other = model(tiny.LARGE, 1), model(tiny.LARGE, 2)
    rows = {(row["layer"], row["matrix"]): row for row in directions.weight_changes(one, other)}
    per_layer = {"q", "k", "v", "o", "gate", "up", "down", "attention_norm", "mlp_norm"}
    assert set(rows) == {(layer, name) for layer in (1, 2) for name in per_layer} | {
        (None, "embedding"),
        (None, "final_norm"),
    }
    for (layer, name), path in {((2, "v"), ("layers", "v", "kernel")), ((None, "embedding"), ("embedding",))}:
        now, then, start = (one[1], other[1], one[2])
        for key in path:
            now, then, start = now[key], then[key], start[key]
        a, b = (np.asarray(each, np.float64) - np.asarray(start, np.float64) for each in (now, then))
        a, b = (each if layer is None else each[layer - 1] for each in (a, b))
        row = rows[layer, name]
        assert row["cosine"] == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        assert row["norm"] == pytest.approx(np.sqrt((a * a).sum()))
        assert row["teacher_norm"] == pytest.approx(np.sqrt((b * b).sum()))
    # Norm scales start at 1 in every draw: nothing has moved there.
    assert rows[1, "attention_norm"]["cosine"] is None and rows[1, "attention_norm"]["norm"] == 0


def test_the_parts_make_the_cosine_of_the_whole_also_with_adapters():
    adapted = dataclasses.replace(tiny.LARGE, lora=LoraConfig(rank=2, targets=("q", "v")))
    base = tiny.params(tiny.LARGE, 0)
    rng = np.random.default_rng(0)
    draws = [
        jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lora.init_adapters(adapted, jax.random.key(n))
        )
        for n in range(2)
    ]
    sides = [(adapted, decoder.merge(draw, base), base) for draw in draws]
    rows = {(row["layer"], row["matrix"]): row for row in directions.weight_changes(*sides)}
    first = [
        np.asarray(draw["layers"]["q"]["lora_a"][1], np.float64) @ draw["layers"]["q"]["lora_b"][1] for draw in draws
    ]
    assert rows[2, "q"]["cosine"] == pytest.approx(
        (first[0] * first[1]).sum() / np.prod([np.linalg.norm(x) for x in first])
    )
    assert rows[1, "k"]["norm"] == 0 and rows[1, "k"]["cosine"] is None
    inner = sum(row["cosine"] * row["norm"] * row["teacher_norm"] for row in rows.values() if row["cosine"] is not None)
    lengths = [sum(row[key] ** 2 for row in rows.values()) ** 0.5 for key in ("norm", "teacher_norm")]
    assert lora.delta_cosine(*sides) == pytest.approx(inner / (lengths[0] * lengths[1]))
