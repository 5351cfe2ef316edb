"""The command from its flags to its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from subl_jax.launching.preflight import command, environment, tables
from tests.launching.preflight import tpu


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "launch.preflight", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=kept,
        check=False,
    )


def test_a_program_that_exceeds_the_chip_ends_with_exit_code_3(tmp_path: Path) -> None:
    tpu.needs_libtpu()
    out = tmp_path / "rows.json"
    done = run(
        "--topology=v5e:2x2", "--preset=micro", "--programs=rollout", "--config.rollout.slots=65536",
        "--config.rollout.context=4096", f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert any(row["fits"] is False and row["bytes_per_chip"] > row["limit_bytes"] for row in rows)
    assert "NO" in done.stdout


def test_an_unknown_shape_is_one_line_and_exit_code_1() -> None:
    done = run("--topology=local", "--preset=micro", "--teacher_shape=lama-3.1-8b")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: no shape is called 'lama-3.1-8b'; did you mean llama-3.1-8b?"


def row(mesh: str, fits: bool, seconds: float, wire: float = 1.0, program: str = "distill") -> dict:
    return {"program": program, "mesh": mesh, "fits": fits, "roofline_s": seconds, "wire_bytes": wire}


def test_the_fastest_mesh_that_fits_is_recommended_and_the_quieter_of_two_alike() -> None:
    rows = [row("1x4x1", False, 1.0), row("2x2x1", True, 2.0, wire=5.0), row("1x2x2", True, 2.0, wire=3.0)]
    assert tables.recommended(rows) == "1x2x2"


def test_one_mesh_that_fits_is_enough_but_every_other_program_must() -> None:
    meshes = [row("1x4x1", False, 1.0), row("2x2x1", True, 2.0)]
    assert command.fits(meshes)
    assert not command.fits(meshes[:1])
    assert not command.fits([*meshes, row("1x1x1", False, 1.0, program="rollout decode")])


def test_the_environment_is_left_alone_for_the_devices_that_are_here() -> None:
    found: dict[str, str] = {}
    environment.prepare(["launch.preflight", "--topology=local"], found)
    assert not found
    environment.prepare(["launch.preflight", "--topology=v5e:2x2"], found)
    assert found == environment.ABSENT_TPU
