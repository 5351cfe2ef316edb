"""Tunix's sampler behind a pipe. Run by the Python of an environment that has google-tunix, not by ours.

    PYTHON -I tunix_worker.py FOLDER

Imports nothing of this project. One JSON object per line: {"prompts": [[int]], "new_tokens": int} comes in,
{"tokens": [[int]], "seconds": float, "compilations": int} goes out; the first line out is {"versions": {name: version}}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path


class _Numbers:
    """What the sampler takes for a tokenizer: texts are ids in decimal. No id is special, so nothing stops a row."""

    def encode(self, text: str) -> list[int]:
        return [int(part) for part in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def main(folder: str) -> None:
    """Serves requests until standard input ends."""
    # Libraries print to standard output, which is the pipe: give them standard error instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler as samplers  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import model as models  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import params  # pyright: ignore[reportMissingImports]

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
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
    model = params.create_model_from_safe_tensors(folder, config, dtype=jnp.float32)
    samplers_by_size: dict[int, samplers.Sampler] = {}

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    packages = ("google-tunix", "jax", "flax")
    answer({"versions": {name: importlib.metadata.version(name) for name in packages}})
    for line in sys.stdin:
        request = json.loads(line)
        prompts, new = request["prompts"], request["new_tokens"]
        length = len(prompts[0])
        size = length + new
        if size not in samplers_by_size:
            cache = samplers.CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim)
            samplers_by_size[size] = samplers.Sampler(model, _Numbers(), cache)
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        began = time.perf_counter()
        output = samplers_by_size[size](texts, new, max_prompt_length=length, temperature=0.0)
        seconds = time.perf_counter() - began
        tokens = [[int(token) for token in row] for row in output.tokens]
        answer({"tokens": tokens, "seconds": seconds, "compilations": len(compiled)})


if __name__ == "__main__":
    main(sys.argv[1])
