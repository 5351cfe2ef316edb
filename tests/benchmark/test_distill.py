"""The distill workload on models of a few thousand parameters: the same step on every side, what is refused, memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax.benchmark import (
    distill,
    distill_torch,
    harness,
    registry,
    results,
    step_process,
    step_worker,
    torch_peers,
)
from subl_jax.benchmark.distill import CASES, LLAMA, Case
from subl_jax.benchmark.harness import BenchmarkError, PeerAbsent, Timing
from subl_jax.benchmark.machine import Machine
from subl_jax.benchmark.registry import Options
from subl_jax.benchmark.results import OURS, Absent, Row
from subl_jax.benchmark.step_process import Outcome, StepProcess
from subl_jax.benchmark.step_worker import Recipe

torch = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")

# Every number differs from every other one, so that none can be taken for another.
STUDENT = {
    **LLAMA, "vocab_size": 101, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
TEACHER = {**STUDENT, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 56}
MICRO = Case(STUDENT, TEACHER, rows=3, length=12, prompt=5)
# Without a watch on others: tests share the machine.
OPTIONS = Options(Machine((0,), 1, "a processor", None), rounds=2, others=None)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    directory = tmp_path_factory.mktemp("micro")
    for name, options, seed in (("student", STUDENT, 1), ("teacher", TEACHER, 2)):
        torch_peers.save_random_llama(directory / name, options, seed)
    return Recipe(str(directory / "student"), str(directory / "teacher"), 3, 12, 5, 1)


def steps(side: Any, count: int = 3) -> list[Outcome]:
    return [Outcome(*side.step(side.prepare(distill.tokens_of(MICRO, number)))) for number in range(count)]


def measure(*peers: str, options: Options = OPTIONS) -> list[Row | Absent]:
    return list(distill.measure(["micro"], peers, options, table={"micro": MICRO}))


# --- The same step ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(recipe: Recipe) -> list[Outcome]:
    from subl_jax.benchmark.distill_jax import JaxStep

    return steps(JaxStep(recipe))


def test_torch_and_ours_take_the_same_steps(recipe: Recipe, ours: list[Outcome]) -> None:
    theirs = steps(distill_torch.TorchStep("torch", recipe))
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        distill.check_agreement(number == 0, {OURS: mine, "torch": other})
    # Clipping and the update have changed something: the batch of the first round would now give another loss.
    assert ours[0].gradient_norm > 1.0


def test_the_dense_loss_is_the_mean_divergence_of_the_loss_tokens(recipe: Recipe, ours: list[Outcome]) -> None:
    from transformers import AutoModelForCausalLM

    tokens = distill.tokens_of(MICRO, 0)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(tokens)).logits.double().numpy()
            for folder in (recipe.student, recipe.teacher)
        ]
    log_q, log_p = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in logits)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    # Token t is predicted from t - 1; the first five are prompt.
    assert ours[0].loss == pytest.approx(divergence[:, 4:11].mean(), rel=1e-5)


def test_trl_takes_the_same_steps_with_its_own_loss(recipe: Recipe, ours: list[Outcome]) -> None:
    if importlib.util.find_spec("trl") is None:  # it is no part of what CI installs: its absence must be told
        with pytest.raises(PeerAbsent, match="parity"):
            distill_torch.require("trl")
        return
    side = distill_torch.TorchStep("trl", recipe)
    for number, (mine, other) in enumerate(zip(ours, steps(side), strict=True)):
        distill.check_agreement(number == 0, {OURS: mine, "trl": other})
    assert side.facts()["function"].startswith("trl.")


def test_only_matrices_of_layers_decay(recipe: Recipe) -> None:
    decaying, others = distill_torch.TorchStep("torch", recipe)._groups()
    assert sum(p.numel() for p in decaying["params"]) == 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40)
    assert sum(p.numel() for p in others["params"]) == 101 * 24 + (2 * 2 + 1) * 24
    assert decaying["weight_decay"] == recipe.weight_decay > others["weight_decay"] == 0.0


def test_every_round_has_tokens_of_its_own() -> None:
    first, second = (distill.tokens_of(MICRO, number) for number in (0, 1))
    assert first == distill.tokens_of(MICRO, 0) != second
    assert np.asarray(first).shape == (3, 12) and 0 <= np.min(first) and 90 < np.max(first) < 101


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "first", "message"),
    [
        (Outcome(2.001, 5.0), True, "loss of torch is 2.001 and ours is 2 in the first step"),
        (Outcome(2.0, 5.01), True, "gradient_norm of torch is 5.01 and ours is 5 in the first step"),
        (Outcome(2.01, 5.0), False, "loss of torch is 2.01 and ours is 2 in a later step"),
        (Outcome(float("nan"), 5.0), True, "loss of torch is nan"),
    ],
)
def test_sides_that_differ_are_refused(theirs: Outcome, first: bool, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        distill.check_agreement(first, {OURS: Outcome(2.0, 5.0), "torch": theirs})


def test_rounding_is_allowed_and_ours_must_be_a_number() -> None:
    distill.check_agreement(True, {OURS: Outcome(2.0, 5.0), "torch": Outcome(2.0001, 5.001)})
    distill.check_agreement(False, {OURS: Outcome(2.0, 5.0), "torch": Outcome(2.001, 5.01)})
    with pytest.raises(BenchmarkError, match="ours is nan"):
        distill.check_agreement(True, {OURS: Outcome(float("nan"), 5.0)})


def test_absent_peers_say_what_to_do(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    with pytest.raises(PeerAbsent, match="pip install google-tunix; --tunix_python=DIR/bin/python"):
        distill.open_side("tunix", recipe)
    with pytest.raises(PeerAbsent, match="/nowhere/python does not start"):
        distill.open_side("tunix", recipe, "/nowhere/python")
    with pytest.raises(PeerAbsent, match="No module named 'tunix'"):
        distill.open_side("tunix", recipe, sys.executable)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PeerAbsent, match="C\\+\\+ compiler.*no-such-compiler"):
        distill.open_side("torch_compile", recipe)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PeerAbsent, match="make setup EXTRAS=parity"):
        distill.open_side("trl", recipe)


def test_a_compiled_side_that_falls_back_silently_is_refused(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    side = distill_torch.TorchStep("torch_compile", recipe)
    program = harness.Program(
        "torch_compile", lambda tokens: side.step(side.prepare(tokens)), side.compilations, must_compile=True
    )
    with pytest.raises(BenchmarkError, match="torch_compile compiled nothing"):
        harness.interleave([program], lambda number: distill.tokens_of(MICRO, number), rounds=1)


# --- Processes and their memory ---------------------------------------------------------------------------------------

# A side that holds so many bytes within a step, and keeps a tenth of them.
GREEDY = """
import sys
from subl_jax.benchmark import step_worker
class Side:
    state_bytes = 7
    def prepare(self, tokens): return len(tokens)
    def step(self, rows):
        if rows == 13: raise RuntimeError("thirteen rows")
        if rows == 9: import os; os.kill(os.getpid(), 9)
        print("libraries print")
        held = bytearray(b"x" * (rows * 2**20)); del held
        self.kept = bytearray(b"y" * (rows * 2**20 // 10))
        return 1.5, 2.5
    def compilations(self): return 3
    def facts(self): return {"rows": True}
step_worker.serve(lambda recipe: Side(), sys.argv[1])
"""


@pytest.fixture
def greedy(recipe: Recipe):
    side = StepProcess("greedy", [sys.executable, "-c", GREEDY], recipe, compiles=True)
    yield side
    side.close()


def test_the_peak_is_that_of_the_steps_after_the_warm_up(greedy: StepProcess) -> None:
    if step_worker.memory() is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert step_worker.WARM_UPS == harness.WARM_UPS
    for rows in (400, 400):
        greedy.step([[0]] * rows)
    assert greedy.memory is None
    for rows in (50, 200, 100):
        assert greedy.step([[0]] * rows) == Outcome(1.5, 2.5)
    held = greedy.memory
    assert held is not None
    # Two copies of 200 MiB at once, and what is kept of an earlier step; the interpreter besides.
    assert 200 * 2**20 < held.peak < 2 * 230 * 2**20
    assert 20 * 2**20 <= held.resting < held.peak - 150 * 2**20
    facts = distill.memory_facts(greedy)
    assert facts["peak_bytes"] == held.peak and facts["state_bytes"] == 7
    assert facts["transient_bytes"] == held.peak - 7 and facts["step_bytes"] == held.peak - held.resting
    assert greedy.program.compilations is not None and greedy.program.compilations() == 3
    assert greedy.program.own_seconds is not None and greedy.program.own_seconds() > 0


def test_a_process_that_ends_says_why(greedy: StepProcess) -> None:
    with pytest.raises(BenchmarkError, match="greedy: its process ended: RuntimeError: thirteen rows"):
        greedy.step([[0]] * 13)


def test_a_process_that_is_killed_says_so(recipe: Recipe) -> None:
    side = StepProcess("greedy", [sys.executable, "-c", GREEDY], recipe, compiles=True)
    with pytest.raises(BenchmarkError, match="killed by signal 9"):
        side.step([[0]] * 9)


def test_rows_hold_times_memory_and_their_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Fake(StepProcess):
        """A side whose numbers are known, and that starts no process."""

        def __init__(self, name: str, scale: int):
            self.program = harness.Program(name, self.step)
            self.outcomes, self.state_bytes = [Outcome(2.0, 1.0)], 100
            self.scale = scale

        @property
        def memory(self) -> step_worker.Memory:
            return step_worker.Memory(1000 * self.scale, 600 * self.scale)

        def facts(self) -> dict[str, Any]:
            return {"graphs": 1}

        def close(self) -> None:
            closed.append(self.program.name)

    def open_fake(name: str, recipe: Recipe, tunix_python: str | None) -> Fake:
        assert (recipe.rows, recipe.length, recipe.prompt, recipe.threads) == (3, 12, 5, 1)
        if name == "tunix":
            raise PeerAbsent("not here")
        return Fake(name, 1 if name == OURS else 2)

    timings = {OURS: Timing((1.0, 1.0), 0.5), "torch": Timing((3.0, 3.0), 0.0)}
    monkeypatch.setattr(distill, "open_side", open_fake)
    monkeypatch.setattr(
        harness, "interleave", lambda programs, inputs, **named: {one.name: timings[one.name] for one in programs}
    )
    absent, row = measure("tunix", "torch")
    assert isinstance(absent, Absent) and absent == Absent("tunix", "not here")
    assert isinstance(row, Row) and closed == [OURS, "torch"]
    assert (row.workload, row.case, row.peer, row.ratio) == ("distill", "micro", "torch", 3.0)
    assert (row.batch, row.seq, row.vocab, row.dtype, row.peak_bytes) == (3, 12, 101, "float32", 1000)
    assert row.tokens_per_s == 3 * 7 / 1.0 and row.extra["loss_tokens"] == 21
    # By hand: q and o, k and v, three of the feed-forward and two norms per layer; a last norm.
    student = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24) + 24
    teacher = 3 * (2 * 32 * 24 + 2 * 32 * 12 + 3 * 32 * 56 + 2 * 32) + 32
    assert row.params == student and row.extra["params_total"] == student + 101 * 24
    assert row.extra["teacher_params"] == teacher and row.extra["teacher_params_total"] == teacher + 101 * 32
    attention = 3 * 2 * 12**2 * (3 * 24 + 3 * 2 * 24)
    assert row.flops == 36 * (2 * teacher + 6 * student) + 21 * 101 * (2 * 32 + 6 * 24) + attention
    assert {key: row.extra[key] for key in ("peak_ratio", "step_ratio", "peer_peak_bytes", "graphs")} == {
        "peak_ratio": 0.5, "step_ratio": 0.5, "peer_peak_bytes": 2000, "graphs": 1,
    }  # fmt: skip
    assert row.extra["transient_ratio"] == 900 / 1900
    json.dumps(results.document([row], [absent], OPTIONS.machine, []))
    (alone,) = measure()
    assert isinstance(alone, Row) and alone.peer is None and alone.ratio is None


@pytest.mark.soak
def test_the_processes_measure_the_real_sides() -> None:
    row, absent = measure("torch", "tunix")
    assert isinstance(row, Row) and row.peer == "torch" and row.runs == 2 and isinstance(absent, Absent)
    assert row.compile_s > 0 and row.extra["loss_apart"] < 1e-5
    if step_worker.memory() is not None:
        assert row.peak_bytes is not None and row.peak_bytes > row.extra["state_bytes"]
        # Float32, two moments; our optimizer counts its steps besides.
        state = 4 * (3 * row.extra["params_total"] + row.extra["teacher_params_total"])
        assert row.extra["peer_state_bytes"] == state and 0 <= row.extra["state_bytes"] - state <= 16


@pytest.mark.soak
def test_the_compiled_side_really_compiles_and_agrees(recipe: Recipe, ours: list[Outcome]) -> None:
    try:
        torch_peers.require_compiler()
    except PeerAbsent as error:
        if os.environ.get("CI"):  # a skip there would hide a missing install step
            raise
        pytest.skip(str(error))
    side = distill_torch.TorchStep("torch_compile", recipe)
    for number, (mine, other) in enumerate(zip(ours, steps(side), strict=True)):
        distill.check_agreement(number == 0, {OURS: mine, "torch_compile": other})
    assert side.facts() == {"graphs": 1, "graph_breaks": 0} and side.compilations() == 1


# --- The definitions --------------------------------------------------------------------------------------------------


def test_the_sizes_are_what_the_marks_speak_of() -> None:
    assert list(CASES)[0] == "s10m_t10m_v32k" and len(CASES) == 8
    for name, case in CASES.items():
        student, teacher = (torch_peers.llama_shape(options).params for options in (case.student, case.teacher))
        wanted = 1e7 if name.startswith("s10m") else 1e8
        assert abs(student / wanted - 1) < 0.1
        times = 4 if name.split("_")[1] in ("t40m", "t400m") else 1
        assert abs(teacher / student / times - 1) < 0.1
        assert case.rows * case.length == 512 and case.seeds[0] != case.seeds[1]
        assert case.student["vocab_size"] == case.teacher["vocab_size"] in (32_000, 151_936)


def test_the_definitions_are_printed_with_both_counts() -> None:
    lines = distill.describe(["s10m_t40m_v152k"])
    assert len(lines) == 2 and "student 9.4 M (67.8 M with its tied embedding), width 384" in lines[1]
    assert "vocabulary 151936; 4 documents of 128 tokens, of which 16 are prompt: 448 loss tokens" in lines[1]


def test_the_workload_is_registered_and_its_peers_are_known() -> None:
    workload = registry.get_workload("distill")
    assert workload.name == "distill" and workload.peers == ("torch", "torch_compile", "trl", "tunix")
    assert workload.cases == tuple(CASES)


def test_the_tunix_script_imports_nothing_of_this_project(tmp_path: Path) -> None:
    script = Path(step_worker.__file__).with_name("distill_tunix.py")
    said = subprocess.run([sys.executable, "-S", "-I", str(script), "{}"], capture_output=True, text=True, cwd=tmp_path)
    # Without site-packages it gets as far as the recipe, by the standard library alone.
    assert "TypeError" in said.stderr and "Recipe" in said.stderr


def test_a_recipe_survives_its_way_to_the_process(recipe: Recipe) -> None:
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    assert recipe.completion == 7 and step_process.WARM_UPS == 2
