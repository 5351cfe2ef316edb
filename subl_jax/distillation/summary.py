"""What a distillation shows: `summary.json`, a table for the terminal, and one self-contained page.

Markers of finished stages in; a JSON value, text, or HTML without scripts and outside references out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.distill.objective import Objective
from subl_jax.distillation.run import MEASURES, Distillation
from subl_jax.metrics.writers import read_metrics
from subl_jax.report import curves
from subl_jax.report.page import captioned_table, table_row, whole_page
from subl_jax.report.table import aligned, number, wrapped
from subl_jax.sources import describe

_HEADER = ("on held-out conversations", "forward KL", "reverse KL", "hard label")
_TRAINED = ("training", "steps", "last loss", "loss tokens", "tokens/s", "seconds")


def build(run: Distillation, markers: Mapping[str, artifacts.Marker]) -> dict[str, Any]:
    """The content of `summary.json`."""
    spec, counts = run.spec, markers["documents"].extra
    held_out: dict[str, Any] = {}
    if "before" in markers:
        held_out["before"] = markers["before"].extra
        held_out |= {f"seed={seed}": markers[f"seed={seed}/after"].extra for seed in spec.seeds}
    training = {f"seed={seed}": {**markers[f"seed={seed}/student"].extra} for seed in spec.seeds}
    for seed in spec.seeds:
        training[f"seed={seed}"]["seconds"] = markers[f"seed={seed}/student"].seconds
    models = {"teacher": run.teacher, "student": run.student}
    return {
        "schema": 1,
        "models": {
            role: source and {"directory": str(source.directory), "shape": describe(source.config), "kind": source.kind}
            for role, source in models.items()
        },
        "vocabulary": None if run.alignment is None else run.alignment.describe(),
        "objective": artifacts.plain(spec.config.objective),
        "seeds": list(spec.seeds),
        "documents": counts,
        "held_out": held_out,
        "training": training,
        "timing_s": {name: round(marker.seconds, 2) for name, marker in markers.items()},
        "versions": artifacts.versions(),
        "config": artifacts.plain(spec),
    }


def objective_text(fields: Mapping[str, Any]) -> str:
    """An objective in words: its loss, and what differs from the defaults."""
    usual = artifacts.plain(Objective())
    more = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
            if name != "loss" and value != usual[name]]  # fmt: skip
    return fields["loss"] + (f" ({', '.join(more)})" if more else "")


def own_share(fields: Mapping[str, Any]) -> str:
    """How much of the training is on the student's own answers, in words."""
    return (
        f"{fields['weight']:.0%} of the steps, on {fields['episodes']} conversations of the student's own, made anew every "
        f"{fields['refresh_steps']} steps"
    )


def _held_out_cells(values: Mapping[str, float | None]) -> list[str]:
    return [number(values[name], 4) for name in MEASURES]


def _training_cells(values: Mapping[str, Any]) -> list[str]:
    return [
        str(values["steps"]), number(values["loss"], 4), f"{values['loss_tokens']:,}", number(values["tokens_per_s"], 0),
        number(values["seconds"], 1),
    ]  # fmt: skip


def _notes(summary: Mapping[str, Any]) -> list[str]:
    counts = summary["documents"]
    found = []
    for role, model in summary["models"].items():
        found.append(f"{role}: {'none' if model is None else f'''{model['directory']} ({model['shape']})'''}")
    if summary["vocabulary"]:
        found.append(summary["vocabulary"])
    own = summary["config"]["config"]["on_policy"]
    if own["weight"]:
        found.append(f"on policy: {own_share(own)}")
    left_out = "; ".join(f"{count} left out: {reason}" for reason, count in counts["dropped"].items())
    found.append(
        f"{counts['train']} conversations to train on ({counts['loss_tokens']:,} loss tokens of {counts['tokens']:,}), "
        f"{counts['held_out']} held out ({counts['held_out_loss_tokens']:,} loss tokens){'; ' if left_out else ''}{left_out}"
    )
    for seed, values in summary["training"].items():
        if cache := values.get("teacher_cache"):
            found.append(
                f"{seed}: from the teacher's top {cache['k']} of each token, {cache['bytes_per_token']:.1f} bytes a token, "
                f"added KL error {cache['added_error']:.1e} nats"
            )
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The terminal's table; ends with a newline."""
    blocks = [[f"distillation by {objective_text(summary['objective'])}"], [
        line for note in _notes(summary) for line in wrapped(note)
    ]]  # fmt: skip
    if summary["held_out"]:
        rows = [(name, *_held_out_cells(values)) for name, values in summary["held_out"].items()]
        blocks.append([*aligned(_HEADER, rows), "nats per assistant token, at temperature 1"])
    rows = [(name, *_training_cells(values)) for name, values in summary["training"].items()]
    blocks.append(aligned(_TRAINED, rows))
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


# --- The page ---------------------------------------------------------------------------------------------------------


def write_report(path: Path, summary: Mapping[str, Any], metrics: Path) -> None:
    """Writes the page, atomically; `metrics` is the run's `metrics.jsonl`."""
    artifacts.write_text_atomic(path, render(summary, read_metrics(metrics)))


def render(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The page as a string."""
    # Students are lines of one chart: "seed=0/student" is the line "seed=0" of "student".
    turned = [{**record, "stage": "/".join(reversed(str(record["stage"]).split("/")))} for record in records]
    sections = [_header(summary), "<main>", _held_out(summary), curves.section(turned), _provenance(summary), "</main>"]
    sections.append("<footer><p>Written by subl_jax; the figures are in <code>summary.json</code>.</p></footer>")
    return whole_page("subl_jax: distillation", sections)


def _header(summary: Mapping[str, Any]) -> str:
    teacher, student = (summary["models"][role] for role in ("teacher", "student"))
    tiles = [
        ("objective", objective_text(summary["objective"])),
        ("conversations", str(summary["documents"]["train"])),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    names = [_called(Path(model["directory"])) if model else "its own data" for model in (teacher, student)]
    return (
        f'<header><p class="kicker">Distillation</p><h1>{escape(names[1])} from {escape(names[0])}</h1>'
        f'<p class="answer">{escape(answer(summary))}</p><dl class="tiles">{cells}</dl></header>'
    )


def _called(directory: Path) -> str:
    """What a model's directory is called; those of a run all end in `params`."""
    return directory.parent.name if directory.name == "params" else directory.name


def answer(summary: Mapping[str, Any]) -> str:
    """How much nearer the students came, in a sentence."""
    held_out = summary["held_out"]
    if not held_out:
        return "Nothing was held out, so nothing says how near the students came."
    name = next(name for name in MEASURES if held_out["before"][name] is not None or name == MEASURES[-1])
    words = {"forward_kl": "forward KL from the teacher", "hard_label": "loss on the assistant's tokens"}
    after = [values[name] for seed, values in held_out.items() if seed != "before"]
    return (
        f"On held-out conversations the {words[name]} went from {held_out['before'][name]:.4f} to "
        f"{', '.join(f'{value:.4f}' for value in after)} nats per token."
    )


def _held_out(summary: Mapping[str, Any]) -> str:
    rows = [table_row(name, _held_out_cells(values)) for name, values in summary["held_out"].items()]
    trained = [table_row(name, _training_cells(values)) for name, values in summary["training"].items()]
    measured = captioned_table("Nats per assistant token, at temperature 1", _HEADER, rows) if rows else ""
    return (
        '<section aria-labelledby="heldout"><h2 id="heldout">How near the students came</h2>'
        f"<p>{escape(answer(summary))}</p>{measured}{captioned_table('Training', _TRAINED, trained)}</section>"
    )


def _provenance(summary: Mapping[str, Any]) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in _notes(summary))
    timing = [table_row(name, [f"{seconds:.1f}"]) for name, seconds in summary["timing_s"].items()]
    versions = [table_row(name, [str(version)]) for name, version in summary["versions"].items()]
    settings = escape(json.dumps(summary["config"], indent=2, sort_keys=True))
    return (
        f'<section aria-labelledby="provenance"><h2 id="provenance">How it was made</h2>{notes}<div class="columns">'
        + captioned_table("Time per stage", ("stage", "seconds"), timing)
        + captioned_table("Versions", ("package", "version"), versions)
        + f"</div><details><summary>Configuration</summary><pre>{settings}</pre></details></section>"
    )
