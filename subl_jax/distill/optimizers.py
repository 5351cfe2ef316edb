"""Optimizers and schedules by name: clipping, the update rule, decoupled weight decay, the learning rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import optax

# Names of the leaves that decay: the layers' matrices, and adapters wherever they sit.
_DECAYED = ("kernel", "lora_a", "lora_b")
Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule: linear warm-up, then the schedule down to `final_fraction` of the peak.

    Attributes:
      name: `adamw`, `lion` or `sgd`.
      learning_rate: the peak.
      warmup_steps, final_fraction: shape of the schedule.
      weight_decay: decoupled; matrices only.
      b1, b2: Adam's moments (and Lion's).
      clip_norm: global gradient norm above which gradients are scaled down.
      schedule: what follows the warm-up: `cosine`, `linear`, or `constant` (which knows no final fraction).
      momentum: of `sgd`; 0: none.
    """

    name: Literal["adamw", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    clip_norm: float = 1.0
    schedule: Schedule = "cosine"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values with which no run could learn."""
        for name, low, high in (
            ("final_fraction", 0.0, 1.0), ("b1", 0.0, 1.0), ("b2", 0.0, 1.0), ("momentum", 0.0, 1.0),
            ("warmup_steps", 0, math.inf), ("weight_decay", 0.0, math.inf),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is outside [{low}, {high}]")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; it must be positive and finite")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum={self.momentum} is sgd's; {self.name} has b1 and b2")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step, of a run of so many steps."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    peak, length = config.learning_rate, max(steps, warmup + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, length, peak * config.final_fraction)
    end = peak * config.final_fraction if config.schedule == "linear" else peak
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, optax.linear_schedule(peak, end, length - warmup)], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then the named optimizer under its schedule.

    Raises:
      ValueError: an unknown optimizer.
    """

    def matrices(params: Any) -> Any:  # norms, biases, embedding and head do not decay
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)

    rules = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "sgd": lambda: optax.trace(config.momentum) if config.momentum else optax.identity(),
    }
    if config.name not in rules:
        raise ValueError(f"unknown optimizer {config.name!r}; use {', '.join(rules)}")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        rules[config.name](),
        optax.add_decayed_weights(config.weight_decay, matrices) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
