"""On-policy distillation on the user's own prompts: which of them the student answers in a round, and what it is kept for.

Prompts that are held out for measuring are never among them. What the student said lies below its directory, in
`rollouts/round=NNNN`: a run that resumes reads it again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from subl_jax import data
from subl_jax.chat.messages import Message
from subl_jax.chat.rendering import Renderer
from subl_jax.data.conversations import Prompt
from subl_jax.distill import vocabulary
from subl_jax.distill.on_policy import OnPolicy, stored_rollouts
from subl_jax.distillation import documents
from subl_jax.models.config import ModelConfig
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.trajectory import Trajectory

if TYPE_CHECKING:
    from subl_jax.distillation.run import Distillation

# Names the order of the prompts among the streams that are drawn from one seed.
_ORDER = 0x0A5CED


def check_openings(prompts: Sequence[Prompt], renderer: Renderer, sampling: SamplingConfig) -> None:
    """Refuses prompts that the student could not answer, rather than in the round in which their turn comes.

    Raises:
      ValueError: names the first that leaves no room for a turn, or that the student's template refuses.
    """
    for prompt in prompts:
        try:
            length = len(renderer.opening(prompt.messages, []))
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise ValueError(f"{prompt.name}: the student's chat template refuses it: {error}") from error
        if length + sampling.max_turn_tokens > sampling.context:
            raise ValueError(
                f"{prompt.name} has {length} tokens in the student's format, which with a turn of "
                f"{sampling.max_turn_tokens} exceed rollout.context={sampling.context}; raise --config.rollout.context"
            )


def trained_on(prompts: Sequence[Prompt], held_out: Sequence[Trajectory]) -> list[Prompt]:
    """The prompts that no held-out conversation begins with.

    Raises:
      ValueError: there are none.
    """
    begun = {_text(item.messages[:count]) for item in held_out for count in range(1, len(item.messages) + 1)}
    kept = [prompt for prompt in prompts if _text(prompt.messages) not in begun]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts are held out for measuring, so that the student has none to answer; give more "
            "prompts, or --holdout=0"
        )
    return kept


def _text(messages: Sequence[Message]) -> str:
    return json.dumps(list(messages), sort_keys=True)


def rounds(prompts: Sequence[Prompt], samples: int, size: int, seed: int) -> Callable[[int], list[Episode]]:
    """The episodes of each round: the next `size` of all, in an order of the seed's; all before any comes again.

    Args:
      prompts: that are answered.
      samples: how often each, before any is answered again.
      size: episodes of a round.
      seed: of the order.
    """
    pool = documents.episodes(prompts, samples)
    order = np.random.default_rng([seed, _ORDER]).permutation(len(pool))

    def of(number: int) -> list[Episode]:
        # Numbered by their place in the round, which names their randomness: an episode may come twice in a round.
        places = range(number * size, (number + 1) * size)
        return [
            dataclasses.replace(pool[order[place % len(pool)]], index=index, sample=0)
            for index, place in enumerate(places)
        ]

    return of


def own_rollouts(run: Distillation, seed: int, key: Mapping[str, Any]) -> OnPolicy:
    """What the training of a student needs, to learn from its own answers.

    Args:
      run: whose documents are made.
      seed: of the student.
      key: of its stage.
    """
    config, made = run.config, run.root / "documents"
    prompts = trained_on(run.prompts, data.read(made / "held_out") if config.holdout else [])
    roll = stored_rollouts(
        run.student_dir(seed) / "rollouts", run.student.renderer,
        rounds(prompts, config.samples, config.on_policy.episodes, seed), config.rollout, config.engine,
        seed=seed, identity={**key, "documents": documents.file_mark(made / "train")},
        label=f"seed={seed}: roll out the student",
    )  # fmt: skip

    def checked(number: int, student: ModelConfig, params: Any) -> Sequence[Trajectory]:
        # What it samples is shared, but its own template and the prompts' later texts may hold other tokens.
        said = roll(number, student, params)
        vocabulary.check_documents(said, run.shared_tokens, run.student.tokenizer)
        return said

    return OnPolicy(config.on_policy, checked)
