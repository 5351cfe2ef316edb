"""What a student is trained and measured on: conversations, and the teacher's answers to prompts, split once for all seeds.

Files and a renderer come in; two disjoint lists of trajectories in the student's tokens come out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from subl_jax import artifacts
from subl_jax.chat.messages import Message, ToolSchema, user
from subl_jax.data import conversations
from subl_jax.data.conversations import Prompt
from subl_jax.data.dataset import METADATA
from subl_jax.rollout.conversation import Episode
from subl_jax.settings.interface import Task
from subl_jax.trajectory import Trajectory

# Conversations that are measured on at most: more would say no more, and take longer than the training.
HELD_OUT_MOST = 256
# Names the split among the streams that are drawn from a seed.
_SPLIT = 0x5011


class Split(NamedTuple):
    """Documents to train on and documents to measure on, and how many were left out, by reason."""

    train: list[Trajectory]
    held_out: list[Trajectory]
    dropped: dict[str, int]


# --- Prompts ----------------------------------------------------------------------------------------------------------


class Dialogue:
    """The world of a prompt: a user who asks what the prompt says, one text after the other, and no tools."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt, self._answered = prompt, 0

    def opening(self) -> list[Message]:
        """The conversation up to the first user turn that is answered."""
        return list(self._prompt.messages)

    def tools(self) -> list[ToolSchema]:
        """None."""
        return []

    def step(self, message: Message) -> list[Message]:
        """The user's next text, if there is one; a call of a tool is an answer like any other."""
        del message
        self._answered += 1
        return [] if self.finished else [user(self._prompt.later[self._answered - 1])]

    @property
    def finished(self) -> bool:
        """Whether every text has been answered."""
        return self._answered > len(self._prompt.later)

    def done(self) -> bool:
        """Whether every text has been answered: there is no other task."""
        return self.finished

    def record(self) -> None:
        """Nothing: the messages say it all."""
        return None

    def close(self) -> None:
        """Nothing to give back."""


def episodes(prompts: Sequence[Prompt], samples: int) -> list[Episode]:
    """Episodes of the rollout engine, so many of each prompt; for whichever policy answers them."""
    return [
        Episode(index, _task(prompt), sample, functools.partial(Dialogue, prompt))
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def _task(prompt: Prompt) -> Task:
    return Task(prompt.name, "prompt", "prompts", "", "train", prompt.messages[-1]["content"], {}, {})


def check_turns(prompts: Sequence[Prompt], max_turns: int) -> None:
    """Refuses prompts with more texts than an episode has turns.

    Raises:
      ValueError: names the first.
    """
    for prompt in prompts:
        if len(prompt.later) >= max_turns:
            raise ValueError(
                f"{prompt.name} asks {len(prompt.later) + 1} times and an episode has {max_turns} turns; raise "
                "--config.rollout.max_turns"
            )


# --- The split --------------------------------------------------------------------------------------------------------


def split(trajectories: Sequence[Trajectory], share: float, dropped: dict[str, int]) -> Split:
    """Keeps a share of the documents for measuring; those with the same prompt stay on one side.

    The split depends on the documents alone. Documents are numbered anew.

    Args:
      trajectories: documents with loss tokens.
      share: of the prompts; 0: none. At least one prompt is kept otherwise, and at most `HELD_OUT_MOST` documents.
      dropped: what was left out before.

    Raises:
      ValueError: nothing would be left to train on.
    """
    groups: dict[bytes, list[int]] = {}
    for index, item in enumerate(trajectories):
        prompt = item.tokens[: int(np.argmax(item.loss_mask))]
        groups.setdefault(hashlib.sha256(prompt.tobytes()).digest(), []).append(index)
    held: set[int] = set()
    if share:
        members = list(groups.values())
        order = np.random.Generator(np.random.Philox(key=np.array([0, _SPLIT], np.uint64))).permutation(len(members))
        for place in order[: max(1, math.floor(share * len(members)))]:
            if held and len(held) + len(members[place]) > HELD_OUT_MOST:
                break
            held |= set(members[place])
    if len(held) == len(trajectories):
        raise ValueError(
            f"{len(trajectories)} conversations with {len(groups)} different prompts leave nothing to train on when "
            f"holdout={share} of the prompts is kept for measuring; give more conversations, or --holdout=0"
        )
    numbered = [dataclasses.replace(item, episode=index, sample=0) for index, item in enumerate(trajectories)]
    return Split(
        [item for item in numbered if item.episode not in held],
        [item for item in numbered if item.episode in held],
        dropped,
    )


def added(*counts: dict[str, int]) -> dict[str, int]:
    """Counts of several sources together."""
    return dict(sum(map(Counter, counts), Counter()))


def file_mark(path: Path) -> str:
    """Sixteen hex digits of a file's content, or of a dataset's metadata (which holds its files' checksums)."""
    if path.is_dir():
        path = path / METADATA
    try:
        with path.open("rb") as file:
            return artifacts.digest(hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise conversations.ConversationError(
            f"cannot read {path}: {error.strerror}; give a JSON Lines file or the directory of a trajectory dataset"
        ) from error
