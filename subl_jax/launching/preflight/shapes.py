"""Shapes of public checkpoints by name, so that a run can be planned before anything is downloaded.

From the `config.json` of each repository on Hugging Face. How they are run is common to all: bfloat16, layers made again in
the backward pass, the attention kernel that the platform has.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from subl_jax.models.config import ModelConfig

_RUN: Any = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full"}
_LLAMA = ModelConfig(
    vocab_size=128_256, num_kv_heads=8, num_heads=32, head_dim=128, rope_theta=500_000.0, rms_eps=1e-5, rope_factor=32.0,
    rope_original_context=8192, **_RUN,
)  # fmt: skip
_QWEN = ModelConfig(
    vocab_size=151_936, num_heads=16, num_kv_heads=2, head_dim=128, rope_theta=1_000_000.0, rms_eps=1e-6, qkv_bias=True,
    **_RUN,
)  # fmt: skip

SHAPES: Mapping[str, ModelConfig] = {
    "llama-3.1-8b": dataclasses.replace(
        _LLAMA, d_model=4096, num_layers=32, d_ff=14_336, rope_factor=8.0, tie_embeddings=False
    ),
    "llama-3.2-3b": dataclasses.replace(_LLAMA, d_model=3072, num_layers=28, num_heads=24, d_ff=8192),
    "llama-3.2-1b": dataclasses.replace(_LLAMA, d_model=2048, num_layers=16, head_dim=64, d_ff=8192),
    # Its table has 152,064 rows, its smaller sisters' 151,936: both know the same 151,665 tokens.
    "qwen2.5-7b": dataclasses.replace(
        _QWEN, vocab_size=152_064, num_tokens=151_665, d_model=3584, num_layers=28, num_heads=28, num_kv_heads=4,
        d_ff=18_944, tie_embeddings=False,
    ),
    "qwen2.5-3b": dataclasses.replace(_QWEN, num_tokens=151_665, d_model=2048, num_layers=36, d_ff=11_008),
    "qwen2.5-1.5b": dataclasses.replace(_QWEN, num_tokens=151_665, d_model=1536, num_layers=28, num_heads=12, d_ff=8960),
    "qwen2.5-0.5b": dataclasses.replace(
        _QWEN, num_tokens=151_665, d_model=896, num_layers=24, num_heads=14, head_dim=64, d_ff=4864
    ),
}  # fmt: skip


def shape(name: str) -> ModelConfig:
    """The shape of that name, in any case.

    Raises:
      ValueError: there is none; the nearest is named.
    """
    found = SHAPES.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), SHAPES, 1)
        raise ValueError(
            f"no shape is called {name!r}; {f'did you mean {near[0]}?' if near else 'shapes are ' + ', '.join(SHAPES)}"
        )
    return found
