"""The command of the on-policy study: flags in, `on_policy.json`, `on_policy.html` and a table out."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from absl import flags

from subl_jax import artifacts, sources
from subl_jax import config as configuration
from subl_jax.config import PAIRS, ExperimentConfig
from subl_jax.distill.objective import Loss
from subl_jax.experiment import config_from_flags, seeds_from_flags, stopping_with_a_line
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from subl_jax.presets import PRESETS
from subl_jax.settings.registry import get_setting

if TYPE_CHECKING:
    from subl_jax.studies.on_policy import StudyConfig

# The first is the headline's; the last is what the others are compared with.
ORDER = ("on_policy", "mixed", "off_policy")


def define_flags() -> None:
    """The study's own flags, those it shares with the experiments, and one per configuration field."""
    flags.DEFINE_enum("preset", "tiny", sorted(PRESETS), "Sizes and lengths, as for experiments.api_deletion.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of all artifacts; an interrupted run resumes there. One of experiments.api_deletion's saves what it has.",
    )
    flags.DEFINE_enum("pair", None, PAIRS, "Teacher and student size, e.g. large_small.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Replicates: each is a whole run from pre-training to measurement.")
    losses = [name for name in get_args(Loss) if name != "hard_label"]
    flags.DEFINE_enum("loss", "reverse_kl", losses, "The objective of every arm.")
    flags.DEFINE_float("temperature", 1.0, "Of the objective; what is measured is at temperature 1.")
    flags.DEFINE_integer("every", 40, "Steps between measurements.")
    flags.DEFINE_integer("refresh_steps", 20, "Steps between two rollouts of a student on training tasks.")
    flags.DEFINE_integer("episodes", 64, "Episodes rolled out each time.")
    flags.DEFINE_integer("tasks", 48, "Held-out safe tasks of a measurement.")
    flags.DEFINE_enum(
        "split", "evaluation", ["evaluation", "development"], "Which tasks; development is what one may tune on."
    )
    configuration.define_flags(PRESETS["tiny"]())


def main() -> None:
    """Runs the study; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        _run()


def _run() -> None:
    config, seeds = sources.resolve(config_from_flags("api")), seeds_from_flags()
    if not flags.FLAGS.workdir:
        raise ValueError("--workdir is not given; say where the artifacts go, e.g. --workdir=runs/on_policy")
    if config.preset == "paper" and not sources.checkpoints(config):
        raise ValueError(
            "--preset=paper starts from checkpoints and --config.teacher.checkpoint names none; give Hugging Face folders"
        )
    if not config.one_tokenizer:
        raise ValueError(
            f"--pair={config.pair} has a student with a tokenizer of its own, and every arm of this study is a divergence over "
            "the teacher's tokens; use another pair, e.g. --pair=large_other_family"
        )
    processes.only_one("experiments.on_policy")
    workdir, setting = artifacts.workdir(flags.FLAGS.workdir), get_setting(config.setting)
    configure_cpu(config.cpu_devices)
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax import conditions, stages
    from subl_jax.report import figures
    from subl_jax.report import on_policy as report
    from subl_jax.studies.on_policy import SeedStudy, StudyConfig, study_stages

    names = [field.name for field in dataclasses.fields(StudyConfig)]
    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    study = StudyConfig(**given)
    conditions.check_mesh(config)
    config = conditions.with_slots(config, workdir)
    artifacts.check_writable(workdir, free_bytes=conditions.bytes_written(config) * len(seeds))
    runs = [SeedStudy(config, study, setting, workdir, seed) for seed in seeds]
    todo = study_stages(runs, workdir)
    stages.plan(todo)  # refuses another configuration's work directory before anything is written
    if not (workdir / "config.json").exists():  # an experiment's own stays as it is
        artifacts.write_json_atomic(workdir / "config.json", artifacts.plain(config))
    markers = stages.run(todo)
    result = build_result(
        [row for run in runs for row in run.rows()],
        config,
        study,
        seeds,
        teacher=[run.teacher_figures() for run in runs],
        timing_s=_timing(markers),
    )
    artifacts.write_json_atomic(workdir / "on_policy.json", result)
    report.write_report(workdir / "on_policy.html", result)
    figures.export_on_policy(workdir / "on_policy_figures", result)
    print(report.table(result))
    print(f"{workdir / 'on_policy.json'}  {workdir / 'on_policy.html'}  {workdir / 'on_policy_figures'}")


def build_result(
    rows: Sequence[Mapping[str, Any]],
    config: ExperimentConfig,
    study: StudyConfig,
    seeds: Sequence[int],
    *,
    teacher: Sequence[Mapping[str, Any]],
    timing_s: Mapping[str, float],
) -> dict[str, Any]:
    """What `on_policy.json` holds: rows, curves, contrasts, the answer in words, and where they come from.

    Args:
      rows: of all seeds; see `studies.on_policy.SeedStudy.rows`.
      config, study, seeds: what was run.
      teacher: how the teacher's held-out episodes went, by seed.
      timing_s: seconds per kind of stage.
    """
    from subl_jax.studies import curves

    found = curves.contrasts(rows, ORDER, "off_policy")
    drawn = [
        {"arm": arm, "states": states, "points": curves.curve(rows, arm, states)}
        for states in dict.fromkeys(row["states"] for row in rows)
        for arm in reversed(ORDER)
    ]
    train = config.student.train
    return {
        "schema": 1,
        "preset": config.preset,
        "setting": config.setting,
        "pair": config.pair,
        "seeds": list(seeds),
        "study": dataclasses.asdict(study),
        "answer": curves.answer(found),
        "contrasts": found,
        "curves": drawn,
        "teacher": {name: sum(each[name] for each in teacher) / len(teacher) for name in teacher[0]},
        "rows": list(rows),
        "notes": [
            f"Arms share the base, the biased teacher, the safe training tasks, the optimizer, {train.steps} steps of "
            f"{train.batch_rows} rows, and the objective ({study.loss}, temperature {study.temperature:g}). They differ in "
            "the probability that a step trains on the student's own episodes: off-policy 0, mixed 0.5, on-policy 1.",
            f"The student is rolled out on {study.episodes} training tasks every {study.refresh_steps} steps; steps between "
            "two rollouts go over these episodes, several times if need be. The teacher's trajectories are not filtered.",
            f"Measured on {study.tasks} held-out safe tasks ({study.split} split), whose wordings and paths occur in no "
            "training, with the tool list of training and the same sampling noise at every point.",
            "An interval says what another seed would give: the replicate is the whole run, from pre-training on.",
        ],
        "timing_s": dict(timing_s),
        "versions": artifacts.versions(),
        "config": artifacts.plain(config),
    }


def _timing(markers: Mapping[str, artifacts.Marker]) -> dict[str, float]:
    """Seconds per kind of stage, all seeds together; what an earlier experiment made included."""
    seconds: dict[str, float] = defaultdict(float)
    for name, marker in markers.items():
        parts = [part for part in name.split("/") if not part.startswith("seed=")]
        kind = parts[0] if parts[0] != "on_policy" else "measure" if "measured" in parts else parts[-1]
        seconds["teacher's held-out episodes" if kind == "teacher" else kind] += marker.seconds
    return {**{name: round(value, 2) for name, value in seconds.items()}, "total": round(sum(seconds.values()), 2)}
