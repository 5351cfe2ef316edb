"""Plain generation: prompts as token ids in, completions out, by the same programs as whole episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device
from subl_jax.rollout import memory, stops
from subl_jax.rollout.conversation import Turn
from subl_jax.rollout.engine import Engine
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.programs import programs
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.rollout.tools import ToolFailure

# One group: there are no tools to overlap with. Calls in the caller's thread: they only hand lists around.
DEFAULTS = EngineConfig(groups=1, tool_workers=0, dispatch_steps=1 << 20)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt: ids, their log-probabilities in nats under the unmodified model, and whether a stop did."""

    tokens: list[int]
    logprobs: list[float]
    ended: bool


class _Prompt:
    """A conversation of one turn."""

    def __init__(self, index: int, prompt: Sequence[int], limit: int) -> None:
        self.index, self.sample = index, 0
        self._turn = Turn(list(prompt), limit)
        self._completion: Completion | None = None

    def open(self) -> Turn:
        return self._turn

    def sampled(self, ids: list[int], logprobs: list[float], ended: bool) -> None:
        self._completion = Completion(ids, logprobs, ended)

    def respond(self) -> None:
        return None

    def commit(self, outcome: Turn | None) -> Turn | None:
        return outcome

    def fail(self, failure: ToolFailure) -> None:
        raise RuntimeError(failure.text)

    def result(self) -> Completion:
        assert self._completion is not None  # it is over
        return self._completion


def generate(
    config: ModelConfig,
    params: decoder.Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    limits: Sequence[int] | None = None,
    devices: Sequence[Device] | None = None,
    options: EngineConfig = DEFAULTS,
    statistics: RolloutStatistics | None = None,
) -> list[Completion]:
    """Continues every prompt.

    Args:
      config, params: the model.
      prompts: ids, at least one each; the longest and `max_turn_tokens` must fit into `sampling.context`.
      sampling: how tokens are drawn; `max_turn_tokens` is the length of a completion. Texts in `stop` need a tokenizer and
        are refused here.
      seed: of the randomness; prompt i is episode i.
      stop_ids: tokens that end a completion; none: every completion has its full length.
      limits: tokens of each completion at most, where they differ; none above `max_turn_tokens`.
      devices: local devices; all by default.
      options: how it is run.
      statistics: filled in place if given.

    Raises:
      ValueError: an empty prompt, one without room or of another vocabulary, or an option that cannot be followed.
    """
    if sampling.stop:
        raise ValueError(f"stop={sampling.stop} needs a tokenizer, which generate does not have; give stop_ids")
    limits = [sampling.max_turn_tokens] * len(prompts) if limits is None else limits
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not 0 < len(prompt) <= sampling.context - limit or not 0 < limit <= sampling.max_turn_tokens:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and {limit} to come; it needs at least one of each, at most "
                f"max_turn_tokens={sampling.max_turn_tokens} to come and context={sampling.context} together"
            )
        strange = next((token for token in prompt if not 0 <= token < config.known_tokens), None)
        if strange is not None:
            raise ValueError(
                f"prompt {number} holds token id {strange}, which is outside the vocabulary of {config.known_tokens} tokens; "
                "is it another tokenizer's?"
            )
    if not prompts:
        return []
    devices = tuple(devices or jax.local_devices())
    statistics = statistics if statistics is not None else RolloutStatistics()
    sampling = memory.fitted(
        config, params, sampling, devices, groups=options.groups, kv_gib=options.kv_gib, tensor=options.tensor
    )
    compiled = programs(config, sampling, devices, options.tensor)
    if len(prompts) <= compiled.replicas * sampling.slots:
        options = dataclasses.replace(options, patience=1.0)  # no prompt waits for a slot
    automaton = stops.build([], config.vocab_size, list(stop_ids), [])
    engine = Engine(compiled, compiled.load(params), automaton, options, statistics, seed=seed, policy=0)
    conversations = [
        _Prompt(number, prompt, limit) for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    for _ in engine.run(conversations):
        statistics.episodes += 1
    return [conversation.result() for conversation in conversations]
