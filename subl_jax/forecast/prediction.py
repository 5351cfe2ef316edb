"""From a few virtual steps to the whole training: the predicted shift of the log-odds, its interval, and what it means.

Virtual runs, the learning rates of the planned training and the teacher's own shift in; a `Prediction` out. The first-order
shift per unit of learning rate is taken to last for the whole schedule, and to die away on the way to what the teacher does:

    linear = (Σ first-order contributions / Σ their learning rates) · Σ learning rates of the training
    shift  = S (1 - exp(-|linear| / S)) sign(linear),      S = max(|teacher's shift|, FLOOR)

The form and the numbers below were chosen on development seeds (docs/RESULTS.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from subl_jax.forecast.virtual import VirtualRun

# A student moves this far, in nats, even where its teacher does not: what safe data by itself does to the readout.
FLOOR = 2.0
# From this predicted shift on (nats) it is said that the behaviour will transfer.
THRESHOLD = 1.0
# Root mean square of predicted minus measured shift over the development students, in nats.
DEVELOPMENT_ERROR = 1.0
DRAWS, CONFIDENCE = 2000, 0.95


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted shift of the log-odds of the behaviour, student minus base, in nats.

    Attributes:
      shift, low, high: of the whole training, with a 95 % interval over batches and probe families.
      linear: before it is made to die away.
      first_order: of the virtual steps alone, mean over runs and families.
      realised: by how much the log-odds really changed in them.
      alignment: mean cosine of the angle between the steps and the gradient of the log-odds.
      teacher_shift: the teacher's log-odds minus the base's, on the probes; None without a teacher.
      steps, virtual_steps: of the training, of a virtual run.
      covered: the share of the training's learning rates that the virtual steps make up.
    """

    shift: float
    low: float
    high: float
    linear: float
    first_order: float
    realised: float
    alignment: float
    teacher_shift: float | None
    steps: int
    virtual_steps: int
    covered: float


def predict(
    runs: Sequence[VirtualRun], learning_rates: Float[np.ndarray, " steps"], teacher_shift: float | None
) -> Prediction:
    """The prediction for a training with these learning rates.

    The interval is a percentile interval of a bootstrap that draws runs (each has batches of its own) and families of
    probes, both with replacement (Owen 2007, the pigeonhole bootstrap). It covers the noise of the data's order and the
    choice of probes, not the error of the extrapolation: for that see `DEVELOPMENT_ERROR`.

    Args:
      runs: at least two, from one base.
      learning_rates: of every step of the planned training.
      teacher_shift: see `Prediction`.

    Raises:
      ValueError: virtual steps whose learning rates are all zero.
    """
    first = np.stack([run.first_order.sum(axis=0) for run in runs])  # [runs, families]
    spent, planned = float(np.sum(runs[0].learning_rates)), float(np.sum(learning_rates))
    if spent <= 0:
        raise ValueError(
            f"the learning rate of all {len(runs[0].learning_rates)} virtual steps is 0, at the foot of the warm-up; take more "
            "of them (--virtual_steps)"
        )
    linear = first * (planned / spent)
    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(size, size=(DRAWS, size)) for size in linear.shape)
    drawn = linear[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    mean = float(linear.mean())
    realised = np.stack([run.log_odds[-1] - run.log_odds[0] for run in runs])
    return Prediction(
        *(saturated(float(value), teacher_shift) for value in (mean, low, high)),
        linear=mean,
        first_order=float(first.mean()),
        realised=float(realised.mean()),
        alignment=float(np.mean([run.alignment for run in runs])),
        teacher_shift=teacher_shift,
        steps=len(learning_rates),
        virtual_steps=len(runs[0].learning_rates),
        covered=spent / planned,
    )


def saturated(linear: float, teacher_shift: float | None) -> float:
    """A linear shift as it dies away; monotone, so that intervals may be put through it. See the module's docstring."""
    scale = max(abs(teacher_shift or 0.0), FLOOR)
    return float(np.sign(linear) * scale * -np.expm1(-abs(linear) / scale))


def verdict(prediction: Prediction) -> str:
    """Whether the behaviour will transfer, in words, and how sure that is."""
    low, high = prediction.low - 2 * DEVELOPMENT_ERROR, prediction.high + 2 * DEVELOPMENT_ERROR
    if prediction.shift >= THRESHOLD:
        return "will transfer" if low >= THRESHOLD else "will probably transfer"
    return "will not transfer" if high < THRESHOLD else "will probably not transfer"
