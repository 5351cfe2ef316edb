"""The command's names, refusals and files; what is measured is replaced."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from absl import flags

from subl_jax.benchmark import command, registry, results
from subl_jax.benchmark.harness import BenchmarkError, Timing
from subl_jax.benchmark.registry import Options, Workload
from subl_jax.benchmark.results import OURS, Absent, Row
from tests.benchmark.test_results import WORK

CASES = ("small_b1", "small_b16", "large_b1")


def measure(cases: Sequence[str], peers: Sequence[str], options: Options) -> Iterator[Row | Absent]:
    busy = 0.5 if options.rounds == 3 else 0.0
    timings = {name: Timing((1.0, 2.0), 0.1, busy) for name in (OURS, *peers) if name != "gone"}
    for case in cases:
        yield from results.rows(dataclasses.replace(WORK, case=case), timings)
    if "gone" in peers:
        yield Absent("gone", "not here")


@pytest.fixture(autouse=True)
def _workload(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(
        "rollout", CASES, ("peer", "gone"), lambda cases: [f"defined {case}" for case in cases], measure
    )
    monkeypatch.setattr(registry, "get_workload", lambda name: workload)


def run(*arguments: str) -> None:
    given = flags.FlagValues()
    command.define_flags(given)
    given(["throughput", "--workload=rollout", *arguments])
    command.run(given)


def test_it_prints_a_table_and_writes_rows_definitions_and_absences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--against=peer,gone", "--cases=small_*", f"--out={tmp_path / 'rows.json'}")
    printed, said = capsys.readouterr()
    assert "absent: gone: not here" in printed and "other processes" not in printed
    assert "threads each" in said and "defined small_b16" in said and "defined large_b1" not in said
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["case"], row["peer"]) for row in written["rows"]] == [("small_b1", "peer"), ("small_b16", "peer")]
    assert written["absent"][0]["peer"] == "gone" and written["cases"] == ["defined small_b1", "defined small_b16"]


def test_company_is_told_beneath_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    run("--rounds=3")
    assert (
        "other processes computed meanwhile (busy_cores) in small_b1, small_b16, large_b1:" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against=per"], "--against=per is unknown: there are peer, gone; did you mean peer"),
        (["--cases=smal_b1"], "--cases=smal_b1 is unknown: there are .*; did you mean small_b1"),
        (["--cases=huge_*"], r"--cases=huge_\* is unknown"),
        (["--out=/nowhere/at/all.json"], "/nowhere/at is not a directory"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_name(arguments: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(*arguments)


def test_cases_run_in_their_order_and_once() -> None:
    assert registry.matching(["large_*", "small_b1", "*"], CASES, "--cases") == CASES
    assert registry.matching([], CASES, "--cases") == CASES
    assert registry.matching(["large_b1", "small_b1"], CASES, "--cases") == ("small_b1", "large_b1")


def throughput(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "experiments.throughput", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def test_an_unknown_workload_is_one_line_with_the_nearest_name() -> None:
    done = throughput("--workload=rolout")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("error: --workload=rolout is unknown: there .*rollout.*; did you mean rollout.\n", done.stderr)
    done = throughput()
    assert done.returncode == 1 and done.stderr.startswith("error: --workload is not given")


def test_help_explains_every_flag() -> None:
    shown = throughput("--help").stdout
    for flag in ("workload", "against", "cases", "rounds", "cores", "out", "tunix_python"):
        assert f"  --{flag}:" in shown, flag
