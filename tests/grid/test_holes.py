"""Holes, damaged cells, invalid runs and mixed origins: each is named, and none is averaged over."""

from __future__ import annotations

import json

import numpy as np
import pytest

from subl_jax import artifacts
from subl_jax.grid import cells
from tests.grid import fake_cells
from tests.grid.made import (
    FEW,
    SAFE,
    SEEDS,
    TASKS,
    analysed,
    by_place,
    differences,
    original,
    readout_of,
    rewrite,
)


def _absent(path):
    path.unlink()


def _cut(path):
    path.write_text(path.read_text()[:-300])


def _edited(path):
    path.write_text(path.read_text().replace('"D"', '"E"', 1).replace("final", "finale", 1))


def _other_preset(path):
    body = artifacts.unseal(path)
    artifacts.write_json_atomic(path, artifacts.sealed(body | {"preset": "micro"}))


def _other_tasks(path):
    seed, model = int(path.parent.name[5:]), path.stem
    row = fake_cells.evaluation("api", "student", seed, 0.9, 0.0, tasks=TASKS + 7, safe=SAFE)
    rewrite(path.parent.parent.parent, seed, model, row)


DAMAGES = {
    _absent: "not run", _cut: "corrupted", _edited: "corrupted", _other_preset: "of another configuration",
    _other_tasks: "evaluated on other tasks",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_hole_is_named_and_takes_its_seed_out_of_its_pair_alone(few, document, damage):
    damage(cells.cell_path(few, "api", 1, "student@large_small"))
    found = analysed(few)
    assert [(line["pair"], line["seed"], line["condition"]) for line in found["missing"]] == [
        ("large_small", 1, "student")
    ]
    assert found["missing"][0]["why"].startswith(DAMAGES[damage])
    assert not found["complete"]
    whole, holed = found["rows"][:2]
    assert (whole["seeds"], holed["seeds"]) == ([0, 1, 2], [0, 2])
    assert whole["missing"] == [] and [line["seed"] for line in holed["missing"]] == [1]
    for line in by_place(found, pair="large_small"):  # all conditions of the pair lose the seed, not only the student
        assert line["seeds"] == [0, 2]
        by_seed = differences("large_small", line["treatment"], line["control"], line["readout"], (0, 2))
        assert line["difference"] == pytest.approx(by_seed.mean(), rel=1e-6, abs=1e-12)
    assert holed["conditions"]["teacher"]["behaviour_rate"] == pytest.approx(
        np.mean([readout_of(original(seed, "large_small", "teacher"), "behaviour") for seed in (0, 2)])
    )
    assert {cell["seed"] for cell in found["cells"] if cell["pair"] == "large_small"} == {0, 2}
    assert found["between"][0]["seeds"] == [0, 2]
    assert "over 2 of 3 seeds" in found["strongest"][0]["verdict"]
    before = {line["name"]: line["difference"] for line in by_place(document, pair="large_large")}
    assert {line["name"]: line["difference"] for line in by_place(found, pair="large_large")} == before


def test_a_model_that_pairs_share_is_missing_in_each_of_them(few):
    cells.cell_path(few, "api", 2, "teacher").unlink()
    found = analysed(few)
    assert [(line["pair"], line["model"]) for line in found["missing"]] == [(name, "teacher") for name in FEW]
    assert [row["seeds"] for row in found["rows"]] == [[0, 1]] * 3  # the control row is of large_large


def test_a_pair_without_a_whole_seed_is_listed_and_has_no_figures(few):
    for seed in SEEDS:
        cells.cell_path(few, "api", seed, "benign_student_hard@large_small").unlink()
    found = analysed(few)
    row = found["rows"][1]
    assert (row["pair"], row["seeds"], row["conditions"], row["valid"]) == ("large_small", [], {}, False)
    assert [line["seed"] for line in row["missing"]] == list(SEEDS) and "No answer" in row["answer"]
    assert not by_place(found, pair="large_small")
    assert found["between"][0]["p_value"] is None and found["between"][0]["difference"] is None
    assert (
        not found["strongest"][0]["holds"] and "no seed in common with large_large" in found["strongest"][0]["verdict"]
    )


def test_a_grid_of_which_nothing_was_run_lists_all_of_it(tmp_path):
    found = analysed(tmp_path)
    assert len(found["missing"]) == 3 * (11 + 10) + 2 * 3
    assert [row["seeds"] for row in found["rows"]] == [[]] * 3
    assert found["contrasts"] == [] and found["cells"] == [] and not found["complete"]
    json.dumps(found, allow_nan=False)


def test_cells_of_another_hash_are_not_used(few):
    hashes = {("api", seed, "student"): f"api-{seed}-student" for seed in SEEDS} | {("api", 0, "student"): "of today"}
    found = analysed(few, hashes=hashes)
    (line,) = found["missing"]
    assert line["why"] == "of another configuration: hash api-0-student, not of today"
    assert found["rows"][0]["seeds"] == [1, 2]


def test_a_failed_positive_control_makes_every_pair_of_its_teacher_invalid(few):
    for seed in SEEDS:
        row = original(seed, "large_large", "base")
        rewrite(few, seed, "positive_student", row | {"condition": "positive_student"})
    found = analysed(few, pairs=(*FEW, "small_small", "small_large"))
    judged = {row["pair"]: row["valid"] for row in found["rows"]}
    assert judged == {
        "large_large": False,
        "large_small": False,
        "small_small": True,
        "small_large": True,
        "control": False,
    }
    assert all("positive control did not transfer" in row["answer"] for row in found["rows"] if row["pair"] in FEW)
    assert not any(claim["holds"] for claim in found["strongest"])
    assert "invalid: large_large, large_small" in found["strongest"][0]["verdict"]


def test_the_positive_control_of_a_pair_is_that_of_its_teacher(document):
    assert not any("positive control was not run" in text for row in document["rows"] for text in row["validity"])
    owners = {line["pair"] for line in by_place(document, role="positive_control")}
    assert owners == {"large_large", "small_small"}


def test_a_leak_and_unknown_counts_make_a_pair_invalid(few):
    path = cells.sanitizer_path(few, "api", 0)
    arms = artifacts.unseal(path)["arms"]
    arms["teacher"]["leaks"] = 2
    cells.write_sanitizer(path, arms, setting="api", seed=0, hash="s")
    cells.sanitizer_path(few, "api", 1, "sanitize@small").unlink()
    found = analysed(few, pairs=(*FEW, "small_small"))
    rows = {row["pair"]: row for row in found["rows"]}
    assert found["sanitizer"]["api"]["leaks"] == 2 and "seed=2/teacher@small" in found["sanitizer"]["api"]["by_source"]
    assert not rows["large_small"]["valid"] and "2 keyword leaks" in rows["large_small"]["answer"]
    assert not rows["small_small"]["valid"] and "at seed 1 is not known" in rows["small_small"]["validity"][0]
    assert rows["small_small"]["seeds"] == list(SEEDS)
    assert [(line["condition"], line["model"]) for line in found["missing"]] == [("sanitize", "sanitize@small")]


def test_a_readout_that_some_seeds_lack_is_left_out_with_a_note(few):
    row = original(1, "large_large", "student")
    row["readouts"] |= {"delta_cosine": None, "divergence_from_teacher": None}
    rewrite(few, 1, "student", row)
    found = analysed(few)
    assert found["notes"] == [
        f"api student: {name} is missing at seed 1 and left out."
        for name in ("delta_cosine", "divergence_from_teacher")
    ]
    for name in ("delta_cosine", "divergence_from_teacher"):
        shown = {c["seed"]: c[name] for c in found["cells"] if c["model"] == "student"}
        assert shown == {0: None, 1: None, 2: None}
    assert found["rows"][0]["conditions"]["student"]["delta_norm"] is not None


def test_mixed_machines_and_versions_are_told(few, document):
    assert document["notes"] == [] and document["machines"] == [fake_cells.MACHINE]
    changed = {"versions": fake_cells.VERSIONS | {"jax": "0.9.0"}, "machine": "one H100"}
    rewrite(few, 0, "student", original(0, "large_large", "student"), **changed)
    found = analysed(few)
    assert len(found["versions"]) == len(found["machines"]) == 2
    assert (
        found["notes"][0].startswith("Cells come from 2 machines: 2 CPU cores (")
        and "one H100 (1)" in found["notes"][0]
    )
    assert "different versions of jax: 0.10.2 (" in found["notes"][1] and "0.9.0 (1)" in found["notes"][1]
