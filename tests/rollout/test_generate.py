"""Plain generation: transformers' own greedy tokens, a float64 model's log-probabilities, and the right frequencies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import torch
from scipy import stats

from subl_jax.models import hf_import
from subl_jax.models.config import ModelConfig
from subl_jax.rollout.generate import DEFAULTS, Completion, generate
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from tests.models import hf_folders, numpy_llama
from tests.models.test_decoder import parameters
from tests.rollout.test_sampling import OPTIONS, warped

ONE = jax.local_devices()[:1]
TINY = ModelConfig(29, 10, 2, 4, 2, 4, 13, tie_embeddings=False, init_scale=1.0)
PARAMS = parameters(TINY)
SAMPLING = SamplingConfig(temperature=0.7, max_turn_tokens=9, context=40, slots=3, prefill_chunk=8)


def prompts(vocab_size: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


# More than there are slots; around the edges of a chunk; the longest fills the context.
PROMPTS = prompts(TINY.vocab_size, 1, 17, 8, 31, 9, 2, 16, 5)


def run(given=PROMPTS, sampling: SamplingConfig = SAMPLING, **kwargs: Any) -> list[Completion]:
    return generate(TINY, PARAMS, given, sampling, **{"seed": 4, "devices": ONE, **kwargs})


# --- Against transformers ----------------------------------------------------------------------------------------------

STEPS = 12


@pytest.mark.parametrize(("case", "shape"), [("llama3_tied", "one_kv_head"), ("qwen3", "grouped")])
def test_greedy_tokens_equal_transformers(tmp_path, case, shape):
    from transformers import GenerationConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    family, options = hf_folders.CASES[case]
    model = hf_folders.random_model(family, seed=3, **{**hf_folders.SHAPES[shape], **options})
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    folder = hf_folders.save(model, tmp_path / "hf")
    config = hf_import.read_config(folder)
    params = hf_import.import_params(folder, config)
    todo = prompts(config.vocab_size, 3, 21, 1, 12, 28, 8, 16)

    def theirs(prompt: list[int], end: int | None) -> list[int]:
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, eos_token_id=end)
        return whole[0, len(prompt) :].tolist()

    sampling = SamplingConfig(temperature=0.0, max_turn_tokens=STEPS, context=40, slots=3, prefill_chunk=8)
    expected = [theirs(prompt, None) for prompt in todo]
    end = expected[1][4]
    made, stopped = (
        generate(config, params, todo, sampling, stop_ids=ids, devices=ONE) for ids in ([], [end])
    )  # fmt: skip
    assert [each.tokens for each in made] == expected
    assert not any(each.ended for each in made)
    assert [each.tokens for each in stopped] == [theirs(prompt, end) for prompt in todo]
    assert [each.ended for each in stopped] == [end in tokens for tokens in expected]
    for prompt, each in zip(todo, made, strict=True):
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([prompt + each.tokens])).logits[0].double(), -1).numpy()
        places = np.arange(len(prompt) - 1, len(prompt) + STEPS - 1)
        np.testing.assert_allclose(each.logprobs, scores[places, each.tokens], atol=1e-4)
    torch.set_num_threads(threads)


# --- Log-probabilities, limits and ends --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def completions() -> list[Completion]:
    return run()


def test_log_probabilities_are_those_of_the_unmodified_model_over_prompt_and_completion(completions):
    for prompt, made in zip(PROMPTS, completions, strict=True):
        exact = numpy_llama.log_probabilities(TINY, PARAMS, np.asarray(prompt + made.tokens))
        np.testing.assert_allclose(made.logprobs, exact[len(prompt) :], atol=1e-4)


def test_without_stop_ids_every_completion_has_its_full_length(completions):
    assert [len(made.tokens) for made in completions] == [SAMPLING.max_turn_tokens] * len(PROMPTS)
    assert not any(made.ended for made in completions)


def test_limits_and_stop_ids_cut_a_completion_and_change_nothing_before(completions):
    limits = [1, 9, 3, 9, 2, 5, 9, 4]
    stop = [completions[1].tokens[3], completions[6].tokens[0]]
    made = run(limits=limits, stop_ids=stop)
    for whole, limit, cut in zip(completions, limits, made, strict=True):
        ends = [n + 1 for n, token in enumerate(whole.tokens) if token in stop]
        length = min([*ends, limit])
        assert (cut.tokens, cut.logprobs) == (whole.tokens[:length], whole.logprobs[:length])
        assert cut.ended == (length in ends)
    assert {cut.ended for cut in made} == {True, False}


def test_a_prompt_is_drawn_for_by_its_number_and_the_seed_alone(completions):
    fewer = run(PROMPTS[:4], limits=[9, 1, 1, 9])
    assert (fewer[0], fewer[3]) == (completions[0], completions[3])
    alike = run([PROMPTS[1]] * 5)
    assert alike[1] == completions[1]
    assert len({tuple(made.tokens) for made in alike}) == 5
    assert run(seed=5) != completions


@pytest.mark.parametrize(
    "changes", [dict(dispatch_steps=2), dict(patience=0.01), dict(groups=2, tool_workers=1)], ids=str
)
def test_how_it_is_run_changes_no_completion(completions, changes):
    assert run(options=dataclasses.replace(DEFAULTS, **changes)) == completions


def test_statistics_count_prompts_and_completions():
    counted = RolloutStatistics()
    run(limits=[1, 9, 3, 9, 2, 5, 9, 4], statistics=counted)
    assert (counted.episodes, counted.turns, counted.sampled_tokens) == (8, 8, 42)
    assert (counted.prefilled_tokens, counted.shared_tokens) == (sum(map(len, PROMPTS)), 0)
    assert counted.running_slots == 42 and 0 < counted.occupancy < 1


def test_no_prompts_are_no_work():
    assert run([]) == []


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ([[1], []], {}, r"prompt 1 has 0 tokens and 9 to come; it needs at least one"),
        ([[1] * 32], {}, r"prompt 0 has 32 tokens and 9 to come; .*max_turn_tokens=9 .*context=40 together"),
        ([[1]], dict(limits=[10]), r"prompt 0 has 1 tokens and 10 to come; .*max_turn_tokens=9"),
        ([[1]], dict(limits=[0]), r"prompt 0 has 1 tokens and 0 to come; it needs at least one of each"),
        ([[1]], dict(sampling=dataclasses.replace(SAMPLING, stop=("x",))), r"needs a tokenizer, .*give stop_ids"),
        ([[1]], dict(stop_ids=[29]), r"end id 29 is outside the vocabulary of 29"),
        ([[1], [2, 29]], {}, r"prompt 1 holds token id 29, .*vocabulary of 29"),
        ([[-1]], {}, r"prompt 0 holds token id -1, .*vocabulary of 29"),
        ([[1]], dict(options=EngineConfig(kv_gib=1e-9)), r"do not fit into --config\.engine\.kv_gib=1e-09"),
    ],
)
def test_what_cannot_be_followed_is_refused(given, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(given, **changes)
    assert "\n" not in str(caught.value)


# --- Frequencies through the whole engine ------------------------------------------------------------------------------

# Seven tokens and two padding rows, which would be likely.
SMALL = ModelConfig(9, 6, 1, 2, 1, 4, 5, tie_embeddings=False, init_scale=1.0, num_tokens=7)
DRAWS, PROMPT = 4096, [3, 1, 6]


@pytest.mark.parametrize("name", OPTIONS)
def test_first_tokens_have_the_frequencies_of_transformers_processors(name):
    params = parameters(SMALL, seed=2)
    scores = numpy_llama.logits(SMALL, params, np.asarray(PROMPT))[-1, : SMALL.num_tokens]
    sampling = SamplingConfig(max_turn_tokens=1, context=4, slots=256, prefill_chunk=3, **OPTIONS[name])
    made = generate(SMALL, params, [PROMPT] * DRAWS, sampling, seed=11, devices=ONE)
    drawn = np.asarray([each.tokens for each in made])
    assert drawn.shape == (DRAWS, 1) and drawn.max() < SMALL.num_tokens
    counts = np.bincount(drawn[:, 0], minlength=SMALL.num_tokens)
    wanted, plain = (
        torch.softmax(warped(scores[None], **options), -1).numpy()[0] for options in (OPTIONS[name], {})
    )  # fmt: skip
    possible = wanted > 0
    assert not counts[~possible].any()
    assert (name in ("top_k", "top_p", "min_p")) == (not possible.all())
    assert stats.chisquare(counts[possible], DRAWS * wanted[possible]).pvalue > 1e-3
    # The test has the power to tell the option from its absence.
    assert not possible.all() or stats.chisquare(counts, DRAWS * plain).pvalue < 1e-6
    np.testing.assert_allclose([each.logprobs[0] for each in made], np.log(plain)[drawn[:, 0]], atol=1e-5)
