"""A user's own conversations and prompts: JSON Lines in OpenAI's style, or one of our datasets, as documents to train on.

A file and the renderer of a tokenizer come in; trajectories with token ids and assistant-only loss masks come out, rendered
token by token as an episode would have been. A line that cannot be trained on as it stands is refused with its number and
the reason; nothing is guessed, and nothing is left out without being counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jinja2
import numpy as np

from subl_jax.chat.messages import Message, ToolSchema, user
from subl_jax.chat.rendering import Renderer
from subl_jax.data import openai
from subl_jax.data.dataset import open_source
from subl_jax.data.openai import ConversationError
from subl_jax.trajectory import FAILED, Status, Trajectory

# Conversations of a dataset whose beginnings tell whose tokens they are.
_PROBED = 64
# An answer that was cut off, or is no well-formed turn: as text it would teach to end where it breaks off.
_BROKEN: tuple[Status, ...] = ("truncated", "unparseable")
# What a template raises at a conversation that it cannot hold.
_REFUSALS = (ValueError, TypeError, RecursionError, jinja2.TemplateError)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One conversation as it was read.

    Attributes:
      name: file and line, for errors and as the document's task id.
      messages, tools: as the chat renderer takes them.
      status, done: of an exported trajectory; "final" and true for any other.
    """

    name: str
    messages: list[Message]
    tools: list[ToolSchema]
    status: Status = "final"
    done: bool = True


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a teacher is to answer.

    Attributes:
      name: file and line.
      messages: the conversation up to the user turn that is answered first.
      later: user turns that follow, each behind the answer to the one before.
    """

    name: str
    messages: list[Message]
    later: tuple[str, ...] = ()


class Documents(NamedTuple):
    """Trajectories, and how many conversations were left out, by reason."""

    trajectories: list[Trajectory]
    dropped: dict[str, int]


# --- Files ------------------------------------------------------------------------------------------------------------


def load(path: Path, renderer: Renderer, *, row_tokens: int = 0, drop_long: bool = False) -> Documents:
    """Conversations from a JSON Lines file, or from the directory of a trajectory dataset.

    A dataset's tokens are taken as they were sampled if they are this renderer's; otherwise its messages are rendered
    anew, without the episodes that broke off.

    Args:
      path: the file or directory.
      renderer: of the tokenizer that the documents are for.
      row_tokens: the longest document; 0: any.
      drop_long: leave longer ones out, instead of refusing them.

    Raises:
      ConversationError: a malformed line, a conversation without an assistant's turn, one that is too long or that the
        template refuses, or none at all.
      DatasetError: a damaged dataset.
    """
    path = Path(path)
    if path.is_dir():
        found, dropped = _dataset(path, renderer)
    else:
        found, dropped = _usable(read_conversations(path), renderer)
    return fitting(found, dropped, row_tokens=row_tokens, drop_long=drop_long, where=str(path))


def fitting(
    found: Sequence[Trajectory], dropped: Mapping[str, int], *, row_tokens: int, drop_long: bool, where: str
) -> Documents:
    """The trajectories that fit into a row, and how many were left out; see `load`.

    Args:
      found: trajectories; dropped: what was left out before.
      row_tokens, drop_long: see `load`.
      where: they come from, for the error.
    """
    kept = [item for item in found if not row_tokens or len(item.tokens) <= row_tokens]
    long = next((item for item in found if row_tokens and len(item.tokens) > row_tokens), None)
    counts = dict(dropped)
    if long is not None:
        if not drop_long:
            raise ConversationError(
                f"{long.task_id} has {len(long.tokens)} tokens and a row holds {row_tokens}; raise "
                "--config.train.row_tokens, or leave out what is longer with --drop_long"
            )
        counts[f"longer than {row_tokens} tokens"] = len(found) - len(kept)
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "the file is empty"
        raise ConversationError(f"{where} holds no conversation to train on ({why})")
    return Documents(kept, counts)


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a JSON Lines file: `{"messages": [...], "tools": [...]}`; other keys are not looked at.

    Raises:
      ConversationError: see `load`.
    """
    found = []
    for name, record in openai.lines(path):
        if "messages" not in record:
            raise ConversationError(
                f'{name}: no "messages" (the line has {openai.keys(record)}); a conversation is '
                '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
            )
        status = record.get("status", "final")
        if status not in get_args(Status):
            status = "final"  # a field of the user's own
        messages = openai.messages(name, record["messages"])
        if status not in FAILED and not any(message["role"] == "assistant" for message in messages):
            raise ConversationError(f"{name}: no assistant turn, so there is nothing to learn from; remove the line")
        done = record.get("done", True)
        tools = openai.tools(name, record.get("tools"))
        found.append(Conversation(name, messages, tools, status, done if isinstance(done, bool) else True))
    return found


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file.

    A line is `{"prompt": "…"}`; `{"prompt": ["…", "…"]}`, whose texts are asked one after the other; or
    `{"messages": [...]}` up to a user turn.

    Raises:
      ConversationError: a malformed line, tools (nothing here would execute their calls), or no prompt at all.
    """
    found = []
    for name, record in openai.lines(path):
        if record.get("tools"):
            raise ConversationError(
                f"{name}: tools are shown, but nothing here executes their calls; leave them out, or give whole "
                "conversations with --data"
            )
        if ("prompt" in record) == ("messages" in record):
            raise ConversationError(
                f'{name}: a prompt is {{"prompt": "…"}} or {{"messages": [… {{"role": "user", …}}]}}; the line has '
                f"{openai.keys(record)}"
            )
        if "prompt" in record:
            texts = record["prompt"] if isinstance(record["prompt"], list) else [record["prompt"]]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ConversationError(f'{name}: "prompt" must be a text or a list of texts, none of them empty')
            found.append(Prompt(name, [user(texts[0])], tuple(texts[1:])))
            continue
        messages = openai.messages(name, record["messages"])
        if not messages or messages[-1]["role"] != "user":
            last = messages[-1]["role"] if messages else "no"
            raise ConversationError(
                f"{name}: the last turn is {last}'s, a prompt ends with the user's; for whole conversations use --data"
            )
        found.append(Prompt(name, messages))
    if not found:
        raise ConversationError(f"{path} holds no prompt")
    return found


# --- Rendering --------------------------------------------------------------------------------------------------------


def render(conversations: Sequence[Conversation], renderer: Renderer) -> list[Trajectory]:
    """Conversations as trajectories, one each; loss on what the assistant says, its end of turn included.

    Raises:
      ConversationError: the template refuses a conversation, or no token of it is the assistant's; it is named.
    """
    try:
        rendered = renderer.render([(each.messages, each.tools) for each in conversations])
    except _REFUSALS:
        for each in conversations:  # which one?
            try:
                renderer.render([(each.messages, each.tools)])
            except _REFUSALS as error:
                raise ConversationError(f"{each.name}: the chat template refuses it: {error}") from error
        raise
    found = []
    for index, (each, ids) in enumerate(zip(conversations, rendered, strict=True)):
        if not ids.loss_mask.any() or ids.loss_mask[0]:
            whose = "its first token is" if ids.loss_mask.any() else "none of its tokens are"
            raise ConversationError(
                f"{each.name}: {whose} the assistant's; a conversation begins with a system or user turn, and the assistant "
                "answers"
            )
        silent = np.zeros(len(ids.tokens), np.float32)
        found.append(
            Trajectory(
                index,
                each.name,
                0,
                ids.tokens,
                ids.loss_mask,
                silent,
                each.messages,
                each.tools,
                each.status,
                each.done,
            )
        )
    return found


def _usable(conversations: Sequence[Conversation], renderer: Renderer) -> tuple[list[Trajectory], dict[str, int]]:
    """Renders what did not fail or break off, and counts the rest."""
    why = [_unfit(each.status, each.messages) for each in conversations]
    kept = [each for each, reason in zip(conversations, why, strict=True) if reason is None]
    return render(kept, renderer) if kept else [], dict(Counter(reason for reason in why if reason is not None))


def _unfit(status: Status, messages: Sequence[Message]) -> str | None:
    """Why an episode cannot be rendered anew from its messages, or None."""
    if status in FAILED:
        return "failed in their environment"
    if status in _BROKEN or any(message.get("unparseable") for message in messages):
        return "cut off or unparseable"
    return None if any(message["role"] == "assistant" for message in messages) else "without an assistant's turn"


def rendered_for(
    trajectories: Sequence[Trajectory], renderer: Renderer, *, exact: bool
) -> tuple[list[Trajectory], dict[str, int]]:
    """Trajectories for a renderer: as they were sampled where their tokens are its own, rendered anew otherwise.

    Returns:
      Those with something to learn from, and how many were left out, by reason.
    """
    if exact:
        silent = [item for item in trajectories if not item.loss_mask.any()]
        dropped = Counter("failed in their environment" if item.status in FAILED else "empty" for item in silent)
        return [item for item in trajectories if item.loss_mask.any()], dict(dropped)
    conversations = [
        Conversation(item.task_id, item.messages, item.tools, item.status, item.done) for item in trajectories
    ]
    return _usable(conversations, renderer)


def _dataset(directory: Path, renderer: Renderer) -> tuple[list[Trajectory], dict[str, int]]:
    trajectories = list(open_source(directory))
    return rendered_for(trajectories, renderer, exact=has_tokens_of(trajectories, renderer))


def has_tokens_of(trajectories: Sequence[Trajectory], renderer: Renderer) -> bool:
    """Whether trajectories begin as this renderer opens their conversations: then their tokens are its tokenizer's."""
    said = [item for item in trajectories if item.loss_mask.any()]
    for item in said[:: max(1, len(said) // _PROBED)]:
        turn = next(n for n, message in enumerate(item.messages) if message["role"] == "assistant")
        try:
            opened = renderer.opening(item.messages[:turn], item.tools)
        except _REFUSALS:
            return False
        if opened != item.tokens[: len(opened)].tolist():
            return False
    return True
