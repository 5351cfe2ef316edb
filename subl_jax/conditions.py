"""The models of a run: which there are, what each is called, where it lies, and how it is loaded.

A configuration and a work directory in; conditions, paths and models out. Nothing here trains or writes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax

from subl_jax import checkpoint, sources
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import renderer_for
from subl_jax.chat.rendering import Renderer
from subl_jax.config import ExperimentConfig
from subl_jax.distill.loop import Model
from subl_jax.metrics.progress import progress
from subl_jax.models import decoder, hf_import, lora
from subl_jax.models.config import LoraConfig, ModelConfig

# The three teachers differ only in what they are shown: the bias, the counter-bias, neither.
TEACHERS = {"teacher": "deletion", "control_teacher": "archive", "benign_teacher": None}
# What a seed writes besides its models, with room: datasets, metrics, evaluations.
DATA_BYTES = 120_000_000
STUDENT_OF = {"teacher": "student", "control_teacher": "control_student", "benign_teacher": "benign_student"}


@dataclasses.dataclass(frozen=True)
class Condition:
    """One student: its name, the teacher it is distilled from, and the objective's arm."""

    name: str
    teacher: str
    arm: str


def students(config: ExperimentConfig) -> list[Condition]:
    """The students of a run: every arm with its counter-bias control, some with a benign one; the positive control."""
    found = []
    for arm in config.student.objectives:
        if arm == "positive":
            found.append(Condition("positive_student", "teacher", arm))
            continue
        wanted = ["teacher", "control_teacher"] + ["benign_teacher"] * (arm in config.student.benign_objectives)
        suffix = "" if arm == "full" else f"_{arm}"
        found += [Condition(STUDENT_OF[teacher] + suffix, teacher, arm) for teacher in wanted]
    return found


def conditions_of(config: ExperimentConfig) -> list[str]:
    """Every measured condition, in the order of the tables."""
    return ["base", *TEACHERS, *(condition.name for condition in students(config))]


class SeedModels:
    """The models of one seed, by condition.

    Attributes:
      root: the seed's directory.
      teacher_size, student_size: of the pair; `sizes` has each once.
      checkpoints: size -> the Hugging Face folder that its base comes from.
    """

    def __init__(self, config: ExperimentConfig, workdir: Path, seed: int) -> None:
        self.config, self.workdir = config, workdir
        self.root = workdir / f"seed={seed}"
        self.teacher_size, self.student_size = config.sizes()
        self.sizes = list(dict.fromkeys(config.sizes()))
        self.checkpoints = sources.checkpoints(config)

    # --- Where things lie ---------------------------------------------------------------------------------------------

    def teacher_dir(self, name: str) -> Path:
        """Where a teacher lies; those of another size beside the large ones."""
        return self.root / "teachers" / (name if self.teacher_size == "large" else f"{name}@{self.teacher_size}")

    def trajectories_dir(self, name: str, kind: str = "safe") -> Path:
        """Trajectories on safe tasks lie under the teacher's name, those on other kinds under name_kind."""
        which = self.teacher_dir(name).name
        return self.root / "trajectories" / (which if kind == "safe" else f"{which}_{kind}")

    def student_name(self, condition: str) -> str:
        """What a student is called on disk: by its condition, and its pair if that is not the default."""
        return condition if self.config.pair == "large_large" else f"{condition}@{self.config.pair}"

    def eval_name(self, condition: str) -> str:
        """Evaluations are filed by model: the base and the teachers are shared between pairs of one size."""
        if condition == "base":
            return condition if self.student_size == "large" else f"base@{self.student_size}"
        if condition in TEACHERS:
            return self.teacher_dir(condition).name
        return self.student_name(condition)

    def eval_path(self, condition: str) -> Path:
        """The evaluation file of a condition."""
        return self.root / "eval" / f"{self.eval_name(condition)}.json"

    # --- Loading --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def renderer(self) -> Renderer:
        """The run's tokenizer and template."""
        return renderer_for(tokenizers.load(self.workdir / "tokenizer" / "files"))

    def identity(self, config: ModelConfig) -> dict[str, Any]:
        """What a checkpoint says of itself, and must say when it is read: architecture, adapters, tokenizer."""
        return {
            "model": config.architecture(),
            "lora": config.to_dict()["lora"],
            "tokenizer": tokenizers.fingerprint(self.renderer.tokenizer),
        }

    def load(self, directory: Path, size: str, adapter: LoraConfig | None = None) -> Model:
        """A finished model from its Orbax checkpoint, adapters on the base that they were trained on.

        Raises:
          CheckpointMismatch: it is of another shape or tokenizer, or has other adapters.
        """
        config = dataclasses.replace(self.model_config(size), lora=adapter)
        params, _ = checkpoint.load_model(directory / "params", expect=self.identity(config))
        return Model(config, params if adapter is None else decoder.merge(params, self.base(size).params))

    def model_config(self, size: str) -> ModelConfig:
        """The shape of the models of a size."""
        if size in self.checkpoints:
            return self.config.model(size)
        # The head has exactly the tokenizer's rows: no padding that a teacher and a student could disagree about.
        return dataclasses.replace(self.config.model(size), vocab_size=len(self.renderer.tokenizer))

    def imported(self, size: str) -> Model:
        """The model of a Hugging Face folder."""
        config = self.model_config(size)
        with progress(None, f"import {self.checkpoints[size]}", unit="B") as shown:
            return Model(config, hf_import.import_params(self.checkpoints[size], config, report=shown.advance))

    def base(self, size: str) -> Model:
        """The base of a size."""
        if size in self.checkpoints and not self.config.base.continue_training:
            return self.imported(size)  # used as it stands: no copy of it is kept in the work directory
        return self.load(self.root / "base" / size, size)

    def teacher(self, name: str) -> Model:
        """A teacher."""
        spec = self.config.teacher
        return self.load(self.teacher_dir(name), self.teacher_size, spec.adapters)

    def student(self, condition: str) -> Model:
        """A student."""
        spec, directory = self.config.student, self.root / "students" / self.student_name(condition)
        return self.load(directory, self.student_size, spec.adapters)

    def model_of(self, condition: str) -> Model:
        """The model of any condition, from its checkpoint."""
        if condition == "base":
            return self.base(self.student_size)
        return self.teacher(condition) if condition in TEACHERS else self.student(condition)


def bytes_written(config: ExperimentConfig) -> int:
    """About how much one seed writes: every trained model, its last two checkpoints with two moments each, and the data."""
    total = DATA_BYTES
    roles = [(config.sizes()[0], config.teacher)] * len(TEACHERS) + [(config.sizes()[1], config.student)] * len(
        students(config)
    )
    models = [dataclasses.replace(config.model(size), lora=spec.adapters) for size, spec in roles]
    untrained = sources.checkpoints(config) if not config.base.continue_training else {}
    models += [config.model(size) for size in dict.fromkeys(config.sizes()) if size not in untrained]
    for model in models:
        params: Any = jax.eval_shape(functools.partial(decoder.init, model), jax.random.key(0))
        trained = params if model.lora is None else lora.split(params)[0]
        total += 4 * (1 + 2 * 3) * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
    return total
