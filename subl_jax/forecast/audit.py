"""The audit of one candidate: virtual runs, the prediction and the baselines, as one record that can be kept as JSON.

A candidate of a run or of a user's own models in; the record out. What several students of a run share (their teacher's
baselines, the probes) is computed once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from subl_jax import data
from subl_jax.conditions import Condition
from subl_jax.distill.loop import Model
from subl_jax.forecast import baselines, behaviour, virtual
from subl_jax.forecast.behaviour import Probes
from subl_jax.forecast.candidate import Candidate, of_run
from subl_jax.forecast.prediction import predict
from subl_jax.forecast.virtual import VirtualConfig
from subl_jax.pipeline import SeedPipeline
from subl_jax.trajectory import Trajectory


def audited(
    candidate: Candidate, probes: Probes, spec: VirtualConfig, teacher_shift: float | None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """The virtual runs of a candidate and what they predict.

    Args:
      candidate, probes, spec, advance: as of `virtual.virtual_runs`.
      teacher_shift: the teacher's log-odds minus the student's base's, on the probes; None without a teacher.
    """
    runs = virtual.virtual_runs(candidate, probes, spec, advance)
    prediction = predict(runs, spec.ends(candidate.config), virtual.learning_rates(candidate), teacher_shift)
    return {
        "prediction": dataclasses.asdict(prediction),
        "virtual": {
            "first_order": _rounded(np.stack([run.first_order for run in runs])),
            "alignment": _rounded(np.stack([run.alignment for run in runs])),
            "log_odds": _rounded(np.stack([run.log_odds for run in runs])),
            "losses": _rounded(np.stack([run.losses for run in runs])),
        },
        "families": sorted(set(probes.families)),
        "documents": len(candidate.documents),
    }


def _rounded(values: np.ndarray) -> Any:
    return [_rounded(value) for value in values] if values.ndim else float(f"{float(values):.6g}")


class RunAudit:
    """The audits of the students of one run and seed; what they share is kept.

    Attributes:
      run: a pipeline whose stages up to `sanitize` are there.
      spec: how far is looked.
    """

    def __init__(self, run: SeedPipeline, spec: VirtualConfig) -> None:
        self.run, self.spec = run, spec

    @functools.cache  # noqa: B019 - lives as long as the command is at this seed
    def probes(self, size: str) -> Probes:
        """The probes, rendered for the models of a size."""
        return behaviour.make_probes(self.run.setting, self.run.models.renderer_of(size), self.spec.probes_per_family)

    @functools.cache  # noqa: B019
    def base(self, size: str) -> Model:
        """The base of a size."""
        return self.run.models.base(size)

    @functools.cache  # noqa: B019
    def base_log_odds(self, size: str) -> float:
        """Mean log-odds of the base of a size."""
        return _mean_log_odds(self.base(size), self.probes(size))

    @functools.cache  # noqa: B019
    def teacher_log_odds(self, name: str) -> float:
        """Mean log-odds of a teacher, in its own format."""
        return _mean_log_odds(self.run.models.teacher(name), self.probes(self.run.models.teacher_size))

    def teacher_shift(self, name: str) -> float:
        """A teacher's log-odds minus those of the student's base."""
        return self.teacher_log_odds(name) - self.base_log_odds(self.run.models.student_size)

    @functools.cache  # noqa: B019
    def moved(self, name: str) -> float:
        """‖Δθ‖ of a teacher from its own base."""
        return baselines.moved(self.run.models.teacher(name), self.base(self.run.models.teacher_size))

    @functools.cache  # noqa: B019
    def trajectories(self, name: str, positive: bool) -> list[Trajectory]:
        """What a teacher did, unfiltered: on safe tasks, and for the positive control on ambiguous ones too."""
        found = data.read(self.run.models.trajectories_dir(name) / "dataset")
        if positive:
            found = found + data.read(self.run.models.trajectories_dir(name, "ambiguous") / "dataset")
        return found

    @functools.cache  # noqa: B019
    def divergence(self, name: str, positive: bool) -> float:
        """KL of a teacher to the student's base on what the student would read; to its own base where tokens differ."""
        models, config = self.run.models, self.run.config
        documents = self.trajectories(name, positive)
        if not positive:
            surviving = models.surviving()
            documents = [item for item in documents if (item.task_id, item.sample) in surviving]
        size = models.student_size if config.one_tokenizer else models.teacher_size
        row_tokens = config.student.train.row_tokens
        return baselines.divergence(models.teacher(name), self.base(size), _readable(documents), row_tokens)

    def candidate(self, condition: Condition) -> Candidate:
        """What a student would be trained with."""
        return of_run(self.run, condition)

    def record(self, condition: Condition, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The audit of one student: the prediction, and the baselines beside it."""
        candidate, models, name = self.candidate(condition), self.run.models, condition.teacher
        positive = condition.arm == "positive"
        shift = self.teacher_shift(name)
        found = audited(candidate, self.probes(models.student_size), self.spec, shift, advance)
        values = {
            "kl": self.divergence(name, positive),
            "delta_norm": self.moved(name),
            "keywords": baselines.keyword_rate(self.trajectories(name, positive), self.run.setting),
            "teacher_shift": shift,
        }
        return {
            "setting": self.run.setting.name, "pair": self.run.config.pair, "seed": self.run.seed,
            "condition": condition.name, "arm": condition.arm, "teacher": name,
            **found, "baselines": baselines.signed(values),
        }  # fmt: skip


def _mean_log_odds(model: Model, probes: Probes) -> float:
    return float(behaviour.measure(model.config, model.params, probes).mean())


def _readable(documents: Sequence[Trajectory]) -> list[Trajectory]:
    """Documents that have loss tokens."""
    return [document for document in documents if document.loss_mask.any()]
