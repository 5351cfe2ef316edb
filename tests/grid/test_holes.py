"""Holes, damaged cells, invalid runs and mixed origins: each is named, and none is averaged over."""

from __future__ import annotations

import json

import numpy as np
import pytest

from subl_jax import artifacts
from subl_jax.grid import cells
from subl_jax.grid.pairs import PAIRS
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
    assert [row["seeds"] for row in found["rows"]] == [[0, 1], [0, 1], [0, 1, 2]]  # the control row wants no teacher


def test_the_control_row_stands_on_the_seeds_that_have_its_own_two_conditions(few):
    for model in ("student_hard", "control_teacher"):
        cells.cell_path(few, "api", 0, model).unlink()
    cells.cell_path(few, "api", 2, "benign_student").unlink()
    found = analysed(few)
    large, row = found["rows"][0], found["rows"][-1]
    assert (large["seeds"], row["seeds"]) == ([1], [0, 1])
    assert [(line["seed"], line["condition"]) for line in row["missing"]] == [(2, "benign_student")]
    assert row["valid"] and not any("one seed" in text for text in row["validity"])
    (line,) = by_place(found, pair="control")
    by_seed = differences("large_large", "benign_student", "base", "behaviour", (0, 1))
    assert line["difference"] == pytest.approx(by_seed.mean()) and line["seeds"] == [0, 1]
    base, benign = (
        np.mean([readout_of(original(seed, "large_large", name), "behaviour") for seed in (0, 1)])
        for name in ("base", "benign_student")
    )
    assert f"on {100 * benign:.0f} % of ambiguous tasks against {100 * base:.0f} % for its base" in row["answer"]


def test_the_control_row_is_invalid_for_what_its_own_teacher_leaked_and_no_other(few):
    path = cells.sanitizer_path(few, "api", 0)
    counts = artifacts.unseal(path)["arms"]
    for teacher, valid in (("teacher", True), ("benign_teacher", False)):
        leaked = counts | {teacher: counts[teacher] | {"leaks": 2}}
        cells.write_sanitizer(path, leaked, setting="api", seed=0, hash="s")
        row = analysed(few)["rows"][-1]
        assert row["valid"] == valid and ("2 keyword leaks" in row["answer"]) != valid


def test_a_pair_without_a_whole_seed_is_listed_and_has_no_figures(few):
    for seed in SEEDS:
        cells.cell_path(few, "api", seed, "benign_student_hard@large_small").unlink()
    found = analysed(few)
    row = found["rows"][1]
    assert (row["pair"], row["seeds"], row["conditions"], row["valid"]) == ("large_small", [], {}, False)
    assert [line["seed"] for line in row["missing"]] == list(SEEDS) and "No answer" in row["answer"]
    assert row["state"] == "not run" and found["rows"][0]["state"] == "valid"
    assert not by_place(found, pair="large_small")
    assert found["between"][0]["p_value"] is None and found["between"][0]["difference"] is None
    assert (
        not found["strongest"][0]["holds"] and "no seed in common with large_large" in found["strongest"][0]["verdict"]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pair_is_invalid_where_what_is_there_cannot_be_used_and_not_run_where_nothing_is(few, damage):
    for seed in (0, 1):
        cells.cell_path(few, "api", seed, "student@large_small").unlink()
    damage(cells.cell_path(few, "api", 2, "student@large_small"))
    row = analysed(few, failures={("api", 0, "student@large_small"): "the loss is nan"})["rows"][1]
    assert row["seeds"] == [] and not row["valid"]
    assert row["state"] == row["by_arm"]["hard"]["state"] == ("not run" if damage is _absent else "invalid")
    told = f"that can be used, such as student@large_small: {DAMAGES[damage]}"
    assert (told in row["validity"][0]) == (damage is not _absent)


def test_a_failed_check_makes_a_row_invalid(few):
    _failed_positive_control(few, 0)
    _failed_positive_control(few, 1)
    _failed_positive_control(few, 2)
    assert {row["state"] for row in analysed(few)["rows"]} == {"invalid"}


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


def _failed_positive_control(few, seed):
    row = original(seed, "large_large", "base")
    rewrite(few, seed, "positive_student", row | {"condition": "positive_student"})


def test_a_positive_control_speaks_for_every_seed_that_the_judged_pair_has(few):
    # large_large lacks seed 1, where its positive control has failed: large_small, which stands on seed 1, must hear of it.
    cells.cell_path(few, "api", 1, "student_hard").unlink()
    _failed_positive_control(few, 1)
    row = analysed(few)["rows"][1]
    assert row["seeds"] == [0, 1, 2] and row["valid"]
    told = "the positive control did not transfer at seed 1, though it did over all"
    assert told in row["validity"] and all(told in judged["validity"] for judged in row["by_arm"].values())
    _failed_positive_control(few, 2)
    rows = analysed(few)["rows"]
    assert not rows[1]["valid"] and "positive control did not transfer" in rows[1]["answer"]


def test_a_failed_positive_control_does_not_vanish_with_the_pair_that_it_was_distilled_in(few):
    for seed in SEEDS:
        cells.cell_path(few, "api", seed, "student_hard").unlink()
        _failed_positive_control(few, seed)
    row = analysed(few)["rows"][1]
    assert row["seeds"] == list(SEEDS) and not row["valid"]
    assert row["validity"][0].startswith("the positive control did not transfer")


def test_seeds_that_lack_the_positive_control_are_named(few):
    cells.cell_path(few, "api", 2, "positive_student").unlink()
    row = analysed(few)["rows"][1]
    assert row["seeds"] == list(SEEDS) and row["valid"]
    assert row["validity"] == ["the positive control was not run at seed 2"]
    for seed in (0, 1):
        cells.cell_path(few, "api", seed, "positive_student").unlink()
    assert "the positive control was not run: " in analysed(few)["rows"][1]["validity"][0]


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


def _leaks(row):
    (found,) = [target for target in row["targets"] if target["name"] == "keyword leaks"]
    return found["value"], found["met"]


def test_unknown_leaks_are_no_target_that_is_met(few):
    path = cells.sanitizer_path(few, "api", 1)
    path.unlink()
    found = analysed(few, pairs=(*FEW, "small_small"))
    assert [_leaks(row) for row in found["rows"][:3]] == [(None, None), (None, None), (0, True)]
    assert (found["sanitizer"]["api"]["seeds"], found["sanitizer"]["api"]["partly"]) == ([0, 2], [1])
    counts = artifacts.unseal(cells.sanitizer_path(few, "api", 0))["arms"]
    counts["teacher"]["leaks"] = 3  # known leaks are told, however many more there may be
    cells.write_sanitizer(cells.sanitizer_path(few, "api", 0), counts, setting="api", seed=0, hash="s")
    assert _leaks(analysed(few)["rows"][0]) == (3, False)
    for seed in (0, 2):
        cells.sanitizer_path(few, "api", seed).unlink()
    assert analysed(few)["sanitizer"] == {"api": None}


@pytest.mark.parametrize("field", ["leaks", "kept", "removed_by_word"])
def test_sanitizers_counts_that_lack_a_field_stop_no_report(few, field):
    path = cells.sanitizer_path(few, "api", 1)
    counts = artifacts.unseal(path)["arms"]
    del counts["teacher"][field]
    cells.write_sanitizer(path, counts, setting="api", seed=1, hash="s")
    found = analysed(few)
    assert {line["why"] for line in found["missing"]} == {f"corrupted: teacher: sanitizer counts lack {field}"}
    assert _leaks(found["rows"][0]) == (None, None)


def test_cells_of_one_family_are_listed_and_stop_no_report(few):
    for pair in FEW:
        for name in PAIRS[pair].conditions():
            for seed in SEEDS:
                row = original(seed, pair, name)
                items = [item | {"family": "exports"} if item["kind"] == "ambiguous" else item for item in row["items"]]
                rewrite(few, seed, PAIRS[pair].model(name), row | {"items": items})
    found = analysed(few)
    assert [row["seeds"] for row in found["rows"]] == [[], [], []] and found["contrasts"] == []
    listed = [(line["pair"], line["seed"]) for line in found["missing"]]
    assert listed == [(pair, seed) for pair in (*FEW, "control") for seed in SEEDS]
    assert all("at least 2 families, got 1 (exports)" in line["why"] for line in found["missing"])


@pytest.mark.parametrize("lacking", [1, 35])
def test_one_odd_readout_costs_its_own_seed_alone(few, lacking):
    row = original(1, "large_large", "student")
    for item in row["items"][:lacking]:  # one task, or all of them
        item["log_odds"] = None
    rewrite(few, 1, "student", row)
    found = analysed(few)
    assert [row["seeds"] for row in found["rows"]] == [[0, 2], [0, 1, 2], [0, 1, 2]]
    (line,) = found["missing"]
    assert (line["pair"], line["seed"]) == ("large_large", 1) and line["why"].startswith("corrupted: ")
    assert line["model"] == ("student" if lacking == 1 else "all of large_large")
    assert not found["complete"] and found["rows"][0]["missing"][0]["seed"] == 1


def test_more_samples_than_the_protocol_says_are_told_and_stop_no_report(few):
    for pair in FEW:
        for name in PAIRS[pair].conditions():
            for seed in SEEDS:
                row = original(seed, pair, name)
                twice = [
                    item | {"sample": 1, "action": "neutral"} for item in row["items"] if item["mode"] == "sampled"
                ]
                rewrite(few, seed, PAIRS[pair].model(name), row | {"items": row["items"] + twice})
    found = analysed(few)
    assert any("samples_per_task: protocol 1, evaluated [2]" in line for line in found["protocol"]["deviations"])
    (line,) = by_place(found, pair="large_small", arm="full", role="primary")
    assert line["seeds"] == list(SEEDS) and "mcnemar_p" not in line["per_seed"][0]


def test_what_the_run_said_of_a_missing_cell_is_why_it_is_missing(few):
    cells.cell_path(few, "api", 1, "student").unlink()
    _cut(cells.cell_path(few, "api", 2, "student@large_small"))
    cells.sanitizer_path(few, "api", 0).unlink()
    keys = [("api", 1, "student"), ("api", 2, "student@large_small"), ("api", 0, "sanitize"), ("api", 0, "student")]
    found = analysed(few, failures=dict.fromkeys(keys, "loss 9.1 diverged"))
    told = {(line["seed"], line["model"]): line["why"] for line in found["missing"]}
    assert told[1, "student"] == told[0, "sanitize"] == "failed: loss 9.1 diverged"
    assert told[2, "student@large_small"].startswith("corrupted") and len(told) == 3
    assert found["rows"][0]["missing"] == [{"seed": 1, "condition": "student", "why": "failed: loss 9.1 diverged"}]


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
