"""Whether keys and values fit: the bytes that would really be allocated, against a limit or what is free."""

from __future__ import annotations

import dataclasses
import re
import weakref

import jax
import pytest

from subl_jax.models.cache import empty_cache
from subl_jax.models.config import ModelConfig
from subl_jax.rollout import memory, programs
from subl_jax.rollout.programs import KEPT
from subl_jax.rollout.sampling import SamplingConfig
from tests.models.test_decoder import parameters

# Two layers, two key/value heads of 4: 2 * 2 * 2 * 4 = 32 numbers a token. With 2^17 tokens of float32 a slot has 2^24
# bytes, 16 MiB.
CONFIG = ModelConfig(29, 10, 2, 4, 2, 4, 13)
PARAMS = parameters(CONFIG)
SAMPLING = SamplingConfig(context=2**17, slots=7)
SLOT = 2**24
GIB = 2**30


def fitted(sampling: SamplingConfig = SAMPLING, slots: float = 0, groups: int = 2, tensor: int = 1, **changes) -> int:
    """Slots that are chosen where keys and values may take the room of so many; 0: what is free."""
    config = dataclasses.replace(CONFIG, **changes)
    devices = jax.local_devices()[:tensor]
    limit = slots * SLOT / GIB
    return memory.fitted(config, PARAMS, sampling, devices, groups=groups, kv_gib=limit, tensor=tensor).slots


ANY = dataclasses.replace(SAMPLING, slots=0)


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests of this process have left on the devices is not counted."""
    monkeypatch.setattr(programs, "_LOADED", {})


@pytest.mark.parametrize("changes", [{}, dict(compute_dtype="bfloat16"), dict(num_kv_heads=4, num_layers=3)], ids=str)
def test_the_bytes_of_a_slot_are_those_of_its_cache(changes):
    config = dataclasses.replace(CONFIG, **changes)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, SAMPLING.context))
    assert memory.slot_bytes(config, SAMPLING) == sum(
        buffer.size * buffer.dtype.itemsize for buffer in (*cache.keys, *cache.values)
    )
    assert memory.slot_bytes(CONFIG, SAMPLING) == SLOT


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_as_many_slots_are_chosen_as_fit_beside_the_kept_prefixes(groups):
    exact = groups * 7 + KEPT
    assert fitted(ANY, exact, groups) == 7
    assert fitted(ANY, exact - 0.01, groups) == 6
    assert fitted(ANY, exact + groups - 0.01, groups) == 7


def test_a_slot_takes_half_in_half_precision_or_over_two_devices():
    room = 2 * 7 + KEPT
    assert fitted(ANY, room / 2, compute_dtype="bfloat16") == 7
    assert fitted(ANY, room / 2, tensor=2) == 7
    assert fitted(ANY, room / 2 - 0.01, tensor=2) == 6


def test_no_more_slots_are_chosen_than_a_step_can_use():
    assert fitted(dataclasses.replace(ANY, context=8), 2) == 256


def test_a_number_that_fits_stays_and_one_too_many_is_refused_with_both_numbers():
    room = 2 * 7 + KEPT
    assert fitted(slots=room) == 7
    # Two groups of eight and four kept prefixes are 20 slots of 1/64 GiB.
    with pytest.raises(ValueError, match=r"2 groups of rollout\.slots=8 with 131072 tokens .* 0\.31 GiB") as caught:
        fitted(dataclasses.replace(SAMPLING, slots=8), room)
    assert "--config.engine.kv_gib=0.28125;" in str(caught.value)
    assert re.search(r"at most --config\.rollout\.slots=7 fit", str(caught.value))
    assert "\n" not in str(caught.value)


def test_an_episode_that_does_not_fit_is_refused_whatever_the_slots():
    assert fitted(ANY, KEPT + 2) == 1
    for sampling in (ANY, SAMPLING):
        with pytest.raises(
            ValueError, match=r"one episode of rollout\.context=131072 tokens take 0\.016 GiB"
        ) as caught:
            fitted(sampling, KEPT + 1.99)
        assert "2 of them" in str(caught.value) and "lower --config.rollout.context" in str(caught.value)


def test_without_a_limit_nine_tenths_of_what_is_free_beside_the_weights_are_taken(monkeypatch):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    room = 2 * 7 + KEPT
    for tensor in (1, 2):
        free = (room * SLOT / 0.9 + weights) / tensor
        monkeypatch.setattr(memory, "free_bytes", lambda devices, free=free: round(free) + 16)
        assert fitted(ANY, tensor=tensor) == 7
        monkeypatch.setattr(memory, "free_bytes", lambda devices, free=free: round(free) - 16)
        assert fitted(ANY, tensor=tensor) == 6
    # A number that was given may use the reserve, so that what was chosen once is not refused later.
    assert fitted(SAMPLING, tensor=2) == 7
    monkeypatch.setattr(memory, "free_bytes", lambda devices: round((room * SLOT - 16 + weights) / 2))
    with pytest.raises(
        ValueError, match=r"take 0\.14 GiB of a device, more than 0\.14 GiB that are free .*slots=6 fit"
    ):
        fitted(SAMPLING, tensor=2)


def test_weights_that_are_loaded_already_are_not_counted_again(monkeypatch):
    devices, params = jax.local_devices()[:1], {"head": jax.numpy.ones((64, 64))}
    assert programs.bytes_to_load(params, devices, 1) == 64 * 64 * 4
    held = (tuple(weakref.ref(leaf) for leaf in jax.tree.leaves(params)), params)
    monkeypatch.setitem(programs._LOADED, (tuple(devices), 1), held)
    assert programs.bytes_to_load(params, devices, 1) == 0
    assert programs.bytes_to_load({"head": jax.numpy.ones((64, 65))}, devices, 1) == 64 * 4


def test_cpu_devices_share_what_the_machine_has():
    alone, eight = memory.free_bytes(jax.local_devices()[:1]), memory.free_bytes(jax.local_devices()[:8])
    assert 0 < eight < alone
    assert 8 * eight == pytest.approx(alone, rel=0.5)  # other programs come and go meanwhile
