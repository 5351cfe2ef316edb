"""An independent Llama in float64 NumPy: one sequence, one head at a time, rotary embedding by complex numbers.

The oracle of the decoder and of the rollout's log-probabilities. It shares with the library only the parameter tree.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from subl_jax.models.config import ModelConfig


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate(head: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """[time, dim]: the i-th and the (dim/2 + i)-th entry are one complex number, turned by position * theta^(-2i/dim)."""
    dim = head.shape[1]
    pairs = head[:, : dim // 2] + 1j * head[:, dim // 2 :]
    turned = pairs * np.exp(1j * positions[:, None] * np.power(theta, -2.0 * np.arange(dim // 2) / dim))
    return np.concatenate([turned.real, turned.imag], axis=1)


def logits(config: ModelConfig, params: Any, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """[time, vocab] of one document of ids [time]."""
    x = _norm(states(config, params, tokens, positions)[-1], np.asarray(params["final_norm"]["scale"]), config.rms_eps)
    return x @ np.asarray(params["embedding"].T if config.tie_embeddings else params["head"], np.float64)


def states(config: ModelConfig, params: Any, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """[layers + 1, time, d_model]: the embedding of one document of ids [time], and what every layer makes of it."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    time = len(tokens)
    positions = np.arange(time) if positions is None else positions
    x = weights["embedding"][np.asarray(tokens)]
    found = [x]
    for number in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], weights["layers"])
        h = _norm(x, layer["attention_norm"]["scale"], config.rms_eps)
        q, k, v = (np.split(h @ layer[name]["kernel"], n, axis=1) for name, n in _head_counts(config).items())
        q = [_rotate(head, positions, config.rope_theta) for head in q]
        k = [_rotate(head, positions, config.rope_theta) for head in k]
        outputs = []
        for index, query in enumerate(q):
            shared = index // (config.num_heads // config.num_kv_heads)
            out = np.zeros((time, config.head_dim))
            for now in range(time):
                scores = k[shared][: now + 1] @ query[now] / np.sqrt(config.head_dim)
                weight = np.exp(scores - scores.max())
                out[now] = weight / weight.sum() @ v[shared][: now + 1]
            outputs.append(out)
        x = x + np.concatenate(outputs, axis=1) @ layer["o"]["kernel"]
        h = _norm(x, layer["mlp_norm"]["scale"], config.rms_eps)
        gate = h @ layer["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
        found.append(x)
    return np.stack(found)


def _head_counts(config: ModelConfig) -> dict[str, int]:
    return {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}


def log_probabilities(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """[time]: log-probability in nats of each id given those before it; entry 0 is 0."""
    scores = logits(config, params, tokens)
    top = scores.max(-1, keepdims=True)
    scores = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    return np.concatenate([[0.0], scores[np.arange(len(tokens) - 1), np.asarray(tokens)[1:]]])
