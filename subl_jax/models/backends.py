"""Attention over whole (packed) documents by the kernel that fits the device: XLA, cuDNN or splash, behind one function.

Queries, keys, values and the document of each token come in, values come out. Every backend sees packed documents
apart: a kernel that could not would leak one conversation into the next.

    xla     everywhere, any shape. Holds the scores of every head, [batch, heads, time, time] in float32.
    cudnn   GPU. Takes no segment ids: the packed mask goes in as a bias [batch, 1, time, time], which forward and
            backward kernel both add to the scores. Its backward pass adds in no fixed order, unless XLA runs with
            --xla_gpu_deterministic_ops: two runs then differ in the last bits.
    splash  TPU. Takes segment ids and never holds a mask or scores of the whole row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from subl_jax.models import attention
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device
from subl_jax.parallel.layout import Layout

Kernel = Literal["xla", "cudnn", "splash"]

# What each kernel but XLA's runs on, as JAX calls it.
_PLATFORMS: Mapping[str, str] = {"cudnn": "gpu", "splash": "tpu"}

# Splash works in tiles of the TPU's 128 lanes; longer tiles take fewer steps and fit its memory up to here.
_LANES = 128
_SPLASH_BLOCKS = (512, 384, 256, 128)

# The widest head that cuDNN's backward pass takes on every generation of GPU that it runs on (Ampere, 8.0, and later).
_CUDNN_HEAD_DIM = 128
_CUDNN_CAPABILITY = 8


def choose_backend(config: ModelConfig, time: int, layout: Layout | None) -> Kernel:
    """The backend for rows of `time` tokens: the one that `config.attention` names, or the best that is correct.

    `auto` takes the kernel of the platform where it supports the model and the row, and XLA otherwise. The choice and
    its reason are logged, once each.

    Raises:
      ValueError: a kernel that is named and cannot be used: it is never replaced silently.
    """
    if config.attention == "xla":
        return _chosen("xla", "named by model.attention")
    platform = _device(layout).platform
    if config.attention == "auto":
        kernel = next((name for name, runs_on in _PLATFORMS.items() if runs_on == platform), None)
        if kernel is None:
            return _chosen("xla", f"no other kernel runs on {platform}")
        obstacle = _obstacle(kernel, config, time, layout)
        return _chosen("xla", f"not {kernel}: {obstacle}") if obstacle else _chosen(kernel, f"runs on {platform}")
    obstacle = _obstacle(config.attention, config, time, layout)
    if obstacle:
        raise ValueError(
            f"model.attention={config.attention!r} cannot be used: {obstacle}; or set model.attention=auto"
        )
    return _chosen(config.attention, "named by model.attention")


def attend_documents(
    queries: Float[Array, "batch time heads dim"],
    keys: Float[Array, "batch time kv_heads dim"],
    values: Float[Array, "batch time kv_heads dim"],
    segments: Int[Array, "batch time"],
    config: ModelConfig,
    layout: Layout | None,
) -> Float[Array, "batch time heads dim"]:
    """Causal attention inside each packed document (0: padding, which sees padding), by the chosen backend.

    Scores are scaled by dim**-0.5 and the softmax runs in float32, whatever the backend.

    Raises:
      ValueError: see `choose_backend`; or windows that differ between layers, since this function is not told which
        layer it serves: `attention.attend` takes any mask.
    """
    time = segments.shape[1]
    kernel = choose_backend(config, time, layout)
    window = _window(config, time)
    if window is None:
        raise ValueError(f"model.windows={config.windows} differ between layers; give attention.attend a layer's mask")
    if kernel == "splash":
        # Interpreted where there is no TPU, which only tests ask for.
        interpret = _device(layout).platform != "tpu"
        return _on_mesh(functools.partial(_splash, window=window, interpret=interpret), layout)(
            queries, keys, values, segments
        )
    if kernel == "cudnn":
        return _on_mesh(functools.partial(_cudnn, window=window), layout)(queries, keys, values, segments)
    return attention.attend(queries, keys, values, _mask(segments, window))


def _obstacle(kernel: str, config: ModelConfig, time: int, layout: Layout | None) -> str | None:
    """Why a kernel cannot run this model on rows of `time` tokens, with a remedy; None where it can."""
    device = _device(layout)
    if device.platform != _PLATFORMS[kernel]:
        return f"it runs on {_PLATFORMS[kernel]}, the devices are {device.platform}; set model.attention=xla"
    if _window(config, time) is None:
        return (
            f"model.windows={config.windows} differ between layers, and it takes one window for all of them; "
            "set model.attention=xla"
        )
    if kernel == "splash":
        if time % _LANES:
            down = time // _LANES * _LANES
            nearest = f"{down} or {down + _LANES}" if down else f"{_LANES}"
            return f"rows of {time} tokens are no multiple of {_LANES}; make them {nearest} tokens long"
        return None
    capability = str(getattr(device, "compute_capability", "unknown"))
    generation = capability.split(".")[0]
    if not generation.isdigit() or int(generation) < _CUDNN_CAPABILITY:
        return f"the GPU's compute capability is {capability}, it needs {_CUDNN_CAPABILITY}.0; set model.attention=xla"
    if config.compute_dtype != "bfloat16":
        return f"model.compute_dtype={config.compute_dtype}, it computes in bfloat16; set model.compute_dtype=bfloat16"
    if config.head_dim > _CUDNN_HEAD_DIM or config.head_dim % 8:
        return (
            f"model.head_dim={config.head_dim}, it takes multiples of 8 up to {_CUDNN_HEAD_DIM}; "
            "set model.attention=xla"
        )
    if time % 2:
        return f"rows of {time} tokens, with a mask it takes even lengths only; make them {time + 1} tokens long"
    return None


def _device(layout: Layout | None) -> Device:
    """One of the devices that the program is for."""
    return jax.devices()[0] if layout is None else layout.device


def _chosen(kernel: str, reason: str) -> Kernel:
    """Logs a choice the first time that it is made for this reason."""
    _log_once(kernel, reason)
    return cast(Kernel, kernel)


@functools.cache
def _log_once(kernel: str, reason: str) -> None:
    logging.info("attention over whole documents by %s (%s)", kernel, reason)


def _window(config: ModelConfig, time: int) -> int | None:
    """The one window of all layers, 0 where it hides nothing of a row of `time` tokens; None if layers differ."""
    windows = {window if window < time else 0 for window in config.windows} or {0}
    return windows.pop() if len(windows) == 1 else None


def _mask(segments: Int[Array, "batch time"], window: int) -> Bool[Array, "batch time time"]:
    """The packed mask, inside one window for all layers."""
    places = jnp.arange(segments.shape[1])
    return attention.packed_mask(segments) & attention.within(window, places[:, None] - places)


def _on_mesh(kernel: Callable[..., Array], layout: Layout | None) -> Callable[..., Array]:
    """Runs a kernel on each device's rows and heads. Left to itself, XLA would gather both: it cannot split a kernel."""
    if layout is None:
        return kernel
    rows_and_heads = layout.spec(("batch", None, "heads", None))
    parts = layout.split("heads")

    def split(
        queries: Float[Array, "batch time heads dim"],
        keys: Float[Array, "batch time kv_heads dim"],
        values: Float[Array, "batch time kv_heads dim"],
        segments: Int[Array, "batch time"],
    ) -> Float[Array, "batch time heads dim"]:
        # Each device needs the key/value heads of its query heads. Where there are fewer of them than devices, or they
        # do not divide, the fewest copies that do; the gradients of copies are summed.
        kv_heads = keys.shape[2]
        copies = math.lcm(kv_heads, parts) // kv_heads
        if copies > 1:
            keys, values = (jnp.repeat(x, copies, axis=2) for x in (keys, values))
        # check_vma: kernels do not say over which axes their results vary.
        return jax.shard_map(
            kernel,
            mesh=layout.mesh,
            in_specs=(rows_and_heads, rows_and_heads, rows_and_heads, layout.spec(("batch", None))),
            out_specs=rows_and_heads,
            check_vma=False,
        )(queries, keys, values, segments)

    return split


def _splash(
    queries: Float[Array, "batch time heads dim"],
    keys: Float[Array, "batch time kv_heads dim"],
    values: Float[Array, "batch time kv_heads dim"],
    segments: Int[Array, "batch time"],
    *,
    window: int,
    interpret: bool,
) -> Float[Array, "batch time heads dim"]:
    """Splash attention, in float32 softmax. It does not scale the scores: its queries come scaled, in their own dtype.

    That rounds bfloat16 queries once more where dim is no power of 4 (128: by 2**-9 at most, as any bfloat16 product).
    """
    # Pallas is slow to import, and no other backend needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, time, heads, dim = queries.shape
    block = next(size for size in _SPLASH_BLOCKS if time % size == 0)
    shape = (time, time)
    # A query sees `window - 1` tokens to its left and itself.
    one_head = splash.LocalMask(shape, (window - 1, 0), offset=0) if window else splash.CausalMask(shape)
    kernel: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([one_head] * heads),
        # Separate backward kernels for queries and for keys: the fused one holds the queries' gradient once per block
        # of keys, in the dtype of the queries.
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        interpret=interpret,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (queries * dim**-0.5, keys, values))  # [batch, heads, time, dim]
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments)), 1, 2)


def _cudnn(
    queries: Float[Array, "batch time heads dim"],
    keys: Float[Array, "batch time kv_heads dim"],
    values: Float[Array, "batch time kv_heads dim"],
    segments: Int[Array, "batch time"],
    *,
    window: int,
) -> Float[Array, "batch time heads dim"]:
    """Fused attention by cuDNN, with the packed mask as a bias [batch, 1, time, time] that all heads share.

    JAX turns the mask into 0 and -2e12 in the dtype of the queries: a key that is not seen weighs exactly 0. Every token
    sees itself, so that no row of the softmax is empty.
    """
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=_mask(segments, window)[:, None], implementation="cudnn"
    )
