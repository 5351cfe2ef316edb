"""The mixture of the teacher's trajectories and the student's own: which step reads what, and what is kept of a round."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax.chat.rendering import Renderer
from subl_jax.distill import on_policy
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import OnPolicy, OnPolicyConfig, OnPolicySource, coins, stored_rollouts
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.settings.interface import Task
from subl_jax.settings.registry import get_setting
from subl_jax.trajectory import Trajectory
from tests.distill import tiny

STEPS, ROWS, CAPACITY, EVERY = 20, 2, 24, 5


def teacher_source(seed: int = 3) -> BatchSource:
    documents = tiny.documents(14, seed=1)
    for each in documents:
        each.tokens[0] %= 30  # those of 30 and more tell the student's rounds
    return BatchSource(documents, [len(each.tokens) for each in documents], CAPACITY, ROWS, STEPS, seed)


class Student:
    """Rollouts that tell, in every document's first token, the round they are of; notes what was asked."""

    def __init__(self, longest: int = 12) -> None:
        self.asked: list[tuple[int, Any]] = []
        self.longest = longest

    def __call__(self, number: int, config: Any, params: Any) -> Sequence[Trajectory]:
        assert config is tiny.SMALL
        self.asked.append((number, params))
        found = tiny.documents(9, seed=100 + number, longest=self.longest)
        for each in found:
            each.tokens[0] = 30 + number
        return found


def mixture(weight: float, student: Any, seed: int = 3, steps: int = STEPS) -> OnPolicySource:
    config = OnPolicyConfig(weight, EVERY, 9)
    return OnPolicySource(
        teacher_source(seed), OnPolicy(config, student), tiny.SMALL, CAPACITY, ROWS, steps, seed
    )  # fmt: skip


def walk(source: OnPolicySource, start: int = 0, steps: int = STEPS) -> list[Any]:
    """The batches from a position on, as a loop asks for them: `prepare` first, then all up to its answer."""
    found, position = [], start
    while position < steps:
        until = source.prepare(position, lambda at=position: f"student at {at}")
        assert until > position
        found += [source.batch(each) for each in range(position, min(until, steps))]
        position = until
    return found


def rounds_in(batch: Any) -> set[int]:
    """The rounds that the documents of a batch are of; empty for the teacher's."""
    tokens, segments, positions = (np.asarray(each) for each in batch[:3])
    firsts = tokens[(segments > 0) & (positions == 0)]
    return {int(first) - 30 for first in firsts if first >= 30}


def same(left: Any, right: Any) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left[:-1], right[:-1], strict=True))


# --- Coins ------------------------------------------------------------------------------------------------------------


def test_a_steps_coin_depends_on_the_seed_and_the_step_alone():
    long, short = coins(0.5, 400, 7), coins(0.5, 30, 7)
    np.testing.assert_array_equal(long[:30], short)  # not on how many steps there will be
    assert not np.array_equal(long, coins(0.5, 400, 8))
    assert 160 < long.sum() < 240


def test_a_larger_weight_adds_own_steps_and_takes_none_away():
    few, many = coins(0.3, 300, 1), coins(0.8, 300, 1)
    assert not (few & ~many).any() and many.sum() > few.sum()
    assert not coins(0.0, 300, 1).any() and coins(1.0, 300, 1).all()


@pytest.mark.parametrize(("field", "value"), [("weight", -0.1), ("weight", 1.5), ("refresh_steps", 0), ("episodes", 0)])
def test_a_mixture_without_meaning_is_refused_by_name(field: str, value: Any):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        OnPolicyConfig(**{field: value})


# --- Which step reads what --------------------------------------------------------------------------------------------


def test_at_weight_zero_the_student_is_never_asked_and_the_batches_are_the_teachers():
    student = Student()
    found, plain = walk(mixture(0.0, student)), teacher_source()
    assert student.asked == []
    assert all(same(batch, plain.batch(position)) for position, batch in enumerate(found))


def test_own_steps_read_the_round_they_stand_in_and_the_others_the_teachers_batches_in_order_without_a_gap():
    student = Student()
    source, plain = mixture(0.5, student), teacher_source()
    own = coins(0.5, STEPS, 3)
    assert 0 < own.sum() < STEPS
    found, expected = walk(source), 0
    for position, batch in enumerate(found):
        if own[position]:
            assert rounds_in(batch) == {position // EVERY}
        else:
            assert rounds_in(batch) == set()
            np.testing.assert_array_equal(batch.tokens, plain.batch(expected).tokens)
            expected += 1
    assert expected == STEPS - own.sum()


def test_every_round_with_an_own_step_asks_the_student_once_as_it_is_at_the_rounds_beginning():
    student = Student()
    walk(mixture(1.0, student))
    assert student.asked == [(number, f"student at {number * EVERY}") for number in range(STEPS // EVERY)]
    # A round whose coins all fall to the teacher asks for nothing.
    seed = next(seed for seed in range(200) if not coins(0.2, STEPS, seed)[:EVERY].any())
    student = Student()
    walk(mixture(0.2, student, seed))
    assert 0 not in [number for number, _ in student.asked]


def test_a_last_round_that_is_shorter_ends_with_the_run():
    source = mixture(1.0, Student(), steps=12)
    assert source.prepare(10, lambda: None) == 12
    assert rounds_in(source.batch(11)) == {2}


def test_batches_of_both_kinds_share_one_shape_once_both_have_been_seen():
    source = mixture(0.5, Student(longest=8))
    shapes = [tuple(np.shape(field) for field in batch[:-1]) for batch in walk(source)]
    assert len(set(shapes)) == 1
    # A student that says more than all before widens the shapes from its round on, and only then.
    source = mixture(0.5, lambda number, *_: tiny.documents(9, number, longest=8 if number < 2 else 24))
    widths = [batch.loss_places.shape[-1] for batch in walk(source)]
    assert widths == sorted(widths) and len(set(widths)) <= 2


def test_facts_tell_what_the_batch_of_the_position_holds():
    source = mixture(0.5, Student())
    for start in range(0, STEPS, EVERY):
        source.prepare(start, lambda: None)
        for position in range(start, start + EVERY):
            batch, facts = source.batch(position), source.facts(position)
            assert facts.loss_tokens == int(np.asarray(batch.loss_weights).sum())
            assert facts.tokens == int(np.count_nonzero(batch.segments)) == sum(facts.documents)


def test_a_run_that_resumes_inside_a_round_goes_on_with_the_same_batches():
    unbroken = walk(mixture(0.5, Student()))
    for start in (3, 7, 15, 19):
        resumed = walk(mixture(0.5, Student()), start)
        assert all(same(*pair) for pair in zip(unbroken[start:], resumed, strict=True)), start


def test_a_run_that_resumes_behind_a_round_that_said_much_keeps_the_shapes_that_it_had():
    """Sums run over chunks of loss tokens: other shapes round differently, and a resume would not be bitwise."""

    def talkative(number: int, *_: Any) -> Sequence[Trajectory]:
        return [tiny.document(range(20), range(3, 20)) for _ in range(4)] if number == 0 else tiny.documents(9, number)

    unbroken = walk(mixture(1.0, talkative))
    resumed = walk(mixture(1.0, talkative), 2 * EVERY)
    assert all(same(*pair) for pair in zip(unbroken[2 * EVERY :], resumed, strict=True))


# --- Episodes that cannot be trained on -------------------------------------------------------------------------------


def test_failed_episodes_and_those_longer_than_a_row_are_left_out_with_a_warning(caplog):
    good = tiny.documents(4, seed=5)
    failed = dataclasses.replace(tiny.document([39, 1, 2, 3], [2]), status="tool_error", error="broken")
    long = tiny.document([38, *range(CAPACITY)], [3])
    source = mixture(1.0, lambda *_: [failed, *good, long])
    with caplog.at_level("WARNING"):
        batches = walk(source)
    tokens = np.concatenate([np.asarray(batch.tokens).ravel() for batch in batches])
    firsts = {int(each.tokens[0]) for each in good}
    starts = {
        int(token)
        for batch in batches
        for token in np.asarray(batch.tokens)[(np.asarray(batch.segments) > 0) & (np.asarray(batch.positions) == 0)]
    }
    assert starts == firsts and len(tokens)
    assert "2 of the student's 6 episodes" in caplog.text


def test_a_student_that_says_nothing_that_fits_is_an_error_with_its_remedy():
    source = mixture(1.0, lambda *_: [tiny.document(range(CAPACITY + 1), [3])])
    with pytest.raises(ValueError, match=f"round 0: none of the student's 1 .*{CAPACITY} tokens.*rollout.context"):
        source.prepare(0, lambda: None)


def test_an_own_batch_before_its_round_was_prepared_is_an_error():
    with pytest.raises(RuntimeError, match="position 2 was asked for before"):
        mixture(1.0, Student()).batch(2)


# --- What is kept of a round ------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """Stands in for the rollout engine; notes (policy, seed, the episodes) of every call."""
    calls: list[tuple[int, int, list[int]]] = []

    def rollout(
        config: Any, params: Any, renderer: Any, episodes: Any, sampling: Any, **more: Any
    ) -> Iterator[Trajectory]:
        calls.append((more["policy"], more["seed"], [each.index for each in episodes]))
        for each in episodes:
            if params == "killed" and each.index == 2:
                raise KeyboardInterrupt
            document = tiny.document([more["policy"], each.index, 5, 6], [2, 3], f"task/{each.index}")
            yield dataclasses.replace(document, episode=each.index)

    monkeypatch.setattr(on_policy, "rollout", rollout)
    return calls


def stored(directory: Path, **identity: Any) -> on_policy.Rollouts:
    task = Task("task", "safe", "find", "template", "train", "prompt", {}, {})
    setting = get_setting("api")

    def episodes(number: int) -> list[Episode]:
        del number
        environment = functools.partial(setting.environment, task, frozenset())
        return [Episode(index, task, 0, environment) for index in range(4)]

    renderer = object.__new__(Renderer)  # the engine's stand-in reads nothing of it

    return stored_rollouts(
        directory, renderer, episodes, SamplingConfig(slots=2), EngineConfig(), seed=11,
        identity={"run": 1, **identity}, label="test",
    )  # fmt: skip


def test_a_round_that_stands_on_disk_is_read_and_not_run_again(tmp_path: Path, engine: list):
    first = stored(tmp_path)(2, tiny.SMALL, "params")
    assert engine == [(2, 11, [0, 1, 2, 3])]  # the round is the policy's version
    again = stored(tmp_path)(2, tiny.SMALL, "other params")
    assert len(engine) == 1
    assert [each.tokens.tolist() for each in again] == [each.tokens.tolist() for each in first]
    stored(tmp_path)(3, tiny.SMALL, "params")
    assert engine[1:] == [(3, 11, [0, 1, 2, 3])]


def test_a_round_that_was_killed_goes_on_with_the_episodes_that_are_not_finished(tmp_path: Path, engine: list):
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path)(0, tiny.SMALL, "killed")
    found = stored(tmp_path)(0, tiny.SMALL, "params")
    assert engine[1] == (0, 11, [2, 3])
    assert [each.episode for each in found] == [0, 1, 2, 3]


def test_a_sealed_round_of_another_run_is_not_taken_for_this_ones(tmp_path: Path, engine: list):
    stored(tmp_path)(0, tiny.SMALL, "params")
    stored(tmp_path, run=2)(0, tiny.SMALL, "params")
    assert len(engine) == 2


# --- In the loop ------------------------------------------------------------------------------------------------------


class Remembered:
    """A student that says other things with other parameters; what it said in a round stays, as on disk."""

    def __init__(self, killed_in: int | None = None) -> None:
        self.said: dict[int, list[Trajectory]] = {}
        self.killed_in = killed_in

    def __call__(self, number: int, config: Any, params: Any) -> Sequence[Trajectory]:
        if number == self.killed_in:
            raise KeyboardInterrupt
        if number not in self.said:
            assert jax.tree.structure(params) == jax.tree.structure(tiny.params(config))
            digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).digest()
            self.said[number] = tiny.documents(9, int.from_bytes(digest[:4], "big"), longest=22 if number == 0 else 10)
        return self.said[number]


def train_with(student: Remembered, directory: Path) -> Any:
    config = TrainConfig(
        steps=16, batch_rows=ROWS, row_tokens=CAPACITY, checkpoint_every=5, log_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    return train(
        Model(tiny.SMALL, tiny.params(tiny.SMALL)), tiny.documents(14, seed=1), config, Objective("reverse_kl"),
        seed=3, directory=directory, stage="student", logs=directory, metadata={"run": 1},
        teacher=Model(tiny.LARGE, tiny.params(tiny.LARGE, 1)),
        on_policy=OnPolicy(OnPolicyConfig(0.6, 4, 9), student),
    )  # fmt: skip


def test_a_run_killed_in_a_rollout_resumes_bitwise_and_reads_what_was_said_before(tmp_path: Path):
    unbroken, own = Remembered(), coins(0.6, 16, 3)
    expected = train_with(unbroken, tmp_path / "unbroken").params
    rounds = [number for number in range(4) if own[4 * number : 4 * number + 4].any()]
    assert sorted(unbroken.said) == rounds
    last = rounds[-1]
    assert last >= 2 and (4 * last) % 5  # killed between two checkpoints, behind rounds that were trained on
    student = Remembered(killed_in=last)
    with pytest.raises(KeyboardInterrupt):
        train_with(student, tmp_path / "killed")
    assert sorted(student.said) == rounds[:-1]
    student.killed_in = None
    resumed = train_with(student, tmp_path / "killed").params
    for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    for number in rounds:
        for one, other in zip(unbroken.said[number], student.said[number], strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)


def test_the_student_is_rolled_out_as_it_is_then_and_not_as_it_began(tmp_path: Path):
    seen: list[Any] = []

    class Noted(Remembered):
        def __call__(self, number: int, config: Any, params: Any) -> Sequence[Trajectory]:
            seen.append(np.asarray(params["embedding"]).copy())  # the step donates its own
            return super().__call__(number, config, params)

    train_with(Noted(), tmp_path)
    np.testing.assert_array_equal(seen[0], np.asarray(tiny.params(tiny.SMALL)["embedding"]))
    assert all(not np.array_equal(one, other) for one, other in zip(seen, seen[1:], strict=False))
