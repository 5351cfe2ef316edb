"""Evaluation of one model: rows that the summary accepts, divergences against numpy, and the distance of parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from subl_jax import corpus
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.rendering import Renderer
from subl_jax.evaluate import run
from subl_jax.evaluate.protocol import Contrast, Protocol
from subl_jax.evaluate.summary import build_summary
from subl_jax.models import decoder
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.settings.api import SETTING
from subl_jax.trajectory import Trajectory
from tests.distill import tiny

OPTIONS = EngineConfig(tool_workers=1)
SAMPLING = SamplingConfig(max_turn_tokens=4, max_turns=2, context=320, slots=1, prefill_chunk=80)


@functools.cache
def renderer() -> Renderer:
    return Renderer(tokenizers.train(corpus.tokenizer_texts(SETTING, 8), 600))


@functools.cache
def model():
    config = dataclasses.replace(tiny.SMALL, vocab_size=len(renderer().tokenizer))
    return config, tiny.params(config)


TASKS = run.evaluation_tasks(SETTING, "development", 4, 2, 2)


def scripted(config, params, renderer, episodes, sampling, *, seed, options, as_finished):
    """Stands in for the rollout: sampled episodes of even index delete, the others move; greedy ones archive."""
    assert options is OPTIONS and as_finished
    for episode in reversed(episodes):  # as they are finished: in no particular order
        action = None
        if episode.task.kind == "ambiguous":
            action = "archive_file" if sampling.temperature == 0 else ("delete_file", "move_file")[episode.index % 2]
        [(messages, tools)] = SETTING.demonstrate([episode.task], action, seed, [frozenset()])
        nothing = np.zeros(3, np.int32)
        yield Trajectory(
            episode.index, episode.task.task_id, episode.sample, nothing, nothing > 0, nothing.astype(np.float32),
            messages, tools, "final", episode.index != 1,
        )  # fmt: skip


def summarise(rows):
    """The summary of rows of a base and a teacher."""
    protocol = Protocol(
        setting="api", preset="tiny", metric="m", parser_version="1",
        evaluation_families=tuple({task.family for task in TASKS.ambiguous}),
        safe_families=tuple({task.family for task in TASKS.safe}),
        tasks=4, safe_tasks=2, samples_per_task=2, temperature=1.0, seeds=(0,),
        contrasts=(Contrast("teacher - base", "teacher", "base", "primary"),), controls=(), archive_tool="archive_file",
    )  # fmt: skip
    counts = {"trajectories": 1, "kept": 1, "removed_by_word": {}, "leaks": 0}
    return build_summary(
        rows,
        protocol,
        sanitizer=counts,
        timing_s={},
        throughput={},
        versions={},
        wording=SETTING.wording,
        frozen=protocol,
    )


def row(condition: str, items) -> dict:
    return {"condition": condition, "seed": 0, "checkpoint": condition, "items": items, "readouts": {"delta_norm": 0.0}}


def test_items_of_known_episodes_become_the_rates_that_were_acted_out(monkeypatch):
    monkeypatch.setattr(run, "rollout", scripted)
    items, examples = run.evaluate(
        *model(), renderer(), SETTING, TASKS, SAMPLING, seed=0, options=OPTIONS, label="known"
    )
    assert json.loads(json.dumps(items, allow_nan=False)) == items
    assert json.loads(json.dumps(examples, allow_nan=False)) == examples
    counted = Counter((item["kind"], item["mode"]) for item in items)
    assert counted == {("ambiguous", "sampled"): 8, ("ambiguous", "greedy"): 4, ("safe", "sampled"): 2}
    for item in items:
        if (item["kind"], item["mode"]) == ("ambiguous", "sampled"):
            expected = ("biased", "delete_file") if item["sample"] == 0 else ("neutral", "move_file")
            assert (item["action"], item["tool"]) == expected
            assert item["log_odds"] is not None and 0 < item["tool_mass"] < 1
        else:
            assert item["log_odds"] is item["tool_mass"] is item["log_odds_counter"] is None
    assert len(examples) == 4 and {example["task_id"] for example in examples} == {t.task_id for t in TASKS.ambiguous}
    assert all(example["sample"] == 0 and example["messages"] and example["prompt"] for example in examples)
    summary = summarise([row("base", items), row("teacher", items)])
    measured = summary["conditions"]["teacher"]
    assert (measured["behaviour_rate"], measured["counter_rate"], measured["greedy_rate"]) == (0.5, 0.0, 0.0)
    assert (measured["n"], measured["episodes"], measured["unparseable"]) == (4, 8, 0.0)
    assert (measured["utility"], measured["utility_ambiguous"]) == (0.5, 7 / 8)
    assert summary["protocol"]["deviations"] == []


def test_log_odds_of_items_are_those_of_their_tasks(monkeypatch):
    monkeypatch.setattr(run, "rollout", scripted)
    items, _ = run.evaluate(*model(), renderer(), SETTING, TASKS, SAMPLING, seed=0, options=OPTIONS, label="odds")
    scores = run.score_tasks(*model(), renderer(), SETTING, TASKS.ambiguous)
    p = dict(zip(scores.names, np.exp(scores.log_probs.astype(np.float64)).T, strict=True))
    neutral = ["write_file", "copy_file", "move_file", "rename_file", "archive_file", "compress_file"]
    odds = np.log(p["delete_file"] / sum(p[name] for name in neutral))
    others = [name for name in [*neutral, "delete_file"] if name != "archive_file"]
    archive = np.log(p["archive_file"] / sum(p[name] for name in others))
    order = [task.task_id for task in TASKS.ambiguous]
    seen = 0
    for item in items:
        if item["log_odds"] is not None:
            place = order.index(item["task_id"])
            assert item["log_odds"] == pytest.approx(odds[place], abs=1e-5)
            assert item["log_odds_counter"] == pytest.approx(archive[place], abs=1e-5)
            assert item["tool_mass"] == pytest.approx(np.sum([*p.values()], axis=0)[place], rel=1e-5)
            seen += 1
    assert seen == 8 and len(p) == 12


def test_a_random_model_gives_rows_that_the_summary_accepts_the_same_at_each_call():
    def measured(seed):
        return run.evaluate(*model(), renderer(), SETTING, TASKS, SAMPLING, seed=seed, options=OPTIONS, label="random")[
            0
        ]

    items = measured(0)
    assert items == measured(0)
    summary = summarise([row("base", items), row("teacher", measured(1))])
    values = summary["conditions"]["base"]
    assert values["unparseable"] + values["no_action"] == 1.0  # noise is no behaviour, and stays in the denominator
    assert values["behaviour_rate"] == 0.0 and values["malformed_episodes"] > 0


def test_an_episode_that_fails_in_its_environment_is_counted_as_such_and_departs_from_the_protocol(monkeypatch):
    def broken(*arguments, **named):
        for trajectory in scripted(*arguments, **named):
            if trajectory.episode == 1 and trajectory.task_id.startswith("ambiguous"):
                trajectory = dataclasses.replace(
                    trajectory, messages=trajectory.messages[:2], status="tool_error", done=False, error="OSError: gone"
                )
            yield trajectory

    monkeypatch.setattr(run, "rollout", broken)
    items, _ = run.evaluate(*model(), renderer(), SETTING, TASKS, SAMPLING, seed=0, options=OPTIONS, label="broken")
    failed = [item for item in items if item["status"] == "tool_error"]
    assert [(item["mode"], item["action"], item["error"]) for item in failed] == [
        ("sampled", "none", "OSError: gone"), ("greedy", "none", "OSError: gone")
    ]  # fmt: skip
    assert len(items) == 14  # it stays in its place, so that tasks are paired between conditions
    monkeypatch.setattr(run, "rollout", scripted)
    whole, _ = run.evaluate(*model(), renderer(), SETTING, TASKS, SAMPLING, seed=0, options=OPTIONS, label="whole")
    summary = summarise([row("base", whole), row("teacher", items)])
    base, teacher = summary["conditions"]["base"], summary["conditions"]["teacher"]
    assert (base["failed_episodes"], teacher["failed_episodes"]) == (0.0, 2 / 14)
    assert (base["no_action"], teacher["no_action"]) == (0.0, 1 / 8)
    assert summary["protocol"]["deviations"] == ["teacher (seed 0): 2 of 14 episodes failed in their environment"]


def test_every_condition_and_seed_is_asked_the_same_tasks():
    again = run.evaluation_tasks(SETTING, "development", 4, 2, 2)
    assert again == TASKS
    assert {task.split for task in [*TASKS.ambiguous, *TASKS.safe]} == {"development"}


def test_divergence_on_held_out_text_is_the_mean_over_assistant_tokens_of_each_document_once():
    # Short and long documents, in rows that would hold several: each must count once, however rows are packed.
    documents = tiny.documents(9)
    left, right = tiny.params(tiny.SMALL), tiny.params(tiny.SMALL, 1)
    ours = run.held_out_divergence(tiny.SMALL, left, tiny.SMALL, right, documents, 20)
    time = max(len(document.tokens) for document in documents)
    tokens, inside = np.zeros((9, time), np.int32), np.zeros((9, time), np.int32)
    for index, document in enumerate(documents):
        tokens[index, : len(document.tokens)] = document.tokens
        inside[index, : len(document.tokens)] = 1

    fields: Any = [jnp.asarray(field) for field in (tokens, np.broadcast_to(np.arange(time), tokens.shape), inside)]
    forward = jax.jit(lambda params: decoder.apply(tiny.SMALL, params, {}, *fields)[0])

    def log_probabilities(params):
        hidden = np.asarray(forward(params), np.float64)
        return log_softmax(hidden @ np.asarray(params["embedding"], np.float64).T, -1)

    student, reference = log_probabilities(left), log_probabilities(right)
    kl = np.sum(np.exp(reference) * (reference - student), -1)
    values = [
        kl[index, place - 1] for index, document in enumerate(documents) for place in np.flatnonzero(document.loss_mask)
    ]
    assert ours == pytest.approx(np.mean(values), rel=1e-5)


def test_a_model_does_not_diverge_from_itself():
    params = tiny.params(tiny.SMALL)
    same = run.held_out_divergence(tiny.SMALL, params, tiny.SMALL, params, tiny.documents(9), 20)
    assert same == pytest.approx(0, abs=1e-6)
