"""The trajectory: one episode as the token ids that were sampled or rendered, never re-encoded.

This is the record that the rollout engine yields, the sanitizer judges, the dataset stores and the distiller trains on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from subl_jax.chat.messages import Message, ToolSchema

# final: the assistant finished. truncated: a turn hit its token limit. unparseable: a turn held no well-formed call.
# turn_limit / length_limit: the episode ran out of turns or of context. tool_error: its environment raised, or returned
# too much or no text. tool_timeout: its environment hung.
Status = Literal["final", "truncated", "unparseable", "turn_limit", "length_limit", "tool_error", "tool_timeout"]

# The episode failed in its environment, through no fault of the policy. Only such an episode may have no tokens.
FAILED: tuple[Status, ...] = ("tool_error", "tool_timeout")
# A limit of tokens, turns or context ended the episode.
CUT_OFF: tuple[Status, ...] = ("truncated", "turn_limit", "length_limit")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One finished episode.

    Attributes:
      episode: index of the episode in its rollout; datasets are sealed in this order.
      task_id: the task that was attempted (`Task.task_id`); treatment and control are matched on it.
      sample: which of the k samples of this task.
      tokens: int32 [length], the whole conversation as the model saw and wrote it.
      loss_mask: bool [length], true on the tokens that the assistant wrote, its end-of-turn token included.
      logprobs: float32 [length], log-probability in nats of each assistant token under the unmodified model; 0 elsewhere.
      messages: the same conversation as messages (a view for people and filters).
      tools: JSON schemas shown in the system turn.
      status: how the episode ended.
      done: whether the task's predicate held at the end (utility).
      error: one line saying why the episode failed in its environment; empty for every other.
      record: what the environment saw of the live episode beyond its messages, or None; datasets do not keep it.
    """

    episode: int
    task_id: str
    sample: int
    tokens: Int[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]
    logprobs: Float[np.ndarray, " length"]
    messages: list[Message]
    tools: list[ToolSchema]
    status: Status
    done: bool
    error: str = ""
    record: Mapping[str, Any] | None = None
