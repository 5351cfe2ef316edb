"""The programs of a policy that acts, lowered for devices that need not be here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from subl_jax import metrics
from subl_jax.distill.memory import AbstractModel, abstract_model
from subl_jax.launching.preflight import expected
from subl_jax.launching.preflight.programs import Case, Program
from subl_jax.models import axes, decoder
from subl_jax.models.cache import empty_cache
from subl_jax.parallel.devices import Device
from subl_jax.parallel.layout import Layout, bytes_per_device
from subl_jax.rollout import device
from subl_jax.rollout import programs as rollout_programs
from subl_jax.rollout.device import Copies, Prefill, Turns
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.stops import StopAutomaton

# States of a stop automaton for end-of-turn ids alone.
_STOP_STATES = 2


def programs(case: Case, devices: Sequence[Device], role: str = "teacher") -> list[Program]:
    """The programs of a policy that acts: decode, prefill of either length of chunk, and the copying of prefixes.

    Loops of decode and prefill go on as long as the host says: their figures are those of one step, of one pass.

    Raises:
      LayoutError: a model that does not split over `case.tensor` devices.
      ValueError: devices that do not divide into replicas.
    """
    config, sampling = {"teacher": case.teacher, "student": case.student}[role], case.sampling
    config = dataclasses.replace(config, lora=None)
    mapped = rollout_programs.Programs(config, sampling, devices, case.tensor)
    layout, replicas = mapped._layout, mapped.replicas
    if layout is None:
        # `pmap` compiles for devices that can run. One replica's program is the same on each of them: it is compiled for one.
        devices, replicas = devices[:1], 1
    model = abstract_model(config)
    arguments = _Arguments(mapped, layout, devices)
    params = arguments.params(model)
    slots = arguments.mapped(functools.partial(device.empty_slots, config, sampling))
    kept = arguments.mapped(lambda: empty_cache(config, rollout_programs.KEPT, sampling.context))
    automaton = arguments.whole(
        StopAutomaton(np.zeros((_STOP_STATES, config.vocab_size), np.uint8))  # type: ignore[arg-type]
    )
    held = {
        "weights": bytes_per_device(params),
        "cache": case.groups * bytes_per_device(slots),
        "kept prefixes": bytes_per_device(kept),
    }
    per_token = 2 * (_params(model) + config.d_model * config.vocab_size)
    common = {"mesh": f"{replicas}x1x{case.tensor}", "devices": replicas * case.tensor}
    rows, made = mapped.rows, []

    def add(
        name: str, function: Callable[..., Any], whole: int, donated: tuple[int, ...], given: Any, **rest: Any
    ) -> None:
        # What the program is not given lies beside it: the other groups' slots, the kept prefixes.
        beside = max(sum(held.values()) - sum(bytes_per_device(part) for part in given), 0)

        def lower() -> Any:
            if layout is None:
                return jax.jit(function, donate_argnums=donated).lower(*given)
            return mapped._map(function, whole, len(given), donated).lower(*given)

        made.append(Program(name=f"rollout {name}", lower=lower, held=held, beside=beside, **common, **rest))

    add(
        "decode",
        lambda *given: device.decode(config, sampling, layout, *given),
        2,
        (2,),
        (params, automaton, slots, arguments.mapped(functools.partial(_turns, sampling))),
        flops=per_token * sampling.slots * replicas,
        tokens=sampling.slots * replicas,
        required_bytes=_decode_bytes(model, sampling) / case.tensor,
        terms=expected.decode_terms(config, layout, sampling.slots) if layout is not None else (),
    )
    for chunk in mapped.chunks:
        request = arguments.mapped(functools.partial(_prefill, rows, chunk))
        add(
            f"prefill {chunk}",
            lambda *given: device.prefill(config, layout, *given),
            1,
            (1,),
            (params, slots, request),
            flops=2 * _params(model) * rows * chunk * replicas,
            tokens=rows * chunk * replicas,
            terms=expected.prefill_terms(config, layout, rows, chunk) if layout is not None else (),
        )
    add(
        "copy",
        device.copy_prefixes,
        0,
        (0, 1),
        (slots, kept, arguments.mapped(functools.partial(_copies, sampling))),
        flops=0,
        tokens=0,
        terms=(),
    )
    return made


def _decode_bytes(model: AbstractModel, sampling: SamplingConfig) -> float:
    """Bytes that a decode step reads on all devices of a replica, every slot full: weights (of a table that is no head only
    rows) and cache.
    """
    config, item = model.config, jnp.dtype(model.config.compute_dtype).itemsize
    weights = (_params(model) + config.d_model * config.vocab_size) * jnp.dtype(config.param_dtype).itemsize
    cache = metrics.kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, item)
    return metrics.decode_step_bytes(weights, [sampling.context] * sampling.slots, cache)


def _params(model: AbstractModel) -> int:
    """P of MEASURING's formulas: without embedding and head."""
    return decoder.count_parameters(model.weights)


class _Arguments:
    """Arguments of a rollout's programs without values, lying as `Programs` lays them."""

    def __init__(self, programs: rollout_programs.Programs, layout: Layout | None, devices: Sequence[Device]) -> None:
        self._programs, self._layout = programs, layout
        self._one = SingleDeviceSharding(devices[0])

    def params(self, model: AbstractModel) -> Any:
        """Weights with the layers apart."""
        unstacked = jax.eval_shape(functools.partial(decoder.unstack, model.config), model.weights)
        if self._layout is None:
            return self.whole(unstacked)
        layout = Layout(self._layout.mesh, self._layout.rules)
        stacked = axes.abstract(model.weights, layout)

        def laid(leaf: Any, like: Any) -> jax.ShapeDtypeStruct:
            spec = P(*like.sharding.spec[1:]) if len(leaf.shape) < len(like.shape) else like.sharding.spec
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(layout.mesh, spec))

        layers = tuple(jax.tree.map(laid, own, stacked["layers"]) for own in unstacked["layers"])
        rest = {name: tree for name, tree in stacked.items() if name != "layers"}
        return {**rest, "layers": layers}

    def whole(self, tree: Any) -> Any:
        """The same on every device."""
        where = self._one if self._layout is None else NamedSharding(self._layout.mesh, P())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

    def mapped(self, build: Callable[[], Any]) -> Any:
        """One for each replica, its leading dimension; without a layout the one of a single replica."""
        shapes = jax.eval_shape(build)
        if self._layout is None:
            return self.whole(shapes)
        count, mesh = self._programs.replicas, self._layout.mesh

        def spread(leaf: Any) -> jax.ShapeDtypeStruct:
            heads = len(leaf.shape) == 4  # keys and values: [slots, kv_heads, …], as `Programs` makes them
            spec = P("data", None, "tensor") if heads else P("data")
            return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(spread, shapes)


def _turns(sampling: SamplingConfig) -> Turns:
    some = jnp.zeros((sampling.slots,), jnp.int32)
    one = jnp.zeros((), jnp.int32)
    return Turns(some > 0, some, some, some, some, one, one, one)


def _prefill(rows: int, chunk: int) -> Prefill:
    table = jnp.zeros((rollout_programs.PASSES, rows), jnp.int32)
    return Prefill(jnp.zeros((), jnp.int32), table, table, table, jnp.zeros((*table.shape, chunk), jnp.int32))


def _copies(sampling: SamplingConfig) -> Copies:
    one, saved = jnp.zeros((), jnp.int32), jnp.zeros((rollout_programs.KEPT,), jnp.int32)
    loaded = jnp.zeros((sampling.slots,), jnp.int32)
    return Copies(one, saved, saved, one, loaded, loaded, one)
