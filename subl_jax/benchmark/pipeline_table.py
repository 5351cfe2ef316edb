"""The pipeline workload's rows as text: where the time went, tokens per second, and whether runs agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.benchmark.pipeline_runs import LOSS_BAR, TRAINED, Spent
from subl_jax.benchmark.results import Row, aligned

_COMPARED = (
    "case", "against", "teachers' weights", "equal episodes", "loss base", "teachers", "students", "rates", "verdict",
)  # fmt: skip
_CHECKED = f"""\
the same run? episodes: tokens and loss mask, bit for bit, of equal weights (own: the run's own teachers are equal; lent:
they differ by rounding, so the other's teachers were rolled out on this case's devices); loss: largest relative difference
of final losses, bar {LOSS_BAR:.0e} (-: not checked, students saw other episodes); rates: conditions of which each rate lies
in the other's 95 % interval:
"""


def table(found: Sequence[Row]) -> str:
    """Seconds and shares by stage, tokens per second by stage, and what was compared, as aligned text."""
    parts = list(found[0].extra["stages"]) if found else []
    spent = {row.case: {part: Spent(**row.extra["stages"][part]) for part in parts} for row in found}
    times: list[tuple[str, ...]] = [("case", "runs", "wall s", "/ one device", *parts)]
    rates: list[tuple[str, ...]] = [("case", "whole run", "compile s", *(p for p in parts if _counted(p)))]
    agree: list[tuple[str, ...]] = [_COMPARED]
    for row in found:
        of = spent[row.case]
        over = row.extra["wall_over_one_device"]
        shares = [f"{of[part].seconds:.1f} {of[part].share:4.0%}" for part in parts]
        times.append((row.case, str(row.runs), f"{row.median_s:.1f}", "-" if over is None else f"{over:.2f}", *shares))
        each = [f"{of[part].tokens_per_s or 0:.0f}" for part in parts if _counted(part)]
        rates.append((row.case, f"{row.tokens_per_s:.0f}", f"{row.compile_s:.1f}", *each))
        agree += [_agreement(row.case, other, told) for other, told in row.extra["compared"].items()]
    tables = [
        "seconds of each family of stages and its share of the wall time:\n" + aligned(times),
        "tokens per second (sampled or trained on; loading, compiling and writing included):\n" + aligned(rates),
    ]
    if len(agree) > 1:
        tables.append(_CHECKED + aligned(agree))
    return "\n\n".join(tables)


def _counted(part: str) -> bool:
    return part in (*TRAINED, "trajectories")


def _agreement(case: str, other: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    losses = ["-" if (value := told["losses"][name]) is None else f"{value:.1e}" for name in TRAINED]
    return (
        case, other, "equal" if told["weights_equal"] else "differ",
        f"{told['episodes_equal']}/{told['episodes']} {'lent' if told['borrowed'] else 'own'}", *losses,
        f"{told['conditions'] - len(told['rates_apart'])}/{told['conditions']}", "NO" if told["wrong"] else "yes",
    )  # fmt: skip


def failures(found: Sequence[Row]) -> list[str]:
    """Of each comparison that failed, what was wrong."""
    return [
        f"{row.case} is not the run of {other}: {', '.join(told['wrong'])}"
        for row in found
        for other, told in row.extra["compared"].items()
        if told["wrong"]
    ]
