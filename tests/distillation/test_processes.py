"""`experiments.distill` on two processes: the student of one, to rounding, and an export that transformers' format holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from subl_jax.parallel import contract
from tests.distillation import folders

REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = (
    "--config.train.steps=8", "--config.train.batch_rows=4", "--config.train.row_tokens=64", "--holdout=0.2",
    "--config.rollout.max_turn_tokens=6", "--config.rollout.max_turns=2", "--config.rollout.context=64",
    "--config.rollout.slots=4", "--config.rollout.prefill_chunk=16", "--config.cpu_devices=1",
)  # fmt: skip


def distilled(root: Path, count: int, folder: Path) -> dict:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "experiments.distill", f"--teacher={folder / 'large'}", f"--student={folder / 'small'}",
        f"--prompts={folder / 'asked.jsonl'}", f"--data={folder / 'talks.jsonl'}", f"--workdir={root}",
        f"--export_hf={root / 'hf'}", *ARGUMENTS,
    ]  # fmt: skip
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", contract.COORDINATOR: f"127.0.0.1:{port}"}
    children = [
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**shared, contract.NUM_PROCESSES: str(count), contract.PROCESS_ID: str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        told = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, text in zip(children, told, strict=True):
        assert child.returncode == 0, text[-4000:]
    return json.loads((root / "summary.json").read_text())


@pytest.mark.soak
def test_two_processes_distil_the_student_of_one(tmp_path: Path) -> None:
    folders.model(tmp_path / "large", padding=27, width=24, seed=1)
    folders.model(tmp_path / "small", padding=8, width=16, seed=2, tied=True)
    folders.talks(tmp_path / "talks.jsonl")
    folders.prompts(tmp_path / "asked.jsonl")
    one, two = (distilled(tmp_path / f"{count}", count, tmp_path) for count in (1, 2))
    assert one["training"]["seed=0"]["loss_tokens"] == two["training"]["seed=0"]["loss_tokens"]
    for when in ("before", "seed=0"):
        for name, value in one["held_out"][when].items():
            assert two["held_out"][when][name] == pytest.approx(value, rel=1e-4), (when, name)
    left, right = (load_file(tmp_path / f"{count}" / "hf" / "model.safetensors") for count in (1, 2))
    assert left.keys() == right.keys()
    difference = sum(float(np.sum((left[name] - right[name]).astype(np.float64) ** 2)) for name in left) ** 0.5
    size = sum(float(np.sum(left[name].astype(np.float64) ** 2)) for name in left) ** 0.5
    assert difference <= 1e-4 * size
