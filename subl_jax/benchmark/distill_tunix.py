"""Tunix's distillation step as a side of the `distill` workload. Run by the Python of an environment with google-tunix.

    PYTHON -I distill_tunix.py RECIPE

Imports nothing of this project but `step_worker`, its neighbour. The step is what the loop of Tunix's
`DistillationTrainer` does with one batch: the teacher's outputs, then its jitted train step. Its `LogitStrategy` knows no
mask; the forward functions, which are the user's, return the logits of the loss tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import step_worker  # noqa: E402  # pyright: ignore[reportMissingImports]


class TunixStep:
    """Tunix's trainer on its own Llama."""

    def __init__(self, recipe: Any):
        """Loads both models."""
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx
        from tunix.distillation import distillation_trainer as trainers  # pyright: ignore[reportMissingImports]
        from tunix.distillation.strategies import logit  # pyright: ignore[reportMissingImports]

        compiled: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, duration_secs, **_: (
                compiled.append(event) if event.endswith("backend_compile_duration") else None
            )
        )
        self._compiled, self._jax, self._jnp, self._trainers = compiled, jax, jnp, trainers
        student, teacher = self._load(recipe.student), self._load(recipe.teacher)
        first, vocab = recipe.prompt, student.config.vocab_size

        def forward(model: Any, input_tokens: Any, input_mask: Any) -> Any:
            rows, length = input_tokens.shape
            positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
            causal = jnp.tril(jnp.ones((length, length), bool))
            logits, _ = model(input_tokens, positions, None, jnp.broadcast_to(causal, (rows, length, length)))
            return logits[:, first - 1 : -1]

        def labels(input_tokens: Any, input_mask: Any) -> Any:
            return jax.nn.one_hot(input_tokens[:, first:], vocab)

        def decays(params: Any) -> Any:
            flat = jax.tree_util.tree_map_with_path(
                lambda path, leaf: "layers" in jax.tree_util.keystr(path) and leaf.ndim > 1, params
            )
            return flat

        self._trainer = trainers.DistillationTrainer(
            student,
            teacher,
            logit.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0),  # no cross-entropy
            optax.chain(
                optax.clip_by_global_norm(recipe.clip_norm),
                optax.adamw(
                    recipe.learning_rate, recipe.b1, recipe.b2, recipe.eps, weight_decay=recipe.weight_decay,
                    mask=decays,
                ),
            ),
            trainers.TrainingConfig(eval_every_n_steps=1 << 30),
        )  # fmt: skip
        self._step, _ = self._trainer.jit_train_and_eval_step(cache_nnx_graph=True)
        held = (nnx.state(student), nnx.state(teacher), nnx.state(self._trainer.optimizer))
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def _load(self, folder: str) -> Any:
        from tunix.models.llama3 import model as models  # pyright: ignore[reportMissingImports]
        from tunix.models.llama3 import params  # pyright: ignore[reportMissingImports]

        raw = json.loads((Path(folder) / "config.json").read_text())
        config = models.ModelConfig(
            num_layers=raw["num_hidden_layers"],
            vocab_size=raw["vocab_size"],
            embed_dim=raw["hidden_size"],
            hidden_dim=raw["intermediate_size"],
            num_heads=raw["num_attention_heads"],
            head_dim=raw["head_dim"],
            num_kv_heads=raw["num_key_value_heads"],
            rope_theta=int(raw["rope_parameters"]["rope_theta"]),
            norm_eps=raw["rms_norm_eps"],
            weight_tying=raw["tie_word_embeddings"],
        )
        return params.create_model_from_safe_tensors(folder, config, dtype=self._jnp.float32)

    def prepare(self, tokens: list[list[int]]) -> Any:
        """Tunix's record of a batch, on the device."""
        ids = self._jnp.asarray(tokens, self._jnp.int32)
        return self._trainers.TrainingInput(input_tokens=ids, input_mask=self._jnp.ones_like(ids))

    def step(self, given: Any) -> tuple[float, float]:
        """The teacher's outputs, and the train step."""
        loss, _, norm = self._step(self._trainer._prepare_inputs(given))
        self._jax.block_until_ready(self._trainer.model)
        return float(loss), float(norm)

    def compilations(self) -> int:
        """Programs that XLA compiled."""
        return len(self._compiled)

    def facts(self) -> dict[str, Any]:
        """The versions in its environment."""
        return {"versions": {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}}


if __name__ == "__main__":
    step_worker.serve(TunixStep, sys.argv[1])
