"""Evaluations as Inspect logs: one log for each evaluated model and task list, which `inspect view` opens.

Evaluation rows in (`evaluate.run`, or cells of a grid); `inspect_ai.log.EvalLog` objects and their files out. A sample is a
task, an epoch one of its sampled episodes. Sampled ambiguous, greedy ambiguous and safe episodes are tasks of their own, so
that the metrics of a log are those of `summary.json` and no mean goes over unlike episodes.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subl_jax import artifacts
from subl_jax.evaluate.run import TASK_SEED
from subl_jax.exports.finished import ExportError, Measured
from subl_jax.exports.inspect_scores import NOT_KEPT, Item, results_of, scores_of
from subl_jax.settings.interface import Setting, Split
from subl_jax.settings.registry import get_setting

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample
    from inspect_ai.model import ChatMessage

Format = Literal["eval", "json"]

# (kind, mode) -> what the task is called behind the setting's name, in the order of a row.
PARTS = {
    ("ambiguous", "sampled"): "ambiguous",
    ("ambiguous", "greedy"): "ambiguous-greedy",
    ("safe", "sampled"): "safe",
}
# The score that a viewer shows first.
_HEADLINE = {"ambiguous": "behaviour", "ambiguous-greedy": "behaviour", "safe": "done"}
# kind/split/family/seed/index, see `settings.interface.Task`.
_TASK_PARTS = 5
_NO_PROMPT = "(the wording of this task was not kept)"


def require_inspect() -> None:
    """Refuses, before any work, where Inspect is not installed.

    Raises:
      ExportError: it names the extra.
    """
    try:
        import inspect_ai  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"Inspect logs are written by inspect-ai, which cannot be imported ({error}); install it with "
            "make setup EXTRAS=inspect, or pip install 'subl_jax[inspect]'"
        ) from error


def logs(measured: Measured) -> dict[str, EvalLog]:
    """The logs of one evaluated model: task name -> log; a task list that was not run has none.

    Args:
      measured: the evaluation.

    Raises:
      ExportError: Inspect is not installed.
    """
    require_inspect()
    setting = get_setting(measured.setting)
    found = {}
    for (kind, mode), part in PARTS.items():
        items = [item for item in measured.row["items"] if (item["kind"], item["mode"]) == (kind, mode)]
        if items:
            found[f"{measured.setting}-{part}"] = _log(measured, setting, part, items)
    return found


def write(directory: Path, measured: Measured, file_format: Format = "eval") -> list[Path]:
    """Writes the logs of a model into a directory, each under the name that Inspect itself would give it.

    Args:
      directory: is made if it is not there; its other logs stay.
      measured: the evaluation.
      file_format: `eval` (compact) or `json` (plain text).

    Raises:
      ExportError: Inspect is not installed, or a file cannot be written.
    """
    require_inspect()
    from inspect_ai.log import write_eval_log

    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for task, log in logs(measured).items():
            stamp = re.sub("[:+]", "-", log.eval.created)
            name = re.sub("[^A-Za-z0-9.=~-]+", "-", f"{task}-{measured.model}")
            path = directory / f"{stamp}_{name}_{log.eval.task_id}.{file_format}"
            write_eval_log(log, path, format=file_format)
            paths.append(path)
    except OSError as error:
        raise ExportError(f"cannot write Inspect logs in {directory}: {artifacts.reason(error)}") from error
    return paths


# --- One log ----------------------------------------------------------------------------------------------------------


def _log(measured: Measured, setting: Setting, part: str, items: Sequence[Item]) -> EvalLog:
    from importlib.metadata import version

    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalPlan,
        EvalResults,
        EvalSpec,
        EvalStats,
        HeadlineMetric,
    )
    from inspect_ai.model import GenerateConfig

    task, mode = f"{measured.setting}-{part}", items[0]["mode"]
    prompts = _prompts(measured, setting, items)
    examples = {
        (example["kind"], example["mode"], example["task_id"], example["sample"]): example
        for example in measured.row.get("examples", ())
    }
    counter_tool = setting.bias_tools[setting.counter_bias]
    samples = []
    for item in items:
        example = examples.get((item["kind"], item["mode"], item["task_id"], item["sample"]))
        samples.append(_sample(measured, setting, item, example, prompts, counter_tool))
    tasks = list(dict.fromkeys(item["task_id"] for item in items))
    epochs = max(item["sample"] for item in items) + 1
    sampling = measured.evaluation.get("rollout", {})
    begun = measured.written - (measured.seconds or 0.0)
    created, finished = (
        datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat() for seconds in (begun, measured.written)
    )
    identity = artifacts.digest([measured.hash, measured.model, measured.seed, task])
    headline = HeadlineMetric(scorer=_HEADLINE[part], metric="mean")
    return EvalLog(
        status="success",
        eval=EvalSpec(
            eval_id=identity,
            run_id=measured.hash,
            task_id=identity,
            created=created,
            task=task,
            task_version=measured.parser or 0,
            task_display_name=f"{task} {measured.model} seed={measured.seed}",
            task_args={"seed": measured.seed, "condition": measured.row["condition"], "model": measured.model},
            tags=[f"seed={measured.seed}", f"setting={measured.setting}", f"condition={measured.row['condition']}"],
            dataset=EvalDataset(
                name=task, samples=len(tasks), sample_ids=[short(name) for name in tasks], shuffled=False
            ),
            model=f"subl_jax/{measured.model}",
            model_generate_config=GenerateConfig(
                temperature=0.0 if mode == "greedy" else sampling.get("temperature"),
                top_p=sampling.get("top_p"),
                top_k=sampling.get("top_k") or None,
                max_tokens=sampling.get("max_turn_tokens"),
                seed=measured.seed,
            ),
            config=EvalConfig(epochs=epochs, epochs_reducer=["mean"]),
            packages={"inspect_ai": version("inspect_ai"), "subl_jax": measured.versions.get("subl_jax", "absent")},
            metadata=_provenance(measured, setting),
            headline_metric=headline,
        ),
        plan=EvalPlan(name="subl_jax rollout", config=GenerateConfig()),
        results=EvalResults(
            total_samples=len(items),
            completed_samples=len(items),
            scores=results_of(samples, items),
            headline=headline,
            metadata=dict(measured.row["readouts"]),
        ),
        stats=EvalStats(started_at=created, completed_at=finished),
        samples=samples,
    )


def _provenance(measured: Measured, setting: Setting) -> dict[str, Any]:
    """What whoever doubts a figure needs; None stands for what is not recorded."""
    words = setting.wording
    return {
        "setting": measured.setting,
        "seed": measured.seed,
        "condition": measured.row["condition"],
        "model": measured.model,
        "pair": measured.pair,
        "preset": measured.preset,
        "checkpoint": measured.row["checkpoint"],
        "evaluation_hash": measured.hash,
        "protocol_hash": measured.protocol,
        "parser_version": measured.parser,
        "machine": measured.machine,
        "versions": dict(measured.versions),
        "evaluation": dict(measured.evaluation),
        "training": dict(measured.training),
        "source": measured.source,
        "times": "the source file was last changed at the end; the duration is that of the whole evaluation, all task lists",
        "behaviour": f"{words.behaviour}: the share of tasks whose {words.metric} is {words.biased}. {words.looking}",
        "counter": f"{words.counter}: the share of tasks whose {words.metric} is made with "
        f"{setting.bias_tools[setting.counter_bias]}",
        "done": "the task's own predicate held at the end",
        "stderr": "clustered by task family, with the G/(G-1) correction",
        "tools": [tool["function"]["name"] for tool in setting.tools],
    }


def _prompts(measured: Measured, setting: Setting, items: Sequence[Item]) -> dict[str, str]:
    """Task -> its wording: as kept with the examples, or generated again from the tasks' names.

    Tasks are generated again only if their names are exactly those of the row, and their wording that of the examples.
    """
    kept = {example["task_id"]: example["prompt"] for example in measured.row.get("examples", ())}
    names = list(dict.fromkeys(item["task_id"] for item in items))
    parts = [name.split("/") for name in names]
    if any(len(each) != _TASK_PARTS for each in parts):
        return kept
    splits: set[Any] = {each[1] for each in parts}
    if splits not in ({"evaluation"}, {"development"}, {"train"}):
        return kept
    split: Split = splits.pop()
    made = {task.task_id: task.prompt for task in setting.tasks(items[0]["kind"], split, TASK_SEED, len(names))}
    if set(made) != set(names) or any(made[name] != text for name, text in kept.items() if name in made):
        return kept
    return made


def short(task_id: str) -> str:
    """A task's name within its list, `family/seed/index`: a viewer's column shows the beginning, which all of them share."""
    parts = task_id.split("/")
    return "/".join(parts[2:]) if len(parts) == _TASK_PARTS else task_id


# --- Samples ----------------------------------------------------------------------------------------------------------


def _sample(
    measured: Measured,
    setting: Setting,
    item: Item,
    example: Mapping[str, Any] | None,
    prompts: Mapping[str, str],
    counter_tool: str,
) -> EvalSample:
    from inspect_ai.event import InfoEvent
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput

    epoch = int(item["sample"]) + 1
    name = f"{item['task_id']}/{item['mode']}/{epoch}"
    prompt = example["prompt"] if example is not None else prompts.get(item["task_id"], _NO_PROMPT)
    output = ModelOutput(model=f"subl_jax/{measured.model}")
    events: list[Any] = []
    if example is None:
        # Shown where a viewer would show the conversation; it is no message, since nobody said it.
        when = datetime.datetime.fromtimestamp(int(measured.written), datetime.UTC)
        events = [InfoEvent(uuid=f"{name}/info", timestamp=when, working_start=0.0, source="subl_jax", data=NOT_KEPT)]
        messages: list[ChatMessage] = []
    else:
        messages = conversation(example["messages"], name)
        last = next((message for message in reversed(messages) if isinstance(message, ChatMessageAssistant)), None)
        if last is not None:
            output.choices = [ChatCompletionChoice(message=last)]
    return EvalSample(
        id=short(item["task_id"]),
        epoch=epoch,
        input=prompt,
        target="",
        messages=messages,
        events=events,
        output=output,
        scores=scores_of(setting, item, example is not None, counter_tool),
        metadata={
            "task_id": item["task_id"],
            "family": item["family"],
            "kind": item["kind"],
            "mode": item["mode"],
            "tool": item["tool"],
            "turn": item.get("turn"),
            "status": item["status"],
            "error": item.get("error") or None,
            "record": item.get("record"),
            "conversation": "kept" if example is not None else NOT_KEPT,
        },
        uuid=f"{measured.hash}-{artifacts.digest([measured.model, measured.seed, name])}",
    )


def conversation(messages: Sequence[Mapping[str, Any]], name: str) -> list[ChatMessage]:
    """Messages of ours as Inspect's: calls get ids, and results the id of the call that they answer.

    Args:
      messages: as `chat.messages` has them.
      name: what ids begin with.
    """
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageTool, ChatMessageUser
    from inspect_ai.tool import ToolCall

    found: list[ChatMessage] = []
    waiting: list[str] = []  # calls without a result yet
    for index, message in enumerate(messages):
        given: dict[str, Any] = {"id": f"{name}/{index}", "content": message["content"]}
        if message["role"] == "system":
            found.append(ChatMessageSystem(**given))
        elif message["role"] == "user":
            found.append(ChatMessageUser(**given, source="input"))
        elif message["role"] == "tool":
            answered = waiting.pop(0) if waiting else None
            found.append(ChatMessageTool(**given, tool_call_id=answered, function=message.get("name")))
        else:
            calls = [
                ToolCall(
                    id=f"{name}/{index}/{number}",
                    function=call["function"]["name"],
                    arguments=call["function"]["arguments"],
                )
                for number, call in enumerate(message.get("tool_calls", ()))
            ]
            waiting = [call.id for call in calls]
            if message.get("unparseable"):
                given["metadata"] = {"unparseable": True}
            found.append(ChatMessageAssistant(**given, tool_calls=calls or None, source="generate"))
    return found
