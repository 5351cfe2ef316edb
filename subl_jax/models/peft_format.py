"""Adapters in PEFT's folder format: our adapters become a folder that `peft.PeftModel` loads, and back.

A folder holds adapter_config.json and adapter_model.safetensors. What an adapter of ours could not compute is refused by
name, so that no folder is ever read as adapters that it does not hold; nothing is unpickled or downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from subl_jax import artifacts, checkpoint
from subl_jax.models import decoder, hf_import, lora, peft_config
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.models.families import HuggingFaceError, Leaf, LeafPath

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# PeftModel and LoraModel each wrap the model once.
_WRAPPERS = "base_model.model."
# PEFT saves a copy of the model's own head with an adapter on it, and puts it in the head's place when it loads.
_HEAD_COPY = f"{_WRAPPERS}lm_head.base_layer.weight"


def adapter_leaves(config: ModelConfig) -> dict[LeafPath, Leaf]:
    """Every leaf of the adapters by its path, and the tensors of PEFT that it is stacked from.

    A is [layers, in, rank] with us and `lora_A` [rank, in] in the files; B is [layers, rank, out] and `lora_B` [out, rank].
    The head's have no layers.

    Raises:
      HuggingFaceError: the configuration has no adapters.
    """
    if config.lora is None:
        raise HuggingFaceError("the model configuration has no adapters (lora is None); give it a LoraConfig")
    found, rank = {}, config.lora.rank
    for target in config.lora.targets:
        kernel = peft_config.kernel(config, target)
        module = _WRAPPERS + kernel.tensor.removesuffix(".weight")
        *layers, source, out = kernel.shape
        path = ("head_adapter",) if target == "head" else ("layers", target)
        found[*path, "lora_a"] = Leaf(f"{module}.lora_A.weight", (*layers, source, rank), True)
        found[*path, "lora_b"] = Leaf(f"{module}.lora_B.weight", (*layers, rank, out), True)
    return found


# --- Adapters -> folder -----------------------------------------------------------------------------------------------


def write_peft(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    adapters: decoder.Params,
    *,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters as a folder that `PeftModel.from_pretrained(model, directory)` loads.

    Args:
      directory: the folder to make; appears complete or not at all; must not exist (or be empty) unless `overwrite`.
      config: the model with its `lora`.
      adapters: the leaves `lora_a`, `lora_b` of every target and nothing else, addressable from this process.
      base: folder or Hub name of the model that the adapters sit on; `AutoPeftModelForCausalLM` finds it by this.
      dtype: "float32" or "bfloat16"; by default the one that the adapters are held in.
      overwrite: replace an older folder.

    Raises:
      HuggingFaceError: adapters that are not exactly the configuration's, or a folder that cannot be written.
    """
    leaves = adapter_leaves(config)
    flat: dict[LeafPath, Any] = flatten_dict(adapters)
    _check_adapters(flat, leaves)
    held = sorted({str(leaf.dtype) for leaf in flat.values()})
    dtype = dtype or (held[0] if len(held) == 1 else None)
    if dtype not in ("float32", "bfloat16"):
        raise HuggingFaceError(
            f"adapters held in {', '.join(held)} cannot be written as {dtype or 'they are'}; say dtype float32 or bfloat16"
        )
    tensors = {}
    for path, leaf in leaves.items():
        values = hf_import.convert(np.asarray(flat[path]), np.dtype(jnp.dtype(dtype)))
        parts = values if leaf.stacked else [values]
        tensors |= {name: np.ascontiguousarray(part.T) for name, part in zip(leaf.names, parts, strict=True)}
    text = json.dumps(peft_config.to_json(config, base), indent=2, sort_keys=True) + "\n"
    try:
        with artifacts.atomic_directory(directory, overwrite=overwrite) as partial:
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise HuggingFaceError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise HuggingFaceError(f"cannot write {directory}: {artifacts.reason(error)}") from error


def _check_adapters(flat: Mapping[LeafPath, Any], leaves: Mapping[LeafPath, Leaf]) -> None:
    for path, leaf in leaves.items():
        name = "/".join(path)
        if path not in flat:
            raise HuggingFaceError(f"the adapters lack {name}, which the model's configuration asks for")
        if tuple(flat[path].shape) != leaf.shape:
            raise HuggingFaceError(
                f"the adapter {name} has shape {list(flat[path].shape)}, the model's configuration asks for "
                f"{list(leaf.shape)}; use the configuration that the adapters were trained with"
            )
        if isinstance(flat[path], jax.Array) and not flat[path].is_fully_addressable:
            raise HuggingFaceError(f"{name} is spread over several processes; export from its checkpoint")
    surplus = sorted("/".join(path) for path in flat.keys() - leaves.keys())
    if surplus:
        raise HuggingFaceError(
            f"{surplus[0]} is no adapter of this configuration; give the adapters alone (lora.split)"
        )


# --- Folder -> adapters -----------------------------------------------------------------------------------------------


def read_peft(
    directory: str | os.PathLike[str], config: ModelConfig, base: decoder.Params | None = None
) -> tuple[LoraConfig, dict[str, Any]]:
    """The adapters of a PEFT folder.

    Args:
      directory: a local folder with adapter_config.json and adapter_model.safetensors.
      config: the model that the adapters sit on; its own `lora` is not looked at.
      base: its parameters. Needed only for an adapter on the head that PEFT saved with a copy of the model's head, which
        must be the same.

    Returns:
      The adapters' configuration (targets in the order of `LORA_TARGETS`) and their tree on the default device:
      A [layers, in, rank], B [layers, rank, out] (the head's without layers), in bfloat16 where
        the whole file is, else in float32; values are kept.

    Raises:
      HuggingFaceError: an option that changes the function in a way that we do not compute, a missing, surplus or
        misshapen tensor (adapters of another model), or a missing, truncated or corrupt file; it is named.
    """
    directory = Path(directory)
    adapter = peft_config.read(directory / CONFIG, config)
    adapter_config = dataclasses.replace(config, lora=adapter)
    leaves = adapter_leaves(adapter_config)
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = (
            f": its weights are a pickle ({_PICKLE}), which can run any code and is never read here; save them as "
            "safetensors first, where you trust the file: PeftModel.from_pretrained(base, DIR).save_pretrained(OTHER)"
        )
        raise HuggingFaceError(
            f"{directory} holds no {WEIGHTS}{pickled if (directory / _PICKLE).exists() else '; complete the folder'}"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            if adapter_config.adapts_head and _HEAD_COPY in header:
                _check_head(path, hf_import.convert(file.get_tensor(_HEAD_COPY), np.dtype(np.float32)), config, base)
                del header[_HEAD_COPY]
            _check_tensors(path, header, leaves, config)
            # The narrowest that holds every value of the file.
            dtype = np.dtype(jnp.bfloat16 if all(kind == "BF16" for kind, _ in header.values()) else np.float32)
            values = {name: hf_import.convert(file.get_tensor(name), dtype) for name in header}
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(
            f"{path} is truncated or corrupt ({artifacts.reason(error)}); download this file again"
        ) from error
    parts = {path: [values[name].T for name in leaf.names] for path, leaf in leaves.items()}
    stacked = {path: jnp.asarray(np.stack(own) if leaves[path].stacked else own[0]) for path, own in parts.items()}
    return adapter, unflatten_dict(stacked)


def _check_head(path: Path, copy: np.ndarray, config: ModelConfig, base: decoder.Params | None) -> None:
    """Refuses a copy of the head that is not the model's: with it PEFT would compute other logits."""
    remedy = "save the adapters with save_pretrained(DIR, save_embedding_layers=False)"
    if base is None:
        raise HuggingFaceError(f"{path}: {_HEAD_COPY} replaces the model's head; give its parameters too, or {remedy}")
    own = np.asarray(base["embedding"] if config.tie_embeddings else base["head"].T)
    if copy.shape != own.shape or not np.array_equal(hf_import.convert(copy, own.dtype), own):
        raise HuggingFaceError(
            f"{path}: {_HEAD_COPY} differs from the model's head, which was trained or resized besides the adapters; name "
            f"the model that they were saved with, or, where its own head is meant, {remedy}"
        )


def _check_tensors(
    path: Path, header: Mapping[str, tuple[str, tuple[int, ...]]], leaves: Mapping[LeafPath, Leaf], config: ModelConfig
) -> None:
    """Refuses a file whose tensors are not exactly those of the adapters; `header` holds dtype and shape of each."""
    wanted = {name: leaf.tensor_shape for leaf in leaves.values() for name in leaf.names}
    for name, shape in wanted.items():
        if name not in header:
            raise HuggingFaceError(
                f"{path} lacks the tensor {name}, which {CONFIG} asks for on a model of {config.num_layers} layers; "
                "complete the folder, or name the model that the adapters were trained on"
            )
        if header[name][1] != shape:
            raise HuggingFaceError(
                f"{path}: the tensor {name} has shape {list(header[name][1])} where {CONFIG} and the model ask for "
                f"{list(shape)}; the adapters belong to a model of another shape, or the two files to different adapters"
            )
    for name, (dtype, _) in header.items():
        if name not in wanted:
            raise HuggingFaceError(
                f"{path}: the tensor {name} is none of the adapters that {CONFIG} asks for on a model of "
                f"{config.num_layers} layers; name the model that they were trained on, or remove what nothing reads"
            )
        if dtype not in hf_import.DTYPES:
            raise HuggingFaceError(
                f"{path}: the tensor {name} has dtype {dtype}; read are {', '.join(hf_import.DTYPES)}. Save the adapters "
                "in bfloat16 or float32 first"
            )


# --- Checkpoint -> folder ---------------------------------------------------------------------------------------------


def export_adapters(
    adapter_dir: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> ModelConfig:
    """An adapter checkpoint of ours becomes a folder that PEFT loads.

    Args:
      adapter_dir: what training with adapters wrote (see `lora.load_adapters`).
      base: the Hugging Face folder of the model below, which is compared with what the adapters were trained on, or its
        name on the Hub, which is written down as it stands.
      out_dir, dtype, overwrite: see `write_peft`.

    Returns:
      The model's configuration with its adapters.

    Raises:
      CheckpointError: there is no such checkpoint, or it holds no adapters.
      HuggingFaceError: the base is another model, or the folder cannot be written.
    """
    config, adapters, _ = lora.load_adapters(adapter_dir)
    write_peft(out_dir, config, adapters, base=_base_name(base, config), dtype=dtype, overwrite=overwrite)
    return config


def _base_name(base: str | os.PathLike[str], config: ModelConfig) -> str:
    """What adapter_config.json calls the model below; a folder is checked against `config`."""
    path = Path(base)
    if not path.is_dir():
        if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(base)):
            return str(base)
        raise HuggingFaceError(f"{base} is neither a folder nor a name like ORG/MODEL; name the base of the adapters")
    if (path / checkpoint.METADATA).is_file():
        raise HuggingFaceError(
            f"{base} is a checkpoint of this project, which PEFT cannot load; export it first "
            "(python -m subl_jax.models.convert export) and name the folder that this makes"
        )
    # The tokenizer, which says how many rows are padding, need not lie in the folder; padding changes no weight.
    stored, wanted = (
        dataclasses.replace(each, num_tokens=0).architecture() for each in (hf_import.read_config(path), config)
    )
    found = artifacts.differences(stored, wanted)
    if found:
        raise HuggingFaceError(
            f"the adapters were not trained on {base} ({artifacts.describe(found, 'the folder', 'the adapters')}); "
            "name the folder of the model below them"
        )
    return str(path.absolute())
