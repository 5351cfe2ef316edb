"""The log-odds readout against whole forward passes without a cache, scored in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import renderer_for
from subl_jax.chat.messages import ToolCall, assistant, system, user
from subl_jax.chat.rendering import Renderer
from subl_jax.evaluate.readout import NameScores, call_prefix, name_ids, score_names
from subl_jax.models import decoder
from subl_jax.settings.api import naming
from tests.chat.family_templates import llama_tokenizer, qwen_tokenizer
from tests.distill import tiny

NAMES = ("stop", "list_files", "list_old_files", "erase_file", "keep_file")


def schema(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": {}}}


TOOLS = [schema(name) for name in NAMES]


@functools.cache
def renderer() -> Renderer:
    return Renderer(tokenizers.train(['"stop" "list_files" "list_old_files" "erase_file" "keep_file"'] * 9, 330))


def model():
    config = dataclasses.replace(tiny.SMALL, vocab_size=len(renderer().tokenizer))
    return config, tiny.params(config, 5)


def conversations(count: int) -> list:
    """Openings of many lengths, some with a shorter list of tools."""
    return [
        ([system("w"), user("".join(chr(97 + (i * 7 + k) % 26) for k in range(1 + i % 11)))], TOOLS[: 3 + i % 3])
        for i in range(count)
    ]


def brute_force(config, params, talks, tools) -> np.ndarray:
    """One pass per (task, name) over opening + call + name, no cache; log-probabilities of the name's ids, added up."""
    encode = renderer().encode
    rows, spans = [], []
    for messages, shown in talks:
        for tool in tools:
            before = renderer().opening(messages, shown) + encode('<tool_call>{"name":"')
            name = encode(tool["function"]["name"])
            rows.append(before + name)
            spans.append((len(before), name))
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    inside = (np.arange(tokens.shape[1]) < np.array([len(ids) for ids in rows])[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = jax.jit(lambda *fields: decoder.apply(config, params, {}, *fields))(
        *(jnp.asarray(field) for field in (tokens, positions, inside))
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["embedding"], np.float64).T
    scores = [
        sum(log_softmax(logits[row, start + k - 1])[token] for k, token in enumerate(name))
        for row, (start, name) in enumerate(spans)
    ]
    return np.array(scores).reshape(len(talks), len(tools))


def test_scores_equal_whole_forward_passes_for_names_of_one_two_and_three_tokens():
    config, params = model()
    assert [len(renderer().encode(name)) for name in NAMES] == [1, 2, 3, 2, 2]
    talks = conversations(6)
    ours = score_names(config, params, renderer(), talks, NAMES, naming)
    assert ours.names == NAMES
    np.testing.assert_allclose(ours.log_probs, brute_force(config, params, talks, TOOLS), atol=1e-4)
    assert np.ptp(ours.log_probs[:, 0]) > 1e-3  # the openings matter


def test_names_are_disjoint_events_whose_probabilities_never_exceed_one():
    config, params = model()
    scores = score_names(config, params, renderer(), conversations(6), NAMES, naming)
    np.testing.assert_allclose(scores.mass(), np.exp(scores.log_probs.astype(np.float64)).sum(1), rtol=1e-6)
    assert np.all((scores.mass() > 0) & (scores.mass() <= 1 + 1e-6))
    # A model that sees nothing but the names gives them all its mass: an upper end that is reached.
    certain = NameScores(("a", "b"), np.log(np.array([[0.25, 0.75]], np.float32)))
    assert certain.mass()[0] == pytest.approx(1.0)


def test_a_second_block_is_scored_like_the_first():
    config, params = model()
    talks = conversations(65)
    whole = score_names(config, params, renderer(), talks, NAMES, naming).log_probs
    assert whole.shape == (65, 5)
    # The last task stands alone in its block, beside padding; turned round it stands first among 64.
    turned = score_names(config, params, renderer(), talks[::-1], NAMES, naming).log_probs[::-1]
    np.testing.assert_allclose(whole, turned, atol=1e-5)
    np.testing.assert_allclose(whole[60:], brute_force(config, params, talks[60:], TOOLS), atol=1e-4)


def test_log_odds_and_mass_by_hand():
    probabilities = np.array([[0.1, 0.2, 0.05, 0.15], [0.4, 0.01, 0.01, 0.08]])
    scores = NameScores(("a", "b", "c", "d"), np.log(probabilities).astype(np.float32))
    np.testing.assert_allclose(scores.log_odds(["a", "c"], ["b", "d"]), np.log([0.15 / 0.35, 0.41 / 0.09]), rtol=1e-5)
    np.testing.assert_allclose(scores.log_odds(["b"], ["a"]), -scores.log_odds(["a"], ["b"]), rtol=1e-12)
    np.testing.assert_allclose(scores.mass(), [0.5, 0.5], rtol=1e-6)


def test_log_odds_of_vanishing_probabilities_stay_finite():
    scores = NameScores(("a", "b", "c"), np.array([[-200.0, -300.0, -350.0]], np.float32))
    np.testing.assert_allclose(scores.log_odds(["a"], ["b", "c"]), [100.0], rtol=1e-6)


def test_the_prefix_is_what_the_model_writes_before_the_name():
    prefix = call_prefix(renderer(), NAMES, naming, conversations(1)[0][0], TOOLS)
    assert renderer().decode(prefix) == '<tool_call>{"name":"'
    # Token for token as in a rendered call, so that training and readout meet the same context.
    talk = [*conversations(1)[0][0], assistant(calls=[ToolCall("list_old_files", {"path": "a"})])]
    item = renderer().render([(talk, TOOLS)])[0]
    written = item.tokens[item.loss_mask].tolist()
    spelled = name_ids(renderer(), NAMES, naming, talk[:-1], TOOLS)
    assert written[: len(prefix) + 3] == prefix + spelled[NAMES.index("list_old_files")]


def test_a_name_whose_tokens_begin_anothers_is_refused():
    with pytest.raises(ValueError, match="tokens of 'list' begin those of 'list_files'; rename one"):
        name_ids(renderer(), ["list", "stop", "list_files"], naming, [system("w"), user("x")], TOOLS)


def test_a_name_that_merges_with_the_mark_before_it_is_spelled_from_that_mark_on():
    class Merging(Renderer):
        """Letters are ids; `"s` is one, as a foreign tokenizer may have it."""

        def encode(self, text: str) -> list[int]:
            left, found, right = text.partition('"s')
            return [*map(ord, left), *([9999] if found else []), *map(ord, right)]

        def decode(self, ids) -> str:
            return "".join('"s' if index == 9999 else chr(index) for index in ids)

    ours, talk = Merging(renderer().tokenizer), [system("w"), user("x")]
    spelled = name_ids(ours, ["list", "stop"], naming, talk, TOOLS)
    assert ours.decode(call_prefix(ours, ["list", "stop"], naming, talk, TOOLS)) == '<tool_call>{"name":'
    assert dict(zip(["list", "stop"], spelled, strict=True)) == {
        "list": [*map(ord, '"list')],
        "stop": [9999, *map(ord, "top")],
    }
    # Alone, a name that does not merge is spelled from its first letter; one that does, from the mark.
    assert name_ids(ours, ["list"], naming, talk, TOOLS) == [[*map(ord, "list")]]
    assert name_ids(ours, ["stop"], naming, talk, TOOLS) == [[9999, *map(ord, "top")]]


def test_a_name_that_merges_with_the_text_behind_it_is_refused():
    class Merging(Renderer):
        def encode(self, text: str) -> list[int]:
            return [9999 if piece == '_"' else ord(piece) for piece in re.findall('_"|.', text)]

        def decode(self, ids) -> str:
            return "".join('_"' if index == 9999 else chr(index) for index in ids)

    ours = Merging(renderer().tokenizer)
    with pytest.raises(ValueError, match="merges the name 'stop_' with the text behind it; rename it"):
        name_ids(ours, ["list", "stop_"], naming, [system("w"), user("x")], TOOLS)


def test_a_tool_named_like_a_word_of_the_calls_own_form_is_found_at_its_place():
    talk = [system("w"), user("x")]
    for name in ("name", "tool_call", "arguments", "0", "1"):
        spelled = name_ids(renderer(), [name], naming, talk, [schema(name)])
        assert renderer().decode(spelled[0]) == name


# --- Tokenizers and formats of real families ------------------------------------------------------------------------------

FAMILY_NAMES = ("stop", "list_files", "list_old_files", "_erase", "keep_file", "name")
FAMILY_TOOLS = [schema(name) for name in FAMILY_NAMES]
FAMILY_TEXTS = ['"stop", "list_files", "list_old_files", "keep_file"', '{"name": "_erase"}'] * 200


@functools.cache
def family_renderer(which: str) -> Renderer:
    if which == "llama":
        return renderer_for(llama_tokenizer(FAMILY_TEXTS, 460))
    return renderer_for(qwen_tokenizer(FAMILY_TEXTS, 460, version="3" if which == "3" else "2.5"))


def by_offsets(which: str, messages) -> tuple[list[list[int]], int, list[int]]:
    """Per name the ids of a whole call, where the shared ones end, and where each name ends; by the tokenizer's offsets."""
    ours = family_renderer(which)
    written, shared, stops = [], [], []
    for name in FAMILY_NAMES:
        text = ours.turn_text(messages, assistant(calls=[ToolCall(name, {})]), FAMILY_TOOLS)
        start = re.search(r'"name": "', text).end()  # type: ignore[union-attr]
        encoded = ours.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]  # type: ignore[union-attr]
        written.append(encoded["input_ids"])
        shared.append(sum(end <= start for end in ends))
        stops.append(ends.index(start + len(name)) + 1)
    same = next(n for n in range(99) if len({tuple(ids[:n]) for ids in written}) > 1) - 1
    return written, min(same, *shared), stops


@pytest.mark.parametrize("which", ["llama", "2.5", "3"])
def test_family_names_are_the_ids_of_a_rendered_call(which):
    talk = [system("w"), user("x")]
    written, count, stops = by_offsets(which, talk)
    ours = family_renderer(which)
    spelled = name_ids(ours, FAMILY_NAMES, naming, talk, FAMILY_TOOLS)
    assert call_prefix(ours, FAMILY_NAMES, naming, talk, FAMILY_TOOLS) == written[0][:count]
    assert spelled == [ids[count:stop] for ids, stop in zip(written, stops, strict=True)]
    # One name begins with a mark, which the tokenizer joins to the quote before it; so all are spelled from there on.
    assert [ours.decode(ids) for ids in spelled] == [f' "{name}' for name in FAMILY_NAMES]
    assert len(spelled[3]) < len(ours.encode(' "')) + len(ours.encode("_erase"))
    # Without it they are spelled from their first letter.
    others = [name for name in FAMILY_NAMES if name != "_erase"]
    assert [ours.decode(ids) for ids in name_ids(ours, others, naming, talk, FAMILY_TOOLS)] == others
    for name, ids in zip(FAMILY_NAMES, spelled, strict=True):
        [item] = ours.render([([*talk, assistant(calls=[ToolCall(name, {"path": "a"})])], FAMILY_TOOLS)])
        assert item.tokens[item.loss_mask].tolist()[: count + len(ids)] == written[0][:count] + ids


def test_family_scores_equal_a_plain_sum_over_the_rendered_calls():
    ours = family_renderer("llama")
    config = dataclasses.replace(tiny.SMALL, vocab_size=len(ours.tokenizer))
    params = tiny.params(config, 5)
    talks = [([system("w"), user("x" * n)], FAMILY_TOOLS[: 3 + n]) for n in (1, 3)]
    scores = score_names(config, params, ours, talks, FAMILY_NAMES, naming)
    written, count, stops = by_offsets("llama", talks[0][0])
    rows = [ours.opening(*talk) + ids for talk in talks for ids in written]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    inside = (np.arange(tokens.shape[1]) < np.array([len(ids) for ids in rows])[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = jax.jit(lambda *fields: decoder.apply(config, params, {}, *fields))(
        *(jnp.asarray(field) for field in (tokens, positions, inside))
    )
    chosen = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(params["embedding"], np.float64).T, axis=-1)
    expected = np.zeros((len(talks), len(FAMILY_NAMES)))
    for (task, talk), (name, stop) in itertools.product(enumerate(talks), enumerate(stops)):
        row, start = task * len(FAMILY_NAMES) + name, len(ours.opening(*talk))
        expected[task, name] = sum(chosen[row, k - 1, tokens[row, k]] for k in range(start + count, start + stop))
    np.testing.assert_allclose(scores.log_probs, expected, atol=1e-4)
    assert np.all((scores.mass() > 0) & (scores.mass() <= 1 + 1e-6))
