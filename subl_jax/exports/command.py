"""The command of the exports: a finished run (or committed cells) and what is wanted in, one folder and a table out.

An expected failure is one line on standard error and exit code 1; the folder appears complete or not at all.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from subl_jax import artifacts
from subl_jax.experiment import stopping_with_a_line
from subl_jax.settings.registry import SETTINGS

if TYPE_CHECKING:
    from subl_jax.exports.finished import FinishedSeed, Measured

WHAT = ("inspect", "dataset", "model")
_EVERY = "all"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Work directory of a finished run, or of one setting of a grid (runs/grid/api).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "cells",
        None,
        "Instead of --workdir, a grid's cells (docs/grid): Inspect logs alone are in them.",
        flag_values=values,
    )
    flags.DEFINE_enum("setting", None, sorted(SETTINGS), "Which setting of --cells.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Which replicate.", lower_bound=0, flag_values=values)
    flags.DEFINE_list(
        "condition",
        ["student"],
        "Models, by condition or by their name on disk (student_hard@large_small); all: every measured one, for inspect.",
        flag_values=values,
    )
    flags.DEFINE_list("what", list(WHAT), f"What to write, of {', '.join(WHAT)}.", flag_values=values)
    flags.DEFINE_enum(
        "inspect_format", "eval", ["eval", "json"], "Inspect's compact format, or plain JSON.", flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder to make; it must not exist, or be empty.", flag_values=values)


def main() -> None:
    """Writes the exports; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        run(flags.FLAGS)


def run(flag: flags.FlagValues) -> None:
    """Writes what the flags ask for, and prints a table of it.

    Raises:
      ValueError: what cannot be exported, in one line, before anything is written.
    """
    out, what = _checked(flag)
    # Imported here: a wrong flag is answered without waiting for the libraries' start.
    from subl_jax.exports import dataset, inspect_log, model
    from subl_jax.exports.finished import FinishedSeed
    from subl_jax.report.table import aligned

    if "inspect" in what:
        inspect_log.require_inspect()
    finished = FinishedSeed(artifacts.workdir(flag.workdir), flag.seed) if flag.workdir else None
    measured = _measured(finished, flag) if "inspect" in what else []
    names = _names(finished, flag.condition, what) if finished is not None else []
    # Everything that can be refused is refused here, before the first file.
    for name in names:
        if finished is not None and "dataset" in what:
            dataset.check(finished, name)
        if finished is not None and "model" in what:
            model.check(finished, name)
    written: list[list[str]] = []
    with artifacts.atomic_directory(out) as partial:
        for each in measured:
            for path in inspect_log.write(partial / "inspect", each, flag.inspect_format):
                written.append(["inspect", each.model, str(path.relative_to(partial)), _size(path)])
        for name in names:
            assert finished is not None
            if "dataset" in what:
                facts = dataset.export(finished, name, partial / "dataset" / name, _command(flag, name, "dataset"))
                for file in facts.files:
                    path = partial / "dataset" / name / f"{file.name}.jsonl"
                    lines = f"{file.lines:,} conversations, {_size(path)}"
                    written.append(["dataset", name, str(path.relative_to(partial)), lines])
            if "model" in what:
                told = model.export(finished, name, partial / "model" / name, _command(flag, name, "model"))
                text = f"{told.parameters:,} parameters, {told.architecture}"
                written.append(["model", name, f"model/{name}", text])
    print("\n".join([f"written to {out}", *aligned(["what", "model", "file or folder", "size"], written)]))
    if measured:
        print(f"look at the logs: inspect view --log-dir {shlex.quote(str(out / 'inspect'))}")


def _checked(flag: flags.FlagValues) -> tuple[Path, list[str]]:
    """Where to and what; refuses what no run could give."""
    if bool(flag.workdir) == bool(flag.cells):
        raise ValueError("give either --workdir (a finished run, e.g. runs/demo) or --cells (a grid's, e.g. docs/grid)")
    unknown = [name for name in flag.what if name not in WHAT]
    if unknown or not flag.what:
        raise ValueError(f"--what={','.join(flag.what)}: use some of {', '.join(WHAT)}")
    if not flag.condition:
        raise ValueError("--condition is empty; name models, e.g. --condition=student")
    if flag.cells and list(flag.what) != ["inspect"]:
        raise ValueError(
            "cells hold measurements alone: with --cells say --what=inspect, or name the run with --workdir"
        )
    if flag.cells and not flag.setting:
        raise ValueError(f"--cells holds several settings; say which with --setting ({', '.join(sorted(SETTINGS))})")
    if not flag.out:
        raise ValueError("--out is not given; say which folder to make, e.g. --out=exported")
    out = artifacts.workdir(flag.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={flag.out} exists and is not empty; name another folder, or remove it")
    return out, list(dict.fromkeys(flag.what))


def _names(run: FinishedSeed, wanted: Sequence[str], what: Sequence[str]) -> list[str]:
    """The models of which a dataset or a folder is wanted."""
    from subl_jax.exports.finished import ExportError, resolve

    if not set(what) - {"inspect"}:
        return []
    if _EVERY in wanted:
        raise ExportError("--condition=all is for --what=inspect; name the students whose dataset or model you want")
    known = list(dict.fromkeys([*run.students, *run.evaluated]))
    return [resolve(name, known, str(run.root)) for name in wanted]


def _measured(run: FinishedSeed | None, flag: flags.FlagValues) -> list[Measured]:
    """The evaluations of the models that were asked for."""
    from subl_jax.exports import committed
    from subl_jax.exports.finished import resolve

    if run is None:
        directory = Path(flag.cells)
        known = committed.models(directory, flag.setting, flag.seed)
        wanted = known if _EVERY in flag.condition else flag.condition
        names = [resolve(name, known, f"{directory / flag.setting} at seed {flag.seed}") for name in wanted]
        return [committed.measured(directory, flag.setting, flag.seed, name) for name in dict.fromkeys(names)]
    wanted = run.evaluated if _EVERY in flag.condition else flag.condition
    names = [resolve(name, run.evaluated, str(run.root)) for name in wanted]
    return [run.evaluation(name) for name in dict.fromkeys(names)]


def _command(flag: flags.FlagValues, name: str, what: str) -> str:
    """The command that writes this part again."""
    parts = [f"--workdir={flag.workdir}", f"--seed={flag.seed}", f"--what={what}", f"--condition={name}", "--out=DIR"]
    return f"python -m experiments.export {' '.join(map(shlex.quote, parts))}"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e3:,.0f} kB"
