"""One bad world costs its own episode and nothing else: not a token, a log-probability or a message of another."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from subl_jax.chat.messages import Message, ToolCall, calls_of
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.trajectory import FAILED, Trajectory
from tests.rollout import policies
from tests.rollout.policies import CALL, CONFIG, RENDERER, SAMPLING, World, episode, task

POLICY = policies.scripted(CALL + "<|end|>", strength=11.0, restless=1.0)
# Longer than any honest call takes here, be the machine as loaded as it may.
TIMEOUT_S = 3.0
OPTIONS = EngineConfig(tool_timeout_s=TIMEOUT_S)
BAD = 50  # index of the first bad episode, which calls its tool under seed 5


class Bad(World):
    """A world in which `act` is called where `where` says; what it returns stands for a tool's result."""

    def __init__(self, where: str, act: Callable[[], object]) -> None:
        super().__init__("go")
        self.where, self.act = where, act

    def opening(self) -> list[Message]:
        if self.where == "opening":
            self.act()
        return super().opening()

    def step(self, message: Message) -> list[Message]:
        results = super().step(message)
        if self.where != "step":
            return results
        content = self.act()
        return [{**result, "content": content} for result in results]  # type: ignore[typeddict-item]

    def done(self) -> bool:
        if self.where == "done":
            self.act()
        return super().done()


class Stuck:
    """A call that does not return before the test is over."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self) -> str:
        self.event.wait(120)
        return "too late"


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    call = Stuck()
    yield call
    call.event.set()


def raising() -> object:
    raise FileNotFoundError(2, "no such world", "/w\udc80")


def run(todo: list[Episode], devices: int = 1, options: EngineConfig = OPTIONS, **kwargs) -> list[Trajectory]:
    found = rollout(
        CONFIG, POLICY, RENDERER, todo, SAMPLING,
        seed=5, devices=jax.local_devices()[:devices], options=options, **kwargs,
    )  # fmt: skip
    return list(found)


def with_bad(*bad: World) -> list[Episode]:
    """The eleven good episodes with bad ones in their midst."""
    good = policies.episodes(11)
    return [*good[:4], *(episode(BAD + number, world) for number, world in enumerate(bad)), *good[4:]]


def same(left: Trajectory, right: Trajectory) -> bool:
    arrays = ("tokens", "loss_mask", "logprobs")
    plain = ("episode", "task_id", "sample", "messages", "tools", "status", "done", "error")
    return all(
        [getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in arrays]
        + [getattr(left, name) == getattr(right, name) for name in plain]
    )


@pytest.fixture(scope="module")
def undisturbed() -> list[Trajectory]:
    return run(policies.episodes(11))


def bad_of(made: list[Trajectory], undisturbed: list[Trajectory], count: int = 1) -> list[Trajectory]:
    """The bad episodes' records, after seeing that every other one is what it was."""
    bad = [trajectory for trajectory in made if trajectory.episode in range(BAD, BAD + count)]
    good = [trajectory for trajectory in made if trajectory.episode >= 100]
    assert len(bad) == count and len(good) == len(undisturbed) == 11
    assert all(same(left, right) for left, right in zip(good, undisturbed, strict=True))
    assert not any(trajectory.error or trajectory.status in FAILED for trajectory in good)
    return bad


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (raising, ["FileNotFoundError", "no such world", r"/w\udc80", "test_failures.py:"]),
        (lambda: "x" * 10_000_000, ["10,000,000 bytes", "262,144 bytes"]),
        (lambda: b"\xff\xfe", ["must be str but is bytes of 2 bytes"]),
        (lambda: "\udcff", ["lone surrogate U+DCFF at position 0"]),
        (lambda: None, ["must be str but is NoneType"]),
    ],
    ids=["raises", "10 MB", "bytes", "surrogate", "nothing"],
)
def test_a_tool_that_fails_ends_its_own_episode_only(undisturbed, act, words, devices):
    made = run(with_bad(Bad("step", act)), devices)
    [bad] = bad_of(made, undisturbed)
    assert (bad.status, bad.done) == ("tool_error", False)
    assert all(word in bad.error for word in words), bad.error
    assert "\n" not in bad.error and bad.error.isprintable()
    # What the policy had written stays, the call that failed included; nothing stands there of what the tool returned.
    assert [message["role"] for message in bad.messages] == ["system", "user", "assistant"]
    assert calls_of(bad.messages[-1]) == (ToolCall("list", {}),)
    assert RENDERER.decode(bad.tokens[bad.loss_mask].tolist()).startswith(CALL)


@pytest.mark.parametrize("devices", [1, 4])
def test_every_world_is_given_back_once_whatever_ended_its_episode(devices):
    bad = [Bad("step", raising), Bad("done", raising), Bad("step", lambda: b"no text")]
    good = [World("go"), World("go", lasts=1), World("stop")]
    made = run([episode(number, world) for number, world in enumerate([*good, *bad])], devices)
    failed = [trajectory.status in FAILED for trajectory in made]
    assert sum(failed) >= 2 and not any(failed[:3])
    assert [world.closed for world in [*good, *bad]] == [1] * 6
    # What a world saw of an episode stands in its trajectory, whatever ended it.
    seen = [{"executed": len(world.executed)} for world in [*good, *bad]]
    assert [trajectory.record for trajectory in made] == seen


def test_a_tool_that_hangs_costs_its_episode_and_the_run_no_more_than_its_limit(undisturbed, stuck):
    run(policies.episodes(11))  # compiled
    statistics = RolloutStatistics()
    began = time.perf_counter()
    made = run(with_bad(Bad("step", stuck)), statistics=statistics)
    seconds = time.perf_counter() - began
    [bad] = bad_of(made, undisturbed)
    assert (bad.status, bad.done) == ("tool_timeout", False)
    assert f"still running after {TIMEOUT_S:g} s" in bad.error and "threading.py" in bad.error
    assert TIMEOUT_S <= seconds < TIMEOUT_S + 5
    assert (statistics.failed, statistics.episodes) == (1, 12)


def test_several_tools_that_hang_are_waited_for_at_the_same_time(undisturbed, stuck):
    began = time.perf_counter()
    options = dataclasses.replace(OPTIONS, tool_workers=4)
    made = run(with_bad(*(Bad("step", stuck) for _ in range(4))), devices=4, options=options)
    seconds = time.perf_counter() - began
    bad = bad_of(made, undisturbed, 4)
    assert {trajectory.status for trajectory in bad} <= {"tool_timeout", "final", "unparseable", "truncated"}
    hung = sum(trajectory.status == "tool_timeout" for trajectory in bad)
    assert hung >= 2  # the restless policy may have called no tool
    assert seconds < 2 * TIMEOUT_S + 5 < hung * TIMEOUT_S + 15


def test_the_others_go_on_while_a_tool_hangs(undisturbed, stuck):
    # With two slots and one of them hanging, the other runs all other episodes: they are finished before the limit.
    began, ends = time.perf_counter(), {}
    for trajectory in rollout(
        CONFIG, POLICY, RENDERER, with_bad(Bad("step", stuck)), SAMPLING,
        seed=5, devices=jax.local_devices()[:1], options=OPTIONS, as_finished=True,
    ):  # fmt: skip
        ends[trajectory.episode] = time.perf_counter() - began
    last = max(ends, key=ends.__getitem__)
    assert last == BAD
    assert sorted(ends.values())[-2] < ends[BAD]


@pytest.mark.parametrize("devices", [1, 4])
def test_an_opening_that_raises_is_an_episode_without_tokens(undisturbed, devices):
    [bad] = bad_of(run(with_bad(Bad("opening", raising)), devices), undisturbed)
    assert (bad.status, bad.done, len(bad.tokens), bad.messages) == ("tool_error", False, 0, [])
    assert "no such world" in bad.error


def test_a_world_that_cannot_even_be_made_is_an_episode_without_tokens(undisturbed):
    todo = with_bad(World("go"))
    todo[4] = Episode(BAD, task(BAD, "go"), 0, raising)  # type: ignore[arg-type]
    [bad] = bad_of(run(todo), undisturbed)
    assert (bad.status, len(bad.tokens)) == ("tool_error", 0)


def test_an_opening_that_hangs_costs_its_episode(undisturbed, stuck):
    began = time.perf_counter()
    [bad] = bad_of(run(with_bad(Bad("opening", stuck))), undisturbed)
    assert time.perf_counter() - began < TIMEOUT_S + 5
    assert (bad.status, bad.done, len(bad.tokens)) == ("tool_timeout", False, 0)


def test_every_opening_may_fail(stuck):
    made = run([episode(number, Bad("opening", raising)) for number in range(5)])
    assert [(trajectory.episode, trajectory.status) for trajectory in made] == [(n, "tool_error") for n in range(5)]
    [alone] = run([episode(0, Bad("opening", stuck))])
    assert alone.status == "tool_timeout"


def test_a_verdict_that_raises_is_a_failure_and_not_a_task_undone(undisturbed):
    [bad] = bad_of(run(with_bad(Bad("done", raising))), undisturbed)
    assert (bad.status, bad.done) == ("tool_error", False)
    assert "no such world" in bad.error
    assert bad.loss_mask.any() and bad.messages[-1]["role"] == "assistant"


def test_a_result_that_comes_after_the_limit_changes_nothing(undisturbed, stuck):
    todo = with_bad(Bad("step", stuck))
    found = rollout(
        CONFIG, POLICY, RENDERER, todo, SAMPLING,
        seed=5, devices=jax.local_devices()[:1], options=OPTIONS, as_finished=True,
    )  # fmt: skip
    [bad] = [trajectory for trajectory in found if trajectory.episode == BAD]
    before = [message["role"] for message in bad.messages], len(bad.tokens)
    stuck.event.set()  # the hung call returns now
    time.sleep(0.3)
    assert ([message["role"] for message in bad.messages], len(bad.tokens)) == before


def test_good_and_bad_are_told_apart_by_the_statistics(stuck):
    statistics = RolloutStatistics()
    worlds = [Bad("step", raising), Bad("opening", raising), Bad("step", lambda: "\udcff")]
    made = run(with_bad(*worlds), statistics=statistics)
    failed = [trajectory for trajectory in made if trajectory.status in FAILED]
    assert statistics.failed == len(failed) >= 2 and statistics.episodes == 14
    assert np.all([trajectory.error for trajectory in failed])
