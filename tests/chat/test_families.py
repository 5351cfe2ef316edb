"""Families rendered incrementally write what their templates write; the oracle is `apply_chat_template` with a fixed date."""

from __future__ import annotations

import datetime
import functools
import inspect
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import LLAMA, FamilyRenderer, FormatMismatch, renderer_for
from subl_jax.chat.markers import Markers
from subl_jax.chat.messages import Message, ToolCall, assistant, system, tool, user
from subl_jax.chat.rendering import PrefixUnstable, Renderer
from tests.chat import family_templates, samples
from tests.chat.samples import TOOLS
from tests.chat.test_rendering import FORGETFUL

TEXTS = [message["content"] for messages in samples.CONVERSATIONS for message in messages]
MAKERS = {
    "llama31": functools.partial(family_templates.llama_tokenizer, compact=False),
    "llama32": functools.partial(family_templates.llama_tokenizer, compact=False, version="3.2"),
    "llama": family_templates.llama_tokenizer,
    "qwen25": functools.partial(family_templates.qwen_tokenizer, compact=False, version="2.5"),
    "qwen3": functools.partial(family_templates.qwen_tokenizer, compact=False),
    "qwen25_compact": functools.partial(family_templates.qwen_tokenizer, version="2.5"),
    "qwen3_compact": family_templates.qwen_tokenizer,
}
THOUGHT = "<think>\n\n</think>\n\n"


def fresh(which: str) -> Any:
    return MAKERS[which](TEXTS, 480)


@functools.cache
def renderer(which: str) -> Renderer:
    return renderer_for(fresh(which))


def templated(which: str, conversation: list[Message], tools: list, open_turn: bool = False) -> str:
    """The template's text; in Qwen 3 with the empty thought in every assistant turn, as an episode has it."""
    text = renderer(which).tokenizer.apply_chat_template(
        conversation,  # type: ignore[arg-type]
        tools=tools or None,
        tokenize=False,
        add_generation_prompt=open_turn,
        date_string="26 Jul 2024",
        enable_thinking=False,
    )
    assert isinstance(text, str)
    if "qwen3" in which:
        start = "<|im_start|>assistant\n"
        text = re.sub(re.escape(start) + f"(?:{re.escape(THOUGHT)})?", start + THOUGHT, text)
    return text


# --- Conversations ------------------------------------------------------------------------------------------------------

# Markers have tests of their own; hypothesis finds them in the source.
texts = st.text(max_size=12).filter(lambda text: not re.search("<[|/a-z]", text)) | st.sampled_from(
    ["", " two\n", 'say "é → “b”" \\', "\n\n{}", "12345 x", "DELETE it's", "e\u0301", "< /", "\U0010ffff"]
)
# Next to the prompt's line break the tokenizer would join white space that an episode holds apart.
spoken = texts.map(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
names = st.text("abcdefgh_", min_size=1, max_size=8)
calls = st.builds(ToolCall, names, st.dictionaries(texts, values, max_size=2))


def drawn_conversation(data: st.DataObject, which: str) -> list[Message]:
    """An episode or a chat; several calls in a turn and text beside them only where the family has them.

    No strategy itself: the type checker behind the makers of messages draws random numbers.
    """
    draw, several = data.draw, "qwen" in which
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    messages.append(user(draw(texts)))
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            made = draw(st.lists(calls, min_size=1, max_size=3 if several else 1))
            messages.append(assistant(draw(spoken) if several else "", made))
            messages += [tool(call.name, draw(texts)) for call in made] + [tool("x", draw(texts))] * draw(
                st.integers(0, 1)
            )
        else:
            messages.append(assistant(draw(spoken)))
            if draw(st.booleans()):
                messages.append((user if draw(st.booleans()) else system)(draw(texts)))
    return messages


tool_lists = st.sampled_from([[], TOOLS, TOOLS[:1]])
EVERY = pytest.mark.parametrize("which", MAKERS)
often = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def mask_by_scanning(ours: Renderer, ids: list[int], prompt: str) -> list[bool]:
    """True behind every generation prompt up to the end of that turn."""
    opened, mask, index = ours.encode(prompt), [False] * len(ids), 0
    while index < len(ids):
        if ids[index : index + len(opened)] != opened:
            index += 1
            continue
        stop = ids.index(ours.end_id, index)
        index += len(opened)
        mask[index : stop + 1] = [True] * (stop + 1 - index)
    return mask


# --- The template is the oracle -----------------------------------------------------------------------------------------


@EVERY
@often
@given(data=st.data())
def test_rendered_ids_and_mask_are_those_of_the_template(which, data):
    conversation, tools = drawn_conversation(data, which), data.draw(tool_lists)
    ours = renderer(which)
    text = templated(which, conversation, tools)
    assert ours.text(conversation, tools) == text
    if conversation[-1]["role"] == "assistant":
        text = text.removesuffix("\n")  # the episode is over at its end token
    [rendered] = ours.render([(conversation, tools)])
    assert rendered.tokens.tolist() == ours.tokenizer.encode(text, add_special_tokens=False)
    prompt = ours.family.prompt  # type: ignore[attr-defined]
    assert templated(which, conversation, tools, open_turn=True).endswith(prompt)
    assert rendered.loss_mask.tolist() == mask_by_scanning(ours, rendered.tokens.tolist(), prompt)
    assert ours.opening(conversation, tools) == ours.encode(templated(which, conversation, tools, open_turn=True))


@EVERY
@often
@given(data=st.data())
def test_an_episode_turn_by_turn_has_the_ids_of_the_whole_and_each_prefix_begins_it(which, data):
    conversation, tools = drawn_conversation(data, which), data.draw(tool_lists)
    ours = renderer(which)
    [whole] = ours.render([(conversation, tools)])
    turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if not turns:
        return
    ids = ours.opening(conversation[: turns[0]], tools)
    mask = [False] * len(ids)
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        assert ids == ours.opening(conversation[:turn], tools)
        sampled = ours.encode(ours.turn_text(conversation[:turn], conversation[turn], tools))
        assert sampled[-1] == ours.end_id and sampled.count(ours.end_id) == 1
        ids, mask = ids + sampled, mask + [True] * len(sampled)
        [so_far] = ours.render([(conversation[: turn + 1], tools)])
        assert so_far.tokens.tolist() == ids and so_far.loss_mask.tolist() == mask
        if following is not None:
            added = ours.continuation(conversation[: turn + 1], conversation[turn + 1 : following], tools)
            ids, mask = ids + added, mask + [False] * len(added)
    assert whole.tokens.tolist()[: len(ids)] == ids
    assert whole.loss_mask.tolist() == mask + [False] * (len(whole.tokens) - len(ids))


@EVERY
def test_rendering_together_equals_rendering_alone(which):
    talks = [*samples.CONVERSATIONS[::2], samples.CONVERSATIONS[3], [user("a <|im_end|><|eot_id|>"), assistant("b")]]
    asked = [(talk, tools) for talk in talks for tools in (TOOLS, [], TOOLS[:1])]
    ours = renderer(which)
    for request, together in zip(asked, ours.render(asked), strict=True):
        [alone] = ours.render([request])
        np.testing.assert_array_equal(alone.tokens, together.tokens)
        np.testing.assert_array_equal(alone.loss_mask, together.loss_mask)
    assert ours.render([]) == []


def test_an_episode_keeps_the_empty_thought_that_the_template_drops_from_earlier_turns():
    talk = [user("a"), assistant("b"), user("c"), assistant("d")]
    ours = renderer("qwen3")
    theirs = ours.tokenizer.apply_chat_template(talk, tokenize=False)  # type: ignore[arg-type]
    [rendered] = ours.render([(talk, [])])
    assert str(theirs).count(THOUGHT) == 1
    assert ours.decode(rendered.tokens.tolist()).count(THOUGHT) == 2
    written = ours.decode(rendered.tokens[rendered.loss_mask].tolist())
    assert written == "b<|im_end|>d<|im_end|>"  # the thought is the prompt's


def test_line_breaks_before_a_last_turns_text_are_the_empty_thoughts():
    for which in ("qwen3", "qwen25"):
        for turn in (assistant("\n\nb "), assistant("\nb", [ToolCall("read", {})])):
            assert renderer(which).text([user("a"), turn], []) == templated(which, [user("a"), turn], [])


def test_the_text_of_a_system_turn_with_tools_begins_every_such_conversation():
    for which in MAKERS:
        ours = renderer(which)
        start = ours.text([system("work.")], TOOLS)
        assert "work." in start and "answer" in start
        for question in ("x", "answer", "\n"):
            assert ours.decode(ours.opening([system("work."), user(question)], TOOLS)).startswith(start)


# --- The date -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["llama31", "llama32"])
def test_the_day_of_rendering_is_nowhere_in_the_ids(which, monkeypatch):
    ids = []
    for day in (3, 17):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        ours = renderer_for(fresh(which))
        [rendered] = ours.render([(samples.CONVERSATIONS[0], TOOLS)])
        ids.append((rendered.tokens.tolist(), ours.opening([user("x")], [])))
        bare = ours.tokenizer.apply_chat_template([user("x")], tokenize=False)  # type: ignore[arg-type,list-item]
        assert (f"{day:02} Jan 2031" in str(bare)) == (which == "llama32")
    assert ids[0] == ids[1]
    assert "Today Date: 26 Jul 2024\n" in renderer(which).decode(ids[0][0])


def test_a_template_that_insists_on_today_is_refused():
    for which, template in (
        ("llama", family_templates.llama_template(version="3.2").replace("date_string is not defined", "true")),
        (
            "qwen25",
            "{{ strftime_now('%d %B') }}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}",
        ),
    ):
        tokenizer = fresh(which)
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="writes today's date.*takes no date_string"):
            renderer_for(tokenizer)


# --- Text that spells markers -------------------------------------------------------------------------------------------


def planted(text: str) -> list[Message]:
    return [
        system("s"),
        user(f"a {text} b"),
        assistant("", [ToolCall("read", {"path": text, text: [1]})]),
        tool("read", f"{text}\n{text}"),
        assistant(f"said {text}"),
        user(text),
        assistant("end"),
    ]


@EVERY
def test_markers_spelled_by_users_tools_and_arguments_never_become_tokens(which):
    ours = renderer(which)
    added = {index: token.content for index, token in ours.tokenizer.added_tokens_decoder.items()}
    spelled = " ".join(added.values())
    [plain], [attack] = ours.render([(planted("x"), TOOLS)]), ours.render([(planted(spelled), TOOLS)])
    assert [i for i in attack.tokens.tolist() if i in added] == [i for i in plain.tokens.tolist() if i in added]
    assert ours.decode(attack.tokens.tolist()) == ours.text(planted(spelled), TOOLS).rstrip("\n")
    assert spelled in ours.decode(attack.tokens.tolist())
    # Turn by turn it is no other: the same ids, and a result brings one end of turn, its own.
    talk = planted(spelled)
    ids = ours.opening(talk[:4], TOOLS)
    assert ids == attack.tokens.tolist()[: len(ids)]
    result = ours.continuation(talk[:3], talk[3:4], TOOLS)
    assert result.count(ours.end_id) == 1
    assert ours.decode(result).count(spelled) == 2


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    reason="this transformers cannot sanitize",
)
@EVERY
def test_hidden_markers_are_encoded_as_transformers_sanitizes_them(which):
    ours, text = renderer(which), "<|im_end|>|<|eot_id|><tool_response> é"
    talk = [user(f"a {text} b"), assistant("", [ToolCall("read", {"path": [text]})]), tool("read", text), user(text)]
    # Turns behind the first hold no thought in theirs.
    for messages in [talk[:1], talk] if "qwen3" not in which else [talk[:1]]:
        theirs: Any = ours.tokenizer.apply_chat_template(
            messages,  # type: ignore[arg-type]
            tools=TOOLS,  # type: ignore[arg-type]
            add_generation_prompt=True,
            date_string="26 Jul 2024",
            enable_thinking=False,
            sanitize_control_tokens=True,
        )
        assert ours.opening(messages, TOOLS) == theirs["input_ids"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["<|eot_id|>", "<|eot", "_id|>", "\U0010ffff", "\U000f0000", "\U000f0003", "é", " a"])))
def test_whatever_is_hidden_reads_the_same_and_holds_no_marker(pieces):
    tokenizer, text = renderer("llama").tokenizer, "".join(pieces)
    markers = Markers(tokenizer)
    hidden = markers.hide(text)
    assert "<|eot_id|>" not in hidden and markers.show(hidden) == text
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|start_header_id|>", "<|eot_id|>"))
    [ids] = markers.encode([f"<|start_header_id|>{hidden}<|eot_id|>"])
    assert (ids[0], ids[-1]) == (start, end)
    assert not set(ids[1:-1]) & set(tokenizer.added_tokens_decoder)
    assert tokenizer.decode(ids[1:-1]) == text
    # Beside a hidden text the markers that are not are found as the tokenizer finds them.
    [beside] = markers.encode([f"<|start_header_id|>a<|eot_id|>{markers.hide('<|eot_id|>')}"])
    assert beside[:3] == tokenizer.encode("<|start_header_id|>a<|eot_id|>", add_special_tokens=False)


def test_of_two_markers_that_begin_alike_the_longer_is_found():
    tokenizer = fresh("llama")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<|eot_id|>s", "<|eot")])
    markers = Markers(tokenizer)
    text = "<|eot_id|>s <|eot_id|> <|eot "
    [ids] = markers.encode([text + markers.hide("<|eot_id|>")])
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert ids[: len(whole) - 1] == whole[:-1]
    assert markers.show(markers.hide(text)) == text


def test_a_system_turn_is_encoded_as_the_tokenizer_does():
    ours = renderer("qwen25")
    ids = ours.opening([system("use <tool_call> marks"), user("x")], [])
    assert ours.encode("<tool_call>")[0] in ids


def test_a_tokenizer_without_a_fast_one_behind_it_is_refused():
    with pytest.raises(ValueError, match="PreTrainedTokenizerBase has no fast tokenizer behind it.*add tokenizer.json"):
        Markers(PreTrainedTokenizerBase())


# --- What a family cannot hold ------------------------------------------------------------------------------------------


def test_llama_refuses_two_calls_in_a_turn_and_text_beside_a_call():
    two = [ToolCall("read", {}), ToolCall("list", {})]
    for messages, error in (
        ([user("x"), assistant("", two)], "one tool call in a turn and this turn has 2 .read, list.; give each call"),
        ([user("x"), assistant("look", two[:1])], "no place for text beside a tool call and would drop 'look'"),
    ):
        with pytest.raises(ValueError, match=error):
            renderer("llama").render([(messages, TOOLS)])
        with pytest.raises(ValueError, match=error):
            renderer("llama").turn_text(messages[:1], messages[1], TOOLS)


@EVERY
def test_misplaced_turns_are_refused(which):
    ours = renderer(which)
    with pytest.raises(ValueError, match="must begin with a system or user turn"):
        ours.render([([assistant("x")], [])])
    for messages, added in (([user("x")], [tool("a", "b")]), ([user("x"), assistant("y")], [assistant("z")]), ([], [])):
        with pytest.raises(ValueError, match="a continuation follows an assistant turn"):
            ours.continuation(messages, added, [])


# --- Which renderer -----------------------------------------------------------------------------------------------------


@EVERY
def test_a_saved_folder_is_loaded_and_recognised_whatever_config_lies_beside_it(which, tmp_path):
    ours = fresh(which)
    ours.save_pretrained(tmp_path)
    asked = [(samples.CONVERSATIONS[0], TOOLS)]
    # As in real folders: the model's config beside the tokenizer, and the class that the hub's file names.
    kind, tokenizer_class = ("llama", "PreTrainedTokenizerFast") if "llama" in which else ("qwen2", "Qwen2Tokenizer")
    for beside in (False, True):
        if beside:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
            path = tmp_path / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
        loaded = renderer_for(tokenizers.load(tmp_path))
        assert isinstance(loaded, FamilyRenderer)
        assert loaded.family == renderer(which).family  # type: ignore[attr-defined]
        assert loaded.end_id == ours.convert_tokens_to_ids("<|eot_id|>" if "llama" in which else "<|im_end|>")
        assert loaded.tokenizer.pad_token_id not in (None, loaded.end_id)
        assert loaded.render(asked)[0].tokens.tolist() == renderer(which).render(asked)[0].tokens.tolist()
        assert tokenizers.fingerprint(loaded.tokenizer) == tokenizers.fingerprint(ours)


def test_the_embedded_tokenizer_keeps_the_generic_renderer():
    assert type(renderer_for(samples.tokenizer())) is Renderer


def test_an_unstable_template_of_no_family_is_still_refused_with_its_turn():
    ours = renderer_for(samples.with_template(FORGETFUL))
    with pytest.raises(PrefixUnstable, match="when turn 2 is added: 'thought.* became '<\\|end\\|>"):
        ours.render([([user("a"), assistant("thought"), user("b"), assistant("c")], TOOLS)])


# What is altered -> (whose template, the text replaced, by what, what the error shows of the template's writing).
ALTERED = {
    "another role for results": (
        "llama31",
        "{{- '<|start_header_id|>ipython",
        "{{- '<|start_header_id|>tool",
        ">tool<",
    ),
    "results unquoted": ("llama31", "message.content is iterable", "false", '>\\n\\n a "b"'),
    "other spaces in a call": ("llama31", '"parameters": \' }}', '"parameters":\' }}', '"parameters":{'),
    "texts not trimmed": ("llama", " + message.content | trim", " + message.content", ">\\n\\n three"),
    "results apart": ("qwen25", "loop.previtem.role != 'tool'", "true", "</tool_response><|im_start|>user"),
    "results on one line": ("qwen3", "\\n<tool_response>\\n", "\\n<tool_response>", "<tool_response> a "),
    "no line break behind an end": ("qwen25_compact", "<|im_end|>\\n", "<|im_end|>", "<|im_end|><|im_start|>"),
    "a thought left open": (
        "qwen3",
        "'<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        "'<think>\\n' }}{% endif %}",
        "<think>\\n'",
    ),
    "thinking never off": ("qwen3", "enable_thinking is false", "enable_thinking is none", "<|im_start|>assistant\\n'"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_template_in_a_familys_name_with_another_format_is_refused_and_shown(what):
    which, before, after, shown = ALTERED[what]
    tokenizer = fresh(which)
    assert before in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(before, after)
    name = renderer(which).family.name  # type: ignore[attr-defined]
    with pytest.raises(FormatMismatch) as raised:
        renderer_for(tokenizer)
    writes, has = re.search(
        f"bears the marks of {name} but writes (.*) where this family's format has (.*);", raised.value.args[0]
    ).groups()  # type: ignore[union-attr]  # noqa: E501
    assert shown in writes and shown not in has


def test_a_template_that_fails_on_a_probe_is_refused_with_its_own_words():
    tokenizer = fresh("qwen25")
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}" + tokenizer.chat_template
    with pytest.raises(FormatMismatch, match="fails on a conversation that this family can hold: no system turns here"):
        renderer_for(tokenizer)


@pytest.mark.parametrize(("which", "other"), [("llama", "<|end_of_text|>"), ("qwen25", "<|endoftext|>")])
def test_a_base_models_eos_is_refused_with_the_remedy(which, other):
    tokenizer = fresh(which)
    tokenizer.eos_token = other
    with pytest.raises(
        ValueError, match="does not end an assistant turn with the eos token.*set the tokenizer's eos_token"
    ):
        renderer_for(tokenizer)


def test_a_familys_template_on_a_tokenizer_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="Llama 3 family, but '<|start_header_id|>' is no token of this tokenizer"):
        renderer_for(samples.with_template(family_templates.llama_template()))
    assert all(marker in family_templates.LLAMA_SPECIAL for marker in LLAMA.markers)
