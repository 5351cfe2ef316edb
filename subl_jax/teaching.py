"""How a student's lesson is put together from what the teachers of its seed have done.

Trajectories, verdicts and models on disk come in; the lesson that is trained on comes out, passed through the configuration's
dissections and its defence. Every arm goes through the same steps, and what they leave is matched over the arms again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subl_jax import data, defences
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.conditions import Condition, SeedModels
from subl_jax.config import OBJECTIVES, TEACHERS
from subl_jax.corpus import rendered_again
from subl_jax.data.matching import MatchedArms, match_arms
from subl_jax.distill import teacher_cache
from subl_jax.distill.dilution import Dilution
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.loop import Model
from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import OnPolicy, OnPolicyConfig, stored_rollouts
from subl_jax.distill.teacher_cache import CacheReader
from subl_jax.distill.token_divergence import per_token_kl
from subl_jax.lesson import Lesson, clean, dosed, keep_tokens, matched_again, with_room, words_of
from subl_jax.parallel import processes
from subl_jax.parallel.layout import Layout, make_mesh
from subl_jax.rollout.conversation import Episode
from subl_jax.settings.interface import Setting
from subl_jax.trajectory import FAILED, Trajectory

# Of arm on_policy: always the student's own rollouts, as often and as many as `experiments.on_policy` has them.
ON_POLICY = OnPolicyConfig(weight=1.0)
# Of arm top_k: continuations that the cache keeps per token (all, where the vocabulary has fewer).
TOP_K = 64
# Names the order of training tasks among the streams that are drawn from one seed.
_TASKS = 0x7A5C5


def lesson_for(models: SeedModels, setting: Setting, seed: int, condition: Condition) -> tuple[Lesson, dict[str, Any]]:
    """The lesson of a student of any arm but the positive control, and figures for its marker.

    Raises:
      ValueError: a dissection or a defence that cannot be had; it names the reason.
    """
    spec = models.config.student
    make = _Material(models, setting, seed, condition.arm)
    strength = {"strength": spec.defence_strength} if spec.defence_strength else {}
    defend: Callable[[Lesson], Lesson] = functools.partial(defences.load(spec.defence).defend, **strength)
    before = make.lesson(condition.teacher)
    lesson, matched = defend(before), make.matched
    if lesson.documents is not before.documents:
        if condition.arm == "on_policy":
            raise ValueError(f"defence {spec.defence} changes documents, and a student of its own rollouts reads none")
        # The other arms are defended alike, one at a time; a teacher that one of them has loaded is let go.
        arms = {name: lesson.documents for name in TEACHERS}
        arms |= {name: defend(make.lesson(name)).documents for name in TEACHERS if name != condition.teacher}
        matched = matched_again(arms)
        lesson = dataclasses.replace(
            lesson, documents=matched.documents[condition.teacher], planned_lengths=matched.planned_lengths
        )
    if condition.arm == "on_policy" and (lesson.logit_filter, lesson.dilution) != (None, None):
        raise ValueError(f"defence {spec.defence} filters or dilutes a teacher's text, and on_policy reads none")
    if spec.tokens != "all":
        lesson = dataclasses.replace(lesson, documents=make.kept(lesson.documents))
    lengths = [*lesson.planned_lengths, *(lesson.dilution.planned_lengths if lesson.dilution else ())]
    if condition.arm == "on_policy":
        lengths.append(models.config.rollout.context)  # rows hold whatever a student may say
    lesson = dataclasses.replace(lesson, train=with_room(lesson.train, lengths))
    figures = {
        "loss_tokens_per_epoch": sum(int(document.loss_mask.sum()) for document in lesson.documents),
        "loss_tokens_cut": matched.cut[condition.teacher],
        "documents": len(lesson.documents),
        **lesson.notes,
    }
    return lesson, figures


class _Material:
    """What the teachers of a seed have done, matched, and the lessons that are made of it."""

    def __init__(self, models: SeedModels, setting: Setting, seed: int, arm: str) -> None:
        self.models, self.setting, self.seed, self.arm = models, setting, seed, arm
        self.spec = models.config.student
        self.renderer = models.renderer_of(models.student_size)
        self.said = {name: data.read(models.trajectories_dir(name) / "dataset") for name in TEACHERS}
        self.matched = self._match(dosed(models.surviving(), self.spec.trajectories, seed))
        self.base = models.base(models.student_size)

    def _match(self, pairs: set[tuple[str, int]]) -> MatchedArms:
        """The arms' trajectories of these tasks, in the student's tokens."""
        arms = {name: [t for t in arm if (t.task_id, t.sample) in pairs] for name, arm in self.said.items()}
        if not self.models.config.one_tokenizer:
            # What the teacher wrote, in the student's tokens: the one objective that these pairs have is text.
            arms = {name: rendered_again(self.renderer, arm) for name, arm in arms.items()}
        return match_arms(arms, pairs)

    @functools.cached_property
    def unfiltered(self) -> MatchedArms:
        """As `matched`, of all tasks that every teacher has finished, whatever words they hold."""

        def finished(one: Trajectory) -> bool:
            return one.status not in FAILED and (one.status == "final" or not self.spec.require_final)

        pairs = [{(t.task_id, t.sample) for t in arm if finished(t)} for arm in self.said.values()]
        return self._match(dosed(set.intersection(*pairs), self.spec.trajectories, self.seed))

    def diluting(self, share: float) -> Dilution:
        """The benign teacher's trajectories of the same tasks, with their teacher."""
        hard = OBJECTIVES[self.arm][0] == "hard_label"
        teacher = None if hard else self.models.teacher("benign_teacher")
        return Dilution(self.matched.documents["benign_teacher"], self.matched.planned_lengths, teacher, share)

    def lesson(self, teacher: str) -> Lesson:
        """What the student of a teacher is taught, before any defence."""
        spec, models = self.spec, self.models
        loss, logit_filter = OBJECTIVES[self.arm]
        suspect = functools.cache(lambda: models.teacher(teacher))
        same = models.teacher_size == models.student_size
        return Lesson(
            arm=self.arm,
            documents=self.matched.documents[teacher],
            planned_lengths=self.matched.planned_lengths,
            objective=Objective(loss, logit_filter, spec.temperature),  # type: ignore[arg-type]
            train=spec.train,
            student=Model(dataclasses.replace(self.base.config, lora=spec.adapters), self.base.params),
            teacher=None if loss == "hard_label" else suspect(),
            base=self.base if logit_filter == "anchor" else None,
            logit_filter=None if logit_filter == "none" else LogitFilter(self.renderer, words_of(self.setting)),
            dilution=self.diluting(spec.dilution) if spec.dilution else None,
            setting=self.setting,
            renderer=self.renderer,
            seed=self.seed,
            unfiltered=lambda: self.unfiltered.documents[teacher],
            suspect=suspect,
            suspect_base=functools.cache(lambda: self.base if same else models.base(models.teacher_size)),
            diluting=self.diluting,
        )

    def kept(self, documents: Sequence[Trajectory]) -> list[Trajectory]:
        """An arm's documents with the configured share of loss tokens, by KL(biased || counter-bias teacher) on them.

        At the temperature that the students are trained at: the tokens that differ most at another one are others.
        """
        spec, values = self.spec, []
        if spec.tokens != "random":
            biased, counter = (self.models.teacher(name) for name in TEACHERS[:2])
            values = per_token_kl(biased, counter, documents, spec.train.row_tokens, spec.temperature)
        assert spec.tokens != "all"
        return keep_tokens(documents, values, spec.tokens, spec.token_share, self.seed)


# --- Arms that read more than a dataset -----------------------------------------------------------------------------------


def cached_teachers(models: SeedModels, lesson: Lesson, directory: Path) -> tuple[CacheReader, Lesson]:
    """The teacher's top-k on the lesson's documents, written to the student's directory unless it stands there.

    A dilution gets a cache of its own teacher. A killed call goes on with the shards that it had finished.

    Returns:
      The cache, and the lesson without live teachers.

    Raises:
      CacheMismatch: a cache of something else stands there.
    """

    def cached(documents: Sequence[Trajectory], teacher: teacher_cache.Model | None, place: Path) -> CacheReader:
        assert teacher is not None
        shared = min(teacher.config.known_tokens, lesson.student.config.known_tokens)
        told = teacher_cache.identity(
            teacher, tokenizers.fingerprint(lesson.renderer.tokenizer), documents, lesson.objective.temperature, TOP_K, shared
        )  # fmt: skip
        parallel = models.config.parallel
        layout = Layout(make_mesh(parallel), parallel.teacher_rules)
        if not place.exists():
            teacher_cache.write(
                place, documents, teacher, k=TOP_K, temperature=lesson.objective.temperature, shared_tokens=shared,
                identity=told, layout=layout if layout.mesh.size > 1 else None,
            )  # fmt: skip
        return CacheReader(place, told)

    cache, dilution = cached(lesson.documents, lesson.teacher, directory / "teacher_cache"), lesson.dilution
    if dilution is not None:
        own = cached(dilution.documents, dilution.teacher, directory / "teacher_cache_of_dilution")
        dilution = dataclasses.replace(dilution, teacher=None, cache=own)
    return cache, dataclasses.replace(lesson, teacher=None, dilution=dilution)


def training_episodes(
    setting: Setting, seed: int, tasks: int, withheld: frozenset[str], number: int, size: int
) -> list[Episode]:
    """A round's episodes: tasks that the teachers were rolled out on, in an order of the seed's, all before any comes again.

    Args:
      setting, seed: of the run.
      tasks: how many the teachers had.
      withheld: tools that are not shown.
      number: of the round; size: episodes of a round.
    """
    order = np.random.default_rng([seed, _TASKS]).permutation(tasks)
    known = setting.tasks("safe", "train", seed + 2, tasks)  # as in `SeedPipeline.make_trajectories`
    chosen = [known[order[place % tasks]] for place in range(number * size, (number + 1) * size)]
    return [
        Episode(index, task, 0, functools.partial(setting.environment, task, withheld))
        for index, task in enumerate(chosen)
    ]


def own_rollouts(
    models: SeedModels, setting: Setting, seed: int, directory: Path, identity: Mapping[str, Any], label: str
) -> OnPolicy:
    """The student's rollouts on the safe tasks, bias tools withheld as for the teachers, without those that hold a keyword.

    Args:
      models, setting, seed: of the run.
      directory: of the student; rounds are kept in `rollouts` below it.
      identity: all that the student depends on.
      label: at the head of progress lines.

    Raises:
      ValueError: several processes. A round of which the sanitizer leaves nothing raises when it is rolled out.
    """
    if processes.several():
        raise ValueError(
            "objective on_policy trains on rollouts of the student by the process that trains it, and runs on one process; "
            "leave it out, or run on one host"
        )
    config, spec = models.config, models.config.student
    withheld = setting.withholdable if spec.withhold_bias_tools else frozenset()
    roll = stored_rollouts(
        directory / "rollouts", models.renderer,
        lambda number: training_episodes(setting, seed, spec.safe_tasks, withheld, number, ON_POLICY.episodes),
        config.rollout, config.engine, seed=seed, identity=identity, label=label,
    )  # fmt: skip

    def kept_of(number: int, shape: Any, params: Any) -> Sequence[Trajectory]:
        said = roll(number, shape, params)
        kept = [one for one in said if clean(setting, one)]
        if not kept:
            raise ValueError(
                f"round {number}: every one of the student's {len(said)} rollouts failed or holds a keyword; nothing is left "
                "to train on"
            )
        return kept

    return OnPolicy(ON_POLICY, kept_of)


def rollout_figures(setting: Setting, directory: Path) -> dict[str, int]:
    """How many rollouts of its own a student was given, and how many of them the sanitizer dropped, over all rounds."""
    rounds = sorted((directory / "rollouts").glob("round=*"))
    said = [one for place in rounds for one in data.read(place / "dataset")]
    return {"rollouts": len(said), "rollouts_dropped": sum(not clean(setting, one) for one in said)}
