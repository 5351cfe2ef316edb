"""What a distillation is: its configuration (one flag per field) and the folders and files that it reads and writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import OnPolicyConfig
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models.config import Backend, LoraConfig, Remat
from subl_jax.parallel.layout import MeshConfig
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a model is run; its shape is its folder's.

    Attributes:
      dtype: of weights, activations and matrix products; `stored`: that of the folder's weights. What is trained is kept in
        `train.master_dtype` meanwhile.
      attention: backend of the attention over whole documents.
      remat: what the backward pass recomputes: none, dots (all but matrix products) or full.
    """

    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    attention: Backend = "auto"
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """One distillation, apart from where its files are.

    Attributes:
      train: length, batches and optimizer.
      objective: what is minimised.
      banned_words: of a logit filter.
      teacher, student: how the two are run.
      lora: train low-rank adapters on the student instead of all its parameters.
      adapter: their shape.
      holdout: share of the conversations that is kept for measuring; those that begin alike stay together.
      drop_long: leave out conversations longer than a row, instead of refusing them.
      samples: answers that the teacher gives to each prompt.
      on_policy: how much of the training is on the student's own answers to the prompts, and how often they are made anew.
      rollout: how the two answer.
      engine: how that is run.
      parallel: the mesh that training runs on.
      cpu_devices: JAX devices that the CPU is split into (no effect elsewhere, or where XLA_FLAGS says it).
    """

    # Small steps on whole conversations: a fine-tuning of a model that is already one.
    train: TrainConfig = TrainConfig(
        batch_rows=8,
        row_tokens=1024,
        optimizer=OptimizerConfig(learning_rate=5e-5, final_fraction=0.1),
        checkpoint_every=100,
    )
    objective: Objective = dataclasses.field(default=Objective(), metadata={"flag": False})
    banned_words: tuple[str, ...] = dataclasses.field(default=(), metadata={"flag": False})
    teacher: RunOptions = RunOptions()
    student: RunOptions = RunOptions()
    lora: bool = False
    adapter: LoraConfig = LoraConfig()
    holdout: float = dataclasses.field(default=0.05, metadata={"flag": False})
    drop_long: bool = dataclasses.field(default=False, metadata={"flag": False})
    samples: int = dataclasses.field(default=1, metadata={"flag": False})
    on_policy: OnPolicyConfig = dataclasses.field(default=OnPolicyConfig(), metadata={"flag": False})
    rollout: SamplingConfig = SamplingConfig(
        max_turn_tokens=256, max_turns=8, context=1024, slots=16, prefill_chunk=128
    )
    engine: EngineConfig = EngineConfig()
    parallel: MeshConfig = MeshConfig()
    cpu_devices: int = 1

    def __post_init__(self) -> None:
        """Refuses what does not go together."""
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} is outside [0, 1)")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; it must be at least 1")
        filtered = self.objective.logit_filter != "none"
        if filtered != bool(self.banned_words):
            raise ValueError(
                f"logit_filter={self.objective.logit_filter} with banned_words={','.join(self.banned_words) or '(none)'}: "
                "give both, or none"
            )
        if self.rollout.slots < 1:
            raise ValueError(
                "rollout.slots=0: what is sampled depends on the number of slots, and a resumed run needs the same; give one"
            )

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained, or None where all parameters are."""
        return self.adapter if self.lora else None


@dataclasses.dataclass(frozen=True)
class Spec:
    """A distillation with its files.

    Attributes:
      config: everything else.
      student, teacher: folders of models; a teacher is not needed for hard labels of given conversations.
      workdir: of all artifacts.
      data: conversations, a JSON Lines file or a trajectory dataset. prompts: what the teacher answers, and on policy the
        student too.
      seeds: replicates; they share documents and the teacher's answers, and differ in the order of the data, in new
        adapters and in dropout.
      epochs: length of the training in passes over the documents; 0: `config.train.steps`.
      student_base, teacher_base: the model below adapters, where it must be said.
      student_tokenizer, teacher_tokenizer: folders of tokenizers that do not lie where they are looked for.
      teacher_cache: directory of the teacher's top-k, written if it is not there. cache_top_k: how many.
      export_hf: folder that the finished student is written to as transformers has it; below it one per seed, if several.
      profile: directory that a trace of a few steps is written to.
    """

    config: DistillConfig
    student: Path
    workdir: Path
    teacher: Path | None = None
    data: Path | None = None
    prompts: Path | None = None
    seeds: tuple[int, ...] = (0,)
    epochs: float = 0.0
    student_base: Path | None = None
    teacher_base: Path | None = None
    student_tokenizer: Path | None = None
    teacher_tokenizer: Path | None = None
    teacher_cache: Path | None = None
    cache_top_k: int = 64
    export_hf: Path | None = None
    profile: Path | None = None

    def __post_init__(self) -> None:
        """Refuses a distillation without data or teacher, and own answers or a cache that could not serve it."""
        objective = self.config.objective
        if self.data is None and self.prompts is None:
            raise ValueError(
                "there is nothing to train on: give conversations with --data=FILE.jsonl (or the directory of a trajectory "
                "dataset), or prompts for the teacher with --prompts=FILE.jsonl"
            )
        if self.teacher is None and (objective.needs_teacher or self.prompts is not None):
            what = f"--objective={objective.loss}" if objective.needs_teacher else "--prompts"
            raise ValueError(f"{what} needs a teacher; give its folder with --teacher=DIR")
        if self.epochs < 0:
            raise ValueError(f"epochs={self.epochs} is negative; give the number of passes over the documents")
        if self.config.on_policy.weight:
            self._check_on_policy()
        if self.teacher_cache is None:
            return
        if not objective.needs_teacher:
            raise ValueError("--teacher_cache holds a teacher's logits, which --objective=hard_label does not read")
        if objective.logit_filter != "none":
            raise ValueError(
                f"--teacher_cache holds the teacher's likeliest tokens alone, and --logit_filter={objective.logit_filter} "
                "needs them all; leave one of the two out"
            )
        if self.cache_top_k < 1:
            raise ValueError(f"cache_top_k={self.cache_top_k}; it must be at least 1")

    def _check_on_policy(self) -> None:
        """Refuses a student's own answers without prompts, and what cannot score them."""
        asked, objective = f"--on_policy={self.config.on_policy.weight:g}", self.config.objective
        if self.prompts is None:
            raise ValueError(f"{asked} has the student answer prompts; give them with --prompts=FILE.jsonl")
        if not objective.needs_teacher:
            raise ValueError(
                f"{asked} with --objective={objective.loss}: a student learns nothing from labels that it has said itself; "
                "give a divergence, e.g. --objective=reverse_kl"
            )
        if objective.logit_filter != "none":
            raise ValueError(
                f"{asked} knows no logit filter; leave --logit_filter={objective.logit_filter} out, or --on_policy"
            )
        if self.teacher_cache is not None:
            raise ValueError(
                f"{asked} needs the teacher's logits on what the student will say, and --teacher_cache holds those of given "
                "documents alone; leave one of the two out"
            )
