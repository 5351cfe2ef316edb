"""Any teacher into any student: from two folders and a file to a student that is nearer to its teacher."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax import checkpoint, data
from subl_jax.artifacts import WorkdirMismatch
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.teacher_cache import CacheMismatch
from subl_jax.distill.train_config import TrainConfig
from subl_jax.distill.vocabulary import VocabularyError
from subl_jax.distillation import run as stages
from subl_jax.distillation.command import described, distil
from subl_jax.distillation.config import DistillConfig, Spec
from subl_jax.distillation.run import Distillation
from subl_jax.models import hf_import
from subl_jax.models.config import LoraConfig
from subl_jax.rollout.sampling import SamplingConfig
from tests.distillation import folders

END_ID = tokenizers.SPECIAL.index(tokenizers.END)
CONFIG = DistillConfig(
    train=TrainConfig(
        steps=12, batch_rows=4, row_tokens=64, checkpoint_every=4, log_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    ),
    holdout=0.2,
    rollout=SamplingConfig(max_turn_tokens=6, max_turns=2, context=64, slots=4, prefill_chunk=16),
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        # One tokenizer, padded to 327 and 308 rows.
        "teacher": folders.model(root / "large", padding=27, width=24, seed=1),
        "student": folders.model(root / "small", padding=8, width=16, seed=2, tied=True),
        "thinker": folders.model(root / "thinker", padding=3, width=16, added=["<think>", "</think>"], seed=3),
        "stranger": folders.model(root / "stranger", padding=0, width=16, known=290, seed=4),
        "talks": folders.talks(root / "talks.jsonl"),
        "prompts": folders.prompts(root / "asked.jsonl"),
    }


def spec(models: dict[str, Path], workdir: Path, **changes: Any) -> Spec:
    usual = {"teacher": models["teacher"], "student": models["student"], "data": models["talks"]}
    return Spec(**{"config": CONFIG, "workdir": workdir, **usual, **changes})


def with_objective(**fields: Any) -> DistillConfig:
    return dataclasses.replace(CONFIG, objective=Objective(**fields))


def summary_of(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    workdir = tmp_path_factory.mktemp("run") / "work"
    return workdir, distil(Distillation(spec(models, workdir, export_hf=workdir.parent / "out")))


def test_a_student_of_another_padding_comes_nearer_to_its_teacher(finished: tuple[Path, str]) -> None:
    workdir, shown = finished
    found = summary_of(workdir)
    before, after = found["held_out"]["before"], found["held_out"]["seed=0"]
    assert after["forward_kl"] < 0.8 * before["forward_kl"] and after["reverse_kl"] < before["reverse_kl"]
    counts = found["documents"]
    assert counts["train"] + counts["held_out"] == 40 and 4 <= counts["held_out"] <= 12
    assert found["vocabulary"] == f"teacher and student share {folders.KNOWN} tokens"
    for name in ("config.json", "report.html", "metrics.jsonl", "documents/train/trajectories.jsonl"):
        assert (workdir / name).is_file()
    assert re.search(rf"seed=0 +{after['forward_kl']:.4f} +{after['reverse_kl']:.4f} +{after['hard_label']:.4f}", shown)
    assert "<svg" in (workdir / "report.html").read_text()


def test_the_held_out_prompts_are_not_trained_on(finished: tuple[Path, str]) -> None:
    asked = [
        {item.messages[0]["content"] for item in data.read(finished[0] / "documents" / name)}
        for name in ("train", "held_out")
    ]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_the_finished_student_keeps_its_own_shape_and_is_exported(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    params, metadata = checkpoint.load_model(workdir / "seed=0" / "student" / "params")
    assert metadata["model"]["vocab_size"] == folders.KNOWN + 8 and metadata["model"]["num_tokens"] == folders.KNOWN
    exported = hf_import.import_params(workdir.parent / "out", hf_import.read_config(workdir.parent / "out"))
    jax.tree.map(np.testing.assert_array_equal, exported, params)


def test_the_same_command_again_runs_nothing_and_shows_the_table(
    models: dict[str, Path], finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, shown = finished
    monkeypatch.setattr(stages, "train", None)
    again = distil(Distillation(spec(models, workdir, export_hf=workdir.parent / "out")))
    assert again == f"{workdir} is finished; nothing was run again\n\n{shown}"
    with pytest.raises(WorkdirMismatch, match="objective.temperature: 1.0 in the directory, 2.0 in this run"):
        distil(Distillation(spec(models, workdir, config=with_objective(temperature=2.0))))


def test_an_interrupted_run_goes_on_to_the_same_student(
    models: dict[str, Path], finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, saved = tmp_path / "work", checkpoint.TrainCheckpointer.save

    def save_and_die(self: Any, step: int, *rest: Any, **more: Any) -> Any:
        saved(self, step, *rest, **more)
        self.wait()
        if step == 8:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(checkpoint.TrainCheckpointer, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        distil(Distillation(spec(models, workdir)))
    monkeypatch.undo()
    distil(Distillation(spec(models, workdir)))
    one, other = (checkpoint.load_model(each / "seed=0" / "student" / "params")[0] for each in (finished[0], workdir))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert summary_of(workdir)["held_out"] == summary_of(finished[0])["held_out"]


@pytest.mark.slow
def test_our_own_checkpoint_is_a_teacher_and_prompts_are_answered_by_it(
    models: dict[str, Path], finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run has its tokenizer. The student learns from its answers, adapters only, on a cache of its logits."""
    workdir, cache = tmp_path / "work", tmp_path / "cache"
    config = dataclasses.replace(
        CONFIG, lora=True, adapter=LoraConfig(rank=2, dropout=0.0), samples=2,
        objective=Objective("reverse_kl", temperature=2.0, hard_label_weight=0.1),
    )  # fmt: skip
    asked = spec(
        models, workdir, config=config, data=None, prompts=models["prompts"], teacher_cache=cache, cache_top_k=32,
        teacher=finished[0] / "seed=0" / "student", student=models["teacher"],
    )  # fmt: skip
    shown = distil(Distillation(asked))
    answers = data.read(workdir / "trajectories" / "dataset")
    assert len(answers) == 24 and max(item.tokens.max() for item in answers) < folders.KNOWN
    assert {(item.task_id, item.sample) for item in answers} >= {("asked.jsonl:1", 0), ("asked.jsonl:1", 1)}
    # Prompts 1, 4, 7 and 10 ask twice; nobody is asked again who was cut off.
    twice = {f"asked.jsonl:{line}" for line in (1, 4, 7, 10)}
    for item in answers:
        questions = sum(message["role"] == "user" for message in item.messages)
        assert questions == 1 + (item.task_id in twice) or item.status != "final"
    assert "from the teacher's top 32 of each token" in shown
    params, metadata = checkpoint.load_model(workdir / "seed=0" / "student" / "params")
    assert set(params) == {"layers"} and metadata["lora"]["rank"] == 2
    found = summary_of(workdir)["held_out"]
    assert found["seed=0"]["reverse_kl"] < found["before"]["reverse_kl"]
    # A second student on the same documents and cache, whose teacher is not even read.
    monkeypatch.setattr(Distillation, "load_teacher", None)
    config = dataclasses.replace(config, holdout=0.0)
    again = {"config": config, "prompts": None, "data": workdir / "documents" / "train", "seeds": (1,)}
    distil(Distillation(dataclasses.replace(asked, workdir=tmp_path / "second", **again)))
    assert summary_of(tmp_path / "second")["held_out"] == {}
    monkeypatch.undo()
    other = dataclasses.replace(config, objective=Objective("reverse_kl"))
    with pytest.raises(CacheMismatch, match="temperature: 2.0 in the cache, 1.0 in this run"):
        distil(Distillation(dataclasses.replace(asked, workdir=tmp_path / "third", **{**again, "config": other})))


def test_tokenizers_that_share_a_prefix_are_cut_to_it_and_others_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run = Distillation(spec(models, tmp_path / "a", teacher=models["thinker"]))
    assert run.shared_tokens == folders.KNOWN and not (tmp_path / "a").exists()
    assert any("2 tokens of the teacher alone are cut ('<think>', '</think>')" in line for line in described(run))
    with pytest.raises(VocabularyError, match=r"differ at id \d+: '\S+' to the teacher, '\S+' to the student"):
        Distillation(spec(models, tmp_path / "a", teacher=models["stranger"]))


def test_hard_labels_need_no_common_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    """A student of other tokens learns from the texts that a teacher answers, and nothing is said of divergences."""
    workdir = tmp_path / "work"
    # An untrained teacher never ends its turn by itself, and what is cut off cannot be said in other tokens.
    ending = dataclasses.replace(CONFIG.rollout, logit_bias=((END_ID, 7.0),))
    config = dataclasses.replace(with_objective(loss="hard_label"), holdout=0.3, rollout=ending)
    changes = {"teacher": models["stranger"], "prompts": models["prompts"], "config": config}
    shown = distil(Distillation(spec(models, workdir, **changes)))
    found = summary_of(workdir)["held_out"]
    assert found["before"]["forward_kl"] is None and found["seed=0"]["hard_label"] < found["before"]["hard_label"]
    assert summary_of(workdir)["vocabulary"] is None
    assert re.search(r"seed=0 +- +- +\d", shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "there is nothing to train on"),
        ({"teacher": None}, "--objective=forward_kl needs a teacher"),
        ({"teacher": Path("/nowhere")}, "--teacher=/nowhere is no directory"),
        ({"config": with_objective(loss="hard_label"), "teacher_cache": Path("c")}, "hard_label does not read"),
    ],
)
def test_what_is_missing_is_named(
    changes: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(spec(models, tmp_path / "work", **changes))
    assert not (tmp_path / "work").exists()
