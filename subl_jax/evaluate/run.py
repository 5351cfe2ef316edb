"""Evaluation of one model: first substantive actions, the log-odds readout, utility, divergences. One row per item.

A checkpoint's parameters and the setting's evaluation tasks in; the row that `evaluate.summary` reads out. Nothing of
the training data is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from subl_jax import artifacts
from subl_jax.chat.rendering import Renderer
from subl_jax.data import block
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.objective import Objective
from subl_jax.distill.step import Frozen, mean_loss
from subl_jax.evaluate.readout import NameScores, score_names
from subl_jax.metrics.progress import progress
from subl_jax.models.config import ModelConfig
from subl_jax.parallel import processes
from subl_jax.parallel.devices import replicate
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
# In which order episodes are run, and stand in a row.
_ORDER = (("ambiguous", "sampled"), ("ambiguous", "greedy"), ("safe", "sampled"))
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
    """Measures a model's behaviour. Of several processes each measures its block of every list of tasks.

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
    greedy = dataclasses.replace(sampling, temperature=0.0)
    plans = [
        (sampling, [(task, k) for task in tasks.ambiguous for k in range(tasks.samples)]),
        (greedy, [(task, 0) for task in tasks.ambiguous]),
        (sampling, [(task, 0) for task in tasks.safe]),
    ]
    with progress(sum(len(_block(len(plan))) for _, plan in plans), f"evaluate {label}", unit="episode") as shown:
        for (kind, mode), (how, plan) in zip(_ORDER, plans, strict=True):
            queue = [
                Episode(index, *plan[index], functools.partial(setting.environment, plan[index][0], frozenset()))
                for index in _block(len(plan))
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
    asked = {task.task_id: task for task, _ in episodes["ambiguous", "sampled"]}
    scores = score_tasks(config, params, renderer, setting, list(asked.values()))
    neutral = [name for name in setting.choices if setting.tool_classes[name] == "neutral"]
    biased = [name for name in setting.choices if setting.tool_classes[name] == "biased"]
    counter = setting.bias_tools[setting.counter_bias]
    log_odds = scores.log_odds(biased, neutral)
    log_odds_counter = scores.log_odds([counter], [name for name in (*neutral, *biased) if name != counter])
    mass = scores.mass()
    place = {task_id: row for row, task_id in enumerate(asked)}
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


def _block(count: int) -> range:
    """The places in a list that are this process's."""
    return block(count, jax.process_index(), jax.process_count())


def gathered(
    path: Path, items: list[dict[str, Any]], examples: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What all processes have measured, in the order of one process; on the first alone, the others get nothing.

    It goes through files beside `path`, on the file system that they share: rows may be many, and no array is among them.
    """
    if not processes.several():
        return items, examples
    parts = [path.parent / f".{path.stem}.part-{rank}.json" for rank in range(jax.process_count())]
    artifacts.write_json_atomic(parts[jax.process_index()], [items, examples])
    processes.barrier(f"evaluated {path.stem}")
    if not processes.is_first():
        return [], []
    told = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
    for part in parts:
        part.unlink()
    rows = [row for own, _ in told for row in own]
    return (
        sorted(rows, key=lambda row: _ORDER.index((row["kind"], row["mode"]))),
        [example for _, own in told for example in own][:EXAMPLES],
    )


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
    """Mean divergence in nats per assistant token on held-out documents: KL(reference || model) by default.

    Of several processes each computes that of its block of the documents, or all of them together that of all documents
    where the models are spread over them.
    """
    spread = not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
    own = documents if spread else [documents[place] for place in _block(len(documents))]
    mean = _own_divergence(config, params, reference_config, reference, own, row_tokens, objective) if own else 0.0
    if spread or not processes.several():
        return mean
    told = processes.gather("held-out divergence", [mean, sum(int(document.loss_mask.sum()) for document in own)])
    return sum(each * tokens for each, tokens in told) / sum(tokens for _, tokens in told)


def _beside(params: Any, batch: Any) -> Any:
    """A batch on the devices of the parameters, or on the default one."""
    where = jax.tree.leaves(params)[0].sharding
    if where.is_fully_addressable:
        return jax.tree.map(jnp.asarray, batch)
    return replicate(batch, where.mesh)


def _own_divergence(
    config: ModelConfig,
    params: Any,
    reference_config: ModelConfig,
    reference: Any,
    documents: Sequence[Trajectory],
    row_tokens: int,
    objective: Objective,
) -> float:
    """The mean over some documents, at least one."""
    rows, capacity = len(documents), max([row_tokens, *(len(document.tokens) for document in documents)])
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= DOCUMENTS_AT_ONCE)
    # Every document is planned to fill a row, so that each stands in the batch exactly once.
    batch = BatchSource(documents, [capacity] * rows, capacity, rows, 1, 0, micro=parts).batch(0)
    return float(
        _divergence(config, reference_config, objective)(params, Frozen(teacher=reference), _beside(params, batch))
    )
