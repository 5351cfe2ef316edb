"""Many episodes, hostile ones among them: nothing of them is left and the process stays as small as it was."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subl_jax.settings.bash.sandbox import Entry, Limits, SandboxPool
from tests.settings.bash.attacks import anonymous_mib, descendants, marked, members, perl, within

# A hostile episode takes as long as its limit allows, so it is short here; the attacks themselves are tested elsewhere.
LIMITS = Limits(wall_s=0.5)
WORLD = [
    Entry("/home/agent/notes.txt", "one\ntwo\n"),
    Entry("/home/agent/bin", None),
    Entry("/home/agent/x", "y", owner="anna"),
]
HOSTILE = (
    "bomb() { bomb | bomb & }; bomb; sleep {0}",
    "kill -9 -1",
    "kill -9 $$",
    "setsid nohup sleep {0} >/dev/null 2>&1 & disown",
    "sleep {0}",
    "yes & yes >&2",
    "exit 3",
    perl("my @x; push @x, 'x' x (1 << 22) while 1"),
    "trap '' TERM HUP; (sleep {0}) & sleep {0}",
    "for i in $(seq 200); do mkdir d && cd d; done; ln -s / r; mkfifo p; cat p &",
    "for i in 1 2 3 4 5; do head -c 7M /dev/zero >f$i; head -c 7M /dev/zero >/dev/shm/f$i; done; ipcmk -M 4096; sleep {0} &",
    "cp /usr/bin/id .; chown 0 id; chmod u+s id; chown anna .; setfacl -m u:ben:rwx /tmp",
)


def held(marker: str) -> dict[str, Any]:
    """All of this process and this machine that an episode might leave behind; what others have is left out."""
    groups = set()
    for pid in {os.getpid(), *descendants()}:
        try:
            groups |= set(Path(f"/proc/{pid}/cgroup").read_text().splitlines())
        except OSError:
            continue
    ours = f"{os.getpid()}"
    return {
        "processes": len(descendants()),
        "marked": marked(marker),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": len([d for d, _, _ in os.walk("/sys/fs/cgroup") if ours in Path(d).name]),
        "groups": len(groups),
        "files": [name for name in os.listdir(tempfile.gettempdir()) if re.match("subl|sandbox|bwrap|tmp.*bash", name)],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


@pytest.fixture
def busy(sandbox_ready: None) -> Iterator[SandboxPool]:
    pool = SandboxPool(LIMITS, size=2)
    try:
        yield pool
    finally:
        pool.close()


def episode(pool: SandboxPool, number: int, every: int, duration: str) -> str:
    """One episode, hostile at every so many; returns the namespace its processes lived in."""
    sandbox = pool.take()
    try:
        sandbox.build(WORLD)
        inside = sandbox.run("readlink /proc/self/ns/pid; cat notes.txt | wc -l; echo $((6 * 7))")
        namespace, count, answer = inside.stdout.split()
        assert (count, answer, inside.code) == ("2", "42", 0), inside
        if number % every == 0:
            sandbox.run(HOSTILE[number // every % len(HOSTILE)].replace("{0}", duration))
        else:
            sandbox.run(f"chmod 600 notes.txt; sleep {duration} & cd bin; ls -l")
            assert [attempt.name for attempt in sandbox.attempts] == ["chmod"]
            assert (
                sandbox.inspect("stat -c %a:%U /home/agent/notes.txt /home/agent/x").stdout == "600:agent\n644:anna\n"
            )
        return namespace
    finally:
        sandbox.close()


def run(count: int, every: int, flat_after: int | None = None) -> None:
    duration = f"{10**6 + uuid.uuid4().int % 10**9}"
    before = held(duration)
    # Kept between the episodes by the process itself, whatever they do: one episode opens all of it.
    pool = SandboxPool(LIMITS, size=2)
    namespaces, memory = [], 0.0
    try:
        for number in range(count):
            namespaces.append(episode(pool, number, every, duration))
            if number + 1 == flat_after:
                gc.collect()
                memory = anonymous_mib()
        if flat_after is not None:
            gc.collect()
            assert anonymous_mib() - memory < 20
        assert len(set(namespaces)) > 2  # (the kernel soon uses the number of one that has ended again)
        assert within(5, lambda: not marked(duration))
        assert len(os.listdir("/proc/self/fd")) - before["descriptors"] < 40 + before["descriptors"]
    finally:
        pool.close()
    assert within(5, lambda: held(duration) == before), (held(duration), before)
    assert not any(members(name) for name in set(namespaces))


def test_fifty_episodes_leave_nothing_behind(sandbox_ready):
    run(50, every=4)


@pytest.mark.soak
def test_a_thousand_episodes_leave_nothing_behind_and_memory_flat(sandbox_ready):
    run(1000, every=20, flat_after=200)


def test_an_unclosed_episode_is_ended_with_its_pool(sandbox_ready):
    duration = f"{10**6 + uuid.uuid4().int % 10**9}"
    before = held(duration)
    pool = SandboxPool(LIMITS, size=2)
    forgotten = pool.take()
    forgotten.run(f"sleep {duration} & sleep {duration} & true")
    assert within(3, lambda: len(marked(duration)) == 2)
    pool.close()
    pool.close()
    assert within(5, lambda: held(duration) == before), (held(duration), before)
    forgotten.close()
