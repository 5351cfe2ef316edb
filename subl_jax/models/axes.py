"""The dimensions of every parameter by name, and where they therefore lie under a layout.

Parameter trees come in, trees of shardings come out. The names are resolved by the one table in `parallel.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import put
from subl_jax.parallel.layout import Layout

# (input, output) of each matrix of a layer.
_MATRICES: Mapping[str, tuple[str, str]] = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


def names_of(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """The names of a parameter's dimensions, layers first; norms and the rank of adapters have none (kept whole)."""
    if path == ("embedding",):
        return ("vocab", "embed")
    if path == ("head",):
        return ("embed", "vocab")
    if path[0] == "head_adapter":
        return {"lora_a": ("embed", None), "lora_b": (None, "vocab")}[path[-1]]
    *_, owner, leaf = path
    if leaf == "scale":
        return (None,) if path[0] != "layers" else (None, None)
    source, target = _MATRICES[owner]
    return {
        "kernel": (None, source, target),
        "bias": (None, target),
        "lora_a": (None, source, None),
        "lora_b": (None, None, target),
    }[leaf]


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Refuses a model whose dimensions do not split over the mesh.

    Heads are counted whole: a device holds whole heads, or none of the matrix would be its own.

    Raises:
      LayoutError: names the dimension and the nearest sizes that work.
    """
    layout.check("embed", config.d_model, "d_model", "or another --config.parallel.fsdp")
    layout.check("vocab", config.vocab_size, "vocab_size", "or another --config.parallel.tensor")
    layout.check("heads", config.num_heads, "num_heads", "or another --config.parallel.tensor")
    layout.check("mlp", config.d_ff, "d_ff", "or another --config.parallel.tensor")
    layout.check(
        "kv_heads", config.num_kv_heads, "num_kv_heads",
        "or another --config.parallel.tensor, or the rules kv_replicated, which keep them whole on purpose",
    )  # fmt: skip


def shardings(params: Any, layout: Layout) -> Any:
    """The sharding of every parameter, as a tree like `params` (arrays or abstract arrays)."""
    flat = flatten_dict(params)
    return unflatten_dict({path: layout.sharding(names_of(path)) for path in flat})


def place(params: Any, config: ModelConfig, layout: Layout) -> Any:
    """Puts parameters where the layout wants them.

    Raises:
      LayoutError: see `check_layout`.
    """
    if not params:
        return params
    check_layout(config, layout)
    return put(params, shardings(params, layout))


def abstract(params: Any, layout: Layout | None = None) -> Any:
    """Shapes, dtypes and (under a layout) shardings of parameters, without values."""
    where: Any = None if layout is None else flatten_dict(shardings(params, layout))

    def leaf(path: tuple[str, ...], value: Any) -> jax.ShapeDtypeStruct:
        sharding: NamedSharding | None = None if where is None else where[path]
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return unflatten_dict({path: leaf(path, value) for path, value in flatten_dict(params).items()})
