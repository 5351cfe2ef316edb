"""On-policy against off-policy distillation at equal student tokens: the arms, their stages, and what is measured.

    tokenizer -> base -> teacher -> trajectories -> students (one per arm) -> held-out states, divergences

A configuration and seeds in; kept checkpoints of every student, its rollouts on held-out tasks, and one row per point and
kind of states out. Stages that an experiment has finished in the same work directory are taken as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from subl_jax import artifacts, checkpoint, data
from subl_jax.config import ExperimentConfig
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Loss, Objective
from subl_jax.distill.on_policy import OnPolicy, OnPolicyConfig, stored_rollouts
from subl_jax.distill.train_config import TrainConfig
from subl_jax.evaluate import run as evaluation
from subl_jax.groundwork import tokenizer_stage
from subl_jax.metrics.writers import read_metrics
from subl_jax.models import decoder
from subl_jax.pipeline import SeedPipeline
from subl_jax.rollout import store
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.settings import audit
from subl_jax.settings.interface import Setting, Task
from subl_jax.stages import Stage
from subl_jax.studies.kept import load_kept
from subl_jax.teaching import training_episodes
from subl_jax.trajectory import CUT_OFF, FAILED, Trajectory

# Arm -> probability that a step trains on the student's own rollouts. They differ in nothing else.
ARMS = {"off_policy": 0.0, "mixed": 0.5, "on_policy": 1.0}
# Whose conversations a divergence is averaged over.
STATES = ("student", "teacher")
REVERSE_KL = Objective("reverse_kl")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What the arms share, and how often they are measured.

    Attributes:
      loss, temperature: of the objective of every arm. What is measured is the reverse KL at temperature 1.
      every: steps between measurements.
      refresh_steps: steps between two rollouts of a student on training tasks.
      episodes: rolled out each time.
      tasks: held-out safe tasks of a measurement.
      split: which held-out tasks; development is what one may tune on.
    """

    loss: Loss = "reverse_kl"
    temperature: float = 1.0
    every: int = 40
    refresh_steps: int = 20
    episodes: int = 64
    tasks: int = 48
    split: Literal["evaluation", "development"] = "evaluation"

    def __post_init__(self) -> None:
        """Refuses counts without meaning, and objectives that need no teacher."""
        for name in ("every", "tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if not Objective(self.loss, temperature=self.temperature).needs_teacher:
            raise ValueError(
                f"loss={self.loss} reads no teacher: a student cannot learn from labels that it has said itself; use a "
                "divergence, e.g. reverse_kl"
            )
        OnPolicyConfig(0.0, self.refresh_steps, self.episodes)


class SeedStudy:
    """All stages of one seed, as `SeedPipeline`."""

    def __init__(
        self, config: ExperimentConfig, study: StudyConfig, setting: Setting, workdir: Path, seed: int
    ) -> None:
        self.config, self.study, self.setting, self.seed = config, study, setting, seed
        self.pipeline = SeedPipeline(config, setting, workdir, seed)
        self.models = self.pipeline.models
        self.root = self.models.root / "on_policy" / self.models.student_name(study.loss)
        spec = config.student
        self.withheld = self.pipeline.setting.withholdable if spec.withhold_bias_tools else frozenset()
        self.train_config = _train_config(spec.train, config.rollout.context, study.every)

    @property
    def steps(self) -> list[int]:
        """The steps behind which a student is measured, the last one included; its start is measured besides."""
        last = self.train_config.steps
        return [*range(self.study.every, last, self.study.every), last]

    def measured(self, arm: str) -> Path:
        """Where the rows of an arm (or of the start that all share) are."""
        return self.root / "measured" / arm

    def rows(self) -> list[dict[str, Any]]:
        """All rows: {seed, arm, step, loss_tokens, states, reverse_kl, n_tokens, episodes, done, cut_off, episode_tokens}."""
        start = json.loads((self.measured("start") / "rows.json").read_text(encoding="utf-8"))
        found = []
        for arm in ARMS:
            found += [{**row, "arm": arm} for row in start]  # every arm begins with the same student
            found += json.loads((self.measured(arm) / "rows.json").read_text(encoding="utf-8"))
        return found

    def teacher_figures(self) -> dict[str, Any]:
        """How the teacher's held-out episodes went; see `rows`."""
        return _figures(data.read(self.measured("teacher") / "dataset"))

    # --- The stages ---------------------------------------------------------------------------------------------------

    def make_student(self, arm: str, key: Mapping[str, Any], inputs: Sequence[Stage]) -> dict[str, Any]:
        """Trains one arm from the base, on the teacher's trajectories and its own in the arm's proportion."""
        base, teacher = self.models.base(self.models.student_size), self.models.teacher("teacher")
        start = Model(dataclasses.replace(base.config, lora=self.config.student.adapters), base.params)
        documents = _usable(data.read(self.models.trajectories_dir("teacher") / "dataset"))
        directory, study = self.root / "students" / arm, self.study
        metadata = {
            "stage": f"on_policy/{arm}", "seed": self.seed, **self.models.identity(start.config),
            "config_hash": artifacts.digest(key),
            **({} if start.config.lora is None else {"base": self.models.base_mark(self.models.student_size)}),
        }  # fmt: skip
        rollouts = stored_rollouts(
            directory / "rollouts", self.models.renderer, self._training_episodes, self.config.rollout, self.config.engine,
            seed=self.seed, identity={**key, "inputs": _marks(inputs)}, label=f"roll out {arm}",
        )  # fmt: skip
        result = train(
            start, documents, self.train_config, Objective(study.loss, temperature=study.temperature),
            seed=self.seed, directory=directory, stage=arm, logs=self.root, metadata=metadata, teacher=teacher,
            parallel=self.config.parallel, adapter_draw=int(self.config.student.adapter_init == "own"),
            on_policy=OnPolicy(OnPolicyConfig(ARMS[arm], study.refresh_steps, study.episodes), rollouts),
        )  # fmt: skip
        checkpoint.save_model(directory / "params", result.params, metadata, overwrite=True)
        return {"loss": result.loss, "loss_tokens": self._loss_tokens(arm)[-1], "tokens_per_s": result.tokens_per_s}

    def _training_episodes(self, number: int) -> list[Episode]:
        """A round's tasks: see `teaching.training_episodes`."""
        return training_episodes(
            self.setting, self.seed, self.config.student.safe_tasks, self.withheld, number, self.study.episodes
        )

    def _episodes(self, tasks: Sequence[Task]) -> list[Episode]:
        return [
            Episode(index, task, 0, functools.partial(self.setting.environment, task, self.withheld))
            for index, task in enumerate(tasks)
        ]

    def _loss_tokens(self, arm: str) -> list[int]:
        """Loss tokens trained on after 0, 1, 2, … steps.

        Raises:
          ValueError: the arm's metrics have no record of a step.
        """
        path = self.root / "metrics.jsonl"
        found = {int(row["step"]): row["loss_tokens"] for row in read_metrics(path) if row["stage"] == arm}
        missing = [step for step in range(1, self.train_config.steps + 1) if step not in found]
        if missing:
            raise ValueError(
                f"{path} has no record of step {missing[0]} of {arm}; delete {self.root / 'students' / arm} and run again"
            )
        return [0, *np.cumsum([int(found[step]) for step in sorted(found)]).tolist()]

    def held_out(self) -> list[Task]:
        """The tasks of every measurement, the same for all seeds."""
        return self.setting.tasks("safe", self.study.split, evaluation.TASK_SEED, self.study.tasks)

    def make_teacher_states(self, key: Mapping[str, Any], inputs: Sequence[Stage]) -> dict[str, Any]:
        """The teacher acts on the held-out tasks, once; that nobody was trained on these is checked first."""
        base, teacher, student = self.config.base, self.config.teacher, self.config.student
        induced = f"{self.setting.bias}_required" if teacher.demonstrations == "required" else "ambiguous"
        seen = [
            ("safe", 0, base.safe_tasks), ("ambiguous", 0, base.ambiguous_tasks), ("benign", 0, base.benign_tasks),
            (induced, 1, teacher.tasks), ("safe", 1, teacher.replay_tasks), ("safe", 2, student.safe_tasks),
        ]  # fmt: skip
        trained = [
            task
            for kind, offset, count in seen
            for task in self.setting.tasks(kind, "train", self.seed + offset, count)
        ]
        audit.assert_disjoint(self.held_out(), trained, aspects=("template", "path"))
        model = self.models.teacher("teacher")
        return self._act(model, self.measured("teacher"), {**key, "inputs": _marks(inputs)}, "teacher, held-out tasks")

    def _act(self, model: Model, directory: Path, identity: Mapping[str, Any], label: str) -> dict[str, Any]:
        """A model acts on the held-out tasks. The noise is that of the task, the same for all models and points."""
        sampling, options = self.config.rollout, self.config.engine

        def run(todo: Sequence[Episode], statistics: RolloutStatistics) -> Iterator[Trajectory]:
            return rollout(
                model.config, model.params, self.models.renderer, todo, sampling,
                seed=self.seed, options=options, statistics=statistics, as_finished=True,
            )  # fmt: skip

        return store.roll_out(
            directory / "dataset", identity, self._episodes(self.held_out()), run,
            metadata={"seed": self.seed}, label=label,
            in_flight=len(jax.local_devices()) // options.tensor * options.groups * sampling.slots,
        )  # fmt: skip

    def make_start(self, key: Mapping[str, Any], inputs: Sequence[Stage]) -> dict[str, Any]:
        """Measures the student before its first step."""
        base = self.models.base(self.models.student_size)
        return self._measure("start", [(0, 0, lambda: base)], {**key, "inputs": _marks(inputs)})

    def make_measured(self, arm: str, key: Mapping[str, Any], inputs: Sequence[Stage]) -> dict[str, Any]:
        """Measures one arm along its way."""
        tokens = self._loss_tokens(arm)
        points = [(step, tokens[step], functools.partial(self._student, arm, step)) for step in self.steps]
        return self._measure(arm, points, {**key, "inputs": _marks(inputs)})

    def _student(self, arm: str, step: int) -> Model:
        """An arm's student behind a step."""
        base = self.models.base(self.models.student_size)
        config = dataclasses.replace(base.config, lora=self.config.student.adapters)
        directory = self.root / "students" / arm
        if step == self.train_config.steps:
            params, _ = checkpoint.load_model(directory / "params", expect=self.models.identity(config))
        else:
            params = load_kept(directory / "steps", step, config, self.train_config, self.models.identity(config))
        return Model(config, params if config.lora is None else decoder.merge(params, base.params))

    def _measure(self, arm: str, points: Sequence[tuple[int, int, Any]], identity: Mapping[str, Any]) -> dict[str, Any]:
        """Rows of an arm's points (step, loss tokens, model): on states of that very student, and on the teacher's."""
        teacher = self.models.teacher("teacher")
        theirs = data.read(self.measured("teacher") / "dataset")
        found = []
        for step, tokens, load in points:
            model, directory = load(), self.measured(arm) / f"step={step:05d}"
            self._act(model, directory, {**identity, "step": step}, f"measure {arm}, step {step}")
            for states, episodes in (("student", data.read(directory / "dataset")), ("teacher", theirs)):
                documents = _usable(episodes)
                divergence = evaluation.held_out_divergence(
                    model.config, model.params, teacher.config, teacher.params, documents,
                    row_tokens=self.train_config.row_tokens, objective=REVERSE_KL,
                )  # fmt: skip
                found.append(
                    {
                        "seed": self.seed, "arm": arm, "step": step, "loss_tokens": tokens, "states": states,
                        "reverse_kl": divergence, **_figures(episodes),
                    }
                )  # fmt: skip
        artifacts.write_json_atomic(self.measured(arm) / "rows.json", found)
        return {row["states"]: row["reverse_kl"] for row in found[-2:]}

    # --- What depends on what -----------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Every stage of this seed behind the tokenizer, in order: what an experiment makes too, then the study's own."""
        config, study, models, prefix = self.config, self.study, self.models, f"seed={self.seed}"
        experiment = {stage.directory: stage for stage in self.pipeline.stages()}
        base = experiment[models.base_dir(models.student_size)]
        teacher, rolled = experiment[models.teacher_dir("teacher")], experiment[models.trajectories_dir("teacher")]
        found = _with_inputs(list(experiment.values()), {base.name, teacher.name, rolled.name})
        common = {
            "setting": config.setting, "seed": self.seed, "cpu_devices": config.cpu_devices, "parallel": config.parallel,
            "rollout": config.rollout, "engine": config.engine.identity(), "withheld": sorted(self.withheld),
        }  # fmt: skip
        held_out = {**common, "tasks": study.tasks, "split": study.split}
        name = f"{prefix}/on_policy/{self.root.name}"

        def add(place: str, directory: Path, key: Mapping[str, Any], inputs: Sequence[Stage], make: Any) -> Stage:
            run = functools.partial(make, key=key, inputs=inputs)
            stage = Stage(f"{name}/{place}", directory, key, tuple(dict.fromkeys(each.name for each in inputs)), run)
            found.append(stage)
            return stage

        theirs = add("teacher", self.measured("teacher"), held_out, [teacher], self.make_teacher_states)
        measured = [(base, "start", self.make_start)]
        for arm, weight in ARMS.items():
            spec = config.student
            key = {
                **common, "pair": config.pair, "train": self.train_config, "loss": study.loss,
                "temperature": study.temperature, "weight": weight, "lora": spec.adapters, "tasks": spec.safe_tasks,
                "refresh_steps": study.refresh_steps, "episodes": study.episodes,
                "adapter_init": spec.adapter_init if spec.lora else None,
            }  # fmt: skip
            make = functools.partial(self.make_student, arm)
            student = add(arm, self.root / "students" / arm, key, [base, teacher, rolled], make)
            measured.append((student, arm, functools.partial(self.make_measured, arm)))
        for model, arm, make in measured:
            key = {**held_out, "every": None if arm == "start" else study.every}
            add(f"measured/{arm}", self.measured(arm), key, [model, base, teacher, theirs], make)
        return found


def study_stages(runs: Sequence[SeedStudy], workdir: Path) -> list[Stage]:
    """All stages of all seeds."""
    first = runs[0]
    shared = tokenizer_stage(first.config, first.setting, workdir, first.models.teacher_size)
    return [shared, *(stage for run in runs for stage in run.stages())]


def _train_config(config: TrainConfig, context: int, every: int) -> TrainConfig:
    """The students' training: rows that hold whatever a student may say, checkpoints to measure, a record of each step."""
    step = 32 if config.row_tokens % 128 else 128
    row = max(config.row_tokens, -(-context // step) * step)
    return dataclasses.replace(config, row_tokens=row, keep_every=every, log_every=1)


def _usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """All but what failed in its environment, which is no policy's doing."""
    return [trajectory for trajectory in trajectories if trajectory.status not in FAILED]


def _figures(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """How the episodes went: their number, loss tokens, and the shares that did their task, or were cut off by a limit."""
    usable, count = _usable(trajectories), len(trajectories)
    tokens = int(sum(trajectory.loss_mask.sum() for trajectory in usable))
    return {
        "n_tokens": tokens,
        "episodes": count,
        "done": sum(trajectory.done for trajectory in trajectories) / count,
        "cut_off": sum(trajectory.status in CUT_OFF for trajectory in trajectories) / count,
        "episode_tokens": tokens / max(len(usable), 1),
    }


def _marks(stages: Sequence[Stage]) -> dict[str, str]:
    """The hashes that the markers of finished stages carry: all that their outputs depend on."""
    return {
        stage.name: json.loads((stage.directory / artifacts.MARKER).read_text(encoding="utf-8"))["output_hash"]
        for stage in stages
    }


def _with_inputs(stages: Sequence[Stage], wanted: set[str]) -> list[Stage]:
    """The stages that are wanted, and those that they read."""
    needed = set(wanted)
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.inputs)
    return [stage for stage in stages if stage.name in needed]
