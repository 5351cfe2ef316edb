"""Operation counts against numbers worked out by hand and against counts of an explicit computation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from subl_jax import metrics
from subl_jax.metrics import Shape

TEACHER = Shape(params=1000, width=8, vocab=50, layers=2, attention_width=8)
STUDENT = Shape(params=300, width=4, vocab=50, layers=1, attention_width=4)
# 10 tokens in documents of 6 and 4, of which 3 carry a loss: Σ S² = 36 + 16 = 52.
TOKENS, LOSS_TOKENS, DOCUMENTS = 10, 3, [6, 4]


def test_kd_step_by_hand():
    body = 10 * (2 * 1000 + 6 * 300)  # 38000
    head = 3 * (2 * 8 * 50 + 6 * 4 * 50)  # 3 · (800 + 1200) = 6000
    attention = 2 * 52 * (2 * 8 + 3 * 1 * 4)  # 104 · 28 = 2912
    assert (body, head, attention) == (38000, 6000, 2912)
    assert metrics.kd_step_flops(TEACHER, STUDENT, TOKENS, LOSS_TOKENS, DOCUMENTS) == 46912


def test_cached_teacher_costs_what_sft_costs():
    # 10·1800 + 3·1200 + 104·12 = 18000 + 3600 + 1248
    assert metrics.sft_step_flops(STUDENT, TOKENS, LOSS_TOKENS, DOCUMENTS) == 22848
    assert metrics.kd_step_flops(None, STUDENT, TOKENS, LOSS_TOKENS, DOCUMENTS) == 22848


def test_lora_student_by_hand():
    lora = Shape(params=300, width=4, vocab=50, layers=1, attention_width=4, lora_params=20)
    # 10·(4·300 + 6·20) + 3·4·4·50 + 1248 = 13200 + 2400 + 1248
    assert metrics.sft_step_flops(lora, TOKENS, LOSS_TOKENS, DOCUMENTS) == 16848
    # teacher: 10·2000 + 3·800 + 104·16 = 20000 + 2400 + 1664
    assert metrics.kd_step_flops(TEACHER, lora, TOKENS, LOSS_TOKENS, DOCUMENTS) == 16848 + 24064


def test_documents_may_be_an_iterator():
    assert metrics.kd_step_flops(TEACHER, STUDENT, TOKENS, LOSS_TOKENS, iter(DOCUMENTS)) == 46912


def test_the_kl_head_of_the_marks():
    # MEASURING.md: teacher d=4096, student d=2048, V=128256, 8192 tokens is 2.15e13 FLOPs.
    teacher = Shape(params=0, width=4096, vocab=128256, layers=0, attention_width=0)
    student = Shape(params=0, width=2048, vocab=128256, layers=0, attention_width=0)
    flops = metrics.kd_step_flops(teacher, student, tokens=8192, loss_tokens=8192, documents=[])
    assert flops == pytest.approx(2.15e13, rel=2e-3)


def test_forward_count_is_xlas_count_of_the_matmuls():
    width, vocab, tokens = 16, 40, 32
    weights = {"body": jnp.ones((width, width)), "head": jnp.ones((width, vocab))}
    run = jax.jit(lambda w, x: (x @ w["body"]) @ w["head"])
    cost = run.lower(weights, jnp.ones((tokens, width))).compile().cost_analysis()
    assert cost is not None
    shape = Shape(params=width * width, width=width, vocab=vocab, layers=0, attention_width=0)
    assert metrics.forward_flops(shape, tokens, tokens, [tokens]) == cost["flops"]


def test_parameters_without_embedding_and_head():
    params = {
        "embed": jnp.ones((10, 4)),
        "layers": {"w": jnp.ones((2, 4, 4)), "head": jnp.ones(1)},
        "head": jnp.ones((4, 10)),
    }
    assert metrics.count_params(params) == 40 + 32 + 1 + 40
    assert metrics.count_params(params, exclude=("embed", "head")) == 32
    assert metrics.count_params(jax.eval_shape(lambda: params), exclude=("embed",)) == 73
    with pytest.raises(ValueError, match="no parameter is named 'lm_head'"):
        metrics.count_params(params, exclude=("embed", "lm_head"))


def test_utilisations_and_roofline_by_hand():
    assert metrics.mfu(5e12, 0.1, 1e14) == pytest.approx(0.5)
    assert metrics.mbu(2e9, 0.01, 4e11) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="seconds=0"):
        metrics.mfu(1, 0, 1)
    kv = metrics.kv_bytes_per_token(layers=16, kv_heads=8, head_dim=64, bytes_per_element=2)
    assert kv == 32768
    assert metrics.decode_step_bytes(1e6, [1, 3], kv) == 1e6 + 4 * 32768
    # B=4, c̄=100, W=1e9: 4·1e12 / (1e9 + 4·100·32768)
    assert metrics.decode_roofline(4, 100, 1e9, kv, 1e12) == pytest.approx(4e12 / 1.0131072e9)
    # At the roofline the utilisation is one.
    seconds = 4 / metrics.decode_roofline(4, 100, 1e9, kv, 1e12)
    assert metrics.mbu(metrics.decode_step_bytes(1e9, [100] * 4, kv), seconds, 1e12) == pytest.approx(1.0)
