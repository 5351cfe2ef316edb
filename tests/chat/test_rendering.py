"""Rendering is token-exact: the oracle is `apply_chat_template`, whole and with its own assistant mask."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from subl_jax.chat.messages import assistant, system, tool, user
from subl_jax.chat.rendering import PrefixUnstable, Renderer
from tests.chat import samples
from tests.chat.samples import CONVERSATIONS, TOOLS

# A template of the Qwen/Llama kind: white space behind every end of turn, no generation markers, full tool schemas.
SPACED = """\
{%- if tools %}{{ tools | tojson }}
{% endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% endif -%}
"""
COUNTING = "{{ messages | length }}:" + SPACED
# Like Qwen3 with its thinking: what an assistant said is dropped once a user turn follows.
FORGETFUL = """\
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
<|{{ message.role }}|>{% if message.role != 'assistant' or loop.index0 > last.user %}{{ message.content }}{% endif %}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
ENDLESS = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501
# The user's turn ends, the assistant's does not: an earlier marker must not be taken for its end.
HALF_ENDLESS = """\
{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}{% if message.role != 'assistant' %}<|end|>{% endif %}
{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(samples.tokenizer())


@pytest.fixture(scope="module")
def spaced() -> Renderer:
    return Renderer(samples.with_template(SPACED))


def test_ids_and_mask_equal_those_of_apply_chat_template(renderer):
    rendered = renderer.render([(conversation, TOOLS) for conversation in CONVERSATIONS])
    for conversation, ours in zip(CONVERSATIONS, rendered, strict=True):
        assert (ours.tokens.tolist(), ours.loss_mask.tolist()) == samples.templated(renderer.tokenizer, conversation)


def test_the_mask_covers_exactly_what_the_assistant_wrote_end_included(renderer):
    [ours] = renderer.render([(CONVERSATIONS[0], TOOLS)])
    edges = np.flatnonzero(np.diff(ours.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    written = [renderer.decode(ours.tokens[start:stop].tolist()) for start, stop in edges]
    assert written == [
        '<tool_call>{"name":"list","arguments":{"path":"/notes"}}</tool_call><|end|>',
        '<tool_call>{"name":"read","arguments":{"path":"/notes/plan.txt"}}</tool_call><|end|>',
        "it is 5 long.<|end|>",
    ]


def test_an_empty_answer_still_trains_its_end(renderer):
    [ours] = renderer.render([([user("hello"), assistant("")], TOOLS)])
    assert ours.loss_mask.tolist() == [False] * (len(ours.tokens) - 1) + [True]
    assert ours.tokens[-1] == renderer.end_id


@pytest.mark.parametrize("which", ["renderer", "spaced"])
def test_rendered_ids_decode_to_the_templates_text(which, request):
    renderer = request.getfixturevalue(which)
    for conversation, ours in zip(CONVERSATIONS, renderer.render([(c, TOOLS) for c in CONVERSATIONS]), strict=True):
        text = renderer.tokenizer.apply_chat_template(conversation, tools=TOOLS, tokenize=False)
        # White space behind the last turn's end belongs to no one: an episode is over at its end token.
        assert renderer.decode(ours.tokens.tolist()) == (
            text.rstrip() if conversation[-1]["role"] == "assistant" else text
        )
        assert renderer.text(conversation, TOOLS) == text


@pytest.mark.parametrize("which", ["renderer", "spaced"])
def test_an_episode_turn_by_turn_has_the_ids_of_the_whole_conversation(which, request):
    renderer = request.getfixturevalue(which)
    for conversation in CONVERSATIONS[:3]:
        turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        ids = renderer.opening(conversation[: turns[0]], TOOLS)
        mask = [False] * len(ids)
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            text = renderer.turn_text(conversation[:turn], conversation[turn], TOOLS)
            sampled = renderer.encode(text.rstrip())  # the model stops at the end token
            assert sampled[-1] == renderer.end_id
            ids, mask = ids + sampled, mask + [True] * len(sampled)
            if following is not None:
                added = renderer.continuation(conversation[: turn + 1], conversation[turn + 1 : following], TOOLS)
                ids, mask = ids + added, mask + [False] * len(added)
        [whole] = renderer.render([(conversation, TOOLS)])
        assert whole.tokens.tolist() == ids
        assert whole.loss_mask.tolist() == mask


def test_rendering_together_equals_rendering_alone(renderer):
    lists = [TOOLS, TOOLS[:1], []]
    asked = [(conversation, tools) for conversation in CONVERSATIONS for tools in lists]
    for request, together in zip(asked, renderer.render(asked), strict=True):
        [alone] = renderer.render([request])
        np.testing.assert_array_equal(alone.tokens, together.tokens)
        np.testing.assert_array_equal(alone.loss_mask, together.loss_mask)
    assert renderer.render([]) == []


def test_tools_of_one_name_and_two_descriptions_are_not_mixed_up(spaced):
    conversation = CONVERSATIONS[2]
    asked = [(conversation, [samples.schema("read", description)]) for description in ("reads", "reads a file")]
    for (_, tools), ours in zip(asked, spaced.render(asked), strict=True):
        assert spaced.decode(ours.tokens.tolist()) == spaced.text(conversation, tools).rstrip()


def test_rendering_leaves_the_messages_alone(renderer):
    before = copy.deepcopy(CONVERSATIONS)
    renderer.render([(conversation, TOOLS) for conversation in CONVERSATIONS])
    assert before == CONVERSATIONS


def test_a_template_that_counts_its_messages_is_refused():
    renderer = Renderer(samples.with_template(COUNTING))
    conversation = CONVERSATIONS[0]
    with pytest.raises(PrefixUnstable, match="when turn 2 is added: '2:.* became '3:"):
        renderer.render([(conversation, TOOLS)])
    with pytest.raises(PrefixUnstable, match="when turn 3 is added: '3:.* became '4:"):
        renderer.continuation(conversation[:3], conversation[3:4], TOOLS)
    with pytest.raises(PrefixUnstable, match="when turn 2 is added"):
        renderer.turn_text(conversation[:2], conversation[2], TOOLS)


def test_a_template_that_drops_earlier_turns_is_refused_at_the_turn_that_drops_them():
    renderer = Renderer(samples.with_template(FORGETFUL))
    kept = [
        user("do"),
        assistant("thinking"),
        tool("read", "x"),
        assistant("more"),
        tool("read", "y"),
        assistant("done"),
    ]
    renderer.render([(kept, TOOLS)])  # nothing dropped before a second user turn
    dropped = [*kept, user("thanks"), assistant("welcome")]
    with pytest.raises(PrefixUnstable, match="when turn 6 is added: 'thinking.* became '<\\|end\\|>"):
        renderer.render([(dropped, TOOLS)])
    with pytest.raises(PrefixUnstable, match="when turn 6 is added"):
        renderer.render([(dropped[:-1], TOOLS)])
    with pytest.raises(PrefixUnstable, match="when turn 6 is added"):
        renderer.continuation(kept, [user("thanks")], TOOLS)


@pytest.mark.parametrize("template", [ENDLESS, HALF_ENDLESS])
def test_a_template_whose_assistant_turn_never_ends_is_refused(template):
    renderer = Renderer(samples.with_template(template))
    conversation = [system("s"), user("u"), assistant("a")]
    with pytest.raises(ValueError, match="does not end an assistant turn with the eos token '<\\|end\\|>'"):
        renderer.render([(conversation, TOOLS)])
    with pytest.raises(ValueError, match="does not end an assistant turn"):
        renderer.continuation(conversation, [user("v")], TOOLS)


def test_a_tokenizer_without_eos_is_refused():
    nameless = samples.with_template(SPACED)
    nameless.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        Renderer(nameless)
