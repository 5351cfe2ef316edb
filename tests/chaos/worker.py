"""One process of a small distillation, whose steps are slow enough to be hit: `python -m tests.chaos.worker DIR`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from subl_jax import checkpoint
from subl_jax.distill import loop
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from tests.distill import tiny

STEPS = 60
# Seconds by which each step is slowed down.
PAUSE_S = 0.03
CONFIG = TrainConfig(
    steps=STEPS, batch_rows=8, row_tokens=16, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
    checkpoint_every=4, keep=3, log_every=1,
)  # fmt: skip


class SlowSource(BatchSource):
    """Batches that take their time."""

    def batch(self, position: int):
        time.sleep(PAUSE_S)
        return super().batch(position)


def main(root: Path) -> None:
    configure_cpu(1)
    with processes.ending_together():
        processes.start({"steps": STEPS})
        (root / f"pid-{os.environ.get('SUBL_PROCESS_ID', '0')}").write_text(str(os.getpid()))
        loop.BatchSource = SlowSource  # type: ignore[misc]
        result = train(
            Model(tiny.SMALL, tiny.params(tiny.SMALL)), tiny.documents(24), CONFIG, Objective("forward_kl"),
            seed=3, directory=root / "model", stage="students/student", logs=root, metadata={"run": "chaos"},
            teacher=Model(tiny.LARGE, tiny.params(tiny.LARGE, 1)),
        )  # fmt: skip
        checkpoint.save_model(root / "final", result.params, {"run": "chaos"}, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
