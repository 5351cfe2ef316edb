"""Two processes, each with devices of its own: the episodes of one process, in one sealed dataset."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest

from subl_jax import data
from subl_jax.rollout.engine import rollout
from subl_jax.trajectory import Trajectory
from tests.data.episodes import assert_same, environment, python
from tests.programs import xla_flags
from tests.rollout import policies
from tests.rollout.policies import CONFIG, RENDERER, SAMPLING
from tests.rollout.test_store import COUNT, METADATA, policy

# What each process does: arguments are its rank, the coordinator's port, the directory, how many episodes there are, and
# how many it may finish before it is killed (-1: all).
CHILD = """
    import json, sys
    from pathlib import Path
    import jax
    rank, port, directory, count, survives = int(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:6])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
    from tests.rollout import policies, test_store
    assert jax.process_count() == 2 and len(jax.devices()) == 2 * len(jax.local_devices())

    class Local(test_store.Runner):
        def __call__(self, todo, statistics):
            self.asked = [each.index for each in todo]
            found = test_store.rollout(
                test_store.CONFIG, test_store.policy(), test_store.RENDERER, todo, test_store.SAMPLING,
                seed=5, statistics=statistics, as_finished=True,
            )
            for number, trajectory in enumerate(found):
                if number == survives:
                    test_store.os.kill(test_store.os.getpid(), test_store.signal.SIGKILL)
                yield trajectory

    run = Local()
    figures = test_store.roll_out(Path(directory), run, policies.episodes(count))
    print(json.dumps({"asked": run.asked, "figures": figures, "devices": len(jax.local_devices())}))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(directory: Path, devices: int, count: int, survives: int = -1) -> list[subprocess.Popen]:
    port = free_port()
    env = environment(XLA_FLAGS=xla_flags(devices), JAX_PLATFORMS="cpu")
    return [
        subprocess.Popen(
            python(CHILD, str(rank), str(port), str(directory), str(count), str(survives)),
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def together(directory: Path, devices: int, count: int = COUNT) -> list[dict[str, Any]]:
    """What the two processes printed, after both have ended well."""
    children = start(directory, devices, count)
    told = []
    try:
        for child in children:
            out, err = child.communicate(timeout=150)
            assert child.returncode == 0, err[-3000:]
            told.append(json.loads([line for line in out.splitlines() if line.startswith("{")][-1]))
    finally:
        for child in children:
            child.kill()
    return told


@pytest.fixture(scope="module")
def alone() -> list[Trajectory]:
    """The same episodes on one device of one process."""
    devices = jax.local_devices()[:1]
    return list(rollout(CONFIG, policy(), RENDERER, policies.episodes(COUNT), SAMPLING, seed=5, devices=devices))


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_make_the_dataset_of_one(alone, tmp_path, devices):
    directory = tmp_path / "stage" / "dataset"
    first, second = together(directory, devices)
    assert (first["devices"], second["devices"]) == (devices, devices)
    # Eleven episodes do not divide by two: the first process has one more.
    assert (first["asked"], second["asked"]) == ([*range(100, 106)], [*range(106, 111)])
    for left, right in zip(data.read(directory), alone, strict=True):
        assert_same(left, right)
    assert data.read_metadata(directory).items() >= METADATA.items()
    assert [path.name for path in directory.parent.iterdir()] == ["dataset"]
    # Both report the figures of the whole.
    assert first["figures"]["episodes"] == COUNT and first["figures"]["failed"] == 0
    assert first["figures"]["sampled_tokens"] == sum(int(item.loss_mask.sum()) for item in alone)
    assert {**first["figures"], "compile_s": 0} == {**second["figures"], "compile_s": 0}


def test_a_process_without_episodes_waits_for_the_other(alone, tmp_path):
    directory = tmp_path / "stage" / "dataset"
    first, second = together(directory, 1, count=1)
    assert (first["asked"], second["asked"]) == ([100], [])
    [made] = data.read(directory)
    assert_same(made, alone[0])


@pytest.mark.soak
def test_two_killed_processes_go_on_with_what_each_has_not_finished(alone, tmp_path):
    directory = tmp_path / "stage" / "dataset"
    children = start(directory, 1, COUNT, survives=3)
    errors = [child.communicate(timeout=150)[1] for child in children]
    # Whichever dies first may take the other along; each leaves what it has finished.
    assert any(child.returncode == -signal.SIGKILL for child in children), errors
    finished = sum(path.read_bytes().count(b"\n") - 1 for path in directory.parent.glob("journal-*"))
    assert 3 <= finished <= 6
    first, second = together(directory, 1)
    assert len(first["asked"]) + len(second["asked"]) == COUNT - finished
    assert first["figures"]["resumed"] == finished
    for left, right in zip(data.read(directory), alone, strict=True):
        assert_same(left, right)
