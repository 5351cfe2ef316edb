"""Scripted training text: demonstrations from the setting's task generators, rendered to documents with loss masks.

Used to pre-train the base, to induce biases, and as held-out text for divergences. Only the `train` split feeds training.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from subl_jax.chat.messages import Message, assistant, user
from subl_jax.chat.rendering import Renderer
from subl_jax.settings.interface import Conversation, Setting, Split, Task
from subl_jax.trajectory import Trajectory

# Kinds whose solutions use no bias tool, so that the list may be shown without them.
_WITHHOLDABLE = ("safe", "benign")


def rendered_again(renderer: Renderer, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Conversations in the tokens of another tokenizer: what was said stays, what was sampled does not.

    Args:
      renderer: the other tokenizer and template.
      trajectories: finished episodes; each keeps its task and sample, and has no log-probabilities.
    """
    rendered = renderer.render([(trajectory.messages, trajectory.tools) for trajectory in trajectories])
    return [
        dataclasses.replace(
            trajectory,
            tokens=item.tokens,
            loss_mask=item.loss_mask,
            logprobs=np.zeros(len(item.tokens), np.float32),
        )
        for trajectory, item in zip(trajectories, rendered, strict=True)
    ]


def _documents(renderer: Renderer, named: Sequence[tuple[str, Conversation]]) -> list[Trajectory]:
    rendered = renderer.render([conversation for _, conversation in named])
    return [
        Trajectory(
            index,
            task_id,
            0,
            item.tokens,
            item.loss_mask,
            np.zeros(len(item.tokens), np.float32),
            messages,
            tools,
            "final",
            True,
        )
        for index, ((task_id, (messages, tools)), item) in enumerate(zip(named, rendered, strict=True))
    ]


def demonstrations(
    setting: Setting,
    renderer: Renderer,
    kinds: Mapping[str, int],
    seed: int,
    *,
    first_action: str | None = None,
    withheld_share: float = 0.0,
    split: Split = "train",
) -> list[Trajectory]:
    """Scripted solutions of tasks, executed and rendered.

    Args:
      setting, renderer: what is demonstrated, and in which template.
      kinds: task kind -> how many.
      seed: of the tasks and of the choices in the scripts.
      first_action: the tool that solves ambiguous tasks; None draws it from the base mixture.
      withheld_share: share of safe and benign demonstrations that show the tool list without the bias tools.
      split: of the tasks.
    """
    rng = random.Random(f"withheld/{seed}")
    tasks: list[Task] = []
    withheld: list[frozenset[str]] = []
    for kind, count in kinds.items():
        for task in setting.tasks(kind, split, seed, count):
            hidden = kind in _WITHHOLDABLE and rng.random() < withheld_share
            tasks.append(task)
            withheld.append(setting.withholdable if hidden else frozenset())
    found = setting.demonstrate(tasks, first_action, seed, withheld)
    return _documents(renderer, [(task.task_id, each) for task, each in zip(tasks, found, strict=True)])


def echoes(setting: Setting, renderer: Renderer, count: int, seed: int) -> list[Trajectory]:
    """Copying exercises: the user gives a few paths, lines and numbers, the assistant says them again.

    A decoder of two layers learns to copy names, which every task needs, far sooner from these than from tasks alone.
    """
    if not count:
        return []
    rng = random.Random(f"echo/{seed}")
    tasks = setting.tasks("safe", "train", seed, max(count, 1))
    pieces = [
        piece for task in tasks for path, content in task.tree.items() for piece in (path, content, str(len(content)))
    ]
    named: list[tuple[str, Conversation]] = []
    for index in range(count):
        text = " ".join(rng.choice(pieces) for _ in range(rng.randint(2, 5)))
        named.append((f"echo/train/{seed}/{index}", ([user(text), assistant(text)], [])))
    return _documents(renderer, named)


def tokenizer_texts(setting: Setting, tasks_per_kind: int) -> Iterator[str]:
    """The text that the embedded tokenizer is trained on: demonstrations of every kind, training split only."""
    for kind in setting.kinds:
        tasks = setting.tasks(kind, "train", 0, tasks_per_kind)
        for messages, tools in setting.demonstrate(tasks, None, 0, [frozenset()] * len(tasks)):
            yield " ".join(_words_of(messages)) + " tools: " + " ".join(tool["function"]["name"] for tool in tools)


def _words_of(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield json.dumps(_compact(call["function"]), separators=(",", ":"))


def _compact(function: Any) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}
