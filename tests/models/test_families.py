"""What config.json means, what of it is refused, and which tensors make which leaf."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import pytest
from flax.traverse_util import flatten_dict

from subl_jax.models import decoder, families, hf_config
from subl_jax.models.config import ModelConfig
from subl_jax.models.families import HuggingFaceError
from tests.models.hf_folders import raw_config, tensor_shapes

# The files of published models, as they stand on the hub.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN_2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3_HALF_B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_published_configurations_are_read_as_they_are_meant():
    assert hf_config.model_config(LLAMA_3_2_1B) == ModelConfig(
        128256, 2048, 16, 32, 8, 64, 8192, rope_theta=500_000.0, rms_eps=1e-5, rope_factor=32.0, rope_low_freq=1.0,
        rope_high_freq=4.0, rope_original_context=8192, param_dtype="bfloat16", compute_dtype="bfloat16",
    )  # fmt: skip
    assert hf_config.model_config(QWEN_2_5_HALF_B) == ModelConfig(
        151936, 896, 24, 14, 2, 64, 4864, rope_theta=1e6, rms_eps=1e-6, qkv_bias=True,
        param_dtype="bfloat16", compute_dtype="bfloat16",
    )  # fmt: skip
    assert hf_config.model_config(QWEN_3_HALF_B) == ModelConfig(
        151936, 1024, 28, 16, 8, 128, 3072, rope_theta=1e6, rms_eps=1e-6, qk_norm=True,
        param_dtype="bfloat16", compute_dtype="bfloat16",
    )  # fmt: skip


def test_old_and_new_names_of_the_rotary_scaling_mean_the_same():
    scaling = dict(LLAMA_3_2_1B["rope_scaling"])
    old = hf_config.model_config(LLAMA_3_2_1B)
    fresh = {name: value for name, value in LLAMA_3_2_1B.items() if not name.startswith("rope")}
    assert hf_config.model_config({**fresh, "rope_parameters": {**scaling, "rope_theta": 500_000.0}}) == old
    older = {**{key: value for key, value in scaling.items() if key != "rope_type"}, "type": "llama3"}
    assert hf_config.model_config({**LLAMA_3_2_1B, "rope_scaling": older}) == old


def test_reading_a_configuration_leaves_it_as_it_was():
    raw = raw_config(rope_parameters={"rope_type": "default"})
    hf_config.model_config(raw)
    assert raw["rope_parameters"] == {"rope_type": "default"}


def test_absent_options_take_the_defaults_of_transformers():
    raw = raw_config(num_key_value_heads=None, head_dim=None, rms_norm_eps=None, torch_dtype=None, rope_theta=None)
    found = hf_config.model_config(raw)
    assert (found.num_kv_heads, found.head_dim, found.rms_eps) == (4, 8, 1e-6)
    assert (found.param_dtype, found.rope_theta) == ("float32", 10_000.0)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (dict(use_sliding_window=False, sliding_window=9), ()),
        (dict(use_sliding_window=True, sliding_window=9, max_window_layers=1), (0, 9, 9)),
        (dict(use_sliding_window=True, sliding_window=9, max_window_layers=3), ()),
        (
            dict(
                use_sliding_window=True, sliding_window=9,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            (9, 0, 9),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_windows_follow_the_options_of_qwen(architecture, changes, windows):
    assert hf_config.model_config(raw_config(architecture, num_hidden_layers=3, **changes)).windows == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architectures=["GemmaForCausalLM"]), r"architectures=\['GemmaForCausalLM'\].*families.py"),
        (dict(architectures=["LlamaModel"]), "LlamaModel.*use one of LlamaForCausalLM"),
        (dict(model_type="mistral"), "model_type='mistral' is not a model that we compute"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'.*'silu'"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported: biases in the MLP"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling has rope_type='yarn'.*'llama3'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type='linear'"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_parameters has rope_type='dynamic'"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters.full_attention"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "rope_parameters.partial_rotary_factor=0.5"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "config.json: .*low_freq_factor"),
        (dict(rope_scaling="llama3"), "rope_scaling='llama3' is not an object"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5.*rotary"),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config=.*gptq.*bfloat16 or float32"),
        (dict(compression_config={"format": "pack"}), "compression_config=.*quantised"),
        (dict(auto_map={"AutoModelForCausalLM": "m.Model"}), "auto_map=.*own code is never run"),
        (dict(num_local_experts=8), "num_local_experts=8.*dense model"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0.*capped"),
        (dict(logits_scaling=8.0), "logits_scaling=8.0 is not supported: it may change.*remove it"),
        (dict(sliding_window=512), "sliding_window=512"),  # Llama has none
        (dict(torch_dtype="float8_e4m3fn"), "dtype='float8_e4m3fn'"),
        (dict(hidden_size="wide"), "config.json: .*hidden_size.*restore config.json"),
        (dict(num_key_value_heads=3), "num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (dict(rope_scaling={**LLAMA_3_2_1B["rope_scaling"], "factor": 0.5}), "rope_factor=0.5"),
    ],
)  # fmt: skip
def test_what_we_do_not_compute_is_refused_by_name(changes, message):
    with pytest.raises(HuggingFaceError, match=message) as error:
        hf_config.model_config(raw_config(**changes), "folder/config.json")
    assert str(error.value).startswith("folder/config.json") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layer_types=["sliding_attention"] * 2), "layer_types asks for windows, but sliding_window=None"),
        (dict(layer_types=["chunked_attention"] * 2), "layer_types holds 'chunked_attention'"),
        (dict(layer_types=["full_attention"]), "num_hidden_layers"),
        (dict(attention_bias=True), "attention_bias=True is not supported"),  # Qwen2's are always there
    ],
)
def test_what_qwen_does_not_compute_is_refused_by_name(changes, message):
    with pytest.raises(HuggingFaceError, match=message):
        hf_config.model_config(raw_config("Qwen2ForCausalLM", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(unknown_option=False, other=None, third=[]),
        dict(partial_rotary_factor=1.0, num_experts=0, quantization_config={}),
        dict(unsloth_fixed=True, temperature=0.6, _name_or_path="x", id2label={"0": "a"}),
    ],
)
def test_what_changes_no_logit_is_ignored(changes):
    assert hf_config.model_config(raw_config(**changes)) == hf_config.model_config(raw_config())


CONFIGS = {
    "LlamaForCausalLM": [{}, dict(attention_bias=True, tie_word_embeddings=True)],
    "Qwen2ForCausalLM": [{}],
    "Qwen3ForCausalLM": [{}, dict(attention_bias=True)],
}
MODELS = [raw_config(name, **changes) for name, cases in CONFIGS.items() for changes in cases]
NAMED = pytest.mark.parametrize("raw", MODELS, ids=lambda raw: f"{raw['model_type']}{raw.get('attention_bias', '')}")


@NAMED
def test_the_leaves_are_those_of_the_decoder(raw):
    config = hf_config.model_config(raw)
    made: Any = flatten_dict(jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0)))
    assert {path: leaf.shape for path, leaf in families.leaves(config).items()} == {
        path: leaf.shape for path, leaf in made.items()
    }


@NAMED
def test_the_tensors_are_those_of_the_published_folders(raw):
    config = hf_config.model_config(raw)
    wanted = tensor_shapes(raw)
    leaves = families.leaves(config)
    places = families.tensors(config)
    assert {name: leaves[path].tensor_shape for name, (path, _) in places.items()} == wanted
    for name, (path, layer) in places.items():
        assert leaves[path].names[layer or 0] == name
    assert next(iter(places)) == "model.embed_tokens.weight"


@NAMED
def test_a_configuration_survives_the_way_to_transformers_and_back(raw):
    config = hf_config.model_config(raw)
    back = hf_config.transformers_config(config, dtype="float32", max_position_embeddings=128).to_dict()
    assert families.family_of(config).architecture == raw["architectures"][0] == back["architectures"][0]
    assert hf_config.model_config(back) == config


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_factor=8.0, rope_low_freq=1.0, rope_high_freq=4.0, rope_original_context=64),
        dict(qkv_bias=True, windows=(0, 6)),
        dict(qk_norm=True, windows=(6, 0)),
        dict(qk_norm=True, windows=(6, 6), head_dim=6),
    ],
)
def test_scaling_and_windows_survive_the_way_to_transformers_and_back(changes):
    config = dataclasses.replace(ModelConfig(), **changes)
    back = hf_config.transformers_config(config, dtype="float32", max_position_embeddings=128).to_dict()
    assert hf_config.model_config(back) == config
    assert back["max_position_embeddings"] == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(o_bias=True), "no family of transformers has qkv_bias=False, o_bias=True"),
        (dict(windows=(0, 6)), r"windows=\(0, 6\)"),
        (dict(qk_norm=True, windows=(5, 6)), r"windows=\(5, 6\) have 2 sizes"),
        (dict(d_model=62), "LlamaConfig refuses this model: .*hidden size"),
    ],
)
def test_a_model_that_no_family_carries_is_refused(changes, message):
    with pytest.raises(HuggingFaceError, match=message):
        hf_config.transformers_config(
            dataclasses.replace(ModelConfig(), **changes), dtype="float32", max_position_embeddings=64
        )
