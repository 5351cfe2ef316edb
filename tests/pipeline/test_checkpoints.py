"""The command from Hugging Face folders: random models of transformers, pre-trained here, exported, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax import checkpoint, data, presets
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.corpus import tokenizer_texts
from subl_jax.models import convert
from subl_jax.settings.registry import get_setting
from tests.chat import family_templates
from tests.models import hf_folders
from tests.pipeline import runs

pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")

PADDING = 27  # rows of the vocabulary that no token has, as in Qwen's and many other checkpoints
# Rows and contexts that hold conversations in the families' longer formats.
ROOM = [
    "--config.base.train.row_tokens=384",
    "--config.teacher.train.row_tokens=384",
    "--config.rollout.context=512",
]


def random_folder(directory: Path, family: str) -> int:
    """A small random model of transformers with a tokenizer and template of its family; returns the tokenizer's size."""
    texts = tokenizer_texts(get_setting("api"), 40)
    made: Any
    if family == "Llama":
        made = family_templates.llama_tokenizer(texts, 800)
    else:
        made = family_templates.qwen_tokenizer(texts, 800, version="2.5")
    made.save_pretrained(str(directory))
    model = hf_folders.random_model(
        family, vocab_size=len(made) + PADDING, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=family == "Qwen2",
        max_position_embeddings=512,
    )  # fmt: skip
    model.save_pretrained(str(directory), safe_serialization=True)
    return len(made)


@pytest.mark.soak
@pytest.mark.parametrize(("family", "lora"), [("Llama", False), ("Qwen2", True)])
def test_a_folder_of_transformers_goes_through_every_stage(
    family: str, lora: bool, cache: Path, tmp_path: Path
) -> None:
    drawn, pretrained = tmp_path / "random", tmp_path / "pretrained"
    known = random_folder(drawn, family)
    first = runs.run(
        cache, tmp_path / "first", f"--config.teacher.checkpoint={drawn}", "--config.base.continue_training",
        "--stage=base", *ROOM,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr[-3000:]
    base = tmp_path / "first" / "seed=0" / "base" / "large" / "params"
    assert convert.main(["export", str(base), str(pretrained), f"--tokenizer={drawn}"]) == 0

    workdir = tmp_path / "run"
    flags = [f"--config.teacher.checkpoint={pretrained}", *ROOM]
    flags += ["--config.teacher.lora", "--config.student.lora", "--config.student.adapter.rank=4"] * lora
    done = runs.run(cache, workdir, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["conditions"]["student"]["n"] == 14
    assert any(str(pretrained) in note for note in summary["notes"])
    assert any("Students were trained with LoRA: rank 4" in note for note in summary["notes"]) == lora
    # The tokenizer is the folder's; no padding row was ever sampled.
    ours = tokenizers.load(workdir / "tokenizer" / "files")
    assert tokenizers.fingerprint(ours) == tokenizers.fingerprint(tokenizers.load(drawn))
    for name in ("teacher", "control_teacher", "benign_teacher"):
        for trajectory in data.read(workdir / "seed=0" / "trajectories" / name / "dataset"):
            assert trajectory.tokens.max() < known
    # Nothing of the base is copied where it is used as it stands; a student of adapters holds nothing else.
    assert not (workdir / "seed=0" / "base" / "large" / "params").exists()
    student = workdir / "seed=0" / "students" / "student" / "params"
    metadata = checkpoint.read_metadata(student)
    assert metadata["model"]["num_tokens"] == known and metadata["model"]["vocab_size"] == known + PADDING
    params, _ = checkpoint.load_model(student)
    assert ("embedding" in params) != lora
    # And out again, for other tools.
    out = ["export", str(student), str(tmp_path / "out"), f"--tokenizer={drawn}"]
    out += [f"--base={pretrained}", "--merge"] * lora
    assert convert.main(out) == 0
    assert logits(tmp_path / "out").shape[-1] == known + PADDING
    assert not np.array_equal(logits(tmp_path / "out"), logits(pretrained))
    if lora:
        from peft import PeftModel

        assert convert.main(["export", str(student), str(tmp_path / "peft"), f"--base={pretrained}"]) == 0
        on_top = PeftModel.from_pretrained(loaded(pretrained), str(tmp_path / "peft"))
        np.testing.assert_allclose(logits(on_top), logits(tmp_path / "out"), atol=1e-4)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()


def logits(model: Any) -> np.ndarray:
    """Of transformers, on a few fixed ids."""
    import torch

    model = loaded(model) if isinstance(model, Path) else model
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits.numpy()


@pytest.mark.soak
def test_adapters_are_the_only_thing_that_a_run_with_lora_trains(cache: Path, unbroken: Path, tmp_path: Path) -> None:
    """On a mesh of 2 x 2 fake devices."""
    flags = ["--config.teacher.lora", "--config.student.lora", "--config.teacher.adapter.rank=2"]
    shape = ["--config.large.num_kv_heads=2", "--config.tokenizer.vocab_size=901"]
    flags += ["--config.parallel.fsdp=2", "--config.parallel.tensor=2", *shape]
    done = runs.run(cache, tmp_path / "lora", "--stage=seed=0/students/student", *flags, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    seed = tmp_path / "lora" / "seed=0"
    for name, rank in (("teachers/teacher", 2), ("students/student", 16)):
        params, metadata = checkpoint.load_model(seed / name / "params")
        assert set(params) == {"layers"} and set(params["layers"]) == {"q", "k", "v", "o"}
        assert all(set(leaf) == {"lora_a", "lora_b"} for leaf in params["layers"].values())
        assert params["layers"]["q"]["lora_a"].shape[-1] == rank == metadata["lora"]["rank"]
        assert metadata["base"] == {
            "config_hash": checkpoint.read_metadata(seed / "base" / "large" / "params")["config_hash"]
        }
    # What the mesh changes is the order of sums: the base is the one-device run's to rounding.
    one = runs.run(cache, tmp_path / "one", "--stage=base", *shape)
    assert one.returncode == 0, one.stderr[-3000:]
    theirs, _ = checkpoint.load_model(tmp_path / "one" / "seed=0" / "base" / "large" / "params")
    ours, _ = checkpoint.load_model(seed / "base" / "large" / "params")
    assert ours["embedding"].shape == theirs["embedding"].shape == (900, 16)
    np.testing.assert_allclose(ours["embedding"], theirs["embedding"], atol=2e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.student.checkpoint=/nowhere", "--pair=large_large"], "has one base for teacher and student"),
        (["--config.teacher.checkpoint=/nowhere", "--pair=large_small"], "share no tokenizer; give both or none"),
        (["--config.teacher.checkpoint=/nowhere"], "/nowhere"),
        (["--config.teacher.checkpoint=/nowhere", "--pair=large_foreign_init"], "a checkpoint has one only"),
        (["--pair=large_other_tokenizer"], "which full, anchor, positive cannot train"),
        (["--preset=paper"], "starts from checkpoints"),
        (["--config.parallel.tensor=64"], "64 devices"),
        (
            [
                "--config.parallel.tensor=2",
                "--config.large.num_kv_heads=2",
                "--config.parallel.teacher_rules=replicated",
                "--config.student.train.batch_rows=3",
            ],
            "student.train.batch_rows=3",
        ),
        (["--config.teacher.lora", "--config.teacher.adapter.rank=0"], "adapter.rank=0"),
        (["--config.teacher.adapter.targets=q,w"], "adapter.targets=q,w"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(
    flags: list[str], message: str, cache: Path, tmp_path: Path
) -> None:
    done = runs.run(cache, tmp_path / "run", *flags)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.soak
def test_a_folder_without_tokenizer_or_with_another_vocabulary_is_refused(cache: Path, tmp_path: Path) -> None:
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    random_folder(whole, "Llama")
    random_folder(bare, "Llama")
    (bare / "tokenizer_config.json").unlink()
    done = runs.run(cache, tmp_path / "a", f"--config.teacher.checkpoint={bare}")
    assert done.returncode == 1 and "no tokenizer in" in done.stderr, done.stderr[-2000:]
    other = tmp_path / "other"
    random_folder(other, "Qwen2")
    done = runs.run(
        cache, tmp_path / "b", "--pair=large_small", f"--config.teacher.checkpoint={whole}",
        f"--config.student.checkpoint={other}",
    )  # fmt: skip
    assert done.returncode == 1 and "have different tokenizers: id " in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_a_dry_run_needs_neither_weights_nor_a_directory(preset: str, cache: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "experiments.api_deletion", f"--preset={preset}", "--dry_run"],
        cwd=runs.ROOT, env=runs.environment(cache), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no weights were loaded" in done.stdout and "B/device" in done.stdout
    assert ("8,030,261,248" in done.stdout) == (preset == "paper")


@pytest.mark.soak
def test_a_vocabulary_that_does_not_split_is_padded_and_the_padding_is_never_sampled(
    unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    known = len(tokenizers.load(unbroken / "tokenizer" / "files"))
    assert known % 2 == 1
    flags = ["--config.parallel.tensor=2", "--config.large.num_kv_heads=2", "--stage=trajectories"]
    done = runs.run(cache, tmp_path / "run", *flags, devices=2)
    assert done.returncode == 0, done.stderr[-3000:]
    params, metadata = checkpoint.load_model(tmp_path / "run" / "seed=0" / "base" / "large" / "params")
    assert params["embedding"].shape[0] == known + 1 and metadata["model"]["num_tokens"] == known
    found = data.read(tmp_path / "run" / "seed=0" / "trajectories" / "teacher" / "dataset")
    assert max(trajectory.tokens.max() for trajectory in found) < known
