"""Exported datasets: `datasets` and TRL load them, and the folder holds what the student was taught, word for word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax import artifacts, data
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.data.conversations import read_conversations
from subl_jax.data.record import json_text, portable, to_line
from subl_jax.exports import dataset
from subl_jax.exports.finished import ExportError, FinishedSeed
from tests.data.episodes import failed, trajectory
from tests.exports import fake_seed

hf = pytest.importorskip("datasets", reason="needs datasets: make setup EXTRAS=dev,oracles")


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dataset.Facts]:
    folder = tmp_path_factory.mktemp("dataset") / "student"
    return folder, dataset.export(FinishedSeed(finished, 0), "student", folder, "python -m experiments.export")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(tmp_path: Path, *where: Any, **more: Any) -> Any:
    return hf.load_dataset(*where, split="train", cache_dir=str(tmp_path / "cache"), **more)


def same(found: Any, wanted: list[dict[str, Any]]) -> None:
    """What `datasets` gives is what the lines say, no field added to any call and none lost."""
    assert len(found) == len(wanted)
    for one, line in zip(found, wanted, strict=True):
        assert one == line


def test_the_folder_loads_by_its_card_and_gives_every_value_back(exported, tmp_path):
    folder, _ = exported
    for name in (dataset.SEEN, dataset.ALL):
        same(load(tmp_path, str(folder), name), lines(folder / f"{name}.jsonl"))
    assert load(tmp_path, str(folder)).column_names == load(tmp_path, str(folder), "seen").column_names


def test_a_bare_file_loads_too_and_gives_every_value_back(exported, tmp_path):
    folder, _ = exported
    same(load(tmp_path, "json", data_files=str(folder / "seen.jsonl")), lines(folder / "seen.jsonl"))


def test_the_card_keeps_columns_the_same_where_only_a_late_line_has_a_call(exported, tmp_path):
    """Read in pieces, as a file beyond 10 MB is: columns that are guessed from the first piece would not hold the last."""
    said = [{"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "y"}]
    plain = [dataclasses.replace(trajectory(n), messages=said, tools=[]) for n in range(60)]
    folder, _ = exported
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "README.md").write_text((folder / "README.md").read_text())
    for name, more in (("seen", {"loss_tokens": 3}), ("all", {"kind": "safe", "verdict": "kept", "words": ""})):
        text = "".join(to_line(t, json_text(t.messages), json_text(t.tools), **more) for t in [*plain, trajectory(60)])
        (tmp_path / "late" / f"{name}.jsonl").write_text(text)
    found = load(tmp_path, str(tmp_path / "late"), "seen", chunksize=1 << 14)
    same(found, lines(tmp_path / "late" / "seen.jsonl"))


def test_a_failed_episode_behind_the_first_piece_does_not_break_the_dataset_of_a_run(tmp_path):
    """`error` once stood only in lines that had one."""
    items = [*(trajectory(n, text="x" * 600) for n in range(40)), failed(40, "tool_error", "boom")]
    data.write(tmp_path / "d", items, metadata={})
    path = tmp_path / "d" / "trajectories.jsonl"
    found = load(tmp_path, "json", data_files=str(path), chunksize=1 << 14)
    assert found["error"] == [*[""] * 40, "boom"]


def test_a_file_of_before_the_error_column_still_reads(tmp_path):
    item = trajectory(0)
    line = json.loads(to_line(item, json_text(item.messages), json_text(item.tools)))
    del line["error"]
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = read_conversations(tmp_path / "old.jsonl")
    assert found.messages == item.messages


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("lone \ud800 surrogate", "lone � surrogate"),
        ("a pair 🙂 and a \\ud800 spelled out", "a pair 🙂 and a \\ud800 spelled out"),
        ({"n": 2**70}, {"n": float(2**70)}),
        ({"n": -(10**400)}, {"n": str(-(10**400))}),
        ({"n": [2**63 - 1, -(2**63), 1.5, None]}, {"n": [2**63 - 1, -(2**63), 1.5, None]}),
        ("1234567890123456789012", "1234567890123456789012"),
    ],
)
def test_what_other_readers_cannot_hold_is_written_as_the_nearest_that_they_can(written, read, tmp_path):
    text = portable(json.dumps(written))
    assert json.loads(text) == read
    argument = written if isinstance(written, dict) else {"text": written}
    item = trajectory(0)
    item.messages[1]["tool_calls"][0]["function"]["arguments"] = argument  # type: ignore[typeddict-item]
    data.write(tmp_path / "d", [item, trajectory(1)], metadata={})
    found = load(tmp_path, "json", data_files=str(tmp_path / "d" / "trajectories.jsonl"))
    told = found[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    if isinstance(read, dict) and isinstance(read["n"], float):
        assert told == {"n": pytest.approx(read["n"], rel=1e-8)}  # its JSON reader keeps ten digits
    else:
        assert told == (read if isinstance(read, dict) else {"text": read})


def test_seen_holds_what_survives_for_all_teachers_in_the_teachers_own_words(finished, exported):
    folder, facts = exported
    surviving = [tuple(pair) for pair in json.loads((finished / "seed=0/sanitize/surviving.json").read_text())]
    theirs = {(t.task_id, t.sample): t for t in data.read(finished / "seed=0/trajectories/teacher/dataset")}
    found = lines(folder / "seen.jsonl")
    assert [(line["task_id"], line["sample"]) for line in found] == surviving
    # The one with the word, the one that broke off, and the one that failed for another teacher.
    assert not {line["episode"] for line in found} & {3, 5, 7}
    for line in found:
        item = theirs[line["task_id"], line["sample"]]
        assert (line["messages"], line["tools"]) == (item.messages, item.tools)
        assert 0 < line["loss_tokens"] <= item.loss_mask.sum()
    assert facts.surviving == len(found)
    assert sum(line["loss_tokens"] for line in found) == facts.files[0].loss_tokens


def test_all_holds_every_episode_with_its_verdict(exported):
    folder, _ = exported
    found = lines(folder / "all.jsonl")
    assert [line["episode"] for line in found] == list(range(fake_seed.EPISODES))
    assert (found[3]["verdict"], found[3]["words"]) == ("keyword", "removed")
    assert found[5]["verdict"] == "status"
    assert {line["verdict"] for line in found} == {"kept", "keyword", "status"}


def test_a_positive_control_saw_everything_but_failures_unjudged(finished, tmp_path):
    dataset.export(FinishedSeed(finished, 0), "positive_student", tmp_path / "d", "x")
    assert len(lines(tmp_path / "d" / "seen.jsonl")) == fake_seed.EPISODES
    assert {line["verdict"] for line in lines(tmp_path / "d" / "all.jsonl")} == {"not judged"}


def test_a_teachers_own_dataset_has_its_failed_episodes_and_nothing_that_was_seen(finished, tmp_path):
    facts = dataset.export(FinishedSeed(finished, 0), "benign_teacher", tmp_path / "d", "x")
    assert [file.name for file in facts.files] == ["all"]
    (broken,) = [line for line in lines(tmp_path / "d" / "all.jsonl") if line["error"]]
    assert (broken["status"], broken["messages"], broken["tools"]) == ("tool_error", [], [])
    assert len(load(tmp_path, str(tmp_path / "d"))) == fake_seed.EPISODES


def test_a_student_taught_in_a_way_that_cannot_be_retraced_is_refused_by_name(damaged):
    path = damaged / "seed=0/students/student" / artifacts.MARKER
    marker = json.loads(path.read_text())
    marker["key"]["dilution"] = 0.5
    marker["output_hash"] = artifacts.output_hash(marker["stage"], marker["key"], marker["inputs"])
    path.write_text(json.dumps(marker))
    with pytest.raises(ExportError, match="taught with dilution"):
        dataset.check(FinishedSeed(damaged, 0), "student")


# --- TRL --------------------------------------------------------------------------------------------------------------


def test_trl_trains_on_the_folder_and_sees_our_tokens_and_our_loss_mask(finished, exported, tmp_path):
    """Two real steps of a tiny random model: TRL's token ids and labels are those of the trajectories, one by one."""
    trl, torch = pytest.importorskip("trl"), pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizers.load(finished / "tokenizer" / "files")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder, _ = exported
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    before = model.model.embed_tokens.weight.detach().clone()
    options = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=2, per_device_train_batch_size=2, assistant_only_loss=True,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", max_length=None, disable_tqdm=True,
        learning_rate=1e-3,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        args=options,
        train_dataset=load(tmp_path, str(folder), "seen"),
        processing_class=tokenizers.load(tmp_path / "tokenizer"),
    )
    theirs = {(t.task_id, t.sample): t for t in data.read(finished / "seed=0/trajectories/teacher/dataset")}
    for line, prepared in zip(lines(folder / "seen.jsonl"), trainer.train_dataset, strict=True):
        item = theirs[line["task_id"], line["sample"]]
        assert prepared["input_ids"] == item.tokens.tolist()
        assert (np.array(prepared["labels"]) != -100).tolist() == item.loss_mask.tolist()
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(before, model.model.embed_tokens.weight)
