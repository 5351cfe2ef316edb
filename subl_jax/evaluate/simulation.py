"""How often the intervals cover and the tests err, on made-up experiments whose truth is known.

    python -m subl_jax.evaluate.simulation                      two to three minutes on one core
    python -m subl_jax.evaluate.simulation --runs=200           a first look in some seconds
    python -m subl_jax.evaluate.simulation --out=coverage.json  the same figures for a program

In: how many experiments to make up, a seed, and the summaries of earlier runs. Out: what spread over seeds those show; what a
design with so much of it can find; and tables of coverage (within a run, over seeds) and of false positives under placebo.
Every decision is made by the functions of subl_jax.evaluate.statistics that analyse real runs. A star marks what misses its
promise by more than three Monte-Carlo standard errors.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from subl_jax import artifacts
from subl_jax.evaluate import power, simulated_runs, trials
from subl_jax.evaluate.simulated_runs import TASKS, Spread
from subl_jax.metrics.progress import progress
from subl_jax.settings.registry import get_setting

DESIGN_SEEDS = 5  # of the power table
_DOCS = Path(__file__).resolve().parents[2] / "docs"
_TITLES = {
    "coverage within a run": "Coverage within one run, % (should be 95): these two models on other families of the kind",
    "errors within a run": "False positives within one run, % (should be at most 5), under two placebos",
    "coverage over seeds": "Coverage over seeds, % (should be 95): the mean difference that the recipe makes",
    "errors over seeds": "False positives over seeds under placebo, % (should be at most 5; unadjusted promises nothing)",
    "claims": "False claims, %: a pair is the strongest of equal ones; equivalent where the difference is the margin",
}


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text; shares in percent, a star where one misses its promise by over three standard errors."""
    heads = list(dict.fromkeys(head for row in rows for head in row))

    def cell(value: Any) -> str:
        if isinstance(value, trials.Share):
            return f"{100 * value.value:.1f}{'*' if value.fails else ' '}"
        return "" if value is None else str(value)

    body = [[cell(row.get(head, "-")) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in body)) for i, head in enumerate(heads)]

    def joined(line: Sequence[str]) -> str:
        texts = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(texts).rstrip()

    return "\n".join([title, joined(heads), joined(["-" * width for width in widths]), *map(joined, body)])


def report_spreads(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What earlier runs show of the spreads, and what a design with as much spread can find, as text."""
    rows: list[trials.Row] = []
    sds: dict[str, float] = {}
    for summary in summaries:
        families = len(get_setting(summary["setting"]).families("ambiguous", "evaluation"))
        for found in simulated_runs.spreads_of(summary, families):
            family = None if found["family"] is None else f"{found['family']:.2f}"
            name = f"{summary['setting']}: {found['condition']}"
            rows.append(
                {
                    "condition": name,
                    "rate %": f"{100 * found['rate']:.1f}",
                    "own": f"{found['own']:.2f}",
                    "family": family,
                }
            )
        for contrast in summary["contrasts"]:
            if contrast["readout"] == "behaviour" and contrast["treatment"].startswith("student"):
                sds[f"{summary['setting']}: {contrast['name']}"] = max(1 / TASKS, power.spread(contrast))
    rates = (0.30, 0.05)
    apart = (rates[0] * (1 - rates[1]), rates[1] * (1 - rates[0]))
    designs = [
        f"n = {n:3}: Fisher {power.fisher_power(*rates, n):.3f}, McNemar {power.mcnemar_power(*apart, n):.3f}"
        for n in (20, TASKS)
    ]
    return [
        table("Spread over seeds and families in earlier runs, standard deviations on the logit scale", rows),
        "",
        *power.lines(sds, DESIGN_SEEDS, trials.PAIRS, margin=trials.MARGIN),
        "",
        "Power of one run of independent items, 30 % against 5 % (the paper's design has n = 20):",
        *designs,
    ]


def define_flags() -> None:
    """The command's flags."""
    present = [str(path) for name in ("api", "bash") if (path := _DOCS / f"{name}_tiny_summary.json").exists()]
    flags.DEFINE_integer("runs", 2000, "Made-up experiments per line; standard errors fall with its square root.", 10)
    flags.DEFINE_integer("seed", 0, "Of the made-up experiments; the same seed gives the same table.", 0)
    flags.DEFINE_list("summaries", present, "summary.json files of earlier runs, for the spreads and the power table.")
    flags.DEFINE_string("out", None, "File to write the figures to, as JSON.")


def main(_: Sequence[str]) -> None:
    """Runs the command; turns expected failures into one line and exit code 1."""
    try:
        _run(flags.FLAGS.runs, flags.FLAGS.seed, flags.FLAGS.summaries, flags.FLAGS.out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _run(runs: int, seed: int, summaries: Sequence[str], out: str | None) -> None:
    if out is not None and not Path(out).parent.is_dir():
        raise ValueError(f"--out={out}: {Path(out).parent} is not a directory; make it first")
    if summaries:
        print("\n".join(report_spreads([json.loads(Path(path).read_text("utf-8")) for path in summaries])), end="\n\n")
    spread = Spread()
    with progress(len(trials.LINES), "simulate", unit="line") as shown:
        tables = trials.simulate(runs, seed, spread, shown.advance)
    assumed = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(spread).items())
    print(f"{runs} made-up experiments per line, seed {seed}; {TASKS} tasks in {simulated_runs.FAMILIES} families")
    print(
        f"spread (logit): {assumed}; a treatment's typical rate: "
        + ", ".join(f"{n} {100 * r:g} %" for n, r in trials.LEVELS.items())
    )
    for name, rows in tables.items():
        print(f"\n{table(_TITLES[name], rows)}")
    if out is not None:
        plain = {
            name: [{head: _plain(value) for head, value in row.items()} for row in rows]
            for name, rows in tables.items()
        }
        document = {
            "schema": 1,
            "runs": runs,
            "seed": seed,
            "alpha": trials.ALPHA,
            "tasks": TASKS,
            "levels": trials.LEVELS,
        }
        document |= {"spread": dataclasses.asdict(spread), "tables": plain, "versions": artifacts.versions()}
        artifacts.write_json_atomic(out, document)
        print(out)


def _plain(value: Any) -> Any:
    return {"share": value.value, "n": value.n, "fails": value.fails} if isinstance(value, trials.Share) else value


if __name__ == "__main__":
    define_flags()
    app.run(main)
