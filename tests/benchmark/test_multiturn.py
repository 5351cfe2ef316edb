"""The multi-turn workload: three ways to run the same scripts, which say the same."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from subl_jax.benchmark import multiturn
from subl_jax.benchmark.multiturn import Script
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.rollout.sampling import SamplingConfig
from tests.models import numpy_llama

CONFIG = ModelConfig(97, 16, 2, 2, 1, 8, 24, tie_embeddings=False, init_scale=1.0)
SAMPLING = SamplingConfig(
    temperature=0.0, max_turn_tokens=multiturn.ANSWER[-1], context=640, slots=2, prefill_chunk=16, prefill_rows=2
)


@pytest.fixture(scope="module")
def runner() -> multiturn.Runner:
    params = decoder.init(CONFIG, jax.random.key(0))
    return multiturn.Runner(CONFIG, params, SAMPLING, tuple(jax.local_devices()[:2]))


@pytest.fixture(scope="module")
def scripted() -> list[Script]:
    return multiturn.scripts(97, 0, episodes=7, turns=3)


def test_lengths_are_those_of_every_run_and_tokens_are_not(scripted):
    other = multiturn.scripts(97, 1, episodes=7, turns=3)
    assert [script.answers for script in other] == [script.answers for script in scripted]
    assert [script.length for script in other] == [script.length for script in scripted]
    assert all(left.opening != right.opening for left, right in zip(scripted, other, strict=True))
    assert len({tuple(script.opening[: multiturn.SHARED]) for script in scripted}) == 1


def test_lengths_are_uneven_and_within_their_bounds():
    made = multiturn.scripts(97, 0)
    answers = [count for script in made for count in script.answers]
    assert len(made) == 64 and all(len(script.answers) == 6 and len(script.results) == 5 for script in made)
    assert multiturn.ANSWER[2] <= min(answers) and max(answers) <= multiturn.ANSWER[3]
    assert max(answers) > 4 * np.median(answers)


def test_what_the_engine_says_is_the_argmax_of_a_full_recomputation(runner, scripted):
    said, counted = runner.ours(scripted)
    for script, turns in zip(scripted, said, strict=True):
        assert [len(ids) for ids in turns] == script.answers
        tokens, mask = list(script.opening), [False] * len(script.opening)
        for ids, result in zip(turns, [*script.results, []], strict=True):
            tokens, mask = [*tokens, *ids, *result], mask + [True] * len(ids) + [False] * len(result)
        predicted = numpy_llama.logits(CONFIG, runner.params, np.asarray(tokens))[:-1].argmax(-1)
        wanted = np.asarray(mask)[1:]
        np.testing.assert_array_equal(np.asarray(tokens)[1:][wanted], predicted[wanted])
    assert counted.episodes == 7 and counted.shared_tokens > 0


def test_all_ways_say_the_same_and_the_peers_waste_what_they_are_said_to(runner, scripted):
    said, ours = runner.ours(scripted)
    static, waiting = runner.static(scripted)
    again, repeating = runner.reprefill(scripted)
    assert static == said == again
    assert waiting.occupancy < ours.occupancy
    assert repeating.prefilled_tokens > 2 * ours.prefilled_tokens


def test_every_case_is_described_with_its_shape_and_seeds():
    lines = multiturn.describe(list(multiturn.CASES))
    assert len(lines) == 1 + len(multiturn.CASES)
    assert "64 episodes of 6 turns" in lines[0] and "seeds 1 (weights), 2 (scripts)" in lines[0]
    for case, (_, devices, slots) in multiturn.CASES.items():
        assert devices * slots == 16
        assert any(line.startswith(f"  {case}: {devices} JAX devices x {slots} slots") for line in lines)


def test_a_scripted_conversation_is_what_the_engine_takes():
    conversation = multiturn.Scripted(3, Script([1, 2, 3], [2, 1], [[7, 8]]))
    opening = conversation.open()
    assert (opening.tokens, opening.limit) == ([1, 2, 3], 2)
    conversation.sampled([5, 6], [0.0, 0.0], False)
    following = conversation.respond()
    assert following is not None and (following.tokens, following.limit) == ([6, 7, 8], 1)
    conversation.sampled([9], [0.0], False)
    assert conversation.respond() is None
    assert conversation.result() == [[5, 6], [9]]
