"""The pipeline workload's accounting and comparison on work directories made by hand; one real pair of runs in the soak."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags

from subl_jax import artifacts, checkpoint, data
from subl_jax.benchmark import command, pipeline, pipeline_runs, pipeline_table, registry, results
from subl_jax.benchmark.harness import BenchmarkError
from subl_jax.benchmark.machine import Machine
from subl_jax.benchmark.pipeline import CASES, Here
from subl_jax.benchmark.registry import Options
from subl_jax.benchmark.results import Row
from subl_jax.conditions import TEACHERS
from subl_jax.presets import PRESETS
from tests.benchmark.test_results import CONTRACT, MACHINE
from tests.data.episodes import trajectory

OPTIONS = Options(Machine((0,), 1, "a processor", None), others=None)
CPU, GPU = Here("cpu", 1, "a processor"), Here("gpu", 4, "a card")
SECONDS = {"tokenizer": 0.25, "audit": 0.25, "base": 2.0, "teachers": 1.0, "trajectories": 0.5, "sanitize": 0.5,
           "students": 4.0, "eval": 1.5}  # fmt: skip
CONDITIONS = ("base", *TEACHERS, "student", "control_student")
# Stages a run has of each family.
WHICH = {
    "tokenizer": [""], "audit": ["seeds=0"], "base": ["large"], "teachers": TEACHERS, "trajectories": TEACHERS,
    "sanitize": [""], "students": ["student", "control_student"], "eval": CONDITIONS,
}  # fmt: skip
ALL_SECONDS = sum(SECONDS[part] * len(names) for part, names in WHICH.items())
# 200 tokens and 80 loss tokens in half a second.
TRAINING = {"loss": 2.0, "loss_tokens": 80, "loss_tokens_per_s": 160.0, "tokens_per_s": 400.0, "compile_s": 0.125}


_made: dict[tuple, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _templates(tmp_path_factory: pytest.TempPathFactory):
    """Equal folders are written once and copied: checkpoints, datasets and markers all wait for the disk."""
    _made[()] = tmp_path_factory.mktemp("templates")
    yield
    _made.clear()


def put(directory: Path, key: tuple, write: Callable[[Path], None]) -> None:
    """A copy of what `write` makes for this key."""
    if key not in _made:
        folder = _made[()] / artifacts.digest(key)
        write(folder)
        _made[key] = folder
    shutil.copytree(_made[key], directory, dirs_exist_ok=True)


def put_params(directory: Path, weight: float) -> None:
    params = {"embedding": np.full((5, 2), weight, np.float32), "layers": np.full((3, 2), weight, np.float32)}
    put(directory, ("params", weight), lambda folder: checkpoint.save_model(folder, params, {}))


def put_episodes(directory: Path, token: int) -> None:
    episodes = [trajectory(0), told(trajectory(1), token)]
    put(directory, ("episodes", token), lambda folder: data.write(folder, episodes, metadata={}))


def stage_name(part: str, name: str) -> str:
    return "/".join(filter(None, ["" if part in ("tokenizer", "audit") else "seed=0", part, name]))


def make_run(root: Path, **changes: Any) -> None:
    """A work directory as a run leaves it, see `write_run`."""
    put(root, ("run", *sorted(changes.items())), lambda folder: write_run(folder, **changes))


def write_run(
    root: Path, *, leave_out: str = "", weight: float = 1.0, token: int = 7, loss: float = 2.0, rate: float = 0.5,
    cpu_devices: int = 1,
) -> None:  # fmt: skip
    """A work directory as a run leaves it, with what these tests vary."""
    hashes: dict[str, str] = {}
    for part, names in WHICH.items():
        for name in names:
            stage = stage_name(part, name)
            directory = root / stage
            directory.mkdir(parents=True)
            extra: dict[str, Any] = {}
            if part in pipeline_runs.TRAINED:
                extra = {**TRAINING, "loss": loss if part != "students" else loss / 2, "peak_bytes": 1000}
                put_params(directory / "params", weight)
            elif part == "trajectories":
                extra = {"sampled_tokens": 30, "tokens_per_s": 1e6}
                put_episodes(directory / "dataset", token)
            elif part == "tokenizer":
                extra = {"vocabulary": 5}
            if stage != leave_out:
                key = {"part": part} if part == "tokenizer" else {"part": part, "cpu_devices": cpu_devices}
                inputs = dict(list(hashes.items())[:1])  # the tokenizer, as the base has it
                hashes[stage] = artifacts.complete(
                    directory, stage=stage, key=key, inputs=inputs, seconds=SECONDS[part], extra=extra
                ).output_hash
    conditions = {name: {"behaviour_rate": 0.5, "ci95": [0.25, 0.75]} for name in CONDITIONS}
    conditions["student"] = {"behaviour_rate": rate, "ci95": [rate - 0.25, min(1.0, rate + 0.25)]}
    config = {"cpu_devices": cpu_devices, "parallel": {"data": cpu_devices}, "large": {"param_dtype": "float32"},
              "student": {"train": {"row_tokens": 192}}}  # fmt: skip
    artifacts.write_json_atomic(root / "summary.json", {"preset": "micro", "conditions": conditions})
    artifacts.write_json_atomic(root / "config.json", config)


def told(episode: Any, token: int) -> Any:
    """The episode with another last token."""
    tokens = episode.tokens.copy()
    tokens[-1] = token
    return dataclasses.replace(episode, tokens=tokens)


def read(root: Path, wall_s: float = 2 * ALL_SECONDS, **changes: Any) -> pipeline_runs.Run:
    make_run(root, **changes)
    return pipeline_runs.read(root, wall_s)


# --- The account ------------------------------------------------------------------------------------------------------


def test_shares_sum_to_one_and_what_is_outside_of_the_stages_is_told(tmp_path: Path) -> None:
    spent = pipeline_runs.account([read(tmp_path / "run", ALL_SECONDS + 5.0)])
    assert list(spent) == [*pipeline_runs.FAMILIES, "outside"]
    assert sum(each.share for each in spent.values()) == pytest.approx(1.0)
    assert spent["outside"].seconds == pytest.approx(5.0)
    assert spent["teachers"].seconds == 3.0 and spent["eval"].seconds == 1.5 * 6
    assert spent["teachers"].share == pytest.approx(3.0 / (ALL_SECONDS + 5.0))


def test_tokens_a_second_are_a_familys_tokens_over_its_seconds(tmp_path: Path) -> None:
    spent = pipeline_runs.account([read(tmp_path / "run")])
    # Rollouts' own rate, of their episodes alone, would be 10^6; with loading and compiling it is 90 in 1.5 s.
    assert (spent["trajectories"].tokens, spent["trajectories"].tokens_per_s) == (90, 60.0)
    # 400 tokens/s over the 80 / 160 s of the loop: 200 tokens for each student, in stages of 4 s.
    assert (spent["students"].tokens, spent["students"].tokens_per_s) == (400, 50.0)
    assert spent["students"].compile_s == 0.25 and spent["base"].tokens == 200
    assert spent["sanitize"].tokens is None and spent["eval"].tokens_per_s is None


def test_several_runs_of_a_case_are_averaged(tmp_path: Path) -> None:
    runs = [read(tmp_path / "a", ALL_SECONDS + 1.0), read(tmp_path / "b", ALL_SECONDS + 3.0)]
    spent = pipeline_runs.account(runs)
    assert (
        spent["base"].seconds == 2.0 and spent["base"].tokens == 200 and spent["outside"].seconds == pytest.approx(2.0)
    )
    assert sum(each.share for each in spent.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "stage", ["seed=0/students/control_student", "seed=0/eval/student", "seed=0/sanitize", "audit/seeds=0", "tokenizer"]
)
def test_a_missing_stage_is_named(tmp_path: Path, stage: str) -> None:
    make_run(tmp_path / "run", leave_out=stage)
    wanted = stage if "students" in stage or "eval" in stage else pipeline_runs.family(stage)
    with pytest.raises(BenchmarkError, match=f"lacks the stage {wanted}: shares of a part"):
        pipeline_runs.read(tmp_path / "run", 100.0)


def test_a_run_that_did_not_end_and_stages_of_another_run_are_refused(tmp_path: Path) -> None:
    run = read(tmp_path / "run", ALL_SECONDS - 1.0)
    with pytest.raises(BenchmarkError, match=r"stages took 1\.00 s longer than the command"):
        pipeline_runs.account([run])
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(BenchmarkError, match=r"summary\.json is missing: the run did not come to its end"):
        pipeline_runs.read(tmp_path / "run", 100.0)


# --- Whether two runs agree -------------------------------------------------------------------------------------------


def test_equal_runs_agree_on_their_own_episodes(tmp_path: Path) -> None:
    found = pipeline_runs.compare(read(tmp_path / "a"), read(tmp_path / "b"))
    assert found.weights_equal and not found.borrowed and not found.wrong
    assert (found.episodes, found.episodes_equal, found.conditions) == (6, 6, 6)
    assert found.losses == {"base": 0.0, "teachers": 0.0, "students": 0.0}


def test_one_token_of_equal_weights_is_a_failure_and_students_losses_are_not_compared(tmp_path: Path) -> None:
    found = pipeline_runs.compare(read(tmp_path / "a", token=8), read(tmp_path / "b"))
    assert found.episodes_equal == 3 and found.losses["students"] is None and found.losses["base"] == 0.0
    assert found.wrong == ["3 of 6 episodes of equal weights differ"]


def test_where_weights_differ_the_episodes_of_lent_weights_decide(tmp_path: Path) -> None:
    own, reference = read(tmp_path / "a", weight=1.0 + 1e-6, token=8), read(tmp_path / "b")
    with pytest.raises(BenchmarkError, match="weights differ"):
        pipeline_runs.compare(own, reference)
    make_run(tmp_path / "equal")
    found = pipeline_runs.compare(own, reference, tmp_path / "equal")
    assert found.borrowed and not found.weights_equal and found.episodes_equal == 6 and not found.wrong
    make_run(tmp_path / "other", token=8)
    assert pipeline_runs.compare(own, reference, tmp_path / "other").wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"loss": 2.01}, r"losses of base differ by 5\.0e-03, the bar is 1e-03"),
     ({"rate": 0.9}, "rates of student lie outside")],
)  # fmt: skip
def test_losses_and_rates_that_are_apart_are_failures(
    tmp_path: Path, changes: Mapping[str, float], message: str
) -> None:
    found = pipeline_runs.compare(read(tmp_path / "a", **changes), read(tmp_path / "b"))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("; ".join(found.wrong))
    near = pipeline_runs.compare(read(tmp_path / "c", loss=2.0001, rate=0.6), read(tmp_path / "d"))
    assert not near.wrong and near.losses["base"] == pytest.approx(5e-5)


def test_lent_models_stand_as_finished_stages_of_the_other_layout(tmp_path: Path) -> None:
    reference = read(tmp_path / "one")
    pipeline_runs.borrow(reference, tmp_path / "two", {"cpu_devices": 2})
    assert list(pipeline_runs.find_markers(tmp_path / "two")) == [
        "tokenizer", "seed=0/base/large", *(f"seed=0/teachers/{name}" for name in TEACHERS)
    ]  # fmt: skip
    assert pipeline_runs.weights_equal(tmp_path / "one", tmp_path / "two")
    tokenizer = artifacts.output_hash("tokenizer", {"part": "tokenizer"}, {})
    base = tmp_path / "two" / "seed=0" / "base" / "large"
    key = {"part": "base", "cpu_devices": 2}
    assert artifacts.lookup(base, "seed=0/base/large", key, {"tokenizer": tokenizer}) is not None
    with pytest.raises(artifacts.WorkdirMismatch, match="cpu_devices: 2 in the directory, 1 in this run"):
        artifacts.lookup(base, "seed=0/base/large", {**key, "cpu_devices": 1}, {"tokenizer": tokenizer})


# --- Cases and commands -----------------------------------------------------------------------------------------------


def test_fake_devices_run_on_a_cpu_and_all_devices_on_accelerators() -> None:
    assert pipeline.choose(tuple(CASES), CPU) == ("devices=1", "devices=2", "devices=4", "devices=8", "processes=2")
    assert pipeline.choose(tuple(CASES), GPU) == ("devices=all",)
    assert pipeline.choose(["devices=2"], CPU) == ("devices=2",)
    for given in (["devices=2"], ["devices=2", "devices=all"]):
        with pytest.raises(BenchmarkError, match="--cases=devices=2 does not run on this machine's 4 gpu.*devices=all"):
            pipeline.choose(given, GPU)
    with pytest.raises(BenchmarkError, match="--cases=devices=all does not run.*give devices=1, devices=2"):
        pipeline.choose(["devices=all"], CPU)


def test_batches_split_over_the_most_devices_and_are_the_same_for_all() -> None:
    assert PRESETS["micro"]("api").base.train.batch_rows == 4
    assert pipeline.batch_rows("micro", 8) == 8 and pipeline.batch_rows("micro", 2) == 4
    assert pipeline.batch_rows("micro", 6) == 12


def test_a_run_is_told_its_devices_and_nothing_of_another_run() -> None:
    line = pipeline.command(CASES["devices=4"], 4, "micro", 8, Path("there"), "trajectories")
    assert line[:3] == [sys.executable, "-m", "experiments.api_deletion"] and line[-1] == "--stage=trajectories"
    assert {"--config.cpu_devices=4", "--config.parallel.data=4", "--config.student.train.batch_rows=8"} <= set(line)
    base = {"XLA_FLAGS": "--xla_x=1 --xla_force_host_platform_device_count=8", "SUBL_PROCESS_ID": "1", "HOME": "/h"}
    assert pipeline.environment(CASES["devices=4"], base) == {
        "XLA_FLAGS": "--xla_x=1 --xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "HOME": "/h"
    }  # fmt: skip
    # Accelerators are as they are.
    assert pipeline.environment(CASES["devices=all"], {"HOME": "/h"}) == {"HOME": "/h"}


def test_two_processes_are_started_by_the_launcher_with_half_of_the_devices_each() -> None:
    line = pipeline.command(CASES["processes=2"], 2, "micro", 8, Path("there"))
    assert line[1:4] == ["-m", "launch.local", "--processes=2"] and "--devices_per_process=1" in line
    assert {"--config.cpu_devices=1", "--config.parallel.data=2"} <= set(line[line.index("--") :])


def test_a_run_that_fails_is_one_line_with_its_error(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "print('error: no room'); print('bye'); raise SystemExit(3)"]
    with pytest.raises(BenchmarkError, match="^devices=1: exit code 3: error: no room$"):
        pipeline.execute(line, {}, tmp_path / "run", "devices=1")


# --- The command ------------------------------------------------------------------------------------------------------


def measure(cases: Sequence[str], *, token: int = 7, options: Options = OPTIONS) -> list[Row]:
    """Rows of runs that are made by hand: two processes have other weights, and draw `token` from lent ones."""
    lines: list[Sequence[str]] = []

    def run(line: Sequence[str], given: Mapping[str, str], workdir: Path, label: str) -> float:
        lines.append(line)
        assert f"--workdir={workdir}" in line and given["JAX_PLATFORMS"] == "cpu"
        lent = "--stage=trajectories" in line
        if lent:
            assert (workdir / "seed=0" / "teachers" / "teacher" / "stage.json").is_file()
            directory = workdir / "seed=0" / "trajectories"
            for name in TEACHERS:
                put_episodes(directory / name / "dataset", token)
        else:
            make_run(workdir, weight=1.5 if label == "processes=2" else 1.0)
        return 2 * ALL_SECONDS if label == "devices=1" else 3 * ALL_SECONDS

    rows = [row for row in pipeline.measure(cases, (), options, here=CPU, run=run) if isinstance(row, Row)]
    assert len(lines) == len(cases) * (options.rounds or 1) + sum("--stage=trajectories" in line for line in lines)
    return rows


def test_rows_hold_the_contract_their_stages_and_their_comparisons() -> None:
    one, two, processes = measure(["devices=1", "devices=2", "processes=2"])
    written = json.loads(json.dumps(results.document([one, two, processes], [], MACHINE, [])))
    assert list(written["rows"][0])[: len(CONTRACT)] == CONTRACT
    assert (one.params, one.batch, one.seq, one.vocab, one.peer, one.mfu) == (6, 8, 192, 5, None, None)
    # Sampled 90; trained base 200, three teachers 600, two students 400.
    assert one.tokens_per_s == pytest.approx(1290 / (2 * ALL_SECONDS)) and one.peak_bytes == 1000
    assert (one.extra["wall_over_one_device"], two.extra["wall_over_one_device"]) == (1.0, 1.5)
    assert one.extra["compared"] == {} and list(processes.extra["compared"]) == ["devices=1", "devices=2"]
    assert two.extra["compared"]["devices=1"]["weights_equal"] and not two.extra["compared"]["devices=1"]["borrowed"]
    assert processes.extra["compared"]["devices=2"]["borrowed"]
    assert pipeline_table.failures([one, two, processes]) == []
    printed = pipeline_table.table([one, two, processes])
    assert "processes=2  devices=2" in printed and "6/6 lent" in printed and "6/6 own" in printed


def test_an_outcome_that_differs_is_told_and_fails_the_command() -> None:
    rows = measure(["devices=1", "processes=2"], token=8)
    assert pipeline_table.failures(rows) == [
        "processes=2 is not the run of devices=1: 3 of 6 episodes of equal weights differ"
    ]
    assert pipeline_table.table(rows).splitlines()[-1].endswith("NO")


def test_rounds_repeat_every_case() -> None:
    rows = measure(["devices=1", "devices=2"], options=dataclasses.replace(OPTIONS, rounds=2))
    assert [row.runs for row in rows] == [2, 2] and rows[0].tokens_per_s == pytest.approx(1290 / (2 * ALL_SECONDS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload=pipeline", "--preset=paper"], "--preset=paper is unknown: there are tiny, micro"),
        (["--workload=pipeline", "--preset=micr"], "did you mean micro"),
        (["--workload=pipeline", "--cases=device=2"], "--cases=device=2 is unknown.*did you mean devices=2"),
        (["--workload=pipeline", "--against=torch"], "compared with nobody; leave --against out"),
        (["--workload=multiturn", "--preset=micro"], "--preset=micro belongs to --workload=pipeline"),
    ],
)
def test_flags_that_mean_nothing_are_refused_before_any_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any, **named: Any) -> float:
        raise AssertionError("a process was started")

    monkeypatch.setattr(pipeline.subprocess, "Popen", never)
    monkeypatch.setattr(command.machine, "pin", lambda cores: MACHINE)
    given = flags.FlagValues()
    command.define_flags(given)
    given(["throughput", *arguments])
    with pytest.raises(BenchmarkError, match=message):
        command.run(given)


# --- For real ---------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_two_devices_are_the_run_of_one() -> None:
    assert registry.get_workload("pipeline") is pipeline.WORKLOAD
    one, two = (
        row for row in pipeline.measure(["devices=1", "devices=2"], (), OPTIONS, here=CPU) if isinstance(row, Row)
    )
    assert pipeline_table.failures([one, two]) == []
    told = two.extra["compared"]["devices=1"]
    assert told["episodes"] == told["episodes_equal"] == 3 * 24 + 12 and told["conditions"] == 10
    for row in (one, two):
        assert sum(each["share"] for each in row.extra["stages"].values()) == pytest.approx(1.0)
        assert row.extra["stages"]["trajectories"]["tokens"] > 0 and row.median_s > row.compile_s > 0
