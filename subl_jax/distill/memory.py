"""Bytes that one device holds during a training step, told from shapes alone: no weights, and no devices.

Abstract models and a layout on a mesh (abstract or not) go in; bytes by kind come out. What the step keeps between calls
is exact; what it needs while it runs is a rough figure whose formula stands at its function.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax.distill import fused
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import make_optimizer
from subl_jax.distill.step import Layouts, TrainState, state_shardings
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout, bytes_per_device


class AbstractModel(NamedTuple):
    """A model without values: its shape, its weights (in `param_dtype`) and its adapters (in float32; perhaps none)."""

    config: ModelConfig
    weights: Any
    adapters: Any


@functools.cache
def abstract_model(config: ModelConfig) -> AbstractModel:
    """The shapes and dtypes of a model's parameters; nothing is allocated, whatever its size."""
    params: Any = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    adapters, weights = lora.split(params)
    return AbstractModel(config, _in_dtype(weights, config.param_dtype), adapters)


def _in_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def total_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or abstract arrays that is held whole."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(
    model: AbstractModel,
    teacher: AbstractModel | None,
    objective: Objective,
    train: TrainConfig,
    layouts: Layouts,
    row_tokens: int,
    loss_tokens: int,
) -> dict[str, int]:
    """Bytes on one device during a step, by kind.

    Exact, each role a copy of its own: `teacher`, `base` (what `anchor` pins to), `frozen` (what adapters sit on),
    `trained` (the master copy), `optimizer`, `gradients` (one copy). Rough: `activations` (`activation_bytes` of the
    student and one layer at work), `gathered` (see `gathered_bytes`), `loss` (see `loss_bytes`). Tokens are those of one
    accumulated part of a step.

    Args:
      model: what is trained: its adapters where it has some, else its weights.
      teacher: for `forward_kl`.
      objective, train: of the run.
      layouts: student's and teacher's, both given.
      row_tokens: tokens per row.
      loss_tokens: per step, over all devices.

    Raises:
      LayoutError: a dimension of a model, or the rows of a batch, do not split over the mesh.
    """
    layout, teacher_layout = layouts
    assert layout is not None and teacher_layout is not None
    parts = [(model, layout), *([(teacher, teacher_layout)] if teacher is not None else [])]
    for part, where in parts:
        axes.check_layout(part.config, where)
        where.check("batch", train.batch_rows, "rows of a batch", "set --config.<stage>.train.batch_rows")
    adapted = model.config.lora is not None
    state = abstract_state(model.adapters if adapted else model.weights, train, layout)
    frozen = bytes_per_device(axes.abstract(model.weights, layout))
    rows = -(-train.batch_rows // train.accumulate) // layout.split("batch")
    at_work = max(layer_bytes(part.config, where, row_tokens) for part, where in parts)
    return {
        "teacher": sum(
            bytes_per_device(axes.abstract(tree, where))
            for part, where in parts[1:]
            for tree in (part.weights, part.adapters)
        ),
        "base": frozen if objective.logit_filter == "anchor" else 0,
        "frozen": frozen if adapted else 0,
        "trained": bytes_per_device(state.params),
        "optimizer": bytes_per_device((state.opt_state, state.step)),
        "gradients": bytes_per_device(state.params),
        "activations": rows * row_tokens * (activation_bytes(model.config, layout, row_tokens) + at_work),
        "gathered": max(gathered_bytes(part, where) for part, where in parts),
        "loss": loss_bytes(model, teacher, objective, train, layouts, -(-loss_tokens // train.accumulate)),
    }


def loss_bytes(
    model: AbstractModel,
    teacher: AbstractModel | None,
    objective: Objective,
    train: TrainConfig,
    layouts: Layouts,
    loss_tokens: int,
) -> int:
    """What the fused loss holds on one device besides the heads.

    With V ids and T loss tokens of a device, C of them in a chunk, e bytes per element of the compute dtype:

        3 C V 4                      logits of student and teacher, and their gradient (`fused.CHUNK_ARRAYS`)
        V d_s 4                      the sum of the head's gradient, where the head is trained (V rank 4 of its adapter)
        T (2 d_s + d_t + d_base) e   hidden states of the loss tokens, and the gradient of the student's
    """
    place, config = layouts.loss, model.config
    assert place is not None
    vocab, tokens = config.vocab_size // place.parts, -(-loss_tokens // place.groups)
    chunk = fused.chunk_tokens(tokens, vocab, train.chunk_tokens, fused.UNKNOWN_MEMORY)
    width = 2 * config.d_model + (config.d_model if objective.logit_filter == "anchor" else 0)
    hidden = width * _element(config) + (0 if teacher is None else teacher.config.d_model * _element(teacher.config))
    trained = config.d_model if config.lora is None else config.lora.rank * config.adapts_head
    return fused.CHUNK_ARRAYS * 4 * chunk * vocab + 4 * vocab * trained + tokens * hidden


def abstract_state(params: Any, train: TrainConfig, layout: Layout) -> TrainState:
    """The training state without values, and where each of its arrays would lie."""
    transformation = make_optimizer(train.optimizer, train.steps)
    params = _in_dtype(params, train.master_dtype)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(transformation.init, params), step)
    where = state_shardings(transformation, state, layout)
    return jax.tree.map(lambda leaf, on: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on), state, where)


def activation_bytes(config: ModelConfig, layout: Layout, row_tokens: int) -> int:
    """What is kept of one token for the backward pass: layers x bytes per token, by `config.remat`.

    With e bytes per element of the compute dtype; h, kv and f the widths of queries, of keys and of the MLP, each divided by
    the devices that it is split over; s = 8 heads x row tokens where scores are held (see `holds_scores`):

        full    d e                                         a layer's input
        dots    (3 d + h + 2 kv + 2 f) e                    and the results of its matrix products
        none    (4 d + 3 h + 3 kv + 4 f) e + 8 d + s        and everything between them, norms in float32

    Against the step compiled for CPU (8 layers of width 256, float32) these are 0.83, 0.84 and 0.95 of what a layer adds.
    """
    element, (width, heads, kv_heads, mlp) = _element(config), _widths(config, layout)
    kept = {
        "full": width * element,
        "dots": (3 * width + heads + 2 * kv_heads + 2 * mlp) * element,
        "none": layer_bytes(config, layout, row_tokens),
    }
    return config.num_layers * kept[config.remat]


def layer_bytes(config: ModelConfig, layout: Layout, row_tokens: int) -> int:
    """Bytes per token of everything inside one layer, as it is computed or, under remat, computed again."""
    element, (width, heads, kv_heads, mlp) = _element(config), _widths(config, layout)
    scores = 8 * config.num_heads // layout.split("heads") * row_tokens if holds_scores(config) else 0
    return (4 * width + 3 * heads + 3 * kv_heads + 4 * mlp) * element + 8 * width + scores


def holds_scores(config: ModelConfig) -> bool:
    """Whether attention is taken to hold the scores and probabilities of whole rows in float32: XLA's does.

    `auto` falls back to it on a CPU, and on a GPU in float32; in bfloat16 an accelerator's kernel is assumed.
    """
    return config.attention == "xla" or (config.attention == "auto" and config.compute_dtype != "bfloat16")


def _element(config: ModelConfig) -> int:
    return jnp.dtype(config.compute_dtype).itemsize


def _widths(config: ModelConfig, layout: Layout) -> tuple[int, int, int, int]:
    return (
        config.d_model,
        config.num_heads * config.head_dim // layout.split("heads"),
        config.num_kv_heads * config.head_dim // layout.split("kv_heads"),
        config.d_ff // layout.split("mlp"),
    )


def gathered_bytes(model: AbstractModel, layout: Layout) -> int:
    """Weights collected over fsdp where they are used, in the compute dtype: the larger of one layer and the head.

    Under tensor parallelism a device collects its part of them. 0 where no weight is split over fsdp.
    """
    times, config = layout.split("embed"), model.config
    if times == 1:
        return 0
    layers = _in_dtype({"layers": model.weights["layers"]}, config.compute_dtype)
    layer = bytes_per_device(axes.abstract(layers, layout)) * times // config.num_layers
    head = config.vocab_size // layout.split("vocab") * config.d_model * _element(config)
    return max(layer, head)
