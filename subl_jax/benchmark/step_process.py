"""The other end of `step_worker`: starts one side of a comparison in a process of its own and asks it for steps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.benchmark.harness import WARM_UPS, BenchmarkError, PeerAbsent, Program
from subl_jax.benchmark.step_worker import Memory, Recipe

# A worker that is told to end has this long to do so.
_PATIENCE_S = 10


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One step: its loss before the update, and the norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


class StepProcess:
    """A process that takes steps; `program` takes tokens [rows][length] and returns an `Outcome`."""

    def __init__(
        self, name: str, command: Sequence[str], recipe: Recipe, *, compiles: bool, must_compile: bool = False,
        environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """Starts it and waits until its models are loaded.

        Args:
          name: of the program.
          command: of a script that calls `step_worker.serve`; the recipe is appended to it.
          recipe: what it does.
          compiles, must_compile: whether it compiles programs at all, see `harness.Program`.
          environment: variables besides ours.

        Raises:
          PeerAbsent: it does not start.
        """
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [*command, json.dumps(dataclasses.asdict(recipe))], text=True, env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise PeerAbsent(f"{command[0]} does not start: {error}") from error
        started = self._answer()
        if started is None:
            raise PeerAbsent(self._ending())
        self.state_bytes: int = started["state_bytes"]
        self.outcomes: list[Outcome] = []
        self._memory: list[Memory | None] = []
        self._last: dict[str, Any] = {"seconds": 0.0, "compilations": 0, "facts": {}}
        self.program = Program(
            name, self.step, (lambda: self._last["compilations"]) if compiles else None, must_compile,
            own_seconds=lambda: self._last["seconds"],
        )  # fmt: skip

    def step(self, tokens: list[list[int]]) -> Outcome:
        """Takes one step.

        Raises:
          BenchmarkError: the process ended.
        """
        assert self._process.stdin is not None  # a pipe was asked for
        try:
            self._process.stdin.write(json.dumps({"tokens": tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_ending` says why
        answer = self._answer()
        if answer is None:
            raise BenchmarkError(f"{self._name}: {self._ending()}")
        self._last = answer
        self._memory.append(answer["memory"] and Memory(**answer["memory"]))
        self.outcomes.append(Outcome(answer["loss"], answer["gradient_norm"]))
        return self.outcomes[-1]

    @property
    def memory(self) -> Memory | None:
        """The highest peak of the steps after the warm-up, and the most it held after one; None where unknown."""
        known = [each for each in self._memory[WARM_UPS:] if each is not None]
        if not known:
            return None
        return Memory(max(each.peak for each in known), max(each.resting for each in known))

    def facts(self) -> dict[str, Any]:
        """What the peer's rows say besides."""
        return self._last["facts"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes were asked for
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None  # a pipe was asked for
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _ending(self) -> str:
        """Why it ended: the last line that it said, or the signal that killed it."""
        code = self._process.wait()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
        self.close()
        if code < 0:
            return f"its process was killed by signal {-code} (9: most likely there was not enough memory)"
        return f"its process ended: {said[-1] if said else 'it said nothing'}"
