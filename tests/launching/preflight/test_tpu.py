"""The training step compiled ahead of time for a TPU slice that is not here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from subl_jax.launching.preflight import acting, analysis, topology
from subl_jax.launching.preflight.programs import Program
from subl_jax.launching.preflight.topology import TopologyError
from tests.launching.preflight import tpu

pytestmark = pytest.mark.soak  # a minute of compilation


@pytest.fixture(autouse=True)
def _libtpu() -> None:
    tpu.needs_libtpu()


def test_a_small_step_fits_and_holds_no_logits_of_all_tokens() -> None:
    row = tpu.distilled()
    assert row["fits"] is True
    assert row["holds_all_logits"] is None
    assert 0 < row["bytes_per_chip"] < row["limit_bytes"]
    # What is told by shapes alone is what the compiler is handed, but for the padding of its tiles.
    assert row["bytes_by_kind"]["arguments"] == pytest.approx(sum(row["held_bytes"].values()), rel=0.05)


def test_compiled_collectives_are_within_a_tenth_of_the_model() -> None:
    row = tpu.distilled()
    assert row["collective_bytes"] == pytest.approx(row["expected_collective_bytes"], rel=0.1)


def test_what_stands_in_a_loop_over_layers_counts_once_per_layer() -> None:
    two, eight = tpu.distilled(2), tpu.distilled(8)
    # XLA itself counts a loop's body once, however many layers there are.
    assert eight["xla_flops_loops_once"] == pytest.approx(two["xla_flops_loops_once"], rel=0.02)
    down = 512 * 2048
    matrices = 512 * (512 + 256 + 256 + 512) + 3 * down
    tokens = 8 * 256 / 4  # of a chip
    # Teacher 2; student 2 forward, 2 again but for the MLP's last product, which nothing needs, 4 backward.
    layer = tokens * (2 * matrices + 8 * matrices - 2 * down)
    kernels = 8 * 256**2 * 512 * (2 + 2 + 2 + 7) / 4
    assert eight["compiled_flops_per_chip"] - two["compiled_flops_per_chip"] == pytest.approx(
        6 * (layer + kernels), rel=1e-3
    )
    more = eight["expected_collective_bytes"] - two["expected_collective_bytes"]
    assert eight["collective_bytes"] - two["collective_bytes"] == pytest.approx(more, rel=0.1)


def test_a_program_over_more_memory_than_the_chip_has_does_not_fit() -> None:
    found = topology.find(tpu.SLICE)
    assert found.chip is not None
    small = dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=1e6))
    given = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=SingleDeviceSharding(small.devices[0]))
    program = Program("double", "1x1x1", 1, lambda: jax.jit(lambda x: 2 * x).lower(given), {}, 0, 0, ())
    row = analysis.analyse(program, small)
    assert row["fits"] is False
    assert row["bytes_per_chip"] >= 2 * 4 * 1024**2


def test_a_program_that_the_compiler_refuses_for_memory_does_not_fit() -> None:
    found = topology.find(tpu.SLICE)
    given = jax.ShapeDtypeStruct((1 << 18, 128), jnp.bfloat16, sharding=SingleDeviceSharding(found.devices[0]))
    program = Program("scores", "1x1x1", 1, lambda: jax.jit(lambda x: jnp.sort(x @ x.T)).lower(given), {}, 0, 0, ())
    row = analysis.analyse(program, found)
    assert row["fits"] is False
    assert row["bytes_per_chip"] > 2 * 4**9 * 4**9


def test_a_split_policy_reduces_its_residual_twice_a_layer() -> None:
    place = topology.find(tpu.SLICE)
    program = acting.programs(dataclasses.replace(tpu.case(), tensor=2), place.devices)[0]
    row = analysis.analyse(program, place)
    assert row["fits"] is True
    assert row["mesh"] == "2x1x2"
    assert row["collective_by_kind"]["all-reduce"] == row["expected_by_kind"]["all-reduce"]
    # Neither new keys and values nor noise are sent around: each device makes those of its own heads and ids.
    assert row["collective_bytes"] == pytest.approx(row["expected_collective_bytes"], rel=0.1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "none of the generations v5e, v5p, v6e"),
        ("v5:2x2", "did you mean v5"),
        ("v5e:2x2x2", "has 2 dimensions; write it as v5e:8x8"),
        ("v5e:3x5", "no slice that libtpu knows"),
    ],
)
def test_an_unknown_slice_is_refused_in_one_line_with_a_remedy(name: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said) as error:
        topology.find(name)
    assert "\n" not in str(error.value) and name in str(error.value)
