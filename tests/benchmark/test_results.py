"""Rows of the contract, their table and their JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from subl_jax.benchmark import results
from subl_jax.benchmark.harness import Timing
from subl_jax.benchmark.machine import Machine
from subl_jax.benchmark.results import OURS, Absent, Work

# DESIGN, "Every command that yields figures": the names that others read.
CONTRACT = (
    "workload case params batch seq vocab dtype device peer ratio median_s p20_s p80_s runs tokens_per_s flops mfu mbu "
    "peak_bytes compile_s"
).split()
MACHINE = Machine((0, 1), 2, "a processor", 0.5)
WORK = Work(
    "rollout", "small_b4", 4_400_000, 4, 192, 4096, "float32", "a processor, 2 cores", 512, 10**9, {"prompt": 64}
)
TIMINGS = {
    OURS: Timing((1.0, 2.0, 4.0), 3.0, 0.01),
    "slow": Timing((4.0, 4.0, 4.0), 0.5),
    "quick": Timing((1.0, 1.0, 1.0), 0.0),
}


def document(**changes: Any) -> dict[str, Any]:
    found = results.rows(WORK, TIMINGS, extra={"slow": {"graphs": 1}})
    return json.loads(json.dumps(results.document(found, [Absent("gone", "why")], MACHINE, ["a case"])))


def test_every_row_holds_the_contract() -> None:
    for row in document()["rows"]:
        assert list(row)[: len(CONTRACT)] == CONTRACT


def test_times_are_ours_and_the_ratio_is_the_peers_over_ours() -> None:
    slow, quick = results.rows(WORK, TIMINGS, extra={"slow": {"graphs": 1}})
    assert (slow.peer, quick.peer) == ("slow", "quick")
    for row in (slow, quick):
        assert (row.median_s, row.runs, row.compile_s, row.busy_cores) == (2.0, 3, 3.0, 0.01)
        assert row.tokens_per_s == 512 / 2.0
    assert slow.ratio == 2.0 and slow.peer_tokens_per_s == 512 / 4.0 and slow.peer_compile_s == 0.5
    assert quick.ratio == 0.5
    assert (slow.ratio_p20, slow.ratio_p80) == pytest.approx((1.4, 3.2))  # quantiles of 1, 2, 4
    assert slow.extra == {"prompt": 64, "graphs": 1} and quick.extra == {"prompt": 64}


def test_ours_alone_has_one_row_without_a_peer() -> None:
    (row,) = results.rows(WORK, {OURS: TIMINGS[OURS]})
    assert row.peer is None and row.ratio is None and row.peer_median_s is None and row.median_s == 2.0


def test_what_makes_no_sense_on_a_cpu_is_null() -> None:
    for row in document()["rows"]:
        assert row["mfu"] is None and row["mbu"] is None and row["peak_bytes"] is None and row["flops"] == 10**9


def test_a_card_with_a_known_peak_has_an_mfu() -> None:
    work = dataclasses.replace(WORK, device="NVIDIA H200", flops=int(989.4e12))
    (row,) = results.rows(work, {OURS: TIMINGS[OURS]}, mbu=0.5, peak_bytes=123)
    assert row.mfu == pytest.approx(0.5) and row.mbu == 0.5 and row.peak_bytes == 123
    (row,) = results.rows(dataclasses.replace(work, flops=None), {OURS: TIMINGS[OURS]})
    assert row.mfu is None


def test_the_document_says_where_and_with_what() -> None:
    written = document()
    assert written["machine"] == {"cores": [0, 1], "threads": 2, "processor": "a processor", "load": 0.5}
    assert written["absent"] == [{"peer": "gone", "reason": "why"}] and written["cases"] == ["a case"]
    assert {"jax", "numpy", "transformers", "torch", "python"} <= set(written["versions"])


def test_the_table_is_aligned_and_shows_both_sides() -> None:
    found = results.rows(WORK, TIMINGS) + results.rows(WORK, {OURS: TIMINGS[OURS]})
    header, rule, slow, quick, alone = results.table(found).splitlines()
    assert "2.000 [1.400, 3.200]" in slow and "2.00 [1.40, 3.20]" in slow and "4.4M" in slow
    assert header.index("peer") == slow.index("slow") == quick.index("quick")
    assert "busy" not in slow
    busy = dataclasses.replace(found[0], busy_cores=0.5)
    assert results.table([busy]).splitlines()[-1].endswith("2.00 [1.40, 3.20] busy")
    assert alone.split()[-3:] == ["-", "-", "-"] and max(map(len, (header, rule, slow, quick))) <= 120
