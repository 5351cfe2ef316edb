"""The stop automaton ends a turn with the very token at which its text first holds a stop text, or that is an end id."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from subl_jax.rollout import stops
from subl_jax.rollout.stops import StopAutomaton
from tests.chat import samples


def first_stop(automaton: StopAutomaton, rows: Sequence[Sequence[int]]) -> list[int | None]:
    """How many tokens of each row are read when its turn is over; run as the device does, slot by slot in one scan."""
    longest = max(map(len, rows))
    # Nothing may be lost by reading on: a turn that is over stays over.
    tokens = np.asarray([[*row, *[0] * (longest - len(row))] for row in rows], np.int32)

    def read(state: Any, column: Any) -> tuple[Any, Any]:
        state = stops.step(automaton, state, column)
        return state, stops.stopped(automaton, state)

    _, over = jax.lax.scan(read, jnp.zeros(len(rows), jnp.int32), jnp.asarray(tokens.T))
    over = np.asarray(over).T
    assert (np.diff(over.astype(int)) >= 0).all()
    return [int(np.argmax(o)) + 1 if o[: len(row)].any() else None for o, row in zip(over, rows, strict=True)]


def brute_force(
    decode: Callable[[list[int]], str], rows: Sequence[Sequence[int]], end_ids: Sequence[int], stop: Sequence[str]
) -> list[int | None]:
    """The oracle: decode all that was sampled so far, and search it."""

    def over(ids: list[int]) -> bool:
        return ids[-1] in end_ids or any(text in decode(ids) for text in stop)

    return [next((n for n in range(1, len(row) + 1) if over(list(row[:n]))), None) for row in rows]


STOPS = {
    "none": [],
    "overlapping": ["aab"],
    "several": ["öäö", "ab\n\nab", "好 🙂"],
    "one within another": ["a🙂b", "🙂", "aaa🙂ba"],
    "a beginning of another": ["ab", "abab你", "你"],
    "multi-byte": ["你们"],
    "a marker's text": ["<|end|>", "x> a", "日本"],
    "equal ones": ["ba", "ba"],
}
PIECES = ["a", "aa", "ab", "b", "ö", "ä", "\n\n", "你", "们", "好", " ", "🙂", "🙃", "<|end|>", "<x>", "日", "本"]


# --- Tokenizers ---------------------------------------------------------------------------------------------------------


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, tiny, with merges across letters, words and lines, and added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(3)
    tokenizer.train_from_iterator(["".join(rng.choice(PIECES, 20)) for _ in range(100)], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(added, normalized=False) for added in ("a b", "日本", "<x>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@functools.cache
def letters() -> PreTrainedTokenizerFast:
    """One token per letter or pair of letters, written as they are: not byte-level."""
    vocabulary = [*"abö你Ġ", "ab", "ba", "öa", "你b", "Ġa", "aab"]
    model = models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def written(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """Each token's bytes by transformers' own map, for those that it can write."""
    byte = {letter: value for value, letter in bytes_to_unicode().items()}
    # By index: a vocabulary comes in another order in every process, and what is drawn below depends on it.
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return {index: bytes(byte[c] for c in token) for index, token in vocabulary if all(c in byte for c in token)}


def retokenized(rng: np.random.Generator, text: bytes, tokens: dict[int, bytes]) -> Iterator[int]:
    """One of the ways to write the text in tokens, at random, long ones as likely as short ones."""
    while text:
        index = int(rng.choice([index for index, token in tokens.items() if token and text.startswith(token)]))
        yield index
        text = text[len(tokens[index]) :]


@pytest.mark.parametrize("end_ids", [[], [0], [97, 300]], ids=str)
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_byte_level_turns_end_where_the_decoded_text_first_holds_a_stop(stop, end_ids):
    tokenizer, rng = byte_level(), np.random.default_rng(0)
    tokens = written(tokenizer)
    rows = []
    for _ in range(80):
        text = "".join(rng.choice([*PIECES, *stop], 14)).encode()
        row = list(retokenized(rng, text, tokens))
        for place in rng.integers(0, len(row), 2):  # and some tokens from anywhere, which break letters in two
            row[place] = int(rng.integers(len(tokenizer)))
        rows.append(row)
    expected = brute_force(tokenizer.decode, rows, end_ids, stop)  # pyright: ignore[reportArgumentType]
    assert first_stop(stops.build(tokenizer, len(tokenizer), end_ids, stop), rows) == expected
    if stop and not end_ids:
        ended = [row[:n] for n, row in zip(expected, rows, strict=True) if n]
        assert len(ended) > 20
        # In some, the text ends inside a token; in some, it spans tokens.
        assert any(not str(tokenizer.decode(row)).endswith(tuple(stop)) for row in ended)
        assert any(not any(text in tokenizer.decode(row[-1:]) for text in stop) for row in ended)
    if not stop and not end_ids:
        assert expected == [None] * len(rows)


@pytest.mark.parametrize("make", [samples.tokenizer, letters], ids=["embedded", "not byte-level"])
def test_other_tokenizers_turns_end_where_the_decoded_text_first_holds_a_stop(make):
    tokenizer, rng = make(), np.random.default_rng(1)
    size = len(tokenizer)
    frequent = rng.choice([index for index in range(size) if "\ufffd" not in tokenizer.decode([index])], 6)
    rows = [[int(i) for i in rng.choice(frequent, 12)] for _ in range(200)]
    # Stops are cut out of what such rows write: they begin and end anywhere.
    stop = [str(tokenizer.decode(row))[start : start + 4] for start, row in enumerate(rows[:4])]
    rows += [[int(i) for i in rng.integers(0, size, 12)] for _ in range(200)]
    end_ids = [int(frequent[0])]
    expected = brute_force(tokenizer.decode, rows, end_ids, stop)
    automaton = stops.build(tokenizer, size, end_ids, stop)
    assert first_stop(automaton, rows) == expected
    assert expected != brute_force(tokenizer.decode, rows, end_ids, []) and len(set(expected)) > 8


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_bytes_in_any_tokens_end_where_a_search_of_the_bytes_says(data):
    """Few letters, so that stop texts overlap with themselves and one another in every way there is."""
    pieces = data.draw(st.lists(st.text("abö", max_size=4).map(str.encode), min_size=2, max_size=8))
    pieces += [b"\xc3", b"\xb6a"]  # ö in two
    stop = data.draw(st.lists(st.text("abö", min_size=1, max_size=6), max_size=4))
    end_ids = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=1))
    row = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=16))
    table = np.asarray(stops.build(pieces, len(pieces), end_ids, stop).table)
    state, read = 0, b""
    over = False
    for token in row:
        state, read = int(table[state, token]), read + pieces[token]
        over = over or token in end_ids or any(text.encode() in read for text in stop)
        assert (state == len(table) - 1) == over


# --- The table ----------------------------------------------------------------------------------------------------------


def test_a_new_turn_knows_nothing_of_the_turn_before():
    automaton = stops.build([b"a", b"b"], 2, [], ["ab"])
    assert first_stop(automaton, [[0], [1], [0, 1]]) == [None, None, 2]


def test_without_stop_texts_the_tokenizer_is_not_asked_and_two_states_do():
    automaton = stops.build([], 7, [2, 5], [])
    assert automaton.table.shape == (2, 7)
    np.testing.assert_array_equal(automaton.table[0] == 1, np.isin(np.arange(7), [2, 5]))
    assert (automaton.table[1] == 1).all()
    assert not np.any(stops.build([], 7, [], []).table[0])  # never stops


def test_rows_of_the_vocabulary_without_a_token_stand_for_no_text_and_tokens_beyond_it_are_dropped():
    automaton = stops.build([b"a", b"b", b"ab"], 6, [], ["ab"])
    assert first_stop(automaton, [[0, 5, 4, 1], [5, 4, 3], [2, 3]]) == [4, None, 1]
    assert stops.build([b"a", b"b", b"ab"], 2, [], ["ab"]).table.shape == (3, 2)


def test_states_are_beginnings_of_stop_texts_and_the_stopped_one():
    # "", "a", "aa" and stopped; a text that contains another adds none.
    assert stops.build([b"a"], 1, [], ["aab"]).table.shape == (4, 1)
    assert stops.build([b"a"], 1, [], ["aab", "xxaab", "aaba"]).table.shape == (4, 1)


def test_the_state_keeps_its_type_inside_a_compiled_loop():
    automaton = stops.build([b"a"], 1, [], ["aaaa"])
    run = jax.jit(
        lambda automaton, state: jax.lax.while_loop(
            lambda carry: ~stops.stopped(automaton, carry[0]).all(),
            lambda carry: (stops.step(automaton, carry[0], jnp.zeros(3, jnp.int32)), carry[1] + 1),
            (state, 0),
        )
    )
    state, steps = run(automaton, jnp.asarray([0, 2, 3], jnp.int32))
    assert steps == 4 and state.tolist() == [4, 4, 4] and state.dtype == jnp.int32


@pytest.mark.parametrize(("length", "kind"), [(126, np.int8), (127, np.int8), (128, np.int16), (300, np.int16)])
def test_states_are_written_in_the_smallest_integers_that_hold_them(length, kind):
    automaton = stops.build([b"a"], 1, [], ["a" * length])
    assert automaton.table.dtype == kind
    assert automaton.table[:, 0].tolist() == [*range(1, length + 1), length]


def test_a_vocabulary_of_152_thousand_tokens_takes_seconds_and_few_megabytes():
    rng = np.random.default_rng(0)
    letters = "".join(bytes_to_unicode().values())
    text = "".join(letters[i] for i in rng.integers(0, 256, 1_500_000))
    cuts = np.cumsum(rng.geometric(0.13, 170_000))
    words = [*letters, *(text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))]
    vocabulary = {token: index for index, token in enumerate(list(dict.fromkeys(words))[:151_936])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    began = time.process_time()
    automaton = stops.build(fast, 152_064, [151_000], ["\nUser:", "</answer>", "###"])
    assert time.process_time() - began < 10  # it takes 0.6 s
    assert automaton.table.shape == (17, 152_064) and automaton.table.nbytes < 3e6


# --- Tokens as bytes, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [samples.tokenizer, byte_level, letters], ids=lambda make: make.__name__)
def test_the_bytes_of_tokens_decode_to_what_the_tokenizer_decodes(make):
    tokenizer, rng = make(), np.random.default_rng(2)
    pieces = stops.token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer)
    for _ in range(300):
        ids = [int(i) for i in rng.integers(0, len(pieces), 9)]
        whole = b"".join(pieces[i] for i in ids).decode(errors="replace")
        assert whole == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_tokenizer_whose_text_is_more_than_its_tokens_bytes_is_refused_with_stop_texts_only():
    tokenizer = letters()
    spaced = tokenizers.Tokenizer(tokenizer.backend_tokenizer.model)  # no decoder: spaces between tokens
    fast = PreTrainedTokenizerFast(tokenizer_object=spaced)
    assert stops.build(fast, 12, [3], []).table.shape == (2, 12)
    with pytest.raises(
        ValueError, match="stop texts need a tokenizer whose text is its tokens' bytes.*leave stop empty"
    ):
        stops.build(fast, 12, [3], ["ab"])


@pytest.mark.parametrize("end", [-1, 7])
def test_an_end_id_outside_the_vocabulary_is_refused(end):
    with pytest.raises(ValueError, match=f"end id {end} is outside the vocabulary of 7 tokens"):
        stops.build([], 7, [2, end], [])


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="stop holds an empty text"):
        stops.build([b"a"], 1, [], ["a", ""])
