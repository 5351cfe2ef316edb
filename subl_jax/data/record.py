"""One trajectory as a record of the dataset and as a line of JSON, and what makes one unfit to be stored."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from subl_jax.chat.messages import ToolSchema
from subl_jax.trajectory import FAILED, Status, Trajectory


def flaw(item: Trajectory) -> str | None:
    """What is wrong with a trajectory that code nobody type-checks may have made, as one line, or None."""
    name = name_of(item)
    for field, dtype in (("tokens", np.int32), ("loss_mask", np.bool_), ("logprobs", np.float32)):
        array = getattr(item, field)
        if array.dtype != dtype or array.ndim != 1:
            return f"{name}: {field} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [length]"
        if len(array) != len(item.tokens):
            return f"{name}: {field} has {len(array)} entries for {len(item.tokens)} tokens"
    if not len(item.tokens) and item.status not in FAILED:
        return f"{name} has no tokens and status {item.status}, not {' or '.join(FAILED)}; drop it before writing"
    return None


def name_of(item: Trajectory) -> str:
    """How errors name a trajectory."""
    return f"episode {item.episode} (task {item.task_id}, sample {item.sample})"


def key_of(item: Trajectory) -> tuple[int, int]:
    """(episode, sample): what a trajectory is stored under, and sorted by."""
    return int(item.episode), int(item.sample)


def json_text(value: Any) -> str:
    """JSON in ASCII."""
    # A model can write "\ud800" in a tool call, which decodes to a lone surrogate that UTF-8 cannot hold.
    return json.dumps(value, ensure_ascii=True)


# Integers of so many digits may lie beyond 64 bits.
_LONG_INTEGER = re.compile(r"\d{19}")
_INT64 = range(-(2**63), 2**63)


def portable(text: str) -> str:
    """JSON text as readers other than Python's take it: they fail on what no UTF-8 and no 64-bit integer holds.

    A lone surrogate becomes U+FFFD, a longer integer a float (beyond its range, a text). All other text stays as it is.
    """
    # Looked for first, since almost no text has either, and decoding takes longer than all the rest.
    if "\\ud" not in text and not _LONG_INTEGER.search(text):
        return text
    return json_text(_portable(json.loads(text)))


def _portable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, int) and value not in _INT64:
        try:
            return float(value)
        except OverflowError:
            return str(value)
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, dict):
        return {_portable(key): _portable(item) for key, item in value.items()}
    return value


def to_record(item: Trajectory, messages: str, tools: str) -> dict[str, Any]:
    """The columns of a trajectory; its messages and tools come as JSON texts."""
    return {
        "episode": item.episode,
        "task_id": item.task_id,
        "sample": item.sample,
        "tokens": item.tokens,
        "loss_mask": item.loss_mask,
        "logprobs": item.logprobs,
        "messages": messages,
        "tools": tools,
        "status": item.status,
        "done": bool(item.done),
        # An exception's text may quote a file name that is no UTF-8.
        "error": item.error.encode("utf-8", "surrogatepass"),
    }


def to_line(item: Trajectory, messages: str, tools: str, **more: str | int | bool) -> str:
    """The line of a JSON Lines export, with the same columns in every line.

    A column that only some lines have breaks Arrow readers (`datasets`) where it first appears behind the first 10 MB, so
    `error` stands there always; lines that were written before this have it only where there was one.

    Args:
      item: the trajectory.
      messages, tools: of it, as JSON texts.
      more: further columns.
    """
    rest = {
        "task_id": item.task_id,
        "episode": int(item.episode),
        "sample": int(item.sample),
        "status": item.status,
        "done": bool(item.done),
        "error": item.error,
        **more,
    }
    return f'{{"messages": {portable(messages)}, "tools": {portable(tools)}, {portable(json_text(rest))[1:]}\n'


@functools.lru_cache(maxsize=256)
def _tools(text: bytes) -> list[ToolSchema]:
    return json.loads(text)


def from_record(record: Mapping[str, Any]) -> Trajectory:
    """The trajectory that `to_record` was given. Equal tool lists become one list object."""
    return Trajectory(
        episode=record["episode"],
        task_id=record["task_id"].decode(),
        sample=record["sample"],
        tokens=record["tokens"],
        loss_mask=record["loss_mask"],
        logprobs=record["logprobs"],
        messages=json.loads(record["messages"]),
        tools=_tools(record["tools"]),
        status=cast(Status, record["status"].decode()),
        done=record["done"],
        # Absent from datasets that were written before episodes could fail.
        error=record.get("error", b"").decode("utf-8", "surrogatepass"),
    )
