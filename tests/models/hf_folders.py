"""Random Hugging Face folders: by transformers itself (needs torch), or by hand from the published names (without).

Every tensor is random. The defaults of transformers would hide errors: its biases start at 0 and its norms at 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from subl_jax.chat import tokenizer as tokenizers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that the tested positions lie on both sides of every bound of the band.
    "original_max_position_embeddings": 16,
}

# Three shapes: one key/value head; heads wider and narrower than d / heads; odd widths; vocabularies of no round size;
# a short rotary base and a large epsilon in one each.
SHAPES: dict[str, dict[str, Any]] = {
    "one_kv_head": dict(
        vocab_size=101, hidden_size=16, intermediate_size=23, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=6, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "wide_heads": dict(
        vocab_size=257, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, rms_norm_eps=1e-3,
    ),
    "grouped": dict(
        vocab_size=160, hidden_size=32, intermediate_size=57, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    ),
}  # fmt: skip

# Model family and options by the name of a case.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama_untied": ("Llama", dict(tie_word_embeddings=False, attention_bias=True)),
    "llama3_tied": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    "llama3_untied": ("Llama", dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=False)),
}


def random_model(family: str, seed: int = 0, **options: Any) -> Any:
    """A torch model of transformers ("Llama", "Qwen2", "Qwen3") in float32 with random weights."""
    import torch
    import transformers

    defaults = {**SHAPES["grouped"], "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    config = getattr(transformers, f"{family}Config")(**{**defaults, **options})
    config._attn_implementation = "eager"
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if "norm" in name:
                values = rng.uniform(0.5, 1.5, shape)
            elif name.endswith("bias"):
                values = rng.normal(size=shape) * 0.5
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                values = rng.normal(size=shape) * 3 / shape[1] ** 0.5  # logits of standard deviation 3
            else:
                values = rng.normal(size=shape) / shape[1] ** 0.5
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return model


def save(model: Any, directory: Path, *, dtype: str = "float32", shards: int = 1) -> Path:
    """Writes the model by transformers, in about as many files as asked for."""
    import torch

    model = model.to(getattr(torch, dtype))
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=2 * size if shards == 1 else int(size / (shards - 0.5)))
    return directory


def folder_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by safetensors' own reader."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


# --- Folders without torch ---------------------------------------------------------------------------------------------


def raw_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """The content of a small config.json as published folders have it; None removes an option."""
    raw = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        **SHAPES["grouped"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **changes,
    }
    return {name: value for name, value in raw.items() if value is not None}


def tensor_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model, written out from the published folders; matrices are [out, in]."""
    d, ff, vocab, dim = (raw[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    heads, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    qwen2, qwen3 = (raw["model_type"] == name for name in ("qwen2", "qwen3"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, out, into in [
            ("self_attn.q_proj", heads, d), ("self_attn.k_proj", kv, d), ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, heads), ("mlp.gate_proj", ff, d), ("mlp.up_proj", ff, d), ("mlp.down_proj", d, ff),
        ]:  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = (out, into)
            attention = name.startswith("self_attn")
            if attention and (raw.get("attention_bias") or (qwen2 and "o_proj" not in name)):
                shapes[f"{prefix}{name}.bias"] = (out,)
        shapes |= {f"{prefix}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        if qwen3:
            shapes |= {f"{prefix}self_attn.{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
    return shapes


def random_tensors(raw: dict[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for every tensor."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in tensor_shapes(raw).items()}


def write_folder(
    directory: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> dict[str, list[str]]:
    """Writes config.json and safetensors; returns the tensors of each file."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    names = sorted(tensors)
    files = {f"model-{number + 1:05d}-of-{shards:05d}.safetensors": names[number::shards] for number in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    if shards > 1:
        write_index(directory, {name: file for file, held in files.items() for name in held})
    return files


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    """Writes the index of a sharded folder."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(directory: Path, vocab_size: int = 300) -> Any:
    """Trains a tokenizer of so many tokens with a chat template, saves it there and returns it."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(50)]
    tokenizer = tokenizers.train([" ".join(words)] * 3, vocab_size)
    tokenizer.save_pretrained(directory)
    return tokenizer
