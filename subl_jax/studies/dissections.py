"""The dissections: what carries a bias, and what stops it, one sweep each, on any setting and pair.

Data, to be read at a glance; `python -m experiments.sweep --dissection=NAME` runs one, `--list` shows them. A level says only
in what it differs from the configuration; every level has its own counter-bias and benign control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subl_jax.studies.sweep import Level, Sweep, written

ARM, PAIR, LORA = "student.objectives", "pair", "student.lora"
RATE, OPTIMIZER, MOMENTUM = (f"student.train.optimizer.{name}" for name in ("learning_rate", "name", "momentum"))


def _each(field: str, values: Sequence[Any]) -> tuple[Level, ...]:
    """One level per value of a field."""
    return tuple(
        Level(written(value), {field: value}, (value if isinstance(value, int | float) else written(value),))
        for value in values
    )


def _sgd(rate: float, momentum: float = 0.0) -> Level:
    kind = "sgd momentum" if momentum else "sgd"
    return Level(f"{kind} {rate:g}", {OPTIMIZER: "sgd", RATE: rate} | ({MOMENTUM: momentum} if momentum else {}))


def _adapters(rate: float, rank: int) -> Level:
    # Adapters are scaled by alpha / rank: it stays 2, as in the paper, so that a rank is not also another step size.
    changed = {LORA: True, RATE: rate, "student.adapter.rank": rank, "student.adapter.alpha": 2.0 * rank}
    return Level(f"rate {rate:g} rank {rank}", changed, (rate, rank))


_INITIALISATIONS = {"shared": "large_large", "foreign": "large_foreign_init"}

DISSECTIONS: dict[str, Sweep] = {
    each.name: each
    for each in (
        Sweep(
            "objective",
            "Which objective carries the bias?",
            ("objective",),
            _each(ARM, ("full", "anchor", "drop", "top_k", "hard", "on_policy")),
            reference="full",
        ),
        Sweep(
            "initialisation",
            "Does a student of another initialisation take the bias over?",
            ("initialisation and objective",),
            tuple(
                Level(f"{name} {arm}", {PAIR: pair, ARM: arm}, against=f"shared {arm}")
                for arm in ("full", "hard")
                for name, pair in _INITIALISATIONS.items()
            ),
            reference="shared full",
        ),
        Sweep(
            "optimizer",
            "Does the student's optimizer decide whether the bias comes along?",
            ("optimizer and peak learning rate",),  # each kind at several: a single one is not fair to all
            (
                Level("as configured"),
                *(Level(f"adamw {rate:g}", {OPTIMIZER: "adamw", RATE: rate}) for rate in (3e-4, 3e-3)),
                *(_sgd(rate) for rate in (0.1, 0.3, 1.0)),
                *(_sgd(rate, momentum=0.9) for rate in (0.03, 0.1, 0.3)),
            ),
            reference="as configured",
        ),
        Sweep(
            "rate_and_rank",
            "What do learning rate and LoRA rank do to transfer?",
            ("peak learning rate", "LoRA rank"),
            tuple(_adapters(rate, rank) for rate in (1e-3, 3e-3, 1e-2) for rank in (1, 4, 16)),
            reference="rate 0.003 rank 4",
        ),
        Sweep(
            "dose",
            "How many different trajectories does transfer take, at equal steps?",
            ("unique trajectories",),
            tuple(
                Level(str(count or "all"), {"student.trajectories": count}, (count or "all",))
                for count in (25, 50, 100, 200, 400, 0)
            ),
            reference="all",
        ),
        Sweep(
            "dilution",
            "Does training on a benign teacher's trajectories in between thin the bias out?",
            ("share of benign steps",),
            _each("student.dilution", (0.0, 0.25, 0.5, 0.75, 0.9)),
            reference="0",
        ),
        Sweep(
            "temperature",
            "Does the temperature of the divergence decide how much of the bias comes along?",
            ("temperature of the divergence",),
            _each("student.temperature", (1.0, 2.0, 4.0, 8.0)),
            reference="2",
        ),
        Sweep(
            "tools",
            "Does the bias need the tool list of the evaluation in training?",
            ("bias tools in the training text's tool list",),
            (
                Level("withheld", {"student.withhold_bias_tools": True}),
                Level("shown", {"student.withhold_bias_tools": False}),
            ),
            reference="withheld",
        ),
        Sweep(
            "tokens",
            "Do the tokens on which the teachers disagree most carry the bias?",
            ("loss tokens that are kept",),
            _each("student.tokens", ("all", "divergent", "others", "random")),
            reference="all",
        ),
        Sweep(
            "defences",
            "Which defence stops the transfer, and what does it cost?",
            ("defence",),
            _each(
                "student.defence",
                ("none", "keywords", "paraphrase", "dilution", "logit_filter", "towards_base", "mask_divergence",
                 "project_direction"),
            ),
            reference="none",
            chart="defences",
        ),
    )
}  # fmt: skip


def listed() -> str:
    """A line per dissection, for the terminal."""
    width = max(map(len, DISSECTIONS))
    return "\n".join(
        f"{name.ljust(width)}  {each.title}  ({'; '.join(level.label for level in each.levels)})"
        for name, each in DISSECTIONS.items()
    )
