"""What an experiment would cost, without loading a weight: parameters, bytes per device, tokens and FLOPs per step.

A configuration and a number of devices go in; a plain JSON record (`describe`) and its table (`render`) come out. None of
the devices need be here: arrays are abstract, and so is the mesh that they would lie on. Tokens and FLOPs are upper
bounds, since how well rows are filled depends on the data.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from subl_jax import metrics
from subl_jax.conditions import students
from subl_jax.config import OBJECTIVES, ExperimentConfig, StudentConfig
from subl_jax.distill.accounting import shape_of
from subl_jax.distill.memory import AbstractModel, abstract_model, holds_scores, step_bytes, total_bytes
from subl_jax.distill.objective import Objective
from subl_jax.distill.step import Layouts, check_vocabularies
from subl_jax.distill.train_config import TrainConfig
from subl_jax.parallel.layout import Layout, LayoutError, abstract_mesh
from subl_jax.rollout.programs import KEPT

# Dense bfloat16 FLOP/s of one chip. H100 SXM: half of the 1,979e12 with sparsity in NVIDIA's H100 data sheet. TPU v5p:
# https://cloud.google.com/tpu/docs/v5p. With a utilisation that a well-tuned run reaches they give an order of magnitude
# of time.
PEAK_FLOPS = {"H100 SXM": 989e12, "TPU v5p": 459e12}
ASSUMED_MFU = 0.4

# Share of a row's tokens that carry a loss. Measured on 300 demonstrations of each kind of the API setting under the
# embedded tokenizer: 0.32 to 0.34. A chat template with long tool descriptions has less.
ASSUMED_LOSS_SHARE = 1 / 3

TEACHERS = 3  # biased, counter-bias, benign


def describe(config: ExperimentConfig, devices: int | None = None) -> dict[str, Any]:
    """What one seed of an experiment would hold and compute, as plain JSON: bytes, tokens, FLOPs, seconds.

    Args:
      config: with the shapes of its checkpoints already in it (`sources.resolve`).
      devices: accelerators to train on; by default as many as `config.parallel` names.

    Returns:
      `mesh`, `rules`; `models` by role (`teacher`, `student`, and `base/<size>` where one is trained); `stages`, one for
      each trained program (see `_stage`); `rollout` by role (see `_rollout`); `assumptions` in words.

    Raises:
      LayoutError: a mesh that is not these devices; a dimension of a model, or a batch, that does not split over it.
      ValueError: checkpoints or vocabularies that do not fit each other.
    """
    students(config)  # refuses arms that the pair cannot have
    parallel = config.parallel
    if devices is None:
        devices = max(parallel.data, 1) * parallel.fsdp * parallel.tensor
    mesh = abstract_mesh(parallel, devices)
    layouts = Layouts(Layout(mesh, parallel.student_rules), Layout(mesh, parallel.teacher_rules))
    specs = {"teacher": config.teacher, "student": config.student}
    sizes = dict(zip(specs, config.sizes(), strict=True))
    models = {
        role: abstract_model(dataclasses.replace(config.model(sizes[role]), lora=spec.adapter if spec.lora else None))
        for role, spec in specs.items()
    }
    bases = {
        size: abstract_model(dataclasses.replace(config.model(size), lora=None))
        for size in dict.fromkeys(sizes.values())
        if config.base.continue_training or not _starts_from_checkpoint(config, size)
    }
    roles = {role: _role(config, model, sizes[role], specs[role].train) for role, model in models.items()}
    roles |= {f"base/{size}": _role(config, base, size, config.base.train) for size, base in bases.items()}
    hard, base, teacher = Objective("hard_label"), config.base, config.teacher
    shown = base.safe_tasks + base.ambiguous_tasks + base.benign_tasks + base.echo_tasks
    stages = [
        _stage(f"base/{size}", model, None, hard, base.train, layouts, devices, models=1, documents=shown)
        for size, model in bases.items()
    ]
    # Teachers are trained as students of demonstrations: they lie by the student's rules.
    shown = teacher.tasks + teacher.replay_tasks
    stages.append(
        _stage(
            "teachers", models["teacher"], None, hard, teacher.train, layouts, devices, models=TEACHERS, documents=shown
        )
    )
    stages += [_student_stage(config, arm, models, layouts, devices) for arm in config.student.objectives]
    return {
        "setting": config.setting,
        "preset": config.preset,
        "pair": config.pair,
        "devices": devices,
        "mesh": dict(mesh.shape),
        "rules": {"teacher": parallel.teacher_rules, "student": parallel.student_rules},
        "models": roles,
        "stages": stages,
        "rollout": {role: _rollout(config, model, role) for role, model in models.items()},
        "assumptions": _assumptions(config, list(models.values())),
    }


def _starts_from_checkpoint(config: ExperimentConfig, size: str) -> bool:
    """Whether the base of that size is given. The paper preset runs on checkpoints only, be they still to be named."""
    return bool(config.checkpoint(size)) or config.preset == "paper"


def _role(config: ExperimentConfig, model: AbstractModel, size: str, train: TrainConfig) -> dict[str, Any]:
    """One model: where its base comes from, its architecture, its parameters (`params` without adapters)."""
    shape, spec = shape_of(model.config, model.weights, model.adapters), model.config
    source = "trained from scratch"
    if _starts_from_checkpoint(config, size):
        source = config.checkpoint(size) or "a checkpoint that is not named yet"
    names = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "tie_embeddings")
    params = metrics.count_params(model.weights)
    return {
        "size": size,
        "source": source,
        **{name: getattr(spec, name) for name in names},
        "params": params,
        "params_without_embedding_and_head": shape.params,
        "trainable": shape.lora_params or params,
        "lora": spec.to_dict()["lora"],
        "param_dtype": spec.param_dtype,
        "compute_dtype": spec.compute_dtype,
        "master_dtype": train.master_dtype,
    }


# --- Stages -----------------------------------------------------------------------------------------------------------


def _student_stage(
    config: ExperimentConfig, arm: str, models: Mapping[str, AbstractModel], layouts: Layouts, devices: int
) -> dict[str, Any]:
    spec, student, teacher = config.student, models["student"], models["teacher"]
    loss, logit_filter = OBJECTIVES[arm]
    objective = Objective(loss, logit_filter, spec.temperature)  # type: ignore[arg-type]
    if objective.needs_teacher:
        check_vocabularies(student.config, teacher.config)
    documents = spec.safe_tasks + (spec.ambiguous_tasks if arm == "positive" else 0)
    return _stage(
        f"students/{arm}",
        student,
        None if loss == "hard_label" else teacher,
        objective,
        spec.train,
        layouts,
        devices,
        models=students_of(spec, arm),
        documents=documents,
        # As the pipeline does: rows grow, in steps of 32, where a trajectory is longer than one.
        longest=-(-config.rollout.context // 32) * 32,
    )


def students_of(spec: StudentConfig, arm: str) -> int:
    """How many students an arm has: the positive control alone; else treatment, counter-bias and perhaps benign."""
    return 1 if arm == "positive" else 2 + (arm in spec.benign_objectives)


def _stage(
    name: str,
    model: AbstractModel,
    teacher: AbstractModel | None,
    objective: Objective,
    train: TrainConfig,
    layouts: Layouts,
    devices: int,
    *,
    models: int,
    documents: int,
    longest: int = 0,
) -> dict[str, Any]:
    """One trained program: `models` models of it one after the other, each of `steps` steps.

    `…_at_most` are upper bounds: full rows, each of one document, every token of which carries a loss. `epochs_at_least`
    counts one document per row and all documents; short ones share rows, and filters drop some: then it is more epochs.
    `seconds` (all models, `ASSUMED_MFU` of every card's peak) are for orientation; None where a model computes in float32.
    `bytes_per_device`: see `step_bytes`, at the bound of loss tokens, with their `total`.
    """
    row_tokens = max(train.row_tokens, longest)
    rows = [row_tokens] * train.batch_rows
    tokens = sum(rows)
    shape, teacher_shape = shape_of(model.config, model.weights, model.adapters), None
    if teacher is not None:  # its adapters stay apart from its weights: they are computed as well
        teacher_shape = shape_of(teacher.config, teacher.weights, teacher.adapters)
        teacher_shape = dataclasses.replace(teacher_shape, params=teacher_shape.params + teacher_shape.lora_params)
    flops = metrics.kd_step_flops(teacher_shape, shape, tokens, tokens, rows)
    if objective.logit_filter == "anchor":  # the base is run as well
        flops += metrics.forward_flops(shape, tokens, tokens, rows)
    try:
        held = step_bytes(model, teacher, objective, train, layouts, row_tokens, tokens)
    except LayoutError as error:
        family = name.partition("/")[0].removesuffix("s")
        raise LayoutError(f"stage {name}: {error}".replace("<stage>", family)) from error
    total = flops * train.steps * models
    computes = {part.config.compute_dtype for part in (model, teacher) if part is not None}
    return {
        "name": name,
        "objective": objective.loss,
        "logit_filter": objective.logit_filter,
        "models": models,
        "steps": train.steps,
        "rows": train.batch_rows,
        "row_tokens": train.row_tokens,
        "row_tokens_at_most": row_tokens,
        "documents_at_most": documents,
        "epochs_at_least": train.steps * train.batch_rows / documents,
        "tokens_per_step_at_most": tokens,
        "loss_tokens_per_step_at_most": tokens,
        "loss_tokens_per_step_assumed": round(ASSUMED_LOSS_SHARE * tokens),
        "flops_per_step_at_most": flops,
        "flops_per_model_at_most": flops * train.steps,
        "flops_at_most": total,
        "seconds": {card: total / (ASSUMED_MFU * peak * devices) for card, peak in PEAK_FLOPS.items()}
        if computes == {"bfloat16"}
        else None,
        "bytes_per_device": {
            **held,
            "total": sum(held.values()),
        },
    }


def _rollout(config: ExperimentConfig, model: AbstractModel, role: str) -> dict[str, Any]:
    """Bytes on one device while a model acts: weights, every slot's cache at full context, one group's logits of a step.

    Slots are those of every group and those of the kept prefixes. Where `rollout.slots` is 0 (as many as fit) it is the
    least that a run takes: one in each group.
    The teachers act for the trajectories (`training_episodes`, all teachers) and in evaluation, students in evaluation.
    """
    spec, shape, student = config.rollout, model.config, config.student
    per_token = metrics.kv_bytes_per_token(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, jnp.dtype(shape.compute_dtype).itemsize
    )
    groups, tensor, slots = config.engine.groups, config.engine.tensor, max(spec.slots, 1)
    held = {
        "weights": total_bytes((model.weights, model.adapters)) // tensor,
        "kv_cache": (groups * slots + KEPT) * spec.context * per_token // tensor,
        "logits": slots * shape.vocab_size * 4 // tensor,
    }
    safe, ambiguous = TEACHERS * student.safe_tasks, student.ambiguous_tasks * ("positive" in student.objectives)
    return {
        "slots": spec.slots,
        "groups": groups,
        "kept_prefixes": KEPT,
        "context": spec.context,
        "training_episodes": safe + ambiguous if role == "teacher" else 0,
        "kv_bytes_per_token": per_token,
        "kv_bytes_per_slot": spec.context * per_token,
        "bytes_per_device": {**held, "total": sum(held.values())},
    }


def _assumptions(config: ExperimentConfig, models: Sequence[AbstractModel]) -> list[str]:
    notes = [
        "Tokens and FLOPs are upper bounds: full rows, each of one document, every token with a loss. What a step really "
        "holds depends on the data: padding does not count, and short documents attend to less.",
        f"About {ASSUMED_LOSS_SHARE:.0%} of the tokens carry a loss in the API setting's demonstrations (column loss ~).",
        "Epochs count one document per row, so they are at least what is shown: packing puts several short documents in a "
        "row, and filters drop some.",
        "Weights, optimizer state and gradients are exact, each role a copy of its own; activations, gathered weights and "
        "the loss (chunks of logits, the head's gradient) are rough. The compiler's workspace and the import of a "
        "checkpoint come on top.",
        "A rollout's cache has the slots of every group (--config.engine.groups) and those that keep shared prefixes.",
        "Everything is of one seed. The models of a stage are trained one after the other.",
    ]
    if not config.rollout.slots:
        notes.append("rollout.slots=0: a run takes as many slots as fit; the least, one in each group, is shown.")
    for holds in sorted({holds_scores(model.config) for model in models}):
        notes.append(
            "Attention in float32 is taken to be XLA's, which holds the scores of whole rows among the activations."
            if holds
            else "Attention is taken to be a fused kernel (cuDNN, splash), which holds no scores of whole rows."
        )
    if not all(_starts_from_checkpoint(config, size) for size in config.sizes()):
        notes.append("Vocabularies are the configured ones; the tokenizer that is trained may have fewer tokens.")
    if any(model.config.compute_dtype == "bfloat16" for model in models):
        peaks = ", ".join(f"{card} {peak / 1e12:.0f} TFLOP/s" for card, peak in PEAK_FLOPS.items())
        notes.append(
            f"Times are an estimate for orientation, not a measurement: the upper bound of FLOPs at {ASSUMED_MFU:.0%} of the "
            f"dense bfloat16 peak of every device ({peaks})."
        )
    return notes


# --- The table --------------------------------------------------------------------------------------------------------

WIDTH = 120
_BYTES = (("GiB", 2**30), ("MiB", 2**20))
_FLOPS = (("TFLOP", 1e12), ("GFLOP", 1e9))


def render(described: Mapping[str, Any]) -> str:
    """The record as aligned text of at most `WIDTH` columns; ends with a newline."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in described["mesh"].items())
    count, stages, rollout = described["devices"], described["stages"], described["rollout"]
    rules = ", ".join(f"{role} {rule}" for role, rule in described["rules"].items())
    blocks = [
        [
            f"dry run (no weights were loaded): {described['setting']} setting, preset {described['preset']}, "
            f"pair {described['pair']}",
            f"{count} device{'s' if count > 1 else ''}, {mesh}; rules: {rules}",
        ],
        _models_block(described["models"]),
        _work_block(stages),
        _training_block(stages),
        _rollout_block(rollout),
        ["notes", *(line for note in described["assumptions"] for line in _wrapped(note))],
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _models_block(models: Mapping[str, Any]) -> list[str]:
    header = ("model", "parameters", "P (no embedding, head)", "trained", "weights", "computes in", "master copy")
    counts = ("params", "params_without_embedding_and_head", "trainable")
    dtypes = ("param_dtype", "compute_dtype", "master_dtype")
    rows = [(role, *(f"{m[name]:,}" for name in counts), *(m[name] for name in dtypes)) for role, m in models.items()]
    lines = _aligned(header, rows)
    for role, m in models.items():
        adapter = m["lora"]
        extra = ", head tied" * m["tie_embeddings"]
        extra += f"; LoRA rank {adapter['rank']} on {', '.join(adapter['targets'])}" if adapter else ""
        lines += _wrapped(
            f"{role} ({m['size']}; base: {m['source']}): {m['num_layers']} layers, d_model {m['d_model']}, "
            f"{m['num_heads']} heads on {m['num_kv_heads']} of {m['head_dim']}, d_ff {m['d_ff']}, "
            f"vocab {m['vocab_size']}{extra}"
        )
    return lines


def _work_block(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    unit, size = _unit((s["flops_per_step_at_most"] for s in stages), _FLOPS)
    cards = list(PEAK_FLOPS) if any(s["seconds"] for s in stages) else []
    header = ("work, at most", "models", "steps", "rows x tokens", "tokens/step", "loss ~", "epochs >=")
    rows = []
    for s in stages:
        times = [_duration(s["seconds"][card]) if s["seconds"] else "-" for card in cards]
        shape = f"{s['rows']} x {s['row_tokens_at_most']}"
        tokens = (f"{s[name]:,}" for name in ("tokens_per_step_at_most", "loss_tokens_per_step_assumed"))
        flops = (_number(s[name] / size) for name in ("flops_per_step_at_most", "flops_at_most"))
        rows.append(
            (
                s["name"],
                str(s["models"]),
                str(s["steps"]),
                shape,
                *tokens,
                f"{s['epochs_at_least']:.1f}",
                *flops,
                *times,
            )
        )
    return _aligned((*header, f"{unit}/step", "in all", *cards), rows)


def _training_block(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    unit, size = _unit((s["bytes_per_device"]["total"] for s in stages), _BYTES)
    names = list(stages[0]["bytes_per_device"])
    rows = [(s["name"], *(_number(s["bytes_per_device"][name] / size) for name in names)) for s in stages]
    return _aligned((f"{unit}/device", *names), rows)


def _rollout_block(rollout: Mapping[str, Any]) -> list[str]:
    unit, size = _unit((r["bytes_per_device"]["total"] for r in rollout.values()), _BYTES)
    header = (f"rollout, {unit}/device", "slots x context", "cache/slot", "weights", "cache", "logits", "total")
    rows = []
    for role, r in rollout.items():
        held = (_number(value / size) for value in r["bytes_per_device"].values())
        slots = f"({r['groups']} x {r['slots'] or 'as fit'} + {r['kept_prefixes']}) x {r['context']}"
        rows.append((role, slots, _number(r["kv_bytes_per_slot"] / size), *held))
    return _aligned(header, rows)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under a header and a rule: the first column to the left, the others to the right, two spaces between."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _unit(values: Any, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The largest unit that the largest value reaches, or the smallest there is."""
    most = max(values)
    return next((unit for unit in units if most >= unit[1]), units[-1])


def _number(value: float) -> str:
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 0.005 else "<0.01"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
