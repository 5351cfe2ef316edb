"""A rollout on disk: killed anywhere it goes on where it was, nothing twice, and ends in the dataset of an unbroken one."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging

from subl_jax import data
from subl_jax.metrics import progress
from subl_jax.rollout import store
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.trajectory import Trajectory
from tests.data.episodes import assert_same, run_python
from tests.programs import xla_flags
from tests.rollout import policies
from tests.rollout.policies import CALL, CONFIG, RENDERER, SAMPLING, World, episode

COUNT = 11
IDENTITY = {"seed": 5, "rollout": SAMPLING, "teacher": "abc"}
METADATA = {"teacher": "restless"}


@functools.cache
def policy():
    return policies.scripted(CALL + "<|end|>", strength=11.0, restless=1.0)


class Runner:
    """Runs episodes for real, and keeps what it was asked for; breaks off after `survives` finished ones."""

    def __init__(self, survives: int | None = None, kill: bool = False) -> None:
        self.survives, self.kill = survives, kill
        self.asked: list[int] = []

    def __call__(self, todo: Sequence[Episode], statistics: RolloutStatistics) -> Iterator[Trajectory]:
        self.asked = [each.index for each in todo]
        found = rollout(
            CONFIG, policy(), RENDERER, todo, SAMPLING,
            seed=5, devices=jax.local_devices()[:1], statistics=statistics, as_finished=True,
        )  # fmt: skip
        for number, trajectory in enumerate(found):
            if number == self.survives:
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            yield trajectory


def roll_out(directory: Path, run: Runner, todo: Sequence[Episode] | None = None, identity=None):
    episodes = policies.episodes(COUNT) if todo is None else todo
    identity = IDENTITY if identity is None else identity
    return store.roll_out(directory, identity, episodes, run, metadata=METADATA, label="roll out", in_flight=4)


def journals(directory: Path) -> list[Path]:
    return sorted(directory.parent.glob("journal-*"))


def assert_equal(directory: Path, expected: Path) -> None:
    """Record for record, bit by bit, and the files of text alike."""
    for left, right in zip(data.read(directory), data.read(expected), strict=True):
        assert_same(left, right)
    name = "trajectories.jsonl"
    assert (directory / name).read_bytes() == (expected / name).read_bytes()
    assert data.read_metadata(directory) == data.read_metadata(expected)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken") / "dataset"
    roll_out(directory, Runner())
    return directory


def test_a_dataset_is_in_episode_order_whatever_order_episodes_end_in(unbroken):
    direct = list(rollout(CONFIG, policy(), RENDERER, policies.episodes(COUNT), SAMPLING, seed=5))
    for left, right in zip(data.read(unbroken), direct, strict=True):
        assert_same(left, right)
    assert data.read_metadata(unbroken).items() >= METADATA.items()
    assert [path.name for path in unbroken.parent.iterdir()] == ["dataset"]  # neither journal nor shards are left


def test_the_figures_are_those_of_the_dataset(unbroken, tmp_path):
    figures = roll_out(tmp_path / "stage" / "dataset", Runner())
    made = data.read(unbroken)
    assert figures["episodes"] == COUNT and figures["resumed"] == figures["failed"] == 0
    assert figures["sampled_tokens"] == sum(int(item.loss_mask.sum()) for item in made)
    cut_off = sum(item.status in ("truncated", "turn_limit", "length_limit") for item in made)
    assert figures["truncated"] == cut_off > 0
    assert 0 < figures["tokens_per_s"] <= figures["decode_tokens_per_s"]
    assert 0 < figures["occupancy"] <= 1 and 0 <= figures["tools_share"] <= 1
    assert figures["compiled"] == figures["compile_s"] == 0  # the unbroken run compiled all


def test_kill_9_in_the_middle_loses_and_repeats_nothing_that_was_finished(unbroken, tmp_path):
    directory = tmp_path / "stage" / "dataset"
    code = """
        import os, sys
        from pathlib import Path
        from tests.rollout.test_store import Runner, roll_out
        roll_out(Path(sys.argv[1]), Runner(survives=4, kill=True))
    """
    killed = run_python(code, str(directory), XLA_FLAGS=xla_flags(), JAX_PLATFORMS="cpu")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not directory.exists() and len(journals(directory)) == 1
    with data.Journal.open(journals(directory)[0], IDENTITY) as journal:
        finished = {index for index, _ in journal.finished}
    assert len(finished) == 4
    again = Runner()
    figures = roll_out(directory, again)
    assert sorted(again.asked) == [n for n in range(100, 100 + COUNT) if n not in finished]
    assert figures["resumed"] == 4 and figures["episodes"] == COUNT
    assert_equal(directory, unbroken)
    assert journals(directory) == []


def test_any_number_of_interruptions_ends_in_the_same_dataset(unbroken, tmp_path):
    directory, asked = tmp_path / "stage" / "dataset", []
    for survives in (0, 3, 0, 5):
        run = Runner(survives)
        with pytest.raises(KeyboardInterrupt):
            roll_out(directory, run)
        asked.append(len(run.asked))
    run = Runner()
    roll_out(directory, run)
    assert [*asked, len(run.asked)] == [11, 11, 8, 8, 3]
    assert_equal(directory, unbroken)


@pytest.mark.parametrize("broken", ["write_shard", "seal_shards"])
def test_a_break_behind_the_last_episode_runs_none_again(unbroken, tmp_path, monkeypatch, broken):
    directory = tmp_path / "stage" / "dataset"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, broken, interrupted)
        roll_out(directory, Runner())
    again = Runner()
    figures = roll_out(directory, again)
    assert again.asked == [] and figures["resumed"] == COUNT
    assert figures["tokens_per_s"] is None and figures["sampled_tokens"] > 0
    assert_equal(directory, unbroken)


def test_a_break_between_the_seal_and_the_stages_marker_runs_none_again(unbroken, tmp_path):
    directory = tmp_path / "stage" / "dataset"
    first = roll_out(directory, Runner())
    again = Runner()
    figures = roll_out(directory, again)
    assert again.asked == []
    counts = ("episodes", "sampled_tokens", "truncated", "failed")
    assert [figures[name] for name in counts] == [first[name] for name in counts]


def test_the_dataset_of_another_rollout_in_its_place_is_replaced(unbroken, tmp_path):
    # Only a stage that is not marked as finished gets here: what stands there belongs to nobody.
    directory = tmp_path / "stage" / "dataset"
    roll_out(directory, Runner(), policies.episodes(2), {**IDENTITY, "tasks": 2})
    roll_out(directory, Runner())
    assert_equal(directory, unbroken)


def test_the_journal_of_another_configuration_is_refused_by_name_and_kept(tmp_path):
    directory = tmp_path / "stage" / "dataset"
    with pytest.raises(KeyboardInterrupt):
        roll_out(directory, Runner(3))
    [path] = journals(directory)
    before, run = path.read_bytes(), Runner()
    other = {**IDENTITY, "rollout": dataclasses.replace(SAMPLING, slots=8)}
    with pytest.raises(data.JournalError, match=r"rollout\.slots.*2.*8.*delete .*journal.*--workdir") as refused:
        roll_out(directory, run, identity=other)
    assert "\n" not in str(refused.value)
    assert run.asked == [] and path.read_bytes() == before


def test_what_another_number_of_processes_left_is_taken_over(unbroken, tmp_path):
    directory = tmp_path / "stage" / "dataset"
    made = data.read(unbroken)
    for rank in range(3):
        name = f"journal-{rank:05d}-of-00003.jsonl"
        with data.Journal.open(directory.parent / name, IDENTITY) as journal:
            for place in list(data.block(COUNT, rank, 3))[:2]:
                journal.append(made[place])
    run = Runner()
    figures = roll_out(directory, run)
    assert len(run.asked) == COUNT - 6 and figures["resumed"] == 6
    assert_equal(directory, unbroken)
    assert journals(directory) == []


def test_failed_episodes_are_stored_counted_and_said(tmp_path, caplog):
    class Broken(World):
        def opening(self):
            raise OSError("no disk")

    todo = [episode(n, Broken("go") if n == 1 else World("go")) for n in range(3)]
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        figures = roll_out(tmp_path / "stage" / "dataset", Runner(), todo)
    stored = data.read(tmp_path / "stage" / "dataset")
    assert [item.status == "tool_error" for item in stored] == [False, True, False]
    assert len(stored[1].tokens) == 0 and "no disk" in stored[1].error
    assert (figures["failed"], figures["episodes"]) == (1, 3)
    assert "1 of 3 episodes failed in their environment, such as episode 1" in caplog.text
    assert "occupancy" in caplog.text and "tokens/s" in caplog.text


def test_progress_shows_what_is_left_and_how_fast_it_goes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(store, "progress", functools.partial(progress, interval_s=0.0))
    roll_out(tmp_path / "stage" / "dataset", Runner())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("roll out: ")]
    assert len(lines) == COUNT + 1
    assert all(" to go [tokens/s=" in line and "occupancy=" in line for line in lines[:-1])
    assert "11/11 episode" in lines[-2] and " 0 s to go" in lines[-2]


def test_the_estimate_counts_what_is_in_flight_as_half_done():
    counted = RolloutStatistics(episodes=2, wall_seconds=6.0)
    assert counted.eta_s(10, 4) == pytest.approx((10 - 4) * 6.0 / 4)
    assert RolloutStatistics().eta_s(10, 4) is None
    assert np.isclose(RolloutStatistics(episodes=10, wall_seconds=5.0).eta_s(10, 0) or 0.0, 0.0)
