"""Adapters in PEFT's folder format: our adapters become a folder that `peft.PeftModel` loads, and back.

A folder holds adapter_config.json and adapter_model.safetensors. What an adapter of ours could not compute is refused by
name, so that no folder is ever read as adapters that it does not hold; nothing is unpickled or downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from subl_jax.models import decoder, families, hf_import, lora
from subl_jax.models.config import LORA_TARGETS, LoraConfig, ModelConfig
from subl_jax.models.families import HuggingFaceError, Leaf, LeafPath

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# PeftModel and LoraModel each wrap the model once.
_WRAPPERS = "base_model.model."

_READ = frozenset("peft_type task_type r lora_alpha lora_dropout target_modules bias init_lora_weights".split())
# Bookkeeping, and what acts only through an option that is itself checked.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode peft_version megatron_core qalora_group_size "
    "runtime_config ensure_weight_tying eva_config corda_config lora_ga_config loftq_config".split()
)
# Ways to draw the first A and B that leave the weights below as they are; the others (PiSSA, CorDA, OLoRA, LoftQ, …)
# change them, and their adapters are no use without that change.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
_NEUTRAL = (None, False, 0, "", {}, [])
_MERGE = (
    "merge the adapters with PEFT instead (PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(OUT)) "
    "and import OUT as a model"
)


def adapter_leaves(config: ModelConfig) -> dict[LeafPath, Leaf]:
    """Every leaf of the adapters by its path, and the tensors of PEFT that it is stacked from.

    A is [layers, in, rank] with us and `lora_A` [rank, in] in the files; B is [layers, rank, out] and `lora_B` [out, rank].

    Raises:
      HuggingFaceError: the configuration has no adapters.
    """
    if config.lora is None:
        raise HuggingFaceError("the model configuration has no adapters (lora is None); give it a LoraConfig")
    kernels = families.leaves(config)
    found = {}
    for target in config.lora.targets:
        kernel = kernels["layers", target, "kernel"]
        module = _WRAPPERS + kernel.tensor.removesuffix(".weight")
        layers, source, out = kernel.shape
        found["layers", target, "lora_a"] = Leaf(f"{module}.lora_A.weight", (layers, source, config.lora.rank), True)
        found["layers", target, "lora_b"] = Leaf(f"{module}.lora_B.weight", (layers, config.lora.rank, out), True)
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
        tensors |= {name: np.ascontiguousarray(values[layer].T) for layer, name in enumerate(leaf.names)}
    text = json.dumps(_adapter_config(config, base), indent=2, sort_keys=True) + "\n"
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


def _adapter_config(config: ModelConfig, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; fields that it leaves out have PEFT's defaults, which are off."""
    assert config.lora is not None
    kernels = families.leaves(config)
    modules = [kernels["layers", name, "kernel"].tensor.split(".")[-2] for name in config.lora.targets]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "revision": None,
    }


# --- Folder -> adapters -----------------------------------------------------------------------------------------------


def read_peft(directory: str | os.PathLike[str], config: ModelConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """The adapters of a PEFT folder.

    Args:
      directory: a local folder with adapter_config.json and adapter_model.safetensors.
      config: the model that the adapters sit on; its own `lora` is not looked at.

    Returns:
      The adapters' configuration (targets in the order of `LORA_TARGETS`) and their tree on the default device:
      A [layers, in, rank], B [layers, rank, out], in bfloat16 where the whole file is, else in float32; values are kept.

    Raises:
      HuggingFaceError: an option that changes the function in a way that we do not compute, a missing, surplus or
        misshapen tensor (adapters of another model), or a missing, truncated or corrupt file; it is named.
    """
    directory = Path(directory)
    adapter = _lora_config(_read_json(directory / CONFIG), config, str(directory / CONFIG))
    leaves = adapter_leaves(dataclasses.replace(config, lora=adapter))
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
            _check_tensors(path, header, leaves, config)
            # The narrowest that holds every value of the file.
            dtype = np.dtype(jnp.bfloat16 if all(kind == "BF16" for kind, _ in header.values()) else np.float32)
            values = {name: hf_import.convert(file.get_tensor(name), dtype) for name in header}
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(
            f"{path} is truncated or corrupt ({artifacts.reason(error)}); download this file again"
        ) from error
    stacked = {path: jnp.asarray(np.stack([values[name].T for name in leaf.names])) for path, leaf in leaves.items()}
    return adapter, unflatten_dict(stacked)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise HuggingFaceError(
            f"{path} is missing; give a local folder of PEFT (nothing is downloaded here: fetch adapters first, "
            "e.g. hf download ORG/ADAPTERS --local-dir DIR)"
        ) from None
    except (OSError, ValueError) as error:
        raise HuggingFaceError(
            f"{path} is not readable as JSON ({artifacts.reason(error)}); restore it from the original folder"
        ) from error
    if not isinstance(content, dict):
        raise HuggingFaceError(f"{path} holds a {type(content).__name__} where an object is needed; restore the file")
    return content


def _lora_config(raw: Mapping[str, Any], config: ModelConfig, where: str) -> LoraConfig:
    """The `LoraConfig` of a parsed adapter_config.json; refuses, by name and value, what ours cannot say."""
    if raw.get("peft_type") != "LORA":
        raise HuggingFaceError(f"{where}: peft_type={raw.get('peft_type')!r} is not supported, only 'LORA'; {_MERGE}")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise HuggingFaceError(f"{where}: task_type={raw['task_type']!r} is not supported, only 'CAUSAL_LM'")
    if raw.get("bias", "none") != "none":
        raise HuggingFaceError(f"{where}: bias={raw['bias']!r} is not supported, only 'none'; {_MERGE}")
    if raw.get("init_lora_weights") not in _INITIALISATIONS:
        raise HuggingFaceError(
            f"{where}: init_lora_weights={raw['init_lora_weights']!r} changes the weights below the adapters; convert them "
            "with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name in sorted(raw.keys() - _READ - _HARMLESS):
        if raw[name] not in _NEUTRAL:
            value = repr(raw[name])
            value = value if len(value) <= 80 else value[:77] + "..."
            raise HuggingFaceError(f"{where}: {name}={value} is not supported; {_MERGE}")
    rank = raw.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise HuggingFaceError(f"{where}: r={rank!r} is no whole number; restore the file")
    try:
        return LoraConfig(
            rank, _number(raw, "lora_alpha", where), _number(raw, "lora_dropout", where),
            _targets(raw.get("target_modules"), config, where),
        )  # fmt: skip
    except HuggingFaceError:
        raise
    except ValueError as error:
        raise HuggingFaceError(f"{where}: {error}") from error


def _number(raw: Mapping[str, Any], name: str, where: str) -> float:
    value = raw.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise HuggingFaceError(f"{where}: {name}={value!r} is no finite number; restore the file")
    return float(value)


def _targets(modules: Any, config: ModelConfig, where: str) -> tuple[str, ...]:
    """The matrices that `target_modules` names. As in PEFT, an entry means every module whose dotted name ends in it."""
    if isinstance(modules, str) and modules.lower() == "all-linear":
        return LORA_TARGETS  # PEFT leaves the head out
    if not isinstance(modules, list) or not modules or not all(isinstance(entry, str) for entry in modules):
        what = "is a pattern" if isinstance(modules, str) else "is not a list of names"
        raise HuggingFaceError(
            f"{where}: target_modules={modules!r} {what}; list the matrices by name, e.g. ['q_proj', 'v_proj']"
        )
    kernels = families.leaves(config)
    names = {
        (target, layer): name.removesuffix(".weight")
        for target in LORA_TARGETS
        for layer, name in enumerate(kernels["layers", target, "kernel"].names)
    }
    matched = set()
    for entry in modules:
        found = {place for place, name in names.items() if f".{name}".endswith(f".{entry}")}
        if not found:
            known = sorted({name.rsplit(".", 1)[1] for name in names.values()})
            raise HuggingFaceError(
                f"{where}: target_modules names {entry!r}, which is no matrix of a layer of this model; known are "
                f"{', '.join(known)}. {_MERGE[0].upper()}{_MERGE[1:]}"
            )
        matched |= found
    for target, layer in sorted(names.keys() - matched):
        if any(target == other for other, _ in matched):
            raise HuggingFaceError(
                f"{where}: target_modules leaves out {names[target, layer]}, though other layers have that matrix; "
                f"adapters on some layers only are not supported: {_MERGE}"
            )
    return tuple(target for target in LORA_TARGETS if (target, 0) in matched)


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
