"""What a run is said to cost, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax import metrics
from subl_jax.distill.accounting import Ledger, Meter, Work, memory_in_use, peak_flops, shape_of
from subl_jax.distill.batches import BatchFacts
from subl_jax.models import decoder, lora
from subl_jax.models.config import LoraConfig
from tests.distill import tiny

# tiny.SMALL: width 16, one layer of 2 query heads and 1 key/value head of 8, MLP 24, 40 tokens, tied.
BODY = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24  # q, k and v, o, the MLP
NORMS = 2 * 16 + 16
# tiny.LARGE: width 24, two layers of 2 and 2 heads of 8, MLP 32.
LARGE = 2 * (4 * 24 * 16 + 3 * 24 * 32) + 2 * 2 * 24 + 24
FACTS = BatchFacts(tokens=30, capacity=48, loss_tokens=11, documents=(12, 10, 8))
SQUARES = 12 * 12 + 10 * 10 + 8 * 8


def small() -> metrics.Shape:
    return shape_of(tiny.SMALL, tiny.params(tiny.SMALL))


def large() -> metrics.Shape:
    return shape_of(tiny.LARGE, tiny.params(tiny.LARGE))


def test_a_shape_counts_what_is_neither_embedding_nor_head():
    assert small() == metrics.Shape(BODY + NORMS, 16, 40, 1, 16)
    assert large() == metrics.Shape(LARGE, 24, 40, 2, 16)
    untied = dataclasses.replace(tiny.SMALL, tie_embeddings=False)
    assert shape_of(untied, tiny.params(untied)) == small()


def test_adapters_are_counted_apart_where_they_are_trained_and_with_all_others_where_they_are_not():
    config = dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2, targets=("q", "down")))
    adapters = lora.init_adapters(config, jax.random.key(0))
    count = 2 * (16 + 16) + 2 * (24 + 16)
    base = tiny.params(tiny.SMALL)
    assert shape_of(config, base, adapters) == dataclasses.replace(small(), lora_params=count)
    merged = decoder.merge(adapters, base)
    assert shape_of(config, merged) == dataclasses.replace(small(), params=BODY + NORMS + count)


def test_flops_of_a_step_are_those_of_the_formula():
    student = 6 * (BODY + NORMS) * 30 + 6 * 16 * 40 * 11 + 2 * SQUARES * 3 * 16
    teacher = 2 * LARGE * 30 + 2 * 24 * 40 * 11 + 2 * SQUARES * 2 * 16
    base = 2 * (BODY + NORMS) * 30 + 2 * 16 * 40 * 11 + 2 * SQUARES * 16
    assert Work(small()).flops(FACTS) == student  # hard labels, and a cached teacher, which computes nothing
    assert Work(small(), large()).flops(FACTS) == student + teacher
    assert Work(small(), large(), small()).flops(FACTS) == student + teacher + base  # `anchor`
    adapted = dataclasses.replace(small(), lora_params=100)
    assert Work(adapted).flops(FACTS) == ((4 * (BODY + NORMS) + 600) * 30 + 4 * 16 * 40 * 11 + 2 * SQUARES * 3 * 16)


# --- Meters -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def card(kind: str = "NVIDIA H200", peak: int = 7_000, process: int = 0) -> Any:
    stats = {"peak_bytes_in_use": peak, "bytes_in_use": 1}
    return SimpleNamespace(device_kind=kind, platform="gpu", process_index=process, memory_stats=lambda: stats)


def finished(meter: Meter, loss: float) -> Any:
    """A record whose step the device has finished."""
    record = meter.record({"loss": jnp.float32(loss)})
    record[1].result()
    return record


def test_rates_are_those_between_two_records_and_costs_those_of_the_run():
    clock = Clock()
    ledger = Ledger(clock)
    work = Work(small())
    flops = work.flops(FACTS)
    with Meter(work, ledger, [card(), card(peak=9_000), card(peak=10**6, process=1)]) as meter:
        with ledger.spent_on("setup"):
            clock.now += 2
        with ledger.spent_on("compile"):
            clock.now += 5
        meter.start()
        for _ in range(3):
            meter.count(FACTS)
        with ledger.spent_on("input"):
            clock.now += 1
        clock.now += 3
        first = meter.values(finished(meter, 0.5))
        assert first == {
            "loss": 0.5, "tokens_per_s": 90 / 4, "loss_tokens_per_s": 33 / 4, "packing": 30 / 48, "goodput": 3 / 4,
            "mfu": pytest.approx(3 * flops / (4 * 3 * 989.4e12)), "peak_bytes": 9_000,
        }  # fmt: skip
        meter.count(FACTS)
        record = finished(meter, 0.25)
        clock.now += 10  # it is read later than it was finished
        assert meter.values(record)["tokens_per_s"] == 30 / 1e-9
        meter.count(FACTS)
        with ledger.spent_on("checkpoint"):
            clock.now += 2
        clock.now += 3
        last = meter.values(finished(meter, 0.125))
        assert (last["tokens_per_s"], last["goodput"]) == (30 / 15, 1 - 2 / 15)
        costs = meter.costs()
    assert costs.seconds == 2 + 5 + 4 + 10 + 5
    assert (costs.compile_s, costs.goodput) == (5, pytest.approx(1 - (2 + 5 + 1 + 2) / 26))
    assert (costs.tokens_per_s, costs.loss_tokens_per_s, costs.packing) == (150 / 26, 55 / 26, 30 / 48)
    assert (costs.flops, costs.peak_bytes) == (5 * flops, 9_000)
    assert costs.mfu == pytest.approx(5 * flops / ((26 - 2 - 5) * 3 * 989.4e12))


def test_a_device_of_unknown_peak_has_no_utilisation():
    assert peak_flops([card(), card("abacus")]) is None
    assert peak_flops([card(), card("TPU v4")]) == 989.4e12 + 275e12
    clock = Clock()
    with Meter(Work(small()), Ledger(clock), [card("abacus")]) as meter:
        meter.start()
        meter.count(FACTS)
        clock.now += 1
        assert "mfu" not in meter.values(finished(meter, 1))
        assert meter.costs().mfu is None


def test_memory_on_a_cpu_is_the_anonymous_memory_of_the_process():
    before = memory_in_use(jax.local_devices())
    held = np.ones(40_000_000 // 8)
    after = memory_in_use(jax.local_devices())
    assert before is not None and after is not None
    assert 30_000_000 < after - before < 60_000_000
    del held


def test_seconds_are_counted_once_by_kind_and_items_pass_through():
    clock = Clock()
    ledger = Ledger(clock)

    def slow():
        for item in range(3):
            clock.now += 1
            yield item
        clock.now += 0.5

    for item in ledger.waiting_for("input", slow()):
        clock.now += 10 * item
    with pytest.raises(KeyError), ledger.spent_on("checkpoint"):
        clock.now += 4
        raise KeyError
    assert dict(ledger.seconds) == {"input": 3.5, "checkpoint": 4.0} and ledger.total == 7.5
