"""Imported models against transformers' own on torch: logits, greedy tokens, and the way back (extra `oracles`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.models import decoder, hf_check, hf_export, hf_import
from subl_jax.models.config import ModelConfig
from tests.models import hf_folders
from tests.models.hf_folders import CASES, SHAPES
from tests.models.test_decoder import parameters

torch = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")

PROMPT, STEPS = 10, 64
GRID = [(case, shape) for case in CASES for shape in SHAPES]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Models this small run ten times slower on two threads that other processes share.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """[batch, time, vocab] of our decoder, in one pass."""

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = decoder.apply(config, params, {}, tokens, positions, jnp.ones_like(tokens))
        return decoder.logits(config, params, hidden)

    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.float().numpy()


def generated(model: Any, prompts: np.ndarray) -> np.ndarray:
    """[batch, PROMPT + STEPS]: the prompts and what `generate` appends greedily, never stopping."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    ids = torch.tensor(prompts.astype(np.int64))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, eos_token_id=None).numpy()


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of each token, by torch in float64."""
    left, right = (torch.log_softmax(torch.tensor(scores).double(), -1) for scores in (p, q))
    return torch.nn.functional.kl_div(right, left, log_target=True, reduction="none").sum(-1).numpy()


def imported(directory: Path, **changes: Any) -> tuple[ModelConfig, Any]:
    config = hf_import.read_config(directory)
    return dataclasses.replace(config, **changes), hf_import.import_params(directory, config)


def prompts_for(model: Any) -> np.ndarray:
    return np.random.default_rng(7).integers(0, model.config.vocab_size, (2, PROMPT))


@pytest.mark.parametrize(("case", "shape"), GRID, ids=[f"{case}-{shape}" for case, shape in GRID])
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, case, shape):
    family, options = CASES[case]
    model = hf_folders.random_model(family, seed=len(case + shape), **{**SHAPES[shape], **options})
    config, params = imported(hf_folders.save(model, tmp_path / "hf", shards=2))
    tokens = generated(model, prompts_for(model))
    ours, theirs = logits_of(config, params, tokens), reference_logits(model, tokens)
    assert np.std(theirs) > 1  # else everything would agree
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert divergence(theirs, ours).max() <= 1e-6
    # A greedy continuation is the sequence whose every token is the argmax after those before it.
    np.testing.assert_array_equal(ours[:, PROMPT - 1 : -1].argmax(-1), tokens[:, PROMPT:])


@pytest.mark.parametrize("case", ["llama3_untied", "qwen2", "qwen3"])
def test_the_states_between_the_layers_equal_transformers_hidden_states(tmp_path, case):
    family, options = CASES[case]
    model = hf_folders.random_model(family, seed=4, **{**SHAPES["wide_heads"], **options})
    config, params = imported(hf_folders.save(model, tmp_path / "hf"))
    tokens = np.asarray(prompts_for(model))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    ours = np.asarray(
        decoder.residual_stream(config, params, *map(jnp.asarray, (tokens, positions, np.ones_like(tokens))))
    )
    with torch.no_grad():
        told = model(torch.tensor(tokens.astype(np.int64)), output_hidden_states=True).hidden_states
    assert len(ours) == len(told) == config.num_layers + 1
    # Theirs are normalised behind the last layer; ours are not.
    for mine, theirs in zip(ours[:-1], told[:-1], strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-4)
    last = np.asarray(ours[-1], np.float64)
    normed = (
        last / np.sqrt((last**2).mean(-1, keepdims=True) + config.rms_eps) * np.asarray(params["final_norm"]["scale"])
    )
    np.testing.assert_allclose(normed, told[-1].numpy(), rtol=1e-4, atol=1e-4)


WINDOWED = {
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3)),
    "qwen3": (
        "Qwen3",
        dict(
            use_sliding_window=True, sliding_window=7, num_hidden_layers=3, attention_bias=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWED)
def test_sliding_windows_equal_transformers_beyond_the_window(tmp_path, case):
    family, options = WINDOWED[case]
    model = hf_folders.random_model(family, seed=3, **options)
    directory = hf_folders.save(model, tmp_path / "hf")
    config, params = imported(directory)
    assert config.windows == ((0, 5, 5) if case == "qwen2" else (7, 0, 7))
    tokens = generated(model, prompts_for(model))
    ours, theirs = logits_of(config, params, tokens), reference_logits(model, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours[:, PROMPT - 1 : -1].argmax(-1), tokens[:, PROMPT:])
    wider = dataclasses.replace(config, windows=tuple(window and window + 1 for window in config.windows))
    assert np.abs(logits_of(wider, params, tokens) - theirs).max() > 1e-2  # one token more would show


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama3_tied", "qwen2", "windowed"])
def test_check_passes_and_its_cached_greedy_tokens_equal_generate(tmp_path, case):
    family, options = WINDOWED["qwen3"] if case == "windowed" else CASES[case]
    directory = hf_folders.save(hf_folders.random_model(family, seed=5, **options), tmp_path / "hf")
    found = hf_check.compare(directory, lengths=(3, 21))
    assert [(row.length, row.greedy_tokens) for row in found.rows] == [(3, 64), (21, 64)]
    assert found.passed and found.greedy_equal and found.max_abs_diff <= 1e-4 and found.max_kl <= 1e-6


def test_bfloat16_stays_within_its_bar(tmp_path):
    model = hf_folders.random_model("Qwen3", seed=2)
    config, params = imported(hf_folders.save(model, tmp_path / "hf", dtype="bfloat16"))
    assert config.param_dtype == config.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    ours, theirs = logits_of(config, params, tokens), reference_logits(model, tokens)
    assert 0 < divergence(theirs, ours).mean() <= 1e-2


@pytest.mark.slow
def test_every_option_shows_in_the_logits(tmp_path):
    """What the parity tests would miss if it were dropped: each change below moves the logits a hundredfold the bar."""
    model = hf_folders.random_model("Qwen3", attention_bias=True, rope_parameters=hf_folders.LLAMA3_ROPE)
    config, params = imported(hf_folders.save(model, tmp_path / "hf"))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 40))
    theirs = reference_logits(model, tokens)
    layers = params["layers"]

    def zero(*path: str) -> Any:
        owner, name = path
        blank = jnp.ones_like if name == "scale" else jnp.zeros_like
        return {**params, "layers": {**layers, owner: {**layers[owner], name: blank(layers[owner][name])}}}

    run = jax.jit(lambda p: decoder.logits(config, p, decoder.apply(config, p, {}, ids, places, ones)[0]))
    ids = jnp.asarray(tokens, jnp.int32)
    places, ones = jnp.arange(40, dtype=jnp.int32)[None], jnp.ones_like(ids)
    np.testing.assert_allclose(run(params), theirs, rtol=0, atol=1e-4)
    for path in [("q", "bias"), ("v", "bias"), ("o", "bias"), ("q_norm", "scale"), ("k_norm", "scale")]:
        assert np.abs(np.asarray(run(zero(*path))) - theirs).max() > 1e-2, path
    plain = dataclasses.replace(config, rope_factor=1.0)
    assert np.abs(logits_of(plain, params, tokens) - theirs).max() > 1e-2


BACK = {**CASES, "windowed": WINDOWED["qwen3"]}


@pytest.mark.parametrize("case", BACK)
def test_an_exported_import_loads_in_transformers_with_equal_logits(tmp_path, case):
    family, options = BACK[case]
    model = hf_folders.random_model(family, seed=1, **options)
    config, params = imported(hf_folders.save(model, tmp_path / "hf"))
    hf_export.export_folder(tmp_path / "back", config, params, max_shard_bytes=30_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again = load(tmp_path / "back")
    assert type(again) is type(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 30))
    np.testing.assert_array_equal(reference_logits(again, tokens), reference_logits(model, tokens))
    before, after = (hf_folders.folder_tensors(tmp_path / name) for name in ("hf", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        str(directory), local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    loaded, info = found
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    return loaded.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_organism_exports_as_a_llama_with_equal_logits(tmp_path, tied):
    config = ModelConfig(vocab_size=300, num_tokens=290, tie_embeddings=tied, rope_theta=500.0, init_scale=0.5)
    params = parameters(config)
    hf_export.export_folder(tmp_path / "hf", config, params)
    model = load(tmp_path / "hf")
    assert type(model).__name__ == "LlamaForCausalLM"
    tokens = np.random.default_rng(0).integers(0, 290, (2, 20))
    ours = logits_of(config, params, tokens)
    np.testing.assert_allclose(ours[..., :290], reference_logits(model, tokens)[..., :290], rtol=0, atol=1e-4)
