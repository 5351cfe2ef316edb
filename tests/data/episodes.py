"""Trajectories to store, their exact comparison, and code in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from subl_jax.trajectory import Status, Trajectory

TOOLS = [{"type": "function", "function": {"name": "read_file", "description": "läse", "parameters": {}}}]


def trajectory(
    episode: int, sample: int = 0, length: int = 7, text: str = "hello", logprobs: np.ndarray | None = None
) -> Trajectory:
    """An episode whose arrays and messages follow from its arguments."""
    rng = np.random.default_rng([episode, sample])
    mask = np.zeros(length, bool)
    mask[length // 2 :] = True
    if logprobs is None:
        logprobs = np.where(mask, rng.normal(size=length), 0).astype(np.float32)
    return Trajectory(
        episode=episode,
        task_id=f"safe/train/search/0/{episode}",
        sample=sample,
        tokens=rng.integers(0, 2**31 - 1, length, dtype=np.int32),
        loss_mask=mask,
        logprobs=logprobs,
        messages=[
            {"role": "user", "content": text},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "read_file", "arguments": {"path": text, "n": 3}}}
                ],
            },
            {"role": "tool", "name": "read_file", "content": text},
        ],
        tools=TOOLS,
        status="final",
        done=episode % 2 == 0,
    )


def failed(episode: int, status: Status, error: str) -> Trajectory:
    """An episode whose opening failed: not a token of it was rendered."""
    nothing = {"tokens": np.zeros(0, np.int32), "loss_mask": np.zeros(0, bool), "logprobs": np.zeros(0, np.float32)}
    return dataclasses.replace(
        trajectory(episode), **nothing, messages=[], tools=[], status=status, done=False, error=error
    )


def malformed(**changes) -> Trajectory:
    """A trajectory as it would come from code that nobody type-checks."""
    item = trajectory(0)
    for name, value in changes.items():
        object.__setattr__(item, name, value)
    return item


def assert_same(actual: Trajectory, expected: Trajectory) -> None:
    """Equal in every field, arrays bit by bit."""
    for name in ("tokens", "loss_mask", "logprobs"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        assert a.tobytes() == b.tobytes(), name
    for name in ("episode", "task_id", "sample", "messages", "tools", "status", "done", "error"):
        assert getattr(actual, name) == getattr(expected, name), name
        assert type(getattr(actual, name)) is type(getattr(expected, name)), name


def python(code: str, *arguments: str) -> list[str]:
    """A command line that runs the code, given the arguments, in another Python."""
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def environment(**env: str) -> dict[str, str]:
    """This process's environment, in which another Python finds the repository."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), **env}


def run_python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Runs the code to its end."""
    return subprocess.run(python(code, *arguments), env=environment(**env), capture_output=True, text=True, timeout=120)
