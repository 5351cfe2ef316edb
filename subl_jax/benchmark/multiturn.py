"""The multi-turn workload: 64 episodes of 6 turns with uneven lengths, against the two usual ways to run them.

`reprefill` calls a batch generation once per turn with the whole conversation so far, as libraries for single answers are
used. `static` keeps the cache but runs fixed batches: each turn waits for its slowest row, each batch for its last episode.
Both are made of our own programs, so that what is compared is the way of running, not the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from subl_jax import metrics
from subl_jax.benchmark import harness, machine, results
from subl_jax.benchmark.harness import BenchmarkError, Program
from subl_jax.benchmark.registry import Options, Workload
from subl_jax.benchmark.results import OURS, Absent, Row, Work
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import configure_cpu
from subl_jax.rollout import generate, stops
from subl_jax.rollout.conversation import Turn
from subl_jax.rollout.engine import Engine
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.programs import programs
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.rollout.tools import ToolFailure

NAME = "multiturn"
REPREFILL, STATIC = "reprefill", "static"

# Definitions of the workload, changed by editing this file only.
EPISODES, TURNS = 64, 6
# A system turn and tools that all share, and the user's question behind it.
SHARED, QUESTION = 64, (8, 32)
# Tool results and answers: log-normal within bounds, as agents' turns are: mostly a call, now and then a long thought
# before it. (median, sigma, least, most)
RESULT, ANSWER = (12, 0.6, 4, 48), (20, 1.0, 4, 128)
WEIGHTS_SEED, SCRIPT_SEED, SAMPLING_SEED = 1, 2, 3
# Tools answer at once here: one group of slots, and no threads. Short rows, since results are short; those of the peer
# that feeds whole conversations are long.
OPTIONS = EngineConfig(groups=1, tool_workers=0)
PREFILL_ROWS, PREFILL_CHUNK, LONG_CHUNK = 4, 16, 64

# The first is the shape of the demo's organism.
MODELS: Mapping[str, ModelConfig] = {
    "organism": ModelConfig(1536, 64, 2, 4, 2, 16, 176, init_scale=0.25),
    "small": ModelConfig(4096, 256, 6, 8, 4, 32, 704, init_scale=0.25),
}
# Name -> (model, JAX devices that the cores are split into, slots of each): 16 slots in all.
CASES: Mapping[str, tuple[str, int, int]] = {
    f"{model}_{devices}x{16 // devices}": (model, devices, 16 // devices) for model in MODELS for devices in (1, 2)
}


@dataclasses.dataclass(frozen=True)
class Script:
    """What is said to the model in one episode, and how many tokens it answers with.

    Attributes:
      opening: ids; the first `SHARED` are the same in all episodes.
      answers: tokens of each turn.
      results: ids that follow each turn but the last.
    """

    opening: list[int]
    answers: list[int]
    results: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the whole episode."""
        return len(self.opening) + sum(self.answers) + sum(map(len, self.results))


def scripts(vocab_size: int, number: int, episodes: int = EPISODES, turns: int = TURNS) -> list[Script]:
    """The episodes of one run; their lengths are the same in every run, their tokens are not."""
    lengths = np.random.default_rng(SCRIPT_SEED)
    tokens = np.random.default_rng((SCRIPT_SEED, number))

    def uneven(middle: float, sigma: float, least: int, most: int) -> int:
        return int(np.clip(middle * np.exp(sigma * lengths.normal()), least, most))

    def text(count: int) -> list[int]:
        return tokens.integers(0, vocab_size, count).tolist()

    shared = text(SHARED)
    return [
        Script(
            [*shared, *text(int(lengths.integers(*QUESTION)))],
            [uneven(*ANSWER) for _ in range(turns)],
            [text(uneven(*RESULT)) for _ in range(turns - 1)],
        )
        for _ in range(episodes)
    ]


class Scripted:
    """A conversation that follows a script."""

    def __init__(self, index: int, script: Script) -> None:
        """Episode `index` of a run."""
        self.index, self.sample, self.said = index, 0, list[list[int]]()
        self._script = script

    def open(self) -> Turn:
        """The opening."""
        return Turn(self._script.opening, self._script.answers[0], SHARED)

    def sampled(self, ids: list[int], logprobs: list[float], ended: bool) -> None:
        """Keeps a turn."""
        del logprobs, ended
        self.said.append(ids)

    def respond(self) -> Turn | None:
        """The script's next piece."""
        turn = len(self.said)
        if turn == len(self._script.answers):
            return None
        return Turn([self.said[-1][-1], *self._script.results[turn - 1]], self._script.answers[turn])

    def commit(self, outcome: Turn | None) -> Turn | None:
        """What was found."""
        return outcome

    def fail(self, failure: ToolFailure) -> None:
        """A script cannot fail."""
        raise BenchmarkError(failure.text)

    def result(self) -> list[list[int]]:
        """What the model said."""
        return self.said


@dataclasses.dataclass(frozen=True)
class Runner:
    """One model with its programs, and the three ways to run scripts on it."""

    config: ModelConfig
    params: Any
    sampling: SamplingConfig
    devices: tuple[Any, ...]

    def engine(self, scripted: Sequence[Script], options: EngineConfig, counted: RolloutStatistics) -> list[Scripted]:
        """Runs the scripts with continuous batching; conversations in their order."""
        compiled = programs(self.config, self.sampling, self.devices)
        automaton = stops.build([], self.config.vocab_size, [], [])
        engine = Engine(compiled, compiled.load(self.params), automaton, options, counted, seed=SAMPLING_SEED, policy=0)
        conversations = [Scripted(index, script) for index, script in enumerate(scripted)]
        for _ in engine.run(conversations):
            counted.episodes += 1
        return conversations

    def ours(self, scripted: Sequence[Script]) -> tuple[list[list[list[int]]], RolloutStatistics]:
        """The engine as it is."""
        counted = RolloutStatistics()
        return [each.said for each in self.engine(scripted, OPTIONS, counted)], counted

    def static(self, scripted: Sequence[Script]) -> tuple[list[list[list[int]]], RolloutStatistics]:
        """Fixed batches of as many episodes as there are slots; a turn returns when the last row has ended it."""
        counted, said = RolloutStatistics(), []
        options = dataclasses.replace(OPTIONS, patience=1.0, dispatch_steps=1 << 20)
        size = len(self.devices) * self.sampling.slots
        for start in range(0, len(scripted), size):
            said += [each.said for each in self.engine(scripted[start : start + size], options, counted)]
        return said, counted

    def reprefill(self, scripted: Sequence[Script]) -> tuple[list[list[list[int]]], RolloutStatistics]:
        """A batch generation per turn, with the whole conversation as its prompt."""
        counted, sampling = RolloutStatistics(), dataclasses.replace(self.sampling, prefill_chunk=LONG_CHUNK)
        prompts = [list(script.opening) for script in scripted]
        said: list[list[list[int]]] = [[] for _ in scripted]
        for turn in range(len(scripted[0].answers)):
            done = generate.generate(
                self.config, self.params, prompts, sampling, seed=SAMPLING_SEED,
                limits=[script.answers[turn] for script in scripted], devices=self.devices, statistics=counted,
            )  # fmt: skip
            for episode, completion in enumerate(done):
                said[episode].append(completion.tokens)
                prompts[episode] += completion.tokens
                if turn < len(scripted[episode].results):
                    prompts[episode] += scripted[episode].results[turn]
        return said, counted


def runner(case: str) -> Runner:
    """A case's model with random weights, on as many devices as it says."""
    model, devices, slots = CASES[case]
    config = MODELS[model]
    longest = max(script.length for script in scripts(config.vocab_size, 0))
    sampling = SamplingConfig(
        temperature=0.0, max_turn_tokens=ANSWER[-1], context=-(-longest // 32) * 32, slots=slots,
        prefill_chunk=PREFILL_CHUNK, prefill_rows=PREFILL_ROWS,
    )  # fmt: skip
    params = decoder.init(config, jax.random.key(WEIGHTS_SEED))
    return Runner(config, params, sampling, tuple(jax.local_devices()[:devices]))


def describe(cases: Sequence[str]) -> list[str]:
    """One line for what is common and one per case."""
    made = scripts(1000, 0)
    answers = [count for script in made for count in script.answers]
    quartiles = ", ".join(f"{value:.0f}" for value in np.quantile(answers, [0, 0.25, 0.5, 0.75, 1]))
    lines = [
        f"multiturn: {EPISODES} episodes of {TURNS} turns, {sum(script.length for script in made)} tokens, of which "
        f"{sum(answers)} answered (quartiles {quartiles}); {SHARED} shared; greedy, float32; "
        f"seeds {WEIGHTS_SEED} (weights), {SCRIPT_SEED} (scripts)"
    ]
    for case in cases:
        model, devices, slots = CASES[case]
        config = MODELS[model]
        lines.append(
            f"  {case}: {devices} JAX devices x {slots} slots; width {config.d_model}, {config.num_layers} layers, "
            f"{config.num_heads} heads, {config.num_kv_heads} key/value heads, feed-forward {config.d_ff}, vocabulary "
            f"{config.vocab_size}"
        )
    return lines


def measure(cases: Sequence[str], peers: Sequence[str], options: Options) -> Iterator[Row | Absent]:
    """Rows of each case, one per way of running.

    Raises:
      BenchmarkError: `static`, whose arithmetic is ours, said something else than ours.
    """
    configure_cpu(max(devices for _, devices, _ in CASES.values()))
    for case in cases:
        ways = runner(case)
        counted: dict[str, RolloutStatistics] = {}

        def program(name: str, way: Any, counted: dict[str, RolloutStatistics] = counted) -> Program:
            def run(scripted: Sequence[Script]) -> list[list[list[int]]]:
                said, counted[name] = way(scripted)
                return said

            return Program(name, run, machine.jax_compilations())

        def agree(scripted: Sequence[Script], outputs: dict[str, Any]) -> None:
            for name, said in outputs.items():
                lengths = [[len(ids) for ids in each] for each in said]
                if lengths != [script.answers for script in scripted]:
                    raise BenchmarkError(f"{name} did not answer with as many tokens as the script says")
            if STATIC in outputs and outputs[STATIC] != outputs[OURS]:
                raise BenchmarkError("static batches and ours have equal slots and gave different tokens")

        known = {REPREFILL: ways.reprefill, STATIC: ways.static}
        running = [program(OURS, ways.ours), *(program(peer, known[peer]) for peer in peers)]
        harness.say(f"{case}: {', '.join(each.name for each in running)}")
        vocab = ways.config.vocab_size
        timings = harness.interleave(
            running,
            functools.partial(scripts, vocab),
            rounds=options.rounds,
            check=agree,
            others=options.others,
        )
        made = scripts(vocab, 0)
        mine = counted[OURS]
        harness.say("\n".join(f"  {line}" for line in mine.lines()))
        work = Work(
            NAME, case, decoder.count_parameters(ways.params), EPISODES, ways.sampling.context, vocab, "float32",
            machine.processor(), sum(sum(script.answers) for script in made), None,
            extra={
                "occupancy_before_drain": mine.full_occupancy,
                "occupancy": mine.occupancy,
                "barrier_idle": mine.barrier_idle,
                "prefilled_tokens": mine.prefilled_tokens,
                "shared_tokens": mine.shared_tokens,
                "params_total": metrics.count_params(ways.params),
            },
        )  # fmt: skip
        more = {
            peer: {"peer_occupancy": counted[peer].occupancy, "peer_prefilled_tokens": counted[peer].prefilled_tokens}
            for peer in peers
        }
        yield from results.rows(work, timings, extra=more)


WORKLOAD = Workload(NAME, tuple(CASES), (REPREFILL, STATIC), describe, measure)
