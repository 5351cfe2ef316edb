"""Writes a model as a Hugging Face folder: our parameters and a tokenizer in, a folder that transformers loads out.

The folder appears complete or not at all. Tensors leave the devices one by one and are written file by file, so the
host holds one file's tensors besides the parameters.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array
from safetensors.numpy import save_file

from subl_jax import artifacts
from subl_jax.models import families, hf_config
from subl_jax.models.config import ModelConfig
from subl_jax.models.families import HuggingFaceError, LeafPath
from subl_jax.models.hf_import import CONFIG, INDEX, SINGLE, convert, copy_blocks, known_tokens

# What transformers itself cuts at: a file that every file system and uploader takes.
MAX_SHARD_BYTES = 5 * 10**9
# Servers read the longest context from config.json; for a model that tells none, a modest one.
MAX_POSITION_EMBEDDINGS = 4096

GENERATION = "generation_config.json"
# What a tokenizer folder of transformers may consist of.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def export_folder(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_position_embeddings: int = MAX_POSITION_EMBEDDINGS,
    overwrite: bool = False,
    report: Callable[[int], object] | None = None,
) -> None:
    """Writes config.json, safetensors, tokenizer files and generation_config.json.

    Args:
      directory: the folder to make; must not exist (or be empty) unless `overwrite`.
      config: the model; its family follows from it (`families.family_of`).
      params: all of its parameters, addressable from this process; adapters must be merged.
      tokenizer: a folder with the tokenizer's files, copied as they stand; None leaves tokenizer and
        generation_config.json out.
      dtype: "float32" or "bfloat16"; by default the one that the parameters are held in.
      max_shard_bytes: a file ends before the tensor that would take it beyond this size.
      max_position_embeddings: the longest context that the model is meant for, in tokens.
      overwrite: replace an older folder.
      report: called with the bytes written since its last call.

    Raises:
      HuggingFaceError: parameters that are not exactly the model's, no family that carries it, a tokenizer that does
        not fit it, or a folder that cannot be written.
    """
    if max_shard_bytes < 1:
        raise HuggingFaceError(f"max_shard_bytes={max_shard_bytes}; it must be positive, e.g. {MAX_SHARD_BYTES}")
    flat: dict[LeafPath, Any] = flatten_dict(params)
    _check_params(config, flat)
    held = {str(leaf.dtype) for leaf in flat.values()}
    if dtype is None and len(held) > 1:
        raise HuggingFaceError(f"the parameters are held in {', '.join(sorted(held))}; say which dtype to write")
    dtype = dtype or held.pop()
    if dtype not in ("float32", "bfloat16"):
        raise HuggingFaceError(f"the parameters are held in {dtype}; say dtype float32 or bfloat16")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer, config.vocab_size)
    ids = {f"{kind}_token_id": getattr(loaded, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    hf = hf_config.transformers_config(
        config, dtype=dtype, max_position_embeddings=max_position_embeddings, token_ids=ids
    )
    try:
        with artifacts.atomic_directory(directory, overwrite=overwrite) as partial:
            hf.save_pretrained(partial)
            _write_tensors(partial, config, flat, jnp.dtype(dtype), max_shard_bytes, report)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, partial)
                _write_generation(partial, ids)
    except FileExistsError as error:
        raise HuggingFaceError(str(error)) from error
    except OSError as error:
        raise HuggingFaceError(f"cannot write {directory}: {artifacts.reason(error)}") from error


def load_tokenizer(directory: str | os.PathLike[str], vocab_size: int | None = None) -> Any:
    """The tokenizer of a folder; with a vocabulary size, checked against it.

    Raises:
      HuggingFaceError: there is none, it has no chat template, or it has ids that the model has no row for.
    """
    # Imported here: transformers takes seconds, and whoever only imports parameters needs none of it.
    from subl_jax.chat import tokenizer as tokenizers

    try:
        tokenizer = tokenizers.load(Path(directory))
    except Exception as error:  # noqa: BLE001 - transformers raises of every kind, and at a config.json beside it too
        text = " ".join(str(error).split())
        raise HuggingFaceError(f"{text}; name the folder of the model's tokenizer with --tokenizer") from error
    if vocab_size is not None:
        known_tokens(tokenizer, vocab_size, "the model")
    return tokenizer


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies tokenizer files and generation_config.json, byte for byte, from one folder into another.

    `target` is created if needed.
    """
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, GENERATION):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    templates = Path(source) / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, Path(target) / templates.name)


def _write_generation(directory: Path, ids: Mapping[str, int | None]) -> None:
    """Where the model came with no generation_config.json of its own (with several ends, say), one of its tokenizer."""
    if (directory / GENERATION).exists():
        return
    from transformers import GenerationConfig

    GenerationConfig(**{name: value for name, value in ids.items() if value is not None}).save_pretrained(directory)


def _check_params(config: ModelConfig, flat: Mapping[LeafPath, Any]) -> None:
    wanted = families.leaves(config)
    for path, leaf in wanted.items():
        if path not in flat:
            raise HuggingFaceError(f"the parameters lack {'/'.join(path)}, which the model's configuration asks for")
        if tuple(flat[path].shape) != leaf.shape:
            raise HuggingFaceError(
                f"the parameter {'/'.join(path)} has shape {list(flat[path].shape)}, the model's configuration asks "
                f"for {list(leaf.shape)}; use the configuration that the parameters were made with"
            )
        if isinstance(flat[path], jax.Array) and not flat[path].is_fully_addressable:
            raise HuggingFaceError(f"{'/'.join(path)} is spread over several processes; export from its checkpoint")
    surplus = sorted("/".join(path) for path in flat.keys() - wanted.keys())
    if surplus:
        adapters = "; merge the adapters first" if "lora_" in surplus[0] else ""
        raise HuggingFaceError(f"the parameter {surplus[0]} has no place in a Hugging Face folder{adapters}")


# --- Tensors ----------------------------------------------------------------------------------------------------------


def _plan(config: ModelConfig, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """The tensors of each file, in the order of a forward pass."""
    leaves = families.leaves(config)
    files: list[list[str]] = [[]]
    size = 0
    for name, (path, _) in families.tensors(config).items():
        tensor = int(np.prod(leaves[path].tensor_shape)) * itemsize
        if files[-1] and size + tensor > max_shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor
    return files


def _write_tensors(
    directory: Path, config: ModelConfig, flat: Mapping[LeafPath, Any], dtype: np.dtype, max_shard_bytes: int,
    report: Callable[[int], object] | None,
) -> None:  # fmt: skip
    leaves, places = families.leaves(config), families.tensors(config)
    plan = _plan(config, dtype.itemsize, max_shard_bytes)
    weight_map, total = {}, 0
    for number, names in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        held = {}
        for name in names:
            path, layer = places[name]
            held[name] = _tensor(flat[path], layer, leaves[path].transposed, dtype)
            weight_map[name] = file
            total += held[name].nbytes
            if report is not None:
                report(held[name].nbytes)
        save_file(held, directory / file, metadata={"format": "pt"})  # transformers refuses files that do not say so
        shutil.copymode(directory / CONFIG, directory / file)  # safetensors makes its files private to their owner
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@jax.jit
def _layer(leaf: Array, layer: int | Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _tensor(leaf: Any, layer: int | None, transposed: bool, dtype: np.dtype) -> np.ndarray:
    """One tensor as the files keep it, in memory of its own."""
    # Sliced on the device: reading the whole leaf would leave a copy of it with the array, and at the end two models.
    values = np.asarray(leaf if layer is None else _layer(leaf, layer))
    values = convert(values.T if transposed else values, dtype)
    held = np.empty(values.shape, dtype)
    copy_blocks(held, values)
    return held
