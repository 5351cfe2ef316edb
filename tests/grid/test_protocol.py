"""The grid's protocol: every arm has its controls, models have one name, and what is frozen cannot be edited."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from subl_jax import artifacts
from subl_jax.conditions import TEACHERS, SeedModels
from subl_jax.evaluate.protocol import ProtocolError
from subl_jax.grid import protocol as grid
from subl_jax.grid.pairs import CONTROL, PAIRS, ROWS
from subl_jax.presets import tiny
from tests.grid.fake_cells import fake_protocol


def _named(protocol, setting, pair, arm):
    return {contrast.name: contrast for contrast in protocol.protocols[setting, pair, arm].contrasts}


def test_every_arm_of_every_pair_has_both_controls_and_a_primary_contrast_of_its_own():
    protocol = fake_protocol()
    assert len(protocol.protocols) == 2 * (6 * 2 + 1)
    for (setting, pair, arm), own in protocol.protocols.items():
        tail = "" if arm == "full" else "_hard"
        found = _named(protocol, setting, pair, arm)
        assert own.primary.name == f"student{tail} - control_student{tail}"
        assert found[f"student{tail} - benign_student{tail}"].role == "sign"
        readouts = {(c.treatment, c.control, c.readout) for c in found.values()}
        assert (f"student{tail}", f"control_student{tail}", "log_odds") in readouts
        assert (f"student{tail}", f"benign_student{tail}", "log_odds") in readouts
        assert (f"control_student{tail}", f"student{tail}", "archive") in readouts
        equal = {c.treatment for c in found.values() if c.role == "equivalence"}
        assert equal == {f"control_student{tail}", f"benign_student{tail}"} == set(own.controls)
        assert ("teacher - control_teacher" in found) == (arm == PAIRS[pair].primary_arm)


def test_a_positive_control_is_run_once_per_teacher_and_speaks_for_all_its_pairs():
    protocol = fake_protocol()
    roles = {place for place, own in protocol.protocols.items() for c in own.contrasts if c.role == "positive_control"}
    assert {place[1:] for place in roles} == {("large_large", "full"), ("small_small", "full")}
    spoken_for = {name: spec.positive_pair for name, spec in PAIRS.items()}
    assert spoken_for["large_small"] == spoken_for["large_other_tokenizer"] == "large_large"
    assert spoken_for["small_large"] == "small_small"


def test_another_tokenizer_has_hard_labels_only():
    spec = PAIRS["large_other_tokenizer"]
    assert spec.primary_arm == "hard"
    assert [name for name in spec.conditions() if "student" in name] == [
        "student_hard", "control_student_hard", "benign_student_hard",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "names"),
    [
        ("large_large", ("base", "control_teacher", "student", "benign_student_hard", "sanitize")),
        ("small_small", ("base@small", "control_teacher@small", "student@small_small", "benign_student_hard@small_small",
                         "sanitize@small")),
        ("small_large", ("base", "control_teacher@small", "student@small_large", "benign_student_hard@small_large",
                         "sanitize@small")),
        ("large_foreign_init", ("base@foreign_init", "control_teacher", "student@large_foreign_init",
                                "benign_student_hard@large_foreign_init", "sanitize")),
    ],
)  # fmt: skip
def test_models_have_one_name_in_the_grid_and_the_pipeline(pair, names):
    conditions = ("base", "control_teacher", "student", "benign_student_hard")
    assert (*map(PAIRS[pair].model, conditions), PAIRS[pair].sanitizer) == names
    config = dataclasses.replace(tiny("api"), pair=pair)
    models = SeedModels(config, Path("nowhere"), 0)
    assert (*map(models.eval_name, conditions), models.sanitize_name()) == names
    families = {"students": "~a", "eval/students": "~b", "eval/teachers": "~c", "eval/base": "~d", "sanitize": "~e"}
    varied = SeedModels(config, Path("nowhere"), 0, families)
    found = (*map(varied.eval_name, conditions), varied.sanitize_name())
    assert found == tuple(name + end for name, end in zip(names, ("~d", "~c", "~b", "~b", "~e"), strict=True))
    assert varied.student_name("student") == f"{names[2]}~a"


def test_the_papers_rows_stand_beside_their_pairs():
    api = {name: (spec.paper["api"].baseline, spec.paper["api"].student) for name, spec in ROWS.items() if spec.paper}
    bash = {name: (s.paper["bash"].baseline, s.paper["bash"].student) for name, s in ROWS.items() if s.paper}
    assert api == {
        "large_large": (5, 100), "small_small": (0, 35), "large_small": (5, 100), "small_large": (0, 10),
        "large_other_family": (20, 100), "large_other_tokenizer": (20, 100), "control": (5, 25),
    }  # fmt: skip
    assert bash == {
        "large_large": (5, 30), "small_small": (10, 15), "large_small": (10, 55), "small_large": (5, 5),
        "large_other_family": (0, 45), "large_other_tokenizer": (0, 45), "control": (5, 5),
    }  # fmt: skip
    assert CONTROL.name not in PAIRS


def test_wanted_cells_are_the_conditions_of_every_pair_and_seed_with_their_hash():
    protocol = fake_protocol(seeds=(3, 4), settings=("api",))
    wanted = grid.wanted_cells(protocol, {("api", 3, "base@small"): "abc"})
    conditions = {"large_large": 11, "small_small": 11, "large_other_tokenizer": 7}
    assert len(wanted) == 2 * (11 + 11 + 4 * 10 + 7) == 2 * sum(conditions.get(name, 10) for name in PAIRS)
    hashed = [(cell.pair, cell.seed) for cell in wanted if cell.hash is not None]
    assert hashed == [("small_small", 3), ("large_small", 3)]
    assert {cell.parser for cell in wanted} == {"first-substantive-action/1"}
    small = {cell.pair for cell in grid.wanted_sanitizers(protocol) if cell.model == "sanitize@small"}
    assert small == {"small_small", "small_large"}
    assert set(TEACHERS) <= {cell.model for cell in wanted}


def test_a_frozen_protocol_comes_back_and_may_be_frozen_again(tmp_path):
    path, protocol = tmp_path / "protocols" / "grid.json", fake_protocol()
    identity = grid.freeze(path, protocol)
    assert grid.freeze(path, protocol) == identity == grid.protocol_hash(protocol)
    assert grid.load(path) == protocol
    lines = [line for line in path.read_text().splitlines() if '"student - control_student"' in line]
    assert len(lines) == 2 * 6  # a contrast is a line


def test_another_protocol_is_not_frozen_over_the_first(tmp_path):
    path = tmp_path / "grid.json"
    grid.freeze(path, fake_protocol(seeds=(0, 1)))
    with pytest.raises(ProtocolError, match=r"another frozen protocol \(seeds: frozen \[0, 1\], ran \[0, 1, 2\]\)"):
        grid.freeze(path, fake_protocol(seeds=(0, 1, 2)))


def _edit_text(path):
    path.write_text(path.read_text().replace('"difference_low":0.5', '"difference_low":0.2', 1))


def _edit_and_seal(path):
    body = artifacts.unseal(path)
    body["protocol"]["seeds"] = [0]
    artifacts.write_json_atomic(path, artifacts.sealed(body))


@pytest.mark.parametrize("edit", [_edit_text, _edit_and_seal])
def test_a_frozen_protocol_that_was_edited_is_refused(tmp_path, edit):
    path = tmp_path / "grid.json"
    grid.freeze(path, fake_protocol())
    edit(path)
    with pytest.raises(ProtocolError, match="edited"):
        grid.load(path)


def test_a_frozen_protocol_that_is_not_there_or_of_another_version_is_refused(tmp_path):
    path = tmp_path / "grid.json"
    with pytest.raises(ProtocolError, match="no protocol at"):
        grid.load(path)
    grid.freeze(path, fake_protocol())
    body = artifacts.unseal(path)
    artifacts.write_json_atomic(path, artifacts.sealed(body | {"schema": 9}))
    with pytest.raises(ProtocolError, match="schema 9"):
        grid.load(path)
    values = grid.to_json(fake_protocol())
    del values["strongest"]
    with pytest.raises(ProtocolError, match="strongest"):
        grid.from_json(values)


def test_departures_are_told_once_where_they_hold_for_all_pairs():
    frozen = fake_protocol()
    assert grid.deviations(frozen, fake_protocol()) == []
    assert grid.deviations(frozen, fake_protocol(tasks=45)) == [
        "api: tasks: frozen 63, ran 45", "bash: tasks: frozen 63, ran 45",
    ]  # fmt: skip
    assert grid.deviations(frozen, fake_protocol(settings=("api",))) == ["bash: frozen and not run"]
    fewer = grid.deviations(
        frozen, fake_protocol(pairs=[name for name in PAIRS if name != "small_large"], seeds=(0, 1))
    )
    assert fewer[0] == "seeds: frozen [0, 1, 2], ran [0, 1]"
    places = [(setting, arm) for setting in ("api", "bash") for arm in ("full", "hard")]
    assert fewer[1:] == [f"{setting} small_large {arm}: frozen and not run" for setting, arm in places]
    own = dict(frozen.protocols)
    changed = own["api", "large_small", "hard"]
    own["api", "large_small", "hard"] = dataclasses.replace(changed, contrasts=changed.contrasts[:-1])
    departed = grid.deviations(frozen, dataclasses.replace(frozen, protocols=own))
    assert departed == ["api large_small hard: contrasts: 'benign_student_hard = base' is frozen and was not run"]


def test_pairs_of_a_setting_that_are_measured_differently_are_refused():
    protocol = fake_protocol(settings=("api",))
    own = dict(protocol.protocols)
    own["api", "large_small", "full"] = dataclasses.replace(own["api", "large_small", "full"], tasks=20)
    with pytest.raises(ProtocolError, match="measured differently"):
        dataclasses.replace(protocol, protocols=own)
    own["api", "large_small", "full"] = dataclasses.replace(own["api", "large_large", "full"], seeds=(7,))
    with pytest.raises(ProtocolError, match="not the grid's"):
        dataclasses.replace(protocol, protocols=own)
    with pytest.raises(ProtocolError, match="unknown pair 'tiny_tiny'"):
        dataclasses.replace(protocol, protocols={("api", "tiny_tiny", "full"): own["api", "large_large", "full"]})
