"""On-policy distillation by the command: the student answers the user's prompts, and the teacher scores what it says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax import checkpoint, data
from subl_jax.artifacts import WorkdirMismatch
from subl_jax.data.conversations import Prompt, read_prompts
from subl_jax.distill import on_policy as mixture
from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import OnPolicyConfig
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.distill.vocabulary import VocabularyError
from subl_jax.distillation.command import described, distil
from subl_jax.distillation.config import DistillConfig, Spec
from subl_jax.distillation.on_policy import rounds
from subl_jax.distillation.run import Distillation
from subl_jax.rollout.sampling import SamplingConfig
from tests.distillation import folders

CONFIG = DistillConfig(
    train=TrainConfig(
        steps=8, batch_rows=4, row_tokens=64, checkpoint_every=5, log_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    ),
    objective=Objective("reverse_kl"),
    holdout=0.3,
    on_policy=OnPolicyConfig(1.0, refresh_steps=4, episodes=16),
    rollout=SamplingConfig(max_turn_tokens=6, max_turns=2, context=64, slots=4, prefill_chunk=16),
)  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    return {
        "config": CONFIG,
        "teacher": folders.model(root / "large", padding=27, width=24, seed=1),
        "student": folders.model(root / "small", padding=8, width=16, seed=2),
        "prompts": folders.prompts(root / "asked.jsonl"),
    }


@pytest.fixture(scope="module")
def finished(usual: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    workdir = tmp_path_factory.mktemp("run") / "work"
    return workdir, distil(Distillation(Spec(workdir=workdir, **usual)))


def rounds_of(workdir: Path) -> dict[str, list[Any]]:
    found = (workdir / "seed=0" / "student" / "rollouts").iterdir()
    return {path.name: data.read(path / "dataset") for path in sorted(found)}


def asked(items: Any) -> set[str]:
    return {item.messages[0]["content"] for item in items}


def test_a_student_learns_from_its_own_answers_to_the_prompts(finished: tuple[Path, str]) -> None:
    workdir, shown = finished
    found = rounds_of(workdir)
    assert {name: len(items) for name, items in found.items()} == {"round=0000": 16, "round=0001": 16}
    assert "distillation by reverse_kl" in shown
    assert "on policy: 100% of the steps, on 16 conversations of the student's own, made anew every 4 steps" in shown
    rows = dict(re.findall(r"^(before|seed=0) +[\d.]+ +([\d.]+) +[\d.]+$", shown, re.MULTILINE))
    assert 0 < float(rows["seed=0"]) < float(rows["before"])
    # The second round is of a student that has learned: the same conversations would be sampled otherwise.
    first, second = ([item.tokens.tolist() for item in items] for items in found.values())
    assert first != second


def test_the_student_never_answers_a_prompt_that_is_held_out(usual: dict[str, Any], finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    held_out = asked(data.read(workdir / "documents" / "held_out"))
    own = set.union(*map(asked, rounds_of(workdir).values()))
    everything = {prompt.messages[0]["content"] for prompt in read_prompts(usual["prompts"])}
    assert held_out and own == everything - held_out


def test_a_run_that_resumes_reads_what_the_student_said_before(
    usual: dict[str, Any], finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, saved, ran = tmp_path / "work", checkpoint.TrainCheckpointer.save, mixture.rollout

    def save_and_die(self: Any, step: int, *rest: Any, **more: Any) -> Any:
        saved(self, step, *rest, **more)
        self.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.TrainCheckpointer, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        distil(Distillation(Spec(workdir=workdir, **usual)))
    monkeypatch.undo()
    rolled: list[int] = []
    monkeypatch.setattr(mixture, "rollout", lambda *a, **k: (rolled.append(k["policy"]), ran(*a, **k))[1])
    distil(Distillation(Spec(workdir=workdir, **usual)))
    assert rolled == []  # it died in the second round, whose answers stand on disk as do the first one's
    one, other = (checkpoint.load_model(each / "seed=0" / "student" / "params")[0] for each in (finished[0], workdir))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_another_share_is_another_run(usual: dict[str, Any], finished: tuple[Path, str]) -> None:
    for changes, message in [({"weight": 0.5}, "on_policy.weight: 1.0"), ({"refresh_steps": 2}, "on_policy.refresh")]:
        mixed = dataclasses.replace(CONFIG, on_policy=dataclasses.replace(CONFIG.on_policy, **changes))
        with pytest.raises(WorkdirMismatch, match=message):
            distil(Distillation(Spec(workdir=finished[0], **{**usual, "config": mixed})))


def test_rounds_take_every_prompt_before_any_comes_again() -> None:
    prompts = [Prompt(f"p:{n}", [{"role": "user", "content": str(n)}]) for n in range(5)]
    take = rounds(prompts, 2, 4, seed=3)
    names = [episode.task.task_id for number in range(5) for episode in take(number)]
    assert sorted(names[:10]) == sorted([f"p:{n}" for n in range(5)] * 2) and names[:10] == names[10:]
    assert [(episode.index, episode.sample) for episode in take(1)] == [(n, 0) for n in range(4)]
    other = rounds(prompts, 2, 4, seed=4)
    assert names != [episode.task.task_id for number in range(5) for episode in other(number)]


def objective(**fields: Any) -> DistillConfig:
    words = ("seven",) if "logit_filter" in fields else ()
    return dataclasses.replace(CONFIG, objective=Objective(**fields), banned_words=words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": None, "data": Path("d")},
            r"--on_policy=1 has the student answer prompts; give them with --prompts",
        ),
        (
            {"teacher_cache": Path("c")},
            "--teacher_cache holds those of given documents alone; leave one of the two out",
        ),
        ({"config": objective(loss="hard_label")}, "labels that it has said itself; give a divergence"),
        ({"config": objective(logit_filter="drop")}, "leave --logit_filter=drop out, or --on_policy"),
        (
            {"config": dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, context=65))},
            "raise --config.train.row_tokens or lower --config.rollout.context",
        ),
        (
            {"config": dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, context=8))},
            r"asked.jsonl:1 has \d+ tokens in the student's format",
        ),
    ],
)
def test_what_cannot_be_learned_on_policy_is_refused_before_any_work(
    changes: dict[str, Any], message: str, usual: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(Spec(workdir=tmp_path / "work", **{**usual, **changes}))
    assert not (tmp_path / "work").exists()


def test_tokenizers_of_different_kinds_are_refused(usual: dict[str, Any], tmp_path: Path) -> None:
    stranger = folders.model(tmp_path / "stranger", padding=0, width=16, known=290, seed=4)
    with pytest.raises(VocabularyError, match="differ at id"):
        Distillation(Spec(workdir=tmp_path / "work", **{**usual, "teacher": stranger}))


def test_a_dry_run_tells_the_share(usual: dict[str, Any], tmp_path: Path) -> None:
    assert any(line.startswith("on policy 100% of the steps") for line in described(
        Distillation(Spec(workdir=tmp_path / "work", **usual))
    ))  # fmt: skip
