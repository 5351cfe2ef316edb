"""The compiled programs: replicas stop on their own, and new weights or other lengths compile nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.parallel.layout import LayoutError
from subl_jax.rollout.generate import generate
from subl_jax.rollout.programs import Programs, programs
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from tests.rollout import policies, runs

# Operations, as they are called in HLO text: "%name = type all-reduce(...)", alone or split into start and done.
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast|send|recv)"
    r"(?:-start|-done)?\("
)
# A configuration of its own: nothing of it was compiled before this module. Two lengths of prefill.
CONFIG = dataclasses.replace(runs.CONFIG, rope_theta=77.0)
SAMPLING = dataclasses.replace(policies.SAMPLING, prefill_chunk=64)
PLACES = {"mapped": (2, 1), "split": (4, 2)}  # devices, of which so many hold one copy of the model


@contextlib.contextmanager
def backend_compilations() -> Iterator[list[str]]:
    """What XLA is asked to compile within, by JAX's own monitoring."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@dataclasses.dataclass
class First:
    """A first run in one of the places."""

    devices: int
    tensor: int
    programs: Programs
    compiled: list[str]
    statistics: RolloutStatistics


@pytest.fixture(scope="module", params=PLACES)
def first(request) -> First:
    devices, tensor = PLACES[request.param]
    counted, params = RolloutStatistics(), runs.policy()
    with backend_compilations() as compiled:
        runs.run(params, policies.episodes(3), SAMPLING, devices, tensor, CONFIG, counted)
    known = programs(CONFIG, SAMPLING, tuple(jax.local_devices()[:devices]), tensor)
    return First(devices, tensor, known, compiled, counted)


def collectives(text: str) -> list[str]:
    """The lines of a program that call one."""
    return [line for line in text.splitlines() if COLLECTIVE.search(line)]


def groups(line: str) -> list[set[int]]:
    """The devices that an operation joins, from its replica groups or its pairs of source and target.

    Groups are written out ({{0,1},{2,3}}), or as a reshaped and transposed count: [2,2]<=[2,2]T(1,0).
    """
    written = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    if written:
        return [{int(n) for n in group.split(",")} for group in re.findall(r"\{([\d,]+)\}", written[1])]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert counted, f"no groups in {line}"
    shape, dims = ([int(n) for n in part.split(",")] for part in counted.groups()[:2])
    order = [int(n) for n in counted[3].split(",")] if counted[3] else range(len(dims))
    devices = np.arange(np.prod(dims)).reshape(dims).transpose(list(order)).reshape(shape)
    return [set(row) for row in devices.tolist()]


def test_groups_are_read_in_every_form():
    assert groups("all-reduce(%x), replica_groups={{0,2},{1,3}}, use") == [{0, 2}, {1, 3}]
    assert groups("collective-permute(%x), source_target_pairs={{0,1},{1,0}}") == [{0, 1}, {1, 0}]
    assert groups("all-gather(%x), replica_groups=[2,2]<=[4], dim") == [{0, 1}, {2, 3}]
    assert groups("all-gather(%x), replica_groups=[2,2]<=[2,2]T(1,0), dim") == [{0, 2}, {1, 3}]
    with pytest.raises(AssertionError, match="no groups"):
        groups("all-reduce(%x), replica_groups={}, use")  # all devices


def test_the_search_would_find_a_collective():
    # The same loop with its stop agreed upon between devices: what automatic partitioning makes of it.
    def loop(x):
        def unfinished(x):
            return jax.lax.psum(jnp.any(x < 9).astype(jnp.int32), "d") > 0

        return jax.lax.while_loop(unfinished, lambda x: x + 1, x)

    mapped = jax.pmap(loop, axis_name="d", devices=jax.local_devices()[:2])
    [found, *_] = collectives(mapped.lower(jnp.zeros((2, 3))).compile().as_text())
    assert groups(found) == [{0, 1}]


def test_no_program_joins_replicas(first):
    for name, _ in first.programs.compilations:
        text = first.programs.text(name)
        assert "while(" in text
        for line in collectives(text):
            for joined in groups(line):
                assert len({device // first.tensor for device in joined}) == 1, line
    decode = first.programs.text(first.programs.compilations[-1].program)
    assert bool(collectives(decode)) == (first.tensor > 1)  # a split model has some, a whole one has none


def test_a_run_compiles_two_lengths_of_prefill_the_copy_and_the_decode_and_counts_them(first):
    assert first.programs.replicas == first.devices // first.tensor
    assert [name for name, _ in first.statistics.compilations] == [
        "prefill 64", "prefill 16", "copy prefixes", "decode, 2 stop states",
    ]  # fmt: skip
    assert all(seconds > 0 for _, seconds in first.statistics.compilations)
    assert first.statistics.compilations == first.programs.compilations[:4]
    # JAX saw these, and the programs that make slots and unstack the weights.
    assert 4 < len(first.compiled) < 20


def test_other_weights_and_episodes_compile_nothing(first):
    known, counted = len(first.programs.compilations), RolloutStatistics()
    params = runs.policy(seed=1)
    with backend_compilations() as compiled:
        made = runs.run(
            params, policies.episodes(7)[::-1], SAMPLING, first.devices, first.tensor, CONFIG, statistics=counted
        )
        generate(
            CONFIG, params, [[5] * length for length in (1, 15, 16, 17, 65, 100, 188)], SAMPLING,
            devices=jax.local_devices()[: first.devices], options=runs.EngineConfig(tensor=first.tensor),
        )  # fmt: skip
    assert len(made) == 7
    assert compiled == []
    assert counted.compilations == [] and len(first.programs.compilations) == known


def test_loaded_weights_are_the_new_ones_and_the_same_are_not_loaded_again(first):
    left, right = runs.policy(), runs.policy(seed=1)
    loaded = first.programs.load(left)
    assert first.programs.load(left) is loaded
    other = first.programs.load(right)
    for params, placed in ((left, loaded), (right, other)):
        for number, layer in enumerate(placed["layers"]):
            np.testing.assert_array_equal(layer["k"]["kernel"], params["layers"]["k"]["kernel"][number])
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(other)} == {first.devices}


def test_devices_that_do_not_divide_and_heads_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match=r"3 devices with tensor=2 .*divides 3"):
        Programs(CONFIG, SAMPLING, jax.local_devices()[:3], 2)
    with pytest.raises(LayoutError, match=r"num_kv_heads=1 .*tensor=2"):
        Programs(dataclasses.replace(CONFIG, num_kv_heads=1), SAMPLING, jax.local_devices()[:2], 2)
    with pytest.raises(ValueError, match=r"token id 330"):
        Programs(CONFIG, SamplingConfig(logit_bias=((330, 1.0),)), jax.local_devices()[:1])
