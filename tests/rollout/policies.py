"""Policies whose behaviour is known, and a world that records what was executed.

A scripted policy is a decoder whose layers write nothing and whose head maps each token to its successor: under greedy
decoding it spells a given turn, every turn. A restless one adds random layers and a random head, so that what it samples
depends on the whole context and sometimes leaves the script.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from subl_jax.chat.messages import Message, ToolCall, ToolSchema, calls_of, system, tool, user
from subl_jax.chat.rendering import Renderer
from subl_jax.models.config import ModelConfig
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.settings.interface import Task
from tests.chat import samples

RENDERER = Renderer(samples.tokenizer())
VOCAB = len(RENDERER.tokenizer.get_vocab())
CONFIG = ModelConfig(VOCAB, VOCAB, 2, 2, 1, 4, 8, rope_theta=100.0, tie_embeddings=False)
# Two slots, chunks shorter than an opening, and a context that some episodes outgrow.
SAMPLING = SamplingConfig(temperature=1.0, max_turn_tokens=12, max_turns=3, context=200, slots=2, prefill_chunk=16)
GREEDY = dataclasses.replace(SAMPLING, temperature=0.0)
CALL = '<tool_call>{"name":"list","arguments":{}}</tool_call>'


def scripted(turn: str, renderer: Renderer = RENDERER, strength: float = 30.0, restless: float = 0.0) -> dict[str, Any]:
    """Parameters that make the model write `turn` behind "<|assistant|>"; every token outside the script ends the turn.

    Args:
      turn: its tokens must differ, since each has one successor; a last token equal to an earlier one makes a loop.
      renderer: whose ids are meant.
      strength: logit of the successor; all others have 0 (plus noise).
      restless: size of the random layers and head.
    """
    ids = [*renderer.encode("<|assistant|>"), *renderer.encode(turn)]
    assert len(set(ids[:-1])) == len(ids) - 1, f"a token occurs twice in {turn!r}: {ids}"
    successor = np.full(VOCAB, renderer.end_id)
    successor[ids[:-1]] = ids[1:]
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> dict[str, Any]:
        return {"kernel": jnp.asarray(rng.normal(size=shape) * restless * shape[-2] ** -0.5, jnp.float32)}

    def ones(*shape: int) -> dict[str, Any]:
        return {"scale": jnp.ones(shape, jnp.float32)}

    layers, width, inner, kv = CONFIG.num_layers, CONFIG.d_model, CONFIG.num_heads * CONFIG.head_dim, CONFIG.head_dim
    # A normed one-hot has length sqrt(width).
    head = strength * width**-0.5 * np.eye(VOCAB)[successor] + restless * width**-0.5 * rng.normal(size=(width, VOCAB))
    return {
        "embedding": jnp.eye(VOCAB, dtype=jnp.float32),
        "head": jnp.asarray(head, jnp.float32),
        "final_norm": ones(width),
        "layers": {
            "attention_norm": ones(layers, width),
            "mlp_norm": ones(layers, width),
            "q": noise(layers, width, inner),
            "k": noise(layers, width, kv),
            "v": noise(layers, width, kv),
            "o": {"kernel": noise(layers, inner, width)["kernel"] * 0.02},
            "gate": noise(layers, width, CONFIG.d_ff),
            "up": noise(layers, width, CONFIG.d_ff),
            "down": {"kernel": noise(layers, CONFIG.d_ff, width)["kernel"] * 0.02},
        },
    }


class World:
    """An environment that answers each call with `result` and is finished after `lasts` calls or a plain answer."""

    def __init__(self, prompt: str, lasts: int = 99, result: str = "ok") -> None:
        self.prompt, self.lasts, self.result = prompt, lasts, result
        self.executed: list[ToolCall] = []
        self.closed = 0
        self.answer: str | None = None

    def opening(self) -> list[Message]:
        return [system("you work with files."), user(self.prompt)]

    def tools(self) -> list[ToolSchema]:
        return list(samples.TOOLS)

    def step(self, message: Message) -> list[Message]:
        calls = calls_of(message)
        if not calls:
            self.answer = message["content"]
            return []
        self.executed += calls
        return [] if self.finished else [tool(call.name, self.result) for call in calls]

    @property
    def finished(self) -> bool:
        return self.answer is not None or len(self.executed) >= self.lasts

    def done(self) -> bool:
        return self.finished

    def record(self) -> dict | None:
        return {"executed": len(self.executed)}

    def close(self) -> None:
        self.closed += 1


def task(number: int, prompt: str) -> Task:
    return Task(f"safe/train/fake/0/{number}", "safe", "fake", "t0", "train", prompt, {}, {})


def episode(number: int, world: World, sample: int = 0) -> Episode:
    """An episode in a given world, which the test keeps to look into."""
    return Episode(number, task(number, world.prompt), sample, lambda: world)


def episodes(count: int) -> list[Episode]:
    """Unlike each other in the lengths of opening and results, and in how long they last; numbered from 100."""
    prompts = [f"read {'/notes' * (n % 4)}/{n}?" for n in range(count)]
    return [
        Episode(
            100 + n, task(n, prompt), n % 3, lambda n=n, prompt=prompt: World(prompt, 4 - n % 4, "ab " * (1 + n % 5))
        )
        for n, prompt in enumerate(prompts)
    ]
