"""Runs that are told to stop, or are killed, end with the parameters of a run that was not, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from subl_jax.distill import loop
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.preemption import Preempted, StopRequests
from subl_jax.distill.train_config import TrainConfig
from subl_jax.metrics.writers import read_metrics
from tests.distill.test_loop import assert_equal_bits, losses_of, run

CONFIG = TrainConfig(
    steps=12, batch_rows=8, row_tokens=16, optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=1),
    checkpoint_every=5, log_every=2, prefetch=0,
)  # fmt: skip
SOAK = dataclasses.replace(CONFIG, steps=60, checkpoint_every=3, log_every=1, prefetch=2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    return root, run(root, CONFIG)


def signalled(monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGTERM, times: int = 1) -> None:
    """Sends a signal to this process when the batch at a position is made."""
    batch = loop.BatchSource.batch

    def signalling(self: Any, position: int) -> Any:
        if position == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return batch(self, position)

    monkeypatch.setattr(loop.BatchSource, "batch", signalling)


def test_sigterm_saves_at_the_next_step_and_the_same_call_goes_on_bitwise(unbroken, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(Preempted) as caught:
        signalled(patched, 6)
        run(tmp_path, CONFIG)
    assert (caught.value.code, caught.value.stage, caught.value.step) == (143, "base/large", 7)
    assert signal.getsignal(signal.SIGTERM) == before
    stopped, line = capsys.readouterr().err.splitlines()[-2:]
    assert stopped.startswith("base/large: stopped at 7/12 step")
    assert line.startswith("base/large: stopped by SIGTERM at step 7 of 12; the same command continues from step 7")
    assert [step for step, *_ in losses_of(tmp_path)] == [2, 4, 6]  # all that was due has been written
    asked: list[int] = []
    batch = loop.BatchSource.batch
    monkeypatch.setattr(loop.BatchSource, "batch", lambda self, p: asked.append(p) or batch(self, p))
    resumed = run(tmp_path, CONFIG)
    assert asked == list(range(7, 12))
    assert_equal_bits(resumed.params, unbroken[1].params)
    assert losses_of(tmp_path) == losses_of(unbroken[0])


def test_sigterm_in_the_last_step_stops_too_and_names_the_checkpoint_that_there_is(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Preempted) as caught:
        signalled(patched, 11)
        run(tmp_path, CONFIG)
    assert caught.value.step == 10
    resumed = run(tmp_path, CONFIG)
    assert_equal_bits(resumed.params, unbroken[1].params)
    assert losses_of(tmp_path) == losses_of(unbroken[0])


def test_a_second_sigterm_does_what_it_did_before(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    before = signal.signal(signal.SIGTERM, die)
    try:
        signalled(monkeypatch, 6, times=2)
        with pytest.raises(Killed):
            run(tmp_path, CONFIG)
        assert signal.getsignal(signal.SIGTERM) == die
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_in_another_thread_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with StopRequests() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.asked(1)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)


def process(root: Path, config: str, at: int, number: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, which sends itself a signal when it makes the batch at a position."""
    return python(f"""
        import os, signal
        from pathlib import Path
        from tests.distill import test_interruption, test_loop
        batch = test_interruption.loop.BatchSource.batch
        def signalling(self, position):
            if position == {at}:
                os.kill(os.getpid(), signal.{number})
            return batch(self, position)
        test_interruption.loop.BatchSource.batch = signalling
        test_loop.run(Path({str(root)!r}), test_interruption.{config})
    """)


@pytest.mark.soak
def test_a_process_that_got_sigterm_exits_with_143_and_its_run_goes_on_elsewhere_bitwise(unbroken, tmp_path):
    done = process(tmp_path, "CONFIG", 8, "SIGTERM")
    assert done.returncode == 143, done.stderr
    assert "the same command continues from step 9" in done.stderr and "Traceback" not in done.stderr
    resumed = run(tmp_path, CONFIG)
    assert_equal_bits(resumed.params, unbroken[1].params)
    assert losses_of(tmp_path) == losses_of(unbroken[0])


@pytest.mark.soak
def test_a_run_that_is_killed_at_five_random_steps_ends_like_one_that_was_not(tmp_path):
    expected = run(tmp_path / "unbroken", SOAK)
    steps = sorted(random.sample(range(1, SOAK.steps), 5))
    print(f"killed at the batches {steps}")  # shown where the test fails
    for at in steps:
        done = process(tmp_path / "killed", "SOAK", at, "SIGKILL")
        assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(tmp_path / "killed", SOAK)
    assert_equal_bits(resumed.params, expected.params)
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "unbroken")
    assert len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) == SOAK.steps
