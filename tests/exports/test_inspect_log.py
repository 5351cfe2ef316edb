"""Inspect logs: the library itself reads back what was written, and its figures are ours."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax.evaluate.protocol import Contrast
from subl_jax.evaluate.summary import build_summary, total_sanitizer
from subl_jax.exports import committed, inspect_log
from subl_jax.exports.finished import ExportError, FinishedSeed, Measured
from subl_jax.settings.api import SETTING
from tests.exports import fake_seed
from tests.grid import fake_cells
from tests.report import fake_run

log_module = pytest.importorskip("inspect_ai.log", reason="needs inspect-ai: make setup EXTRAS=dev,oracles")


@pytest.fixture(scope="module")
def measured(finished: Path) -> Measured:
    return FinishedSeed(finished, 0).evaluation("student")


@pytest.fixture(scope="module")
def folder(finished: Path, measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of the student and its control."""
    directory = tmp_path_factory.mktemp("logs")
    inspect_log.write(directory, measured)
    inspect_log.write(directory, FinishedSeed(finished, 0).evaluation("control_student"))
    return directory


def logs_of(measured: Measured) -> dict[str, Any]:
    """The logs; Any, since a log without samples or results is one, too, to the type checker."""
    return dict(inspect_log.logs(measured))


def read(directory: Path, task: str, model: str = "student") -> Any:
    (path,) = directory.glob(f"*_{task}-{model.replace('_', '-')}_*")
    return log_module.read_eval_log(str(path), resolve_attachments=True)


def dumped(samples: list[Any]) -> dict[tuple[Any, int], dict[str, Any]]:
    """Samples by name and epoch: a reader gives them in an order of its own."""
    return {(sample.id, sample.epoch): sample.model_dump() for sample in samples}


def means(log: Any, name: str = "mean") -> dict[str, float]:
    return {score.name: score.metrics[name].value for score in log.results.scores if name in score.metrics}


def summary_of(row: dict[str, Any]) -> dict[str, Any]:
    """Our own summary's figures of one condition; its control is its twin, since a protocol needs a contrast."""
    protocol = dataclasses.replace(
        fake_run.protocol((row["seed"],)),
        contrasts=(Contrast("student - control_student", "student", "control_student", "primary"),),
        base="control_student",
        teacher="student",
    )
    summary = build_summary(
        [row, {**row, "condition": "control_student"}], protocol,
        sanitizer=total_sanitizer({}), timing_s={}, throughput={}, versions={}, wording=SETTING.wording,
    )  # fmt: skip
    return summary["conditions"]["student"]["per_seed"][0]


@pytest.mark.parametrize("file_format", ["eval", "json"])
def test_a_log_reads_back_as_it_was_made(measured, tmp_path, file_format):
    made = logs_of(measured)
    for path, (task, log) in zip(inspect_log.write(tmp_path, measured, file_format), made.items(), strict=True):
        assert path.suffix == f".{file_format}"
        again = log_module.read_eval_log(str(path), resolve_attachments=True)
        assert again.status == "success"
        assert again.eval.task == task
        assert again.results == log.results
        assert dumped(again.samples) == dumped(log.samples)


def test_the_rates_of_a_log_are_those_of_our_summary_to_the_last_bit(finished, folder):
    figures = summary_of(fake_seed.row(finished, "student"))
    ambiguous, greedy, safe = (read(folder, f"api-{part}") for part in inspect_log.PARTS.values())
    found = means(ambiguous)
    assert found["behaviour"] == figures["behaviour_rate"]
    assert found["counter"] == figures["counter_rate"]
    assert found["done"] == figures["utility_ambiguous"]
    assert found["unparseable"] == figures["unparseable"]
    assert found["no_action"] == figures["no_action"]
    for name in ("log_odds", "log_odds_counter", "tool_mass"):
        assert found[name] == figures[name]
    limits = [means(ambiguous, name)["behaviour"] for name in ("ci95_low", "ci95_high")]
    assert limits == figures["ci95"]
    assert means(greedy)["behaviour"] == figures["greedy_rate"]
    assert means(safe)["done"] == figures["utility"]
    assert means(safe)["behaviour"] == figures["safe_behaviour_rate"]
    shares = next(score for score in ambiguous.results.scores if score.name == "first_action").metrics
    assert {name: metric.value for name, metric in shares.items()} == figures["actions"]


def test_inspect_computes_the_same_mean_and_standard_error_from_the_samples(folder):
    """Inspect's own metrics, which know nothing of ours, applied to what a reader finds in the log."""
    scorer = pytest.importorskip("inspect_ai.scorer")
    log = read(folder, "api-ambiguous")
    for name in ("behaviour", "done", "counter", "log_odds"):
        scores = [
            scorer.SampleScore(score=sample.scores[name], sample_id=sample.id, sample_metadata=sample.metadata)
            for sample in log.samples
        ]
        told = next(score for score in log.results.scores if score.name == name).metrics
        assert told["mean"].value == pytest.approx(scorer.mean()(scores), rel=1e-12)
        assert told["stderr"].value == pytest.approx(scorer.stderr(cluster="family")(scores), rel=1e-12)


def test_every_sample_scores_what_its_item_says(finished, folder):
    items = [
        i for i in fake_seed.row(finished, "student")["items"] if (i["kind"], i["mode"]) == ("ambiguous", "sampled")
    ]
    samples = {sample.metadata["task_id"]: sample for sample in read(folder, "api-ambiguous").samples}
    assert len(samples) == len(items) == fake_seed.TASKS
    for item in items:
        sample = samples[item["task_id"]]
        assert sample.scores["behaviour"].value == (item["action"] == "biased")
        assert sample.scores["first_action"].value == (item["tool"] or item["action"])
        assert sample.scores["first_action"].answer == item["action"]
        assert sample.scores["log_odds"].value == item["log_odds"]
        assert sample.scores["done"].value == item["done"]
        assert sample.id == item["task_id"].removeprefix("ambiguous/evaluation/")
        assert sample.metadata["family"] == item["family"]


def test_a_kept_conversation_has_its_calls_and_each_result_names_its_call(finished, folder):
    kept = {example["task_id"]: example for example in fake_seed.row(finished, "student")["examples"]}
    for sample in read(folder, "api-ambiguous").samples:
        example = kept.get(sample.metadata["task_id"])
        if example is None:
            continue
        assert sample.input == example["prompt"]
        assert [message.role for message in sample.messages] == [m["role"] for m in example["messages"]]
        assert [message.text for message in sample.messages] == [m["content"] for m in example["messages"]]
        calls = [
            call for message in sample.messages if message.role == "assistant" for call in message.tool_calls or []
        ]
        told = [call for m in example["messages"] for call in m.get("tool_calls", ())]
        assert [(c.function, c.arguments) for c in calls] == [
            (t["function"]["name"], t["function"]["arguments"]) for t in told
        ]
        results = [message for message in sample.messages if message.role == "tool"]
        assert [result.tool_call_id for result in results] == [call.id for call in calls]
        assert [result.function for result in results] == [call.function for call in calls]
        assert sample.output.completion == example["messages"][-1]["content"]


def test_an_episode_whose_conversation_is_not_kept_says_so_and_has_no_message(folder):
    samples = read(folder, "api-ambiguous").samples
    bare = [sample for sample in samples if sample.metadata["conversation"] != "kept"]
    assert len(bare) == fake_seed.TASKS - 3
    for sample in bare:
        assert sample.messages == []
        assert "not kept" in sample.metadata["conversation"]
        assert "not kept" in sample.events[0].data
        assert "not kept" in sample.scores["behaviour"].explanation


def test_provenance_stands_in_the_log_and_what_is_not_recorded_is_null(finished, measured):
    log = logs_of(measured)["api-ambiguous"]
    told = log.eval.metadata
    assert told["evaluation_hash"] == measured.hash
    assert told["protocol_hash"] == "p" * 16
    assert (told["seed"], told["condition"], told["pair"]) == (0, "student", "large_large")
    assert told["parser_version"] == log.eval.task_version == "first/1"
    assert told["machine"] == "2 cores"
    assert told["versions"]["jax"] == measured.versions["jax"]
    old = dataclasses.replace(measured, parser=None, machine=None)
    assert logs_of(old)["api-ambiguous"].eval.metadata["machine"] is None


def test_prompts_of_tasks_that_were_not_kept_are_those_of_the_setting(measured):
    tasks = SETTING.tasks("safe", "evaluation", 0, fake_seed.SAFE)
    row = {
        **measured.row,
        "items": [
            {**item, "task_id": task.task_id, "family": task.family}
            for item, task in zip([i for i in measured.row["items"] if i["kind"] == "safe"], tasks, strict=True)
        ],
    }
    log = logs_of(dataclasses.replace(measured, row=row))["api-safe"]
    assert [sample.input for sample in log.samples] == [task.prompt for task in tasks]


def test_tasks_that_the_setting_does_not_have_get_no_made_up_prompt(measured):
    items = [{**item, "task_id": f"{item['task_id']}x"} for item in measured.row["items"] if item["kind"] == "safe"]
    log = logs_of(dataclasses.replace(measured, row={**measured.row, "items": items}))["api-safe"]
    assert {sample.input for sample in log.samples} == {"(the wording of this task was not kept)"}


def test_several_samples_of_a_task_are_epochs_and_the_mean_is_that_of_the_summary(measured):
    first = [item for item in measured.row["items"] if item["kind"] == "ambiguous" and item["mode"] == "sampled"]
    rng = np.random.default_rng(0)
    again = [
        {**item, "sample": 1, "action": "biased" if flip else "neutral", "tool": "delete_file" if flip else "move_file"}
        for item, flip in zip(first, rng.random(len(first)) < 0.5, strict=True)
    ]
    row = {**measured.row, "items": [*measured.row["items"], *again]}
    log = logs_of(dataclasses.replace(measured, row=row))["api-ambiguous"]
    assert log.eval.config.epochs == 2
    assert sorted({sample.epoch for sample in log.samples}) == [1, 2]
    assert log.results.total_samples == 2 * fake_seed.TASKS
    figures = summary_of(row)
    assert means(log)["behaviour"] == figures["behaviour_rate"]
    assert means(log)["log_odds"] == figures["log_odds"]


def test_committed_cells_give_the_logs_of_their_rows(tmp_path):
    fake_cells.write_grid(tmp_path, seeds=(0,), settings=("api",), pairs=("large_large",), tasks=35, safe=12)
    found = committed.models(tmp_path, "api", 0)
    assert {"student", "control_student", "base"} <= set(found)
    assert not any(name.startswith("sanitize") for name in found)
    log = logs_of(committed.measured(tmp_path, "api", 0, "student"))["api-ambiguous"]
    original = fake_cells.evaluation("api", "student", 0, *fake_cells.rates(fake_cells.PAIRS["large_large"], "student"),
                                     model="student", tasks=35, safe=12)  # fmt: skip
    asked = [i for i in original["items"] if (i["kind"], i["mode"]) == ("ambiguous", "sampled")]
    assert means(log)["behaviour"] == np.mean([item["action"] == "biased" for item in asked])
    assert means(log)["log_odds"] == pytest.approx(np.mean([item["log_odds"] for item in asked]), rel=1e-6)


def test_the_viewer_lists_and_serves_the_logs(folder):
    """What `inspect view` asks its server for: the list of logs, and one log's header."""
    common = pytest.importorskip("inspect_ai._view.common")
    listed = log_module.list_eval_logs(str(folder))
    assert sorted(info.task for info in listed) == sorted(
        f"api-{part}-{model}" for part in inspect_log.PARTS.values() for model in ("student", "control-student")
    )
    payload = asyncio.run(common.get_log_file(str(folder / Path(listed[0].name).name), "1"))
    assert b'"status":"success"' in payload.contents.replace(b" ", b"")


def test_the_viewer_is_bundled_with_the_logs(folder, tmp_path):
    log_module.bundle_log_dir(log_dir=str(folder), output_dir=str(tmp_path / "site"))
    assert (tmp_path / "site" / "index.html").is_file()
    listing = json.loads((tmp_path / "site" / "logs" / "listing.json").read_text())
    assert len(listing) == 6


def test_without_inspect_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "inspect_ai":
            raise ImportError("No module named 'inspect_ai'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ExportError, match="EXTRAS=inspect"):
        inspect_log.require_inspect()
