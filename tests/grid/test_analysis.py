"""The grid document against figures recomputed from the items with NumPy, SciPy and statsmodels."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from subl_jax.evaluate import statistics, verdicts
from subl_jax.evaluate.summary import build_summary
from subl_jax.experiment import make_protocol
from subl_jax.grid import between, cells
from subl_jax.grid.analysis import analyse
from subl_jax.grid.pairs import PAIRS
from subl_jax.presets import tiny
from subl_jax.settings.registry import get_setting
from tests.grid.fake_cells import fake_protocol
from tests.grid.made import (
    FEW,
    SEEDS,
    SIZES,
    TASKS,
    analysed,
    by_place,
    differences,
    original,
    rewrite,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _holm(p_values):
    adjusted: Any = multipletests(p_values, method="holm")[1]
    return list(adjusted)


def test_every_contrast_is_students_t_on_differences_counted_from_the_items(document):
    checked = 0
    for line in document["contrasts"]:
        pair = "large_large" if line["pair"] == "control" else line["pair"]
        by_seed = differences(pair, line["treatment"], line["control"], line["readout"])
        assert line["difference"] == pytest.approx(by_seed.mean(), rel=1e-6, abs=1e-12)
        assert [each["difference"] for each in line["per_seed"]] == pytest.approx(list(by_seed), rel=1e-6, abs=1e-12)
        assert line["seeds"] == [each["seed"] for each in line["per_seed"]] == list(SEEDS)
        if "floored" in line["method"]:
            assert by_seed.std(ddof=1) < 1 / TASKS
            continue
        checked += 1
        expected: Any = stats.ttest_1samp(by_seed, 0)
        assert line["p_value"] == pytest.approx(expected.pvalue, rel=1e-4)
        low, high = expected.confidence_interval(0.95)
        bound = np.inf if line["readout"] == "log_odds" else 1
        assert line["ci95"] == pytest.approx([max(-bound, low), min(bound, high)], rel=1e-4)
    assert checked > 60


def test_p_values_are_adjusted_across_the_pairs_of_one_comparison(document):
    families = defaultdict(dict)
    for line in document["contrasts"]:
        if line["pair"] != "control":
            models = tuple(PAIRS[line["pair"]].model(line[side]) for side in ("treatment", "control"))
            families[line["readout"], line["treatment"], line["control"]].setdefault(models, []).append(line)
    assert len(families["behaviour", "student", "control_student"]) == 6
    assert len(families["behaviour", "student_hard", "control_student_hard"]) == 7
    # Seven pairs have a large or a small teacher: two hypotheses.
    taught = families["behaviour", "teacher", "control_teacher"]
    assert {models: len(lines) for models, lines in taught.items()} == {
        ("teacher", "control_teacher"): 5, ("teacher@small", "control_teacher@small"): 2,
    }  # fmt: skip
    for hypotheses in families.values():
        expected = _holm([lines[0]["p_value"] for lines in hypotheses.values()])
        for lines, adjusted in zip(hypotheses.values(), expected, strict=True):
            assert [line["p_adjusted"] for line in lines] == pytest.approx([adjusted] * len(lines))


def test_an_incomplete_grid_is_never_more_significant_than_a_complete_one(few, document):
    for seed in SEEDS:
        for pair in ("small_small", "small_large", "large_foreign_init"):
            cells.cell_path(few, "api", seed, f"student_hard@{pair}").unlink()
    found = analysed(few, pairs=tuple(PAIRS))
    (line,) = by_place(found, pair="large_small", role="primary", arm="hard")
    left = [other["p_value"] for other in by_place(found, role="primary", arm="hard")]
    assert len(left) == 4
    assert line["p_adjusted"] == pytest.approx(_holm([*left, 1.0, 1.0, 1.0])[left.index(line["p_value"])])
    before = {(each["pair"], each["name"]): each["p_adjusted"] for each in document["contrasts"]}
    for each in found["contrasts"]:
        assert each["p_adjusted"] >= before[each["pair"], each["name"]] * (1 - 1e-9)
    for each in found["between"]:
        (whole,) = [o for o in document["between"] if (o["name"], o["arm"]) == (each["name"], each["arm"])]
        assert each["p_adjusted"] is None or each["p_adjusted"] >= whole["p_adjusted"] * (1 - 1e-9)


def test_pairs_that_were_left_out_of_a_frozen_grid_count_for_its_adjustment(whole):
    frozen = fake_protocol(seeds=SEEDS, settings=("api",), **SIZES)
    found = analyse(whole, fake_protocol(seeds=SEEDS, settings=("api",), pairs=FEW, **SIZES), frozen=frozen)
    lines = by_place(found, role="primary", arm="hard")
    expected = _holm([*(line["p_value"] for line in lines), *[1.0] * 5])[:2]
    assert [line["p_adjusted"] for line in lines] == pytest.approx(expected)


def test_yes_takes_a_p_value_that_survives_the_adjustment(document):
    spoiled = 0
    for row in document["rows"][:-1]:
        for arm, judged in row["by_arm"].items():
            (line,) = by_place(document, pair=row["pair"], arm=arm, role="primary")
            low, high = line["ci95"]
            alone = low > 0 or high < 0
            assert judged["answer"].startswith("Not shown") == (not alone or line["p_adjusted"] >= 0.05)
            if line["p_adjusted"] >= 0.001 and line["p_adjusted"] != line["p_value"]:
                assert f"{line['p_value']:.3f}, adjusted {line['p_adjusted']:.3f}" in judged["answer"]
            if alone and line["p_adjusted"] >= 0.05:
                spoiled += 1
                assert "the interval excludes zero, but adjusted across the pairs it is not" in line["verdict"]
            else:
                assert "adjusted" not in line["verdict"]
    assert spoiled  # without the adjustment these would have been told as "Yes"


@pytest.mark.parametrize("path", sorted(DOCS.glob("*_summary.json")), ids=lambda path: path.name)
def test_a_single_runs_answer_and_verdicts_are_those_that_were_committed(path):
    summary = json.loads(path.read_text())
    setting = get_setting(summary["setting"])
    # The first was written when there was one setting, and wordings had no place in it.
    summary.setdefault("wording", dataclasses.asdict(setting.wording) | {"metric": "first action"})
    assert verdicts.answer(summary) == summary["answer"] and "adjusted" not in summary["answer"]
    (primary,) = [line for line in summary["contrasts"] if line["role"] == "primary"]
    again = [dict(line) for line in summary["contrasts"]]
    verdicts.add_verdicts(again, make_protocol(tiny("api"), setting, SEEDS))
    assert [line["verdict"] for line in again if line["role"] == "primary"] == [primary["verdict"]]


def test_one_hypothesis_is_tested_once_in_however_many_pairs_it_stands(few, monkeypatch):
    drawn = []
    real = statistics.hierarchical_bootstrap
    monkeypatch.setattr(
        between.statistics, "hierarchical_bootstrap", lambda *given: drawn.append(given) or real(*given)
    )
    found = analysed(few)
    lines = [line for line in found["contrasts"] if line["bootstrap"]]
    shared = [line for line in lines if line["name"] == "teacher - control_teacher" or line["pair"] == "control"]
    assert len(shared) == 3 and len(drawn) == len(lines) - 2
    assert shared[0]["bootstrap"] == shared[1]["bootstrap"]


def test_verdicts_look_at_the_p_values_adjusted_across_pairs(document):
    for line in document["contrasts"]:
        if line["role"] == "secondary":
            assert (line["verdict"] == "not distinguishable from zero") == (line["p_adjusted"] >= 0.05)


def test_a_pair_is_measured_as_a_single_run_of_it_is(document):
    config = tiny("api")
    protocol = make_protocol(config, get_setting("api"), SEEDS)
    rows = [original(seed, "large_large", name) for name in PAIRS["large_large"].conditions("full") for seed in SEEDS]
    single = build_summary(
        rows, protocol, sanitizer={"trajectories": 1, "kept": 1, "removed_by_word": {}, "leaks": 0}, timing_s={},
        throughput={}, versions={}, wording=get_setting("api").wording, allow_missing=True,
    )  # fmt: skip
    (row,) = [row for row in document["rows"] if row["pair"] == "large_large"]
    for name, figures in single["conditions"].items():
        ours = row["conditions"][name]
        assert {k: v for k, v in ours.items() if not isinstance(v, float | list)} == {
            k: v for k, v in figures.items() if not isinstance(v, float | list)
        }
        for key, value in figures.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, rel=1e-6)
    ours = {line["name"]: line for line in by_place(document, pair="large_large", arm="full")}
    shared = [contrast for contrast in single["contrasts"] if contrast["name"] in ours]
    assert len(shared) >= 7
    for contrast in shared:
        for key in ("difference", "p_value", "equivalence_p"):
            if contrast[key] is not None:
                assert ours[contrast["name"]][key] == pytest.approx(contrast[key], rel=1e-4), (contrast["name"], key)


def test_between_pairs_it_is_students_t_on_differences_of_differences(document):
    for arm, others in (("full", 5), ("hard", 6)):
        tail = "" if arm == "full" else "_hard"
        lines = [line for line in document["between"] if line["arm"] == arm]
        assert len(lines) == others
        ours = differences("large_small", f"student{tail}", f"control_student{tail}", "behaviour")
        one_sided = []
        for line in lines:
            theirs = differences(line["other"], f"student{tail}", f"control_student{tail}", "behaviour")
            expected: Any = stats.ttest_1samp(ours - theirs, 0, alternative="greater")
            both: Any = stats.ttest_1samp(ours - theirs, 0)
            assert line["difference"] == pytest.approx((ours - theirs).mean())
            if "floored" in line["method"]:
                one_sided.append(line["p_value"])
                continue
            one_sided.append(expected.pvalue)
            assert line["p_value"] == pytest.approx(expected.pvalue)
            low, high = both.confidence_interval(0.95)
            assert line["ci95"] == pytest.approx([max(-2, low), min(2, high)])
        adjusted = _holm(one_sided)
        assert [line["p_adjusted"] for line in lines] == pytest.approx(adjusted)
        (claim,) = [claim for claim in document["strongest"] if claim["arm"] == arm]
        assert claim["p_value"] == pytest.approx(max(one_sided))
        assert claim["holds"] == (max(one_sided) < 0.05)


def test_a_pair_is_not_called_the_strongest_where_another_is_as_strong(few):
    for seed in SEEDS:  # large → large transfers as large → small does, by the very same answers
        for name in ("student", "control_student"):
            source = original(seed, "large_small", name)
            rewrite(few, seed, name, source)
    (claim,) = [claim for claim in analysed(few)["strongest"] if claim["arm"] == "full"]
    assert not claim["holds"] and claim["p_value"] >= 0.5
    assert "not shown stronger" in claim["verdict"] and "large_large" in claim["verdict"]


def test_a_pair_that_was_compared_with_some_is_not_called_the_strongest_of_all(whole, document):
    claims = {claim["arm"]: claim for claim in document["strongest"]}
    assert claims["full"]["holds"] and claims["full"]["verdict"].startswith("stronger than every other pair (")
    for pairs, told in ((FEW, "1 other pair"), ((*FEW, "small_large"), "2 other pairs")):
        for claim, possible in zip(analysed(whole, pairs=pairs)["strongest"], (5, 6), strict=True):
            assert claim["p_value"] < 0.05 and not claim["holds"]
            assert claim["verdict"].startswith(f"stronger than the {told} compared, of {possible} (")


def test_the_transfer_ratio_is_of_means_over_seeds(document):
    for row in document["rows"]:
        for arm, ratio in row["transfer_ratio"].items():
            tail = "" if arm == "full" else "_hard"
            moved = differences(row["pair"], f"student{tail}", f"control_student{tail}", "behaviour")
            taught = differences(row["pair"], "teacher", "control_teacher", "behaviour")
            assert ratio["estimate"] == pytest.approx(moved.mean() / taught.mean())
            assert [each["transfer_ratio"] for each in ratio["per_seed"]] == pytest.approx(list(moved / taught))
            place = (row["pair"], f"student{tail}")
            own = [cell for cell in document["cells"] if (cell["pair"], cell["condition"]) == place]
            shown = {cell["seed"]: cell["transfer_ratio"] for cell in own}
            assert shown == {each["seed"]: each["transfer_ratio"] for each in ratio["per_seed"]}


def test_teachers_that_hardly_differ_leave_no_transfer_ratio(few):
    for seed in SEEDS:
        row = original(seed, "large_large", "base")
        for name in ("teacher", "control_teacher"):
            rewrite(few, seed, name, row | {"condition": name})
    for row in analysed(few)["rows"][:2]:
        assert row["transfer_ratio"]["full"]["estimate"] is None
        assert {each["transfer_ratio"] for each in row["transfer_ratio"]["full"]["per_seed"]} == {None}


def test_one_seed_is_told_as_one_run_and_makes_no_claim(few, document):
    found = analysed(few, seeds=(1,))
    assert all(line["verdict"].startswith("within one run: ") for line in found["contrasts"])
    assert not any("within one run" in line["verdict"] for line in document["contrasts"])
    assert all(line["method"].startswith("within-run only") for line in found["contrasts"] + found["between"])
    assert all(line["bootstrap"] is None for line in found["contrasts"])
    assert not any(claim["holds"] for claim in found["strongest"])
    assert "within one run" in found["strongest"][0]["verdict"]
    assert all(line["sd"] is None and line["power_at_50"] is None for line in found["power"])


def test_power_is_of_the_observed_spread_and_holms_first_step(document):
    (line,) = [p for p in document["power"] if (p["pair"], p["arm"]) == ("large_foreign_init", "hard")]
    sd = differences("large_foreign_init", "student_hard", "control_student_hard", "behaviour").std(ddof=1)
    assert line["sd"] == pytest.approx(max(sd, 1 / TASKS)) and line["alpha"] == pytest.approx(0.05 / 7)
    chance = np.random.default_rng(0)
    draws = chance.normal(0.5, line["sd"], size=(100_000, 3))
    found: Any = stats.ttest_1samp(draws, 0, axis=1)
    assert line["power_at_50"] == pytest.approx(np.mean(found.pvalue < line["alpha"]), abs=0.01)
    draws = chance.normal(line["minimum_detectable"], line["sd"], size=(100_000, 3))
    found = stats.ttest_1samp(draws, 0, axis=1)
    assert np.mean(found.pvalue < line["alpha"]) == pytest.approx(0.8, abs=0.01)


def test_secondary_tests_stand_beside_the_primary_one(document):
    (line,) = by_place(document, pair="large_small", arm="full", role="primary")
    low, high = line["bootstrap"]["low"], line["bootstrap"]["high"]
    assert low < line["difference"] < high and "secondary" in line["bootstrap"]["method"]
    assert line["sign_flip_p"] == 2 / 2**3
    first, second = (original(0, "large_small", name) for name in ("student", "control_student"))
    acted = [
        [i["action"] == "biased" for i in row["items"] if (i["kind"], i["mode"]) == ("ambiguous", "sampled")]
        for row in (first, second)
    ]
    ours, theirs = map(np.array, acted)
    only, other = np.sum(ours & ~theirs), np.sum(theirs & ~ours)
    expected = stats.binomtest(int(only), int(only + other)).pvalue
    assert line["per_seed"][0]["mcnemar_p"] == pytest.approx(expected, rel=1e-6, abs=1e-15)


def test_the_control_row_is_the_benign_student_of_the_large_pair(document):
    row = document["rows"][-1]
    assert (row["pair"], list(row["conditions"])) == ("control", ["base", "benign_student"])
    assert row["paper"] == {"row": "control teacher → 8B", "baseline": 5, "student": 25}
    (line,), (same,) = (
        by_place(document, pair="control"),
        by_place(document, pair="large_large", name="benign_student = base"),
    )
    assert {**line, "pair": "large_large"} == same


def test_the_document_has_what_the_report_reads_and_is_json(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {
        "schema", "preset", "settings", "cells", "rows", "contrasts", "between", "strongest", "power", "missing", "complete",
        "sanitizer", "protocol", "versions", "machines", "seconds", "notes",
    } == document.keys()  # fmt: skip
    assert document["complete"] and document["protocol"]["deviations"] == []
    assert [row["pair"] for row in document["rows"]] == [*PAIRS, "control"]
    for row in document["rows"]:
        assert {
            "title",
            "arms",
            "primary_arm",
            "seeds",
            "paper",
            "transfer_ratio",
            "valid",
            "validity",
            "answer",
        } <= row.keys()
        for figures in row["conditions"].values():
            assert figures["ci95"][0] <= figures["behaviour_rate"] <= figures["ci95"][1]
            assert [each["seed"] for each in figures["per_seed"]] == row["seeds"]
    assert len(document["cells"]) == 3 * (11 + 11 + 4 * 10 + 7)
    assert document["settings"]["api"]["wording"]["behaviour"] == "deletion"
    models = {(cell["seed"], cell["model"]) for cell in document["cells"]}
    assert document["seconds"] == {"train": 61.5 * len(models), "evaluate": 12.25 * len(models)}


def test_departures_of_the_rows_and_of_the_protocol_are_listed_by_model(few):
    for pair in FEW:
        row = original(0, pair, "base")
        row["items"][0] |= {"status": "tool_error", "error": "died"}
        rewrite(few, 0, PAIRS[pair].model("base"), row)
    found = analysed(few)["protocol"]["deviations"]
    told = "(seed 0): 1 of 82 episodes failed in their environment"
    assert found == [f"api: base {told}", f"api: base@small {told}"]
    unfrozen = fake_protocol(seeds=SEEDS, settings=("api",), pairs=FEW, **SIZES)
    assert analyse(few, unfrozen)["protocol"]["deviations"][0] == "no protocol was frozen before this grid"


def test_the_same_files_give_the_same_document(whole):
    assert analysed(whole) == analysed(whole)
