"""The compiled programs of a rollout, and where they run: one replica per device, or one per group of devices.

A replica decodes to its own stop. On one device each, replicas are mapped by `jax.pmap`; a model that exceeds a device is
split over `tensor` devices, and the same functions are mapped by `jax.shard_map` over the groups. Everything is compiled
ahead, in a bounded number of programs, and every compilation is recorded.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from subl_jax.models import axes, decoder
from subl_jax.models.cache import Cache, empty_cache
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device, data_mesh, replicate
from subl_jax.parallel.layout import MESH_AXES, Layout
from subl_jax.rollout import device
from subl_jax.rollout.device import Copies, Prefill, Report, Slots, Turns
from subl_jax.rollout.sampling import SamplingConfig, check_vocabulary
from subl_jax.rollout.stops import StopAutomaton

# Passes of one prefill program; more new tokens than they hold are fed by calling it again.
PASSES = 8
# Shared prefixes that each replica keeps.
KEPT = 4


# Of each set of devices the policy that was loaded last: the arrays it came from, and what the programs read.
_LOADED: dict[Any, tuple[tuple[weakref.ref, ...], Any]] = {}


def bytes_to_load(params: decoder.Params, devices: Sequence[Device], tensor: int) -> float:
    """By how much the use of a device's memory will grow when these parameters are loaded; below 0 where others make room."""
    leaves = jax.tree.leaves(params)
    known, loaded = _LOADED.get((tuple(devices), len(devices) // tensor), ((), None))
    if len(known) == len(leaves) and all(ref() is leaf for ref, leaf in zip(known, leaves, strict=True)):
        return 0
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    return (sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) - held) / tensor


class Compilation(NamedTuple):
    """One program that was compiled, and how long that took."""

    program: str
    seconds: float


class Programs:
    """What the engine calls; every array has the replicas as its leading dimension, parameters excepted.

    Attributes:
      config, sampling: of the policy.
      replicas: decode loops that run side by side.
      device_kind: as JAX names it.
      compilations: every program compiled so far. Loading other weights adds none.
    """

    def __init__(
        self, config: ModelConfig, sampling: SamplingConfig, devices: Sequence[Device], tensor: int = 1
    ) -> None:
        """Sets up placement; programs are compiled by `prepare`.

        Raises:
          ValueError: devices that do not divide into groups of `tensor`, or an option that the model cannot follow.
          LayoutError: a model whose dimensions do not split over `tensor` devices.
        """
        check_vocabulary(sampling, config.vocab_size)
        if len(devices) % tensor:
            raise ValueError(
                f"rollouts over {len(devices)} devices with tensor={tensor} leave some without work; "
                f"use a tensor that divides {len(devices)}"
            )
        self.config, self.sampling = config, sampling
        self.replicas = len(devices) // tensor
        self.compilations: list[Compilation] = []
        self.device_kind = str(devices[0].device_kind)
        self._devices = tuple(devices)
        self._layout: Layout | None = None
        if tensor > 1:
            grid = np.asarray(devices, dtype=object).reshape(self.replicas, 1, tensor)
            mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
            self._layout = Layout(mesh, "rollout", inside=True)
            axes.check_layout(config, self._layout)
        self._compiled: dict[str, Any] = {}
        self._unstack = jax.jit(functools.partial(decoder.unstack, config))
        self._make_slots = self._maker(lambda: device.empty_slots(config, sampling))
        self._make_kept = self._maker(lambda: empty_cache(config, KEPT, sampling.context))

    # --- Placement ----------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tokens per row of the prefill programs, the larger first: a tool's short answer need not fill a long row."""
        long = self.sampling.prefill_chunk
        return (long, long // 4) if long >= 64 else (long,)

    @property
    def rows(self) -> int:
        """Rows of a prefill pass."""
        return min(self.sampling.prefill_rows, self.sampling.slots)

    def load(self, params: decoder.Params) -> Any:
        """Puts a policy where the programs read it: unstacked, once on every replica.

        The arrays of the last call are there already, for as long as the caller keeps them.
        """
        leaves, key = jax.tree.leaves(params), (self._devices, self.replicas)
        known, loaded = _LOADED.get(key, ((), None))
        if len(known) == len(leaves) and all(ref() is leaf for ref, leaf in zip(known, leaves, strict=True)):
            return loaded
        _LOADED.pop(key, None)  # before the next ones take its place on the devices
        if self._layout is None:
            placed = replicate(params, self._devices)
        else:
            placed = axes.place(params, self.config, Layout(self._layout.mesh, self._layout.rules))
        unstacked = self._unstack(placed)

        def forget(ref: weakref.ref) -> None:
            if any(ref is own for own in _LOADED.get(key, ((), None))[0]):
                del _LOADED[key]

        if all(isinstance(leaf, jax.Array) for leaf in leaves):  # others may be changed in place
            _LOADED[key] = tuple(weakref.ref(leaf, forget) for leaf in leaves), unstacked
        return unstacked

    def _maker(self, build: Callable[[], Any]) -> Callable[[], Any]:
        """A program that makes the arrays of every replica where they live."""
        if self._layout is None:
            mapped, counted = jax.pmap(lambda _: build(), devices=self._devices), np.zeros(self.replicas)
            return lambda: mapped(counted)
        mesh = self._layout.mesh

        def spread(shape: jax.ShapeDtypeStruct) -> NamedSharding:
            heads = len(shape.shape) == 4  # keys and values: [slots, kv_heads, …]
            return NamedSharding(mesh, P("data", None, "tensor") if heads else P("data"))

        def stacked() -> Any:
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.replicas, *leaf.shape)), build())

        return jax.jit(stacked, out_shardings=jax.tree.map(spread, jax.eval_shape(build)))

    def slots(self) -> Slots:
        """One group of empty slots per replica."""
        return self._make_slots()

    def kept(self) -> Cache:
        """Room for the shared prefixes of every replica."""
        return self._make_kept()

    # --- Programs -----------------------------------------------------------------------------------------------------

    def _map(self, function: Callable[..., Any], whole: int, count: int, donated: tuple[int, ...]) -> Any:
        """`function` of `count` arguments on every replica; the first `whole` of them are the same for all."""
        if self._layout is None:
            in_axes = (None,) * whole + (0,) * (count - whole)
            return jax.pmap(function, in_axes=in_axes, donate_argnums=donated, devices=self._devices)

        def one(*arguments: Any) -> Any:
            own = jax.tree.map(lambda leaf: leaf[0], arguments[whole:])
            return jax.tree.map(lambda leaf: leaf[None], function(*arguments[:whole], *own))

        mapped = jax.shard_map(
            one,
            mesh=self._layout.mesh,
            in_specs=(P(),) * whole + (P("data"),) * (count - whole),
            out_specs=P("data"),
            axis_names={"data", "fsdp"},
            check_vma=False,  # the loops' conditions differ between replicas, which is the point
        )
        return jax.jit(mapped, donate_argnums=donated)

    def missing(self, automaton: StopAutomaton) -> bool:
        """Whether a program that a run needs is not compiled yet."""
        wanted = [f"prefill {chunk}" for chunk in self.chunks] + ["copy prefixes", _decode_name(automaton)]
        return any(name not in self._compiled for name in wanted)

    def _call(self, name: str, function: Callable[..., Any], whole: int, donated: tuple[int, ...], *arguments: Any):
        """Runs a program, compiled at its first use."""
        program = self._compiled.get(name)
        if program is None:
            began = time.perf_counter()
            program = self._map(function, whole, len(arguments), donated).lower(*arguments).compile()
            self.compilations.append(Compilation(name, time.perf_counter() - began))
            self._compiled[name] = program
            logging.info("compiled %s in %.1f s", *self.compilations[-1])
        return program(*arguments)

    def prefill(self, params: Any, state: Slots, request: Prefill) -> tuple[Slots, Array]:
        """See `device.prefill`; one program per length of chunk."""

        def prefill(params: Any, state: Slots, request: Prefill) -> tuple[Slots, Array]:
            return device.prefill(self.config, self._layout, params, state, request)

        return self._call(f"prefill {request.tokens.shape[-1]}", prefill, 1, (1,), params, state, request)

    def copy_prefixes(self, state: Slots, kept: Cache, request: Copies) -> tuple[Slots, Cache]:
        """See `device.copy_prefixes`."""

        def copy(state: Slots, kept: Cache, request: Copies) -> tuple[Slots, Cache]:
            return device.copy_prefixes(state, kept, request)

        return self._call("copy prefixes", copy, 0, (0, 1), state, kept, request)

    def decode(self, params: Any, automaton: StopAutomaton, state: Slots, request: Turns) -> tuple[Slots, Report]:
        """See `device.decode`."""

        def decode(params: Any, automaton: StopAutomaton, state: Slots, request: Turns) -> tuple[Slots, Report]:
            return device.decode(self.config, self.sampling, self._layout, params, automaton, state, request)

        return self._call(_decode_name(automaton), decode, 2, (2,), params, automaton, state, request)

    def place(self, automaton: StopAutomaton) -> StopAutomaton:
        """The automaton on every device."""
        mesh = data_mesh(self._devices) if self._layout is None else self._layout.mesh
        return jax.device_put(automaton, NamedSharding(mesh, P()))

    def text(self, name: str) -> str:
        """The compiled program, as XLA prints it."""
        return self._compiled[name].as_text()


def _decode_name(automaton: StopAutomaton) -> str:
    # The automaton's size is part of the program.
    return f"decode, {automaton.table.shape[0]} stop states"


@functools.lru_cache(maxsize=16)
def programs(config: ModelConfig, sampling: SamplingConfig, devices: tuple[Device, ...], tensor: int = 1) -> Programs:
    """The programs of a model; later calls for the same one compile nothing."""
    return Programs(config, sampling, devices, tensor)
