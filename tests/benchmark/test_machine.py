"""Cores are held, and the seconds of others told from our own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from subl_jax.benchmark import machine
from subl_jax.benchmark.harness import BenchmarkError

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process")

# Burns so much CPU time and ends; it cannot run on for ever.
BURN = "import time\nwhile time.process_time() < 0.4: pass"


@linux
def test_pinning_holds_threads_that_run_already_and_children() -> None:
    code = (
        "import os, subprocess, sys, threading, time\n"
        "from subl_jax.benchmark import machine\n"
        "thread = threading.Thread(target=time.sleep, args=(30,), daemon=True); thread.start()\n"
        "held = machine.pin(1)\n"
        "child = subprocess.check_output([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'], text=True)\n"
        "masks = [os.sched_getaffinity(int(task)) for task in os.listdir('/proc/self/task')]\n"
        "assert len(masks) > 1 and masks == [set(held.cores)] * len(masks) and len(held.cores) == 1, masks\n"
        "assert child.strip() == str(set(held.cores)) and held.threads == 1, child\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@linux
def test_more_cores_than_there_are_are_refused() -> None:
    there = machine.usable_cores()
    for wrong in (0, there + 1):
        with pytest.raises(BenchmarkError, match=f"--cores={wrong}: .* give 1 to {there}"):
            machine.pin(wrong)
    held = machine.pin()
    assert len(held.cores) == held.threads == there
    assert f"{there} threads each" in held.describe() and held.processor in held.describe()


@linux
def test_a_child_is_ours_and_a_stranger_is_not() -> None:
    own = machine._own_ticks()
    subprocess.run([sys.executable, "-c", BURN], check=True, timeout=120)
    assert machine._own_ticks() - own >= 0.3 * machine._TICKS  # waited for
    child = subprocess.Popen([sys.executable, "-c", BURN + "\ntime.sleep(30)"])
    try:
        own = machine._own_ticks()
        _until(lambda: machine._own_ticks() - own >= 0.3 * machine._TICKS)  # still running
    finally:
        child.kill()
        child.wait()
    before = machine.others_cpu_s()
    assert before is not None
    # Its parent ends at once, so it is nobody's descendant of ours.
    subprocess.run(["/bin/sh", "-c", '"$0" -c "$1" &', sys.executable, BURN], check=True, timeout=120)
    _until(lambda: (machine.others_cpu_s() or 0.0) - before >= 0.3)


def _until(happened, seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.05)


def test_what_jax_compiles_is_counted() -> None:
    import jax
    import jax.numpy as jnp

    count = machine.jax_compilations()
    double = jax.jit(lambda x: 2 * x)
    argument = jnp.ones(3)
    before = count()
    double(argument)
    assert count() == before + 1
    double(argument)
    assert count() == before + 1
