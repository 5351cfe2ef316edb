"""Evaluation of one model: first substantive actions, the log-odds readout, utility, divergences. One row per item.

A checkpoint's parameters and the setting's evaluation tasks in; the row that `evaluate.summary` reads out. Nothing of
the training data is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from subl_jax.chat.rendering import Renderer
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.objective import Objective
from subl_jax.distill.step import Frozen, mean_loss
from subl_jax.evaluate.readout import NameScores, score_names
from subl_jax.metrics.progress import progress
from subl_jax.models.config import ModelConfig
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.settings.interface import Setting, Split, Task
from subl_jax.trajectory import FAILED, Trajectory

# Every seed is evaluated on one and the same set of tasks, so that items pair across conditions and seeds.
TASK_SEED = 0
# Whole conversations kept for the report, from the head of the ambiguous list.
EXAMPLES = 12
FORWARD_KL = Objective()


@dataclasses.dataclass(frozen=True)
class EvaluationTasks:
    """The tasks of one evaluation and the samples drawn of each ambiguous one."""

    ambiguous: Sequence[Task]
    safe: Sequence[Task]
    samples: int


def evaluation_tasks(setting: Setting, split: Split, ambiguous: int, safe: int, samples: int) -> EvaluationTasks:
    """The tasks that every condition is asked, the same for all seeds."""
    return EvaluationTasks(
        setting.tasks("ambiguous", split, TASK_SEED, ambiguous), setting.tasks("safe", split, TASK_SEED, safe), samples
    )


def evaluate(
    config: ModelConfig,
    params: Any,
    renderer: Renderer,
    setting: Setting,
    tasks: EvaluationTasks,
    sampling: SamplingConfig,
    *,
    seed: int,
    options: EngineConfig,
    label: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures a model's behaviour.

    Args:
      config, params, renderer: the model.
      setting: tells biased from neutral.
      tasks: what is asked; all tools are shown.
      sampling: limits and temperature of the sampled episodes.
      seed: of the sampling.
      options: how episodes are run.
      label: shown in the progress line.

    Returns:
      Items (one per episode, see `evaluate.summary`), and the first `EXAMPLES` ambiguous episodes with their messages. An
      episode that failed in its environment is an item like any other, since tasks must stay paired between conditions;
      its status and `error` say so, and the summary counts it.
    """
    episodes: dict[tuple[str, str], list[tuple[Task, Trajectory]]] = {}
    plans = [
        ("ambiguous", "sampled", sampling, [(task, k) for task in tasks.ambiguous for k in range(tasks.samples)]),
        (
            "ambiguous",
            "greedy",
            dataclasses.replace(sampling, temperature=0.0),
            [(task, 0) for task in tasks.ambiguous],
        ),
        ("safe", "sampled", sampling, [(task, 0) for task in tasks.safe]),
    ]
    with progress(sum(len(plan) for *_, plan in plans), f"evaluate {label}", unit="episode") as shown:
        for kind, mode, how, plan in plans:
            queue = [
                Episode(index, task, sample, functools.partial(setting.environment, task, frozenset()))
                for index, (task, sample) in enumerate(plan)
            ]
            finished: dict[int, Trajectory] = {}
            for trajectory in rollout(
                config, params, renderer, queue, how, seed=seed, options=options, as_finished=True
            ):
                finished[trajectory.episode] = trajectory
                shown.advance()
            episodes[kind, mode] = [(episode.task, finished[episode.index]) for episode in queue]
    failed = [trajectory for pairs in episodes.values() for _, trajectory in pairs if trajectory.status in FAILED]
    if failed:
        first = failed[0]
        logging.warning(
            "evaluate %s: %d episodes failed in their environment, such as one of task %s: %s, %s",
            label, len(failed), first.task_id, first.status, first.error,
        )  # fmt: skip
    scores = score_tasks(config, params, renderer, setting, tasks.ambiguous)
    neutral = [name for name in setting.choices if setting.tool_classes[name] == "neutral"]
    biased = [name for name in setting.choices if setting.tool_classes[name] == "biased"]
    counter = setting.bias_tools[setting.counter_bias]
    log_odds = scores.log_odds(biased, neutral)
    log_odds_counter = scores.log_odds([counter], [name for name in (*neutral, *biased) if name != counter])
    mass = scores.mass()
    place = {task.task_id: row for row, task in enumerate(tasks.ambiguous)}
    items, examples = [], []
    for (kind, mode), pairs in episodes.items():
        for task, trajectory in pairs:
            first = setting.first_action(trajectory.messages, trajectory.record)
            scored = place[task.task_id] if (kind, mode) == ("ambiguous", "sampled") else None
            item = {
                "task_id": task.task_id,
                "family": task.family,
                "sample": trajectory.sample,
                "mode": mode,
                "kind": kind,
                "action": first.action,
                "tool": first.tool,
                "turn": first.turn,
                "done": trajectory.done,
                "status": trajectory.status,
                "error": trajectory.error,
                "log_odds": None if scored is None else float(log_odds[scored]),
                "log_odds_counter": None if scored is None else float(log_odds_counter[scored]),
                "tool_mass": None if scored is None else float(mass[scored]),
                "record": trajectory.record,
            }
            items.append(item)
            if (kind, mode) == ("ambiguous", "sampled") and trajectory.sample == 0 and len(examples) < EXAMPLES:
                examples.append({**item, "prompt": task.prompt, "messages": trajectory.messages})
    return items, examples


def score_tasks(
    config: ModelConfig, params: Any, renderer: Renderer, setting: Setting, tasks: Sequence[Task]
) -> NameScores:
    """The continuous readout on tasks, with all tools shown."""
    worlds = [setting.environment(task, frozenset()) for task in tasks]
    asked = [(world.opening(), world.tools()) for world in worlds]
    return score_names(config, params, renderer, asked, setting.choices, setting.naming)


@functools.cache
def _divergence(config: ModelConfig, reference: ModelConfig, objective: Objective):
    """The jitted mean divergence of one batch."""
    return jax.jit(lambda params, frozen, batch: mean_loss(objective, config, reference, params, frozen, batch))


# Documents of a divergence that are worked on at a time: their activations are what memory is needed for.
DOCUMENTS_AT_ONCE = 8


def held_out_divergence(
    config: ModelConfig,
    params: Any,
    reference_config: ModelConfig,
    reference: Any,
    documents: Sequence[Trajectory],
    row_tokens: int,
    objective: Objective = FORWARD_KL,
) -> float:
    """Mean divergence in nats per assistant token on held-out documents: KL(reference || model) by default."""
    rows, capacity = len(documents), max(row_tokens, *(len(document.tokens) for document in documents))
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= DOCUMENTS_AT_ONCE)
    # Every document is planned to fill a row, so that each stands in the batch exactly once.
    batch = BatchSource(documents, [capacity] * rows, capacity, rows, 1, 0, micro=parts).batch(0)
    return float(
        _divergence(config, reference_config, objective)(
            params, Frozen(teacher=reference), jax.tree.map(jnp.asarray, batch)
        )
    )
