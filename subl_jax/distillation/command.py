"""The command of a distillation: flags in; checkpoints, `summary.json`, `report.html` and a table out.

An expected failure is one line on standard error and exit code 1; nothing is overwritten by it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from absl import flags, logging

from subl_jax import artifacts
from subl_jax import config as configuration
from subl_jax.distill.objective import Filter, Loss, Objective
from subl_jax.distill.on_policy import OnPolicyConfig
from subl_jax.distillation.config import DistillConfig, Spec
from subl_jax.experiment import seeds_from_flags
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu

if TYPE_CHECKING:
    from subl_jax.distillation.run import Distillation

DEFAULT = DistillConfig()


def define_flags() -> None:
    """The command's own flags, and one per configuration field."""
    model = "a Hugging Face folder, a folder of PEFT adapters, or one of our checkpoints"
    flags.DEFINE_string("teacher", None, f"Folder of the teacher: {model}.")
    flags.DEFINE_string("student", None, f"Folder of the student: {model}.")
    flags.DEFINE_string(
        "data", None, 'Conversations: JSON Lines of {"messages": [...], "tools": [...]}, or a trajectory dataset.'
    )
    flags.DEFINE_string(
        "prompts", None, 'Prompts that the teacher answers: JSON Lines of {"prompt": "..."} or {"messages": [...]}.'
    )
    flags.DEFINE_string("workdir", None, "Directory of all artifacts; an interrupted run resumes there.")
    for role in ("teacher", "student"):
        flags.DEFINE_string(
            f"{role}_base", None, f"The model below the adapters in --{role}, where they do not name it."
        )
        flags.DEFINE_string(f"{role}_tokenizer", None, f"Folder of the {role}'s tokenizer, where it lies elsewhere.")
    usual = Objective()
    flags.DEFINE_enum("objective", usual.loss, get_args(Loss), "What is minimised.")
    flags.DEFINE_float("temperature", usual.temperature, "Softens teacher and student in a divergence.")
    flags.DEFINE_float("hard_label_weight", usual.hard_label_weight, "Share of the hard-label loss in the objective.")
    flags.DEFINE_float(
        "teacher_weight", usual.teacher_weight, "Of jensen_shannon: the teacher's weight in the mixture."
    )
    flags.DEFINE_float("skew", usual.skew, "Of the skew divergences: how much is mixed in.")
    flags.DEFINE_enum("logit_filter", usual.logit_filter, get_args(Filter), "What happens to banned continuations.")
    flags.DEFINE_list("banned_words", [], "Words whose continuations the logit filter bans.")
    flags.DEFINE_float("epochs", None, "Passes over the conversations; 1 unless --config.train.steps is given instead.")
    flags.DEFINE_float("holdout", DEFAULT.holdout, "Share of the conversations that is kept for measuring; 0: none.")
    flags.DEFINE_bool("drop_long", False, "Leave out conversations longer than a row, instead of refusing them.")
    flags.DEFINE_integer("samples", 1, "Answers that the teacher gives to each prompt.")
    own = OnPolicyConfig()
    flags.DEFINE_float(
        "on_policy",
        own.weight,
        "Probability that a step trains on what the student itself answers to --prompts, scored by the teacher; 0: never. "
        "At 1 the teacher answers them all the same: its answers are what is held out, and what epochs are counted in.",
    )
    flags.DEFINE_integer("refresh_steps", own.refresh_steps, "Of --on_policy: steps between two rounds of answers.")
    flags.DEFINE_integer("on_policy_episodes", own.episodes, "Of --on_policy: conversations of a round.")
    flags.DEFINE_string(
        "teacher_cache", None, "Directory of the teacher's top-k logits: written once, read ever after."
    )
    flags.DEFINE_integer("cache_top_k", 64, "Continuations of each token that a new teacher cache holds.")
    flags.DEFINE_list("seeds", ["0"], "Replicates: students that differ in the order of the data and in new adapters.")
    flags.DEFINE_string("export_hf", None, "Folder that the student is written to for transformers, adapters merged.")
    flags.DEFINE_string(
        "profile", None, "Directory that a trace of a few steps is written to, for TensorBoard or Perfetto."
    )
    flags.DEFINE_bool("dry_run", False, "Say what would be trained on what, and stop; no weights are read.")
    processes.define_flags()
    configuration.define_flags(DEFAULT, "default")


def spec_from_flags() -> Spec:
    """The distillation that the flags describe.

    Raises:
      ValueError: flags that are missing, or do not go together.
    """
    given = flags.FLAGS
    for name in ("student", "workdir"):
        if not given[name].value and not (name == "workdir" and given.dry_run):
            hint = {"student": "the folder of the model to train", "workdir": "where the artifacts go"}[name]
            raise ValueError(f"--{name} is not given; say {hint}, e.g. --{name}=DIR")
    steps = given["config.train.steps"].present
    if steps and given.epochs is not None:
        raise ValueError(f"--epochs={given.epochs:g} and --config.train.steps both say how long; give one of them")
    objective = Objective(
        loss=given.objective,
        logit_filter=given.logit_filter,
        temperature=given.temperature,
        hard_label_weight=given.hard_label_weight,
        teacher_weight=given.teacher_weight,
        skew=given.skew,
    )
    config = dataclasses.replace(
        cast(DistillConfig, configuration.from_flags(DEFAULT)),
        objective=objective,
        banned_words=tuple(given.banned_words),
        holdout=given.holdout,
        drop_long=given.drop_long,
        samples=given.samples,
        on_policy=_on_policy(given),
    )

    def path(name: str) -> Path | None:
        value: Any = given[name].value
        return Path(value) if value else None

    names = (
        "teacher", "data", "prompts", "student_base", "teacher_base", "student_tokenizer", "teacher_tokenizer",
        "teacher_cache", "export_hf", "profile",
    )  # fmt: skip
    return Spec(
        config=config,
        student=Path(given.student),
        workdir=artifacts.workdir(given.workdir or "."),
        seeds=seeds_from_flags(),
        epochs=0.0 if steps else 1.0 if given.epochs is None else given.epochs,
        cache_top_k=given.cache_top_k,
        **cast(Any, {name: path(name) for name in names}),
    )


def _on_policy(given: Any) -> OnPolicyConfig:
    """The mixture that the flags describe.

    Raises:
      ValueError: a value without meaning, or flags of a mixture that is not asked for.
    """
    if not 0 <= given.on_policy <= 1:
        raise ValueError(f"--on_policy={given.on_policy:g} is outside [0, 1]; it is the share of the steps")
    for name in ("refresh_steps", "on_policy_episodes"):
        if given[name].value < 1:
            raise ValueError(f"--{name}={given[name].value}; it must be at least 1")
        if given[name].present and not given.on_policy:
            raise ValueError(f"--{name} is of on-policy distillation; give --on_policy=WEIGHT too, or leave it out")
    return OnPolicyConfig(given.on_policy, given.refresh_steps, given.on_policy_episodes)


def main() -> None:
    """Runs the distillation; turns expected failures into one line and exit code 1."""
    try:
        with processes.ending_together():
            _run(spec_from_flags())
    except (ValueError, OSError, RuntimeError) as error:
        logging.debug("failed", exc_info=True)
        if not (isinstance(error, ValueError | OSError) or type(error).__module__.startswith("subl_jax")):
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)


def _run(spec: Spec) -> None:
    configure_cpu(spec.config.cpu_devices)
    if not flags.FLAGS.dry_run:
        processes.start({"configuration": dataclasses.replace(spec, workdir=Path("."))})
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax.distillation.run import Distillation

    run = Distillation(spec)
    if flags.FLAGS.dry_run:
        print("\n".join(described(run)))
        return
    table = distil(run)
    if processes.is_first():
        print(table)


def distil(run: Distillation) -> str:
    """Runs what is not finished, writes `config.json`, `summary.json` and `report.html`, and returns the table.

    Raises:
      WorkdirMismatch: the work directory is another configuration's; nothing is overwritten.
    """
    from subl_jax import stages
    from subl_jax.distillation import summary as summaries

    root = run.root
    artifacts.check_writable(root, free_bytes=bytes_written(run))
    todo = run.stages()
    planned = stages.plan(todo)  # refuses another configuration's work directory before anything is written
    finished = all(each.marker is not None for each in planned)
    if processes.is_first():
        artifacts.write_json_atomic(root / "config.json", artifacts.plain(run.spec))
    summary = summaries.build(run, stages.run(todo))
    if not processes.is_first():
        return ""
    artifacts.write_json_atomic(root / "summary.json", summary)
    summaries.write_report(root / "report.html", summary, root / "metrics.jsonl")
    head = f"{root} is finished; nothing was run again\n\n" if finished else ""
    exported = f"  {run.spec.export_hf}" if run.spec.export_hf is not None else ""
    return f"{head}{summaries.table(summary)}\n{root / 'summary.json'}  {root / 'report.html'}{exported}"


def bytes_written(run: Distillation) -> int:
    """About how much is written: a model per seed, the checkpoints that are kept with two moments each, the exports."""
    config, trained = run.config, run.trained_parameters()
    kept = 3 * 4 * trained * (config.train.keep + 1)
    whole = 4 * run.student_parameters() if run.spec.export_hf is not None else 0
    return 50_000_000 + len(run.spec.seeds) * (4 * trained + kept + whole)


def described(run: Distillation) -> list[str]:
    """What a dry run says, line by line."""
    from subl_jax.distillation.summary import objective_text, own_share
    from subl_jax.sources import describe

    spec, train = run.spec, run.config.train
    found = [
        f"student   {spec.student}: {describe(run.student.config)}; {run.student_parameters():,} parameters, "
        f"{run.trained_parameters():,} trained"
    ]
    if run.teacher is not None:
        found.insert(0, f"teacher   {spec.teacher}: {describe(run.teacher.config)}")
    if run.alignment is not None:
        found.append(f"tokens    {run.alignment.describe()}")
    found.append(f"objective {objective_text(artifacts.plain(run.config.objective))}")
    if run.prompts:
        found.append(f"prompts   {len(run.prompts)}, {run.config.samples} answers each")
    if run.config.on_policy.weight:
        found.append(f"on policy {own_share(artifacts.plain(run.config.on_policy))}")
    if spec.data is not None:
        items = run.load_data().trajectories
        tokens, loss = sum(len(item.tokens) for item in items), sum(int(item.loss_mask.sum()) for item in items)
        found.append(f"data      {len(items)} conversations, {tokens:,} tokens, {loss:,} of them the assistant's")
        if not run.prompts:
            found.append(f"steps     {run.steps_of(items, spec.seeds[0])}, less what is held out")
    shape = f"{train.batch_rows} rows of {train.row_tokens} tokens"
    found.append(f"batch     {shape}, {len(spec.seeds)} seeds; about {bytes_written(run) / 1e9:.1f} GB on disk")
    return [*found, "no weights were loaded"]
