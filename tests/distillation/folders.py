"""Small random models as folders, of tokenizers that share a prefix or nothing, and conversations in their words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subl_jax.chat import tokenizer as tokenizers
from tests.models import hf_folders

WORDS = ("walk", "talk", "read", "write", "north", "south", "east", "west", "seven", "eight", "often", "never")
KNOWN = 300  # tokens of the tokenizer


def model(
    directory: Path, *, padding: int, width: int, added: Sequence[str] = (), known: int = KNOWN, seed: int = 0,
    architecture: str = "LlamaForCausalLM", tied: bool = False,
) -> Path:  # fmt: skip
    """Writes a folder whose vocabulary has so many rows more than its tokenizer has tokens."""
    tokenizer = tokenizers.train([" ".join(WORDS)] * 3 if known == KNOWN else [" ".join(WORDS[::-1])] * 3, known)
    tokenizer.add_tokens(list(added))
    raw = hf_folders.raw_config(
        architecture, vocab_size=len(tokenizer) + padding, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in hf_folders.tensor_shapes(raw).items():
        spread = 1.0 if name.startswith(("lm_head", "model.embed")) else 0.3
        values = np.ones(shape) if "norm" in name else rng.normal(size=shape) * spread * shape[-1] ** -0.5
        tensors[name] = values.astype(np.float32)
    hf_folders.write_folder(directory, raw, tensors)
    tokenizer.save_pretrained(directory)
    return directory


def talks(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Writes conversations whose answers repeat the question's last word."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        asked = [str(word) for word in rng.choice(WORDS, 3)]
        turns: list[Any] = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": asked[-1]}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def prompts(path: Path, count: int = 12) -> Path:
    """Writes prompts, every third of them of two texts."""
    rng = np.random.default_rng(1)
    lines = []
    for index in range(count):
        first, second = (" ".join(rng.choice(WORDS, 2)) for _ in range(2))
        lines.append(json.dumps({"prompt": [first, second] if index % 3 == 0 else first}))
    path.write_text("\n".join(lines) + "\n")
    return path
