"""Distillation steps on torch as sides of the `distill` workload: dense, dense and compiled, and TRL's chunked loss.

Run as `python -m subl_jax.benchmark.distill_torch NAME RECIPE`. Models are transformers', as TRL trains them. The dense
loss is the usual code: logits, `log_softmax`, `kl_div`, here of the loss tokens only (`logits_to_keep`), though many
trainers project every token. TRL's loss is its own function, called as its `DistillationTrainer` calls it. All take
AdamW's fused update, the default of transformers' trainer; gradient checkpointing, a default of TRL's, is off.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

from subl_jax.benchmark import step_worker, torch_peers
from subl_jax.benchmark.harness import PeerAbsent
from subl_jax.benchmark.step_worker import Recipe

DENSE, COMPILED, TRL = "torch", "torch_compile", "trl"
NAMES = (DENSE, COMPILED, TRL)


def require(name: str) -> None:
    """Refuses a side that cannot run here, before it is started.

    Raises:
      PeerAbsent: no torch, no C++ compiler, or no TRL.
    """
    torch_peers.require_torch()
    if name == COMPILED:
        torch_peers.require_compiler()
    if name == TRL and importlib.util.find_spec("trl") is None:
        raise PeerAbsent("trl is not installed; make setup EXTRAS=parity")


class TorchStep:
    """A step of transformers' models under torch's AdamW."""

    def __init__(self, name: str, recipe: Recipe):
        """Loads both models.

        Raises:
          PeerAbsent: this TRL has no chunked loss.
        """
        self._torch = torch = torch_peers.require_torch()
        torch.set_num_threads(recipe.threads)
        self._recipe = recipe
        self._student = self._load(recipe.student).train()
        self._teacher = self._load(recipe.teacher).eval().requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self._groups(), lr=recipe.learning_rate, betas=(recipe.b1, recipe.b2), eps=recipe.eps, fused=True
        )
        trained, frozen = (sum(p.nbytes for p in model.parameters()) for model in (self._student, self._teacher))
        self.state_bytes = 3 * trained + frozen  # with two moments
        self._compiled = _CompileCounts() if name == COMPILED else None
        self._loss = self.chunked_loss if name == TRL else self.dense_loss
        if name == COMPILED:
            self._loss = torch.compile(self._loss)
        self._chunked = _chunked_divergence() if name == TRL else None

    def _load(self, folder: str) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        # Out of the mapped file: memory is counted where it is anonymous.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices of layers, which decay, and the rest."""
        decaying, others = [], []
        for name, parameter in self._student.named_parameters():
            (decaying if ".layers." in name and parameter.ndim > 1 else others).append(parameter)
        decay = self._recipe.weight_decay
        return [{"params": decaying, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def dense_loss(self, tokens: Any) -> Any:
        """Forward KL over whole logits, mean over loss tokens."""
        functional = self._torch.nn.functional
        # The last logits predict what is not there.
        kept = self._recipe.completion + 1
        with self._torch.no_grad():
            teacher = self._teacher(tokens, logits_to_keep=kept, use_cache=False).logits[:, :-1]
        student = self._student(tokens, logits_to_keep=kept, use_cache=False).logits[:, :-1]
        return functional.kl_div(
            functional.log_softmax(student, -1).flatten(0, 1), functional.log_softmax(teacher, -1).flatten(0, 1),
            reduction="batchmean", log_target=True,
        )  # fmt: skip

    def chunked_loss(self, tokens: Any) -> Any:
        """As `DistillationTrainer._compute_loss` and `_get_last_hidden_state` of TRL 1.16, for a completion of all ones."""
        assert self._chunked is not None
        mask = self._torch.ones_like(tokens)
        completion = mask[:, self._recipe.prompt :]

        def hidden(model: Any) -> Any:
            last = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            return last[:, :-1][:, -self._recipe.completion :]

        student = hidden(self._student)
        with self._torch.no_grad():
            teacher = hidden(self._teacher)
        heads = [model.get_output_embeddings().weight for model in (self._student, self._teacher)]
        loss, _, _ = self._chunked(student, teacher, *heads, completion, 0.0, num_items_in_batch=completion.sum())
        return loss

    def prepare(self, tokens: list[list[int]]) -> Any:
        """Ids as a tensor."""
        return self._torch.tensor(tokens)

    def step(self, given: Any) -> tuple[float, float]:
        """Loss, gradient, clipping, update."""
        loss = self._loss(given)
        loss.backward()
        norm = self._torch.nn.utils.clip_grad_norm_(self._student.parameters(), self._recipe.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def compilations(self) -> int:
        """Graphs, where it compiles."""
        return self._compiled.graphs if self._compiled else 0

    def facts(self) -> dict[str, Any]:
        """How it compiled, and whose code it is."""
        if self._compiled:
            return {"graphs": self._compiled.graphs, "graph_breaks": self._compiled.breaks}
        return {} if self._chunked is None else {"function": f"{self._chunked.__module__}.{self._chunked.__name__}"}


class _CompileCounts:
    """What dynamo and inductor did in this process."""

    def __init__(self) -> None:
        """Keeps kernels of earlier runs from being found: they would hide both the compilation and its time."""
        from torch._dynamo.utils import counters
        from torch._inductor import config, metrics

        config.force_disable_caches = True
        self._counters, self._metrics = counters, metrics

    @property
    def graphs(self) -> int:
        """That dynamo captured and inductor generated kernels for."""
        kernels = self._metrics.generated_kernel_count + self._metrics.generated_cpp_vec_kernel_count
        return int(self._counters["stats"]["unique_graphs"]) if kernels else 0

    @property
    def breaks(self) -> int:
        """Places where a graph had to end."""
        return sum(self._counters["graph_break"].values())


def _chunked_divergence() -> Any:
    """TRL's own function, from hidden states and heads to the mean divergence.

    Raises:
      PeerAbsent: this TRL has none.
    """
    import trl  # pyright: ignore[reportMissingImports]

    try:
        from trl.trainer.distillation_trainer import (  # pyright: ignore[reportMissingImports]
            _chunked_divergence_loss,
        )
    except ImportError as error:
        raise PeerAbsent(
            f"trl {trl.__version__} has no chunked divergence ({error}); pip install 'trl>=1.16'"
        ) from error
    return _chunked_divergence_loss


if __name__ == "__main__":
    step_worker.serve(functools.partial(TorchStep, sys.argv[1]), sys.argv[2])
