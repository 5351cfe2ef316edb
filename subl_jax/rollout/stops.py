"""Where a turn ends: one finite automaton over tokens for end-of-turn ids and for stop texts in any tokenization.

A tokenizer, end ids and stop texts in; a table of next states out, which the device program looks one entry up in per
sampled token. A text may begin inside one token and end inside a later one: the automaton reads the tokens' bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from transformers import PreTrainedTokenizerBase


class StopAutomaton(NamedTuple):
    """What a turn's tokens so far mean for its end.

    Attributes:
      table: (state, token) -> next state. A turn starts in state 0; the last state means stopped, and is never left.
    """

    table: Int[Array, "states vocab"] | Int[np.ndarray, "states vocab"]


def step(automaton: StopAutomaton, state: Int[Array, " slots"], tokens: Int[Array, " slots"]) -> Int[Array, " slots"]:
    """Each slot's state after one more token."""
    return jnp.asarray(automaton.table)[state, tokens].astype(state.dtype)


def stopped(automaton: StopAutomaton, state: Int[Array, " slots"]) -> Bool[Array, " slots"]:
    """Whether each slot's turn is over: an end id or the end of a stop text was among its tokens."""
    return state == automaton.table.shape[0] - 1


def build(
    tokens: PreTrainedTokenizerBase | Sequence[bytes], vocab_size: int, end_ids: Sequence[int], stop: Sequence[str]
) -> StopAutomaton:
    """Composes the automaton; the table is in NumPy, of the smallest integers that hold its states.

    Args:
      tokens: the tokenizer, or the bytes of each token; looked at only if there are stop texts.
      vocab_size: rows of the model's vocabulary. Those that no token has stand for no text.
      end_ids: tokens that end a turn.
      stop: texts that end a turn with the token that completes one. A marker's token matches by the text it is written as.

    Raises:
      ValueError: an end id outside the vocabulary, an empty stop text, or a tokenizer whose text is not its tokens' bytes
        one after the other.
    """
    for end in end_ids:
        if not 0 <= end < vocab_size:
            raise ValueError(
                f"end id {end} is outside the vocabulary of {vocab_size} tokens; is it another tokenizer's?"
            )
    if "" in stop:
        raise ValueError("stop holds an empty text, which would end every turn at once; remove it")
    by_byte = _byte_automaton([text.encode() for text in stop])
    states = len(by_byte)
    table = np.empty((states, vocab_size), np.min_scalar_type(-states))
    table[:] = np.arange(states)[:, None]
    if stop:
        pieces = token_bytes(tokens) if isinstance(tokens, PreTrainedTokenizerBase) else tokens
        _read(table, by_byte, pieces[:vocab_size])
    table[:, list(end_ids)] = states - 1
    return StopAutomaton(table)


def _byte_automaton(stop: Sequence[bytes]) -> Int[np.ndarray, "states 256"]:
    """Aho and Corasick's automaton (1975): (state, byte) -> next state, state 0 first, the state "stopped" last.

    A state is the longest beginning of a stop text that what was read ends in.
    """
    # A text that contains another is never completed before it. Without those, no beginning of a text contains one.
    texts = {text for text in stop if not any(other in text for other in stop if other != text)}
    beginnings = sorted(
        {text[:n] for text in texts for n in range(len(text))} | {b""}, key=lambda text: (len(text), text)
    )
    number = {text: state for state, text in enumerate(beginnings)} | dict.fromkeys(texts, len(beginnings))
    table = np.zeros((len(beginnings) + 1, 256), np.int32)
    table[-1] = len(beginnings)
    fallback = [0] * len(table)  # state -> that of its longest proper suffix
    for state, text in enumerate(beginnings):  # shorter ones first: a fallback's row is complete
        table[state] = table[fallback[state]]
        for byte in range(256):
            longer = number.get(text + bytes([byte]))
            if longer is not None:
                fallback[longer] = table[state, byte]
                table[state, byte] = longer
    return table


def _read(
    table: Int[np.ndarray, "states vocab"], by_byte: Int[np.ndarray, "states 256"], pieces: Sequence[bytes]
) -> None:
    """Moves each state over the bytes of each token, all tokens' n-th bytes at once.

    Rows one by one, longest tokens first, one flat look-up: a quarter of the time of the whole table at once. 152k tokens of
    seven letters took 0.1 s with 17 states and 1.3 s with 201, on one core; finding the tokens' bytes took 0.5 s.
    """
    lengths = np.asarray([len(piece) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")
    text = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int32)
    starts = (np.cumsum(lengths) - lengths)[order]
    places = [text[starts[: np.sum(lengths > place)] + place] for place in range(lengths.max(initial=0))]
    flat = by_byte.ravel()
    for row in table:
        state = row[order].astype(np.int32)
        for column in places:
            state[: len(column)] = flat[256 * state[: len(column)] + column]
        row[order] = state


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each id adds to a text; none for ids that no token has.

    Byte-level tokenizers (GPT-2's, and so Llama 3's, Qwen's and the embedded one) write each byte as a letter; of another, a
    token's bytes are those of the text that it decodes to. Which of the two holds is seen from the text of all ids.

    Raises:
      ValueError: neither.
    """
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    ids = sorted(vocabulary)
    whole = _decode(tokenizer, [ids])[0]
    for read in (
        lambda: [_letters_bytes(vocabulary[index]) for index in ids],
        lambda: [text.encode() for text in _decode(tokenizer, [[index] for index in ids])],
    ):
        pieces = dict(zip(ids, read(), strict=True))
        if b"".join(pieces.values()).decode(errors="replace") == whole:
            return [pieces.get(index, b"") for index in range(ids[-1] + 1)]
    raise ValueError(
        "stop texts need a tokenizer whose text is its tokens' bytes one after the other, and this "
        f"{type(tokenizer).__name__} writes something else; leave stop empty: its end-of-turn token still ends a turn"
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """The exact text of each sequence of ids, markers included."""
    return cast(list[str], tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Letter -> byte, as GPT-2 has it: printable Latin-1 bytes are themselves, the others count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _letters_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with other letters (a marker with a space in it) was added as it stands."""
    letters = _byte_letters()
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else token.encode()
