"""One trajectory as a record of the dataset and as a line of JSON, and what makes one unfit to be stored."""

from __future__ import annotations

import functools
import json
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


def to_line(item: Trajectory, messages: str, tools: str) -> str:
    """The line of the JSON Lines export; an error only where there is one."""
    rest = {
        "task_id": item.task_id,
        "episode": int(item.episode),
        "sample": int(item.sample),
        "status": item.status,
        "done": bool(item.done),
    }
    if item.error:
        rest["error"] = item.error
    return f'{{"messages": {messages}, "tools": {tools}, {json_text(rest)[1:]}\n'


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
