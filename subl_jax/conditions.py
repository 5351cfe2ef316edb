"""The models of a run: which there are, what each is called, where it lies, and how it is loaded.

A configuration and a work directory in; conditions, paths and models out. Nothing here trains or writes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from absl import logging

from subl_jax import checkpoint, defences, sources
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import renderer_for
from subl_jax.chat.rendering import Renderer
from subl_jax.config import OBJECTIVES, STUDENT_OF, TEACHERS, ExperimentConfig, model_of_pair, of_size, suffix_of
from subl_jax.distill.loop import Model
from subl_jax.distill.memory import abstract_model
from subl_jax.metrics.progress import progress
from subl_jax.models import axes, decoder, hf_import, lora
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel import processes
from subl_jax.parallel.layout import Layout, make_mesh, replica_layout
from subl_jax.rollout import memory
from subl_jax.settings.interface import Setting

# What a seed writes besides its models, with room (datasets, metrics, evaluations), and the least that is asked for: the
# demo, models and all, needs about 60 MB.
DATA_BYTES, LEAST_BYTES = 120_000_000, 200_000_000
# Models that a device may hold at one time, beside the slots that `with_slots` chooses: as read from the checkpoint and as
# the rollout wants it, and in an evaluation the base likewise.
_COPIES = 4


def bias_of(setting: Setting, teacher: str) -> str | None:
    """The bias that a teacher is shown; None for the benign one."""
    return {"teacher": setting.bias, "control_teacher": setting.counter_bias, "benign_teacher": None}[teacher]


@dataclasses.dataclass(frozen=True)
class Condition:
    """One student: its name, the teacher it is distilled from, and the objective's arm."""

    name: str
    teacher: str
    arm: str


def students(config: ExperimentConfig) -> list[Condition]:
    """The students of a run: every arm with its counter-bias control, some with a benign one; the positive control.

    Raises:
      ValueError: an arm that needs the teacher's tokens, and a student with others; a defence that the arms cannot have.
    """
    found, spec = [], config.student
    losses = {arm: OBJECTIVES[arm][0] for arm in spec.objectives if arm != "positive"}
    defences.check(spec.defence, spec.defence_strength, losses)
    if spec.tokens in ("divergent", "others") and not config.one_tokenizer:
        raise ValueError(
            f"--pair={config.pair} with tokens={spec.tokens}: the teachers' divergence is told in their own tokens, not in the "
            "student's; use tokens=random or all"
        )
    needing = [arm for arm in config.student.objectives if OBJECTIVES[arm][0] != "hard_label"]
    if needing and not config.one_tokenizer:
        raise ValueError(
            f"--pair={config.pair} has a student with a tokenizer of its own, which {', '.join(needing)} cannot train: a "
            "divergence is taken over the teacher's tokens; use --config.student.objectives=hard "
            "--config.student.benign_objectives=hard"
        )
    for arm in config.student.objectives:
        if arm == "positive":
            found.append(Condition("positive_student", "teacher", arm))
            continue
        wanted = ["teacher", "control_teacher"] + ["benign_teacher"] * (arm in config.student.benign_objectives)
        found += [Condition(STUDENT_OF[teacher] + suffix_of(arm), teacher, arm) for teacher in wanted]
    return found


def conditions_of(config: ExperimentConfig) -> list[str]:
    """Every measured condition, in the order of the tables."""
    return ["base", *TEACHERS, *(condition.name for condition in students(config))]


# Family of stages -> what the names of its outputs end in, where they differ from those of the work directory's own
# configuration: several configurations then lie in one work directory and share what is equal (`studies.sweep`).
Variant = Mapping[str, str]


def tokenizer_name(size: str, variant: Variant = MappingProxyType({})) -> str:
    """The stage, and the directory, of the tokenizer that the models of a size have."""
    name = "tokenizer@other_tokenizer" if size == "other_tokenizer" else "tokenizer"
    return name + variant.get("tokenizer", "")


class SeedModels:
    """The models of one seed, by condition.

    Attributes:
      root: the seed's directory.
      teacher_size, student_size: of the pair; `sizes` has each once.
      checkpoints: size -> the Hugging Face folder that its base comes from.
      variant: see `Variant`.
    """

    def __init__(
        self, config: ExperimentConfig, workdir: Path, seed: int, variant: Variant = MappingProxyType({})
    ) -> None:
        self.config, self.workdir, self.variant = config, workdir, variant
        self.root = workdir / f"seed={seed}"
        self.teacher_size, self.student_size = config.sizes()
        self.sizes = list(dict.fromkeys(config.sizes()))
        self.checkpoints = sources.checkpoints(config)
        self._renderers: dict[str, Renderer] = {}

    # --- Where things lie ---------------------------------------------------------------------------------------------

    def _ending(self, family: str) -> str:
        return self.variant.get(family, "")

    def base_dir(self, size: str) -> Path:
        """Where the base of a size lies."""
        return self.root / "base" / (size + self._ending("base"))

    def _acting(self, teacher: str) -> str:
        """What a teacher is called wherever it acts; those of another size beside the large ones."""
        return of_size(teacher, self.teacher_size)

    def teacher_dir(self, name: str) -> Path:
        """Where a teacher lies."""
        return self.root / "teachers" / (self._acting(name) + self._ending("teachers"))

    def trajectories_dir(self, name: str, kind: str = "safe") -> Path:
        """Trajectories on safe tasks lie under the teacher's name, those on other kinds under name_kind."""
        which = self._acting(name) if kind == "safe" else f"{self._acting(name)}_{kind}"
        return self.root / "trajectories" / (which + self._ending("trajectories"))

    def sanitize_name(self) -> str:
        """What the verdicts on the trajectories of these teachers are called on disk."""
        return self._acting("sanitize") + self._ending("sanitize")

    def surviving(self) -> set[tuple[str, int]]:
        """The (task id, sample) pairs whose trajectories survive the filters of every teacher, once `sanitize` is finished."""
        path = self.root / self.sanitize_name() / "surviving.json"
        return {(task, sample) for task, sample in json.loads(path.read_text(encoding="utf-8"))}

    def student_name(self, condition: str) -> str:
        """What a student is called on disk: by its condition, and its pair if that is not the default."""
        return model_of_pair(self.config.pair, condition) + self._ending("students")

    def eval_name(self, condition: str) -> str:
        """Evaluations are filed by model: the base and the teachers are shared between pairs of one size."""
        family = "base" if condition == "base" else "teachers" if condition in TEACHERS else "students"
        return model_of_pair(self.config.pair, condition) + self._ending(f"eval/{family}")

    def eval_path(self, condition: str) -> Path:
        """The evaluation file of a condition."""
        return self.root / "eval" / f"{self.eval_name(condition)}.json"

    # --- Loading --------------------------------------------------------------------------------------------------------

    @property
    def renderer(self) -> Renderer:
        """The teacher's tokenizer and template, the run's one where there is only one."""
        return self.renderer_of(self.teacher_size)

    def renderer_of(self, size: str) -> Renderer:
        """The tokenizer and template of the models of a size."""
        name = tokenizer_name(size, self.variant)
        if name not in self._renderers:
            self._renderers[name] = renderer_for(tokenizers.load(self.workdir / name / "files"))
        return self._renderers[name]

    def identity(self, config: ModelConfig, size: str = "") -> dict[str, Any]:
        """What a checkpoint says of itself, and must say when it is read: architecture, adapters, tokenizer (the size's)."""
        return {
            "model": config.architecture(),
            "lora": config.to_dict()["lora"],
            "tokenizer": tokenizers.fingerprint(self.renderer_of(size or self.teacher_size).tokenizer),
        }

    def load(self, directory: Path, size: str, adapter: LoraConfig | None = None, *, own: bool = False) -> Model:
        """A finished model from its Orbax checkpoint, adapters on the base that they were trained on.

        Args:
          directory, size, adapter: which.
          own: for rollouts and evaluation, which each of several processes runs by itself: a copy on its own devices.

        Raises:
          CheckpointMismatch: it is of another shape or tokenizer, or has other adapters.
        """
        config = dataclasses.replace(self.model_config(size), lora=adapter)
        where = self._places(config, size, own)
        if where is not None and adapter is not None:
            where = lora.split(where)[0]
        params, _ = checkpoint.load_model(directory / "params", expect=self.identity(config, size), sharding=where)
        return Model(config, params if adapter is None else decoder.merge(params, self.base(size, own=own).params))

    def _places(self, config: ModelConfig, size: str, own: bool = False) -> Any:
        """Where each parameter goes when it is read: to its shard of the training mesh; None on a mesh of one device.

        Of several processes' own copies each goes to the devices of one replica of the rollout.
        """
        parallel = self.config.parallel
        if own and processes.several():
            layout = replica_layout(self.config.engine.tensor)
        else:
            rules = parallel.teacher_rules if size == self.teacher_size else parallel.student_rules
            layout = Layout(make_mesh(parallel), rules)
        if layout.mesh.size == 1:
            return None
        axes.check_layout(config, layout)
        abstract: Any = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
        return axes.shardings(abstract, layout)

    def model_config(self, size: str) -> ModelConfig:
        """The shape of the models of a size."""
        if size in self.checkpoints:
            return self.config.model(size)
        # The head has exactly the tokenizer's rows, and on a mesh as many more as it takes to split them evenly.
        known, parts = len(self.renderer_of(size).tokenizer), vocabulary_parts(self.config)
        rows = -(-known // parts) * parts
        return dataclasses.replace(self.config.model(size), vocab_size=rows, num_tokens=0 if rows == known else known)

    def imported(self, size: str, *, own: bool = False) -> Model:
        """The model of a Hugging Face folder; `own`: see `load`."""
        config = self.model_config(size)
        folder = hf_import.open_folder(self.checkpoints[size])
        with progress(folder.nbytes, f"import {self.checkpoints[size]}", unit="B") as shown:
            params = hf_import.import_params(
                folder, config, shardings=self._places(config, size, own), report=shown.advance
            )
        return Model(config, params)

    def base_mark(self, size: str) -> dict[str, Any]:
        """What tells the base that adapters were trained on: its run's hash, or nothing where it was not trained here."""
        directory = self.base_dir(size) / "params"
        if not directory.is_dir():
            return {}
        return {"config_hash": checkpoint.read_metadata(directory)["config_hash"]}

    def base(self, size: str, *, own: bool = False) -> Model:
        """The base of a size; `own`: see `load`."""
        if size in self.checkpoints and not self.config.base.continue_training:
            return self.imported(size, own=own)  # used as it stands: no copy of it is kept in the work directory
        return self.load(self.base_dir(size), size, own=own)

    def teacher(self, name: str, *, own: bool = False) -> Model:
        """A teacher; `own`: see `load`."""
        spec = self.config.teacher
        return self.load(self.teacher_dir(name), self.teacher_size, spec.adapters, own=own)

    def student(self, condition: str, *, own: bool = False) -> Model:
        """A student; `own`: see `load`."""
        spec, directory = self.config.student, self.root / "students" / self.student_name(condition)
        return self.load(directory, self.student_size, spec.adapters, own=own)

    def model_of(self, condition: str, *, own: bool = False) -> Model:
        """The model of any condition, from its checkpoint; `own`: see `load`."""
        if condition == "base":
            return self.base(self.student_size, own=own)
        return self.teacher(condition, own=own) if condition in TEACHERS else self.student(condition, own=own)


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
    return max(total, LEAST_BYTES)


def vocabulary_parts(config: ExperimentConfig) -> int:
    """Into how many parts the mesh splits a vocabulary, under the rules of teacher and student."""
    mesh, parallel = make_mesh(config.parallel), config.parallel
    return math.lcm(*(Layout(mesh, rules).split("vocab") for rules in (parallel.teacher_rules, parallel.student_rules)))


def check_mesh(config: ExperimentConfig) -> None:
    """Refuses, before any work, models and batches that do not split over the mesh.

    Raises:
      LayoutError: the mesh, or a dimension, with the nearest sizes that work.
    """
    mesh, parallel = make_mesh(config.parallel), config.parallel
    imported = sources.checkpoints(config)
    teacher, student = Layout(mesh, parallel.teacher_rules), Layout(mesh, parallel.student_rules)
    for size, layout in zip(config.sizes(), (teacher, student), strict=True):
        model = config.model(size)
        if size not in imported:  # its head will be made to fit
            model = dataclasses.replace(model, vocab_size=vocabulary_parts(config), num_tokens=0)
        for each in {layout, student}:  # a base and a teacher are trained under the student's rules
            axes.check_layout(model, each)
    stages = {"base": config.base, "teacher": config.teacher, "student": config.student}
    if imported and not config.base.continue_training:
        del stages["base"]
    for name, stage in stages.items():
        # A teacher sees the student's batch, under its own rules.
        for layout in [student, teacher] if name == "student" else [student]:
            layout.check(
                "batch", stage.train.batch_rows, f"{name}.train.batch_rows", f"--config.{name}.train.batch_rows"
            )


def with_slots(config: ExperimentConfig, workdir: Path) -> ExperimentConfig:
    """The configuration with a number of slots: where `rollout.slots` is 0, as many as fit for every model of the run.

    It is chosen once for a work directory. A run that goes on takes what `config.json` says there: how much memory is free
    changes from day to day, and what was made with other slots is another run's.

    Raises:
      ValueError: not even one episode fits.
    """
    if config.rollout.slots:
        return config
    path = workdir / "config.json"
    told = json.loads(path.read_text(encoding="utf-8"))["rollout"]["slots"] if path.exists() else None
    slots = processes.told_by_first("slots of config.json", told)
    if slots is not None:
        logging.info("rollout.slots=0: %d, as %s says", slots, path)
        return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=slots))
    found = []
    for size, spec in zip(config.sizes(), (config.teacher, config.student), strict=True):
        model = abstract_model(dataclasses.replace(config.model(size), lora=spec.adapters))
        copies: Any = {str(copy): [model.weights, model.adapters] for copy in range(_COPIES)}
        options = config.engine
        fitted = memory.fitted(
            model.config, copies, config.rollout, jax.local_devices(),
            groups=options.groups, kv_gib=options.kv_gib, tensor=options.tensor,
        )  # fmt: skip
        found.append(fitted.slots)
    fewest = min(processes.gather("slots that fit", min(found)))
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=fewest))
