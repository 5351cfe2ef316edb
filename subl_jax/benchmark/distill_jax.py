"""Our distillation step as one side of the `distill` workload. Run as `python -m subl_jax.benchmark.distill_jax RECIPE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax.benchmark import machine, step_worker
from subl_jax.benchmark.rollout import Model
from subl_jax.benchmark.step_worker import Recipe
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import Batch, Frozen, TrainState, compiled_step, place_batch
from subl_jax.trajectory import Trajectory

# Of the schedule, which is constant here.
_STEPS = 1000


class JaxStep:
    """The step that every training run of this project takes."""

    def __init__(self, recipe: Recipe):
        """Loads both models."""
        self._compilations = machine.jax_compilations()
        self._recipe = recipe
        student, teacher = Model.load(Path(recipe.student)), Model.load(Path(recipe.teacher))
        optimizer = OptimizerConfig(
            name="adamw", learning_rate=recipe.learning_rate, warmup_steps=0, final_fraction=1.0, b1=recipe.b1,
            b2=recipe.b2, weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm,
        )  # fmt: skip
        transformation = make_optimizer(optimizer, _STEPS)
        state = TrainState(student.params, jax.jit(transformation.init)(student.params), jnp.zeros((), jnp.int32))
        # Placed, as the training loop does: a step returns placed arrays, and would compile again for them.
        self._state = jax.device_put(state, jax.local_devices()[0])
        self._frozen = Frozen(teacher=teacher.params)
        self._step = compiled_step(
            Objective("forward_kl", temperature=1.0), student.config, teacher.config, optimizer, _STEPS, 0
        )
        held = (self._state.params, self._state.opt_state, self._frozen)
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def prepare(self, tokens: list[list[int]]) -> Batch:
        """Packs the rows as the input pipeline does."""
        documents = [document(number, ids, self._recipe.prompt) for number, ids in enumerate(tokens)]
        lengths = [len(ids) for ids in tokens]
        return BatchSource(documents, lengths, self._recipe.length, self._recipe.rows, 1, seed=0).batch(0)

    def step(self, given: Batch) -> tuple[float, float]:
        """Transfers the batch and takes a step."""
        self._state, metrics = self._step(self._state, self._frozen, place_batch(given))
        jax.block_until_ready(self._state)
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    def compilations(self) -> int:
        """Programs that XLA compiled."""
        return self._compilations()

    def facts(self) -> dict[str, Any]:
        """Nothing: the document of the command names our versions."""
        return {}


def document(number: int, tokens: list[int], prompt: int) -> Trajectory:
    """A row of the batch as an episode: a prompt, and what the model is trained on."""
    ids = np.asarray(tokens, np.int32)
    return Trajectory(
        episode=number, task_id=f"document{number}", sample=0, tokens=ids, loss_mask=np.arange(len(ids)) >= prompt,
        logprobs=np.zeros(len(ids), np.float32), messages=[], tools=[], status="final", done=True,
    )  # fmt: skip


if __name__ == "__main__":
    step_worker.serve(JaxStep, sys.argv[1])
