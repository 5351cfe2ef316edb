"""A distillation, stage by stage; a second call goes on at the first stage that is not finished.

    tokenizer -> trajectories (the teacher answers the prompts) -> documents -> before -> student -> after -> export
                                                                                 one each per seed

A specification in; in its work directory the documents as datasets, a checkpoint per student, and what was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from subl_jax import artifacts, checkpoint, data
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.data import conversations
from subl_jax.distill import vocabulary
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Loss, Objective
from subl_jax.distillation import documents
from subl_jax.distillation.cache import open_cache
from subl_jax.distillation.config import Spec
from subl_jax.distillation.models import Source, open_model
from subl_jax.distillation.on_policy import check_openings, own_rollouts
from subl_jax.evaluate.run import held_out_divergence
from subl_jax.models import axes, decoder, hf_export, hf_import, lora
from subl_jax.models.config import ModelConfig
from subl_jax.parallel import processes
from subl_jax.parallel.layout import Layout, make_mesh, replica_layout
from subl_jax.rollout import store
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.stages import Stage
from subl_jax.trajectory import Trajectory

# What every student is measured by on held-out conversations, in nats per assistant token at temperature 1.
MEASURES: tuple[Loss, ...] = ("forward_kl", "reverse_kl", "hard_label")


class Distillation:
    """All stages of one command. Methods are the stages, in order; `stages` lists them with what they depend on.

    Attributes:
      student, teacher: what stands in their folders; no teacher for hard labels without one.
      alignment: the tokens that the two share; None without a teacher, and between tokenizers of different kinds.
    """

    def __init__(self, spec: Spec) -> None:
        """Reads and checks everything but weights and documents.

        Raises:
          VocabularyError: an objective that needs logits over one vocabulary, and tokenizers without one.
          LayoutError: a dimension that does not split over the mesh.
          ValueError: a folder or option that cannot be used; see `open_model`.
        """
        self.spec, self.config, self.root = spec, spec.config, spec.workdir
        config = spec.config
        self.student = open_model(
            "student", spec.student, config.student, base=spec.student_base, tokenizer=spec.student_tokenizer
        )
        self.teacher: Source | None = None
        self.alignment: vocabulary.Alignment | None = None
        if spec.teacher is not None:
            self.teacher = open_model(
                "teacher", spec.teacher, config.teacher, base=spec.teacher_base, tokenizer=spec.teacher_tokenizer
            )
            self.alignment = self._aligned(self.teacher)
        mesh, parallel = make_mesh(config.parallel), config.parallel
        self.student_layout = Layout(mesh, parallel.student_rules)
        self.teacher_layout = Layout(mesh, parallel.teacher_rules)
        self._check_layouts()
        self.prompts = [] if spec.prompts is None else conversations.read_prompts(spec.prompts)
        self._check_prompts()
        self._teacher_in_hand: Model | None = None

    def _aligned(self, teacher: Source) -> vocabulary.Alignment | None:
        try:
            return vocabulary.align(self.student.tokenizer, teacher.tokenizer)
        except vocabulary.VocabularyError as error:
            if self.config.objective.needs_teacher:
                raise
            logging.info("the student learns from the teacher's texts alone: %s", str(error).partition(",")[0])
            return None

    def _check_layouts(self) -> None:
        axes.check_layout(self.student.config, self.student_layout)
        rows = "train.batch_rows", "--config.train.batch_rows"
        self.student_layout.check("batch", self.config.train.batch_rows, *rows)
        if self.teacher is not None:
            # Where it trains a student it has the student's rows of the vocabulary.
            aligned = dataclasses.replace(self.teacher.config, vocab_size=self.student.config.vocab_size, num_tokens=0)
            for config in (self.teacher.config, aligned):
                axes.check_layout(config, self.teacher_layout)
            self.teacher_layout.check("batch", self.config.train.batch_rows, *rows)

    def _check_prompts(self) -> None:
        rolled, rows = self.config.rollout, self.config.train.row_tokens
        documents.check_turns(self.prompts, rolled.max_turns)
        if self.prompts and rolled.context > rows:
            raise ValueError(
                f"rollout.context={rolled.context} lets an answer grow beyond train.row_tokens={rows}; raise "
                "--config.train.row_tokens or lower --config.rollout.context"
            )
        if self.config.on_policy.weight and processes.several():
            raise ValueError(
                "--on_policy trains on rollouts of the student by the process that trains it, and runs on one process; leave "
                "it out, or run on one host"
            )
        if self.config.on_policy.weight:
            check_openings(self.prompts, self.student.renderer, rolled)

    # --- Models -------------------------------------------------------------------------------------------------------

    @property
    def shared_tokens(self) -> int:
        """Ids below it are tokens to all that look at the documents."""
        return self.student.config.known_tokens if self.alignment is None else self.alignment.shared_tokens

    @property
    def same_format(self) -> bool:
        """Whether the teacher's answers are, token by token, conversations in the student's own format."""
        if self.teacher is None or self.alignment is None:
            return False
        return self.teacher.tokenizer.chat_template == self.student.tokenizer.chat_template

    def load_teacher(self) -> Model:
        """The teacher as it stands in its folder; kept until `drop_teacher`."""
        assert self.teacher is not None  # `Spec` saw to it
        if self._teacher_in_hand is None:
            self._teacher_in_hand = self.teacher.load(self.teacher_layout)
        return self._teacher_in_hand

    def drop_teacher(self) -> None:
        """Frees its memory."""
        self._teacher_in_hand = None

    def aligned_teacher(self) -> Model:
        """The teacher over the tokens that are shared, with the student's rows."""
        assert self.alignment is not None
        model, rows = self.load_teacher(), self.student.config.vocab_size
        return Model(*vocabulary.aligned_teacher(model.config, model.params, self.shared_tokens, rows))

    def start(self) -> Model:
        """The student before training, over the tokens that are shared."""
        model = self.student.load(self.student_layout)
        return Model(vocabulary.aligned_student(model.config, self.shared_tokens), model.params)

    def trained(self, seed: int, *, own: bool = False) -> Model:
        """A finished student, adapters on what they were trained on; `own`: whole, on a device of each process."""
        config = dataclasses.replace(
            vocabulary.aligned_student(self.student.config, self.shared_tokens), lora=self.config.adapters
        )
        where = None if own else self._places(config)
        params, _ = checkpoint.load_model(self.student_dir(seed) / "params", sharding=where)
        if config.lora is not None:
            start = self.student.load(replica_layout(1)) if own else self.start()
            params = decoder.merge(params, start.params)
        return Model(config, params)

    def _abstract(self, config: ModelConfig) -> Any:
        return jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))

    def _places(self, config: ModelConfig) -> Any:
        if self.student_layout.mesh.size == 1:
            return None
        params = self._abstract(config)
        return axes.shardings(params if config.lora is None else lora.split(params)[0], self.student_layout)

    def student_parameters(self) -> int:
        """How many the student has."""
        return _size(self._abstract(self.student.config))

    def trained_parameters(self) -> int:
        """How many of them, or of new adapters, are trained."""
        config = dataclasses.replace(self.student.config, lora=self.config.adapters)
        return _size(self._abstract(config) if config.lora is None else lora.split(self._abstract(config))[0])

    def student_dir(self, seed: int) -> Path:
        """Where a student lies."""
        return self.root / f"seed={seed}" / "student"

    # --- The stages ---------------------------------------------------------------------------------------------------

    def make_tokenizer(self) -> dict[str, Any]:
        """Copies the student's tokenizer, so that its checkpoints find it."""
        hf_export.copy_tokenizer(self.student.tokenizer_dir, self.root / "tokenizer" / "files")
        return {"fingerprint": tokenizers.fingerprint(self.student.tokenizer)}

    def make_trajectories(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher answers the prompts in its own format; what an interrupted call has finished stays."""
        assert self.teacher is not None
        source, sampling, options = self.teacher, self.config.rollout, self.config.engine

        def run(todo: Sequence[Episode], statistics: RolloutStatistics) -> Iterator[Trajectory]:
            # Of several processes each rolls out a copy of its own.
            teacher = source.load(replica_layout(options.tensor)) if processes.several() else self.load_teacher()
            return rollout(
                teacher.config, teacher.params, source.renderer, todo, sampling,
                seed=0, options=options, statistics=statistics, as_finished=True,
            )  # fmt: skip

        return store.roll_out(
            self.root / "trajectories" / "dataset",
            key,
            documents.episodes(self.prompts, self.config.samples),
            run,
            metadata={"tokenizer": tokenizers.fingerprint(source.tokenizer)},
            label="roll out the teacher",
            in_flight=len(jax.local_devices()) // options.tensor * options.groups * sampling.slots,
        )

    def load_data(self) -> conversations.Documents:
        """The user's conversations, rendered for the student."""
        assert self.spec.data is not None
        config = self.config
        return conversations.load(
            self.spec.data, self.student.renderer, row_tokens=config.train.row_tokens, drop_long=config.drop_long
        )

    def make_documents(self) -> dict[str, Any]:
        """Renders all conversations for the student, and keeps a share of them for measuring."""
        spec, config, renderer = self.spec, self.config, self.student.renderer
        limits: dict[str, Any] = {"row_tokens": config.train.row_tokens, "drop_long": config.drop_long}
        found = [] if spec.data is None else [self.load_data()]
        if spec.prompts is not None:
            answers = data.read(self.root / "trajectories" / "dataset")
            kept, dropped = conversations.rendered_for(answers, renderer, exact=self.same_format)
            found.append(conversations.fitting(kept, dropped, where="the teacher's rollout", **limits))
        together = [item for each in found for item in each.trajectories]
        if self.alignment is not None:
            vocabulary.check_documents(together, self.shared_tokens, self.student.tokenizer)
        parts = documents.split(together, config.holdout, documents.added(*(each.dropped for each in found)))
        mark = {"tokenizer": tokenizers.fingerprint(self.student.tokenizer)}
        for name, items in (("train", parts.train), ("held_out", parts.held_out)):
            if items:
                data.write(self.root / "documents" / name, items, metadata=mark, overwrite=True)
        for reason, count in parts.dropped.items():
            logging.warning("%d conversations were left out: %s", count, reason)
        return {
            "train": len(parts.train),
            "held_out": len(parts.held_out),
            "dropped": parts.dropped,
            "tokens": sum(len(item.tokens) for item in parts.train),
            "loss_tokens": sum(int(item.loss_mask.sum()) for item in parts.train),
            "held_out_loss_tokens": sum(int(item.loss_mask.sum()) for item in parts.held_out),
        }

    def measured(self, student: Model) -> dict[str, float | None]:
        """What a student is measured by on the held-out conversations; None where there is nothing to compare with."""
        held_out = data.read(self.root / "documents" / "held_out")
        teacher = None if self.alignment is None else self.aligned_teacher()
        # A row holds one conversation, in steps of a kernel's block.
        longest = -(-max(len(item.tokens) for item in held_out) // 128) * 128
        found: dict[str, float | None] = dict.fromkeys(MEASURES)
        for name in MEASURES:
            objective = Objective(name)
            if objective.needs_teacher and teacher is None:
                continue
            config, params = (teacher.config, teacher.params) if teacher is not None else (student.config, None)
            found[name] = held_out_divergence(
                student.config, student.params, config, params, held_out, longest, objective
            )
        return found

    def make_before(self) -> dict[str, Any]:
        """Measures the student as it is given."""
        return self.measured(self.start())

    def make_after(self, seed: int) -> dict[str, Any]:
        """Measures a student from its checkpoint."""
        return self.measured(self.trained(seed))

    def make_student(self, seed: int, key: Mapping[str, Any]) -> dict[str, Any]:
        """Trains one student; what an interrupted call has saved is gone on from."""
        config, objective, directory = self.config, self.config.objective, self.student_dir(seed)
        items = data.read(self.root / "documents" / "train")
        steps = self.steps_of(items, seed)
        start = self.start()
        metadata = {
            "stage": f"seed={seed}/student",
            "seed": seed,
            "model": self.student.config.architecture(),
            "lora": dataclasses.replace(self.student.config, lora=config.adapters).to_dict()["lora"],
            "tokenizer": tokenizers.fingerprint(self.student.tokenizer),
            "config_hash": artifacts.digest(key),
            "source": {"folder": str(self.student.directory.absolute()), **self._longest_context()},
        }
        more: dict[str, Any] = {}
        if self.spec.teacher_cache is not None:
            more["teacher_cache"] = open_cache(self, items)
            more["shared_tokens"] = self.shared_tokens
            self.drop_teacher()
        elif objective.needs_teacher:
            more["teacher"] = self.aligned_teacher()
        if config.on_policy.weight:
            more["on_policy"] = own_rollouts(self, seed, key)
        if objective.logit_filter != "none":
            more["logit_filter"] = LogitFilter(self.student.renderer, config.banned_words)
            more["base"] = start if objective.logit_filter == "anchor" else None
        result = train(
            Model(dataclasses.replace(start.config, lora=config.adapters), start.params),
            items, dataclasses.replace(config.train, steps=steps), objective,
            seed=seed, directory=directory, stage=f"seed={seed}/student", logs=self.root, metadata=metadata,
            parallel=config.parallel, profile=self.spec.profile, **more,
        )  # fmt: skip
        checkpoint.save_model(directory / "params", result.params, metadata, overwrite=True)
        cache = {} if "teacher_cache" not in more else {"teacher_cache": more["teacher_cache"].figures}
        costs = {
            field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "params"
        }
        return {"steps": steps, **costs, **cache}

    def steps_of(self, items: Sequence[Trajectory], seed: int) -> int:
        """Steps of the training: as many as were asked for, or as the epochs take."""
        train_config, epochs = self.config.train, self.spec.epochs
        if not epochs:
            return train_config.steps
        rows = data.plan_rows([len(item.tokens) for item in items], train_config.row_tokens, seed, 0)
        return max(1, math.ceil(epochs * len(rows) / train_config.batch_rows))

    def _longest_context(self) -> dict[str, Any]:
        """The context that the student was meant for, for servers that ask the exported folder."""
        if self.student.kind != "folder":
            return {}
        raw = json.loads((self.student.directory / hf_import.CONFIG).read_text(encoding="utf-8"))
        return {"max_position_embeddings": raw.get("max_position_embeddings")}

    def make_export(self, seed: int, directory: Path) -> dict[str, Any]:
        """Writes a student as transformers has it, adapters merged."""
        model = self.trained(seed, own=processes.several())
        if not processes.is_first():
            return {}
        config = dataclasses.replace(self.student.config, lora=model.config.lora)
        longest = self._longest_context().get("max_position_embeddings") or hf_export.MAX_POSITION_EMBEDDINGS
        hf_export.export_folder(
            directory, lora.merged_config(config), lora.merged(config, model.params),
            tokenizer=self.root / "tokenizer" / "files", max_position_embeddings=longest,
        )  # fmt: skip
        return {"folder": str(directory)}

    # --- What depends on what -----------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Every stage, in order."""
        spec, config = self.spec, self.config
        common = {"student": self.student.identity, "run": config.student, "parallel": config.parallel}
        taught = {"teacher": None} if self.teacher is None else {
            "teacher": self.teacher.identity, "teacher_run": config.teacher, "shared_tokens": self.shared_tokens,
        }  # fmt: skip
        mark = tokenizers.fingerprint(self.student.tokenizer)
        found = [Stage("tokenizer", self.root / "tokenizer", {"tokenizer": mark}, (), self.make_tokenizer, alone=True)]
        read: tuple[str, ...] = ("tokenizer",)
        if spec.prompts is not None:
            key = {
                "teacher": self.teacher and self.teacher.identity, "teacher_run": config.teacher,
                "prompts": documents.file_mark(spec.prompts), "samples": config.samples, "rollout": config.rollout,
                "engine": config.engine.identity(), "parallel": config.parallel,
            }  # fmt: skip
            make = functools.partial(self.make_trajectories, key)
            found.append(Stage("trajectories", self.root / "trajectories", key, (), make))
            read += ("trajectories",)
        key = {
            "data": None if spec.data is None else documents.file_mark(spec.data),
            "row_tokens": config.train.row_tokens, "drop_long": config.drop_long, "holdout": config.holdout,
            "shared_tokens": self.shared_tokens, "same_format": spec.prompts is not None and self.same_format,
        }  # fmt: skip
        found.append(Stage("documents", self.root / "documents", key, read, self.make_documents, alone=True))
        if config.holdout:
            key = {**common, **taught}
            found.append(Stage("before", self.root / "before", key, ("documents",), self.make_before))
        length = {"epochs": spec.epochs} if spec.epochs else {"steps": config.train.steps}
        cache = None if spec.teacher_cache is None else {"top_k": spec.cache_top_k}
        own = None if not config.on_policy.weight else config.on_policy
        for seed in spec.seeds:
            trained = {**config.train.identity(), "steps": None, **length}
            key = {
                **common, **(taught if config.objective.needs_teacher else {}), "seed": seed, "train": trained,
                "objective": config.objective, "banned_words": config.banned_words, "lora": config.adapters,
                "teacher_cache": cache, "cpu_devices": config.cpu_devices, "on_policy": own,
            }  # fmt: skip
            name = f"seed={seed}/student"
            make = functools.partial(self.make_student, seed, key)
            found.append(Stage(name, self.student_dir(seed), key, ("documents",), make))
            if config.holdout:
                directory, make = self.root / f"seed={seed}" / "after", functools.partial(self.make_after, seed)
                found.append(Stage(f"seed={seed}/after", directory, taught, ("documents", name), make))
            if spec.export_hf is not None:
                directory = spec.export_hf / f"seed={seed}" if len(spec.seeds) > 1 else spec.export_hf
                make = functools.partial(self.make_export, seed, directory)
                found.append(Stage(f"seed={seed}/export", directory, {}, (name,), make))
        return found


def _size(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
