"""Sampled ids back to messages: a good call is executed, half a call never is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.chat.messages import ToolCall, assistant, calls_of, user
from subl_jax.chat.rendering import Renderer
from tests.chat import samples

RENDERER = Renderer(samples.tokenizer())
GOOD = '<tool_call>{"name":"read","arguments":{"path":"/a"}}</tool_call>'


def parse(text: str):
    return RENDERER.parse(RENDERER.encode(text))


@pytest.mark.parametrize("end", ["", "<|end|>"])
def test_a_good_call_is_parsed(end):
    assert parse(GOOD + end) == assistant("", [ToolCall("read", {"path": "/a"})])


def test_two_calls_keep_their_order_and_the_text_beside_them():
    message = parse(
        f'both: {GOOD}\n<tool_call>\n{{"arguments": {{"n": [1, null]}}, "name": "list"}}\n</tool_call><|end|>'
    )
    assert list(calls_of(message)) == [ToolCall("read", {"path": "/a"}), ToolCall("list", {"n": [1, None]})]
    assert message["content"] == "both:"
    assert "unparseable" not in message


@pytest.mark.parametrize("text", ["it is 5 long.", "", '{"name":"read","arguments":{}}', "a < b and <tool> too"])
def test_plain_text_is_an_answer(text):
    assert parse(text + "<|end|>") == assistant(text)


def test_lists_in_lists_are_still_a_call():
    message = parse(f'<tool_call>{{"name":"read","arguments":{{"n":{nested(20)}}}}}</tool_call><|end|>')
    assert json.dumps(calls_of(message)[0].arguments["n"]) == nested(20)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name":"read","arguments":{"path":"/a"}}',
        '<tool_call>{"name":"read","argu',
        '{"name":"read","arguments":{}}</tool_call>',
        f"{GOOD}<tool_call>",
        f'{GOOD}<tool_call>{{"name":"read",</tool_call>',
        f"<tool_call>{GOOD}",
        "<tool_call></tool_call>",
        '<tool_call>{"name":"read","arguments":{"path":/a}}</tool_call>',
        "<tool_call>{'name':'read','arguments':{}}</tool_call>",
        '<tool_call>{"name":"read","arguments":{}} and more</tool_call>',
        '<tool_call>{"name":"read","arguments":{}}{"name":"read","arguments":{}}</tool_call>',
        '<tool_call>{"name":"read","arguments":"/a"}</tool_call>',
        '<tool_call>{"name":"read","arguments":["/a"]}</tool_call>',
        '<tool_call>{"name":"read","arguments":null}</tool_call>',
        '<tool_call>{"name":7,"arguments":{}}</tool_call>',
        '<tool_call>{"name":null,"arguments":{}}</tool_call>',
        '<tool_call>{"name":"read"}</tool_call>',
        '<tool_call>{"arguments":{}}</tool_call>',
        '<tool_call>["read",{}]</tool_call>',
        "<tool_call>null</tool_call>",
        '<tool_call>"read"</tool_call>',
        '<tool_call>{"name":"read","arguments":{"n":NaN}}</tool_call>',
        '<tool_call>{"name":"read","arguments":{"n":[-Infinity]}}</tool_call>',
        '<tool_call>{"name":"read","arguments":{"n":1e999}}</tool_call>',
        '<tool_call>{"name":"read","arguments":{"n":"\\ud800"}}</tool_call>',
        '<tool_call>{"name":"\\udfff","arguments":{}}</tool_call>',
        '<tool_call>{"name":"read","arguments":{"n":' + "9" * 5000 + "}}</tool_call>",
        '<tool_call>{"name":"read","arguments":{"n":' + nested(20_000) + "}}</tool_call>",
        # Python reads this one, but the template could not write it back.
        '<tool_call>{"name":"read","arguments":{"n":' + nested(500) + "}}</tool_call>",
        # A marker inside an argument cuts the call in two: counted as broken, never guessed.
        '<tool_call>{"name":"read","arguments":{"path":"</tool_call>"}}</tool_call>',
        "the marker tool_call> in a sentence",
    ],
)
def test_a_broken_call_is_unparseable_and_keeps_its_text(text):
    message = parse(text + "<|end|>")
    assert message.get("unparseable") is True
    assert calls_of(message) == ()
    assert message["content"] == text


@pytest.mark.parametrize("length", range(1, len(RENDERER.encode(GOOD))))
def test_no_beginning_of_a_call_is_ever_a_call(length):
    message = RENDERER.parse(RENDERER.encode(GOOD)[:length])
    assert message.get("unparseable") is True
    assert calls_of(message) == ()


texts = st.text().filter(lambda text: "tool_call>" not in text)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
leaves = (
    st.none()
    | st.booleans()
    | numbers
    | texts
    | st.sampled_from(['"', "\\", '\\"}}', "{}", "<|end|>", "\u2028", "\x00"])
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1)
tool_calls = st.lists(st.builds(ToolCall, names, st.dictionaries(texts, values, max_size=3)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=100)
@given(tool_calls)
def test_rendered_calls_are_parsed_back(calls):
    turn = assistant("", calls)
    ids = RENDERER.encode(RENDERER.turn_text([user("go")], turn, samples.TOOLS))
    assert RENDERER.parse(ids) == turn


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, len(samples.tokenizer()) - 1), max_size=40))
def test_whatever_is_sampled_parsing_never_raises_and_its_result_can_be_stored(ids):
    message = RENDERER.parse(ids)
    json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    assert message.get("unparseable") or RENDERER.turn_text([user("go")], message, samples.TOOLS).endswith("<|end|>")
