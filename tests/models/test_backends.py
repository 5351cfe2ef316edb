"""Attention kernels against float64 attention of each document alone; which kernel is chosen, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from subl_jax.models import backends, decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.models.test_decoder import parameters

TIME, TILE = 384, 128
# Over three tiles: a document inside one, a token alone, a document across two borders, one across none, and padding.
LENGTHS = (100, 1, 190, 60)
CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, init_scale=1.0
)
BF16 = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
HEADS = [(4, 2, 0), (3, 1, 7), (2, 2, 140)]  # query heads, key/value heads, window


def attention_alone(arrays, window: int):
    """Float64 attention of one document [time, heads, dim], and the gradients of sum(output * cotangent)."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in arrays)
    time, heads, dim = q.shape
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    ahead = np.subtract.outer(np.arange(time), np.arange(time))
    seen = (ahead >= 0) & (ahead < (window or time))
    for head in range(heads):
        shared = head // (heads // k.shape[1])
        scores = np.where(seen, q[:, head] @ k[:, shared].T / np.sqrt(dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, head] = weights @ v[:, shared]
        from_weights = cotangent[:, head] @ v[:, shared].T
        from_scores = weights * (from_weights - (from_weights * weights).sum(-1, keepdims=True)) / np.sqrt(dim)
        dq[:, head] = from_scores @ k[:, shared]
        dk[:, shared] += from_scores.T @ q[:, head]
        dv[:, shared] += weights.T @ cotangent[:, head]
    return out, dq, dk, dv


def inputs(heads: int, kv_heads: int, dim: int = 8, rows: int = 2) -> list[np.ndarray]:
    """Queries, keys, values and a cotangent of [rows, TIME] tokens, padding included."""
    rng = np.random.default_rng(heads * 10 + kv_heads)
    return [rng.normal(size=(rows, TIME, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)]


def segments_of(rows: int = 2) -> np.ndarray:
    """[rows, TIME]: the documents in the order of LENGTHS, in the reverse order in odd rows; padding (0) behind."""
    result = np.zeros((rows, TIME), np.int32)
    for row in range(rows):
        cursor = 0
        for number, length in enumerate(LENGTHS[:: 1 - 2 * (row % 2)], start=1):
            result[row, cursor : cursor + length] = number
            cursor += length
    return result


def configured(heads: int, kv_heads: int, window: int, name: str, dim: int = 8) -> ModelConfig:
    windows = (window,) * CONFIG.num_layers if window else ()
    return dataclasses.replace(
        CONFIG, num_heads=heads, num_kv_heads=kv_heads, windows=windows, attention=name, head_dim=dim
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(config: ModelConfig, layout: Layout | None, arrays, segments):
    """Output, and gradients of queries, keys and values. The cotangent is 0 on padding, as under any loss."""
    q, k, v, cotangent = arrays
    cotangent = jnp.where((segments > 0)[..., None, None], cotangent, 0).astype(q.dtype)
    out, pull = jax.vjp(lambda q, k, v: backends.attend_documents(q, k, v, segments, config, layout), q, k, v)
    return out, *pull(cotangent)


def expect_each_document_alone(results, arrays, segments, window: int, rtol: float, atol: float) -> None:
    for row in range(segments.shape[0]):
        for number in range(1, segments[row].max() + 1):
            here = segments[row] == number
            expected = attention_alone([x[row, here] for x in arrays], window)
            for ours, theirs in zip(results, expected, strict=True):
                np.testing.assert_allclose(np.asarray(ours[row, here], np.float32), theirs, rtol=rtol, atol=atol)


def expect_equal_outside(inside, left, right) -> None:
    left, right = (np.where(inside, 0.0, np.asarray(x, np.float32)) for x in (left, right))
    np.testing.assert_array_equal(left, right)


@pytest.fixture
def splash_on_cpu(monkeypatch):
    """Says that splash's platform is the CPU, where the kernel is interpreted; three small tiles to a row."""
    monkeypatch.setattr(backends, "_PLATFORMS", {"splash": "cpu"})
    monkeypatch.setattr(backends, "_SPLASH_BLOCKS", (TILE,))


def pretend(monkeypatch, platform: str, capability: str = "9.0") -> None:
    """Makes the selection see a device that is not there."""
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(backends, "_device", lambda layout: device)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


# Kernels against float64


@pytest.mark.parametrize("name", ["xla", "splash"])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), HEADS)
def test_packed_equals_each_document_alone(splash_on_cpu, name, heads, kv_heads, window):
    arrays, segments = inputs(heads, kv_heads), segments_of()
    results = outputs_and_gradients(configured(heads, kv_heads, window, name), None, arrays, segments)
    expect_each_document_alone(results, arrays, segments, window, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_bfloat16_stays_within_its_rounding(splash_on_cpu, name):
    config = dataclasses.replace(configured(4, 2, 0, name), compute_dtype="bfloat16")
    arrays, segments = [jnp.asarray(x, jnp.bfloat16) for x in inputs(4, 2)], segments_of()
    results = outputs_and_gradients(config, None, arrays, segments)
    assert all(x.dtype == jnp.bfloat16 for x in results)
    expect_each_document_alone(results, arrays, segments, 0, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_no_document_sees_another(splash_on_cpu, name):
    config = configured(4, 2, 0, name)
    arrays, segments = inputs(4, 2), segments_of()
    for document in (1, 3, 0):  # inside a tile, across tiles, padding
        inside = (segments == document)[..., None, None]
        others = [np.where(inside, 5.0 - x, x) for x in arrays]
        before, after = (outputs_and_gradients(config, None, x, segments) for x in (arrays, others))
        for left, right in zip(before, after, strict=True):
            assert np.isfinite(right).all()
            expect_equal_outside(inside, left, right)
        if document:
            assert np.abs(np.where(inside, before[0] - after[0], 0.0)).max() > 0.1


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_a_row_of_nothing_but_padding_is_finite(splash_on_cpu, name):
    # With large scores too, and a cotangent on the padding: no softmax row is empty.
    q, k, v, cotangent = inputs(2, 1)

    config, nothing = configured(2, 1, 0, name), jnp.zeros((2, TIME), jnp.int32)

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: backends.attend_documents(q, k, v, nothing, config, None), q, k, v)
        return out, *pull(cotangent)

    assert all(np.isfinite(x).all() for x in run(30 * q, 30 * k, v))


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_a_window_of_one_returns_the_values(splash_on_cpu, name):
    q, k, v, _ = (jnp.asarray(x) for x in inputs(2, 2))
    config = configured(2, 2, 1, name)
    attend = jax.jit(lambda q, k, v, segments: backends.attend_documents(q, k, v, segments, config, None))
    np.testing.assert_allclose(attend(q, k, v, segments_of()), v, rtol=1e-6)


# Under a mesh of 2 x 2 x 2


@pytest.mark.parametrize(
    ("rules", "heads", "kv_heads", "window"),
    [
        ("default", 4, 2, 7),
        ("kv_replicated", 4, 1, 0),
        ("kv_replicated", 6, 3, 0),  # two devices, three key/value heads: each is copied once
    ],
)
def test_splash_on_each_device_equals_xla(splash_on_cpu, mesh, rules, heads, kv_heads, window):
    layout = Layout(mesh, rules)
    arrays, segments = inputs(heads, kv_heads, rows=4), segments_of(4)
    config = configured(heads, kv_heads, window, "splash")
    split = outputs_and_gradients(config, layout, layout.shard_batch(arrays), layout.shard_batch(segments))
    whole = outputs_and_gradients(dataclasses.replace(config, attention="xla"), None, arrays, segments)
    for ours, theirs in zip(split, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_a_kernel_under_a_mesh_gathers_neither_rows_nor_heads(splash_on_cpu, mesh):
    layout = Layout(mesh)
    arrays, segments = inputs(4, 2, rows=8), segments_of(8)
    places = [layout.sharding(("batch", None, name, None)) for name in ("heads", "kv_heads", "kv_heads", "heads")]
    compiled = outputs_and_gradients.lower(
        configured(4, 2, 0, "splash"), layout, jax.device_put(arrays, places), layout.shard_batch(segments)
    ).compile()
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text() or "")


# Through the decoder


def decoder_pass(config: ModelConfig, layout: Layout | None, params, tokens, segments):
    """Hidden states, and gradients of the parameters of a loss over the tokens of documents."""
    starts = np.concatenate([np.zeros_like(segments[:, :1]), np.diff(segments) != 0], axis=1)
    places = np.arange(TIME, dtype=np.int32)
    positions = places - np.maximum.accumulate(starts * places, axis=1)

    def loss(params, tokens, segments):
        hidden, _ = decoder.apply(config, params, {}, tokens, jnp.asarray(positions), segments, layout=layout)
        kept = jnp.where((segments > 0)[..., None], hidden, 0.0)
        return jnp.sum(jnp.sin(kept)), kept

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tokens, segments)
    return jax.tree.map(np.asarray, (hidden, gradients))


@pytest.mark.slow
def test_the_decoder_under_a_mesh_computes_the_same_with_splash(splash_on_cpu, mesh):
    config = dataclasses.replace(configured(4, 2, 9, "splash"), remat="full")
    plain = dataclasses.replace(config, attention="xla", remat="none")
    params, segments = parameters(config), segments_of(4)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, segments.shape).astype(np.int32)
    ours = decoder_pass(config, Layout(mesh), params, tokens, segments)
    theirs = decoder_pass(plain, None, params, tokens, segments)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-3, atol=2e-3 * max(np.abs(right).max(), 1e-3))


# Which kernel


@pytest.mark.parametrize(
    ("platform", "changes", "time", "expected"),
    [
        ("cpu", {}, 256, "xla"),
        ("tpu", {}, 256, "splash"),
        ("tpu", {"windows": (7, 7)}, 256, "splash"),
        ("tpu", {"windows": (7, 9)}, 256, "xla"),
        ("tpu", {"windows": (7, 0)}, 256, "xla"),
        ("tpu", {"windows": (256, 0)}, 256, "splash"),  # wider than the row: no window
        ("tpu", {}, 200, "xla"),
        ("tpu", {"attention": "xla"}, 256, "xla"),
        ("gpu", {}, 256, "cudnn"),
        ("gpu", {"compute_dtype": "float32"}, 256, "xla"),
        ("gpu", {"head_dim": 12}, 256, "xla"),
        ("gpu", {"head_dim": 256}, 256, "xla"),
        ("gpu", {"windows": (7, 9)}, 256, "xla"),
        ("gpu", {"windows": (7, 7)}, 256, "cudnn"),
        ("gpu", {}, 255, "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_where_it_is_supported(monkeypatch, platform, changes, time, expected):
    pretend(monkeypatch, platform)
    assert backends.choose_backend(dataclasses.replace(BF16, **changes), time, None) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [("7.5", "xla"), ("8.0", "cudnn"), ("10.3", "cudnn"), ("gfx90a", "xla")]
)
def test_auto_keeps_cudnn_from_gpus_without_its_kernel(monkeypatch, capability, expected):
    pretend(monkeypatch, "gpu", capability)
    assert backends.choose_backend(BF16, 256, None) == expected


def test_the_platform_is_that_of_the_mesh(monkeypatch, mesh):
    # A program compiled ahead of time for devices that are elsewhere takes their kernel, not that of this machine.
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="tpu")])
    assert backends.choose_backend(BF16, 256, None) == "splash"
    assert backends.choose_backend(BF16, 256, Layout(mesh)) == "xla"


@pytest.mark.parametrize(
    ("platform", "changes", "time", "message"),
    [
        (
            "cpu",
            {"attention": "splash"},
            256,
            "'splash' cannot be used: it runs on tpu, the devices are cpu; set model",
        ),
        ("tpu", {"attention": "cudnn"}, 256, "'cudnn' cannot be used: it runs on gpu, the devices are tpu"),
        ("tpu", {"attention": "splash"}, 300, "rows of 300 tokens are no multiple of 128; make them 256 or 384"),
        ("tpu", {"attention": "splash"}, 60, "no multiple of 128; make them 128 tokens"),
        ("tpu", {"attention": "splash", "windows": (7, 0)}, 256, r"windows=\(7, 0\) differ between layers"),
        ("gpu", {"attention": "cudnn", "windows": (7, 0)}, 256, r"windows=\(7, 0\) differ between layers"),
        ("gpu", {"attention": "cudnn", "compute_dtype": "float32"}, 256, "compute_dtype=float32.*=bfloat16"),
        ("gpu", {"attention": "cudnn", "head_dim": 20}, 256, "head_dim=20, it takes multiples of 8 up to 128"),
        ("gpu", {"attention": "cudnn"}, 255, "rows of 255 tokens.*make them 256 tokens"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_an_error(monkeypatch, platform, changes, time, message):
    pretend(monkeypatch, platform)
    with pytest.raises(ValueError, match=message):
        backends.choose_backend(dataclasses.replace(BF16, **changes), time, None)


def test_an_old_gpu_is_named_by_its_capability(monkeypatch):
    pretend(monkeypatch, "gpu", "7.5")
    with pytest.raises(ValueError, match=r"compute capability is 7.5, it needs 8.0; set model.attention=xla"):
        backends.choose_backend(dataclasses.replace(BF16, attention="cudnn"), 256, None)


def test_windows_that_differ_are_refused_where_the_layer_is_not_known():
    config = dataclasses.replace(CONFIG, windows=(7, 0))
    with pytest.raises(ValueError, match=r"windows=\(7, 0\) differ between layers; give attention.attend"):
        outputs_and_gradients(config, None, inputs(4, 2), segments_of())


def test_a_choice_is_logged_once_for_each_reason(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    backends._log_once.cache_clear()
    pretend(monkeypatch, "tpu")
    for time in (256, 512, 200, 200, 256):
        backends.choose_backend(CONFIG, time, None)
    assert [line.split(" by ")[1] for line in lines] == [
        "splash (runs on tpu)",
        "xla (not splash: rows of 200 tokens are no multiple of 128; make them 128 or 256 tokens long)",
    ]


# cuDNN


@pytest.mark.parametrize("under_a_mesh", [False, True])
def test_cudnn_gets_the_packed_mask_forward_and_backward(monkeypatch, mesh, under_a_mesh):
    """Lowered for CUDA, without a GPU: both calls must be the ones with a bias, and the bias an operand of theirs."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason="JAX moved its cuDNN lowering")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    pretend(monkeypatch, "gpu")
    layout, rows = (Layout(mesh), 8) if under_a_mesh else (None, 2)
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs(4, 2, rows=rows)]
    text = (
        outputs_and_gradients.trace(
            dataclasses.replace(configured(4, 2, 7, "cudnn"), compute_dtype="bfloat16"),
            layout, arrays, jax.ShapeDtypeStruct((rows, TIME), jnp.int32),
        )
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )  # fmt: skip
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(([^)]*)\).* : \(([^)]*)\) ->", text)
    assert [name for name, _, _ in calls] == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    # Queries, keys, values, bias; and backward: those three, statistics, cotangent, bias, output.
    (_, forward, forward_types), (_, backward, backward_types) = calls
    bias = f"tensor<{2 if under_a_mesh else rows}x1x{TIME}x{TIME}xbf16>"
    assert forward_types.split(", ")[3] == backward_types.split(", ")[5] == bias
    if not under_a_mesh:  # under a mesh the two calls lie in two functions
        assert forward.split(", ")[3] == backward.split(", ")[5]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention runs on an NVIDIA GPU only")
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 2, 0), (4, 1, 0), (4, 2, 7)])
def test_cudnn_packed_equals_each_document_alone(heads, kv_heads, window):
    config = dataclasses.replace(configured(heads, kv_heads, window, "cudnn", dim=64), compute_dtype="bfloat16")
    arrays, segments = [jnp.asarray(x, jnp.bfloat16) for x in inputs(heads, kv_heads, dim=64)], segments_of()
    results = outputs_and_gradients(config, None, arrays, segments)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in results)
    expect_each_document_alone(results, arrays, segments, window, rtol=0.05, atol=0.05)
    inside = (segments == 2)[..., None, None]
    others = [jnp.where(inside, 5 - x, x) for x in arrays]
    changed = outputs_and_gradients(config, None, others, segments)[0]
    expect_equal_outside(inside, results[0], changed)
