"""The seeds workload: the training steps of several seeds as one program (`jax.vmap` over seeds), or one after the other.

Cases come in by name; rows come out. The models, the batch and the objective are the tiny preset's. Ours is what the
experiments do, one seed after the other through one compiled step; the peer is the same step over all seeds at a time. Both
are given the same parameters and tokens, and must have given the same losses before anything is timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax import metrics
from subl_jax.benchmark import harness, machine, results
from subl_jax.benchmark.harness import BenchmarkError, Program
from subl_jax.benchmark.registry import Options, Workload
from subl_jax.benchmark.results import OURS, Absent, Row, Work
from subl_jax.distill.accounting import shape_of
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import make_optimizer
from subl_jax.distill.step import Batch, Frozen, TrainState, compiled_step
from subl_jax.models import decoder
from subl_jax.presets import tiny

NAME, TOGETHER = "seeds", "one_program"
# The same sums in another order.
RTOL = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how many seeds of it.

    Attributes:
      size: of the tiny preset's models.
      loss: of the objective; a divergence has a teacher of the same size.
      seeds: how many.
    """

    size: str
    loss: str
    seeds: int


CASES: Mapping[str, Case] = {
    f"{role}_{size}_{seeds}": Case(size, loss, seeds)
    for role, loss in (("base", "hard_label"), ("student", "forward_kl"))
    for size in ("large", "small")
    for seeds in (2, 5)
}


def describe(cases: Sequence[str]) -> list[str]:
    """One line for what is common and one per case."""
    train = tiny().student.train
    lines = [
        f"seeds: float32, the tiny preset's models and batch ({train.batch_rows} rows of {train.row_tokens} tokens a seed), "
        "random tokens, all of them in the loss, AdamW; "
        f"{TOGETHER}: the step of all seeds as one program, ours: one seed after the other"
    ]
    return lines + [
        f"  {name}: {CASES[name].seeds} seeds, {CASES[name].size} model, {CASES[name].loss}" for name in cases
    ]


def measure(
    cases: Sequence[str], peers: Sequence[str], options: Options, *, table: Mapping[str, Case] = CASES
) -> Iterator[Row | Absent]:
    """Rows of each case, one with the peer, or without where it is not asked for.

    Args:
      cases, peers, options: what is asked for.
      table: the workload's definitions; replaced in tests.

    Raises:
      BenchmarkError: the two ways do not give the same losses.
    """
    for name in cases:
        harness.say(f"{name}: {', '.join([OURS, *peers])}")
        yield _measure(name, table[name], peers, options)


def _measure(name: str, case: Case, peers: Sequence[str], options: Options) -> Row:
    config, train = tiny().model(case.size), tiny().student.train
    objective = Objective(case.loss)  # type: ignore[arg-type]
    teacher = config if objective.needs_teacher else None
    step: Any = compiled_step(objective, config, teacher, train.optimizer, train.steps, 0)
    transformation = make_optimizer(train.optimizer, train.steps)

    drawn: Any = jax.jit(functools.partial(decoder.init, config))

    def start(seed: int) -> tuple[TrainState, Frozen]:
        params = drawn(jax.random.key(seed))
        frozen = Frozen(teacher and drawn(jax.random.key(1000 + seed)))
        return TrainState(params, transformation.init(params), jnp.zeros((), jnp.int32)), frozen

    programs = [_one_after_the_other(step, [start(seed) for seed in range(case.seeds)])]
    if peers:
        together: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[start(seed) for seed in range(case.seeds)])
        programs.append(_together(jax.jit(jax.vmap(step.__wrapped__), donate_argnums=(0,)), together))

    def inputs(number: int) -> list[Batch]:
        return [
            _batch(np.random.default_rng([number, seed]), train.batch_rows, train.row_tokens, config.vocab_size)
            for seed in range(case.seeds)
        ]

    timings = harness.interleave(
        programs, inputs, rounds=options.rounds, check=functools.partial(_agree, name), others=options.others
    )
    shape = shape_of(config, drawn(jax.random.key(0)), None)
    tokens = train.batch_rows * train.row_tokens
    loss_tokens = train.batch_rows * (train.row_tokens - 1)
    flops = None
    if teacher is not None:
        flops = case.seeds * metrics.kd_step_flops(
            shape, shape, tokens, loss_tokens, [train.row_tokens] * train.batch_rows
        )
    work = Work(
        NAME, name, shape.params, train.batch_rows * case.seeds, train.row_tokens, config.vocab_size, "float32",
        f"{machine.processor()}, {machine.usable_cores()} cores", loss_tokens * case.seeds, flops,
        extra={"seeds": case.seeds},
    )  # fmt: skip
    (row,) = results.rows(work, timings)
    return row


def _one_after_the_other(step: Any, starts: list[tuple[TrainState, Frozen]]) -> Program:
    states, frozen = [state for state, _ in starts], [each for _, each in starts]

    def run(batches: list[Batch]) -> np.ndarray:
        losses = []
        for seed, batch in enumerate(batches):
            states[seed], found = step(states[seed], frozen[seed], batch)
            losses.append(found["loss"])
        jax.block_until_ready(states)
        return np.asarray(losses)

    return Program(OURS, run, step._cache_size)


def _together(step: Any, start: tuple[TrainState, Frozen]) -> Program:
    state, frozen = start

    def run(batches: list[Batch]) -> np.ndarray:
        nonlocal state
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        state, found = step(state, frozen, stacked)
        jax.block_until_ready(state)
        return np.asarray(found["loss"])

    return Program(TOGETHER, run, step._cache_size, must_compile=True)


def _batch(draw: np.random.Generator, rows: int, time: int, vocab: int) -> Batch:
    """One document per row; every token but the first is in the loss."""
    tokens = draw.integers(0, vocab, (1, rows, time), dtype=np.int32)
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), tokens.shape)
    places = np.arange(rows * time, dtype=np.int32).reshape(rows, time)[:, :-1].reshape(1, 1, -1)
    targets = tokens[:, :, 1:].reshape(1, 1, -1)
    weights, banned = np.ones(targets.shape, np.float32), np.zeros((*targets.shape, 0), np.int32)
    fields: Any = (tokens, np.ones_like(tokens), positions, places, targets, weights, banned)
    return Batch(*fields)


def _agree(name: str, given: list[Batch], outputs: Mapping[str, np.ndarray]) -> None:
    del given
    for peer, losses in outputs.items():
        if not np.allclose(losses, outputs[OURS], rtol=RTOL, atol=0):
            raise BenchmarkError(f"{name}: {peer} has losses {losses.tolist()}, ours {outputs[OURS].tolist()}")


WORKLOAD = Workload(NAME, tuple(CASES), (TOGETHER,), describe, measure)
