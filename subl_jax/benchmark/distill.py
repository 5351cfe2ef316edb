"""The distill workload: one whole training step (teacher, student, update) on the same weights and tokens everywhere.

Cases come in by name; rows come out. A case is a student, a teacher and a vocabulary. Both are written with random weights
by transformers into a temporary folder, which everyone reads. Every side runs in a process of its own, timed by its own
clock, so that its peak memory is its own too. Each peer takes its turns with ours alone: the models of all of them at once
would not fit a small machine. Before anything is timed, both must have given the same loss and the same gradient norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import metrics
from subl_jax.benchmark import distill_torch, harness, machine, results, torch_peers
from subl_jax.benchmark.harness import BenchmarkError, PeerAbsent
from subl_jax.benchmark.registry import Options, Workload
from subl_jax.benchmark.results import OURS, Absent, Row, Work
from subl_jax.benchmark.step_process import Outcome, StepProcess
from subl_jax.benchmark.step_worker import Recipe

NAME = "distill"
TUNIX = "tunix"
PEERS = (*distill_torch.NAMES, TUNIX)


@dataclasses.dataclass(frozen=True)
class Case:
    """Two models and the batch that they see.

    Attributes:
      student, teacher: options of transformers' `LlamaConfig`, vocabulary included.
      rows, length: of the batch; every row is one document.
      prompt: tokens at the start of each document that are in no loss.
      seeds: of the student's weights, of the teacher's, and of the tokens (with the number of the round).
    """

    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    rows: int = 4
    length: int = 128
    prompt: int = 16
    seeds: tuple[int, int, int] = (1, 2, 3)

    @property
    def loss_tokens(self) -> int:
        """Of a batch."""
        return self.rows * (self.length - self.prompt)


# Tied, as small models with large vocabularies are. The rotary base is what Tunix 0.1.7 rotates Llama 3 by whatever its
# configuration says.
LLAMA = {
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}

# Definitions of the workload, changed by editing this file only. float32. Names say P, in millions.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "10m": {
        **LLAMA, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 64,
    },
    "40m": {
        **LLAMA, "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 9, "num_attention_heads": 10,
        "num_key_value_heads": 2, "head_dim": 64,
    },
    "100m": {
        **LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64,
    },
    "400m": {
        **LLAMA, "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 23, "num_attention_heads": 20,
        "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip
VOCABULARIES: Mapping[str, int] = {"32k": 32_000, "152k": 151_936}
PAIRS = (("10m", "10m"), ("10m", "40m"), ("100m", "100m"), ("100m", "400m"))
CASES: Mapping[str, Case] = {
    f"s{student}_t{teacher}_v{vocab}": Case(
        {**MODELS[student], "vocab_size": size}, {**MODELS[teacher], "vocab_size": size}
    )
    for student, teacher in PAIRS
    for vocab, size in VOCABULARIES.items()
}
DTYPE = "float32"
# How far two sides may be apart. Norms are sums of up to 2e8 squares in float32, added in different orders. After an
# update Adam has turned the signs of gradients that are rounding errors into steps of full size.
FIRST_RTOL, LATER_RTOL = {"loss": 1e-4, "gradient_norm": 1e-3}, {"loss": 1e-3, "gradient_norm": 1e-2}


def describe(cases: Sequence[str]) -> list[str]:
    """One line for what is common and one per case."""
    recipe = Recipe("", "", 0, 0, 0, 0)
    lines = [
        f"distill: {DTYPE} on the CPU, forward KL at temperature 1, clipping at {recipe.clip_norm:g}, AdamW; random tokens, "
        "fresh for every step; weights random; torch and TRL use fused AdamW and no checkpointing; all project the loss "
        "tokens only, Tunix excepted"
    ]
    for name in cases:
        case = CASES[name]
        models = [
            f"{role} {torch_peers.llama_shape(options).params / 1e6:.1f} M "
            f"({torch_peers.total_parameters(options) / 1e6:.1f} M with its tied embedding), width {options['hidden_size']}, "
            f"{options['num_hidden_layers']} layers"
            for role, options in (("student", case.student), ("teacher", case.teacher))
        ]
        lines.append(
            f"  {name}: {'; '.join(models)}; vocabulary {case.student['vocab_size']}; {case.rows} documents of "
            f"{case.length} tokens, of which {case.prompt} are prompt: {case.loss_tokens} loss tokens; seeds {case.seeds}"
        )
    return lines


# --- The sides --------------------------------------------------------------------------------------------------------


def open_side(name: str, recipe: Recipe, tunix_python: str | None = None) -> StepProcess:
    """Starts a side by its name.

    Raises:
      PeerAbsent: it cannot run here.
    """
    # A GPU is no part of this: memory is the process's.
    on_cpu = {"JAX_PLATFORMS": "cpu"}
    if name == OURS:
        command = [sys.executable, "-m", "subl_jax.benchmark.distill_jax"]
        return StepProcess(name, command, recipe, compiles=True, must_compile=True, environment=on_cpu)
    if name == TUNIX:
        if tunix_python is None:
            raise PeerAbsent(
                "it needs an environment of its own: python3.11 -m venv DIR; DIR/bin/pip install google-tunix; "
                "--tunix_python=DIR/bin/python"
            )
        # Isolated from our directory and variables, so that it imports its own environment only.
        command = [tunix_python, "-I", str(Path(__file__).with_name("distill_tunix.py"))]
        return StepProcess(name, command, recipe, compiles=True, must_compile=True, environment=on_cpu)
    distill_torch.require(name)
    compiles = name == distill_torch.COMPILED
    command = [sys.executable, "-m", "subl_jax.benchmark.distill_torch", name]
    return StepProcess(name, command, recipe, compiles=compiles, must_compile=compiles)


# --- The measurement --------------------------------------------------------------------------------------------------


def measure(
    cases: Sequence[str], peers: Sequence[str], options: Options, *, table: Mapping[str, Case] = CASES
) -> Iterator[Row | Absent]:
    """Rows of each case, one per peer that runs here, and the peers that do not.

    Args:
      cases, peers, options: what is asked for.
      table: the workload's definitions; replaced in tests.

    Raises:
      BenchmarkError: torch is absent, two sides disagree, or one is not what it is called.
    """
    torch_peers.require_torch()  # it writes the models
    gone: set[str] = set()
    for name in cases:
        case = table[name]
        with tempfile.TemporaryDirectory(prefix="subl_jax_distill_") as directory:
            student, teacher = Path(directory, "student"), Path(directory, "teacher")
            torch_peers.save_random_llama(student, case.student, case.seeds[0])
            torch_peers.save_random_llama(teacher, case.teacher, case.seeds[1])
            recipe = Recipe(str(student), str(teacher), case.rows, case.length, case.prompt, options.machine.threads)
            measured = False
            for peer in peers:
                if peer in gone:
                    continue
                try:
                    yield _measure_pair(name, case, recipe, peer, options)
                    measured = True
                except PeerAbsent as error:
                    gone.add(peer)
                    yield Absent(peer, str(error))
            if not measured:
                yield _measure_pair(name, case, recipe, None, options)


def tokens_of(case: Case, number: int) -> list[list[int]]:
    """The batch of a round: [rows][length]."""
    return harness.random_prompts((case.seeds[2], number), case.rows, case.length, case.student["vocab_size"])


def check_agreement(first: bool, outputs: Mapping[str, Outcome]) -> None:
    """Refuses sides that do not take the same step.

    Args:
      first: whether no side has updated its weights yet.
      outputs: of one round, by side; ours is among them.

    Raises:
      BenchmarkError: a loss or a gradient norm is no number, or differs from ours.
    """
    for quantity, rtol in (FIRST_RTOL if first else LATER_RTOL).items():
        ours = getattr(outputs[OURS], quantity)
        for name, outcome in outputs.items():
            theirs = getattr(outcome, quantity)
            if not math.isclose(theirs, ours, rel_tol=rtol) or not math.isfinite(ours):
                where = "the first step" if first else "a later step"
                raise BenchmarkError(
                    f"{quantity} of {name} is {theirs:.8g} and ours is {ours:.8g} in {where}; they may differ by a share "
                    f"of {rtol:g}: they do not take the same step"
                )


def _measure_pair(name: str, case: Case, recipe: Recipe, peer: str | None, options: Options) -> Row:
    with contextlib.ExitStack() as opened:
        sides: dict[str, StepProcess] = {}
        # The peer first: where it is absent, nothing else was started.
        for side in [peer, OURS] if peer else [OURS]:
            try:
                sides[side] = open_side(side, recipe, options.tunix_python)
            except PeerAbsent as error:
                if side == OURS:
                    raise BenchmarkError(f"our own side does not start: {error}") from error
                raise
            opened.callback(sides[side].close)
        harness.say(f"{name}: {', '.join(sides)}")

        def agree(given: list[list[int]], outputs: dict[str, Outcome]) -> None:
            del given
            check_agreement(len(sides[OURS].outcomes) == 1, outputs)

        timings = harness.interleave(
            [sides[side].program for side in (OURS, peer) if side],
            functools.partial(tokens_of, case),
            rounds=options.rounds,
            check=agree,
            others=options.others,
        )
    return _row(name, case, sides, timings)


def _row(name: str, case: Case, sides: Mapping[str, StepProcess], timings: Mapping[str, harness.Timing]) -> Row:
    student, teacher = torch_peers.llama_shape(case.student), torch_peers.llama_shape(case.teacher)
    tokens = case.rows * case.length
    flops = metrics.kd_step_flops(teacher, student, tokens, case.loss_tokens, [case.length] * case.rows)
    work = Work(
        NAME, name, student.params, case.rows, case.length, student.vocab, DTYPE,
        f"{machine.processor()}, {machine.usable_cores()} cores", case.loss_tokens, flops,
        extra={
            "params_total": torch_peers.total_parameters(case.student),
            "teacher_params": teacher.params,
            "teacher_params_total": torch_peers.total_parameters(case.teacher),
            "loss_tokens": case.loss_tokens,
            **memory_facts(sides[OURS]),
        },
    )  # fmt: skip
    more = {peer: peer_facts(sides[OURS], side) for peer, side in sides.items() if peer != OURS}
    for peer, facts in more.items():
        if "step_ratio" in facts:
            harness.say(
                f"  peak memory: ours {work.extra['peak_bytes'] / 1e9:.2f} GB, {peer} {facts['peer_peak_bytes'] / 1e9:.2f} GB "
                f"(x {facts['peak_ratio']:.2f}); of a step beyond what rests: {work.extra['step_bytes'] / 1e9:.2f} and "
                f"{facts['peer_step_bytes'] / 1e9:.2f} GB (x {facts['step_ratio']:.2f})"
            )
    (row,) = results.rows(work, timings, peak_bytes=work.extra.get("peak_bytes"), extra=more)
    return row


def memory_facts(side: StepProcess) -> dict[str, int]:
    """Bytes of anonymous memory of a side's process; nothing where the system does not tell.

    Returns:
      peak_bytes: the most at any time within the steps after the warm-up.
      state_bytes: parameters of student and teacher and the optimizer's moments, by their shapes.
      transient_bytes: the peak less the state. The interpreter and what compilers left behind are in it.
      resting_bytes: between steps.
      step_bytes: the peak less what rests, which is what a step needs besides: gradients, activations, logits.
    """
    held = side.memory
    if held is None:
        return {}
    return {
        "peak_bytes": held.peak,
        "state_bytes": side.state_bytes,
        "transient_bytes": held.peak - side.state_bytes,
        "resting_bytes": held.resting,
        "step_bytes": held.peak - held.resting,
    }


def peer_facts(ours: StepProcess, peer: StepProcess) -> dict[str, Any]:
    """What a peer's row says besides: its memory, ratios of ours to it, and what it says of itself."""
    mine, theirs = memory_facts(ours), memory_facts(peer)
    ratios = {
        f"{what}_ratio": mine[f"{what}_bytes"] / theirs[f"{what}_bytes"]
        for what in ("peak", "transient", "step")
        if mine and theirs.get(f"{what}_bytes")
    }
    apart = abs(peer.outcomes[0].loss / ours.outcomes[0].loss - 1)
    return {**{f"peer_{key}": value for key, value in theirs.items()}, **ratios, "loss_apart": apart, **peer.facts()}


WORKLOAD = Workload(NAME, tuple(CASES), PEERS, describe, measure)
