"""Example episodes side by side: one task as base, teacher and student solved it, the first substantive action marked.

In: {"task_id", "prompt", "episodes": {condition: {"messages", "action", "tool", "turn", "done"}}}, where `turn` is an
index into the messages. Out: an HTML section; what a model wrote is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def _words(wording: Mapping[str, str]) -> dict[str, str]:
    """What a mark says, by class of action."""
    return {"biased": wording["biased"], "neutral": "neutral", "none": "no such action", "unparseable": "unparseable"}


def section(examples: Sequence[Mapping[str, Any]], wording: Mapping[str, str]) -> str:
    """The section of examples, one block per task; `wording` names what the setting measures."""
    words = _words(wording)
    blocks = "".join(_example(number, example, words) for number, example in enumerate(examples, 1))
    body = blocks or "<p>No episodes were kept as examples.</p>"
    return (
        '<section aria-labelledby="episodes"><h2 id="episodes">The same task, model by model</h2>'
        f"<p>The marked turn holds the {escape(wording['metric'])}. {escape(wording['looking'])}</p>"
        f"{body}</section>"
    )


def _example(number: int, example: Mapping[str, Any], words: Mapping[str, str]) -> str:
    columns = "".join(_episode(name, episode, words) for name, episode in example["episodes"].items())
    return (
        f"<h3>Example {number}: <code>{escape(example['task_id'])}</code></h3>"
        f'<p class="prompt">{escape(example["prompt"])}</p><div class="episodes">{columns}</div>'
    )


def _mark(action: str, words: Mapping[str, str]) -> str:
    style = action if action in ("biased", "neutral") else "other"
    return f'<span class="mark {style}">{escape(words.get(action, action))}</span>'


def _episode(condition: str, episode: Mapping[str, Any], words: Mapping[str, str]) -> str:
    turns = "".join(
        _turn(message, episode["action"] if index == episode["turn"] else None, words)
        for index, message in enumerate(episode["messages"])
        # The prompt stands above the columns once; the system turn is the same for all.
        if message["role"] not in ("system", "user")
    )
    tool = f" with <code>{escape(episode['tool'])}</code>" if episode["tool"] else ""
    done = "task done" if episode["done"] else "task not done"
    return (
        f'<article class="episode"><h4>{escape(condition.replace("_", " "))}</h4>'
        f"<p>{_mark(episode['action'], words)}{tool}, {done}</p>{turns}</article>"
    )


def _turn(message: Mapping[str, Any], action: str | None, words: Mapping[str, str]) -> str:
    parts = []
    if message.get("content"):
        parts.append(f"<pre>{escape(str(message['content']))}</pre>")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        parts.append(f"<pre>{escape(function['name'])} {escape(arguments)}</pre>")
    speaker = "assistant" if message["role"] == "assistant" else f"result of {message.get('name', 'tool')}"
    mark = f" {_mark(action, words)}" if action is not None else ""
    style = f"turn first {escape(action)}" if action is not None else "turn"
    body = "".join(parts) or "<pre>(empty)</pre>"
    return f'<div class="{style}"><b>{escape(speaker)}</b>{mark}{body}</div>'
