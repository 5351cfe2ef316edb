"""Tunix's sampler as a peer of the rollout: in a process of its own environment, on the same weights and cores."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from subl_jax.benchmark.greedy import Request
from subl_jax.benchmark.harness import PeerAbsent, Program

NAME = "tunix"
_WORKER = Path(__file__).with_name("tunix_worker.py")


class TunixPeer:
    """A worker process (see `tunix_worker`); `program` takes a `Request` and returns the new tokens of each prompt.

    It is timed by its own clock: the pipe is not Tunix's.
    """

    def __init__(self, python: str | None, folder: Path):
        """Starts the worker on a Hugging Face folder.

        Raises:
          PeerAbsent: no Python is given, or the worker does not start there.
        """
        if python is None:
            raise PeerAbsent(
                "it needs an environment of its own: python3.11 -m venv DIR; DIR/bin/pip install google-tunix; "
                "--tunix_python=DIR/bin/python"
            )
        self._errors = tempfile.TemporaryFile("w+")
        try:
            # Isolated from our directory and variables, so that it imports its own environment only.
            self._process = subprocess.Popen(
                [python, "-I", str(_WORKER), str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            )  # fmt: skip
        except OSError as error:
            raise PeerAbsent(f"--tunix_python={python} does not start: {error}") from error
        self._versions = self._answer()["versions"]
        self._seconds, self._compilations = 0.0, 0
        self.program = Program(
            NAME, self.generate, lambda: self._compilations, must_compile=True, own_seconds=lambda: self._seconds
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # a pipe was asked for
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self.close()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
        raise PeerAbsent(f"its process ended: {said[-1] if said else 'it said nothing'}")

    def generate(self, request: Request) -> list[list[int]]:
        """The new tokens of each prompt.

        Raises:
          PeerAbsent: the worker ended.
        """
        assert self._process.stdin is not None  # a pipe was asked for
        try:
            self._process.stdin.write(json.dumps({"prompts": request.prompts, "new_tokens": request.new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` says why
        answer = self._answer()
        self._seconds, self._compilations = answer["seconds"], answer["compilations"]
        return answer["tokens"]

    def facts(self) -> dict[str, Any]:
        """What the peer's rows say besides: the versions in its environment."""
        return {"versions": self._versions}

    def close(self) -> None:
        """Ends the worker."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
