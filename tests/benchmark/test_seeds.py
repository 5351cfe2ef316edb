"""The seeds workload: both ways take the same steps, and a way that does not is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from subl_jax.benchmark import seeds
from subl_jax.benchmark.harness import BenchmarkError
from subl_jax.benchmark.machine import Machine
from subl_jax.benchmark.registry import Options, get_workload
from subl_jax.benchmark.results import OURS, Row
from subl_jax.config import ExperimentConfig
from subl_jax.presets import tiny

# Without a watch on others: tests share the machine.
OPTIONS = Options(Machine((0,), 1, "a processor", None), rounds=1, others=None)
TABLE = {"two": seeds.Case("small", "forward_kl", 2)}


def few() -> ExperimentConfig:
    """The tiny preset with less of everything that takes time to compile and to run."""
    config = tiny()
    train = dataclasses.replace(config.student.train, batch_rows=2, row_tokens=24)
    model = dataclasses.replace(config.small, vocab_size=96)
    return dataclasses.replace(config, small=model, student=dataclasses.replace(config.student, train=train))


@pytest.fixture(scope="module")
def row() -> Row:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seeds, "tiny", few)
        (found,) = seeds.measure(["two"], [seeds.TOGETHER], OPTIONS, table=TABLE)
    assert isinstance(found, Row)
    return found


def test_a_row_counts_the_tokens_and_flops_of_all_seeds(row: Row) -> None:
    """A dense decoder by hand: two operations per weight forward, six with the gradient; teacher and student alike."""
    train, model = few().student.train, few().small
    assert (row.batch, row.seq) == (2 * train.batch_rows, train.row_tokens)
    assert row.extra["seeds"] == 2
    assert row.peer == seeds.TOGETHER and row.ratio is not None and row.ratio > 0
    tokens, loss_tokens = 2 * 2 * 24, 2 * 2 * 23
    width, heads = 32, 2 * 16
    attention = width * heads + 2 * width * heads // 2 + heads * width
    weights = 2 * (attention + 3 * width * 88)
    causal = 2 * 2 * 2 * 24**2 * 2 * heads  # documents of two seeds, layers, and S² h d_h
    expected = tokens * 8 * weights + loss_tokens * 8 * width * model.vocab_size + 4 * causal
    assert row.flops == pytest.approx(expected, rel=0.02)  # norms


def test_ways_that_lose_alike_are_timed_and_others_are_refused() -> None:
    ours = np.array([5.0, 6.0])
    seeds._agree("two", [], {OURS: ours, seeds.TOGETHER: ours * (1 + 1e-5)})
    with pytest.raises(BenchmarkError, match=r"two: one_program has losses \[5.0, 6.1\]"):
        seeds._agree("two", [], {OURS: ours, seeds.TOGETHER: np.array([5.0, 6.1])})


def test_a_batch_predicts_every_token_but_the_first_from_the_one_before() -> None:
    batch = seeds._batch(np.random.default_rng(0), 2, 5, 11)
    flat = batch.tokens.reshape(-1)
    for place, target in zip(batch.loss_places.reshape(-1), batch.loss_targets.reshape(-1), strict=True):
        assert flat[place + 1] == target
        assert place % 5 != 4  # never from one document into the next


def test_the_registry_knows_every_case() -> None:
    workload = get_workload("seeds")
    assert len(workload.describe(workload.cases)) == 1 + len(workload.cases)
