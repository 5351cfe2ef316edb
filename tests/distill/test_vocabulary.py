"""Which tokens two tokenizers share, and that a cut or padded teacher gives exactly them the probability they had."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from subl_jax.distill import vocabulary
from subl_jax.distill.vocabulary import VocabularyError
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from tests.distill import tiny


def tokenizer(words: dict[str, int], added: list[str] = []) -> PreTrainedTokenizerFast:  # noqa: B006
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="u"))
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="u")


def words(count: int) -> dict[str, int]:
    return {"u": 0} | {f"w{index}": index for index in range(1, count)}


def test_equal_tokenizers_share_every_token() -> None:
    found = vocabulary.align(tokenizer(words(9), ["<end>"]), tokenizer(words(9), ["<end>"]))
    assert found == vocabulary.Alignment(10, (), ())


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_a_tokenizer_that_ends_earlier_shares_all_it_has_and_the_rest_is_named(longer: str) -> None:
    short, long = tokenizer(words(9), ["<end>"]), tokenizer(words(9), ["<end>", "<think>", "</think>"])
    found = vocabulary.align(*(short, long) if longer == "teacher" else (long, short))
    cut = ("<think>", "</think>")
    assert found.shared_tokens == 10
    assert (found.only_teacher, found.only_student) == ((cut, ()) if longer == "teacher" else ((), cut))
    assert f"2 tokens of the {longer} alone are cut ('<think>', '</think>')" in found.describe()


def test_the_first_different_token_is_shown_with_both_meanings() -> None:
    other = {**words(9), "w4": 5, "w5": 4}
    with pytest.raises(VocabularyError, match=r"differ at id 4: 'w5' to the teacher, 'w4' to the student.*hard_label"):
        vocabulary.align(tokenizer(words(9)), tokenizer(other))
    # An added token counts like any other.
    with pytest.raises(VocabularyError, match="differ at id 9: '<a>' to the teacher, '<b>' to the student"):
        vocabulary.align(tokenizer(words(9), ["<b>", "<c>"]), tokenizer(words(9), ["<a>", "<c>"]))


def test_a_hole_in_one_vocabulary_is_a_difference_and_a_common_one_is_not() -> None:
    hole = {token: index + (index > 4) for token, index in words(9).items()}
    assert vocabulary.align(tokenizer(hole), tokenizer(hole)).shared_tokens == 10
    with pytest.raises(VocabularyError, match="differ at id 5: no token to the teacher, 'w5' to the student"):
        vocabulary.align(tokenizer(words(9)), tokenizer(hole))


# --- The teacher ------------------------------------------------------------------------------------------------------


def softmax_over(config: ModelConfig, params: dict, tokens: np.ndarray, known: int) -> np.ndarray:
    """Next-token probabilities over the first `known` ids, by numpy in float64 from the model's hidden states."""
    batch = jnp.asarray(tokens[None])

    @jax.jit
    def run(params: dict) -> jax.Array:
        return decoder.apply(config, {}, params, batch, jnp.arange(len(tokens))[None], jnp.ones_like(batch), None)[0]

    hidden = run(params)
    kernel = np.asarray(params["embedding"].T if config.tie_embeddings else params["head"], np.float64)
    logits = np.asarray(hidden[0], np.float64) @ kernel
    shifted = np.exp(logits[:, :known] - logits[:, :known].max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [33, 40, 64])
def test_a_cut_or_padded_teacher_gives_the_shared_tokens_what_it_gave_them(tied: bool, vocab_size: int) -> None:
    config = dataclasses.replace(tiny.LARGE, tie_embeddings=tied)
    params, shared = tiny.params(config), 30
    tokens = np.random.default_rng(0).integers(0, shared, 9).astype(np.int32)
    aligned, changed = vocabulary.aligned_teacher(config, params, shared, vocab_size)
    assert (aligned.vocab_size, aligned.known_tokens) == (vocab_size, shared)
    assert dataclasses.replace(aligned, vocab_size=config.vocab_size, num_tokens=0) == config
    wanted = jax.eval_shape(lambda: decoder.init(aligned, jax.random.key(0)))
    assert jax.tree.map(lambda leaf: leaf.shape, changed) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    before, after = (softmax_over(c, p, tokens, shared) for c, p in ((config, params), (aligned, changed)))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    # The teacher that was given is as it was.
    assert params["embedding"].shape[0] == config.vocab_size
    padding = np.asarray(changed["embedding"])[config.vocab_size :]
    assert not padding.any()


def test_no_row_is_padding_where_all_are_shared() -> None:
    aligned, _ = vocabulary.aligned_teacher(tiny.LARGE, tiny.params(tiny.LARGE), tiny.VOCAB, tiny.VOCAB)
    assert aligned == tiny.LARGE
    assert vocabulary.aligned_student(tiny.SMALL, tiny.VOCAB) == tiny.SMALL
    assert vocabulary.aligned_student(tiny.SMALL, 30).known_tokens == 30


def test_more_shared_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="shared=41 tokens do not fit into the teacher's vocab_size=40"):
        vocabulary.aligned_teacher(tiny.LARGE, tiny.params(tiny.LARGE), 41, 50)


def test_a_document_with_a_token_that_is_not_shared_is_named() -> None:
    documents = [tiny.document([1, 2, 3], [2], "a"), tiny.document([1, 8, 3, 9], [2], "b")]
    vocabulary.check_documents(documents, 10)
    message = "document b holds token 8 ('w8') at place 1, which is not among the 8 tokens"
    with pytest.raises(VocabularyError, match=re.escape(message)):
        vocabulary.check_documents(documents, 8, tokenizer(words(9)))
