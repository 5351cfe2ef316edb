"""Low-rank adapters as a parameter tree of their own: drawn, told from the weights that they sit on, and merged.

Adapters are the leaves `lora_a` and `lora_b` beside a matrix's `kernel`, those of the vocabulary head in `head_adapter`, so
that `decoder.merge(adapters, weights)` is a model; a model is trained, checkpointed, exported and rolled out by naming the
two halves.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from subl_jax import artifacts, checkpoint
from subl_jax.models import decoder, hf_import
from subl_jax.models.config import LORA_TARGETS, ModelConfig
from subl_jax.parallel.devices import on_host

_LEAVES = ("lora_a", "lora_b")


def split(params: decoder.Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, the other parameters) of a tree that holds both."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] in _LEAVES}),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] not in _LEAVES}),
    )


def init_adapters(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Fresh adapters: A uniform in ±1/sqrt(fan_in), B zero, so that the model is unchanged at first (as in PEFT).

    Raises:
      ValueError: the configuration has none.
    """
    if config.lora is None:
        raise ValueError("the model configuration has no adapters (lora is None); set --config.<stage>.lora")
    adapters, _ = split(jax.eval_shape(lambda: decoder.init(config, key)))
    drawn: dict[tuple[str, ...], Any] = {}
    for path, leaf in sorted(flatten_dict(adapters).items()):
        if path[-1] == "lora_b":
            drawn[path] = jnp.zeros(leaf.shape, jnp.float32)
        else:
            name = LORA_TARGETS.index(_target(path))  # so that other targets beside it change nothing
            bound = leaf.shape[-2] ** -0.5
            drawn[path] = jax.random.uniform(jax.random.fold_in(key, name), leaf.shape, minval=-bound, maxval=bound)
    return unflatten_dict(drawn)


def _target(path: tuple[str, ...]) -> str:
    """Which matrix an adapter sits on."""
    return path[-2].removesuffix("_adapter")


def merged_config(config: ModelConfig) -> ModelConfig:
    """The model that `merged` gives the weights of: without adapters, and untied if its head had one.

    The embedding must stay as it is where the head changes, so that the two are no longer one matrix.
    """
    return dataclasses.replace(config, lora=None, tie_embeddings=config.tie_embeddings and not config.adapts_head)


def merged(config: ModelConfig, params: decoder.Params) -> dict[str, Any]:
    """The weights with every adapter added in (W + alpha / rank · A B), in the weights' dtype; without adapters, as is.

    They are those of `merged_config(config)`: a tied head with an adapter becomes a matrix of its own. The sum is formed in
    float32 and rounded once.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    if config.lora is None:
        return unflatten_dict(flat)
    whole = {path: leaf for path, leaf in flat.items() if path[-1] not in _LEAVES}
    for path in [path for path in flat if path[-1] == "lora_a"]:
        kernel = ("head",) if _target(path) == "head" else (*path[:-1], "kernel")
        down, up = (leaf.astype(jnp.float32) for leaf in (flat[path], flat[*path[:-1], "lora_b"]))
        # By default an accelerator would multiply float32 matrices in fewer bits.
        update = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
        weights = whole["embedding",].T if kernel == ("head",) and config.tie_embeddings else whole[kernel]
        whole[kernel] = (weights.astype(jnp.float32) + config.lora.scale * update).astype(weights.dtype)
    return unflatten_dict(whole)


def comparable(config: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models have the same matrices, so that their changes have an angle: of one shape, adapted or not."""
    drop = {"lora": None, "num_tokens": 0}
    return dataclasses.replace(config, **drop).architecture() == dataclasses.replace(other, **drop).architecture()


def delta_cosine(
    one: tuple[ModelConfig, decoder.Params, decoder.Params], other: tuple[ModelConfig, decoder.Params, decoder.Params]
) -> float | None:
    """The cosine of the angle between two changes, θ - θ_base of each, over all weights, in float64.

    An adapter counts as what it adds to its matrix, alpha / rank · A B; a matrix that only one of the two has (a head that
    an adapter unties) counts as unchanged in the other.

    Args:
      one, other: (configuration, parameters, base parameters) of two models of one shape, see `comparable`.

    Returns:
      The cosine; None where one of them has not moved at all.
    """
    parts = delta_products(one, other).values()
    product, first, second = (sum(column) for column in zip(*parts, strict=True))
    return product / math.sqrt(first * second) if first and second else None


def delta_products(
    one: tuple[ModelConfig, decoder.Params, decoder.Params], other: tuple[ModelConfig, decoder.Params, decoder.Params]
) -> dict[tuple[tuple[str, ...], int], tuple[float, float, float]]:
    """What `delta_cosine` is made of, matrix by matrix: the inner product of the two changes and the squared length of each.

    Keys are (path, layer); what is not stacked over layers has layer 0. Arguments as of `delta_cosine`.
    """
    sides: list[tuple[ModelConfig, dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]] = [
        (config, flatten_dict(params), flatten_dict(base)) for config, params, base in (one, other)
    ]
    # A head that only an adapter gives is no leaf of either.
    names = {("head",), *(path for _, params, _ in sides for path in params if path[-1] not in _LEAVES)}
    found = {}
    for path in sorted(names):
        stacked = path[0] == "layers"
        layers = len(next(params[path] for _, params, _ in sides if path in params)) if stacked else 1
        for layer in range(layers):  # layer by layer: a stack in float64 may not fit
            now, then = (_change(*side, path, layer if stacked else ...) for side in sides)
            found[path, layer] = (
                float(np.sum(now * then)),
                float(np.sum(np.square(now))),
                float(np.sum(np.square(then))),
            )
    return found


def _change(config: ModelConfig, params: dict, base: dict, path: tuple[str, ...], row: Any) -> Any:
    """What one matrix (of one layer, where they are stacked) has changed by, in float64; 0 for one that it has not."""
    if config.lora is None:
        return on_host(params[path][row]).astype(np.float64) - on_host(base[path][row]) if path in params else 0.0
    parent = ("head_adapter",) if path == ("head",) else path[:-1]
    if (*parent, "lora_a") not in params or path[-1] not in ("kernel", "head"):
        return 0.0
    down, up = (on_host(params[*parent, leaf][row]).astype(np.float64) for leaf in _LEAVES)
    return config.lora.scale * (down @ up)


def delta_norm(config: ModelConfig, params: decoder.Params, base: decoder.Params) -> float:
    """‖θ - θ_base‖₂ over all weights, in float64; an adapter counts as what it adds to its matrix, alpha / rank · A B."""
    whole: dict[tuple[str, ...], Any] = flatten_dict(params)
    before: dict[tuple[str, ...], Any] = flatten_dict(base)
    total = 0.0
    for path, leaf in whole.items():
        # Under adapters the weights stand still, and may be large; B is counted with its A.
        if path[-1] == "lora_b" or (config.lora is not None and path[-1] != "lora_a"):
            continue
        rows = range(leaf.shape[0]) if leaf.ndim > 2 else [...]  # layer by layer: a stack in float64 may not fit
        for row in rows:
            now = on_host(leaf[row]).astype(np.float64)
            if path[-1] == "lora_a":
                assert config.lora is not None  # the tree holds adapters
                up = on_host(whole[*path[:-1], "lora_b"][row]).astype(np.float64)
                # ‖A B‖² is the trace of (A^T A)(B B^T): the product of a vocabulary head's adapter may not fit either.
                total += config.lora.scale**2 * float(np.sum((now.T @ now) * (up @ up.T)))
            else:
                total += float(np.sum(np.square(now - on_host(before[path][row]))))
    return math.sqrt(total)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def load_adapters(directory: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Reads an adapter checkpoint: adapters only, with "model" (architecture) and "lora" in its metadata.

    Returns:
      The model's configuration with its `lora`, the adapters, and the whole metadata.

    Raises:
      CheckpointMismatch: it holds no adapters, or others than its metadata says.
      CheckpointError: there is none, or it is damaged.
    """
    metadata = checkpoint.read_metadata(directory)
    if not metadata.get("lora") or "model" not in metadata:
        raise checkpoint.CheckpointMismatch(
            f"{directory} holds no adapters (its metadata has model {'given' if 'model' in metadata else 'missing'}, "
            f"lora={metadata.get('lora')}); name the checkpoint of a model that was trained with adapters"
        )
    config = ModelConfig.from_dict({**metadata["model"], "lora": metadata["lora"]})
    adapters, _ = checkpoint.load_model(directory)
    wanted, _ = split(jax.eval_shape(lambda: decoder.init(config, jax.random.key(0))))
    stored, asked = (
        {path: shape for path, (shape, _) in checkpoint.layout_of(tree).items()} for tree in (adapters, wanted)
    )
    found = artifacts.differences(stored, asked)
    if found:
        raise checkpoint.CheckpointMismatch(
            f"{directory} holds other parameters than the adapters of its metadata "
            f"({artifacts.describe(found, 'the checkpoint', 'its metadata')}); run the stage that writes it again"
        )
    return config, adapters, metadata


def merge_checkpoint(
    adapter_dir: str | os.PathLike[str], base_dir: str | os.PathLike[str]
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model that adapters make of their base, as plain weights in the base's dtype (see `merged`).

    The base must have the architecture and, where both checkpoints tell it, the tokenizer of the adapters; and everything
    that the adapters' metadata holds under "base" must stand in the base's own metadata.

    Args:
      adapter_dir: see `load_adapters`.
      base_dir: checkpoint, or Hugging Face folder, of the weights that the adapters were trained on.

    Returns:
      The configuration (`merged_config`: without adapters) and the parameters.

    Raises:
      CheckpointMismatch: the two do not fit; every difference is named.
      CheckpointError: one of them is missing or damaged.
    """
    config, adapters, metadata = load_adapters(adapter_dir)
    if not (Path(base_dir) / checkpoint.METADATA).is_file() and (Path(base_dir) / hf_import.CONFIG).is_file():
        return _merge_into_folder(adapter_dir, config, adapters, base_dir)
    told = checkpoint.read_metadata(base_dir)
    if told.get("lora"):
        raise checkpoint.CheckpointMismatch(
            f"{base_dir} holds adapters itself; name the checkpoint of the weights that {adapter_dir} was trained on"
        )
    # Through ModelConfig: a field that one of the two was written before has its default.
    told_model = ModelConfig.from_dict(told["model"]).architecture() if "model" in told else None
    stored: dict[str, Any] = {"model": told_model}
    asked = {"model": dataclasses.replace(config, lora=None).architecture()}
    if told.get("tokenizer") and metadata.get("tokenizer"):
        stored["tokenizer"], asked["tokenizer"] = told["tokenizer"], metadata["tokenizer"]
    for key, value in (metadata.get("base") or {}).items():
        stored[key], asked[key] = told.get(key), value
    found = artifacts.differences(stored, asked)
    if found:
        raise checkpoint.CheckpointMismatch(
            f"{adapter_dir} was not trained on {base_dir} ({artifacts.describe(found, 'the base', 'the adapters')}); "
            "name the checkpoint that it was trained on"
        )
    params, _ = checkpoint.load_model(base_dir)
    return merged_config(config), merged(config, decoder.merge(adapters, params))


def _merge_into_folder(
    adapter_dir: str | os.PathLike[str], config: ModelConfig, adapters: decoder.Params, folder: str | os.PathLike[str]
) -> tuple[ModelConfig, dict[str, Any]]:
    """`merge_checkpoint` for a base in a Hugging Face folder; how many rows are padding is the adapters' own word."""
    found = hf_import.read_config(folder)
    stored, asked = (dataclasses.replace(each, num_tokens=0).architecture() for each in (found, config))
    differences = artifacts.differences(stored, asked)
    if differences:
        raise checkpoint.CheckpointMismatch(
            f"{adapter_dir} was not trained on {folder} ({artifacts.describe(differences, 'the folder', 'the adapters')}); "
            "name the folder of the model below the adapters"
        )
    params = hf_import.import_params(folder, found)
    return merged_config(config), merged(config, decoder.merge(adapters, params))
