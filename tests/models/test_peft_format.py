"""Adapters in PEFT's format against PEFT itself on torch, both ways; and everything that is refused.

The round trip and the refusals need neither torch nor peft: folders are written with safetensors and json alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from subl_jax import checkpoint
from subl_jax.models import decoder, hf_export, hf_import, peft_format
from subl_jax.models.config import LAYER_TARGETS, LORA_TARGETS, LoraConfig, ModelConfig
from subl_jax.models.families import HuggingFaceError
from tests.models.test_decoder import documents, flat, parameters, whole_logits
from tests.models.test_lora import on, random_adapters, saved

MODEL = ModelConfig(61, 12, 3, 6, 3, 4, 7, tie_embeddings=False, init_scale=1.0)
ADAPTER = LoraConfig(rank=4, alpha=10.0, dropout=0.1, targets=("q", "v", "o", "down"))
CONFIG = on(MODEL, ADAPTER)
# What PEFT calls the matrices, written out.
PROJECTIONS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "head": "lm_head",
}  # fmt: skip


def tensor_name(layer: int, target: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{PROJECTIONS[target]}.lora_{part}.weight"


@pytest.fixture
def peft() -> Any:
    pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")
    return pytest.importorskip("peft", reason="needs peft: make setup EXTRAS=dev,oracles")


# --- Against PEFT -----------------------------------------------------------------------------------------------------


def peft_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(np.atleast_2d(tokens).astype(np.int64))).logits.numpy()


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (MODEL, LORA_TARGETS),
        (dataclasses.replace(MODEL, qkv_bias=True, tie_embeddings=True), ("q", "v", "down", "head")),
    ],
    ids=["llama", "qwen2_tied"],
)
def test_peft_loads_what_we_write_and_computes_our_logits(peft, tmp_path, config, targets):
    from transformers import AutoModelForCausalLM

    params = parameters(config)
    config = on(config, LoraConfig(4, 10.0, 0.1, targets))
    adapters = random_adapters(config)
    hf_export.export_folder(tmp_path / "model", on(config, None), params)
    peft_format.write_peft(tmp_path / "adapters", config, adapters, base=str(tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    [tokens] = documents(config, 11)
    ours = whole_logits(config, decoder.merge(adapters, params), tokens)
    assert np.abs(ours - peft_logits(base, tokens)).max() > 0.1
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    np.testing.assert_allclose(peft_logits(theirs, tokens), ours, rtol=1e-4, atol=1e-4)
    found = theirs.peft_config["default"]
    assert (found.r, found.lora_alpha, found.lora_dropout, found.inference_mode) == (4, 10.0, 0.1, True)
    assert found.target_modules == {PROJECTIONS[name].split(".")[-1] for name in targets}
    assert not any(parameter.requires_grad for parameter in theirs.parameters())
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")  # finds its base by the name in it
    np.testing.assert_array_equal(peft_logits(alone, tokens), peft_logits(theirs, tokens))


@pytest.mark.parametrize(
    ("family", "modules", "targets"),
    [
        ("Llama", "all-linear", LAYER_TARGETS),
        ("Llama", ["o_proj", "lm_head"], ("o", "head")),
        ("Qwen2", ["v_proj", "self_attn.q_proj"], ("q", "v")),
        ("Qwen2", ["lm_head", "up_proj"], ("up", "head")),
    ],
)
def test_we_load_what_peft_writes_and_compute_its_logits(peft, tmp_path, family, modules, targets):
    import torch

    from tests.models import hf_folders

    model = hf_folders.random_model(family, tie_word_embeddings=family == "Qwen2")
    config = hf_import.read_config(hf_folders.save(model, tmp_path / "model"))
    params = hf_import.import_params(tmp_path / "model", config)
    options = peft.LoraConfig(r=8, lora_alpha=12, lora_dropout=0.25, target_modules=modules, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, options)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:  # drawn in the same interval as ours
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(tmp_path / "adapters")
    adapter, adapters = peft_format.read_peft(tmp_path / "adapters", config, params)
    assert adapter == LoraConfig(8, 12.0, 0.25, targets)
    [tokens] = documents(config, 11)
    ours = whole_logits(on(config, adapter), decoder.merge(adapters, params), tokens)
    np.testing.assert_allclose(ours, peft_logits(theirs, tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(ours - whole_logits(config, params, tokens)).max() > 0.1


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_gives_the_adapters_back_bit_for_bit(tmp_path, dtype):
    adapters = jax.tree.map(lambda leaf: leaf.astype(dtype), random_adapters(CONFIG))
    peft_format.write_peft(tmp_path / "a", CONFIG, adapters)
    adapter, back = peft_format.read_peft(tmp_path / "a", MODEL)
    assert adapter == ADAPTER
    assert set(flat(back)) == set(flat(adapters))
    for path, leaf in flat(adapters).items():
        assert flat(back)[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(flat(back)[path]), np.asarray(leaf))


def test_the_files_hold_pefts_names_and_transposed_matrices(tmp_path):
    adapters = random_adapters(CONFIG)
    peft_format.write_peft(tmp_path / "a", CONFIG, adapters, base="org/model", dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(held) == {tensor_name(n, t, part) for n in range(3) for t in ADAPTER.targets for part in "AB"}
    for layer in range(3):
        for target in ADAPTER.targets:
            for part, leaf in (("A", "lora_a"), ("B", "lora_b")):
                expected = np.asarray(adapters["layers"][target][leaf])[layer].T.astype(ml_dtypes.bfloat16)
                np.testing.assert_array_equal(held[tensor_name(layer, target, part)], expected)
    assert held[tensor_name(0, "v", "A")].shape == (4, 12) and held[tensor_name(0, "v", "B")].shape == (12, 4)
    content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10.0, "lora_dropout": 0.1,
        "target_modules": ["down_proj", "o_proj", "q_proj", "v_proj"], "bias": "none", "inference_mode": True,
        "base_model_name_or_path": "org/model",
    }  # fmt: skip
    assert expected.items() <= content.items()


def test_files_of_mixed_dtypes_are_read_in_the_one_that_holds_every_value(tmp_path):
    there = folder(tmp_path)
    held = load_file(there / "adapter_model.safetensors")
    name = tensor_name(1, "q", "B")
    held = {key: value.astype(np.float16 if key == name else ml_dtypes.bfloat16) for key, value in held.items()}
    save_file(held, there / "adapter_model.safetensors")
    _, back = peft_format.read_peft(there, MODEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(back["layers"]["q"]["lora_b"][1], held[name].T.astype(np.float32))


def test_a_folder_that_exists_is_replaced_only_on_request(tmp_path):
    there = folder(tmp_path)
    before = (there / "adapter_model.safetensors").read_bytes()
    other = random_adapters(CONFIG, seed=2)
    with pytest.raises(HuggingFaceError, match="exists already; delete it or choose another directory"):
        peft_format.write_peft(there, CONFIG, other)
    assert (there / "adapter_model.safetensors").read_bytes() == before
    peft_format.write_peft(there, CONFIG, other, overwrite=True)
    assert (there / "adapter_model.safetensors").read_bytes() != before


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_format, "save_file", full)
    with pytest.raises(HuggingFaceError, match="cannot write .*[Nn]o space left"):
        folder(tmp_path)
    assert not any(tmp_path.iterdir())


# --- What is not written ----------------------------------------------------------------------------------------------


def test_adapters_that_are_not_the_configurations_are_refused(tmp_path):
    adapters = random_adapters(CONFIG)
    half = {**adapters["layers"], "q": {"lora_a": adapters["layers"]["q"]["lora_a"]}}
    mixed = {**adapters["layers"], "q": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapters["layers"]["q"])}
    for config, tree, message in [
        (CONFIG, {"layers": half}, "lack layers/q/lora_b"),
        (CONFIG, decoder.merge(adapters, parameters(MODEL)), "embedding is no adapter of this configuration"),
        (on(MODEL, dataclasses.replace(ADAPTER, rank=5)), adapters, r"q/lora_a has shape \[3, 12, 4\].*\[3, 12, 5\]"),
        (MODEL, adapters, "has no adapters"),
        (CONFIG, {"layers": mixed}, "held in bfloat16, float32 cannot be written as they are; say dtype"),
    ]:
        with pytest.raises(HuggingFaceError, match=message):
            peft_format.write_peft(tmp_path / "a", config, tree)
    with pytest.raises(HuggingFaceError, match="cannot be written as float16"):
        peft_format.write_peft(tmp_path / "a", CONFIG, adapters, dtype="float16")
    assert not any(tmp_path.iterdir())


# --- What is not read -------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, **options: Any) -> Path:
    """Adapters of `CONFIG` with other options in adapter_config.json; None takes one away."""
    peft_format.write_peft(tmp_path / "adapters", CONFIG, random_adapters(CONFIG))
    path = tmp_path / "adapters" / "adapter_config.json"
    content = {**json.loads(path.read_text()), **options}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return path.parent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(peft_type="IA3"), "peft_type='IA3' is not supported, only 'LORA'"),
        (dict(peft_type=None), "peft_type=None is not supported"),
        (dict(task_type="SEQ_CLS"), "task_type='SEQ_CLS' is not supported"),
        (dict(bias="all"), "bias='all' is not supported, only 'none'; merge the adapters with PEFT instead"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(use_rslora=True), "use_rslora=True is not supported; merge the adapters with PEFT"),
        (dict(use_dora=True), "use_dora=True"),
        (dict(rank_pattern={"q_proj": 8}), "rank_pattern={'q_proj': 8}"),
        (dict(alpha_pattern={"q_proj": 8}), "alpha_pattern={'q_proj': 8}"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (dict(layers_to_transform=[0, 1]), r"layers_to_transform=\[0, 1\]"),
        (dict(layers_to_transform=2), "layers_to_transform=2"),
        (dict(layers_pattern="layers"), "layers_pattern='layers'"),
        (dict(exclude_modules=["k_proj"]), "exclude_modules"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out=True"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(an_option_of_the_future={"x": "y" * 200}), "an_option_of_the_future=.*yyy\\.\\.\\. is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' changes the weights below"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (dict(target_modules=r".*\.(q|v)_proj"), "target_modules='.*' is a pattern; list the matrices by name"),
        (dict(target_modules=None), "target_modules=None is not a list of names"),
        (dict(target_modules=[]), r"target_modules=\[\] is not a list"),
        (dict(target_modules=["q_proj", "norm"]), "names 'norm', which is no matrix that adapters.*gate_proj, k_proj, lm_head"),
        (dict(target_modules=["embed_tokens"]), "names 'embed_tokens'"),
        (dict(target_modules=["c_attn"]), "names 'c_attn'"),
        (dict(target_modules=["roj"]), "names 'roj'"),
        (dict(target_modules=["model.layers.0.self_attn.q_proj"]), "leaves out model.layers.1.self_attn.q_proj"),
        (dict(r=0), "adapter_config.json: adapter.rank=0"),
        (dict(r="8"), "r='8' is no whole number"),
        (dict(r=True), "r=True is no whole number"),
        (dict(lora_alpha="x"), "lora_alpha='x' is no finite number"),
        (dict(lora_alpha=float("inf")), "lora_alpha=inf is no finite number"),
        (dict(lora_alpha=0), "adapter.alpha=0.0; it must be positive"),
        (dict(lora_dropout=1.0), "adapter.dropout=1.0 is outside"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_option_that_we_do_not_compute_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(HuggingFaceError, match=message):
        peft_format.read_peft(folder(tmp_path, **options), MODEL)


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_of_the_head_beside_its_adapter_must_be_the_models_own(tmp_path, tied):
    """PEFT saves one, and would put it in the head's place."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    config, params = on(model, dataclasses.replace(ADAPTER, targets=("q", "head"))), parameters(model)
    adapters = random_adapters(config)
    peft_format.write_peft(tmp_path / "a", config, adapters)
    path = tmp_path / "a" / "adapter_model.safetensors"
    held, copy = load_file(path), np.asarray(params["embedding"] if tied else params["head"].T)
    assert held["base_model.model.lm_head.lora_A.weight"].shape == (4, 12)
    np.testing.assert_array_equal(
        held["base_model.model.lm_head.lora_B.weight"], np.asarray(adapters["head_adapter"]["lora_b"]).T
    )
    save_file({**held, "base_model.model.lm_head.base_layer.weight": np.ascontiguousarray(copy)}, path)
    adapter, back = peft_format.read_peft(tmp_path / "a", model, params)
    assert adapter == config.lora
    for place, leaf in flat(adapters).items():
        np.testing.assert_array_equal(flat(back)[place], leaf)
    with pytest.raises(HuggingFaceError, match="base_layer.weight replaces the model's head; give its parameters too"):
        peft_format.read_peft(tmp_path / "a", model)
    for other in (np.where(np.arange(12) == 3, copy + 1e-3, copy), np.vstack([copy, copy])):
        save_file({**held, "base_model.model.lm_head.base_layer.weight": other.astype(np.float32)}, path)
        with pytest.raises(HuggingFaceError, match="base_layer.weight differs from the model's head"):
            peft_format.read_peft(tmp_path / "a", model, params)


def test_an_adapter_that_peft_ties_to_the_embedding_is_refused(tmp_path):
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    config = on(tied, dataclasses.replace(ADAPTER, targets=("q", "head")))
    peft_format.write_peft(tmp_path / "a", config, random_adapters(config))
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ensure_weight_tying": True}))
    with pytest.raises(
        HuggingFaceError, match="ensure_weight_tying=True with lm_head puts an adapter on the embedding"
    ):
        peft_format.read_peft(tmp_path / "a", tied)
    assert peft_format.read_peft(tmp_path / "a", MODEL)[0] == config.lora  # nothing to tie there


def test_options_that_say_nothing_are_accepted(tmp_path):
    there = folder(
        tmp_path, use_rslora=False, rank_pattern={}, loftq_config={}, megatron_core="megatron.core", revision="main",
        peft_version="0.21.2", qalora_group_size=16, inference_mode=False, init_lora_weights="gaussian", task_type=None,
        auto_mapping={"base_model_class": "LlamaForCausalLM"}, lora_bias=False,
    )  # fmt: skip
    assert peft_format.read_peft(there, MODEL)[0] == ADAPTER


def test_modules_may_be_named_by_any_end_of_their_dotted_names(tmp_path):
    every = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(3)]
    there = folder(tmp_path, target_modules=[*every, "self_attn.q_proj", "mlp.down_proj", "o_proj"])
    assert peft_format.read_peft(there, MODEL)[0] == ADAPTER


def renamed(before: str, after: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda held: {name.replace(before, after): values for name, values in held.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: {n: v for n, v in held.items() if ".2.mlp.down_proj.lora_B" not in n},
         "lacks the tensor .*layers.2.mlp.down_proj.lora_B.weight"),
        (lambda held: {**held, tensor_name(0, "k", "A"): np.zeros((4, 12), np.float32)},
         "layers.0.self_attn.k_proj.lora_A.weight is none of the adapters"),
        (lambda held: {**held, tensor_name(3, "q", "A"): np.zeros((4, 12), np.float32)},
         "layers.3.self_attn.q_proj.* a model of 3 layers"),
        (lambda held: {**held, tensor_name(1, "q", "B"): np.zeros((4, 24), np.float32)},
         r"layers.1.self_attn.q_proj.lora_B.weight has shape \[4, 24\] where .* ask for \[24, 4\]"),
        (lambda held: {n: v.astype(np.float64) for n, v in held.items()}, "dtype F64; read are F32, BF16, F16"),
        (renamed("lora_A", "lora_A.default"), "lacks the tensor .*lora_A.weight"),
        (renamed("base_model.model.", ""), "lacks the tensor base_model.model.model.layers.0"),
    ],
    ids=["missing", "surplus", "surplus_layer", "misshapen", "dtype", "adapter_name", "unwrapped"],
)  # fmt: skip
def test_tensors_that_are_not_exactly_the_adapters_are_refused_by_name(tmp_path, change, message):
    path = folder(tmp_path) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(HuggingFaceError, match=message):
        peft_format.read_peft(path.parent, MODEL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(d_model=16), r"q_proj.lora_A.weight has shape \[4, 12\] where .* ask for \[4, 16\]"),
        (dict(num_layers=4), "lacks the tensor .*layers.3.*on a model of 4 layers"),
        (dict(num_layers=2), "layers.2.* is none of the adapters .* on a model of 2 layers"),
        (dict(d_ff=8), r"down_proj.lora_A.weight has shape \[4, 7\] where .* ask for \[4, 8\]"),
    ],
)
def test_adapters_of_another_model_are_refused(tmp_path, fields, message):
    with pytest.raises(HuggingFaceError, match=message):
        peft_format.read_peft(folder(tmp_path), dataclasses.replace(MODEL, **fields))


def test_files_that_are_missing_pickled_or_damaged_are_refused(tmp_path):
    with pytest.raises(HuggingFaceError, match="adapter_config.json is missing; give a local folder of PEFT"):
        peft_format.read_peft(tmp_path / "nowhere", MODEL)
    there = folder(tmp_path)
    path, config = there / "adapter_model.safetensors", there / "adapter_config.json"
    whole, text = path.read_bytes(), config.read_text()
    for content, message in [(text[:-5], "not readable as JSON"), ("[1]", "holds a list where an object is needed")]:
        config.write_text(content)
        with pytest.raises(HuggingFaceError, match=message):
            peft_format.read_peft(there, MODEL)
    config.write_text(text)
    for content in (whole[:-7], whole[:3], b""):
        path.write_bytes(content)
        with pytest.raises(HuggingFaceError, match="safetensors is truncated or corrupt .*download this file again"):
            peft_format.read_peft(there, MODEL)
    path.unlink()
    with pytest.raises(HuggingFaceError, match="holds no adapter_model.safetensors; complete the folder"):
        peft_format.read_peft(there, MODEL)
    (there / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    with pytest.raises(
        HuggingFaceError, match="a pickle .adapter_model.bin., which can run any code and is never read"
    ):
        peft_format.read_peft(there, MODEL)


# --- From a checkpoint ------------------------------------------------------------------------------------------------


def test_an_adapter_checkpoint_is_exported_with_its_base_named_and_checked(tmp_path):
    adapters = random_adapters(CONFIG)
    there = saved(tmp_path / "adapters", on(dataclasses.replace(MODEL, num_tokens=60), ADAPTER), adapters)
    hf_export.export_folder(tmp_path / "model", MODEL, parameters(MODEL))
    for base, name in [(tmp_path / "model", str(tmp_path / "model")), ("org/Model-1.5", "org/Model-1.5")]:
        config = peft_format.export_adapters(there, base, tmp_path / "out", overwrite=True)
        assert config.lora == ADAPTER
        content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == name
        for path, leaf in flat(peft_format.read_peft(tmp_path / "out", MODEL)[1]).items():
            np.testing.assert_array_equal(leaf, flat(adapters)[path])
    other = dataclasses.replace(MODEL, rope_theta=500.0)
    hf_export.export_folder(tmp_path / "other", other, parameters(other))
    for base, message in [
        (tmp_path / "other", "not trained on .*other .*rope_theta: 500.0 in the folder, 10000.0 in the adapters"),
        (there, "is a checkpoint of this project, which PEFT cannot load; export it first"),
        (tmp_path / "nowhere", "nowhere is neither a folder nor a name like ORG/MODEL"),
        (tmp_path, "config.json is missing"),
    ]:
        with pytest.raises(HuggingFaceError, match=message):
            peft_format.export_adapters(there, base, tmp_path / "new")
    whole = saved(tmp_path / "whole", MODEL, parameters(MODEL))
    with pytest.raises(checkpoint.CheckpointError, match="whole holds no adapters"):
        peft_format.export_adapters(whole, "org/model", tmp_path / "new")
    assert not (tmp_path / "new").exists()
