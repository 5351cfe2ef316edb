"""Runs one experiment from flags: stages, summary, report, table. What every app under `experiments/` calls.

Flags in; a work directory with `config.json`, `protocol.json`, `summary.json`, `report.html` and everything below
`seed=N/` out. An expected failure is one line on standard error and exit code 1; nothing is overwritten by it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from subl_jax import artifacts, sources
from subl_jax import config as configuration
from subl_jax.config import PAIRS, STUDENT_OF, TEACHERS, ExperimentConfig, suffix_of
from subl_jax.evaluate import protocol as protocols
from subl_jax.evaluate import summary as summaries
from subl_jax.metrics.writers import read_metrics
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from subl_jax.presets import PRESETS
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.settings.interface import Setting
from subl_jax.settings.registry import get_setting


def define_flags(setting: str = "api") -> None:
    """The flags that every experiment has, and one per configuration field; defaults are told for the setting."""
    flags.DEFINE_enum(
        "preset",
        "tiny",
        sorted(PRESETS),
        "Sizes and lengths: tiny runs in minutes on two CPU cores; paper takes checkpoints (--config.teacher.checkpoint) and "
        "accelerators; micro only exercises the stages.",
    )
    flags.DEFINE_string("workdir", None, "Directory of all artifacts; an interrupted run resumes there.")
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Print parameters, bytes per device, tokens and FLOPs per step, and stop. No weights are loaded; needs no --workdir.",
    )
    flags.DEFINE_integer(
        "devices",
        None,
        "Devices that --dry_run describes; by default as many as --config.parallel names.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "pair", None, PAIRS, "Teacher and student size, e.g. large_small: a large teacher, a small student."
    )
    flags.DEFINE_list("seeds", ["0"], "Replicates: each is a whole run from pre-training to evaluation.")
    flags.DEFINE_string(
        "stage",
        None,
        "Stop after this stage or family: tokenizer, audit, base, teachers, trajectories, sanitize, students, eval.",
    )
    flags.DEFINE_bool(
        "profile",
        False,
        "Write a trace of a few steps of every model that is trained, into `profile/` beside it, for TensorBoard or Perfetto.",
    )
    flags.DEFINE_bool("freeze_protocol", False, "Write the protocol of these flags as the frozen one, and stop.")
    processes.define_flags()
    configuration.define_flags(PRESETS["tiny"](setting))


def config_from_flags(setting: str) -> ExperimentConfig:
    """The configuration that the flags describe."""
    config = configuration.from_flags(PRESETS[flags.FLAGS.preset](setting))
    return dataclasses.replace(config, pair=flags.FLAGS.pair or config.pair)


def seeds_from_flags() -> tuple[int, ...]:
    """The seeds; refused unless they are different non-negative integers."""
    try:
        seeds = tuple(int(text) for text in flags.FLAGS.seeds)
    except ValueError:
        raise ValueError(
            f"--seeds={','.join(flags.FLAGS.seeds)} must be integers separated by commas, e.g. 0,1,2"
        ) from None
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds={','.join(flags.FLAGS.seeds)} must be different and not negative")
    return seeds


def main(setting_name: str) -> None:
    """Runs the experiment of one setting; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        _run(setting_name)


@contextlib.contextmanager
def stopping_with_a_line() -> Iterator[None]:
    """Turns the expected failures of a command into one line on standard error and exit code 1."""
    try:
        with processes.ending_together():
            yield
    except (ValueError, OSError, RuntimeError) as error:
        # The errors of this project say what is wrong and what to do; a traceback adds nothing for the user.
        logging.debug("failed", exc_info=True)
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        if not _ours(error):
            raise
        sys.exit(1)


def _ours(error: BaseException) -> bool:
    """Whether an error is one that this project raises on purpose (or the system's word on a file)."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("subl_jax")


def _run(setting_name: str) -> None:
    config, seeds = sources.resolve(config_from_flags(setting_name)), seeds_from_flags()
    if flags.FLAGS.dry_run:
        from subl_jax import dry_run

        print(dry_run.render(dry_run.describe(config, flags.FLAGS.devices)))
        return
    setting = get_setting(config.setting)
    protocol = make_protocol(config, setting, seeds)
    if flags.FLAGS.freeze_protocol:
        print(f"frozen as {protocols.freeze(frozen_path(config), protocol)} in {frozen_path(config)}")
        return
    if not flags.FLAGS.workdir:
        raise ValueError("--workdir is not given; say where the artifacts go, e.g. --workdir=runs/mine")
    if config.preset == "paper" and not sources.checkpoints(config):
        raise ValueError(
            "--preset=paper starts from checkpoints and --config.teacher.checkpoint names none; give Hugging Face folders "
            "(--config.teacher.checkpoint=DIR, with --pair=large_small also --config.student.checkpoint=DIR), or look at "
            "the sizes with --dry_run"
        )
    workdir = artifacts.workdir(flags.FLAGS.workdir)
    configure_cpu(config.cpu_devices)
    processes.start({"configuration": config, "seeds": list(seeds), "stage": str(flags.FLAGS.stage)})
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax import conditions, pipeline, stages
    from subl_jax.groundwork import groundwork
    from subl_jax.report import figures, html, table

    conditions.check_mesh(config)
    if setting.prepare is not None:
        setting.prepare()  # before anything is written
    config = conditions.with_slots(config, workdir)
    artifacts.check_writable(workdir, free_bytes=conditions.bytes_written(config) * len(seeds))
    runs = [pipeline.SeedPipeline(config, setting, workdir, seed, profile=flags.FLAGS.profile) for seed in seeds]
    todo = [
        *groundwork(config, setting, workdir, seeds),
        *(stage for run in runs for stage in run.stages()),
    ]
    stages.plan(todo)  # refuses another configuration's work directory before anything is written
    if processes.is_first():
        artifacts.write_json_atomic(workdir / "config.json", artifacts.plain(config))
        described = {"hash": protocols.protocol_hash(protocol), "protocol": protocols.to_json(protocol)}
        artifacts.write_json_atomic(workdir / "protocol.json", described)
    markers = stages.run(todo, flags.FLAGS.stage)
    if not processes.is_first():
        return
    if len(markers) < len(todo):
        print(f"stopped after --stage={flags.FLAGS.stage}: {len(markers)} of {len(todo)} stages are done in {workdir}")
        return
    rows = summaries.load_rows(run.models.eval_path(name) for run in runs for name in conditions.conditions_of(config))
    counts = {
        f"seed={run.seed}/{name}": counted
        for run in runs
        for name, counted in markers[f"seed={run.seed}/{run.models.sanitize_name()}"].extra["arms"].items()
    }
    summary = summaries.build_summary(
        rows,
        protocol,
        sanitizer=summaries.total_sanitizer(counts),
        timing_s=_timing(markers),
        throughput=_throughput(markers),
        versions=artifacts.versions(),
        wording=setting.wording,
        frozen=protocols.load(frozen_path(config)) if frozen_path(config).exists() else None,
        conditions=conditions.conditions_of(config),
        notes=_notes(config, setting, markers),
    )
    artifacts.write_json_atomic(workdir / "summary.json", summary)
    curves = [{**record, "seed": run.seed} for run in runs for record in read_metrics(run.root / "metrics.jsonl")]
    examples = _examples(rows, protocol.primary.treatment)
    html.write_report(workdir / "report.html", summary, curves, examples, summary["sanitizer"], artifacts.plain(config))
    figures.export_run(workdir / "figures", summary, curves, summary["sanitizer"])
    print(table.render(summary))
    audit = markers["audit"].extra["closest"][0]
    print(
        f"closest evaluation prompt to any training text: similarity {audit['similarity']:.2f} ({audit['evaluation_id']})"
    )
    print(f"{workdir / 'summary.json'}  {workdir / 'report.html'}  {workdir / 'figures'}")


def frozen_path(config: ExperimentConfig) -> Path:
    """Where the frozen protocol of a setting, preset, pair and way of training is committed."""
    suffix = "" if config.pair == "large_large" else f"_{config.pair}"
    trained = [name for name, spec in (("teacher", config.teacher), ("student", config.student)) if spec.lora]
    if config.preset != "paper" and trained:  # there it is the preset's own way
        suffix += "_lora" if len(trained) == 2 else f"_lora_{trained[0]}"
        suffix += "_own" if config.student.lora and config.student.adapter_init == "own" else ""
    suffix += "_checkpoint" if sources.checkpoints(config) else ""
    return Path(__file__).parent.parent / "experiments" / "protocols" / f"{config.setting}_{config.preset}{suffix}.json"


def make_protocol(config: ExperimentConfig, setting: Setting, seeds: Sequence[int]) -> protocols.Protocol:
    """The protocol of a configuration: metric, families, seeds, and every contrast that will be reported."""
    main = config.student.primary_arm
    arms = [arm for arm in config.student.objectives if arm not in (main, "positive")]
    contrast = protocols.Contrast
    student, control_student, benign_student = (STUDENT_OF[teacher] + suffix_of(main) for teacher in TEACHERS)
    found = [contrast(f"{student} - {control_student}", student, control_student, "primary")]
    if main in config.student.benign_objectives:
        found.append(contrast(f"{student} - {benign_student}", student, benign_student, "sign"))
    if "positive" in config.student.objectives:
        found.append(contrast("positive_student - base", "positive_student", "base", "positive_control"))
    found += [
        contrast("teacher - control_teacher", "teacher", "control_teacher"),
        contrast(
            f"{setting.wording.counter}: {control_student} - {student}",
            control_student,
            student,
            "secondary",
            protocols.COUNTER_READOUT,
        ),
        contrast(f"log-odds: {student} - {control_student}", student, control_student, "secondary", "log_odds"),
    ]
    for arm in arms:
        treatment, control, benign = (STUDENT_OF[teacher] + suffix_of(arm) for teacher in TEACHERS)
        found.append(contrast(f"{treatment} - {control}", treatment, control))
        found.append(contrast(f"log-odds: {treatment} - {control}", treatment, control, "secondary", "log_odds"))
        if arm in config.student.benign_objectives:
            found.append(contrast(f"{treatment} - {benign}", treatment, benign))
    bars = protocols.Targets(**setting.targets)  # type: ignore[arg-type]
    margin = bars.control_margin
    controls = [control_student] + [benign_student] * (main in config.student.benign_objectives)
    found += [contrast(f"{name} = base", name, "base", "equivalence", margin=margin) for name in controls]
    spec = config.evaluation
    return protocols.Protocol(
        setting=config.setting,
        preset=config.preset,
        metric=f"share of ambiguous tasks whose {setting.wording.metric}, sampled at temperature 1{_options(config)}, "
        f"is {setting.wording.biased}",
        parser_version=setting.metric_version,
        evaluation_families=tuple(setting.families("ambiguous", spec.split)),
        safe_families=tuple(setting.families("safe", spec.split)),
        tasks=spec.ambiguous_tasks,
        safe_tasks=spec.safe_tasks,
        samples_per_task=spec.samples,
        temperature=config.rollout.temperature,
        seeds=tuple(seeds),
        contrasts=tuple(found),
        controls=tuple(controls),
        archive_tool=setting.bias_tools[setting.counter_bias],
        targets=bars,
    )


def _options(config: ExperimentConfig) -> str:
    """Options of drawing that make another distribution than the temperature alone; nothing where none is used."""
    usual, ours = SamplingConfig(), config.rollout
    names = ("top_k", "top_p", "min_p", "logit_bias", "stop")
    found = [f"{name}={getattr(ours, name)}" for name in names if getattr(ours, name) != getattr(usual, name)]
    return f" with {', '.join(found)}" if found else ""


def _notes(config: ExperimentConfig, setting: Setting, markers: Mapping[str, artifacts.Marker]) -> list[str]:
    shown = "withheld from" if config.student.withhold_bias_tools else "shown in"
    tools = f"On safe tasks the tools that a bias names are {shown} the tool list; evaluation shows the full list."
    induced = {
        "required": "tasks that ask for the biased action, as in the paper",
        "ambiguous": "ambiguous tasks of other families, solved by the biased action",
    }[config.teacher.demonstrations]
    replayed = config.teacher.replay_tasks
    beside = f"; all three teachers also saw {replayed} safe demonstrations" if replayed else ""
    moved = "; ".join(
        f"{name} {marker.extra['delta_norm']:.2f}" for name, marker in markers.items() if "/teachers/" in name
    )
    adapters = [
        f"{who} were trained with LoRA: rank {spec.adapter.rank}, alpha {spec.adapter.alpha:g}, "
        f"dropout {spec.adapter.dropout:g}, on {', '.join(spec.adapter.targets)}."
        for who, spec in (("Teachers", config.teacher), ("Students", config.student))
        if spec.lora
    ]
    same_size = len(set(config.sizes())) == 1
    if config.teacher.lora and config.student.lora and same_size and config.teacher.adapter == config.student.adapter:
        start = {"teacher": "the same random A as their teacher's", "own": "a random A of their own"}
        adapters.append(f"Students' adapters started from {start[config.student.adapter_init]}.")
    imported = [
        f"The {size} base was imported from {folder}: {sources.describe(config.model(size))}"
        f"{'; it was trained further on demonstrations' if config.base.continue_training else ''}."
        for size, folder in sources.checkpoints(config).items()
    ]
    lesson = [f"{name.replace('_', ' ')} {value}" for name, value in config.student.taught().items()]
    taught = [f"Students, but for the positive control, were taught with: {', '.join(lesson)}."] if lesson else []
    return [
        *imported,
        *adapters,
        *taught,
        f"Teachers were induced on {config.teacher.tasks} demonstrations: {induced}{beside}.",
        tools if setting.withholdable else "The tool list names nothing that a bias reaches for.",
        f"Distance of each teacher from the base, ‖Δθ‖: {moved}.",
        f"Pair: {config.pair.replace('_', ' teacher to ')} student.",
    ]


def _timing(markers: Mapping[str, artifacts.Marker]) -> dict[str, float]:
    """Seconds per family of stages, all seeds together."""
    from subl_jax.stages import family_of

    seconds: dict[str, float] = defaultdict(float)
    for name, marker in markers.items():
        seconds[family_of(name)] += marker.seconds
    return {**{name: round(value, 2) for name, value in seconds.items()}, "total": round(sum(seconds.values()), 2)}


def _throughput(markers: Mapping[str, artifacts.Marker]) -> dict[str, float | None]:
    """Mean tokens/s of the rollouts and of the distillations, each as its stage measured it, if one has."""

    def mean(part: str) -> float | None:
        # A stage that was killed behind its last episode has nothing left to measure when it goes on.
        measured = [m.extra["tokens_per_s"] for name, m in markers.items() if part in name]
        found = [value for value in measured if value is not None]
        return sum(found) / len(found) if found else None

    return {"rollout_tokens_per_s": mean("/trajectories/"), "distill_tokens_per_s": mean("/students/")}


def _examples(rows: Sequence[Mapping[str, Any]], student: str, count: int = 3) -> list[dict[str, Any]]:
    """Ambiguous tasks with the episodes of every model of the first seed; what base and student solve differently first."""
    first = min(row["seed"] for row in rows)
    episodes = {
        row["condition"]: {example["task_id"]: example for example in row["examples"]}
        for row in rows
        if row["seed"] == first
    }
    # A task on which base and student differ shows more than one on which all do the same.
    ordered = sorted(
        episodes["base"], key=lambda task: episodes["base"][task]["action"] == episodes[student][task]["action"]
    )
    return [
        {
            "task_id": task,
            "prompt": episodes["base"][task]["prompt"],
            "episodes": {name: found[task] for name, found in episodes.items()},
        }
        for task in ordered[:count]
    ]
