"""Per-token divergences against all logits at once in float64, one document at a time."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from subl_jax.distill import token_divergence
from subl_jax.distill.loop import Model
from subl_jax.distill.token_divergence import per_token_kl
from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import LoraConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.distill import tiny

FIRST, SECOND = Model(tiny.SMALL, tiny.params(tiny.SMALL, 1)), Model(tiny.LARGE, tiny.params(tiny.LARGE, 2))


def log_probabilities(model: Model, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [length, known tokens]: of every next token of one document on its own."""
    # One shape for all lengths, so that it is compiled once: what stands behind a token does not change it.
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden, _ = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, {}, padded, np.arange(32)[None], np.ones((1, 32), np.int32)
    )
    hidden = hidden[:, : len(tokens)]
    head = np.asarray(decoder.head_matrix(model.config, model.params), np.float64)
    scores = (np.asarray(hidden[0], np.float64) @ head)[:, : model.config.known_tokens] / temperature
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def expected(first: Model, second: Model, document, temperature: float = 1.0) -> np.ndarray:
    p, q = (log_probabilities(model, document.tokens, temperature) for model in (first, second))
    values = np.zeros(len(document.tokens))
    values[1:] = (np.exp(p) * (p - q)).sum(1)[:-1]
    return np.where(document.loss_mask, values, 0.0)


@pytest.mark.parametrize("row_tokens", [4, 32])
def test_each_value_is_the_kl_of_its_own_token_however_documents_are_packed(row_tokens, monkeypatch):
    monkeypatch.setattr(token_divergence, "ROWS_AT_ONCE", 3)
    documents = tiny.documents(11, seed=5)
    found = per_token_kl(FIRST, SECOND, documents, row_tokens)
    for values, document in zip(found, documents, strict=True):
        np.testing.assert_allclose(values, expected(FIRST, SECOND, document), rtol=2e-5, atol=1e-6)
        assert (values[document.loss_mask] > 1e-3).all()


def test_a_temperature_softens_both_models_and_scales_nothing():
    [document] = tiny.documents(1, seed=3)
    [found] = per_token_kl(FIRST, SECOND, [document], 16, 2.5)
    np.testing.assert_allclose(found, expected(FIRST, SECOND, document, 2.5), rtol=2e-5, atol=1e-6)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    documents = tiny.documents(6, seed=7)
    whole = per_token_kl(FIRST, SECOND, documents, 32)
    monkeypatch.setattr(token_divergence.fused, "chunk_tokens", lambda tokens, vocab: 5)
    for one, other in zip(whole, per_token_kl(FIRST, SECOND, documents, 32), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_direction_is_from_the_first_to_the_second_and_a_model_is_at_zero_from_itself():
    [document] = tiny.documents(1, seed=3)
    [there], [back] = per_token_kl(FIRST, SECOND, [document], 16), per_token_kl(SECOND, FIRST, [document], 16)
    assert not np.allclose(there, back, rtol=1e-2)
    np.testing.assert_allclose(back, expected(SECOND, FIRST, document), rtol=2e-5, atol=1e-6)
    assert per_token_kl(FIRST, FIRST, [document], 16)[0].max() == 0


def test_padding_rows_of_a_vocabulary_have_no_probability():
    config = dataclasses.replace(tiny.SMALL, vocab_size=48, num_tokens=40)
    padded = Model(config, tiny.params(config, 4))
    documents = tiny.documents(3, seed=9)
    for values, document in zip(per_token_kl(padded, SECOND, documents, 16), documents, strict=True):
        np.testing.assert_allclose(values, expected(padded, SECOND, document), rtol=2e-5, atol=1e-6)


def test_adapters_merged_into_a_model_are_part_of_it():
    config = dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2))
    adapters = lora.init_adapters(config, jax.random.key(3))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    adapted = Model(config, decoder.merge(adapters, FIRST.params))
    documents = tiny.documents(2, seed=4)
    for values, document in zip(per_token_kl(adapted, FIRST, documents, 16), documents, strict=True):
        np.testing.assert_allclose(values, expected(adapted, FIRST, document), rtol=5e-5, atol=1e-6)
        assert values.max() > 1e-3


def test_a_document_without_loss_tokens_gets_zeros_and_the_others_their_own():
    documents = tiny.documents(3, seed=2)
    documents[1] = dataclasses.replace(documents[1], loss_mask=np.zeros(len(documents[1].tokens), bool))
    found = per_token_kl(FIRST, SECOND, documents, 16)
    assert not found[1].any() and len(found[1]) == len(documents[1].tokens)
    np.testing.assert_allclose(found[2], expected(FIRST, SECOND, documents[2]), rtol=2e-5, atol=1e-6)
    assert not per_token_kl(FIRST, SECOND, documents[1:2], 16)[0].any()


def test_models_on_a_mesh_say_what_they_say_on_one_device():
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), "kv_replicated")
    placed = [Model(each.config, axes.place(each.params, each.config, layout)) for each in (FIRST, SECOND)]
    documents = tiny.documents(5, seed=6)
    here, there = per_token_kl(FIRST, SECOND, documents, 16), per_token_kl(placed[0], placed[1], documents, 16)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_models_of_other_vocabularies_are_refused():
    config = dataclasses.replace(tiny.SMALL, vocab_size=41)
    with pytest.raises(ValueError, match="student knows 41 tokens, the teacher 40"):
        per_token_kl(Model(tiny.SMALL, {}), Model(config, {}), [], 16)
