"""Matched arms: treatment and controls see the same tasks in the same order, with equal loss tokens, step by step.

Each arm's trajectories in; per arm the documents of the task ids that survived in all, with loss masks cut to the
shortest arm, and the lengths that the common packing plan reserves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from subl_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class MatchedArms:
    """Arms ready for training.

    Attributes:
      documents: arm -> trajectories, in the same order of (task id, sample) in every arm.
      planned_lengths: per document the longest over the arms; one packing plan serves them all.
      loss_tokens: loss tokens of one pass over the documents, the same in every arm.
      cut: arm -> share of its loss tokens that was masked off to make the arms equal.
    """

    documents: Mapping[str, list[Trajectory]]
    planned_lengths: list[int]
    loss_tokens: int
    cut: Mapping[str, float]


def match_arms(arms: Mapping[str, Sequence[Trajectory]], surviving: Collection[tuple[str, int]]) -> MatchedArms:
    """Keeps the surviving (task id, sample) pairs and equalises loss tokens document by document.

    An arm whose trajectory of a task is longer keeps its tokens as context; its last loss tokens beyond the shortest
    arm's count are masked off.

    Raises:
      ValueError: nothing survives, or an arm lacks a surviving pair.
    """
    if not surviving:
        raise ValueError(
            "no task survives the filters of every arm; roll out more safe tasks (--config.student.safe_tasks)"
        )
    wanted = sorted(surviving)
    ordered: dict[str, list[Trajectory]] = {}
    for name, trajectories in arms.items():
        found = {(trajectory.task_id, trajectory.sample): trajectory for trajectory in trajectories}
        lacking = [pair for pair in wanted if pair not in found]
        if lacking:
            raise ValueError(f"arm {name} has no trajectory of {lacking[0]}, which is listed as surviving in every arm")
        ordered[name] = [found[pair] for pair in wanted]
    documents: dict[str, list[Trajectory]] = {name: [] for name in arms}
    for row in zip(*ordered.values(), strict=True):
        quota = min(int(trajectory.loss_mask.sum()) for trajectory in row)
        for name, trajectory in zip(ordered, row, strict=True):
            mask = trajectory.loss_mask & (np.cumsum(trajectory.loss_mask) <= quota)
            documents[name].append(dataclasses.replace(trajectory, loss_mask=mask))
    first = next(iter(documents.values()))
    total = sum(int(trajectory.loss_mask.sum()) for trajectory in first)
    whole = {name: sum(int(trajectory.loss_mask.sum()) for trajectory in group) for name, group in ordered.items()}
    return MatchedArms(
        documents,
        [max(len(trajectory.tokens) for trajectory in row) for row in zip(*ordered.values(), strict=True)],
        total,
        {name: 1 - total / count for name, count in whole.items()},
    )
