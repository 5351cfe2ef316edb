"""Adapters on the vocabulary head, tied and untied: their function, merging, drawing, and their place on a mesh.

That a rollout uses them is a test of `test_lora`; how they are trained, of `distill.test_head_adapter`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from subl_jax.models import axes, convert, decoder, hf_export, hf_import, lora, peft_format
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.models import numpy_llama
from tests.models.hf_folders import write_tokenizer
from tests.models.test_decoder import TINY, documents, flat, logits, parameters, whole_logits
from tests.models.test_lora import on, random_adapters, saved

ADAPTER = LoraConfig(rank=3, alpha=7.0, dropout=0.5, targets=("v", "head"))
TIED = on(TINY, ADAPTER)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)
BOTH = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


def without(config: ModelConfig) -> ModelConfig:
    """The model below the adapters."""
    return on(config, None)


def both_parts(config: ModelConfig) -> tuple[Any, Any, Any]:
    """(weights, random adapters, the two as one tree)."""
    params, adapters = parameters(without(config)), random_adapters(config)
    return params, adapters, decoder.merge(adapters, params)


@BOTH
def test_logits_are_those_of_a_head_that_has_the_product_added_and_an_embedding_that_has_not(config):
    params, adapters, both = both_parts(config)
    [tokens] = documents(config, 9)
    a, b = (np.asarray(adapters["head_adapter"][name], np.float64) for name in ("lora_a", "lora_b"))
    assert a.shape == (12, 3) and b.shape == (3, 37)
    head = np.asarray(decoder.head_matrix(without(config), params), np.float64) + 7.0 / 3 * a @ b
    of_layers = on(config, dataclasses.replace(ADAPTER, targets=("v",)))
    exact = {**lora.merged(of_layers, decoder.merge({"layers": adapters["layers"]}, params)), "head": head}
    ours = whole_logits(config, both, tokens)[0]
    plain = dataclasses.replace(without(config), tie_embeddings=False)
    np.testing.assert_allclose(ours, numpy_llama.logits(plain, exact, tokens), rtol=1e-4, atol=1e-4)
    unadapted = {**both, "head_adapter": jax.tree.map(jnp.zeros_like, adapters["head_adapter"])}
    assert np.abs(ours - whole_logits(config, unadapted, tokens)[0]).max() > 1  # or the comparison would say nothing
    merged = lora.merged(config, both)
    assert lora.merged_config(config) == plain and set(merged) == {"embedding", "head", "final_norm", "layers"}
    np.testing.assert_array_equal(merged["embedding"], params["embedding"])
    np.testing.assert_allclose(merged["head"], head, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, whole_logits(plain, merged, tokens)[0], rtol=1e-5, atol=1e-5)


def test_the_matrix_of_an_adapted_head_is_not_given_out_without_its_adapter():
    with pytest.raises(ValueError, match=r"the head has an adapter.*use decoder.logits, or merge"):
        decoder.head_matrix(TIED, both_parts(TIED)[2])


def test_padding_rows_of_the_vocabulary_get_no_logit_from_the_adapter():
    config = dataclasses.replace(TIED, num_tokens=30)
    both = both_parts(config)[2]
    scores = np.asarray(logits(config, both, jnp.ones((2, 12))))
    np.testing.assert_array_equal(scores[:, 30:], np.float32(decoder.PADDING_LOGIT))
    assert np.ptp(scores[:, :30]) > 1


@BOTH
def test_a_fresh_adapter_changes_nothing_and_no_other_draw(config):
    key = jax.random.key(0)
    fresh = lora.init_adapters(config, key)
    a, b = fresh["head_adapter"]["lora_a"], np.asarray(fresh["head_adapter"]["lora_b"])
    assert 0.8 * 12**-0.5 < np.abs(a).max() <= 12**-0.5 and not b.any()
    alone = lora.init_adapters(on(config, dataclasses.replace(ADAPTER, targets=("v",))), key)
    np.testing.assert_array_equal(fresh["layers"]["v"]["lora_a"], alone["layers"]["v"]["lora_a"])
    first, second = lora.split(decoder.merge(fresh, parameters(without(config))))
    assert set(flat(first)) == set(flat(fresh)) and set(flat(second)) == set(flat(parameters(without(config))))


def test_a_model_that_is_drawn_with_it_has_the_weights_of_one_without():
    config = on(TINY, dataclasses.replace(ADAPTER, targets=("head",)))

    def drawn(config: ModelConfig) -> Any:
        params = decoder.init(config, jax.random.key(0))
        return params["embedding"], params["layers"]["q"]["kernel"]  # two of them: the rest need not be compiled

    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(drawn, static_argnums=0)(each) for each in (config, TINY)))


@BOTH
def test_its_distance_is_that_of_the_head_it_is_folded_into(config):
    params, adapters, both = both_parts(config)
    change = 0.0
    for a, b in ((x["lora_a"], x["lora_b"]) for x in (adapters["head_adapter"], adapters["layers"]["v"])):
        change += np.sum((7.0 / 3 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)) ** 2)
    assert lora.delta_norm(config, both, params) == pytest.approx(change**0.5, rel=1e-9)


# --- On a mesh --------------------------------------------------------------------------------------------------------


@BOTH
def test_on_a_mesh_b_is_split_over_the_vocabulary_and_a_over_the_width_and_logits_are_the_same(config):
    config = dataclasses.replace(config, vocab_size=40, num_kv_heads=2)
    layout = Layout(make_mesh(MeshConfig(2, 2, 2)))
    both = both_parts(config)[2]
    placed = axes.place(both, config, layout)
    assert placed["head_adapter"]["lora_a"].sharding.spec == P(("fsdp",), None)
    assert placed["head_adapter"]["lora_b"].sharding.spec == P(None, ("tensor",))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
    run = jax.jit(lambda params, x: decoder.logits(config, params, x, layout))
    np.testing.assert_allclose(run(placed, hidden), logits(config, both, hidden), rtol=1e-5, atol=1e-5)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_on_a_tied_model_is_merged_and_exported_untied(tmp_path, capsys):
    config = dataclasses.replace(TIED, vocab_size=len(write_tokenizer(tmp_path / "tokenizer", 290)))
    params, adapters, both = both_parts(config)
    saved(tmp_path / "base", without(config), params)
    saved(tmp_path / "adapters", config, adapters)
    argv = ["export", str(tmp_path / "adapters"), str(tmp_path / "hf"), f"--base={tmp_path / 'base'}", "--merge"]
    assert convert.main([*argv, f"--tokenizer={tmp_path / 'tokenizer'}"]) == 0
    assert "no longer tied to the embedding" in capsys.readouterr().out
    back = hf_import.read_config(tmp_path / "hf")
    assert not back.tie_embeddings
    [tokens] = documents(config, 9)
    ours = whole_logits(back, hf_import.import_params(tmp_path / "hf", back), tokens)
    np.testing.assert_allclose(ours, whole_logits(config, both, tokens), rtol=1e-5, atol=1e-5)


def test_adapters_for_peft_on_a_tied_model_come_with_a_warning_of_its_merge(tmp_path, capsys):
    params, adapters, _ = both_parts(TIED)
    hf_export.export_folder(tmp_path / "model", without(TIED), params)
    saved(tmp_path / "adapters", TIED, adapters)
    argv = ["export", str(tmp_path / "adapters"), str(tmp_path / "peft"), f"--base={tmp_path / 'model'}"]
    assert convert.main(argv) == 0
    assert "would merge it into both; for a merged model export with --merge" in capsys.readouterr().out
    adapter, back = peft_format.read_peft(tmp_path / "peft", without(TIED))
    assert adapter == ADAPTER and set(flat(back)) == set(flat(adapters))
    for path, leaf in flat(adapters).items():
        np.testing.assert_array_equal(flat(back)[path], leaf)
