"""`config.json` of Hugging Face as a `ModelConfig`, and back.

What an option means is asked of transformers' own configuration class; what we do not compute is refused by name, so
that no folder is ever read as a model that it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subl_jax.models.config import ModelConfig
from subl_jax.models.families import FAMILIES, Family, HuggingFaceError, family_of

# --- config.json -> ModelConfig ---------------------------------------------------------------------------------------

# What every family reads.
_READ = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings "
    "original_max_position_embeddings tie_word_embeddings hidden_act dtype torch_dtype".split()
)
# What cannot change the logits: initialisation, training, bookkeeping, and defaults of generation.
_HARMLESS = frozenset(
    "_name_or_path name_or_path _commit_hash transformers_version initializer_range attention_dropout hidden_dropout "
    "pretraining_tp use_cache bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id "
    "id2label label2id num_labels problem_type return_dict output_hidden_states output_attentions "
    "chunk_size_feed_forward attn_implementation _attn_implementation _attn_implementation_autoset "
    "_flash_attn_2_enabled use_flash_attention tokenizer_class prefix task_specific_params finetuning_task "
    "torchscript model_max_length max_sequence_length unsloth_fixed unsloth_version max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)
# An option of another kind of model, by a part of its name: why it is refused and what to do.
_REFUSED = (
    (("quantization", "compression"), "quantised weights are not read; save a bfloat16 or float32 folder first"),
    (("auto_map",), "the folder's own code is never run; remove auto_map if transformers' own class computes the same"),
    (("expert", "moe"), "mixtures of experts are not supported; use a dense model"),
    (("softcap", "soft_cap"), "capped logits are not supported; use a model without them"),
    (("rotary", "rope"), "this change of the rotary embedding is not supported; use a model without it"),
    (("mlp_bias",), "biases in the MLP are not supported; use a model without them"),
)
_ROPE_READ = frozenset(
    "rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
)
_NEUTRAL = (None, False, 0, "", {}, [])
# The dtype in which weights are held by default: float16 has no counterpart here, and only float32 holds all its values.
_HELD_AS = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}


def model_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`, with its dtype as param_dtype and compute_dtype.

    Args:
      raw: the parsed file.
      where: its path, for errors.

    Raises:
      HuggingFaceError: an unknown architecture, an option that would change the function in a way that we do not
        compute, or a value that transformers itself refuses; it is named.
    """
    family = _family_of_file(raw, where)
    _refuse_options(raw, family, where)
    dtype = _dtype(raw, where)
    hf = _interpret(raw, family, where)
    rope = hf.rope_parameters
    scaled = rope["rope_type"] == "llama3"
    attention_bias = bool(getattr(hf, "attention_bias", False))
    biases = family.biases[0] if len(family.biases) == 1 else (attention_bias, attention_bias)
    try:
        return ModelConfig(
            vocab_size=hf.vocab_size,
            d_model=hf.hidden_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            # Qwen2's class has no such field, yet its model honours one.
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            d_ff=hf.intermediate_size,
            rope_theta=float(rope["rope_theta"]),
            rms_eps=float(hf.rms_norm_eps),
            tie_embeddings=bool(hf.tie_word_embeddings),
            rope_factor=float(rope["factor"]) if scaled else 1.0,
            rope_low_freq=float(rope["low_freq_factor"]) if scaled else 1.0,
            rope_high_freq=float(rope["high_freq_factor"]) if scaled else 4.0,
            rope_original_context=int(rope["original_max_position_embeddings"]) if scaled else 8192,
            qkv_bias=biases[0],
            o_bias=biases[1],
            qk_norm=family.qk_norm,
            windows=_windows(hf, family, where),
            param_dtype=dtype,
            compute_dtype=dtype,
        )
    except HuggingFaceError:
        raise
    except (ValueError, TypeError) as error:
        raise HuggingFaceError(f"{where}: {error}") from error


def _family_of_file(raw: Mapping[str, Any], where: str) -> Family:
    architectures = raw.get("architectures") or []
    model_type = raw.get("model_type")
    for family in FAMILIES:
        if architectures == [family.architecture] and model_type in (None, family.model_type):
            return family
        if not architectures and model_type == family.model_type:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise HuggingFaceError(
        f"{where}: architectures={architectures} with model_type={model_type!r} is not a model that we compute; "
        f"use one of {known}, or add its family to subl_jax/models/families.py"
    )


def _refuse_options(raw: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuses, by name and value, what would make the model another function."""
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise HuggingFaceError(f"{where}: hidden_act={raw['hidden_act']!r} is not supported; use a model with 'silu'")
    for name in sorted(raw.keys() - _READ - _HARMLESS - family.options):
        value = raw[name]
        # An option that is off says nothing; a rotary factor of 1 rotates everything, as we do.
        if value in _NEUTRAL or (name == "partial_rotary_factor" and value == 1):
            continue
        raise HuggingFaceError(f"{where}: {name}={_short(value)} is not supported: {_remedy(name)}")
    _refuse_rope(raw, where)


def _remedy(name: str) -> str:
    for parts, remedy in _REFUSED:
        if any(part in name for part in parts):
            return remedy
    return "it may change what the model computes; remove it from config.json if you know that it does not"


def _refuse_rope(raw: Mapping[str, Any], where: str) -> None:
    # transformers takes the old field where both are given.
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping):
        raise HuggingFaceError(f"{where}: {field}={_short(rope)} is not an object; restore it from the original folder")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise HuggingFaceError(
            f"{where}: {field} has rope_type={kind!r}; supported are 'default' and 'llama3'. Use a model with one of "
            "them (many long-context folders run without their scaling: remove the field to use the short context)"
        )
    for name in sorted(rope.keys() - _ROPE_READ):
        if rope[name] not in _NEUTRAL and not (name == "partial_rotary_factor" and rope[name] == 1):
            raise HuggingFaceError(
                f"{where}: {field}.{name}={_short(rope[name])} is not supported; use a model whose rotary embedding "
                "turns whole heads, the same way in every layer"
            )


def _interpret(raw: Mapping[str, Any], family: Family, where: str) -> Any:
    """Transformers' own reading of the file: its defaults, old field names and layer patterns."""
    try:
        return _configure(family, _mutable(raw))
    except ValueError as error:
        raise HuggingFaceError(f"{where}: {error}; restore config.json from the original folder") from error


def _configure(family: Family, fields: Mapping[str, Any]) -> Any:
    """An object of transformers' configuration class; ValueError in one line where it refuses the fields."""
    # Imported here: the forward pass and the trainer need no transformers.
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return getattr(transformers, family.config_class)(**fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _mutable(value: Any) -> Any:
    """A deep copy of JSON values: transformers fills in the dictionaries that it is given."""
    if isinstance(value, Mapping):
        return {key: _mutable(item) for key, item in value.items()}
    return [_mutable(item) for item in value] if isinstance(value, list) else value


def _windows(hf: Any, family: Family, where: str) -> tuple[int, ...]:
    """Tokens that a query sees in each layer: transformers' mask keeps keys j > i - sliding_window, hence so many."""
    if not family.windows:
        return ()
    kinds = [str(kind) for kind in hf.layer_types]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise HuggingFaceError(
                f"{where}: layer_types holds {kind!r}; supported are 'full_attention' and 'sliding_attention'"
            )
    if "sliding_attention" not in kinds:
        return ()
    if not isinstance(hf.sliding_window, int) or hf.sliding_window < 1:
        raise HuggingFaceError(
            f"{where}: layer_types asks for windows, but sliding_window={hf.sliding_window} (use_sliding_window="
            f"{hf.use_sliding_window}); give both, or make every layer 'full_attention'"
        )
    return tuple(hf.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)


def _dtype(raw: Mapping[str, Any], where: str) -> Any:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _HELD_AS:
        raise HuggingFaceError(
            f"{where}: dtype={name!r} is not read; save the folder in bfloat16 or float32 first (float16 is read too)"
        )
    return _HELD_AS[name]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- ModelConfig -> config.json ---------------------------------------------------------------------------------------


def transformers_config(
    config: ModelConfig, *, dtype: str, max_position_embeddings: int, token_ids: Mapping[str, int | None] | None = None
) -> Any:
    """The configuration of transformers that computes what `config` computes.

    Args:
      config: ours; padding of the vocabulary stays, how the model is run is left out.
      dtype: of the tensors, "float32" or "bfloat16".
      max_position_embeddings: the longest context that the model is meant for, in tokens; it changes no logit.
      token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; those not given are None.

    Raises:
      HuggingFaceError: no family carries the model, or transformers refuses its shape.
    """
    family = family_of(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq,
            "high_freq_factor": config.rope_high_freq,
            "original_max_position_embeddings": config.rope_original_context,
        }
    options: dict[str, Any] = {"attention_bias": config.o_bias} if "attention_bias" in family.options else {}
    if family.windows:
        options |= _window_options(config)
    options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(token_ids or {})
    options |= {
        "architectures": [family.architecture],
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_position_embeddings,
    }
    try:
        return _configure(family, options)
    except ValueError as error:
        raise HuggingFaceError(f"transformers' {family.config_class} refuses this model: {error}") from error


def _window_options(config: ModelConfig) -> dict[str, Any]:
    sizes = sorted({window for window in config.windows if window})
    if len(sizes) > 1:
        raise HuggingFaceError(
            f"windows={config.windows} have {len(sizes)} sizes; the families of transformers have one sliding_window"
        )
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    if not sizes:
        return {"use_sliding_window": False, "layer_types": ["full_attention"] * config.num_layers}
    # For readers that know no layer_types: the first layer with a window, if all after it have one too.
    first = kinds.index("sliding_attention")
    suffix = first if all(kind == "sliding_attention" for kind in kinds[first:]) else config.num_layers
    return {
        "use_sliding_window": True,
        "sliding_window": sizes[0],
        "max_window_layers": suffix,
        "layer_types": kinds,
    }
