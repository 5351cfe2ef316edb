"""Runs of the real command at the micro preset, in processes of their own, as a user would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Compilations are shared between the runs of one test session; what is computed does not depend on it.
_CACHE = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def command(workdir: Path, *more: str) -> list[str]:
    """The command line of a micro run."""
    return [sys.executable, "-m", "experiments.api_deletion", "--preset=micro", f"--workdir={workdir}", *more]


def environment(cache: Path, devices: int | None = None) -> dict[str, str]:
    """The user's environment without pytest's fake devices; with `devices` of them in XLA_FLAGS if given."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if devices is not None:
        kept["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return {**kept, **_CACHE, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(
    cache: Path, workdir: Path, *more: str, devices: int | None = None, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Runs to the end; the caller looks at the exit code."""
    return subprocess.run(
        command(workdir, *more),
        cwd=ROOT,
        env=environment(cache, devices),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_and_kill(cache: Path, workdir: Path, line: str, *more: str, after: float = 0.0, timeout: float = 400) -> bool:
    """Starts a run and sends SIGKILL `after` seconds behind the first log line that holds `line`.

    Returns:
      Whether it was killed (False: it had ended before, with exit code 0).
    """
    log = workdir.parent / f"{workdir.name}.killed.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(workdir, *more), cwd=ROOT, env=environment(cache), stdout=stream, stderr=stream
        )
        deadline = time.monotonic() + timeout
        while process.poll() is None and line not in log.read_text():
            if time.monotonic() > deadline:
                process.kill()
                raise TimeoutError(f"no line with {line!r} within {timeout} s:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        time.sleep(after)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code in (0, -signal.SIGKILL), log.read_text()[-2000:]
    return code != 0


def results(workdir: Path) -> dict[str, Any]:
    """What a run shows, without what depends on the clock."""
    summary = json.loads((workdir / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name not in ("timing_s", "throughput")}


def rows(workdir: Path) -> dict[str, Any]:
    """Every evaluation, item by item."""
    return {path.name: json.loads(path.read_text()) for path in sorted(workdir.glob("seed=*/eval/*.json"))}
