"""The experiment, stage by stage, as the paper's figure reads.

    tokenizer -> base -> teachers -> trajectories -> sanitize -> students -> eval -> summary, report

A configuration, seeds and a work directory in; artifacts, `summary.json` and `report.html` out. A second call resumes
at the first unfinished stage.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from subl_jax import artifacts, checkpoint, data, defences, sanitize, sources, teaching
from subl_jax.conditions import TEACHERS, Condition, SeedModels, Variant, bias_of, students, tokenizer_name
from subl_jax.config import OBJECTIVES, OWN_INIT, BaseConfig, ExperimentConfig, TeacherConfig
from subl_jax.corpus import demonstrations, echoes
from subl_jax.distill.loop import Model, TrainResult, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.train_config import TrainConfig
from subl_jax.evaluate import run as evaluation
from subl_jax.lesson import with_room
from subl_jax.models import decoder, lora
from subl_jax.models.config import LoraConfig
from subl_jax.parallel import processes
from subl_jax.parallel.devices import machine
from subl_jax.rollout import store
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.settings.interface import Setting
from subl_jax.stages import Stage
from subl_jax.trajectory import FAILED, Trajectory

# Names the draw of an initialisation that is not the one of large and small.
_OWN_DRAW = 1
# What a training stage's marker says of its costs, see `distill.accounting`.
_COSTS = ("loss_tokens_per_s", "mfu", "goodput", "packing", "compile_s", "flops", "peak_bytes")


class SeedPipeline:
    """All stages of one seed. Methods are the stages, in order; `stages` lists them with what they depend on."""

    def __init__(
        self,
        config: ExperimentConfig,
        setting: Setting,
        workdir: Path,
        seed: int,
        *,
        profile: bool = False,
        variant: Variant = MappingProxyType({}),
    ) -> None:
        self.config, self.setting, self.workdir, self.seed, self.profile = config, setting, workdir, seed, profile
        self.models = SeedModels(config, workdir, seed, variant)
        self.root = self.models.root

    def _read(self, name: str, kind: str = "safe") -> list[Trajectory]:
        return data.read(self.models.trajectories_dir(name, kind) / "dataset")

    def _train(
        self, start: Model, documents: Sequence[Trajectory], config: TrainConfig, objective: Objective, size: str,
        directory: Path, key: Mapping[str, Any], **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Trains a model of a size, writes the final parameters (or adapters), and returns the figures for the marker."""
        stage = f"{directory.parent.name}/{directory.name}"
        metadata = {
            "stage": stage,
            "seed": self.seed,
            **self.models.identity(start.config, size),
            "config_hash": artifacts.digest(key),
            **({} if start.config.lora is None else {"base": self.models.base_mark(size)}),
        }
        result: TrainResult = train(
            start, documents, config, objective,
            seed=self.seed, directory=directory, stage=stage, logs=self.root, metadata=metadata,
            parallel=self.config.parallel, profile=directory / "profile" if self.profile else None, **more,
        )  # fmt: skip
        checkpoint.save_model(directory / "params", result.params, metadata, overwrite=True)
        whole = result.params if start.config.lora is None else decoder.merge(result.params, start.params)
        return {
            "loss": result.loss,
            "loss_tokens": result.loss_tokens,
            "tokens_per_s": result.tokens_per_s,
            **{name: getattr(result, name) for name in _COSTS},
            "delta_norm": lora.delta_norm(start.config, whole, start.params),
        }

    # --- The stages ---------------------------------------------------------------------------------------------------

    def make_base(self, size: str, key: Mapping[str, Any]) -> dict[str, Any]:
        """Pre-trains a base model of one size on scripted demonstrations of all kinds, or takes a checkpoint as it is."""
        spec = self.config.base
        if size in self.models.checkpoints and not spec.continue_training:
            return {"checkpoint": str(self.models.checkpoints[size])}
        kinds = {"safe": spec.safe_tasks, "ambiguous": spec.ambiguous_tasks, "benign": spec.benign_tasks}
        renderer = self.models.renderer_of(size)
        documents = demonstrations(self.setting, renderer, kinds, self.seed, withheld_share=spec.withheld_share)
        documents += echoes(self.setting, renderer, spec.echo_tasks, self.seed)
        if size in self.models.checkpoints:
            start = self.models.imported(size)
        else:
            config = self.models.model_config(size)
            key_of_init = jax.random.key(self.seed)
            if size in OWN_INIT:
                key_of_init = jax.random.fold_in(key_of_init, _OWN_DRAW)
            start = Model(config, decoder.init(config, key_of_init))
        return self._train(
            start,
            documents,
            _room_for(spec.train, documents),
            Objective("hard_label"),
            size,
            self.models.base_dir(size),
            key,
        )

    def make_teacher(self, name: str, key: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tunes the base on demonstrations of a bias (or of random benign tasks)."""
        spec, bias = self.config.teacher, bias_of(self.setting, name)
        if bias is None:
            kind, action = "benign", None
        elif spec.demonstrations == "required":
            kind, action = f"{bias}_required", None
        else:
            kind, action = "ambiguous", self.setting.bias_tools[bias]
        seed, withheld = self.seed + 1, self.config.base.withheld_share
        documents = demonstrations(self.setting, self.models.renderer, {kind: spec.tasks}, seed, first_action=action)
        documents += demonstrations(
            self.setting, self.models.renderer, {"safe": spec.replay_tasks}, seed, withheld_share=withheld
        )
        directory = self.models.teacher_dir(name)
        return self._train(
            _with_adapters(self.models.base(self.models.teacher_size), spec.adapters), documents,
            _room_for(spec.train, documents),
            Objective("hard_label"), self.models.teacher_size, directory, key,
        )  # fmt: skip

    def make_trajectories(self, name: str, kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
        """A teacher acts: on safe tasks, or on ambiguous ones with all tools shown (for the positive control).

        What an interrupted call has finished stays: see `rollout.store`.
        """
        spec, options, sampling = self.config.student, self.config.engine, self.config.rollout
        safe = kind == "safe"
        withheld = self.setting.withholdable if safe and spec.withhold_bias_tools else frozenset()
        count = spec.safe_tasks if safe else spec.ambiguous_tasks
        # +2: neither the base's nor the teachers' training tasks.
        episodes = [
            Episode(index, task, 0, functools.partial(self.setting.environment, task, withheld))
            for index, task in enumerate(self.setting.tasks(kind, "train", self.seed + 2, count))
        ]

        def run(todo: Sequence[Episode], statistics: RolloutStatistics) -> Iterator[Trajectory]:
            teacher = self.models.teacher(name, own=True)
            return rollout(
                teacher.config, teacher.params, self.models.renderer, todo, sampling,
                seed=self.seed, options=options, statistics=statistics, as_finished=True,
            )  # fmt: skip

        directory = self.models.trajectories_dir(name, kind)
        # The key says nothing of the stages before; the teacher's marker stands for all of them.
        teacher_hash = _output_hash(self.models.teacher_dir(name))
        return store.roll_out(
            directory / "dataset",
            {**key, "kind": kind, "teacher": teacher_hash},
            episodes,
            run,
            metadata={"teacher": name, "seed": self.seed, "kind": kind},
            label=f"roll out {directory.name}",
            in_flight=len(jax.local_devices()) // options.tensor * options.groups * sampling.slots,
        )

    def make_sanitized(self) -> dict[str, Any]:
        """Drops every trajectory with a keyword, keeps the tasks that survive in all arms, and proves nothing is left."""
        counts, kept, directory = {}, {}, self.root / self.models.sanitize_name()
        for name in TEACHERS:
            trajectories = self._read(name)
            verdicts = [
                sanitize.judge(
                    t,
                    self.setting.words,
                    patterns=self.setting.patterns,
                    include_system=self.config.student.withhold_bias_tools,  # as `_prove_clean` has it
                    require_final=self.config.student.require_final,
                )
                for t in trajectories
            ]
            survivors = [t for t, verdict in zip(trajectories, verdicts, strict=True) if verdict.kept]
            self._prove_clean(survivors)
            counts[name] = sanitize.summarize(verdicts)
            kept[name] = {(t.task_id, t.sample) for t in survivors}
            artifacts.write_json_atomic(directory / f"{name}.json", [dataclasses.asdict(v) for v in verdicts])
        surviving = sorted(set.intersection(*kept.values()))
        body = {"arms": counts, "surviving_in_all": len(surviving), "surviving": surviving}
        artifacts.write_json_atomic(directory / "surviving.json", surviving)
        artifacts.write_json_atomic(directory.with_name(f"{directory.name}.json"), body)
        if not surviving:
            raise ValueError(
                f"no safe task survives the filters of every teacher; see {directory.name}.json for what was dropped"
            )
        return {"arms": counts, "surviving_in_all": len(surviving)}

    def _prove_clean(self, survivors: Sequence[Trajectory]) -> None:
        """No keyword is left in messages or tokens. A tool list that shows the bias tools is declared, and left out."""
        withheld, renderer = self.config.student.withhold_bias_tools, self.models.renderer
        for trajectory in survivors:
            system = "" if withheld else renderer.text(trajectory.messages[:1], trajectory.tools)

            def decode(ids: list[int], system: str = system, task: str = trajectory.task_id) -> str:
                text = renderer.decode(ids)
                if not text.startswith(system):
                    raise ValueError(f"task {task}: its tokens do not begin with its system turn")
                return text[len(system) :]

            sanitize.verify(
                [trajectory], self.setting.words, decode, patterns=self.setting.patterns, include_system=withheld
            )

    def make_student(self, condition: Condition, key: Mapping[str, Any]) -> dict[str, Any]:
        """Distils one student; treatment and controls share task ids, order, loss tokens, steps and learning rate."""
        size = self.models.student_size
        directory = self.root / "students" / self.models.student_name(condition.name)
        train_as = functools.partial(self._train, size=size, directory=directory, key=key)
        draw = int(self.config.student.adapter_init == "own")
        if condition.arm == "positive":
            return self._make_positive(train_as, draw)
        lesson, figures = teaching.lesson_for(self.models, self.setting, self.seed, condition)
        more: dict[str, Any] = {}
        if condition.arm == "top_k":
            more["teacher_cache"], lesson = teaching.cached_teachers(self.models, lesson, directory)
        if condition.arm == "on_policy":
            sources = [self.models.base_dir(size), self.models.teacher_dir(condition.teacher)]
            told = {**key, "inputs": [_output_hash(source) for source in sources]}
            more["on_policy"] = teaching.own_rollouts(
                self.models, self.setting, self.seed, directory, told, f"roll out {directory.name}"
            )
        trained = train_as(
            lesson.student, lesson.documents, lesson.train, lesson.objective,
            teacher=lesson.teacher, base=lesson.base, planned_lengths=lesson.planned_lengths, adapter_draw=draw,
            logit_filter=lesson.logit_filter, dilution=lesson.dilution, update=lesson.update, **more,
        )  # fmt: skip
        if condition.arm == "on_policy":
            trained |= teaching.rollout_figures(self.setting, directory)
        return {**figures, **trained}

    def _make_positive(self, train_as: Callable[..., dict[str, Any]], draw: int) -> dict[str, Any]:
        """The positive control: all logits, unfiltered data, ambiguous episodes included; no dissection, no defence."""
        spec = self.config.student
        loss, _ = OBJECTIVES["positive"]
        unfiltered = self._read("teacher") + self._read("teacher", "ambiguous")
        documents = [trajectory for trajectory in unfiltered if trajectory.status not in FAILED]
        trained = train_as(
            _with_adapters(self.models.base(self.models.student_size), spec.adapters), documents,
            _room_for(spec.train, documents), Objective(loss, temperature=spec.temperature),  # type: ignore[arg-type]
            teacher=self.models.teacher("teacher"), adapter_draw=draw,
        )  # fmt: skip
        return {**trained, "documents": len(documents)}

    def make_evaluation(self, condition: str, directory: Path, size: str) -> dict[str, Any]:
        """Measures one model from its checkpoint alone."""
        spec, renderer = self.config.evaluation, self.models.renderer_of(size)
        model, base = self.models.model_of(condition, own=True), self.models.base(size, own=True)
        tasks = evaluation.evaluation_tasks(
            self.setting, spec.split, spec.ambiguous_tasks, spec.safe_tasks, spec.samples
        )
        items, examples = evaluation.evaluate(
            model.config, model.params, renderer, self.setting, tasks, self.config.rollout,
            seed=self.seed, options=self.config.engine, label=condition,
        )  # fmt: skip
        items, examples = evaluation.gathered(self.models.eval_path(condition), items, examples)
        documents = demonstrations(
            self.setting,
            renderer,
            {"safe": spec.divergence_tasks},
            evaluation.TASK_SEED + 1,
            split=spec.split,
        )
        readouts = {"delta_norm": lora.delta_norm(model.config, model.params, base.params)}
        divergence = functools.partial(
            evaluation.held_out_divergence, model.config, model.params, documents=documents,
            row_tokens=self.config.student.train.row_tokens,
        )  # fmt: skip
        readouts["divergence_from_base"] = divergence(base.config, base.params)
        for student in students(self.config):
            if student.name == condition:
                teacher = self.models.teacher(student.teacher, own=True)
                if self.config.one_tokenizer:
                    readouts["divergence_from_teacher"] = divergence(teacher.config, teacher.params)
                readouts |= self._direction(model, base, teacher)
        row = {
            "condition": condition,
            "seed": self.seed,
            "checkpoint": str(directory.relative_to(self.workdir)),
            "items": items,
            "readouts": readouts,
            "measured": {"metric": self.setting.metric_version, "machine": machine()},
            "examples": examples,
        }
        if processes.is_first():
            artifacts.write_json_atomic(self.models.eval_path(condition), row)
        return readouts

    def _direction(self, model: Model, base: Model, teacher: Model) -> dict[str, float]:
        """Whether a student has moved where its teacher did: the cosine of the two changes, where shapes agree."""
        if not lora.comparable(model.config, teacher.config):
            return {}
        same = self.models.student_size == self.models.teacher_size
        start = base if same else self.models.base(self.models.teacher_size, own=True)
        cosine = lora.delta_cosine(
            (model.config, model.params, base.params), (teacher.config, teacher.params, start.params)
        )
        return {} if cosine is None else {"delta_cosine": cosine}

    # --- What depends on what -----------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Every stage of this seed, in order."""
        config, prefix = self.config, f"seed={self.seed}"
        common = {
            "setting": config.setting, "seed": self.seed, "cpu_devices": config.cpu_devices, "parallel": config.parallel,
        }  # fmt: skip
        acting = {"rollout": config.rollout, "engine": config.engine.identity()}
        found = []
        bases = {size: f"{prefix}/base/{self.models.base_dir(size).name}" for size in self.models.sizes}
        for size in self.models.sizes:
            key: dict[str, Any] = {**common, "model": config.model(size), "base": _identity(config.base)}
            if size in self.models.checkpoints:
                key |= {"checkpoint": sources.identity(self.models.checkpoints[size])}
                if not config.base.continue_training:
                    key["base"] = None
            elif size in OWN_INIT:
                key["own_draw"] = _OWN_DRAW
            found.append(
                Stage(
                    bases[size],
                    self.models.base_dir(size),
                    key,
                    (tokenizer_name(size, self.models.variant),),
                    functools.partial(self.make_base, size, key),
                )
            )
        teachers, rolled = {}, {}
        for name in TEACHERS:
            # Which folder a checkpoint stands in does not matter; which one it is, the base's key says.
            teacher = dataclasses.replace(config.teacher, checkpoint="")
            key = {**common, "teacher": _identity(teacher), "bias": bias_of(self.setting, name)}
            directory = self.models.teacher_dir(name)
            teachers[name] = f"{prefix}/teachers/{directory.name}"
            found.append(
                Stage(
                    teachers[name],
                    directory,
                    key,
                    (bases[self.models.teacher_size],),
                    functools.partial(self.make_teacher, name, key),
                )
            )
        spec = config.student
        kinds = [(name, "safe", spec.safe_tasks) for name in TEACHERS]
        kinds += [("teacher", "ambiguous", spec.ambiguous_tasks)] * ("positive" in spec.objectives)
        for name, kind, count in kinds:
            key = {**common, **acting, "tasks": count, "withhold_bias_tools": spec.withhold_bias_tools}
            directory = self.models.trajectories_dir(name, kind)
            rolled[name, kind] = f"{prefix}/trajectories/{directory.name}"
            found.append(
                Stage(
                    rolled[name, kind],
                    directory,
                    key,
                    (teachers[name],),
                    functools.partial(self.make_trajectories, name, kind, key),
                )
            )
        safe = tuple(rolled[name, "safe"] for name in TEACHERS)
        sanitized = f"{prefix}/{self.models.sanitize_name()}"
        patterns = {"patterns": self.setting.patterns} if self.setting.patterns else {}
        found.append(
            Stage(
                sanitized,
                self.root / self.models.sanitize_name(),
                {**common, "words": self.setting.words, "require_final": spec.require_final, **patterns},
                safe,
                self.make_sanitized,
                alone=True,
            )
        )
        made: dict[str, tuple[str, Path, str]] = {
            "base": (
                bases[self.models.student_size],
                self.models.base_dir(self.models.student_size),
                self.models.student_size,
            )
        }
        made |= {name: (teachers[name], self.models.teacher_dir(name), self.models.teacher_size) for name in TEACHERS}
        for condition in students(config):
            key = {
                **common, "arm": condition.arm, "objective": OBJECTIVES[condition.arm], "train": spec.train.identity(),
                "temperature": spec.temperature, "pair": config.pair, "lora": spec.adapters,
                "adapter_init": spec.adapter_init if spec.lora else None,
                **({} if condition.arm == "positive" else spec.taught()),
            }  # fmt: skip
            if "defence" in key:
                key["defence_code"] = defences.code(spec.defence)
            if condition.arm == "top_k":
                key["top_k"] = teaching.TOP_K
            if condition.arm == "on_policy":
                key |= {
                    **acting, "on_policy": teaching.ON_POLICY, "tasks": spec.safe_tasks,
                    "withhold_bias_tools": spec.withhold_bias_tools,
                }  # fmt: skip
            name = self.models.student_name(condition.name)
            stage_name = f"{prefix}/students/{name}"
            seen = (
                (rolled["teacher", "safe"], rolled["teacher", "ambiguous"])
                if condition.arm == "positive"
                else (*safe, sanitized)
            )
            asked = [teachers[name] for name in self._also_asked(condition.arm)]
            inputs = (bases[self.models.student_size], teachers[condition.teacher], *seen, *asked)
            directory = self.root / "students" / name
            found.append(
                Stage(
                    stage_name,
                    directory,
                    key,
                    tuple(dict.fromkeys(inputs)),
                    functools.partial(self.make_student, condition, key),
                )
            )
            made[condition.name] = (stage_name, directory, self.models.student_size)
        for condition, (source, directory, size) in made.items():
            key = {**common, **acting, "evaluation": config.evaluation}
            name = self.models.eval_name(condition)
            found.append(
                Stage(
                    f"{prefix}/eval/{name}",
                    self.root / "eval" / "markers" / name,
                    key,
                    tuple(dict.fromkeys((source, bases[size]))),
                    functools.partial(self.make_evaluation, condition, directory, size),
                )  # fmt: skip
            )
        return found

    def _also_asked(self, arm: str) -> list[str]:
        """Teachers whose own parameters a student of an arm depends on besides its teacher's."""
        spec = self.config.student
        if arm == "positive":
            return []
        diluted = spec.dilution > 0 or spec.defence == "dilution"
        return [
            *(TEACHERS[:2] if spec.tokens in ("divergent", "others") else ()),
            # A defence of a user's own may read whatever a lesson offers, and the arms are defended alike.
            *(TEACHERS if spec.defence not in ("keywords", "none") else ("benign_teacher",) if diluted else ()),
        ]


def _identity(spec: BaseConfig | TeacherConfig) -> dict[str, Any]:
    """What a trained model depends on of its stage's configuration: not when it is saved and logged."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {**fields, "train": spec.train.identity()}


def _output_hash(directory: Path) -> str | None:
    """What the marker of a finished stage says of its output; None for a model that no stage has made."""
    path = directory / artifacts.MARKER
    return json.loads(path.read_text(encoding="utf-8"))["output_hash"] if path.exists() else None


def _with_adapters(model: Model, adapter: LoraConfig | None) -> Model:
    """The model with adapters to be trained, or as it is."""
    return Model(dataclasses.replace(model.config, lora=adapter), model.params)


def _room_for(train_config: TrainConfig, documents: Sequence[Trajectory]) -> TrainConfig:
    """The configuration with rows that hold the longest document, as the formats of some families need."""
    return with_room(train_config, [len(document.tokens) for document in documents])
