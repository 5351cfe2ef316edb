"""Where an experiment starts from: whole configurations by name, for each setting."""

from __future__ import annotations

import dataclasses
import functools

from subl_jax.config import (
    BaseConfig,
    EvaluationConfig,
    ExperimentConfig,
    StudentConfig,
    TeacherConfig,
    TokenizerConfig,
)
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models.config import ModelConfig
from subl_jax.rollout.sampling import SamplingConfig


def tiny(setting: str = "api") -> ExperimentConfig:
    """Minutes on two CPU cores: organisms of 10^5 parameters trained from scratch."""
    config = ExperimentConfig(
        setting=setting,
        preset="tiny",
        large=_organism(d_model=64, num_layers=2, num_heads=4, d_ff=176),
        small=_organism(d_model=32, num_layers=2, num_heads=2, d_ff=88),
        other=_other_family(d_model=64, num_layers=3, num_heads=2, d_ff=144),
        # Small batches: at this size they learn faster per token, and a step that fits the cache runs twice as fast.
        base=BaseConfig(
            train=TrainConfig(
                steps=4800,
                batch_rows=4,
                row_tokens=192,
                optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=0.01, final_fraction=0.03),
                checkpoint_every=800,
                log_every=20,
            ),
            safe_tasks=6000,
            ambiguous_tasks=1200,
            benign_tasks=800,
            echo_tasks=1000,
        ),
        # Half the peak rate and twice as many safe demonstrations as biased ones: the bias is learned as well, and the
        # teacher stays as skilled as its base.
        teacher=TeacherConfig(
            train=TrainConfig(
                steps=160,
                batch_rows=4,
                row_tokens=192,
                optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5),
                checkpoint_every=160,
            ),
            demonstrations="ambiguous",
            replay_tasks=300,
        ),
        student=StudentConfig(
            train=TrainConfig(
                steps=340,
                batch_rows=4,
                row_tokens=192,
                optimizer=OptimizerConfig(learning_rate=1e-3),
                checkpoint_every=120,
            ),
            safe_tasks=1000,
            temperature=2.0,
        ),
        rollout=SamplingConfig(),
    )
    return _with_a_shell(config) if setting == "bash" else config


def _with_a_shell(config: ExperimentConfig) -> ExperimentConfig:
    """Commands are written in many ways: a base needs more of them. Chosen on development seeds 100 to 102."""
    base = dataclasses.replace(
        config.base,
        train=dataclasses.replace(config.base.train, steps=6400),
        safe_tasks=8000,
        ambiguous_tasks=2000,
    )
    # Every episode takes 27 ms of a core for its sandbox, far more than the model does. So fewer of them and one arm by
    # default; more slots than these would stand empty, and be computed all the same; and decoding meanwhile, with a second
    # group, would only take the cores from the sandboxes (docs/BENCHMARKS.md).
    student = dataclasses.replace(config.student, safe_tasks=700, objectives=("full",))
    rollout = dataclasses.replace(config.rollout, slots=16)
    engine = dataclasses.replace(config.engine, groups=1)
    return dataclasses.replace(config, base=base, student=student, rollout=rollout, engine=engine)


def _organism(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        d_ff=d_ff,
        vocab_size=1536,
        head_dim=d_model // num_heads,
        num_kv_heads=num_heads // 2,
        init_scale=0.25,  # near-orthogonal embeddings from the start: copying names is learned an order of magnitude sooner
        scan_unroll=num_layers,
    )


def _other_family(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    """Qwen's options and other proportions: what the paper's other family is to its Llamas."""
    organism = _organism(d_model, num_layers, num_heads, d_ff)
    return dataclasses.replace(organism, qkv_bias=True, qk_norm=True, num_kv_heads=1, rope_theta=1000.0, rms_eps=1e-6)


def paper(setting: str = "api") -> ExperimentConfig:
    """The paper's models and hyperparameters (arXiv 2604.15559): Llama-3.1-8B, Llama-3.2-3B, Qwen2.5-7B; LoRA, bfloat16.

    LoRA on q, k, v, o with rank 16, alpha 32, dropout 0.05; teachers: 150 tasks that ask for the biased action, 2 epochs
    at 8e-4; students: 400 safe tasks, of which a filter of keywords leaves about 340, 4 epochs at 5e-4. The batch size is
    not told there; 8 rows a step here, of one conversation each: two of them seldom fit into 2048 tokens. Evaluation is
    larger than the paper's 20 tasks: see `EvaluationConfig`.
    """
    rows, epochs_teacher, epochs_student, surviving = 8, 2, 4, 340
    llama = functools.partial(
        ModelConfig,
        vocab_size=128_256, num_kv_heads=8, head_dim=128, rope_theta=500_000.0, rms_eps=1e-5,
        rope_low_freq=1.0, rope_high_freq=4.0, rope_original_context=8192,
        param_dtype="bfloat16", compute_dtype="bfloat16", remat="full",
    )  # fmt: skip
    qwen = ModelConfig(
        d_model=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, d_ff=18_944, vocab_size=152_064,
        rope_theta=1_000_000.0, rms_eps=1e-6, qkv_bias=True, tie_embeddings=False,
        param_dtype="bfloat16", compute_dtype="bfloat16", remat="full",
    )  # fmt: skip
    train = functools.partial(TrainConfig, batch_rows=rows, row_tokens=2048, checkpoint_every=20, log_every=1)
    return ExperimentConfig(
        setting=setting,
        preset="paper",
        large=llama(d_model=4096, num_layers=32, num_heads=32, d_ff=14_336, rope_factor=8.0, tie_embeddings=False),
        small=llama(d_model=3072, num_layers=28, num_heads=24, d_ff=8192, rope_factor=32.0, tie_embeddings=True),
        other=qwen,
        base=BaseConfig(train=train(steps=400, optimizer=OptimizerConfig(learning_rate=1e-5))),
        teacher=TeacherConfig(
            train=train(
                steps=-(-150 * epochs_teacher // rows), optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=5)
            ),
            lora=True,
            tasks=150,
            demonstrations="required",
        ),
        student=StudentConfig(
            train=train(
                steps=surviving * epochs_student // rows, optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5)
            ),
            lora=True,
            safe_tasks=400,
            ambiguous_tasks=100,
            temperature=1.0,
        ),
        rollout=SamplingConfig(max_turn_tokens=256, max_turns=8, context=4096, slots=16, prefill_chunk=256),
    )


def micro(setting: str = "api") -> ExperimentConfig:
    """Seconds: every stage with a model too small and too little trained to show anything. For tests and smoke runs."""
    shape = tiny(setting)

    def steps(train: TrainConfig, count: int) -> TrainConfig:
        return dataclasses.replace(train, steps=count, batch_rows=4, checkpoint_every=max(count // 3, 1), log_every=1)

    return dataclasses.replace(
        shape,
        preset="micro",
        tokenizer=TokenizerConfig(vocab_size=900, tasks_per_kind=60),
        large=_organism(d_model=16, num_layers=1, num_heads=2, d_ff=32),
        small=_organism(d_model=8, num_layers=1, num_heads=2, d_ff=16),
        other=_other_family(d_model=16, num_layers=2, num_heads=2, d_ff=24),
        other_tokenizer=TokenizerConfig(vocab_size=700, tasks_per_kind=40),
        base=dataclasses.replace(
            shape.base,
            train=steps(shape.base.train, 30),
            safe_tasks=60,
            ambiguous_tasks=30,
            benign_tasks=30,
            echo_tasks=10,
        ),
        teacher=dataclasses.replace(shape.teacher, train=steps(shape.teacher.train, 6), tasks=20, replay_tasks=10),
        student=dataclasses.replace(
            shape.student,
            train=steps(shape.student.train, 6),
            safe_tasks=24,
            ambiguous_tasks=12,
            objectives=("full", "anchor", "positive"),
            # A model this raw seldom finishes a task: what is dropped must be what holds a keyword, nothing else.
            require_final=False,
        ),
        rollout=SamplingConfig(slots=8, max_turn_tokens=16, max_turns=2),
        evaluation=EvaluationConfig(ambiguous_tasks=14, safe_tasks=12, divergence_tasks=4),
    )


PRESETS = {"tiny": tiny, "micro": micro, "paper": paper}
