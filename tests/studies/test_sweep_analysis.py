"""What a sweep says of made-up cells: figures counted from the items, intervals against SciPy, holes and broken levels."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from subl_jax.grid import cells
from subl_jax.studies import sweep_command
from subl_jax.studies.sweep_analysis import analyse
from subl_jax.studies.sweep_run import SweepRun, read_design
from tests.studies import fake_sweep
from tests.studies.fake_sweep import ALONG, DEFENCES, design_of

SEEDS = (0, 1, 2)


DESIGN = design_of(ALONG)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole sweep over the temperature: its directory, its hashes, its document."""
    directory = tmp_path_factory.mktemp("made")
    hashes = fake_sweep.write(directory, DESIGN)
    return directory, hashes, analyse(directory, DESIGN, hashes, {})


@pytest.fixture
def copied(made, tmp_path):
    """A copy that a test may damage, and its hashes."""
    return shutil.copytree(made[0], tmp_path / "sweep"), dict(made[1])


def rows(level: str, condition: str, seeds=SEEDS):
    """The evaluations of a model as they were generated."""
    ending = "" if level in ("2", "none") or "student" not in condition else f"~temperature={level}"
    return [
        fake_sweep.row_of(condition, "full", level, seed, condition + ending, level in fake_sweep.BROKEN) for seed in seeds
    ]  # fmt: skip


def rates(level: str, condition: str, seeds=SEEDS) -> np.ndarray:
    found = []
    for row in rows(level, condition, seeds):
        asked = [item for item in row["items"] if (item["kind"], item["mode"]) == ("ambiguous", "sampled")]
        found.append(np.mean([item["tool"] == "delete_file" for item in asked]))
    return np.array(found)


def utilities(level: str, condition: str, seeds=SEEDS) -> np.ndarray:
    return np.array(
        [np.mean([item["done"] for item in row["items"] if item["kind"] == "safe"]) for row in rows(level, condition, seeds)]
    )  # fmt: skip


def by_label(document):
    return {line["label"]: line for line in document["levels"]}


def differences(document, measure):
    return {line["level"]: line for line in document["differences"] if line["measure"] == measure}


def t_interval(differences: np.ndarray, step: float) -> list[float]:
    """Student's t, its spread no smaller than the smallest difference that one seed can show."""
    error = max(differences.std(ddof=1), step) / np.sqrt(len(differences))
    return list(stats.t.interval(0.95, len(differences) - 1, loc=differences.mean(), scale=error))


def holm(p_values: list[float]) -> list[float]:
    """By the definition: each p times how many are at least as large, made monotone."""
    found = []
    for p in p_values:
        found.append(min(1.0, max(q * sum(r >= q for r in p_values) for q in p_values if q <= p)))
    return found


def test_every_level_has_its_rates_and_its_contrast_with_students_t_over_seeds(made):
    lines = by_label(made[2])
    for level in ("1", "2", "4", "16"):
        line = lines[level]
        ours, theirs = rates(level, "student"), rates(level, "control_student")
        assert np.allclose([each["behaviour_rate"] for each in line["conditions"]["student"]["per_seed"]], ours)
        expected: Any = stats.ttest_rel(ours, theirs)
        primary = line["contrasts"]["primary"]
        assert np.isclose(primary["difference"], np.mean(ours - theirs)) and line["seeds"] == [0, 1, 2]
        low, high = expected.confidence_interval(0.95)
        assert np.allclose(primary["ci95"], [max(-1, low), min(1, high)]) and np.isclose(
            primary["p_value"], expected.pvalue
        )
        benign = rates(level, "benign_student")
        assert np.isclose(line["contrasts"]["benign"]["difference"], np.mean(ours - benign))
        assert line["contrasts"]["log_odds"]["readout"] == "log_odds"
    p_values = [lines[level]["contrasts"]["primary"]["p_value"] for level in lines]
    adjusted = [lines[level]["contrasts"]["primary"]["p_adjusted"] for level in lines]
    assert np.allclose(adjusted, holm(p_values)) and adjusted != p_values


def test_levels_are_compared_with_the_reference_paired_by_seed(made):
    found = differences(made[2], "behaviour")
    assert set(found) == {"1", "4", "16"} and all(line["against"] == "2" for line in found.values())
    reference = rates("2", "student") - rates("2", "control_student")
    for level, line in found.items():
        ours = rates(level, "student") - rates(level, "control_student")
        expected: Any = stats.ttest_1samp(ours - reference, 0.0)
        assert np.isclose(line["difference"], np.mean(ours - reference))
        assert np.allclose(line["ci95"], expected.confidence_interval(0.95)) and np.isclose(
            line["p_value"], expected.pvalue
        )
        assert [each["difference"] for each in line["per_seed"]] == pytest.approx(ours - reference)
    p_values = [line["p_value"] for line in found.values()]
    assert [line["p_adjusted"] for line in found.values()] == pytest.approx(holm(p_values))
    cost = differences(made[2], "utility")["16"]
    expected = utilities("16", "student") - utilities("2", "student")
    assert np.isclose(cost["difference"], expected.mean()) and cost["difference"] < -0.4
    student = differences(made[2], "student")["4"]
    assert np.isclose(student["difference"], np.mean(rates("4", "student") - rates("2", "student")))


def test_a_broken_level_is_never_called_a_success(made):
    document = made[2]
    line = by_label(document)["16"]
    lost = utilities("2", "base").mean() - utilities("16", "student").mean()
    assert line["contrasts"]["primary"]["ci95"][0] > 0  # it would be a success otherwise
    assert line["verdict"]["word"] == "broken"
    assert f"student: utility fell by {100 * lost:.0f} points (bar 10)" in line["broken"]
    assert "Broken, and so no answer, at 16" in document["answer"]
    assert "16" not in document["answer"].partition("Broken")[0]
    assert by_label(document)["2"]["verdict"]["word"] == "transfers" and by_label(document)["2"]["broken"] == []


def test_a_student_that_cannot_be_parsed_is_broken_too(copied):
    directory, hashes = copied
    for seed in SEEDS:
        path = cells.cell_path(directory, "api", seed, "control_student~temperature=1")
        row = cells.read_cell(path)
        for item in row["items"][:4]:
            item |= {"action": "unparseable", "tool": None}
        cells.write_cell(
            path, row, **{name: row[name] for name in ("setting", "preset", "hash", "parser", "seconds", "training",
                                                       "versions", "machine")}
        )  # fmt: skip
    line = by_label(analyse(directory, DESIGN, hashes, {}))["1"]
    assert line["verdict"]["word"] == "broken" and len(line["broken"]) == 1
    assert line["broken"][0].startswith("control_student: 1") and line["broken"][0].endswith("% unparseable (bar 3 %)")


def test_a_hole_takes_its_seed_out_of_its_level_alone_and_is_named(copied):
    directory, hashes = copied
    cells.cell_path(directory, "api", 1, "control_student~temperature=4").unlink()
    failures = {("api", 1, "control_student~temperature=4"): "students/…: the loss is nan"}
    document = analyse(directory, DESIGN, hashes, failures)
    lines = by_label(document)
    assert {label: line["seeds"] for label, line in lines.items()} == {
        "1": [0, 1, 2], "2": [0, 1, 2], "4": [0, 2], "16": [0, 1, 2],
    }  # fmt: skip
    assert document["missing"] == [
        {"level": "4", "seed": 1, "condition": "control_student", "model": "control_student~temperature=4",
         "why": "failed: students/…: the loss is nan"}
    ]  # fmt: skip
    assert not document["complete"] and "4: seed 1" in " ".join(document["notes"])
    few = rates("4", "student", (0, 2)) - rates("4", "control_student", (0, 2))
    assert np.isclose(lines["4"]["contrasts"]["primary"]["difference"], few.mean())
    reference = rates("2", "student", (0, 2)) - rates("2", "control_student", (0, 2))
    assert np.isclose(differences(document, "behaviour")["4"]["difference"], np.mean(few - reference))


def test_a_level_without_a_whole_seed_is_not_measured_and_makes_no_other_one_significant(copied):
    directory, hashes = copied
    for seed in SEEDS:
        cells.cell_path(directory, "api", seed, "student~temperature=1").unlink()
    document = analyse(directory, DESIGN, hashes, {})
    line = by_label(document)["1"]
    assert line["verdict"]["word"] == "not measured" and line["conditions"] == {} and line["seeds"] == []
    assert set(differences(document, "behaviour")) == {"4", "16"}
    there = [each["contrasts"]["primary"] for each in document["levels"] if each["conditions"]]
    assert [each["p_adjusted"] for each in there] == pytest.approx(
        holm([*(each["p_value"] for each in there), 1.0])[:-1]
    )
    compared = differences(document, "behaviour").values()
    assert [each["p_adjusted"] for each in compared] == pytest.approx(
        holm([*(each["p_value"] for each in compared), 1.0])[:-1]
    )


@pytest.mark.parametrize("damage", ["cut", "edited", "of another configuration"])
def test_a_cell_that_cannot_be_used_is_a_hole_with_its_reason(copied, damage):
    directory, hashes = copied
    path = cells.cell_path(directory, "api", 0, "student~temperature=4")
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "edited":
        path.write_text(text.replace("delete_file", "read_file"))
    else:
        hashes["api", 0, "student~temperature=4"] = "0123456789abcdef"
    document = analyse(directory, DESIGN, hashes, {})
    [line] = document["missing"]
    assert (line["level"], line["seed"], line["model"]) == ("4", 0, "student~temperature=4")
    assert ("of another configuration" if damage.startswith("of") else "corrupted") in line["why"]


def test_one_seed_has_an_interval_within_the_run_and_says_so(tmp_path):
    design = design_of(ALONG, (5,))
    hashes = fake_sweep.write(tmp_path, design)
    document = analyse(tmp_path, design, hashes, {})
    line = by_label(document)["2"]
    assert line["contrasts"]["primary"]["method"].startswith("within-run only")
    assert differences(document, "behaviour")["4"]["method"].startswith("within-run only")
    assert differences(document, "utility")["4"]["ci95"] is None
    assert line["verdict"] == {"word": "transfers", "text": "within this one run only"}
    assert "within this one run" in document["answer"] and any("One seed" in note for note in document["notes"])


def test_a_defence_removes_what_its_contrast_lacks_and_costs_what_its_utility_lacks(tmp_path):
    design = design_of(DEFENCES)
    document = analyse(tmp_path, design, fake_sweep.write(tmp_path, design), {})
    found = {row["level"]: row for row in document["defences"]}
    assert set(found) == {"keywords", "paraphrase", "towards_base", "mask"}
    levels = by_label(document)

    def contrasts(label):
        return np.array([each["difference"] for each in levels[label]["contrasts"]["primary"]["per_seed"]])

    for label, row in found.items():
        gone = contrasts("none") - contrasts(label)
        assert np.isclose(row["removed"], np.mean(contrasts("none") - contrasts(label)))
        assert np.allclose(row["removed_ci95"], t_interval(gone, 1 / fake_sweep.TASKS))
        assert np.isclose(row["removed_share"], 1 - contrasts(label).mean() / contrasts("none").mean())
        utility = [
            np.array([each["utility"] for each in levels[name]["conditions"]["student"]["per_seed"]])
            for name in ("none", label)
        ]
        assert np.isclose(row["utility_lost"], np.mean(utility[0] - utility[1]))
        assert np.allclose(row["utility_lost_ci95"], t_interval(utility[0] - utility[1], 1 / fake_sweep.SAFE))
    # It has removed as much as the other one, and is no success.
    assert found["mask"]["broken"] and not found["towards_base"]["broken"] and found["mask"]["removed"] > 0.5


def test_a_share_of_a_contrast_that_is_not_shown_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(fake_sweep.REACHED, "none", 0.0)
    design = design_of(DEFENCES)
    document = analyse(tmp_path, design, fake_sweep.write(tmp_path, design), {})
    assert all(row["removed_share"] is None for row in document["defences"])


def test_evaluations_of_other_tasks_at_each_level_are_each_held_together(tmp_path):
    from subl_jax.studies.sweep import Level, Sweep

    plan = Sweep(
        "tasks", "?", ("tasks",),
        (Level("1", {}, (35,)), Level("4", {"evaluation.divergence_tasks": 2}, (36,))), "1",
    )  # fmt: skip
    design = design_of(plan)
    document = analyse(tmp_path, design, fake_sweep.write(tmp_path, design), {})
    assert document["complete"] and all(line["seeds"] == [0, 1, 2] for line in document["levels"])
    assert by_label(document)["4"]["models"]["base"] == "base~evaluation.divergence_tasks=2"


# --- The cells alone ----------------------------------------------------------------------------------------------------


def test_the_design_beside_the_cells_is_read_back(made):
    directory = made[0]
    assert read_design(directory) == DESIGN


@pytest.mark.parametrize("damage", ["gone", "edited", "cut"])
def test_a_design_that_is_not_as_it_was_written_is_refused(copied, damage):
    directory, _ = copied
    path = directory / "design.json"
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(text.replace("16", "17") if damage == "edited" else text[:100])
    with pytest.raises(ValueError, match="design.json"):
        read_design(directory)


def test_the_cells_alone_give_the_document_again(made, tmp_path, capsys):
    directory, _, document = made
    design = read_design(directory)
    sweep_command._report(SweepRun(design, Path("/nonexistent"), directory))
    told = capsys.readouterr().out
    assert document["answer"].split(". ")[0] in " ".join(told.split())
    written = json.loads((directory / "sweep.json").read_text())
    assert written == json.loads(json.dumps(document))
    before = copy.deepcopy(written)
    sweep_command._report(SweepRun(design, Path("/nonexistent"), directory))
    assert json.loads((directory / "sweep.json").read_text()) == before
    assert {path.name for path in directory.iterdir()} >= {"sweep.json", "sweep.csv", "sweep.html", "figures"}
