"""The decoder against transformers' LlamaForCausalLM (extra `parity`: the reference runs on torch)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from subl_jax.models.config import ModelConfig
from tests.models.test_decoder import SHAPES, documents, parameters, whole_logits

torch = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")


def reference_logits(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """[batch, time, vocab] of a LlamaForCausalLM that carries the same weights; torch keeps matrices as [out, in]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.d_ff,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    )

    def tensor(leaf: Any) -> Any:
        return torch.tensor(np.asarray(leaf))

    weights = {"model.embed_tokens.weight": tensor(params["embedding"])}
    weights["model.norm.weight"] = tensor(params["final_norm"]["scale"])
    weights["lm_head.weight"] = tensor(params["embedding"]) if config.tie_embeddings else tensor(params["head"]).T
    names = {
        **{name: f"self_attn.{name}_proj" for name in "qkvo"},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    for number in range(config.num_layers):
        prefix, layers = f"model.layers.{number}", params["layers"]
        weights[f"{prefix}.input_layernorm.weight"] = tensor(layers["attention_norm"]["scale"][number])
        weights[f"{prefix}.post_attention_layernorm.weight"] = tensor(layers["mlp_norm"]["scale"][number])
        for ours, theirs in names.items():
            weights[f"{prefix}.{theirs}.weight"] = tensor(layers[ours]["kernel"][number]).T
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.double().eval()(torch.tensor(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize(
    "config", SHAPES, ids=lambda c: f"h{c.num_heads}kv{c.num_kv_heads}l{c.num_layers}tied{c.tie_embeddings:d}"
)
def test_logits_equal_llama_of_transformers(config):
    params = parameters(config)
    tokens = np.stack(documents(config, 12, 12))
    ours = whole_logits(config, params, tokens)
    np.testing.assert_allclose(ours, reference_logits(config, params, tokens), rtol=1e-4, atol=1e-4)
