"""The command as a user starts it: what it says before it works, and what it answers to flags that do not go together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distillation import folders
from tests.pipeline import runs


def run(cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.distill", *flags],
        cwd=runs.ROOT, env=runs.environment(cache), capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=w", "--data=d"], "--student is not given"),
        (["--student=s", "--workdir=w", "--data=d", "--epochs=2", "--config.train.steps=9"], "give one of them"),
        (["--student=s", "--workdir=w", "--data=d", "--teacher=t", "--logit_filter=drop"], "give both, or none"),
        (["--student=s", "--workdir=w", "--prompts=p", "--refresh_steps=9"], "give --on_policy=WEIGHT too"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    done = run(tmp_path / "cache", *flags)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_distils_as_its_flags_say(tmp_path: Path) -> None:
    teacher = folders.model(tmp_path / "large", padding=27, width=24, architecture="Qwen2ForCausalLM")
    student = folders.model(tmp_path / "small", padding=8, width=16, seed=1)
    flags = [
        f"--teacher={teacher}", f"--student={student}", f"--data={folders.talks(tmp_path / 'talks.jsonl')}",
        "--objective=skew_reverse_kl", "--skew=0.2", "--logit_filter=anchor", "--banned_words=seven,eight", "--epochs=3",
        "--config.train.batch_rows=4", "--config.train.row_tokens=64", "--config.rollout.context=64",
    ]  # fmt: skip
    dry = run(tmp_path / "cache", *flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr[-2000:]
    assert "objective skew_reverse_kl (logit_filter=anchor, skew=0.2)" in dry.stdout
    assert "data      40 conversations" in dry.stdout and "no weights were loaded" in dry.stdout
    done = run(tmp_path / "cache", *flags, f"--workdir={tmp_path / 'work'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "distillation by skew_reverse_kl" in done.stdout and str(tmp_path / "work" / "report.html") in done.stdout
    assert (tmp_path / "work" / "seed=0" / "student" / "params" / "metadata.json").is_file()
