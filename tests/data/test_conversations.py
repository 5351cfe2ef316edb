"""A user's own conversations: what is read is what the template writes, and what cannot be trained on is refused by line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax import data
from subl_jax.chat.families import renderer_for
from subl_jax.chat.rendering import Renderer
from subl_jax.data import conversations
from subl_jax.data.conversations import ConversationError
from subl_jax.trajectory import Trajectory
from tests.chat import family_templates, samples
from tests.data import episodes

ASKED: Any = {"role": "user", "content": "hello"}
ANSWERED: Any = {"role": "assistant", "content": "hello."}
TALK = {"messages": [ASKED, ANSWERED]}
CALL = {"type": "function", "function": {"name": "read", "arguments": {"path": "/a", "n": 2}}}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(samples.tokenizer())


def written(directory: Path, *lines: Any) -> Path:
    path = directory / "talk.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_conversations_have_the_templates_own_tokens_and_loss_on_the_assistants_alone(
    renderer: Renderer, tmp_path: Path
) -> None:
    talks = samples.CONVERSATIONS[:3]
    path = written(tmp_path, *({"messages": talk, "tools": samples.TOOLS, "source": "x"} for talk in talks))
    found = conversations.load(path, renderer)
    assert found.dropped == {}
    for talk, item in zip(talks, found.trajectories, strict=True):
        ids, mask = samples.templated(renderer.tokenizer, talk)
        assert item.tokens.tolist() == ids and item.loss_mask.tolist() == mask
    assert [item.task_id for item in found.trajectories] == [f"talk.jsonl:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_familys_conversation_is_its_templates_text(family: str, tmp_path: Path) -> None:
    texts = [message["content"] for talk in samples.CONVERSATIONS for message in talk]
    made: Any = getattr(family_templates, f"{family}_tokenizer")(texts, 700)
    path = written(tmp_path, {"messages": [{"role": "system", "content": "be brief"}, ASKED, ANSWERED]})
    [item] = conversations.load(path, renderer_for(made)).trajectories
    text = made.decode(item.tokens)
    assert made.decode(item.tokens[item.loss_mask]) == "hello." + made.eos_token
    assert text.startswith(
        made.apply_chat_template(
            [{"role": "system", "content": "be brief"}, ASKED], tokenize=False, add_generation_prompt=True,
            enable_thinking=False, date_string="26 Jul 2024",
        )
    )  # fmt: skip


def test_openais_forms_are_read(renderer: Renderer, tmp_path: Path) -> None:
    """Arguments as text, content as parts or null, results that name their call by id, roles of other names."""
    openai = [
        {"role": "developer", "content": "you work with files."},
        {"role": "user", "content": [{"type": "text", "text": "read "}, {"type": "text", "text": "both."}], "name": "me"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"path": "/a", "n": 2}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "ab cd"},
        {"role": "assistant", "content": "done."},
    ]  # fmt: skip
    ours = [
        {"role": "system", "content": "you work with files."},
        {"role": "user", "content": "read both."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "read", "content": "ab cd"},
        {"role": "assistant", "content": "done."},
    ]
    one, other = (
        conversations.load(written(tmp_path, {"messages": talk, "tools": json.dumps(samples.TOOLS)}), renderer)
        for talk in (openai, ours)
    )
    [first], [second] = one.trajectories, other.trajectories
    assert first.messages == second.messages == ours
    assert first.tokens.tolist() == second.tokens.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "talk.jsonl:2: not a JSON object"),
        ("[1, 2]", "talk.jsonl:2: a JSON list where an object is needed"),
        ({"text": "hello"}, "talk.jsonl:2: no \"messages\" (the line has 'text')"),
        ({"messages": "hello"}, 'talk.jsonl:2: "messages" must be a list of objects'),
        ({"messages": [ASKED]}, "talk.jsonl:2: no assistant turn"),
        ({"messages": [{**ASKED, "role": "human"}, ANSWERED]}, "talk.jsonl:2, turn 1: the role 'human' is none of"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "talk.jsonl:2, turn 1: the content is NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]},
            "turn 1: a part of type 'image_url' in its content; only text",
        ),
        ({"messages": [ASKED, {**ANSWERED, "reasoning_content": "hm"}]}, "turn 2: 'reasoning_content' has no place"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, "turn 2: 'weight' has no place"),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}, ANSWERED]}, "turn 1: only an assistant's turn can call tools"),
        (
            {"messages": [ASKED, {**ANSWERED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "turn 2: the arguments of f are no JSON",
        ),
        ({"messages": [ASKED, {"role": "tool", "content": "x"}, ANSWERED]}, "turn 2: a tool's result that no call"),
        ({**TALK, "tools": [{"name": "f"}]}, 'talk.jsonl:2: "tools" must be a list of'),
        ({"messages": [ASKED, {**ANSWERED, "content": "\ud800"}]}, "talk.jsonl:2: the chat template refuses it"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number_and_the_reason(
    line: Any, message: str, renderer: Renderer, tmp_path: Path
) -> None:
    with pytest.raises(ConversationError) as caught:
        conversations.load(written(tmp_path, TALK, line), renderer)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_empty_is_refused(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="cannot read .*No such file"):
        conversations.load(tmp_path / "none.jsonl", renderer)
    with pytest.raises(ConversationError, match="holds no conversation to train on .the file is empty"):
        conversations.load(written(tmp_path, "", ""), renderer)


def test_a_conversation_longer_than_a_row_is_refused_or_left_out_and_counted(
    renderer: Renderer, tmp_path: Path
) -> None:
    long = {"messages": [{**ASKED, "content": "hello " * 30}, ANSWERED]}
    path = written(tmp_path, TALK, long, TALK)
    with pytest.raises(ConversationError, match=r"talk.jsonl:2 has \d+ tokens and a row holds 20"):
        conversations.load(path, renderer, row_tokens=20)
    found = conversations.load(path, renderer, row_tokens=20, drop_long=True)
    assert [item.task_id for item in found.trajectories] == ["talk.jsonl:1", "talk.jsonl:3"]
    assert found.dropped == {"longer than 20 tokens": 1}


# --- Our own trajectories ---------------------------------------------------------------------------------------------


def rollouts(renderer: Renderer) -> list[Trajectory]:
    """As a rollout leaves them: finished, cut off, and failed ones."""
    rendered = renderer.render([(talk, samples.TOOLS) for talk in samples.CONVERSATIONS[:3]])
    found = [
        Trajectory(
            index, f"safe/{index}", 0, each.tokens, each.loss_mask, np.zeros(len(each.tokens), np.float32), talk,
            samples.TOOLS, "final", index == 0,
        )
        for index, (talk, each) in enumerate(zip(samples.CONVERSATIONS, rendered, strict=False))
    ]  # fmt: skip
    # The turn "hello" in letters, as no tokenizer would write it, and cut off.
    letters = [renderer.encode(letter)[0] for letter in "hello"]
    opening = renderer.opening(samples.CONVERSATIONS[2][:1], samples.TOOLS)
    cut: Any = [*samples.CONVERSATIONS[2][:1], {"role": "assistant", "content": "hello", "unparseable": True}]
    found.append(
        dataclasses.replace(
            found[2], episode=3, tokens=np.asarray(opening + letters, np.int32), messages=cut, status="truncated",
            loss_mask=np.asarray([False] * len(opening) + [True] * 5), logprobs=np.zeros(len(opening) + 5, np.float32),
        )
    )  # fmt: skip
    return [*found, episodes.failed(4, "tool_error", "no world")]


def test_a_dataset_of_the_same_tokenizer_keeps_its_tokens_as_they_were_sampled(
    renderer: Renderer, tmp_path: Path
) -> None:
    written_ones = rollouts(renderer)
    data.write(tmp_path / "dataset", written_ones, metadata={})
    found = conversations.load(tmp_path / "dataset", renderer)
    assert found.dropped == {"failed in their environment": 1}
    assert [item.tokens.tolist() for item in found.trajectories] == [item.tokens.tolist() for item in written_ones[:4]]


def test_a_dataset_of_another_tokenizer_is_rendered_anew_without_what_broke_off(
    renderer: Renderer, tmp_path: Path
) -> None:
    data.write(tmp_path / "dataset", rollouts(renderer), metadata={})
    texts = [message["content"] for talk in samples.CONVERSATIONS for message in talk]
    other = renderer_for(family_templates.qwen_tokenizer(texts, 700))
    found = conversations.load(tmp_path / "dataset", other)
    assert found.dropped == {"failed in their environment": 1, "cut off or unparseable": 1}
    wanted = other.render([(talk, samples.TOOLS) for talk in samples.CONVERSATIONS[:3]])
    assert [item.tokens.tolist() for item in found.trajectories] == [each.tokens.tolist() for each in wanted]


def test_the_exported_json_lines_of_a_dataset_are_its_trajectories(renderer: Renderer, tmp_path: Path) -> None:
    kept = rollouts(renderer)
    data.write(tmp_path / "dataset", kept, metadata={})
    found = conversations.load(tmp_path / "dataset" / "trajectories.jsonl", renderer)
    assert found.dropped == {"cut off or unparseable": 1, "failed in their environment": 1}
    for item, before in zip(found.trajectories, kept[:3], strict=True):
        assert item.tokens.tolist() == before.tokens.tolist() and item.done == before.done
        assert item.loss_mask.tolist() == before.loss_mask.tolist() and item.messages == before.messages


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_a_text_several_texts_or_a_conversation_up_to_the_user(tmp_path: Path) -> None:
    system: Any = {"role": "system", "content": "be brief"}
    path = written(
        tmp_path,
        {"prompt": "one", "id": 7},
        {"prompt": ["first", "then"]},
        {"messages": [system, ASKED, ANSWERED, ASKED]},
    )
    assert conversations.read_prompts(path) == [
        conversations.Prompt("talk.jsonl:1", [{"role": "user", "content": "one"}]),
        conversations.Prompt("talk.jsonl:2", [{"role": "user", "content": "first"}], ("then",)),
        conversations.Prompt("talk.jsonl:3", [system, ASKED, ANSWERED, ASKED]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": " "}, '"prompt" must be a text or a list of texts'),
        ({"prompt": ["a", 1]}, '"prompt" must be a text or a list of texts'),
        (TALK, "the last turn is assistant's, a prompt ends with the user's"),
        ({"question": "x"}, "the line has 'question'"),
        ({"prompt": "a", "tools": samples.TOOLS}, "nothing here executes their calls"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(line: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="talk.jsonl:2") as caught:
        conversations.read_prompts(written(tmp_path, {"prompt": "a"}, line))
    assert message in str(caught.value)
