"""Teachers and students from every kind of folder: adapters are merged, and what does not belong together is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax import checkpoint
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.distillation.config import RunOptions
from subl_jax.distillation.models import SourceError, open_model
from subl_jax.models import convert, lora, peft_format
from subl_jax.models.config import LoraConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.distillation import folders

ADAPTER = LoraConfig(rank=2, alpha=3.0, dropout=0.0, targets=("q", "down"))
PLAIN = RunOptions()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model(tmp_path_factory.mktemp("models") / "base", padding=5, width=16)


def layout() -> Layout:
    return Layout(make_mesh(MeshConfig()), "default")


def adapters_on(base: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The base, its configuration with adapters, and adapters of which no half is zero."""
    model = open_model("teacher", base, PLAIN).load(layout())
    config = dataclasses.replace(model.config, lora=ADAPTER)
    drawn = lora.init_adapters(config, jax.random.key(0))
    return model, config, jax.tree.map(lambda leaf: np.asarray(leaf + 0.1), drawn)


def expected(model: Any, adapters: dict[str, Any], target: str) -> np.ndarray:
    """W + alpha / rank A B, by numpy."""
    kernel = np.asarray(model.params["layers"][target]["kernel"], np.float64)
    if target not in ADAPTER.targets:
        return kernel
    pair = adapters["layers"][target]
    return kernel + 1.5 * np.einsum("lir,lro->lio", pair["lora_a"].astype(float), pair["lora_b"].astype(float))


@pytest.mark.parametrize("kind", ["peft", "adapters"])
@pytest.mark.parametrize("below", ["folder", "checkpoint"])
def test_adapters_are_merged_into_the_model_below_them(kind: str, below: str, base: Path, tmp_path: Path) -> None:
    model, config, adapters = adapters_on(base)
    directory = tmp_path / "adapters"
    if kind == "peft":
        peft_format.write_peft(directory, config, adapters, base=str(base))
    else:
        mark = tokenizers.fingerprint(tokenizers.load(base))
        about = {"model": model.config.architecture(), "lora": config.to_dict()["lora"], "tokenizer": mark}
        checkpoint.save_model(directory, adapters, about)
    where = base
    if below == "checkpoint":
        where = tmp_path / "base.orbax"
        assert convert.main(["import", str(base), str(where)]) == 0
    source = open_model("teacher", directory, PLAIN, base=where)
    assert source.kind == kind and source.base is not None and source.base.kind == below
    found = source.load(layout())
    assert found.config == model.config and source.tokenizer.get_vocab() == tokenizers.load(base).get_vocab()
    for target in ("q", "k", "down"):
        kernel = found.params["layers"][target]["kernel"]
        np.testing.assert_allclose(kernel, expected(model, adapters, target), rtol=1e-5, atol=1e-6)


def test_a_peft_folder_names_its_base_itself_and_ours_does_not(base: Path, tmp_path: Path) -> None:
    model, config, adapters = adapters_on(base)
    peft_format.write_peft(tmp_path / "peft", config, adapters, base=str(base))
    assert open_model("student", tmp_path / "peft", PLAIN).tokenizer_dir == base
    peft_format.write_peft(tmp_path / "hub", config, adapters, base="org/model")
    with pytest.raises(
        SourceError, match="adapters of PEFT on 'org/model', which is no folder here.*--student_base=DIR"
    ):
        open_model("student", tmp_path / "hub", PLAIN)
    about = {"model": model.config.architecture(), "lora": config.to_dict()["lora"]}
    checkpoint.save_model(tmp_path / "ours", adapters, about)
    with pytest.raises(SourceError, match="--student_base=DIR"):
        open_model("student", tmp_path / "ours", PLAIN)
    other = folders.model(tmp_path / "other", padding=5, width=24)
    with pytest.raises(SourceError, match="was not trained on .*model.d_model: 24 in the base, 16 in the adapters"):
        open_model("student", tmp_path / "ours", PLAIN, base=other)


def test_a_checkpoint_needs_the_tokenizer_that_it_was_made_with(base: Path, tmp_path: Path) -> None:
    model, _, _ = adapters_on(base)
    mark = tokenizers.fingerprint(tokenizers.load(base))
    where = tmp_path / "run" / "seed=0" / "teachers" / "x"
    checkpoint.save_model(where / "params", model.params, {"model": model.config.architecture(), "tokenizer": mark})
    with pytest.raises(SourceError, match="comes without a tokenizer; .*--teacher_tokenizer=DIR"):
        open_model("teacher", where, PLAIN)
    assert open_model("teacher", where, PLAIN, tokenizer=base).kind == "checkpoint"
    # Where a run of ours keeps it; another one is refused.
    tokenizers.load(base).save_pretrained(str(tmp_path / "run" / "tokenizer" / "files"))
    assert open_model("teacher", where, PLAIN).config == model.config
    other = folders.model(tmp_path / "other", padding=0, width=16, known=290)
    with pytest.raises(SourceError, match=f"was made with {mark}"):
        open_model("teacher", where, PLAIN, tokenizer=other)


def test_a_model_runs_in_the_dtype_that_is_asked_for(base: Path) -> None:
    source = open_model("teacher", base, RunOptions(dtype="bfloat16", remat="full"))
    assert (source.config.compute_dtype, source.config.remat) == ("bfloat16", "full")
    found = source.load(layout())
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.params)} == {"bfloat16"}
    assert source.identity == open_model("student", base, PLAIN).identity


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=re.escape(f"--teacher={tmp_path} holds no model")):
        open_model("teacher", tmp_path, PLAIN)
