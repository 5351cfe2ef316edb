"""A student trained with adapters, from the training loop to PEFT on torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax import checkpoint
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.metrics.writers import read_metrics
from subl_jax.models import decoder, hf_export, lora, peft_format
from subl_jax.models.config import LAYER_TARGETS, LoraConfig
from tests.distill import tiny
from tests.models.test_decoder import flat, parameters, whole_logits

CONFIG = dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05, targets=LAYER_TARGETS))
STEPS = TrainConfig(6, 8, 16, OptimizerConfig(learning_rate=0.02, warmup_steps=1), checkpoint_every=100, log_every=1)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["hard_label", "forward_kl"])
def test_a_student_trained_with_adapters_computes_the_same_in_peft(tmp_path, loss):
    peft = pytest.importorskip("peft", reason="needs peft: make setup EXTRAS=dev,oracles")
    torch = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")
    from transformers import AutoModelForCausalLM

    params = parameters(tiny.SMALL)
    before = jax.tree.map(lambda leaf: np.array(leaf), params)
    result = train(
        Model(CONFIG, params), tiny.documents(12), STEPS, Objective(loss),
        seed=0, directory=tmp_path / "student", stage="student", logs=tmp_path, metadata={},
        teacher=Model(tiny.LARGE, parameters(tiny.LARGE)) if loss == "forward_kl" else None,
    )  # fmt: skip
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    # Adapters alone were trained, all of them, and what they sit on is as it was.
    assert set(flat(result.params)) == {
        ("layers", name, leaf) for name in LAYER_TARGETS for leaf in ("lora_a", "lora_b")
    }
    assert all(np.any(leaf) for leaf in flat(result.params).values())
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(leaf, flat(before)[path])

    metadata = {"model": CONFIG.architecture(), "lora": CONFIG.to_dict()["lora"]}
    checkpoint.save_model(tmp_path / "adapters", result.params, metadata)
    checkpoint.save_model(tmp_path / "base", params, {**metadata, "lora": None})
    hf_export.export_folder(tmp_path / "model", tiny.SMALL, params)
    peft_format.export_adapters(tmp_path / "adapters", tmp_path / "model", tmp_path / "peft")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens = tiny.documents(1, seed=5)[0].tokens
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None].astype(np.int64))).logits.numpy()
    ours = whole_logits(CONFIG, decoder.merge(result.params, params), tokens)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - whole_logits(tiny.SMALL, params, tokens)).max() > 0.1
    plain, merged = lora.merge_checkpoint(tmp_path / "adapters", tmp_path / "base")
    assert plain.architecture() == tiny.SMALL.architecture() and plain.lora is None
    np.testing.assert_allclose(whole_logits(tiny.SMALL, merged, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_adapters_start_from_the_draw_that_is_named(tmp_path):
    """One step at a rate of almost nothing leaves A as it was drawn."""
    still = dataclasses.replace(STEPS, steps=1, optimizer=OptimizerConfig("sgd", learning_rate=1e-12, warmup_steps=0))

    def started(name: str, seed: int, draw: int) -> np.ndarray:
        result = train(
            Model(CONFIG, parameters(tiny.SMALL)), tiny.documents(12), still, Objective("hard_label"), seed=seed,
            directory=tmp_path / name, stage=name, logs=tmp_path / name, metadata={}, adapter_draw=draw,
        )  # fmt: skip
        return np.asarray(flat(result.params)["layers", "q", "lora_a"])

    teacher = started("teacher", 0, 0)
    np.testing.assert_array_equal(teacher, started("student", 0, 0))
    for name, seed, draw in (("own", 0, 1), ("foreign", 1, 0)):
        assert np.abs(np.corrcoef(teacher.ravel(), started(name, seed, draw).ravel())[0, 1]) < 0.3
