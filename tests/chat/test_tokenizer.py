"""The embedded tokenizer is a standard Hugging Face fast tokenizer: saved, loaded by AutoTokenizer, the same ids."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from subl_jax.chat import tokenizer as embedded
from tests.chat import samples

TEXTS = [
    "a plan in /notes/plan_old.txt",
    'says "ü→"\n\t 12345  ',
    '<tool_call>{"name":"x","arguments":{}}</tool_call><|end|>',
]


def test_auto_tokenizer_loads_the_saved_one_with_the_same_ids(tmp_path):
    ours = samples.tokenizer()
    ours.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), embedded.load(tmp_path)):
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert [loaded.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
        assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
        for conversation in samples.CONVERSATIONS:
            assert samples.templated(loaded, conversation) == samples.templated(ours, conversation)
        assert embedded.fingerprint(loaded) == embedded.fingerprint(ours)


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_every_text_comes_back_from_its_ids(text):
    ours = samples.tokenizer()
    assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_every_marker_is_one_token_and_the_vocabulary_has_the_size_asked_for():
    ours = samples.tokenizer()
    for marker in embedded.SPECIAL:
        assert len(ours.encode(f"a{marker}b", add_special_tokens=False)) == 3
    assert len(ours) <= 330
    assert max(ours.get_vocab().values()) == len(ours) - 1  # no holes: the model's rows are all reachable


def test_training_is_deterministic():
    texts = [f"word{n} and other words {n * n}" for n in range(50)]
    first, second = (embedded.train(iter(texts), 320) for _ in range(2))
    assert embedded.fingerprint(first) == embedded.fingerprint(second)
    assert first.get_vocab() == second.get_vocab()


def test_fingerprint_tells_other_vocabularies_and_templates_apart():
    base = embedded.train(["one two"] * 9, 300)
    other_words = embedded.train(["three four"] * 9, 300)
    other_template = embedded.train(["one two"] * 9, 300)
    other_template.chat_template = f"{base.chat_template} "
    assert len({embedded.fingerprint(each) for each in (base, other_words, other_template)}) == 3


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=200 leaves no room.*use more than"):
        embedded.train(["a"], 200)


def test_loading_nothing_or_no_template_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer_config.json is missing"):
        embedded.load(tmp_path)
    plain = embedded.train(["a"], 290)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match="no chat template; add chat_template.jinja"):
        embedded.load(tmp_path)
