"""PEFT's adapter_config.json: what it says of adapters, as our `LoraConfig`, and back.

An option that changes the function in a way that ours cannot compute is refused by name and value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.models import families
from subl_jax.models.config import LAYER_TARGETS, LORA_TARGETS, LoraConfig, ModelConfig
from subl_jax.models.families import HuggingFaceError, Leaf

# Tied or not, the head is a module of its own there.
_HEAD = "lm_head.weight"

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


def kernel(config: ModelConfig, target: str) -> Leaf:
    """The matrix that an adapter sits on, by the name of its module in PEFT."""
    if target == "head":
        return Leaf(_HEAD, (config.d_model, config.vocab_size), True)
    return families.leaves(config)["layers", target, "kernel"]


def to_json(config: ModelConfig, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; fields that it leaves out have PEFT's defaults, which are off."""
    assert config.lora is not None
    modules = [kernel(config, name).tensor.split(".")[-2] for name in config.lora.targets]
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


def read(path: Path, config: ModelConfig) -> LoraConfig:
    """What a file says of adapters on a model.

    Raises:
      HuggingFaceError: it is missing or damaged, or asks for something that we do not compute.
    """
    return _lora_config(_read(path), config, str(path))


def _read(path: Path) -> dict[str, Any]:
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
    targets = _targets(raw.get("target_modules"), config, where)
    if "head" in targets and config.tie_embeddings and raw.get("ensure_weight_tying"):
        raise HuggingFaceError(
            f"{where}: ensure_weight_tying={raw['ensure_weight_tying']!r} with lm_head puts an adapter on the embedding too, "
            "which is not supported; train them without"
        )
    try:
        return LoraConfig(rank, _number(raw, "lora_alpha", where), _number(raw, "lora_dropout", where), targets)
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
        return LAYER_TARGETS  # PEFT leaves the head out
    if not isinstance(modules, list) or not modules or not all(isinstance(entry, str) for entry in modules):
        what = "is a pattern" if isinstance(modules, str) else "is not a list of names"
        raise HuggingFaceError(
            f"{where}: target_modules={modules!r} {what}; list the matrices by name, e.g. ['q_proj', 'v_proj']"
        )
    names = {
        (target, layer): name.removesuffix(".weight")
        for target in LORA_TARGETS
        for layer, name in enumerate(kernel(config, target).names)
    }
    matched = set()
    for entry in modules:
        found = {place for place, name in names.items() if f".{name}".endswith(f".{entry}")}
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in names.values()})
            raise HuggingFaceError(
                f"{where}: target_modules names {entry!r}, which is no matrix that adapters may sit on; known are "
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
