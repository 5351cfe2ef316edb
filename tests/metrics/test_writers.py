"""Metric files: one line per step, never twice after a resume, readable by TensorBoard's format."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from subl_jax import metrics
from subl_jax.artifacts import WorkdirError


def rows(path: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in metrics.read_metrics(path)]


def test_lines_carry_stage_step_and_values(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
        writer.write("distill", 3, {"loss": 0.5, "kl": math.nan})
        # Visible at once, to someone else.
        (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row.pop("time") > 1e9
    assert row == {"stage": "distill", "step": 3, "loss": 0.5, "kl": None}


def test_resume_drops_only_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
        for step in range(4):
            writer.write("base", step, {"loss": step})
            writer.write("distill", step, {"loss": step})
    with metrics.MetricsWriter(path, stage="distill", resume_step=2) as writer:
        for step in (2, 3):
            writer.write("distill", step, {"loss": -step})
    assert sorted(rows(path)) == sorted((stage, step) for stage in ("base", "distill") for step in range(4))
    assert [row["loss"] for row in metrics.read_metrics(path) if row["stage"] == "distill"] == [0, 1, -2, -3]
    # Without a resume nothing is dropped.
    with metrics.MetricsWriter(path) as writer:
        writer.write("evaluate", 0, {"rate": 1})
    assert len(rows(path)) == 9
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tail", ['{"stage": "base", "st', "garbage\n", "[1]\n", '{"a": 1}\n', "\x00\x00"])
def test_a_line_cut_short_by_a_kill_is_repaired(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
        writer.write("base", 1, {"loss": 1.0})
    with path.open("a") as file:
        file.write(tail)
    with metrics.MetricsWriter(path, stage="base", resume_step=2) as writer:
        writer.write("base", 2, {"loss": 2.0})
    assert rows(path) == [("base", 1), ("base", 2)]


def test_reading_tolerates_a_line_still_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    assert rows(path) == [("a", 1)]
    assert metrics.read_metrics(tmp_path / "absent") == []


def test_misuse_and_unwritable_places_are_named(tmp_path):
    with metrics.MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="'step' is taken"):
        writer.write("base", 1, {"step": 1.0})
    with pytest.raises(ValueError, match="give both or neither"):
        metrics.MetricsWriter(tmp_path / "m.jsonl", resume_step=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="a file stands where a directory is needed|File exists"):
        metrics.MetricsWriter(tmp_path / "file" / "m.jsonl")


def test_tensorboard_events_hold_the_same_scalars(tmp_path):
    with metrics.MetricsWriter(tmp_path / "m.jsonl", tmp_path / "tb") as writer:
        for step in (1, 2):
            writer.write("distill", step, {"loss": step / 4})
        writer.write("base", 7, {"loss": 0.5})
    import importlib

    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")

    def scalars(directory: Path) -> list[tuple[str, int, float]]:
        found = []
        for path in directory.glob("events.*"):
            content, place = path.read_bytes(), 0
            while place < len(content):  # TFRecord: length u64, crc u32, data, crc u32
                size = int.from_bytes(content[place : place + 8], "little")
                event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
                found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
                place += 16 + size
        return found

    assert scalars(tmp_path / "tb" / "distill") == [("loss", 1, 0.25), ("loss", 2, 0.5)]
    assert scalars(tmp_path / "tb" / "base") == [("loss", 7, 0.5)]


def test_tensorboard_is_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys; from subl_jax import metrics\n"
        "writer = metrics.MetricsWriter(sys.argv[1]); writer.write('a', 1, {'x': 1}); writer.close()\n"
        "sys.exit('tensorboardX' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=True, timeout=60)
