"""The command that locates: flags in; `locate.json`, tables as CSV, figures, a page and a printed table out."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from subl_jax import artifacts
from subl_jax.config import PAIRS
from subl_jax.experiment import seeds_from_flags, stopping_with_a_line
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from subl_jax.settings.registry import get_setting


def define_flags() -> None:
    """The flags; the configuration is the work directory's own."""
    flags.DEFINE_string(
        "workdir", None, "Work directory of a finished run, or of one setting of a grid (runs/grid/api). Only read."
    )
    flags.DEFINE_string("out", None, "Directory of what is written.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of the work directory; each is a replicate.")
    flags.DEFINE_list(
        "pair", [], f"Pairs whose students are looked at, some of {', '.join(PAIRS)}; the run's own if none."
    )
    flags.DEFINE_list("arms", [], "Objectives of the students, e.g. full,hard; all that are there if none.")
    flags.DEFINE_integer("tasks", 120, "Ambiguous tasks at whose first decision the states are read.")
    flags.DEFINE_integer("documents", 200, "Clean documents whose states are read; 0: all. Divergences are of all.")
    flags.DEFINE_enum(
        "split", "development", ["development", "evaluation"],
        "Of the ambiguous tasks. No model was trained on either; evaluation is what confirming runs are measured on.",
    )  # fmt: skip
    flags.DEFINE_integer("shown", 30, "Places of the ranked list that the page shows in context.")
    flags.DEFINE_integer("top", 5, "Likeliest tokens shown there for every model.")
    flags.DEFINE_bool("reverse", False, "Also the divergence in the other direction, KL(other || biased teacher).")


def main() -> None:
    """Looks into a work directory; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        _run()


def _run() -> None:
    from subl_jax.locate import workdir as found
    from subl_jax.locate.seed import Options

    flag = flags.FLAGS
    for name, what in {"workdir": "which run is looked into, e.g. runs/mine", "out": "where the page goes"}.items():
        if not flag[name].value:
            raise ValueError(f"--{name} is not given; say {what}")
    workdir, out = artifacts.workdir(flag.workdir), artifacts.workdir(flag.out)
    if out.absolute() == workdir.absolute():
        raise ValueError(f"--out={out} is the work directory, which is only read; give another directory")
    unknown = [pair for pair in flag.pair if pair not in PAIRS]
    if unknown:
        raise ValueError(f"--pair: {unknown[0]!r} is unknown, use some of {', '.join(PAIRS)}")
    given: dict[str, Any] = {field.name: flag[field.name].value for field in dataclasses.fields(Options)}
    options = Options(**given)
    seeds, config = seeds_from_flags(), found.read_config(workdir)
    processes.only_one("experiments.locate")
    # Models of one device each are read by one: two would work out everything twice.
    spread = config.parallel.fsdp * config.parallel.tensor > 1
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data=0))
    configure_cpu(config.cpu_devices if spread else 1)
    artifacts.check_writable(out)
    result, tables = look(workdir, config, flag.pair or [config.pair], seeds, flag.arms, options)
    write(out, result, tables)


def look(
    workdir: Path, config: Any, pairs: Sequence[str], seeds: Sequence[int], arms: Sequence[str], options: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Everything of some pairs and seeds.

    Args:
      workdir, config: the work directory and its configuration.
      pairs, seeds, arms: what is looked at.
      options: `locate.seed.Options`.

    Returns:
      The value of `locate.json`, and the rows of each CSV file by its name.

    Raises:
      ValueError: a seed that is not finished.
    """
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax.conditions import SeedModels
    from subl_jax.locate import seed as one_seed
    from subl_jax.locate import summary
    from subl_jax.locate import workdir as found
    from subl_jax.metrics.progress import progress

    setting = get_setting(config.setting)
    models = {
        (pair, seed): SeedModels(dataclasses.replace(config, pair=pair), workdir, seed)
        for pair in pairs
        for seed in seeds
    }
    for (_, seed), each in models.items():
        found.require(each, seed)
    by_teacher = {(each.teacher_size, seed): each for (_, seed), each in models.items()}
    work = sum(one_seed.token_work(each) for each in by_teacher.values())
    work += sum(one_seed.direction_work(each, arms) for each in models.values())
    tables: dict[str, list[dict[str, Any]]] = {"directions": [], "weights": []}
    tokens: dict[str, dict[int, Any]] = {}
    moved: dict[str, dict[int, Any]] = {}
    with progress(work, "locate", unit="model") as shown:
        for (size, seed), each in by_teacher.items():
            figures, rows = one_seed.locate_tokens(each, setting, options, shown.advance)
            tokens.setdefault(size, {})[seed] = figures
            tables[f"tokens-{size}-seed={seed}"] = rows
        for (pair, seed), each in models.items():
            told = one_seed.locate_directions(each, setting, options, arms, shown.advance)
            moved.setdefault(pair, {})[seed] = told
            for part, name in (("activations", "directions"), ("weights", "weights")):
                tables[name] += [{"pair": pair, "seed": seed, **row} for row in told[part]]
    about = {
        "setting": config.setting,
        "preset": config.preset,
        "workdir": str(workdir),
        "seeds": list(seeds),
        "pairs": list(pairs),
        "options": dataclasses.asdict(options),
        "versions": artifacts.versions(),
    }
    result = summary.result(tokens, moved, about)
    return result, {name: rows for name, rows in tables.items() if rows}


def write(out: Path, result: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes everything into a directory and prints the table."""
    from subl_jax.report import figures
    from subl_jax.report import locate as report

    artifacts.write_json_atomic(out / "locate.json", result)
    for name, rows in tables.items():
        _write_csv(out / f"{name}.csv", rows)
    report.write_report(out / "locate.html", result)
    figures.export(out / "figures", report.drawings(result))
    print(report.table(result))
    print(f"{out / 'locate.json'}  {out / 'locate.html'}  {out / 'figures'}")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
