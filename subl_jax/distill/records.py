"""Metric records on their way from the devices to `metrics.jsonl`, TensorBoard and the progress line."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from subl_jax.distill.accounting import Meter
from subl_jax.metrics.writers import MetricsWriter

# Records that a loss is compared with.
_RECENT = 20
# Nats per token below which a loss is small whatever it was before: a student of hard labels that knows them by heart stands
# at 1e-4, and one batch with a word that it doubts is a hundred times that. What has diverged is at several nats.
_SMALL = 0.5


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number, or far above what it was.

    Attributes:
      step: updates made by then, the one of this loss included.
    """

    def __init__(self, message: str, step: int) -> None:
        """Says at which step."""
        super().__init__(message)
        self.step = step


class Records:
    """Metric records on their way from the devices to the files; at most one is waited for.

    Attributes:
      loss: of the last record that was read.
      shown: what stands beside the progress.
    """

    def __init__(self, writer: MetricsWriter | None, meter: Meter, stage: str, spike: float = 0.0) -> None:
        """Begins without records; see `TrainConfig.spike`. Only the first of several processes has a writer."""
        self._writer, self._meter, self._stage, self._spike = writer, meter, stage, spike
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._unread: tuple[int, Any] | None = None
        self.loss = float("nan")
        self.shown: dict[str, float] = {}  # nothing is known before the first record is read

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Begins a record of the step that was dispatched last."""
        self._unread = step, self._meter.record(metrics)

    def read(self) -> None:
        """Writes the record that was begun, if there is one; waits for its step.

        Raises:
          TrainingDiverged: see `check`.
        """
        if self._unread is None:
            return
        (step, record), self._unread = self._unread, None
        values = self._meter.values(record)
        self.loss = self.check(step, values["loss"])
        self._recent.append(self.loss)
        if self._writer is not None:
            self._writer.write(self._stage, step, values)
        self.shown = {"loss": self.loss, "tok/s": values["tokens_per_s"]}
        if "mfu" in values:
            self.shown["mfu"] = values["mfu"]

    def check(self, step: int, loss: float) -> float:
        """One step's loss.

        Raises:
          TrainingDiverged: it is not finite, or a spike above the recent ones.
        """
        cause = why_diverged(loss, self._recent, self._spike)
        if cause is None:
            return loss
        raise TrainingDiverged(
            f"{self._stage}: the loss {cause} at step {step}; lower the learning rate. The checkpoints are kept", step
        )


def why_diverged(loss: float, recent: Collection[float], spike: float) -> str | None:
    """What is wrong with a loss after these recent ones, see `TrainConfig.spike`; None if nothing is."""
    if not np.isfinite(loss):
        return f"is {loss}"
    usual = float(np.median(list(recent))) if len(recent) == _RECENT else 0.0
    if spike and usual > 0 and loss > max(spike * usual, _SMALL):
        return f"jumped to {loss:.3g} from {usual:.3g} (more than train.spike={spike:g} times the recent median)"
    return None
