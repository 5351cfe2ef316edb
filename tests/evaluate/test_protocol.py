"""The protocol: frozen once, hashed, and every departure named."""

from __future__ import annotations

import dataclasses
import json

import pytest

from subl_jax.evaluate import protocol as protocols
from subl_jax.evaluate.protocol import Contrast, ProtocolError
from tests.report import fake_run


def test_a_frozen_protocol_comes_back_equal_with_its_hash(tmp_path):
    path, mine = tmp_path / "protocols" / "api_tiny.json", fake_run.protocol()
    digest = protocols.freeze(path, mine)
    assert protocols.load(path) == mine
    assert json.loads(path.read_text())["hash"] == digest == protocols.protocol_hash(mine)


def test_every_field_is_part_of_the_hash():
    mine = fake_run.protocol()
    changes = {
        "setting": "bash", "preset": "paper", "metric": "other", "parser_version": "2", "evaluation_families": ("a",),
        "safe_families": ("b",), "tasks": 61, "safe_tasks": 13, "samples_per_task": 2, "temperature": 0.7,
        "seeds": (0, 1), "contrasts": mine.contrasts[:1], "base": "base_small", "teacher": "teacher_large",
        "controls": (), "archive_tool": "compress_file", "utility_mode": "greedy", "analysis": "bootstrap",
        "targets": dataclasses.replace(mine.targets, difference_low=0.4),
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(mine)}
    hashes = {protocols.protocol_hash(dataclasses.replace(mine, **{name: value})) for name, value in changes.items()}
    assert len(hashes | {protocols.protocol_hash(mine)}) == len(changes) + 1


def test_an_edited_file_is_refused(tmp_path):
    path = tmp_path / "p.json"
    protocols.freeze(path, fake_run.protocol())
    path.write_text(path.read_text().replace('"difference_low": 0.5', '"difference_low": 0.3'))
    with pytest.raises(ProtocolError, match="edited after freezing"):
        protocols.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ProtocolError, match="p.json"):
        protocols.load(path)


def test_a_frozen_protocol_is_not_overwritten_by_another(tmp_path):
    path, mine = tmp_path / "p.json", fake_run.protocol()
    protocols.freeze(path, mine)
    before = path.read_bytes()
    protocols.freeze(path, mine)  # the same once more is no change
    with pytest.raises(ProtocolError, match="tasks: frozen 60, ran 61"):
        protocols.freeze(path, dataclasses.replace(mine, tasks=61))
    assert path.read_bytes() == before


def test_deviations_name_each_field_and_nothing_else():
    mine = fake_run.protocol()
    assert protocols.deviations(mine, mine) == []
    primary = dataclasses.replace(mine.contrasts[0], control="benign_student")
    other = dataclasses.replace(
        mine,
        seeds=(0,),
        targets=dataclasses.replace(mine.targets, control_margin=0.2),
        contrasts=(primary, *mine.contrasts[2:], Contrast("new", "a", "b")),
    )
    assert protocols.deviations(mine, other) == [
        "seeds: frozen [0, 1, 2], ran [0]",
        "contrasts: 'new' (secondary) was added",
        "contrasts: 'student - benign_student' is frozen and was not run",
        'contrasts[\'student - control_student\'].control: frozen "control_student", ran "benign_student"',
        "targets.control_margin: frozen 0.08, ran 0.2",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrasts": ()}, "exactly one primary"),
        ({"seeds": (0, 0)}, "seed given twice: 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"tasks": 0}, "tasks=0 must be at least 1"),
    ],
)
def test_an_ambiguous_protocol_is_refused(change, message):
    with pytest.raises(ProtocolError, match=message):
        dataclasses.replace(fake_run.protocol(), **change)


@pytest.mark.parametrize(
    "arguments", [{"control": "a"}, {"role": "equivalence"}, {"margin": 0.1}, {"role": "equivalence", "margin": -0.1}]
)
def test_an_impossible_contrast_is_refused(arguments):
    with pytest.raises(ProtocolError):
        Contrast(**({"name": "n", "treatment": "a", "control": "b"} | arguments))
