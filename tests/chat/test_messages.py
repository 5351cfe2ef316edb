"""Messages are plain JSON, and calls survive the way into a message and back."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.chat.messages import ToolCall, assistant, calls_of, system, tool, user

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(st.builds(ToolCall, st.text(), st.dictionaries(st.text(), values, max_size=3)), max_size=3)


@settings(deadline=None, max_examples=50)
@given(st.text(), calls)
def test_calls_survive_the_message_and_its_json(content, calls):
    message = assistant(content, calls)
    assert message["content"] == content
    assert list(calls_of(message)) == calls
    assert list(calls_of(json.loads(json.dumps(message)))) == calls


def test_a_turn_without_calls_carries_no_empty_list():
    assert assistant("done") == {"role": "assistant", "content": "done"}
    assert calls_of(assistant("done")) == calls_of(user("do")) == ()


def test_a_call_is_written_as_openai_does():
    message = assistant("", [ToolCall("read", {"path": "/a"})])
    assert message.get("tool_calls") == [
        {"type": "function", "function": {"name": "read", "arguments": {"path": "/a"}}}
    ]


def test_every_role_has_its_maker():
    made = [system("a"), user("b"), assistant("c"), tool("read", "d")]
    assert [message["role"] for message in made] == ["system", "user", "assistant", "tool"]
    assert [message["content"] for message in made] == ["a", "b", "c", "d"]
    assert made[3].get("name") == "read"


def test_a_message_does_not_share_the_arguments_it_was_made_from():
    arguments = {"path": "/a"}
    message = assistant("", [ToolCall("read", arguments)])
    arguments["path"] = "/b"
    assert calls_of(message)[0].arguments == {"path": "/a"}
