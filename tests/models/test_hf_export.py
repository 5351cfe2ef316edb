"""From our parameters to Hugging Face folders: the same bits back, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subl_jax.models import families, hf_export, hf_import
from subl_jax.models.config import ModelConfig
from subl_jax.models.families import HuggingFaceError
from tests.models.hf_folders import folder_tensors, random_tensors, raw_config, write_folder, write_tokenizer
from tests.models.test_decoder import parameters

CONFIG = ModelConfig(vocab_size=300, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=23)

MODELS = {
    "llama": raw_config(tie_word_embeddings=True),
    "llama_biased": raw_config(attention_bias=True),
    "qwen2": raw_config("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": raw_config("Qwen3ForCausalLM", torch_dtype="bfloat16"),
}


def bits(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])


def assert_same_tree(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), left, right)
    assert jax.tree.map(lambda leaf: leaf.dtype, left) == jax.tree.map(lambda leaf: leaf.dtype, right)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", MODELS)
def test_import_export_import_gives_the_same_bits(tmp_path, case, shards):
    raw = MODELS[case]
    write_folder(tmp_path / "hf", raw, random_tensors(raw, raw["torch_dtype"]), shards)
    config = hf_import.read_config(tmp_path / "hf")
    params = hf_import.import_params(tmp_path / "hf", config)
    hf_export.export_folder(tmp_path / "back", config, params, max_shard_bytes=20_000 * shards)
    assert hf_import.read_config(tmp_path / "back") == config
    assert_same_tree(hf_import.import_params(tmp_path / "back", config), params)
    before, after = folder_tensors(tmp_path / "hf"), folder_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype
        np.testing.assert_array_equal(bits(values), bits(after[name]))


def test_a_tied_head_that_was_written_out_is_not_written_again(tmp_path):
    raw = MODELS["llama"]
    tensors = random_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_folder(tmp_path / "hf", raw, tensors)
    config = hf_import.read_config(tmp_path / "hf")
    hf_export.export_folder(tmp_path / "back", config, hf_import.import_params(tmp_path / "hf", config))
    assert folder_tensors(tmp_path / "back").keys() == tensors.keys() - {"lm_head.weight"}


def test_files_end_at_the_asked_size_and_the_index_names_every_tensor(tmp_path):
    params = parameters(CONFIG)
    hf_export.export_folder(tmp_path / "hf", CONFIG, params, max_shard_bytes=4_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    sizes = {path.name: sum(values.nbytes for values in folder_tensors_of(path).values()) for path in files}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    embedding = index["weight_map"]["model.embed_tokens.weight"]
    assert sizes.pop(embedding) == CONFIG.vocab_size * CONFIG.d_model * 4  # larger than a file may be: alone in one
    assert max(sizes.values()) <= 4_000 and len(sizes) > 2
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1  # no file is more private than another


def folder_tensors_of(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        (dict(qkv_bias=True, o_bias=True), "LlamaForCausalLM"),
        (dict(qkv_bias=True), "Qwen2ForCausalLM"),
        (dict(qkv_bias=True, windows=(0, 5)), "Qwen2ForCausalLM"),
        (dict(qk_norm=True, tie_embeddings=False), "Qwen3ForCausalLM"),
    ],
)
def test_the_family_follows_from_the_model(tmp_path, changes, architecture):
    config = dataclasses.replace(CONFIG, **changes)
    hf_export.export_folder(tmp_path / "hf", config, random_params(config), max_position_embeddings=77)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["architectures"] == [architecture]
    assert raw["max_position_embeddings"] == 77 and raw["dtype"] == "float32"
    assert hf_import.read_config(tmp_path / "hf") == config


def random_params(config: ModelConfig) -> Any:
    from flax.traverse_util import unflatten_dict

    rng = np.random.default_rng(0)
    leaves = families.leaves(config).items()
    return unflatten_dict({path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in leaves})


def test_parameters_over_several_devices_are_gathered_tensor_by_tensor(tmp_path):
    params = random_params(CONFIG)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, P(None, "fsdp"))
    spread = {**params, "layers": {**params["layers"], "q": jax.device_put(params["layers"]["q"], where)}}
    hf_export.export_folder(tmp_path / "spread", CONFIG, spread)
    hf_export.export_folder(tmp_path / "alone", CONFIG, params)
    one, other = (folder_tensors(tmp_path / name) for name in ("spread", "alone"))
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_another_dtype_is_written_on_request_and_a_mixture_is_refused(tmp_path):
    params = random_params(CONFIG)
    hf_export.export_folder(tmp_path / "hf", CONFIG, params, dtype="bfloat16")
    written = folder_tensors(tmp_path / "hf")
    assert {values.dtype for values in written.values()} == {np.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        bits(written["model.layers.1.mlp.up_proj.weight"]),
        bits(params["layers"]["up"]["kernel"][1].T.astype("bfloat16")),
    )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    mixed = {**params, "embedding": params["embedding"].astype("bfloat16")}
    with pytest.raises(HuggingFaceError, match="held in bfloat16, float32; say which dtype"):
        hf_export.export_folder(tmp_path / "mixed", CONFIG, mixed)


def test_parameters_that_are_not_the_models_are_named(tmp_path):
    params = random_params(CONFIG)
    layers = params["layers"]
    cases = [
        ({**params, "head": jnp.ones((16, 300))}, "parameter head has no place"),
        ({key: value for key, value in params.items() if key != "final_norm"}, "lack final_norm/scale"),
        ({**params, "embedding": jnp.ones((299, 16))}, r"embedding has shape \[299, 16\].*asks for \[300, 16\]"),
        (
            {**params, "layers": {**layers, "q": {**layers["q"], "lora_a": jnp.ones((2, 16, 4))}}},
            "layers/q/lora_a has no place.*merge the adapters first",
        ),
    ]  # fmt: skip
    for wrong, message in cases:
        with pytest.raises(HuggingFaceError, match=message):
            hf_export.export_folder(tmp_path / "hf", CONFIG, wrong)
        assert not (tmp_path / "hf").exists()


# --- Tokenizer and generation -----------------------------------------------------------------------------------------


def test_the_tokenizer_comes_along_and_says_where_generation_ends(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = write_tokenizer(tmp_path / "tokenizer", 290)
    hf_export.export_folder(tmp_path / "hf", CONFIG, random_params(CONFIG), tokenizer=tmp_path / "tokenizer")
    again = AutoTokenizer.from_pretrained(str(tmp_path / "hf"), local_files_only=True)
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for content in (GenerationConfig.from_pretrained(tmp_path / "hf"), hf_raw(tmp_path)):
        assert (content.eos_token_id, content.pad_token_id) == ids


def hf_raw(tmp_path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(tmp_path / "hf"), local_files_only=True)


def test_a_generation_configuration_that_came_with_the_model_is_kept(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", 290)
    kept = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True}
    (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps(kept))
    hf_export.export_folder(tmp_path / "hf", CONFIG, random_params(CONFIG), tokenizer=tmp_path / "tokenizer")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == kept


def test_a_missing_or_too_large_tokenizer_is_refused(tmp_path):
    params = random_params(CONFIG)
    with pytest.raises(HuggingFaceError, match="no tokenizer in .*--tokenizer"):
        hf_export.export_folder(tmp_path / "hf", CONFIG, params, tokenizer=tmp_path)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 310)
    small = dataclasses.replace(CONFIG, vocab_size=len(tokenizer) - 1)
    with pytest.raises(HuggingFaceError, match=f"ids up to {len(tokenizer) - 1}, but the model has vocab_size"):
        hf_export.export_folder(tmp_path / "hf", small, random_params(small), tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "hf").exists()


# --- Whole or not at all ----------------------------------------------------------------------------------------------


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    calls = []
    real = hf_export.save_file

    def full_disk(*args: Any, **more: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "")
        real(*args, **more)

    monkeypatch.setattr(hf_export, "save_file", full_disk)
    with pytest.raises(HuggingFaceError, match="cannot write .*No space left on device; free some space"):
        hf_export.export_folder(tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=4_000)
    assert len(calls) == 2 and not any(tmp_path.iterdir())


def test_a_folder_that_is_there_is_kept_unless_told_otherwise(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("")
    params = random_params(CONFIG)
    with pytest.raises(HuggingFaceError, match="exists already"):
        hf_export.export_folder(tmp_path / "hf", CONFIG, params)
    assert (tmp_path / "hf" / "mine").exists()
    hf_export.export_folder(tmp_path / "hf", CONFIG, params, overwrite=True)
    assert not (tmp_path / "hf" / "mine").exists() and (tmp_path / "hf" / "config.json").exists()


def test_a_file_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(HuggingFaceError, match="max_shard_bytes=0"):
        hf_export.export_folder(tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=0)
