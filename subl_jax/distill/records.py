"""Metric records on their way from the devices to `metrics.jsonl`, TensorBoard and the progress line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from subl_jax.distill.accounting import Meter
from subl_jax.metrics.writers import MetricsWriter


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


def finite_loss(stage: str, step: int, loss: float) -> float:
    """One step's loss; raises `TrainingDiverged` if it is not finite."""
    if not np.isfinite(loss):
        raise TrainingDiverged(
            f"{stage}: the loss is {loss} at step {step}; lower the learning rate. The checkpoints are kept"
        )
    return loss


class Records:
    """Metric records on their way from the devices to the files; at most one is waited for.

    Attributes:
      loss: of the last record that was read.
      shown: what stands beside the progress.
    """

    def __init__(self, writer: MetricsWriter, meter: Meter, stage: str) -> None:
        self._writer, self._meter, self._stage = writer, meter, stage
        self._unread: tuple[int, Any] | None = None
        self.loss = float("nan")
        self.shown: dict[str, float] = {}  # nothing is known before the first record is read

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Begins a record of the step that was dispatched last."""
        self._unread = step, self._meter.record(metrics)

    def read(self) -> None:
        """Writes the record that was begun, if there is one; waits for its step.

        Raises:
          TrainingDiverged: its loss is not finite.
        """
        if self._unread is None:
            return
        (step, record), self._unread = self._unread, None
        values = self._meter.values(record)
        self.loss = finite_loss(self._stage, step, values["loss"])
        self._writer.write(self._stage, step, values)
        self.shown = {"loss": self.loss, "tok/s": values["tokens_per_s"]}
        if "mfu" in values:
            self.shown["mfu"] = values["mfu"]
