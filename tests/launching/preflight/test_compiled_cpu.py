"""Collectives of small programs compiled for eight CPU devices, against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from subl_jax.launching.preflight import counts
from subl_jax.launching.preflight.hlo import Module


def compiled(function, *shapes: tuple[int, ...]) -> Module:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Module(jax.jit(function).lower(*arguments).compile().as_text() or "")


def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def test_collectives_in_nested_scans_add_up_to_what_a_hand_counts() -> None:
    def body(x):
        def inner(y, _):
            whole = jax.lax.all_gather(y, "b", tiled=True)  # [4 * 16] float32
            return jax.lax.psum_scatter(jnp.sin(whole), "b", tiled=True), None

        def outer(y, _):
            y, _ = jax.lax.scan(inner, y, None, length=3)
            return jax.lax.psum(y, "a"), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    spread = jax.shard_map(body, mesh=mesh(), in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
    found = counts.collectives(compiled(spread, (8 * 16,)), 8)
    sums = {kind: sum(one.total for one in found if one.kind == kind) for kind in {one.kind for one in found}}
    assert sums["all-gather"] == 5 * 3 * 64 * 4
    assert sums["all-reduce"] == 5 * 16 * 4
    assert sums["reduce-scatter"] == 5 * 3 * 64 * 4
    assert {one.kind: one.group for one in found} == {"all-gather": 4, "reduce-scatter": 4, "all-reduce": 2}


def test_products_in_a_scan_count_as_often_as_it_runs() -> None:
    def layers(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=7)[0]

    read = compiled(layers, (32, 64), (64, 64))
    assert read.unknown_loops() == 0
    assert counts.matrix_flops(read) in (7 * 2 * 32 * 64 * 64, 0)  # 0: a CPU may hand products to a library


def test_a_loop_that_an_argument_ends_is_of_unknown_length() -> None:
    def wait(x, limit):
        return jax.lax.while_loop(
            lambda state: state[0] < limit[0], lambda state: (state[0] + 1.0, state[1] * 2), (0.0, x)
        )[1]

    assert compiled(wait, (8,), (1,)).unknown_loops() == 1
