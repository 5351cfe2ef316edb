"""On-policy distillation: a share of the steps trains on what the student itself says, scored by the teacher.

Generalised knowledge distillation (Agarwal et al. 2306.13649): at each step a coin of a given weight decides between the
teacher's trajectories and the student's own; the objective is the same for both. The student is rolled out anew every so
many steps, from its parameters at that step. What it said is kept on disk: a resumed run reads it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from subl_jax import data
from subl_jax.chat.rendering import Renderer
from subl_jax.distill.batches import BatchFacts, BatchSource
from subl_jax.distill.step import Batch
from subl_jax.models.config import ModelConfig
from subl_jax.rollout import store
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.trajectory import FAILED, Trajectory

# (round, student's shape, student's parameters) -> what the student said in that round.
Rollouts = Callable[[int, ModelConfig, Any], Sequence[Trajectory]]
# Names the coins of this module among the streams that are drawn from one seed.
_COINS = 0x0C0145


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """How much of the training is on the student's own rollouts.

    Attributes:
      weight: probability that a step trains on them; 0: never, 1: always.
      refresh_steps: steps between two rollouts of the student as it then is.
      episodes: rolled out each time.
    """

    weight: float = 0.0
    refresh_steps: int = 20
    episodes: int = 64

    def __post_init__(self) -> None:
        """Refuses shares and counts that have no meaning."""
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} is outside [0, 1]")
        for name in ("refresh_steps", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """What a training run needs besides, to train on its own rollouts."""

    config: OnPolicyConfig
    rollouts: Rollouts


def coins(weight: float, steps: int, seed: int) -> np.ndarray:
    """Which steps train on the student's own rollouts: bool [steps], a function of (seed, step)."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, _COINS], np.uint64)))
    return rng.random(steps) < weight


class OnPolicySource:
    """Batches of a mixture. Steps on the teacher's trajectories read them in their own order, and leave none out.

    Args:
      teacher: batches of the teacher's trajectories.
      on_policy: the mixture and the rollouts.
      student: the student's shape.
      capacity, rows, steps, seed: of the run, as for `BatchSource`.
      micro, groups: likewise.
    """

    def __init__(
        self,
        teacher: BatchSource,
        on_policy: OnPolicy,
        student: ModelConfig,
        capacity: int,
        rows: int,
        steps: int,
        seed: int,
        *,
        micro: int = 1,
        groups: int = 1,
    ) -> None:
        self._teacher, self._on_policy, self._student = teacher, on_policy, student
        self._capacity, self._rows, self._steps, self._seed = capacity, rows, steps, seed
        self._micro, self._groups = micro, groups
        self._own = coins(on_policy.config.weight, steps, seed)
        self._before = np.concatenate([[0], np.cumsum(self._own)])  # own steps before each position
        self._first, self._current = 0, None

    def prepare(self, position: int, student: Callable[[], Any]) -> int:
        """Rolls the student out at the beginning of a round in which it is trained on; see `batches.Source`.

        Raises:
          ValueError: the student said nothing that a row could hold.
        """
        every = self._on_policy.config.refresh_steps
        number = position // every
        if self._current is None:
            # A run that resumes goes on in the shapes that it had: how much was said before stands on disk.
            for earlier in range(number):
                self._read(earlier, student)
        self._read(number, student)
        return min((number + 1) * every, self._steps)

    def _read(self, number: int, student: Callable[[], Any]) -> None:
        """Makes the batches of a round, if any of its steps is the student's own."""
        every = self._on_policy.config.refresh_steps
        first, last = number * every, min((number + 1) * every, self._steps)
        own = int(self._own[first:last].sum())
        if not own:
            return
        said = self._on_policy.rollouts(number, self._student, student())
        documents = [one for one in said if one.status not in FAILED and len(one.tokens) <= self._capacity]
        if not documents:
            raise ValueError(
                f"round {number}: none of the student's {len(said)} episodes can be trained on (failed in their "
                f"environment, or longer than a row of {self._capacity} tokens); give rows that hold "
                "--config.rollout.context tokens"
            )
        if len(documents) < len(said):
            logging.warning(
                "round %d: %d of the student's %d episodes failed or are longer than a row of %d tokens; they are left out",
                number, len(said) - len(documents), len(said), self._capacity,
            )  # fmt: skip
        self._first = first
        self._current = BatchSource(
            documents, [len(one.tokens) for one in documents], self._capacity, self._rows, own,
            self._seed + number, micro=self._micro, groups=self._groups,
        )  # fmt: skip
        # One shape for both kinds of batches, and for later rounds, if it can be: each new one compiles the step anew.
        self._current.widen(self._teacher.targets)
        self._teacher.widen(self._current.targets)

    def _of(self, position: int) -> tuple[BatchSource, int]:
        """The source of the batch at a position, and its place there."""
        own = int(self._before[position])
        if not self._own[position]:
            return self._teacher, position - own
        if self._current is None:
            raise RuntimeError(f"the batch at position {position} was asked for before `prepare` was called for it")
        place = own - int(self._before[self._first])
        if place < 0:
            raise LookupError(f"position {position} is of a round before the one that `prepare` has made")
        return self._current, place

    def batch(self, position: int) -> Batch:
        """The batch at a position, as numpy arrays."""
        source, place = self._of(position)
        return source.batch(place)

    def facts(self, position: int) -> BatchFacts:
        """What that batch holds."""
        source, place = self._of(position)
        return source.facts(place)


def stored_rollouts(
    directory: Path,
    renderer: Renderer,
    episodes: Callable[[int], Sequence[Episode]],
    sampling: SamplingConfig,
    options: EngineConfig,
    *,
    seed: int,
    identity: Mapping[str, Any],
    label: str,
) -> Rollouts:
    """Rollouts by the engine, a dataset per round in `directory/round=N`; what stands there is not run again.

    Args:
      directory: of the run.
      renderer: the student's tokenizer and chat template.
      episodes: of a round.
      sampling, options: how they are run.
      seed: of the sampling; the round is the policy's version.
      identity: all that the student depends on; rollouts of another run are refused or replaced, see `store.roll_out`.
      label: at the head of progress lines.
    """

    def roll(number: int, config: ModelConfig, params: Any) -> Sequence[Trajectory]:
        todo = episodes(number)
        place = directory / f"round={number:04d}" / "dataset"

        def run(left: Sequence[Episode], statistics: RolloutStatistics) -> Iterator[Trajectory]:
            return rollout(
                config, params, renderer, left, sampling,
                seed=seed, policy=number, options=options, statistics=statistics, as_finished=True,
            )  # fmt: skip

        store.roll_out(
            place,
            {**identity, "round": number, "sampling": sampling, "engine": options.identity(), "seed": seed},
            todo,
            run,
            metadata={"round": number, "seed": seed},
            label=f"{label}, round {number}",
            in_flight=len(jax.local_devices()) // options.tensor * options.groups * max(sampling.slots, 1),
        )
        return data.read(place)

    return roll
