"""From a few virtual steps to the whole training: the predicted shift of the log-odds, its interval, and what it means.

Virtual runs, the learning rates of the planned training and the teacher's own shift in; a `Prediction` out. What the virtual
steps do is done; after them the rate of their last stretch, per unit of learning rate, goes on and dies away:

    done  = Σ first-order contributions of the virtual steps
    more  = (last contribution / its share s_l of the schedule) · DECAY (1 - exp(-(1 - s) / DECAY))
    shift = done + more,       or done + left (1 - exp(-more / left)) where it heads for the teacher

with shares of the sum of all learning rates (s: of all virtual steps), and left = the teacher's shift - done: a student that
follows its teacher comes to rest at it. Form and numbers were chosen on a development seed (docs/RESULTS.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from subl_jax.forecast.virtual import VirtualRun

# After which share of the schedule's learning rates the rate of the last stretch has fallen to 1/e.
DECAY = 0.15
# From this predicted shift on (nats) it is said that the behaviour will transfer.
THRESHOLD = 1.0
# Root mean square of predicted minus measured shift over the ten students that DECAY was chosen on, in nats.
DEVELOPMENT_ERROR = 0.53
DRAWS, CONFIDENCE = 2000, 0.95


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted shift of the log-odds of the behaviour, student minus base, in nats.

    Attributes:
      shift, low, high: of the whole training, with a 95 % interval over batches and probe families.
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
    first_order: float
    realised: float
    alignment: float
    teacher_shift: float | None
    steps: int
    virtual_steps: int
    covered: float


def predict(
    runs: Sequence[VirtualRun],
    ends: Sequence[int],
    learning_rates: Float[np.ndarray, " steps"],
    teacher_shift: float | None,
) -> Prediction:
    """The prediction for a training with these learning rates.

    The interval is a percentile interval of a bootstrap that draws runs (each has batches of its own) and families of
    probes, both with replacement (Owen 2007, the pigeonhole bootstrap). It covers the noise of the data's order and the
    choice of probes, as far as so few of both can tell, and not the error of the extrapolation: for that see
    `DEVELOPMENT_ERROR`.

    Args:
      runs: at least two, from one base.
      ends: after how many steps each stretch ends.
      learning_rates: of every step of the planned training.
      teacher_shift: see `Prediction`.

    Raises:
      ValueError: virtual steps whose learning rates are all zero.
    """
    total = np.concatenate([[0.0], np.cumsum(learning_rates)])
    shares = total[[0, *ends]] / total[-1]
    if not shares[-1] > shares[-2]:
        raise ValueError(
            f"the learning rate of the last virtual steps (up to step {ends[-1]}) is 0, at the foot of the warm-up; take more "
            "of them (--virtual_steps), or fewer stretches (--stretches)"
        )
    first = np.stack([run.first_order for run in runs])  # [runs, stretches, families]

    def shift(contributions: Float[np.ndarray, "*draws stretches"]) -> Float[np.ndarray, "*draws"]:
        return extrapolated(contributions, shares, teacher_shift)

    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(size, size=(DRAWS, size)) for size in (first.shape[0], first.shape[2]))
    drawn = np.moveaxis(first, 1, 2)[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(shift(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    realised = np.stack([run.log_odds[-1] - run.log_odds[0] for run in runs])
    return Prediction(
        float(shift(first.mean(axis=(0, 2)))),
        float(low),
        float(high),
        first_order=float(first.sum(axis=1).mean()),
        realised=float(realised.mean()),
        alignment=float(np.mean([run.alignment for run in runs])),
        teacher_shift=teacher_shift,
        steps=len(learning_rates),
        virtual_steps=ends[-1],
        covered=float(shares[-1]),
    )


def extrapolated(
    contributions: Float[np.ndarray, "*draws stretches"],
    shares: Float[np.ndarray, " ends"],
    teacher_shift: float | None,
) -> Float[np.ndarray, "*draws"]:
    """The shift of the whole training; see the module's docstring.

    Args:
      contributions: of each stretch, in nats.
      shares: of the schedule that are behind at the beginning and after each stretch.
      teacher_shift: None: nothing is known to come to rest at.
    """
    done = contributions.sum(axis=-1)
    rate = contributions[..., -1] / (shares[-1] - shares[-2])
    more = rate * DECAY * -np.expm1(-(1 - shares[-1]) / DECAY)
    if teacher_shift is None:
        return np.asarray(done + more)
    left = teacher_shift - done
    heading = more * left > 0
    return np.asarray(done + np.where(heading, left * -np.expm1(-more / np.where(heading, left, 1.0)), more))


def verdict(prediction: Prediction) -> str:
    """Whether the behaviour will transfer, in words, and how sure that is.

    Without "probably" where the interval, widened by twice the error of development students, lies on one side of the bar.
    """
    low, high = prediction.low - 2 * DEVELOPMENT_ERROR, prediction.high + 2 * DEVELOPMENT_ERROR
    if prediction.shift >= THRESHOLD:
        return "will transfer" if low >= THRESHOLD else "will probably transfer"
    return "will not transfer" if high < THRESHOLD else "will probably not transfer"
