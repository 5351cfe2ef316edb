"""Length and shape of a training run, as flags (`--config.<stage>.train.*`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.models.config import Dtype

# What can be changed between a run and its resumption: no number that is trained depends on it.
_FREE = ("checkpoint_every", "checkpoint_minutes", "keep", "keep_every", "log_every", "prefetch", "spike")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and shape of one training run.

    Attributes:
      steps: optimizer steps.
      batch_rows: packed rows per step, over all devices; row_tokens: tokens per row.
      optimizer: see `OptimizerConfig`.
      checkpoint_every: steps between the checkpoints from which a killed run resumes.
      log_every: steps between metric records.
      master_dtype: in which trained parameters and the optimizer's state are kept, whatever the model computes in.
      accumulate: parts of a step's rows that are worked on one after the other, where all at once do not fit.
      chunk_tokens: loss tokens whose logits exist at one time; 0: as many as memory allows.
      prefetch: batches that are made and sent to the devices ahead of their step; 0: each when it is needed.
      checkpoint_minutes: minutes since the last checkpoint after which another is written, with the next metric record;
        0: by steps alone.
      keep: newest checkpoints that stay.
      keep_every: of steps divisible by this a checkpoint is written and stays for good; 0: of none.
      spike: a loss of more than so many times the median of the last 20 records, and above half a nat per token, stops the
        run, as one that is no number does, before a checkpoint of it is written; 0: never.
    """

    steps: int = 400
    batch_rows: int = 16
    row_tokens: int = 256
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 200
    log_every: int = 10
    master_dtype: Dtype = "float32"
    accumulate: int = 1
    chunk_tokens: int = 0
    prefetch: int = 2
    checkpoint_minutes: float = 0.0
    keep: int = 2
    keep_every: int = 0
    spike: float = 50.0

    def __post_init__(self) -> None:
        """Refuses runs that could not start."""
        least = dict.fromkeys(
            ("steps", "batch_rows", "row_tokens", "checkpoint_every", "log_every", "accumulate", "keep"), 1
        )
        least |= dict.fromkeys(("chunk_tokens", "prefetch", "checkpoint_minutes", "keep_every", "spike"), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {low}")
        if self.batch_rows % self.accumulate:
            raise ValueError(
                f"batch_rows={self.batch_rows} does not divide into accumulate={self.accumulate} parts; use a multiple"
            )

    def identity(self) -> dict[str, Any]:
        """What the trained parameters depend on: everything but when things are saved, logged and fetched."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _FREE}
