"""A training step behind a pipe: its time by its own clock, and the peak memory of the process that does nothing else.

A script makes its side of the comparison and calls `serve`. One JSON object per line: {"tokens": [[int]]} comes in, what
the step gave, took and held goes out; the first line out says how large the side's state is.

Standard library only: environments that do not have this project run it too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

# XLA frees what a step used in another thread, after its results are there: 0.4 GB were gone within this time.
_SETTLE_S = 0.3
# Steps that may compile, after which memory is tidied: those of `harness`, which this file must not import.
WARM_UPS = 2
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The step that every side takes: what it trains, on what shape of batch, and its optimizer.

    Attributes:
      student, teacher: Hugging Face folders.
      rows, length: of a batch; every row is one document.
      prompt: tokens at the start of each row that are in no loss.
      threads: of each library's pool.
      learning_rate, b1, b2, eps, weight_decay: AdamW's, constant; only the matrices of layers decay.
      clip_norm: global gradient norm above which gradients are scaled down.
    """

    student: str
    teacher: str
    rows: int
    length: int
    prompt: int
    threads: int
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    @property
    def completion(self) -> int:
        """Loss tokens of each row."""
        return self.length - self.prompt


class Side(Protocol):
    """One library's step, with a student, an optimizer and a teacher of its own."""

    state_bytes: int  # parameters of both models and the moments

    def prepare(self, tokens: list[list[int]]) -> Any:
        """What an input pipeline does ahead of the step; not timed."""
        ...

    def step(self, given: Any) -> tuple[float, float]:
        """Loss before the update and gradient norm before clipping. Returns when the update is done."""
        ...

    def compilations(self) -> int:
        """How many programs it has compiled so far; 0 where it compiles nothing."""
        ...

    def facts(self) -> dict[str, Any]:
        """What rows say besides."""
        ...


@dataclasses.dataclass(frozen=True)
class Memory:
    """Anonymous memory of this process: weights read through a mapped file, and libraries, are not in it.

    Attributes:
      peak: bytes, the most since the last `reset_peak`.
      resting: bytes, now.
    """

    peak: int
    resting: int


def reset_peak() -> None:
    """Starts a new peak: the kernel forgets the old one (proc(5), clear_refs 5). Nothing where there is no such file."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def memory(settle_s: float = _SETTLE_S) -> Memory | None:
    """What the kernel counted since `reset_peak`, and what rests after `settle_s`; None where it does not tell.

    The kernel keeps the peak of everything resident. What is not anonymous of it (libraries) is constant within a step.
    """
    if not (_CLEAR_REFS.exists() and _STATUS.exists()):
        return None
    time.sleep(settle_s)
    fields = (line.split() for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.endswith(" kB"))
    held = {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}
    return Memory(held["VmHWM"] - held["RssFile"] - held["RssShmem"], held["RssAnon"])


def tidy() -> None:
    """Gives back what loading and compiling left behind, as far as the C library can (glibc's malloc_trim)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def serve(build: Callable[[Recipe], Side], recipe: str) -> None:
    """Takes steps until standard input ends.

    Args:
      build: makes the side; everything it imports is in it.
      recipe: a `Recipe` as JSON.
    """
    # Libraries print to standard output, which is the pipe: give them standard error instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    side = build(Recipe(**json.loads(recipe)))
    answer({"state_bytes": side.state_bytes})
    for number, line in enumerate(sys.stdin):
        given = side.prepare(json.loads(line)["tokens"])
        reset_peak()
        began = time.perf_counter()
        loss, gradient_norm = side.step(given)
        seconds = time.perf_counter() - began
        held = memory()
        del given
        if number < WARM_UPS:
            tidy()
        answer(
            {
                "loss": loss,
                "gradient_norm": gradient_norm,
                "seconds": seconds,
                "compilations": side.compilations(),
                "memory": held and dataclasses.asdict(held),
                "facts": side.facts(),
            }
        )
