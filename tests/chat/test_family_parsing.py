"""Sampled turns of each family back to messages: the same calls from every format, and half a call never."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.chat.messages import ToolCall, assistant, calls_of, user
from tests.chat import samples
from tests.chat.test_families import renderer
from tests.chat.test_parsing import nested

LLAMA_CALL = '{"name": "read", "parameters": {"path": "/a"}}'
QWEN_CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "/a"}}\n</tool_call>'
THREE = pytest.mark.parametrize("which", ["llama", "qwen25", "qwen3"])
END = {"llama": "<|eot_id|>", "qwen25": "<|im_end|>", "qwen3": "<|im_end|>"}


def parse(which: str, text: str):
    ours = renderer(which)
    return ours.parse(ours.encode(text))


def assert_broken(which: str, text: str) -> None:
    message = parse(which, text + END[which])
    assert message.get("unparseable") is True
    assert calls_of(message) == ()
    assert message["content"] == text


# --- The same calls -------------------------------------------------------------------------------------------------------

texts = st.text(max_size=10).filter(lambda text: "tool_call>" not in text)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(['"', "\\", '\\"}}', "{}", "<|eot_id|>", "<|im_end|>", "<think>", "</think>", "\u2028", "\x00"])
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1)


@settings(deadline=None, max_examples=60)
@given(st.builds(ToolCall, names, st.dictionaries(texts, values, max_size=3)))
def test_a_call_written_in_any_family_is_parsed_to_the_same_message(call):
    turn = assistant("", [call])
    for which in ("llama", "qwen25", "qwen3"):
        ours = renderer(which)
        text = ours.turn_text([user("go")], turn, samples.TOOLS)
        assert ours.parse(ours.encode(text)) == parse_normalised(turn, which)
        [rendered] = ours.render([([user("go"), turn], samples.TOOLS)])
        assert ours.parse(rendered.tokens[rendered.loss_mask].tolist()) == parse_normalised(turn, which)


def parse_normalised(turn, which):
    """Qwen's tokenizer composes characters (NFC), as real ones do; nothing else is lost."""
    if which == "llama":
        return turn
    ours = renderer(which)
    normalizer = ours.tokenizer.backend_tokenizer.normalizer  # type: ignore[attr-defined]
    return json.loads(normalizer.normalize_str(json.dumps(turn, ensure_ascii=False)))


def test_qwen_keeps_the_order_of_calls_and_the_text_beside_them():
    calls = [ToolCall("read", {"path": "/a"}), ToolCall("list", {"n": [1, None]})]
    for which in ("qwen25", "qwen3"):
        turn = assistant("both:", calls)
        assert parse(which, renderer(which).turn_text([], turn, [])) == turn


@pytest.mark.parametrize("tag", ["", "<|python_tag|>"])
@pytest.mark.parametrize("extra", ["", '"type": "function", '])
def test_llamas_call_is_the_whole_turn(tag, extra):
    text = LLAMA_CALL.replace("{", "{" + extra, 1)
    assert parse("llama", f" {tag}{text}\n<|eot_id|>") == assistant("", [ToolCall("read", {"path": "/a"})])


# --- Thoughts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "message"), [
    ("<think>\nlook first\n</think>\n\n" + QWEN_CALL, assistant("", [ToolCall("read", {"path": "/a"})])),
    ("\n<think></think>it is 5.", assistant("it is 5.")),
    (f"<think>not {QWEN_CALL}</think>done", assistant("done")),
])  # fmt: skip
def test_a_thought_stays_in_the_tokens_and_out_of_the_message(text, message):
    ours = renderer("qwen3")
    ids = ours.encode(text + "<|im_end|>")
    assert ours.encode("<think>")[0] in ids
    assert ours.parse(ids) == message


def test_a_demonstrated_thought_is_written_with_its_markers_and_read_back_without():
    ours = renderer("qwen3")
    [rendered] = ours.render([([user("x"), assistant("<think>a <|im_end|></think>b <think>")], [])])
    written = rendered.tokens[rendered.loss_mask].tolist()
    assert ours.decode(written) == "<think>a <|im_end|></think>b <think><|im_end|>"
    added = set(ours.tokenizer.added_tokens_decoder)
    assert [ours.decode([i]) for i in written if i in added] == ["<think>", "</think>", "<|im_end|>"]


@pytest.mark.parametrize("text", ["<think>half", f"<think>{QWEN_CALL}", f"a</think>{QWEN_CALL}", "a <think>b</think>",
                                  f"<think>a</think><think>{QWEN_CALL}"])  # fmt: skip
def test_half_a_thought_or_one_out_of_place_is_unparseable(text):
    assert_broken("qwen3", text)


def test_qwen25_does_not_think_so_the_marks_are_text():
    assert parse("qwen25", "a <think> b") == assistant("a <think> b")


# --- Prose and broken calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "it is 5 long.", "", "{x} is a set", "{x: 1}", '{"total": 5}', "{}", '["read"]', f"use {LLAMA_CALL}", "a < b {",
    "<tool_call>", '"name": "read"', '{"path": {"name": 1}}', '"{"',
])  # fmt: skip
def test_what_only_looks_like_prose_is_llamas_answer(text):
    assert parse("llama", text + "<|eot_id|>") == assistant(text)


@pytest.mark.parametrize("text", [
    LLAMA_CALL[:-1], '{"', "{", "{'name': 'read', 'parameters': {}}", f"{LLAMA_CALL}; {LLAMA_CALL}",
    f"{LLAMA_CALL}\n{LLAMA_CALL}", f"{LLAMA_CALL} and more", f"[{LLAMA_CALL}]<|python_tag|>", f"so: <|python_tag|>{LLAMA_CALL}",
    '<|python_tag|>brave_search.call(query="x")', "<|python_tag|>", f"<|python_tag|>[{LLAMA_CALL}]", "<|python_tag|>null",
    '<|python_tag|>{"total": 5}', f"{LLAMA_CALL}<|eom_id|>", '{"name": "read"}', '{"parameters": {}}',
    '{"name": "read", "arguments": {}}', '{"name": 7, "parameters": {}}', '{"name": null, "parameters": {}}',
    '{"name": "read", "parameters": "/a"}', '{"name": "read", "parameters": ["/a"]}', '{"name": "read", "parameters": null}',
    '{"name": "read", "parameters": {"n": NaN}}', '{"name": "read", "parameters": {"n": 1e999}}',
    '{"name": "read", "parameters": {"n": "\\ud800"}}', '{"name": "read", "parameters": {"n": ' + "9" * 5000 + "}}",
    '{"name": "read", "parameters": {"n": ' + nested(20_000) + "}}",
    '{"name": "read", "parameters": {"n": ' + nested(500) + "}}",
])  # fmt: skip
def test_a_broken_call_in_llamas_form_is_unparseable_and_keeps_its_text(text):
    assert_broken("llama", text)


@pytest.mark.parametrize("which", ["qwen25", "qwen3"])
@pytest.mark.parametrize("text", [
    QWEN_CALL[:-1], f"{QWEN_CALL}<tool_call>", '<tool_call>\n{"name": "read", "parameters": {}}\n</tool_call>',
    '<tool_call>\n{"name": "read", "arguments": {"n": NaN}}\n</tool_call>', "<tool_call></tool_call>",
    '<tool_call>\n{"name": "read", "arguments": {"n": ' + nested(500) + "}}\n</tool_call>",
])  # fmt: skip
def test_a_broken_call_in_qwens_form_is_unparseable_and_keeps_its_text(which, text):
    assert_broken(which, text)


@THREE
def test_no_beginning_of_a_call_is_ever_a_call(which):
    ours = renderer(which)
    ids = ours.encode(LLAMA_CALL if which == "llama" else QWEN_CALL)
    for length in range(1, len(ids)):
        message = ours.parse(ids[:length])
        assert message.get("unparseable") is True
        assert calls_of(message) == ()


@THREE
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_whatever_is_sampled_parsing_never_raises_and_its_result_can_be_written_back(which, data):
    ours = renderer(which)
    joints = [*ours.encode(LLAMA_CALL), *ours.encode(QWEN_CALL)]
    ids = data.draw(st.lists(st.sampled_from(joints) | st.integers(0, len(ours.tokenizer) - 1), max_size=40))
    message = ours.parse(ids)
    json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    if not message.get("unparseable"):
        [rendered] = ours.render([([user("go"), message], samples.TOOLS)])
        assert rendered.tokens[rendered.loss_mask].tolist().count(ours.end_id) == 1
