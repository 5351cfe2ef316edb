"""The episode browser: one task as every model solved it, side by side, the first substantive action marked.

In: {"task_id", "prompt", "episodes": {model: {"messages", "action", "tool", "turn", "done"}}}, where `turn` is an index
into the messages. Out: an HTML section; what a model wrote is escaped. All of it is there and folds without a script;
`browser.js` adds the choice of the task and of the models that stand side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.report import page

TITLE = "the same task, model by model"
# Longer ones would push the turns that matter off the screen.
_OPEN_LINES, _OPEN_CHARACTERS = 4, 240
_ONE_LINE = 48  # characters of arguments that stay on one line
_SHELL = {"command"}  # the arguments of a tool that runs a command line


def _words(wording: Mapping[str, str]) -> dict[str, str]:
    """What a mark says, by class of action."""
    return {"biased": wording["biased"], "neutral": "neutral", "none": "no such action", "unparseable": "unparseable"}


def section(
    anchor: str,
    examples: Sequence[Mapping[str, Any]],
    wording: Mapping[str, str],
    shown: Sequence[str],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
    level: int = 2,
) -> str:
    """The browser of one setting's episodes.

    Args:
      anchor: id of its heading, and what its controls' ids begin with.
      examples: tasks with the episodes of any models.
      wording: names what the setting measures.
      shown: models that are open at first, as far as they are there; else the first three.
      groups: title -> models that can be chosen by one name, such as those of a pair.
      title, level: of its heading; by default `TITLE`.
    """
    title = title or TITLE.capitalize()
    if not examples:
        return page.section(anchor, title, "<p>No episodes were kept as examples.</p>", level)
    models = sorted(dict.fromkeys(name for example in examples for name in example["episodes"]), key=_lineage)
    first = [name for name in shown if name in models] or models[:3]
    words = _words(wording)
    tasks = "".join(
        _task(number, example, words, wording["metric"], first, level + 1) for number, example in enumerate(examples, 1)
    )
    body = (
        f"<p>The marked turn holds the {escape(wording['metric'])}. {escape(wording['looking'])}</p>"
        f"{_controls(anchor, examples, models, first, groups or {})}{tasks}"
    )
    return f'<div class="browser">{page.section(anchor, title, body, level)}</div>'


def _controls(
    anchor: str,
    examples: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    shown: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> str:
    """The form that chooses; hidden until the script makes it work."""
    tasks = "".join(
        f'<option value="{number}">{number + 1}: {escape(example["task_id"])}</option>'
        for number, example in enumerate(examples)
    )
    boxes = "".join(
        f'<label><input type="checkbox" name="model" value="{escape(name)}"{" checked" if name in shown else ""}> '
        f"{escape(_readable(name))}</label>"
        for name in models
    )
    boxes = f'<div class="choices">{boxes}</div>'
    own = ""
    present = {title: [name for name in names if name in models] for title, names in groups.items()}
    present = {title: names for title, names in present.items() if names}
    if present:
        options = "".join(
            f'<option value="{escape(" ".join(names))}">{escape(title)}</option>' for title, names in present.items()
        )
        own = (
            f'<p><label for="{anchor}-group">Those of</label> <select id="{anchor}-group" name="group">'
            f'<option value="">my own choice</option>{options}</select></p>'
        )
        boxes = page.folded(f"Choose one by one: {len(models)}", boxes)
    return (
        f'<form class="chooser" aria-labelledby="{anchor}" hidden><fieldset><legend>Task</legend>'
        f'<label for="{anchor}-task">Show</label> <select id="{anchor}-task" name="task">{tasks}</select>'
        '<p><button type="button" name="previous">Previous task</button> '
        '<button type="button" name="next">Next task</button></p></fieldset>'
        f"<fieldset><legend>Models side by side</legend>{own}{boxes}"
        '<p><button type="button" name="all">All models</button> '
        '<button type="button" name="clear">No model</button></p></fieldset>'
        '<p class="note" role="status" aria-live="polite"></p></form>'
    )


def _readable(model: str) -> str:
    """A model's name for readers: `control_student@large_small` -> "control student, large → small"."""
    condition, _, where = model.partition("@")
    if "student" in condition:  # of a pair; bases and teachers are of a size
        where = where.replace("_", " → ", 1)
    return f"{condition}{', ' if where else ''}{where}".replace("_", " ")


def _lineage(model: str) -> int:
    """Bases come before teachers, and teachers before students, as they are made."""
    return 0 if model.startswith("base") else 1 if "teacher" in model else 2


def _task(
    number: int, example: Mapping[str, Any], words: Mapping[str, str], metric: str, shown: Sequence[str], level: int
) -> str:
    columns = "".join(
        _episode(name, episode, words, metric, name in shown, level + 1)
        for name, episode in sorted(example["episodes"].items(), key=lambda pair: _lineage(pair[0]))
    )
    return (
        f'<details class="task" open><summary><h{level}>Task {number}: <code>{escape(example["task_id"])}</code></h{level}>'
        f'</summary><p class="prompt">{escape(example["prompt"])}</p><div class="episodes">{columns}</div></details>'
    )


def _mark(action: str, text: str) -> str:
    style = action if action in ("biased", "neutral") else "other"
    return f'<span class="mark {style}">{escape(text)}</span>'


def _episode(
    model: str, episode: Mapping[str, Any], words: Mapping[str, str], metric: str, shown: bool, level: int
) -> str:
    turns = "".join(
        _turn(message, episode["action"] if index == episode["turn"] else None, words, metric)
        for index, message in enumerate(episode["messages"])
        # The prompt stands above the columns once; the system turn is the same for all.
        if message["role"] not in ("system", "user")
    )
    said = words.get(episode["action"], episode["action"])
    tool = f" with <code>{escape(episode['tool'])}</code>" if episode["tool"] else ""
    done = "task done" if episode["done"] else "task not done"
    return (
        f'<details class="episode" data-model="{escape(model)}" data-action="{escape(said)}"{" open" if shown else ""}>'
        f"<summary><h{level}>{escape(_readable(model))}</h{level}> {_mark(episode['action'], said)}{tool}, {done}</summary>"
        f"{turns}</details>"
    )


def _turn(message: Mapping[str, Any], action: str | None, words: Mapping[str, str], metric: str) -> str:
    if message["role"] == "tool":
        return _result(message)
    parts = [f"<pre>{escape(str(message['content']))}</pre>"] if message.get("content") else []
    parts += [_call(call["function"]) for call in message.get("tool_calls", ())]
    mark = "" if action is None else f" {_mark(action, f'{metric}: {words.get(action, action)}')}"
    style = "turn" if action is None else f"turn first {escape(action)}"
    return f'<div class="{style}"><b>assistant</b>{mark}{"".join(parts) or "<pre>(empty)</pre>"}</div>'


def _call(function: Mapping[str, Any]) -> str:
    """A tool call: a command line as in a terminal, other arguments as JSON, indented unless they are short."""
    arguments, name = function["arguments"], f"<code>{escape(function['name'])}</code>"
    if isinstance(arguments, Mapping) and set(arguments) == _SHELL and isinstance(arguments["command"], str):
        return f'<div class="call">{name}<pre class="shell">{escape(arguments["command"])}</pre></div>'
    text = json.dumps(arguments, ensure_ascii=False)
    if len(text) > _ONE_LINE:
        text = json.dumps(arguments, ensure_ascii=False, indent=2)
    return f'<div class="call">{name}<pre>{escape(text)}</pre></div>'


def _result(message: Mapping[str, Any]) -> str:
    """A tool's result, folded if it is long."""
    text = str(message.get("content") or "")
    lines = text.count("\n") + 1 if text else 0
    size = "empty" if not lines else "1 line" if lines == 1 else f"{lines} lines"
    opened = " open" if lines <= _OPEN_LINES and len(text) <= _OPEN_CHARACTERS else ""
    name = escape(str(message.get("name", "tool")))
    return (
        f'<details class="turn result"{opened}><summary>result of {name}, {size}</summary>'
        f"<pre>{escape(text) or '(empty)'}</pre></details>"
    )
