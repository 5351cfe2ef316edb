"""How fast the sandbox is here: `python -m subl_jax.settings.bash.sandbox.measure`."""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable

from subl_jax.settings.bash.sandbox.host import SandboxUnavailable
from subl_jax.settings.bash.sandbox.people import HOME, Entry
from subl_jax.settings.bash.sandbox.pool import SandboxPool
from subl_jax.settings.bash.sandbox.preflight import preflight

_WORLD = [
    Entry(f"{HOME}/notes.txt", "one\ntwo\nthree\n"),
    Entry(f"{HOME}/bin/run.sh", "#!/bin/sh\necho run\n", mode=0o644),
    Entry(f"{HOME}/shared", None, group="team", mode=0o770, acl=("u:emma:rx",)),
]
_COMMANDS = ("ls -l", "cat notes.txt | wc -l", "chmod u+x bin/run.sh", "bin/run.sh", "cd shared && touch x; cd ..")
_LOOK = f"stat -c %a {HOME}/bin/run.sh"
_PAUSE_S = 0.5  # in which a pool fills up again


def _median_ms(once: Callable[[], object], seconds: float, pause_s: float = 0.0) -> float:
    """The median time of a call, of at least three."""
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
        time.sleep(pause_s)
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _rate(once: Callable[[], object], seconds: float, threads: int = 1) -> float:
    """Calls a second."""
    counts = [0] * threads
    start = time.monotonic()

    def work(place: int) -> None:
        while time.monotonic() < start + seconds:
            once()
            counts[place] += 1

    workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.monotonic() - start)


def _episode(pool: SandboxPool) -> None:
    sandbox = pool.take()
    try:
        sandbox.build(_WORLD)
        for command in _COMMANDS:
            sandbox.run(command)
        looked = sandbox.inspect(_LOOK)
        if looked.stdout != "744\n":
            raise RuntimeError(f"an episode went wrong: {looked}")
    finally:
        sandbox.close()


def measure(seconds: float) -> list[tuple[str, float, str]]:
    """Every measure: what, how much, and its unit; each takes about `seconds`.

    Raises:
      SandboxUnavailable: there is no sandbox here.
    """
    rows = [("preflight", 1000 * preflight().seconds, "ms")]
    start = time.perf_counter()
    with SandboxPool(size=0) as pool:
        pool.take().close()
        rows.append(("first sandbox of a process, with its keeper", 1000 * (time.perf_counter() - start), "ms"))
        rows.append(("a sandbox, cold", _median_ms(lambda: pool.take().close(), seconds), "ms"))
        sandbox = pool.take()
        rows.append(("a built-in command in a persistent shell", _rate(lambda: sandbox.run("cd ."), seconds), "/s"))
        rows.append(("a program in a persistent shell", _rate(lambda: sandbox.run("/bin/true"), seconds), "/s"))
        rows.append(("a look by a script of ours", _median_ms(lambda: sandbox.inspect(_LOOK), seconds), "ms"))
        rows.append(("building a world of three entries", _median_ms(lambda: sandbox.build(_WORLD), seconds), "ms"))
    with SandboxPool(size=2) as pool:
        rows.append(("a sandbox from a warm pool", _median_ms(lambda: pool.take().close(), seconds, _PAUSE_S), "ms"))
    for threads in (1, 2):
        with SandboxPool(size=2) as pool:
            rate = _rate(lambda: _episode(pool), seconds, threads)  # noqa: B023  # called within the loop only
        rows.append((f"episodes of {len(_COMMANDS)} commands, {threads} thread{'s'[: threads - 1]}", rate, "/s"))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m subl_jax.settings.bash.sandbox.measure",
        description="Times the Bash sandbox on this machine and prints a table.",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measure (default: %(default)s)")
    seconds = parser.parse_args(arguments).seconds
    if not 0 < seconds < 3600:
        parser.error("--seconds is a positive number of at most an hour")
    try:
        rows = measure(seconds)
    except SandboxUnavailable as missing:
        print(f"error: {missing}", file=sys.stderr)
        return 1
    width = max(len(name) for name, _, _ in rows)
    for name, value, unit in rows:
        print(f"{name:<{width}}  {value:>9,.1f} {unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
