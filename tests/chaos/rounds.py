"""Rounds of chaos: start, disturb at a random moment, watch how it ends, start again, compare bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from subl_jax import checkpoint
from subl_jax.parallel import contract
from tests.chaos.worker import CONFIG, STEPS

REPOSITORY = Path(__file__).parents[2]
HEARTBEAT_S = 10
GRACE_S = 5
# The stated bound: the missing heartbeats are noticed, the rest is told and given its grace, with some time for two cores.
BOUND_S = 2 * HEARTBEAT_S + GRACE_S + 20
# A whole undisturbed run takes about ten seconds.
RUN_S = 150
MOST_STARTS = 4
_MIB = 2**20


@dataclasses.dataclass
class Outcome:
    """What a round showed.

    Attributes:
      moment: step at which it was disturbed; ended_s: seconds from then until everything had ended.
      code: exit code of the disturbed run; starts: how many there were in all.
      output: of the disturbed run, and of the one after.
    """

    kind: str
    moment: int
    rank: int
    code: int
    ended_s: float
    starts: int
    equal: bool
    output: tuple[str, str]

    def line(self) -> str:
        return (
            f"{self.kind:14} step {self.moment:3}  rank {self.rank}  exit code {self.code:4}  "
            f"ended after {self.ended_s:5.1f} s  {self.starts} starts  {'bitwise equal' if self.equal else 'DIFFERENT'}"
        )


def launch(root: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        contract.HEARTBEAT_TIMEOUT: str(HEARTBEAT_S),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-m", "launch.local", "--processes=2", f"--grace_s={GRACE_S}"]
    log = (root.parent / f"{root.name}.log").open("w")
    with log:
        return subprocess.Popen(
            [*command, "--", "python", "-m", "tests.chaos.worker", str(root)],
            env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def output_of(root: Path) -> str:
    return (root.parent / f"{root.name}.log").read_text(errors="replace")


def ended(run: subprocess.Popen[str], within: float, root: Path) -> tuple[int, float]:
    """Exit code, and seconds until then; kills and raises where it hangs."""
    began = time.monotonic()
    try:
        return run.wait(within), time.monotonic() - began
    except subprocess.TimeoutExpired:
        run.kill()
        raise AssertionError(f"no end within {within:.0f} s:\n{output_of(root)[-4000:]}") from None


def step_of(root: Path) -> int:
    metrics = root / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def reach(run: subprocess.Popen[str], root: Path, step: int) -> None:
    """Waits until the run has written that step."""
    until = time.monotonic() + RUN_S
    while step_of(root) < step:
        assert run.poll() is None, f"ended before step {step}:\n{output_of(root)[-4000:]}"
        assert time.monotonic() < until, f"did not reach step {step}:\n{output_of(root)[-4000:]}"
        time.sleep(0.01)


def pids(root: Path) -> list[int]:
    return [int((root / f"pid-{rank}").read_text()) for rank in range(2)]


# --- What is done to it -----------------------------------------------------------------------------------------------


def kill(root: Path, rank: int, draw: random.Random) -> None:
    """One process is gone, as by the out-of-memory killer."""
    os.kill(pids(root)[rank], signal.SIGKILL)


def terminate_both(root: Path, rank: int, draw: random.Random) -> None:
    """A scheduler takes the machines away."""
    for pid in pids(root):
        os.kill(pid, signal.SIGTERM)


def terminate_one(root: Path, rank: int, draw: random.Random) -> None:
    """A preemption notice reaches one host."""
    os.kill(pids(root)[rank], signal.SIGTERM)


def freeze(root: Path, rank: int, draw: random.Random) -> None:
    """One process neither works nor ends."""
    os.kill(pids(root)[rank], signal.SIGSTOP)


def fill_disk(root: Path, rank: int, draw: random.Random) -> None:
    """Nothing can be written any more."""
    with contextlib.suppress(OSError), (root / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(_MIB) if shutil.disk_usage(root).free >= _MIB else bytes(512))


def truncate_newest(root: Path, rank: int, draw: random.Random) -> None:
    """Both die, and a file of the newest checkpoint has lost its end."""
    for pid in pids(root):
        os.kill(pid, signal.SIGKILL)


def checkpoints(root: Path) -> list[Path]:
    steps = root / "model" / "steps"
    return sorted(path for path in steps.iterdir() if path.name.isdigit()) if steps.is_dir() else []


def _cut(root: Path, draw: random.Random) -> Path:
    newest = checkpoints(root)[-1]
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = draw.choice(files)
    with chosen.open("rb+") as file:
        file.truncate(draw.randrange(chosen.stat().st_size))
    return newest


KINDS: dict[str, Callable[[Path, int, random.Random], None]] = {
    "kill": kill,
    "terminate_both": terminate_both,
    "terminate_one": terminate_one,
    "freeze": freeze,
    "fill_disk": fill_disk,
    "truncate": truncate_newest,
}


@contextlib.contextmanager
def small_disk(root: Path, wanted: bool) -> Iterator[None]:
    """A disk of its own of 64 MiB at `root`, which a round may fill; needs the right to mount."""
    root.mkdir(parents=True)
    if not wanted:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


# --- Rounds -----------------------------------------------------------------------------------------------------------


def unbroken(root: Path) -> list[np.ndarray]:
    """The parameters of a run that nobody disturbs."""
    root.mkdir(parents=True)
    code, _ = ended(launch(root), RUN_S, root)
    assert code == 0, output_of(root)[-4000:]
    return parameters(root)


def parameters(root: Path) -> list[np.ndarray]:
    params, _ = checkpoint.load_model(root / "final")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def play(kind: str, root: Path, draw: random.Random, expected: list[np.ndarray]) -> Outcome:
    """One round; raises if anything hangs, or does not end correctly after it is started again."""
    # Two checkpoints have to be there where the newest is cut.
    moment = draw.randrange(2 * CONFIG.checkpoint_every + 2 if kind == "truncate" else 1, STEPS - 3)
    rank = draw.randrange(2)
    with small_disk(root, kind == "fill_disk"):
        run = launch(root)
        reach(run, root, moment)
        while kind == "truncate" and len(checkpoints(root)) < 2:  # saves are made in the background
            assert run.poll() is None, f"ended with {len(checkpoints(root))} checkpoints:\n{output_of(root)[-4000:]}"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        KINDS[kind](root, rank, draw)
        code, seconds = ended(run, BOUND_S, root)
        first = output_of(root)
        if kind == "truncate":
            cut = _cut(root, draw)
        (root / "filler").unlink(missing_ok=True)
        starts, last, second = 1, code, ""
        while last != 0:
            starts += 1
            assert starts <= MOST_STARTS, f"exit code {last} again:\n{output_of(root)[-4000:]}"
            last, _ = ended(launch(root), RUN_S, root)
            second = second or output_of(root)
        if kind == "truncate":
            assert f"{cut} is damaged" in second, f"no warning names {cut}:\n{second[-4000:]}"
        equal = all(np.array_equal(a, b) for a, b in zip(parameters(root), expected, strict=True))
        return Outcome(kind, moment, rank, code, seconds, starts, equal, (first, second))
