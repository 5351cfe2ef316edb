"""What a device does for its slots equals one pass over each whole conversation, wherever and however it is split."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.models import decoder
from subl_jax.models.cache import empty_cache
from subl_jax.models.config import ModelConfig
from subl_jax.rollout import device, stops
from subl_jax.rollout.device import Copies, Prefill, Slots, Turns
from subl_jax.rollout.generate import Completion, generate
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.trajectory import Trajectory
from tests.models import numpy_llama
from tests.models.test_decoder import parameters
from tests.rollout import policies, runs
from tests.rollout.policies import GREEDY, SAMPLING

# --- One device, program by program ------------------------------------------------------------------------------------

TINY = ModelConfig(29, 10, 2, 4, 2, 4, 13, tie_embeddings=False, init_scale=1.0)
PARAMS = parameters(TINY)
UNSTACKED = decoder.unstack(TINY, PARAMS)
LIMITS = SamplingConfig(max_turn_tokens=6, context=45, slots=3, prefill_chunk=4)
CHUNK, ROWS, PASSES, KEPT = 4, 2, 5, 2
ENDLESS = stops.build([], TINY.vocab_size, [], [])

prefill_jit = jax.jit(device.prefill, static_argnums=(0, 1))
decode_jit = jax.jit(device.decode, static_argnums=(0, 1, 2))


def fed(state: Slots, *passes: dict[int, tuple[int, list[int]]]) -> Slots:
    """Runs passes of {slot: (start, tokens)}."""
    target = np.full((PASSES, ROWS), LIMITS.slots, np.int32)
    starts, counts = np.zeros((2, PASSES, ROWS), np.int32)
    tokens = np.full((PASSES, ROWS, CHUNK), 7, np.int32)
    for place, rows in enumerate(passes):
        for row, (slot, (start, ids)) in enumerate(rows.items()):
            at = place, row
            target[at], starts[at], counts[at] = slot, start, len(ids)
            tokens[at][: len(ids)] = ids
    request = Prefill(*map(jnp.asarray, (np.int32(len(passes)), target, starts, counts, tokens)))
    state, count = prefill_jit(TINY, None, UNSTACKED, state, request)
    assert int(count) == counts.sum()
    return state


def copies(save: tuple[int, int], loads: list[tuple[int, int]], length: int) -> Copies:
    """The request for one save (slot, place) and some loads (slot, place)."""
    saved, loaded = np.zeros((2, KEPT), np.int32), np.zeros((2, LIMITS.slots), np.int32)
    saved[:, 0] = save
    for n, pair in enumerate(loads):
        loaded[:, n] = pair
    host = (np.int32(1), *saved, np.int32(len(loads)), *loaded, np.int32(length))
    return Copies(*map(jnp.asarray, host))


def turns(begin: dict[int, int], steps: int = 99, turn: int = 0) -> Turns:
    """The request in which slots begin turns of {slot: limit}."""
    began, limit = np.zeros(LIMITS.slots, bool), np.zeros(LIMITS.slots, np.int32)
    for slot, most in begin.items():
        began[slot], limit[slot] = True, most
    names = np.arange(LIMITS.slots, dtype=np.int32), np.zeros(LIMITS.slots, np.int32), np.full(LIMITS.slots, turn)
    host = (began, limit, *names, np.int32(3), np.int32(0), np.int32(steps))
    return Turns(*[jnp.asarray(each, None if each.dtype == bool else jnp.int32) for each in host])


def decoded(state: Slots, request: Turns, automaton: stops.StopAutomaton = ENDLESS):
    return decode_jit(TINY, LIMITS, None, UNSTACKED, automaton, state, request)


def assert_newest_states_are_those_of_whole_passes(state: Slots, conversations: list[list[int]]) -> None:
    scores = np.asarray(state.last) @ np.asarray(decoder.head_matrix(TINY, PARAMS))
    for slot, ids in enumerate(conversations):
        whole = numpy_llama.logits(TINY, PARAMS, np.asarray(ids))[-1]
        np.testing.assert_allclose(scores[slot], whole, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def prompted() -> tuple[Slots, list[list[int]]]:
    """Three slots, two of which share a prefix of 13 tokens that one of them computed; with their tokens."""
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, 40).tolist()
    prefix, conversations = ids[:13], [ids[:15], ids[20:25], [*ids[:13], *ids[30:37]]]
    dirty = jax.tree.map(lambda x: x + 3, device.empty_slots(TINY, LIMITS).cache)  # what earlier episodes left behind
    state = device.empty_slots(TINY, LIMITS)._replace(cache=dirty)
    first = [{0: (n, prefix[n : n + CHUNK])} for n in range(0, 13, CHUNK)]
    first[0][1] = (0, conversations[1][:4])
    state = fed(state, *first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "COPIED", 6)  # several blocks, the last one partly used
        kept = empty_cache(TINY, KEPT, LIMITS.context)
        state, kept = jax.jit(device.copy_prefixes)(state, kept, copies((0, 1), [(2, 1)], len(prefix)))
    state = fed(
        state,
        {2: (13, conversations[2][13:17]), 0: (13, conversations[0][13:])},
        {1: (4, conversations[1][4:]), 2: (17, conversations[2][17:])},
    )
    return state, conversations


def test_prefill_through_a_copied_prefix_equals_a_whole_pass(prompted):
    assert_newest_states_are_those_of_whole_passes(*prompted)


def test_copies_reach_the_end_of_a_context_that_their_blocks_do_not_divide(monkeypatch):
    monkeypatch.setattr(device, "COPIED", 6)
    state, rng = device.empty_slots(TINY, LIMITS), np.random.default_rng(0)
    filled = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.cache)
    before = state._replace(cache=filled)
    request = copies((0, 1), [(2, 1)], LIMITS.context)
    state, kept = jax.jit(lambda *a: device.copy_prefixes(*a))(before, empty_cache(TINY, KEPT, LIMITS.context), request)
    for field in ("keys", "values"):
        for old, new, held in zip(
            getattr(filled, field), getattr(state.cache, field), getattr(kept, field), strict=True
        ):
            np.testing.assert_array_equal(new, np.asarray(old)[[0, 1, 0]])
            np.testing.assert_array_equal(held, np.stack([np.zeros_like(old[0]), old[0]]))


def test_sampled_tokens_and_a_second_turn_equal_whole_passes(prompted):
    state, conversations = prompted
    state, report = decoded(state, turns({0: 4, 1: 2, 2: 6}))
    assert report.counts.tolist() == [4, 2, 6]
    assert not report.running.any() and not report.ended.any()
    assert (int(report.steps), int(report.occupied)) == (6, 12)
    written = [report.tokens[slot, :count].tolist() for slot, count in enumerate(report.counts)]
    whole = [ids + turn for ids, turn in zip(conversations, written, strict=True)]
    for slot, ids in enumerate(whole):
        exact = numpy_llama.log_probabilities(TINY, PARAMS, np.asarray(ids))[len(conversations[slot]) :]
        np.testing.assert_allclose(report.logprobs[slot, : len(exact)], exact, atol=1e-4)
    assert state.cache.lengths.tolist() == [len(ids) - 1 for ids in whole]  # the last token comes with the next prompt
    # The second turn's prompts: the last sampled token and three more.
    added = [[*ids[-1:], 5, 11, slot] for slot, ids in enumerate(whole)]
    starts = [len(ids) - 1 for ids in whole]
    state = fed(state, {0: (starts[0], added[0]), 2: (starts[2], added[2])}, {1: (starts[1], added[1])})
    assert_newest_states_are_those_of_whole_passes(
        state, [ids[:-1] + new for ids, new in zip(whole, added, strict=True)]
    )


def test_an_interrupted_turn_goes_on_as_if_it_had_not_been(prompted):
    state, _ = prompted
    _, whole = decoded(state, turns({0: 4, 1: 2, 2: 6}))
    state, early = decoded(state, turns({0: 4, 1: 2, 2: 6}, steps=1))
    assert early.running.all() and int(early.steps) == 1
    state, later = decoded(state, turns({}, steps=2, turn=9))  # names count only where a turn begins
    assert later.running.tolist() == [True, False, True] and later.counts.tolist() == [3, 2, 3]
    _, late = decoded(state, turns({}))
    assert int(early.steps + later.steps + late.steps) == int(whole.steps)
    for name in ("counts", "tokens", "logprobs", "running"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(late, name))


def test_a_slot_that_rests_keeps_its_turn_while_another_goes_on(prompted):
    state, first = decoded(prompted[0], turns({0: 4, 1: 2, 2: 6}))
    after, second = decoded(state, turns({1: 5}, turn=1))
    assert int(second.steps) == int(second.occupied) == 5
    for slot in (0, 2):
        np.testing.assert_array_equal(first.tokens[slot], second.tokens[slot])
        assert after.cache.lengths[slot] == state.cache.lengths[slot]
        for old, new in zip(state.cache.keys, after.cache.keys, strict=True):
            np.testing.assert_array_equal(old[slot], new[slot])


def test_a_stop_token_ends_a_turn_and_is_told_from_a_limit(prompted):
    _, whole = decoded(prompted[0], turns({0: 4, 1: 2, 2: 6}))
    drawn = whole.tokens[2].tolist()
    automaton = stops.build([], TINY.vocab_size, [drawn[2]], [])
    _, report = decoded(prompted[0], turns({2: 6}), automaton)
    assert report.counts[2] == drawn.index(drawn[2]) + 1
    assert report.ended.tolist() == [False, False, True]
    assert report.tokens[2, : report.counts[2]].tolist() == drawn[: int(report.counts[2])]


# --- Whole episodes: other placements and batch shapes -----------------------------------------------------------------

POLICY = runs.policy()
COUNT = 9


@pytest.fixture(scope="module")
def episodes_of_one_device() -> list[Trajectory]:
    return runs.run(POLICY, policies.episodes(COUNT))


def test_the_policy_speaks_in_several_turns_of_unlike_lengths_and_samples_no_padding(episodes_of_one_device):
    lengths = {int(trajectory.loss_mask.sum()) for trajectory in episodes_of_one_device}
    assert len(lengths) >= 3 and max(lengths) > SAMPLING.max_turn_tokens
    assert max(trajectory.tokens.max() for trajectory in episodes_of_one_device) < policies.VOCAB


def test_each_token_is_the_maximum_of_float64_logits_and_the_noise_of_its_names(episodes_of_one_device):
    for trajectory in episodes_of_one_device:
        for place in np.flatnonzero(trajectory.loss_mask)[[0, -1]]:
            found = runs.scores(POLICY, SAMPLING, trajectory, int(place))
            assert found.max() - found[trajectory.tokens[place]] < runs.TIE


@pytest.mark.parametrize("place", [-1, 0], ids=["last", "first"])
def test_the_comparison_refuses_a_token_that_is_no_tie(episodes_of_one_device, place):
    right = [dataclasses.replace(each, tokens=each.tokens.copy()) for each in episodes_of_one_device]
    sampled = np.flatnonzero(right[4].loss_mask)
    right[4].tokens[sampled[place]] = (right[4].tokens[sampled[place]] + 1) % policies.VOCAB
    with pytest.raises(AssertionError, match="from the best"):
        runs.assert_same_up_to_ties(POLICY, SAMPLING, episodes_of_one_device, right)


def test_a_model_split_over_two_devices_gives_the_episodes_of_one(episodes_of_one_device):
    split = runs.run(POLICY, policies.episodes(COUNT), devices=4, tensor=2)
    assert runs.assert_same_up_to_ties(POLICY, SAMPLING, episodes_of_one_device, split) <= 1


def test_another_batch_shape_changes_nothing_before_a_tie(episodes_of_one_device):
    sampling = dataclasses.replace(SAMPLING, slots=3, prefill_chunk=5, prefill_rows=3)
    other = runs.run(POLICY, policies.episodes(COUNT), sampling)
    assert runs.assert_same_up_to_ties(POLICY, SAMPLING, episodes_of_one_device, other) <= 1


def test_greedy_tokens_of_a_large_batch_are_the_likeliest_in_float64():
    sampling = dataclasses.replace(GREEDY, slots=8, prefill_chunk=64)
    for trajectory in runs.run(POLICY, policies.episodes(3), sampling):
        for place in np.flatnonzero(trajectory.loss_mask):
            found = runs.scores(POLICY, sampling, trajectory, int(place))
            assert found.max() - found[trajectory.tokens[place]] < runs.TIE


def test_one_split_replica_goes_on_while_the_other_is_done():
    prompts, limits = [[3, 1, 4, 1, 5], [9, 2, 6]], [SAMPLING.max_turn_tokens, 1]

    def completions(devices: int, tensor: int) -> tuple[list[Completion], RolloutStatistics]:
        counted = RolloutStatistics()
        options: Any = dict(groups=1, tool_workers=0, patience=1.0, tensor=tensor)
        made = generate(
            runs.CONFIG, POLICY, prompts, SAMPLING, limits=limits, devices=jax.local_devices()[:devices],
            options=EngineConfig(**options), statistics=counted,
        )  # fmt: skip
        return made, counted

    (alone, _), (split, counted) = completions(1, 1), completions(4, 2)
    assert [each.tokens for each in alone] == [each.tokens for each in split]
    assert [len(each.tokens) for each in split] == limits
    # In one dispatch, one replica made all steps and the other one: the second did not wait inside the program.
    assert (counted.dispatches, counted.decode_steps, counted.replica_steps) == (1, limits[0], sum(limits))
    assert counted.barrier_idle == pytest.approx(1 - sum(limits) / (2 * limits[0]))
