"""The rollout workload: greedy generation of a fixed length from fresh random prompts, on the same weights everywhere.

Cases come in by name; rows come out. A case is a model's shape and a batch size. Its model is written with random
weights by transformers into a temporary folder, which everyone reads. Before anything is timed, everyone must have
produced the same tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax import metrics
from subl_jax.benchmark import greedy, harness, machine, results, torch_peers, tunix_peer
from subl_jax.benchmark.greedy import Request
from subl_jax.benchmark.harness import PeerAbsent, Program, Timing
from subl_jax.benchmark.registry import Options, Workload
from subl_jax.benchmark.results import OURS, Absent, Row, Work
from subl_jax.metrics.peaks import PEAKS
from subl_jax.models import decoder, hf_import
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import configure_cpu
from subl_jax.rollout.sampling import SamplingConfig

NAME = "rollout"
PEERS = (torch_peers.PLAIN, torch_peers.COMPILED, tunix_peer.NAME)


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and what is asked of it.

    Attributes:
      llama: options of transformers' `LlamaConfig`.
      prompt: tokens of each prompt.
      new_tokens: that follow it, always so many.
      devices: JAX devices that ours splits a batch between.
      weights_seed, prompts_seed: of the random weights; of the prompts, with the number of the run.
    """

    llama: Mapping[str, Any]
    prompt: int
    new_tokens: int
    devices: int = 1
    weights_seed: int = 1
    prompts_seed: int = 2


# Common to all. The rotary base is what Tunix 0.1.7 rotates Llama 3 by whatever its configuration says.
_LLAMA = {
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}

# Definitions of the workload, changed by editing this file only. float32.
SIZES: Mapping[str, Size] = {
    # At most 10 M parameters in all: what this project trains from scratch.
    "small": Size(
        {
            **_LLAMA, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
        },
        prompt=64,
        new_tokens=128,
        devices=2,  # two programs of eight slots took 0.35 s on two cores where one of sixteen took 0.51 s
    ),
    # At least 100 M in all: every token reads all weights, so memory is the limit. Fewer tokens keep a run short.
    "large": Size(
        {
            **_LLAMA, "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
        },
        prompt=64,
        new_tokens=32,
        devices=1,  # weights are read once per step: two programs of eight slots took 2.8 s, one of sixteen 2.1 s
    ),
}  # fmt: skip
BATCHES = (1, 16, 64)
DTYPE = "float32"
# A CPU is split into so many JAX devices (see `configure_cpu`). How many of them a size runs on is said with it.
DEVICES = 2
# Prompts that ours feeds in one pass.
PREFILL_ROWS = 8
# Runs of the prefill alone (one new token), which decode rates are told without.
PREFILL_ROUNDS = 5

CASES: Mapping[str, tuple[str, int]] = {f"{size}_b{batch}": (size, batch) for size in SIZES for batch in BATCHES}


def describe(cases: Sequence[str]) -> list[str]:
    """One line per size and one for what is common."""
    lines = [
        f"rollout: greedy, {DTYPE}, random prompts, fresh for every run, nothing stops a row early; weights random"
    ]
    for name in dict.fromkeys(CASES[case][0] for case in cases):
        size, shape = SIZES[name], SIZES[name].llama
        batches = ", ".join(str(CASES[case][1]) for case in cases if CASES[case][0] == name)
        body, whole = torch_peers.llama_shape(shape).params, torch_peers.total_parameters(shape)
        lines.append(
            f"  {name}: Llama, {whole / 1e6:.1f} M parameters ({body / 1e6:.1f} M without embedding and head), "
            f"width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, {shape['num_attention_heads']} heads, "
            f"{shape['num_key_value_heads']} key/value heads, feed-forward {shape['intermediate_size']}, vocabulary "
            f"{shape['vocab_size']}; batch {batches}; prompt {size.prompt} + {size.new_tokens} new tokens; seeds "
            f"{size.weights_seed} (weights), {size.prompts_seed} (prompts)"
        )
    return lines


# --- Ours -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """What a folder holds, as we run it."""

    config: ModelConfig
    params: Any

    @classmethod
    def load(cls, folder: Path) -> Model:
        """From a Hugging Face folder, in float32."""
        config = dataclasses.replace(hf_import.read_config(folder), param_dtype=DTYPE, compute_dtype=DTYPE)
        return cls(config, hf_import.import_params(folder, config))

    @property
    def shape(self) -> metrics.Shape:
        """For the operation counts."""
        config = self.config
        total = metrics.count_params(self.params)
        around = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
        return metrics.Shape(
            total - around, config.d_model, config.vocab_size, config.num_layers, config.num_heads * config.head_dim
        )

    def top_gap(self, tokens: Sequence[int]) -> float:
        """Difference of the two best logits after these ids, by one pass without a cache."""
        best = jax.lax.top_k(_next_logits(self.config, self.params, jnp.asarray([tokens], jnp.int32)), 2)[0]
        return float(best[0] - best[1])


@functools.partial(jax.jit, static_argnums=0)
def _next_logits(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = decoder.apply(config, params, {}, tokens, positions, jnp.ones_like(tokens))
    return decoder.logits(config, params, hidden[:, -1])[0]


def our_program(model: Model, size: Size, batch: int, generate: Callable[..., Any] | None = None) -> Program:
    """Our generation as a program that takes a `Request`.

    Args:
      model, size, batch: of the case.
      generate: `rollout.generate.generate`, or what stands in for it.
    """
    if generate is None:
        from subl_jax.rollout import generate as ours

        call = ours.generate
    else:
        call = generate
    devices = jax.local_devices()[: min(size.devices, batch)]

    def run(request: Request) -> list[list[int]]:
        sampling = SamplingConfig(
            temperature=0.0,
            max_turn_tokens=request.new_tokens,
            context=size.prompt + size.new_tokens,
            slots=-(-batch // len(devices)),
            prefill_chunk=size.prompt,
            prefill_rows=PREFILL_ROWS,
        )
        done = call(model.config, model.params, request.prompts, sampling, devices=devices)
        return [completion.tokens for completion in done]

    return Program(OURS, run, machine.jax_compilations())


# --- The measurement --------------------------------------------------------------------------------------------------


def measure(
    cases: Sequence[str], peers: Sequence[str], options: Options, *,
    sizes: Mapping[str, Size] = SIZES, table: Mapping[str, tuple[str, int]] = CASES,
    generate: Callable[..., Any] | None = None,
) -> Iterator[Row | Absent]:  # fmt: skip
    """Rows of each case, one per peer that runs here, and the peers that do not.

    Args:
      cases, peers, options: what is asked for.
      sizes, table, generate: the workload's definitions and our generation; replaced in tests.

    Raises:
      BenchmarkError: torch is absent, two programs disagree, or one is not what it is called.
    """
    torch_peers.require_torch()  # it writes the models
    configure_cpu(DEVICES)
    gone: set[str] = set()
    for name in dict.fromkeys(table[case][0] for case in cases):
        with tempfile.TemporaryDirectory(prefix="subl_jax_rollout_") as directory:
            size = sizes[name]
            torch_peers.save_random_llama(Path(directory), size.llama, size.weights_seed)
            model = Model.load(Path(directory))
            for case in cases:
                if table[case][0] != name:
                    continue
                with contextlib.ExitStack() as opened:
                    running = []
                    for peer in peers:
                        if peer in gone:
                            continue
                        try:
                            running.append(_open(peer, Path(directory), options))
                        except PeerAbsent as error:
                            gone.add(peer)
                            yield Absent(peer, str(error))
                            continue
                        opened.callback(running[-1].close)
                    ours = our_program(model, size, table[case][1], generate)
                    yield from _measure_case(case, size, table[case][1], model, ours, running, options)


def _open(peer: str, folder: Path, options: Options) -> Any:
    if peer == tunix_peer.NAME:
        return tunix_peer.TunixPeer(options.tunix_python, folder)
    return torch_peers.TransformersPeer(peer, folder, options.machine.threads)


def _measure_case(
    case: str, size: Size, batch: int, model: Model, ours: Program, peers: Sequence[Any], options: Options
) -> list[Row]:
    def request(new_tokens: int, number: int) -> Request:
        vocab = model.config.vocab_size
        return Request(
            harness.random_prompts((size.prompts_seed, batch, number), batch, size.prompt, vocab), new_tokens
        )

    differing: dict[str, int] = {peer.program.name: 0 for peer in peers}

    def agree(asked: Request, outputs: dict[str, Any]) -> None:
        for name, tokens in outputs.items():
            greedy.check_lengths(name, asked, tokens)
            if name != OURS:
                differing[name] += greedy.differing_rows(name, asked, outputs[OURS], tokens, model.top_gap)

    programs = [ours, *(peer.program for peer in peers)]
    harness.say(f"{case}: {', '.join(program.name for program in programs)}")
    timings = harness.interleave(
        programs, functools.partial(request, size.new_tokens), rounds=options.rounds, check=agree, others=options.others
    )
    facts = {peer.program.name: peer.facts() for peer in peers}
    # Compiled decoding is not part of a prefill.
    plain = [dataclasses.replace(program, must_compile=False) for program in programs]
    rounds = min(options.rounds or PREFILL_ROUNDS, PREFILL_ROUNDS)
    prefill = harness.interleave(plain, functools.partial(request, 1), rounds=rounds)
    return _rows(case, size, batch, model, timings, prefill, differing, facts)


def _rows(
    case: str, size: Size, batch: int, model: Model, timings: Mapping[str, Timing], prefill: Mapping[str, Timing],
    differing: Mapping[str, int], facts: Mapping[str, Mapping[str, Any]],
) -> list[Row]:  # fmt: skip
    shape, config, device = model.shape, model.config, jax.devices()[0]
    seq = size.prompt + size.new_tokens
    item = np.dtype(DTYPE).itemsize
    # The newest token is never fed back; logits are needed of the last prompt token and of every one fed back.
    flops = metrics.forward_flops(shape, batch * (seq - 1), batch * size.new_tokens, [seq - 1] * batch)
    weights = item * (shape.params + config.vocab_size * config.d_model)
    kv = metrics.kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, item)
    # A step reads the cache that its token is appended to and the token itself.
    moved = sum(metrics.decode_step_bytes(weights, [length] * batch, kv) for length in range(size.prompt + 1, seq))
    decode_tokens = batch * (size.new_tokens - 1)
    decode_s = {name: timing.median - prefill[name].median for name, timing in timings.items()}
    peak = PEAKS.get(device.device_kind)

    def rate(amount: float, name: str) -> float | None:
        return amount / decode_s[name] if decode_s[name] > 0 else None

    work = Work(
        NAME, case, shape.params, batch, seq, config.vocab_size, DTYPE, device_name(), batch * size.new_tokens, flops,
        extra={
            "params_total": metrics.count_params(model.params),
            "prompt": size.prompt,
            "new_tokens": size.new_tokens,
            "prefill_s": prefill[OURS].median,
            "decode_tokens_per_s": rate(decode_tokens, OURS),
            "decode_bytes_per_s": rate(moved, OURS),
        },
    )  # fmt: skip
    stats = device.memory_stats() or {}
    return results.rows(
        work,
        timings,
        mbu=None if peak is None or decode_s[OURS] <= 0 else metrics.mbu(moved, decode_s[OURS], peak.bandwidth),
        peak_bytes=stats.get("peak_bytes_in_use"),
        extra={
            name: {
                "peer_prefill_s": prefill[name].median,
                "peer_decode_tokens_per_s": rate(decode_tokens, name),
                "rows_differing": differing[name],
                **facts[name],
            }
            for name in facts
        },
    )


def device_name() -> str:
    """The card's name, or the processor and how many cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{machine.processor()}, {machine.usable_cores()} cores"


WORKLOAD = Workload(NAME, tuple(CASES), PEERS, describe, measure)
