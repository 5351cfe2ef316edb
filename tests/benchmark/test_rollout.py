"""The rollout workload on a micro model, against transformers itself (extra `oracles`)."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax.benchmark import greedy, harness, registry, results, rollout, torch_peers
from subl_jax.benchmark.greedy import Request
from subl_jax.benchmark.harness import BenchmarkError, PeerAbsent
from subl_jax.benchmark.machine import Machine
from subl_jax.benchmark.registry import Options
from subl_jax.benchmark.results import Absent, Row
from subl_jax.benchmark.rollout import CASES, SIZES, Size
from subl_jax.models.config import ModelConfig

torch = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")

# Every number differs from every other one, so that none can be taken for another.
MICRO = Size(
    {
        **rollout._LLAMA, "vocab_size": 101, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    },
    prompt=7,
    new_tokens=9,
)  # fmt: skip
SIZES_HERE, TABLE = {"micro": MICRO}, {"micro_b3": ("micro", 3)}
# Without a watch on others: tests share the machine.
OPTIONS = Options(Machine((0,), 1, "a processor", None), rounds=3, others=None)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("micro")
    torch_peers.save_random_llama(directory, MICRO.llama, 1)
    return directory


def measure(*peers: str, options: Options = OPTIONS, **changes: Any) -> list[Row | Absent]:
    return list(rollout.measure(["micro_b3"], peers, options, sizes=SIZES_HERE, table=TABLE, **changes))


def test_ours_and_transformers_generate_the_same_and_are_timed_together() -> None:
    (row,) = measure("transformers")
    assert isinstance(row, Row)
    assert (row.workload, row.case, row.peer, row.runs) == ("rollout", "micro_b3", "transformers", 3)
    assert (row.batch, row.seq, row.vocab, row.dtype) == (3, 16, 101, "float32")
    assert row.ratio is not None and row.peer_median_s is not None
    assert row.ratio == pytest.approx(row.peer_median_s / row.median_s)
    assert row.tokens_per_s == pytest.approx(3 * 9 / row.median_s)
    # By hand: a layer has q and o of 24 x 24, k and v of 24 x 12, three of 24 x 40 and two norms.
    body = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24) + 24
    assert row.params == body and row.extra["params_total"] == body + 2 * 101 * 24
    # 3 rows: 15 tokens are fed, of which 9 need logits; attention over 15 tokens in 2 layers of width 24.
    assert row.flops == 3 * (2 * body * 15 + 2 * 24 * 101 * 9 + 2 * 15**2 * 2 * 24)
    assert row.extra["rows_differing"] == 0 and row.extra["prefill_s"] > 0 and row.extra["peer_prefill_s"] > 0
    json.dumps(results.document([row], [], OPTIONS.machine, []))


def test_a_generation_that_errs_is_refused_before_anything_is_timed() -> None:
    from subl_jax.rollout.generate import Completion, generate

    def wrong(*given: Any, **named: Any) -> list[Completion]:
        first, *rest = generate(*given, **named)
        tokens = [*first.tokens[:-1], (first.tokens[-1] + 1) % 101]
        return [dataclasses.replace(first, tokens=tokens), *rest]

    with pytest.raises(BenchmarkError, match="transformers and we chose different tokens in row 0 at new token 8"):
        measure("transformers", generate=wrong)

    def short(*given: Any, **named: Any) -> list[Completion]:
        return [dataclasses.replace(done, tokens=done.tokens[:-1]) for done in generate(*given, **named)]

    with pytest.raises(BenchmarkError, match=r"ours returned 3 rows of \[8\] tokens; 3 rows of 9 were asked for"):
        measure("transformers", generate=short)


def test_the_weights_are_random_and_continuations_do_not_repeat_themselves(folder: Path) -> None:
    peer = torch_peers.TransformersPeer("transformers", folder, 1)
    request = Request(harness.random_prompts((1,), 8, MICRO.prompt, 101), 20)
    tokens = peer.generate(request)
    greedy.check_lengths("transformers", request, tokens)
    # transformers' own initialisation gives 1 here: the last token, again and again.
    assert np.mean([len(set(row)) for row in tokens]) > 5


def test_the_gap_of_two_logits_is_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        reference: Any = AutoModelForCausalLM.from_pretrained(folder)
        first, second = reference(torch.tensor([tokens])).logits[0, -1].topk(2).values.tolist()
    assert rollout.Model.load(folder).top_gap(tokens) == pytest.approx(first - second, abs=1e-4)


def test_ours_alone_needs_no_peer() -> None:
    (row,) = measure()
    assert isinstance(row, Row) and row.peer is None and row.ratio is None and row.runs == 3


# --- The compiled peer ------------------------------------------------------------------------------------------------


def _compiler_or_skip() -> None:
    try:
        torch_peers.require_compiler()
    except PeerAbsent as error:
        if os.environ.get("CI"):  # a skip there would hide a missing install step
            raise
        pytest.skip(str(error))


@pytest.mark.soak
def test_the_compiled_peer_really_compiles_and_agrees() -> None:
    _compiler_or_skip()
    (row,) = measure("transformers_compile")
    assert isinstance(row, Row) and row.peer == "transformers_compile"
    assert row.extra["graphs"] == 1 and row.extra["kernels"] > 0 and row.extra["graph_breaks"] == 0
    assert row.peer_compile_s is not None and row.peer_compile_s > 1


def test_a_compiled_peer_that_falls_back_silently_is_refused(folder: Path) -> None:
    _compiler_or_skip()
    peer = torch_peers.TransformersPeer("transformers_compile", folder, 1)
    peer._options["compile_config"]._compile_all_devices = False  # as transformers has it on a CPU by default
    request = Request(harness.random_prompts((1,), 2, MICRO.prompt, 101), 4)
    with pytest.raises(BenchmarkError, match="transformers_compile compiled nothing"):
        harness.interleave([peer.program], lambda number: request, rounds=1)


def test_without_a_compiler_the_compiled_peer_is_absent_and_the_other_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    absent, row = measure("transformers_compile", "transformers")
    assert isinstance(absent, Absent) and absent.peer == "transformers_compile"
    assert "C++ compiler" in absent.reason and "no-such-compiler" in absent.reason
    assert isinstance(row, Row) and row.peer == "transformers"


# --- Tunix ------------------------------------------------------------------------------------------------------------


def test_tunix_without_an_environment_is_absent_and_says_how_to_make_one() -> None:
    absent, row = measure("tunix")
    assert isinstance(absent, Absent) and "pip install google-tunix" in absent.reason
    assert isinstance(row, Row) and row.peer is None


@pytest.mark.parametrize(
    ("python", "reason"),
    [(sys.executable, "No module named 'tunix'"), ("/nowhere/python", "/nowhere/python does not start")],
)
def test_tunix_in_a_wrong_environment_is_absent_with_the_reason(python: str, reason: str) -> None:
    absent, row = measure("tunix", options=dataclasses.replace(OPTIONS, tunix_python=python))
    assert isinstance(absent, Absent) and reason in absent.reason
    assert isinstance(row, Row)


# --- The definitions --------------------------------------------------------------------------------------------------


def test_the_sizes_are_what_the_marks_speak_of() -> None:
    small, large = (torch_peers.total_parameters(SIZES[name].llama) for name in ("small", "large"))
    assert small <= 10_000_000 and large >= 100_000_000
    assert {case: CASES[case][1] for case in CASES} == {
        f"{size}_b{batch}": batch for size in ("small", "large") for batch in (1, 16, 64)
    }


def test_the_definitions_are_printed_with_both_counts() -> None:
    lines = rollout.describe(["small_b1", "small_b16"])
    assert len(lines) == 2 and "6.5 M parameters (4.4 M without embedding and head)" in lines[1]
    assert "batch 1, 16; prompt 64 + 128 new tokens" in lines[1]


def test_the_workload_is_registered_and_its_peers_are_known() -> None:
    workload = registry.get_workload("rollout")
    assert workload.name == "rollout" and workload.peers == ("transformers", "transformers_compile", "tunix")


def test_a_batch_is_split_over_the_devices() -> None:
    seen: list[tuple[int, int]] = []

    def generate(config: Any, params: Any, prompts: Any, sampling: Any, *, devices: Any) -> list[Any]:
        seen.append((sampling.slots, len(devices)))
        return []

    model = rollout.Model(ModelConfig(), {})
    for batch in (1, 3, 16):
        size = dataclasses.replace(MICRO, devices=2)
        rollout.our_program(model, size, batch, generate).run(Request([[1]] * batch, 2))
    assert seen == [(1, 1), (2, 2), (8, 2)]
