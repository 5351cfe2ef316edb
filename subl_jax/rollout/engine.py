"""The episode engine: waves of episodes over local devices, tools executed on the host between turns.

Episodes and a policy in; finished `Trajectory` records out, in episode order within a wave. Keys and values stay
resident across turns: a later turn prefills only the tool results.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax.chat.messages import Message, ToolSchema
from subl_jax.chat.rendering import Renderer
from subl_jax.models import decoder
from subl_jax.models.cache import empty_cache
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device, replicate
from subl_jax.rollout.device import TurnRequest, compiled_turn
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.settings.interface import Environment, Task
from subl_jax.trajectory import Status, Trajectory


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to run: its index, the task, which sample of the task, and how to make its world."""

    index: int
    task: Task
    sample: int
    environment: Callable[[], Environment]


@dataclasses.dataclass
class RolloutStatistics:
    """Counts over a rollout, filled while it runs; times in seconds."""

    episodes: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    device_seconds: float = 0.0
    tool_seconds: float = 0.0


class _Live:
    """An episode in a slot."""

    def __init__(self, episode: Episode, renderer: Renderer, sampling: SamplingConfig) -> None:
        self.episode = episode
        self.world = episode.environment()
        self.messages: list[Message] = self.world.opening()
        self.tools: list[ToolSchema] = self.world.tools()
        self.tokens: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self.turn = 0
        self.status: Status | None = None
        self.pending = renderer.opening(self.messages, self.tools)
        if len(self.pending) + sampling.max_turn_tokens > sampling.context:
            raise ValueError(
                f"task {episode.task.task_id}: its opening of {len(self.pending)} tokens and a turn of "
                f"{sampling.max_turn_tokens} exceed rollout.context={sampling.context}; raise --config.rollout.context"
            )

    def record_prompt(self) -> None:
        """The pending tokens are about to be prefilled: they belong to the conversation, not to the assistant."""
        self.tokens += self.pending
        self.mask += [False] * len(self.pending)
        self.logprobs += [0.0] * len(self.pending)

    def finish(self) -> Trajectory:
        """Seals the episode."""
        assert self.status is not None
        return Trajectory(
            self.episode.index,
            self.episode.task.task_id,
            self.episode.sample,
            np.asarray(self.tokens, np.int32),
            np.asarray(self.mask, bool),
            np.asarray(self.logprobs, np.float32),
            self.messages,
            self.tools,
            self.status,
            self.world.done(),
        )


def _after_turn(
    live: _Live, ids: list[int], logprobs: list[float], ended: bool, renderer: Renderer, sampling: SamplingConfig
):
    """Books a sampled turn, executes its calls, and decides whether the episode goes on."""
    live.tokens += ids
    live.mask += [True] * len(ids)
    live.logprobs += logprobs
    live.turn += 1
    cut_off: Any = {"role": "assistant", "content": renderer.decode(ids), "unparseable": True}
    message: Message = renderer.parse(ids) if ended else cut_off
    live.messages = [*live.messages, message]
    if not ended:
        live.status = "truncated"
    elif message.get("unparseable"):
        live.status = "unparseable"
    else:
        results = live.world.step(message)
        if live.world.finished:
            live.status = "final"
        elif live.turn >= sampling.max_turns:
            live.messages = [*live.messages, *results]
            live.status = "turn_limit"
        else:
            added = renderer.continuation(live.messages, results, live.tools)
            live.messages = [*live.messages, *results]
            # The end token was sampled but never fed back: it is the first pending token and is already booked.
            live.pending = [ids[-1], *added]
            if len(live.tokens) + len(added) + sampling.max_turn_tokens > sampling.context:
                live.status = "length_limit"
            else:
                live.tokens += added
                live.mask += [False] * len(added)
                live.logprobs += [0.0] * len(added)


def rollout(
    config: ModelConfig,
    params: decoder.Params,
    renderer: Renderer,
    episodes: Sequence[Episode],
    sampling: SamplingConfig,
    *,
    seed: int,
    policy: int = 0,
    devices: Sequence[Device] | None = None,
    statistics: RolloutStatistics | None = None,
) -> Iterator[Trajectory]:
    """Runs every episode to its end.

    At fixed `sampling.slots` an episode's tokens depend on (seed, policy, episode index, sample) and nothing else: not on
    the slot, the number of devices, or the other episodes.

    Args:
      config, params: the policy; params are replicated to the devices once.
      renderer: tokenizer and chat template.
      episodes: what to run.
      sampling: limits and temperature.
      seed, policy: name the randomness; `policy` is the policy's version.
      devices: local devices to use; all by default.
      statistics: filled in place if given.

    Yields:
      Trajectories, in the order of `episodes`.

    Raises:
      ValueError: a task's opening exceeds the context.
    """
    devices = tuple(devices or jax.local_devices())
    statistics = statistics if statistics is not None else RolloutStatistics()
    program = compiled_turn(config, sampling, renderer.end_id, devices)
    params = replicate(params, devices)
    width = -(-sampling.context // sampling.prefill_chunk) * sampling.prefill_chunk
    cache = jax.pmap(lambda _: empty_cache(config, sampling.slots, sampling.context), devices=devices)(
        np.zeros(len(devices))
    )
    wave_size = len(devices) * sampling.slots
    for start in range(0, len(episodes), wave_size):
        wave = [_Live(episode, renderer, sampling) for episode in episodes[start : start + wave_size]]
        for live in wave:
            live.record_prompt()
        fresh = True
        while any(live.status is None for live in wave):
            request = _request(wave, wave_size, width)
            began = time.perf_counter()
            shaped = TurnRequest(*(field.reshape(len(devices), sampling.slots, *field.shape[1:]) for field in request))
            cache, result = program(params, cache, jnp.asarray(fresh), jnp.int32(seed), jnp.int32(policy), shaped)
            tokens, logprobs, counts, ended = (
                np.asarray(field).reshape(wave_size, *field.shape[2:]) for field in jax.device_get(result)
            )
            fresh = False
            statistics.device_seconds += time.perf_counter() - began
            statistics.sampled_tokens += int(counts.sum())
            statistics.prefilled_tokens += int(request.counts.sum())
            began = time.perf_counter()
            for slot, live in enumerate(wave):
                if live.status is None:
                    n = int(counts[slot])
                    _after_turn(
                        live,
                        tokens[slot, :n].tolist(),
                        logprobs[slot, :n].tolist(),
                        bool(ended[slot]),
                        renderer,
                        sampling,
                    )
            statistics.tool_seconds += time.perf_counter() - began
        statistics.episodes += len(wave)
        yield from (live.finish() for live in wave)


def _request(wave: list[_Live], wave_size: int, width: int) -> TurnRequest:
    """The pending tokens of the running episodes; finished ones and the unused slots of the last wave rest."""
    tokens = np.zeros((wave_size, width), np.int32)
    counts, episode, sample, turn = (np.zeros(wave_size, np.int32) for _ in range(4))
    for slot, live in enumerate(wave):
        if live.status is None:
            tokens[slot, : len(live.pending)] = live.pending
            counts[slot] = len(live.pending)
            episode[slot], sample[slot], turn[slot] = live.episode.index, live.episode.sample, live.turn
    arrays: Any = (tokens, counts, episode, sample, turn)  # host arrays in the device's record
    return TurnRequest(*arrays)
