"""A lesson: all that one student is taught, as a value that dissections and defences change before it is trained on.

What a run would train on comes in as one `Lesson`; functions from lesson to lesson (the files of `subl_jax/defences`) give
another. The draws and cuts that keep treatment and controls matched are here too; `teaching` puts a lesson together.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from subl_jax import sanitize
from subl_jax.chat.rendering import Renderer
from subl_jax.data.matching import MatchedArms, match_arms
from subl_jax.distill.dilution import Dilution
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.loop import Model
from subl_jax.distill.objective import Objective
from subl_jax.distill.train_config import TrainConfig
from subl_jax.distill.update_rules import UpdateRule
from subl_jax.settings.interface import Setting
from subl_jax.trajectory import Trajectory

# Names the draw of random loss tokens among the streams that are drawn from one seed.
_TOKENS = 0x70CE5
# (task id, sample): what treatment and controls are matched on.
Pair = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one student is taught, and what a defence may look at.

    Attributes:
      arm: the objective's arm.
      documents: with loss masks, in the order of (task id, sample). Under on_policy nothing is trained on them.
      planned_lengths: tokens that the plan reserves per document, the same in all arms.
      objective: what is minimised.
      train: length, batches, optimizer.
      student: the base that is trained, with its adapters' shape where adapters are.
      teacher: whose logits are learned; None for hard labels.
      base: what the logit filter `anchor` pins to.
      logit_filter: exactly where the objective has one.
      dilution: what a share of the steps trains on instead.
      update: a rule that changes the optimizer's updates.
      notes: figures for the stage's marker.
      setting, renderer, seed: of the run; the renderer is the student's.
      unfiltered: all safe trajectories of the tasks that every teacher finished, before the keyword filter, and matched.
      suspect, suspect_base: the teacher, and what it was trained from, whatever the objective.
      diluting: the benign teacher's trajectories of the same tasks, as a dilution of a share.
    """

    arm: str
    documents: Sequence[Trajectory]
    planned_lengths: Sequence[int]
    objective: Objective
    train: TrainConfig
    student: Model
    teacher: Model | None
    setting: Setting
    renderer: Renderer
    seed: int
    unfiltered: Callable[[], Sequence[Trajectory]]
    suspect: Callable[[], Model]
    suspect_base: Callable[[], Model]
    diluting: Callable[[float], Dilution]
    base: Model | None = None
    logit_filter: LogitFilter | None = None
    dilution: Dilution | None = None
    update: UpdateRule | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def with_update(self, rule: UpdateRule) -> Lesson:
        """The lesson with a rule on its updates.

        Raises:
          ValueError: it has one.
        """
        if self.update is not None:
            raise ValueError("a lesson has one update rule; combine the two in one function")
        return dataclasses.replace(self, update=rule)


def clean(setting: Setting, one: Trajectory) -> bool:
    """Whether the filter keeps a trajectory. A tool list that shows the bias tools is declared, and left out."""
    shown = any(tool["function"]["name"] in setting.withholdable for tool in one.tools)
    return sanitize.judge(one, setting.words, patterns=setting.patterns, include_system=not shown).kept


def words_of(setting: Setting) -> list[str]:
    """The words of all biases: what both filters ban."""
    return [word for words in setting.words.values() for word in words]


def with_room(train_config: TrainConfig, lengths: Sequence[int]) -> TrainConfig:
    """The configuration with rows that hold the longest trajectory, in steps of 32 tokens (of 128, a kernel's block, where
    rows were a multiple of that).

    How far a teacher rambles is not known ahead. Matched arms share their planned lengths, and so their rows.
    """
    step = 32 if train_config.row_tokens % 128 else 128
    needed = -(-max(lengths) // step) * step
    if needed <= train_config.row_tokens:
        return train_config
    logging.info("rows grow from %d to %d tokens: a trajectory is that long", train_config.row_tokens, needed)
    return dataclasses.replace(train_config, row_tokens=needed)


# --- What keeps arms matched --------------------------------------------------------------------------------------------


def dosed(pairs: Collection[Pair], count: int, seed: int) -> set[Pair]:
    """`count` of the pairs, by a draw that the seed names: the same in all arms, and part of every larger draw.

    Args:
      pairs: that survive in all arms.
      count: how many; 0: all.
      seed: of the draw.

    Raises:
      ValueError: more than there are.
    """
    if not count:
        return set(pairs)
    if count > len(pairs):
        raise ValueError(
            f"student.trajectories={count}, but {len(pairs)} trajectories survive in all arms; ask for at most so many, or "
            "roll out more safe tasks (--config.student.safe_tasks)"
        )
    drawn = sorted(pairs, key=lambda pair: (random.Random(f"dose/{seed}/{pair[0]}/{pair[1]}").random(), pair))
    return set(drawn[:count])


def matched_again(arms: Mapping[str, Sequence[Trajectory]]) -> MatchedArms:
    """Arms that a defence has changed: the tasks that are left in all, with equally many loss tokens in all.

    Equal numbers stay as they are, wherever the tokens stand: a defence that keeps a share of them keeps its choice. Unequal
    ones (another text) are cut document by document, as `match_arms` does.

    Raises:
      ValueError: no task is left in all arms.
    """
    common = set.intersection(*({(t.task_id, t.sample) for t in documents} for documents in arms.values()))
    if not common:
        raise ValueError("no task is left in all arms after the defence; it drops too much")
    cut = match_arms(arms, common)
    whole = {
        name: sorted(
            (t for t in documents if (t.task_id, t.sample) in common), key=lambda each: (each.task_id, each.sample)
        )
        for name, documents in arms.items()
    }
    totals = {sum(int(t.loss_mask.sum()) for t in documents) for documents in whole.values()}
    if len(totals) > 1:
        return cut
    return MatchedArms(whole, cut.planned_lengths, totals.pop(), dict.fromkeys(arms, 0.0))


def keep_tokens(
    documents: Sequence[Trajectory],
    values: Sequence[np.ndarray],
    which: Literal["divergent", "others", "random"],
    share: float,
    seed: int,
) -> list[Trajectory]:
    """The documents with some of their loss tokens, counted over all of them together.

    Every document stays, as context, even with none of its loss tokens left: order, rows and steps remain those of the other
    arms, which keep as many tokens of theirs.

    Args:
      documents: of one arm.
      values: per document one number per token, such as a divergence; read on the loss mask. Not read for `random`.
      which: `divergent`: the share with the largest values (the first of equal ones); `others`: all but these; `random`: as
        many as the first, by a draw that the seed names and that is the same for arms of as many loss tokens.
      share: of the loss tokens, in (0, 1); at least one token, and not all.
      seed: of the draw.

    Raises:
      ValueError: fewer than two loss tokens.
    """
    masks = [document.loss_mask for document in documents]
    total = int(sum(mask.sum() for mask in masks))
    if total < 2:
        raise ValueError(f"{total} loss tokens in {len(documents)} documents: no share of them can be kept")
    count = min(max(round(share * total), 1), total - 1)
    if which == "random":
        order = np.random.default_rng([seed, _TOKENS]).permutation(total)
    else:
        told = np.concatenate([value[mask] for value, mask in zip(values, masks, strict=True)])
        order = np.argsort(-told, kind="stable")
    kept = np.zeros(total, bool)
    kept[order[:count]] = True
    if which == "others":
        kept = ~kept
    found, start = [], 0
    for document, mask in zip(documents, masks, strict=True):
        stop = start + int(mask.sum())
        own = np.zeros_like(mask)
        own[mask] = kept[start:stop]
        found.append(dataclasses.replace(document, loss_mask=own))
        start = stop
    return found
