"""The episode engine: token in and token out, the same episode wherever it runs, and every way that one can end."""

from __future__ import annotations

import dataclasses
import time
import weakref

import jax
import numpy as np
import pytest

from subl_jax.chat.messages import ToolCall, assistant, calls_of, tool
from subl_jax.chat.rendering import Renderer
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.engine import rollout
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.settings.interface import Environment
from subl_jax.trajectory import Trajectory
from tests.chat import samples
from tests.models import numpy_llama
from tests.rollout import policies
from tests.rollout.policies import CALL, CONFIG, GREEDY, RENDERER, SAMPLING, World, episode

RESTLESS = policies.scripted(CALL + "<|end|>", strength=11.0, restless=1.0)
COUNT = 11  # neither a multiple of the 2 slots of one device nor of the 8 of four: the last wave is uneven


def run(params, todo: list[Episode], sampling=SAMPLING, devices: int = 1, renderer: Renderer = RENDERER, **kwargs):
    names = {"seed": 5, **kwargs}
    return list(rollout(CONFIG, params, renderer, todo, sampling, devices=jax.local_devices()[:devices], **names))


def one(turn: str, world: World) -> Trajectory:
    """The single greedy episode of a policy that writes `turn` each time."""
    [trajectory] = run(policies.scripted(turn), [episode(0, world)], GREEDY)
    return trajectory


def same(left: Trajectory, right: Trajectory) -> bool:
    arrays = [np.array_equal(getattr(left, name), getattr(right, name)) for name in ("tokens", "loss_mask", "logprobs")]
    plain = [
        getattr(left, name) == getattr(right, name) for name in ("episode", "task_id", "messages", "status", "done")
    ]
    return all(arrays + plain)


def turns(trajectory: Trajectory) -> list[list[int]]:
    """The sampled pieces of a trajectory."""
    edges = np.flatnonzero(np.diff(trajectory.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [trajectory.tokens[start:stop].tolist() for start, stop in edges]


@pytest.fixture(scope="module")
def sampled() -> list[Trajectory]:
    return run(RESTLESS, policies.episodes(COUNT))


def test_the_sample_is_varied_enough_for_the_tests_below(sampled):
    assert len({t.status for t in sampled}) >= 2
    assert {1, 3} <= {len(turns(t)) for t in sampled}
    assert len({tuple(piece) for t in sampled for piece in turns(t)}) >= 3


def test_recorded_logprobs_are_those_of_a_float64_model_over_the_recorded_tokens(sampled):
    for trajectory in sampled:
        exact = numpy_llama.log_probabilities(CONFIG, RESTLESS, trajectory.tokens)
        np.testing.assert_allclose(trajectory.logprobs, np.where(trajectory.loss_mask, exact, 0.0), atol=1e-4)


def test_the_policy_under_test_depends_on_its_whole_context(sampled):
    # Otherwise the comparison above could not tell a wrong cache from a right one.
    longest = max(sampled, key=lambda t: len(turns(t))).tokens
    changed = longest.copy()
    changed[0] = (changed[0] + 1) % policies.VOCAB
    change = numpy_llama.log_probabilities(CONFIG, RESTLESS, longest) - numpy_llama.log_probabilities(
        CONFIG, RESTLESS, changed
    )
    assert np.abs(change[-10:]).max() > 1e-3


def test_greedy_tokens_are_the_argmax_of_a_full_recomputation():
    for trajectory in run(RESTLESS, policies.episodes(3), GREEDY):
        logits = numpy_llama.logits(CONFIG, RESTLESS, trajectory.tokens)
        predicted = np.append(-1, logits[:-1].argmax(-1))
        np.testing.assert_array_equal(trajectory.tokens[trajectory.loss_mask], predicted[trajectory.loss_mask])


def test_prompts_are_the_templates_ids_and_the_mask_is_true_exactly_on_what_was_sampled(sampled):
    for trajectory in sampled:
        messages, tools = trajectory.messages, trajectory.tools
        spoken = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        pieces = turns(trajectory)
        assert len(pieces) == len(spoken)
        ids, mask = [], []
        for place, (turn, piece) in enumerate(zip(spoken, pieces, strict=True)):
            if place == 0:
                prompt = RENDERER.opening(messages[:turn], tools)
            else:
                last = spoken[place - 1] + 1
                prompt = RENDERER.continuation(messages[:last], messages[last:turn], tools)
            ids, mask = ids + prompt + piece, mask + [False] * len(prompt) + [True] * len(piece)
            assert RENDERER.end_id not in piece[:-1]
            assert piece[-1] == RENDERER.end_id or len(piece) == SAMPLING.max_turn_tokens
        assert trajectory.tokens.tolist() == ids
        assert trajectory.loss_mask.tolist() == mask


def test_four_devices_give_the_episodes_of_one_token_for_token(sampled):
    together = run(RESTLESS, policies.episodes(COUNT), devices=4)
    assert [t.episode for t in together] == [t.episode for t in sampled]
    assert all(same(left, right) for left, right in zip(sampled, together, strict=True))


@pytest.mark.parametrize("chosen", [[*range(COUNT)][::-1], [7], [3, 10, 0]], ids=["reversed", "alone", "three"])
def test_an_episode_depends_neither_on_its_slot_nor_on_the_other_episodes(sampled, chosen):
    everyone = policies.episodes(COUNT)
    again = run(RESTLESS, [everyone[n] for n in chosen])
    assert [t.episode for t in again] == [100 + n for n in chosen]  # in the order asked for
    assert all(same(sampled[n], trajectory) for n, trajectory in zip(chosen, again, strict=True))


def test_seed_policy_episode_and_sample_each_change_what_is_drawn(sampled):
    todo = policies.episodes(4)
    variants = {
        "as it was": run(RESTLESS, todo),
        "seed": run(RESTLESS, todo, seed=6),
        "policy": run(RESTLESS, todo, policy=1),
        "episode": run(RESTLESS, [dataclasses.replace(each, index=each.index + 50) for each in todo]),
        "sample": run(RESTLESS, [dataclasses.replace(each, sample=each.sample + 3) for each in todo]),
    }
    texts = {name: str([t.tokens.tolist() for t in made]) for name, made in variants.items()}
    assert len(set(texts.values())) == len(texts)
    assert texts["as it was"] == str([t.tokens.tolist() for t in sampled[:4]])


def test_the_turns_of_one_episode_are_drawn_with_different_randomness():
    # A flat policy: the turns' contexts differ, their distributions do not. Equal keys would repeat the first turn.
    flat = policies.scripted(CALL + "<|end|>", strength=8.5, restless=0.0)
    made = run(flat, [episode(n, World("go", result="x")) for n in range(8)])
    several = [pieces for pieces in map(turns, made) if len(pieces) > 1]
    assert several
    assert any(later != pieces[0] for pieces in several for later in pieces[1:])


def test_statistics_count_what_the_trajectories_hold():
    statistics = RolloutStatistics()
    made = run(RESTLESS, policies.episodes(5), statistics=statistics)
    assert statistics.episodes == 5
    assert statistics.sampled_tokens == sum(int(t.loss_mask.sum()) for t in made)
    # An end token that is followed by another turn is fed with that turn's prompt.
    fed_ends = sum(len(turns(t)) - 1 for t in made)
    fed = statistics.prefilled_tokens + statistics.shared_tokens
    assert fed == sum(int((~t.loss_mask).sum()) for t in made) + fed_ends
    assert statistics.shared_tokens > 0
    assert statistics.device_seconds > 0 and statistics.tool_seconds > 0


def test_time_in_which_the_host_is_busy_elsewhere_is_not_the_devices():
    run(RESTLESS, policies.episodes(COUNT))  # compiled
    statistics, slept = RolloutStatistics(), 0.0
    devices = jax.local_devices()[:1]
    for _ in rollout(
        CONFIG, RESTLESS, RENDERER, policies.episodes(COUNT), SAMPLING,
        seed=5, devices=devices, statistics=statistics, as_finished=True,
    ):  # fmt: skip
        time.sleep(0.2)
        slept += 0.2
    assert statistics.wall_seconds > 0.9 * slept - 0.4  # the last ones are yielded behind the last look at the clock
    assert statistics.device_seconds < 0.5 * slept


def test_no_episodes_are_no_work():
    assert run(RESTLESS, []) == []


def test_an_opening_that_does_not_fit_stops_the_run_only_after_what_was_finished_is_out():
    todo = [*policies.episodes(6), episode(200, World("z" * 400))]
    out = []
    with pytest.raises(ValueError, match="raise --config.rollout.context"):
        for trajectory in rollout(
            CONFIG, RESTLESS, RENDERER, todo, SAMPLING, seed=5, devices=jax.local_devices()[:1], as_finished=True,
            options=EngineConfig(groups=1, tool_workers=0),
        ):  # fmt: skip
            out.append(trajectory.episode)
    assert out and len(set(out)) == len(out)
    assert set(out) <= {100 + n for n in range(6)}


def test_no_more_worlds_are_alive_than_episodes_in_flight():
    alive: weakref.WeakSet[World] = weakref.WeakSet()
    most = 0

    def world(number: int) -> World:
        made = World("go", lasts=1)
        alive.add(made)
        return made

    todo = [Episode(n, policies.task(n, "go"), 0, lambda n=n: world(n)) for n in range(40)]
    found = rollout(
        CONFIG, policies.scripted(CALL + "<|end|>"), RENDERER, todo, GREEDY, seed=0, devices=jax.local_devices()[:1],
        as_finished=True,
    )  # fmt: skip
    for _ in found:
        most = max(most, len(alive))
    # Two groups of two slots, the openings that are ahead, and what has just ended.
    assert most <= 16


# How an episode ends


def test_an_episode_that_the_world_finishes_is_final_and_equals_the_template_whole():
    world = World("go", lasts=2)
    trajectory = one(CALL + "<|end|>", world)
    assert (trajectory.status, trajectory.done) == ("final", True)
    assert world.executed == [ToolCall("list", {})] * 2
    ids, mask = samples.templated(RENDERER.tokenizer, trajectory.messages)
    assert trajectory.tokens.tolist() == ids
    assert trajectory.loss_mask.tolist() == mask


def test_a_plain_answer_ends_the_episode():
    world = World("go")
    trajectory = one("it is<|end|>", world)
    assert (trajectory.status, world.answer) == ("final", "it is")


def test_turns_run_out_only_after_the_last_call_was_executed():
    world = World("go")
    trajectory = one(CALL + "<|end|>", world)
    assert (trajectory.status, trajectory.done) == ("turn_limit", False)
    assert len(world.executed) == GREEDY.max_turns == len(turns(trajectory))


def test_a_turn_cut_by_its_limit_is_truncated_and_never_executed():
    world = World("go")
    looping = one(CALL + "zz", world)  # a whole call, and then no end
    assert looping.status == "truncated"
    [piece] = turns(looping)
    assert len(piece) == GREEDY.max_turn_tokens
    assert CALL in RENDERER.decode(piece)
    assert world.executed == []
    assert calls_of(looping.messages[-1]) == () and looping.messages[-1].get("unparseable") is True


def test_a_broken_call_ends_the_episode_unexecuted():
    world = World("go")
    trajectory = one('<tool_call>{"name":"list<|end|>', world)
    assert trajectory.status == "unparseable"
    assert world.executed == []
    assert trajectory.messages[-1]["content"] == '<tool_call>{"name":"list'


def test_an_episode_that_would_outgrow_its_context_stops_before_it_does():
    ended = [one(CALL + "<|end|>", World("go", result="z" * length)) for length in (20, 100, 160)]
    assert [len(turns(t)) for t in ended] == [3, 2, 1]
    assert [t.status for t in ended] == ["turn_limit", "length_limit", "length_limit"]
    assert all(len(t.tokens) <= GREEDY.context for t in ended)


def test_another_turn_is_begun_exactly_when_a_full_one_still_fits():
    def needed(world: World) -> int:
        """Tokens of the conversation up to the end of a second turn of full length."""
        call = [ToolCall("list", {})]
        told = [*world.opening(), assistant("", call)]
        [so_far] = RENDERER.render([(told, samples.TOOLS)])
        added = RENDERER.continuation(told, [tool("list", world.result)], samples.TOOLS)
        return len(so_far.tokens) + len(added) + GREEDY.max_turn_tokens

    worlds = [World("go", result="z" * length) for length in range(1, GREEDY.context)]
    fits = max((world for world in worlds if needed(world) <= GREEDY.context), key=needed)
    over = min((world for world in worlds if needed(world) > GREEDY.context), key=needed)
    assert (needed(fits), needed(over)) == (GREEDY.context, GREEDY.context + 1)
    assert [len(turns(one(CALL + "<|end|>", world))) for world in (fits, over)] == [2, 1]


def test_a_context_filled_to_the_last_token_is_still_right():
    # The longest opening behind which a turn of full length still fits: its last token takes the last cache entry.
    turn = CALL + "zz"
    world = World("z" * GREEDY.context)
    while len(RENDERER.opening(world.opening(), samples.TOOLS)) + GREEDY.max_turn_tokens > GREEDY.context:
        world.prompt = world.prompt[:-1]
    trajectory = one(turn, world)
    assert len(trajectory.tokens) == GREEDY.context
    exact = numpy_llama.log_probabilities(CONFIG, policies.scripted(turn), trajectory.tokens)
    np.testing.assert_allclose(trajectory.logprobs, np.where(trajectory.loss_mask, exact, 0.0), atol=1e-4)


@pytest.mark.parametrize("length", [400, 165])
def test_an_opening_without_room_for_a_turn_is_an_error_that_names_task_and_remedy(length):
    prompt = "z" * length
    world = World(prompt)
    count = len(RENDERER.opening(world.opening(), samples.TOOLS))
    assert count + GREEDY.max_turn_tokens > GREEDY.context
    with pytest.raises(
        ValueError, match=rf"safe/train/fake/0/3\b.*{count} tokens.*=200; raise --config\.rollout\.context"
    ) as caught:
        run(RESTLESS, [episode(3, world)], GREEDY)
    assert "\n" not in str(caught.value)
    assert world.executed == []


# A real setting


def test_an_episode_of_the_api_setting_runs_in_its_own_world():
    from subl_jax.chat import tokenizer as embedded
    from subl_jax.settings.api import SETTING

    call = '<tool_call>{"name":"list_files","arguments":{"path":"/"}}</tool_call><|end|>'
    todo = SETTING.tasks("safe", "train", 0, 3)
    texts = [t.prompt for t in todo] + [" ".join(schema["function"]["name"] for schema in SETTING.tools), call] * 9
    renderer = Renderer(embedded.train(texts, policies.VOCAB))
    assert len(renderer.tokenizer.get_vocab()) <= policies.VOCAB

    def world(number: int) -> Environment:
        return SETTING.environment(todo[number], frozenset())

    made = run(
        policies.scripted(call, renderer),
        [Episode(n, todo[n], 0, lambda n=n: world(n)) for n in range(3)],
        dataclasses.replace(GREEDY, context=480),
        renderer=renderer,
    )
    for number, trajectory in enumerate(made):
        twin = world(number)
        expected = twin.opening()
        while True:
            message = next(m for m in trajectory.messages if m["role"] == "assistant")
            expected = [*expected, message, *twin.step(message)]
            if len(expected) == len(trajectory.messages):
                break
        assert trajectory.messages == expected
        assert calls_of(message) == (ToolCall("list_files", {"path": "/"}),)
        assert (trajectory.task_id, trajectory.status, trajectory.done) == (todo[number].task_id, "turn_limit", False)
        assert renderer.text(trajectory.messages, trajectory.tools).startswith(
            renderer.decode(trajectory.tokens.tolist())
        )
