"""The command of the exports: what it refuses before it writes, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from absl import flags

from subl_jax import artifacts
from subl_jax.exports import command
from subl_jax.exports.finished import ExportError, FinishedSeed, benign_of, condition_of, control_of, resolve
from tests.grid import fake_cells


def run(*given: str) -> None:
    """The command with these flags, in this process."""
    values = flags.FlagValues()
    command.define_flags(values)
    values(["export", *given])
    command.run(values)


def test_a_dataset_and_a_model_appear_with_a_table_of_what_was_written(finished, tmp_path, capsys):
    out = tmp_path / "out"
    run(f"--workdir={finished}", "--what=dataset,model", "--condition=student,control_student", f"--out={out}")
    for name in ("student", "control_student"):
        assert {path.name for path in (out / "dataset" / name).iterdir()} == {"README.md", "seen.jsonl", "all.jsonl"}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in (out / "model" / name).iterdir()
        }
    table = capsys.readouterr().out
    assert f"written to {out}" in table
    assert "dataset/student/seen.jsonl" in table
    card = (out / "model" / "student" / "README.md").read_text()
    assert f"python -m experiments.export --workdir={finished} --seed=0 --what=model --condition=student" in card


def test_inspect_logs_of_every_measured_model_of_a_run_or_of_cells(finished, tmp_path, capsys):
    pytest.importorskip("inspect_ai")
    run(
        f"--workdir={finished}", "--what=inspect", "--condition=all", "--inspect_format=json", f"--out={tmp_path / 'a'}"
    )
    assert len(list((tmp_path / "a" / "inspect").iterdir())) == 8 * 3
    fake_cells.write_grid(tmp_path / "grid", seeds=(3,), settings=("bash",), pairs=("large_large",), tasks=12, safe=9)
    flags_of_cells = (f"--cells={tmp_path / 'grid'}", "--setting=bash", "--seed=3", "--what=inspect")
    run(*flags_of_cells, "--condition=teacher", f"--out={tmp_path / 'b'}")
    assert len(list((tmp_path / "b" / "inspect").glob("*_bash-*-teacher_*.eval"))) == 3
    assert "inspect view --log-dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give either --workdir"),
        (["--workdir=W", "--cells=C"], "give either --workdir"),
        (["--workdir=W"], "--out is not given"),
        (["--workdir=W", "--what=datset", "--out=O"], "--what=datset: use some of inspect, dataset, model"),
        (["--cells=C", "--what=model", "--setting=api", "--out=O"], "cells hold measurements alone"),
        (["--cells=C", "--what=inspect", "--out=O"], "say which with --setting"),
        (["--workdir=nowhere", "--what=model", "--out=O"], "--workdir=nowhere is no directory"),
        (["--workdir=s3://bucket/run", "--what=model", "--out=O"], "is an address"),
        (["--workdir=W", "--seed=7", "--what=model", "--out=O"], r"has no seed 7 \(it has 0, 1\)"),
        (["--workdir=W", "--what=model", "--condition=studnt", "--out=O"], "did you mean student"),
        (["--workdir=W", "--what=model", "--condition=teacher", "--out=O"], "teacher is no student"),
        (["--workdir=W", "--what=dataset", "--condition=base", "--out=O"], "neither acted as a teacher"),
        (["--workdir=W", "--what=dataset", "--condition=all", "--out=O"], "--condition=all is for --what=inspect"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(finished, tmp_path, given, message):
    places = {"=W": f"={finished}", "=O": f"={tmp_path / 'out'}", "=C": f"={tmp_path / 'cells'}"}
    flagged = [next((flag.replace(k, v) for k, v in places.items() if flag.endswith(k)), flag) for flag in given]
    with pytest.raises(ValueError, match=message):
        run(*flagged)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(f"--workdir={finished}", "--what=dataset", f"--out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unfinished_stage_is_named_with_what_to_do(damaged, tmp_path):
    (damaged / "seed=0/trajectories/control_teacher" / artifacts.MARKER).unlink()
    with pytest.raises(ExportError, match="trajectories/control_teacher is unfinished.*start the run's command again"):
        run(f"--workdir={damaged}", "--what=dataset", f"--out={tmp_path / 'out'}")
    for path in (damaged / "seed=0/eval/markers").glob("*/stage.json"):
        path.unlink()
    with pytest.raises(ExportError, match="no finished evaluation"):
        FinishedSeed(damaged, 0)


def test_stages_that_do_not_belong_together_are_refused(damaged):
    path = damaged / "seed=0/teachers/teacher" / artifacts.MARKER
    marker = json.loads(path.read_text())
    marker["key"]["bias"] = "archive"
    path.write_text(json.dumps(marker))
    with pytest.raises(ExportError, match="does not belong to what it says"):
        FinishedSeed(damaged, 0).student("student")
    marker["output_hash"] = artifacts.output_hash(marker["stage"], marker["key"], marker["inputs"])
    path.write_text(json.dumps(marker))
    with pytest.raises(ExportError, match="was made from seed=0/teachers/teacher with hash"):
        FinishedSeed(damaged, 0).student("student")


def test_a_failed_export_leaves_nothing(damaged, tmp_path):
    Path(damaged / "seed=0/sanitize/surviving.json").write_text("[")
    with pytest.raises(ExportError, match="run the sanitize stage again"):
        run(f"--workdir={damaged}", "--what=dataset", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_models_are_named_by_condition_where_only_one_has_it():
    known = ["student@large_small", "student_hard@large_small", "student_hard~learning_rate=0.001", "base"]
    assert resolve("student", known, "here") == "student@large_small"
    assert resolve("base", known, "here") == "base"
    with pytest.raises(
        ExportError, match="several models of here: name one of student_hard@large_small, student_hard~"
    ):
        resolve("student_hard", known, "here")


def test_controls_are_named_as_the_pipeline_names_them():
    assert condition_of("student_hard@large_small") == "student_hard"
    assert control_of("student_hard@large_small") == "control_student_hard@large_small"
    assert control_of("student~learning_rate=0.001") == "control_student~learning_rate=0.001"
    assert benign_of("student") == "benign_student"
    assert control_of("teacher@small") == "control_teacher@small"
    for name in ("control_student", "positive_student", "base", "benign_teacher"):
        assert control_of(name) is None


def test_a_shape_that_transformers_has_no_class_for_is_refused_before_anything_is_written(damaged, tmp_path):
    path = damaged / "seed=0/students/student/params/metadata.json"
    body = artifacts.unseal(path)
    body["metadata"]["model"] |= {"qkv_bias": True, "qk_norm": True}
    artifacts.write_json_atomic(path, artifacts.sealed(body))
    with pytest.raises(ExportError, match="has no Hugging Face form: no family of transformers has qkv_bias=True"):
        run(f"--workdir={damaged}", "--what=dataset,model", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
