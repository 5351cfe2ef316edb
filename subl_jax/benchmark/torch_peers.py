"""transformers on torch as a peer of the rollout: random models in its own format, and its `generate`, plain or compiled.

Everything here needs torch (extra `oracles` or `parity`) and transformers; nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subl_jax import metrics
from subl_jax.benchmark.greedy import Request
from subl_jax.benchmark.harness import BenchmarkError, PeerAbsent, Program

PLAIN, COMPILED = "transformers", "transformers_compile"


def require_torch() -> Any:
    """The torch module.

    Raises:
      PeerAbsent: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise PeerAbsent("torch is not installed; make setup EXTRAS=oracles") from None
    return torch


def require_compiler() -> str:
    """The C++ compiler that torch's inductor will call.

    Raises:
      PeerAbsent: there is none.
    """
    wanted = [os.environ[name] for name in ("CXX",) if name in os.environ] or ["g++", "clang++"]
    for name in wanted:
        if shutil.which(name):
            return name
    raise PeerAbsent(f"torch.compile needs a C++ compiler on a CPU and found none of {', '.join(wanted)}; install g++")


def llama_shape(options: Mapping[str, Any]) -> metrics.Shape:
    """What the operation counts need to know of a Llama."""
    d, heads, head = options["hidden_size"], options["num_attention_heads"], options["head_dim"]
    layer = 2 * d * (heads + options["num_key_value_heads"]) * head + 3 * d * options["intermediate_size"] + 2 * d
    layers = options["num_hidden_layers"]
    return metrics.Shape(layers * layer + d, d, options["vocab_size"], layers, heads * head)


def total_parameters(options: Mapping[str, Any]) -> int:
    """With embedding and head."""
    shape = llama_shape(options)
    return shape.params + (1 if options["tie_word_embeddings"] else 2) * shape.width * shape.vocab


def save_random_llama(directory: Path, options: Mapping[str, Any], seed: int) -> None:
    """Writes a Llama with random weights in float32, by transformers itself.

    Matrices have standard deviation 1/sqrt(fan_in), norms lie in [0.5, 1.5], logits have standard deviation 3: with
    transformers' own initialisation (0.02 everywhere) a model repeats its last token, and any two agree.

    Args:
      directory: made if need be.
      options: of `LlamaConfig`.
      seed: of the weights.
    """
    torch = require_torch()
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = transformers.LlamaConfig(**options)
    model: Any = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
                continue
            scale = 3.0 if name in ("model.embed_tokens.weight", "lm_head.weight") else 1.0
            parameter.normal_(0.0, scale / parameter.shape[1] ** 0.5, generator=generator)
    model.save_pretrained(directory)


class TransformersPeer:
    """`AutoModelForCausalLM.generate`, greedy to a fixed length: dynamic cache and sdpa, or static cache and compiled.

    `program` takes a `Request` and returns the new tokens of each prompt.
    """

    def __init__(self, name: str, folder: Path, threads: int):
        """Loads the folder.

        Args:
          name: PLAIN or COMPILED.
          folder: a Hugging Face folder.
          threads: of torch's pool.

        Raises:
          PeerAbsent: no torch, no C++ compiler, or JAX is on an accelerator that this torch does not reach.
        """
        import jax

        torch = self._torch = require_torch()
        self._compiled = name == COMPILED
        if self._compiled:
            require_compiler()
        on_gpu = jax.default_backend() != "cpu"
        if on_gpu and not torch.cuda.is_available():
            raise PeerAbsent(
                f"JAX runs on {jax.default_backend()} and this torch sees no GPU; install torch with CUDA, or set "
                "JAX_PLATFORMS=cpu to compare on the CPU"
            )
        from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._device = "cuda" if on_gpu else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        self._model = model.eval().to(self._device)
        if self._model.config._attn_implementation != "sdpa":
            raise BenchmarkError(
                f"transformers chose attention {self._model.config._attn_implementation!r}; the peer is its default, sdpa"
            )
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self._options: dict[str, Any] = {}
        if self._compiled:
            self._start_compiling(CompileConfig())
        self.program = Program(
            name, self.generate, self.compilations if self._compiled else None, must_compile=self._compiled
        )

    def _start_compiling(self, compile_config: Any) -> None:
        from torch._dynamo.utils import counters
        from torch._inductor import config as inductor
        from torch._inductor import metrics

        # transformers compiles on accelerators only, unless told otherwise by this; its own tests do so on CPUs.
        if not hasattr(compile_config, "_compile_all_devices"):
            raise BenchmarkError(
                "this transformers has no CompileConfig._compile_all_devices: it would silently not compile on a CPU"
            )
        compile_config._compile_all_devices = True
        self._options = {"cache_implementation": "static", "compile_config": compile_config}
        # Kernels of an earlier run on this machine would hide both the compilation and its time.
        inductor.force_disable_caches = True
        # So that every case gets a graph of its own shapes: after a first shape dynamo makes the batch size a variable.
        self._torch._dynamo.reset()
        counters.clear()
        metrics.reset()
        self._counters, self._metrics = counters, metrics

    def compilations(self) -> int:
        """Graphs that dynamo captured and for which inductor generated kernels."""
        kernels = self._metrics.generated_kernel_count + self._metrics.generated_cpp_vec_kernel_count
        return int(self._counters["stats"]["unique_graphs"]) if kernels else 0

    def facts(self) -> dict[str, Any]:
        """What the peer's rows say besides: how it compiled."""
        if not self._compiled:
            return {}
        return {
            "graphs": self.compilations(),
            "graph_breaks": sum(self._counters["graph_break"].values()),
            "kernels": int(self._metrics.generated_kernel_count),
        }

    def generate(self, request: Request) -> list[list[int]]:
        """The new tokens of each prompt."""
        prompts = self._torch.tensor(request.prompts, device=self._device)
        out = self._model.generate(
            prompts,
            attention_mask=self._torch.ones_like(prompts),
            max_new_tokens=request.new_tokens,
            eos_token_id=None,
            **self._options,
        )
        return out[:, prompts.shape[1] :].tolist()

    def close(self) -> None:
        """Lets go of the model."""
        del self._model
