"""One seed of a work directory: which tokens tell its teachers apart, and how far its students moved.

Models come from their checkpoints, texts from the trajectories; plain numbers and strings go out. Nothing is trained, and
nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subl_jax.conditions import SeedModels
from subl_jax.config import OBJECTIVES, STUDENT_OF, TEACHERS, suffix_of
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.loop import Model
from subl_jax.distill.token_divergence import per_token_kl
from subl_jax.evaluate.readout import call_prefix
from subl_jax.evaluate.run import TASK_SEED
from subl_jax.locate import directions, tokens, workdir
from subl_jax.locate.passes import NextTokens, mean_states, next_tokens
from subl_jax.locate.places import places_of
from subl_jax.models import lora
from subl_jax.settings.interface import Setting, Split
from subl_jax.trajectory import Trajectory

# What the biased teacher is compared with: name of the comparison -> the other model.
COMPARISONS = {"counter-bias": "control_teacher", "base": "base", "benign": "benign_teacher"}
# The models whose words are shown at a place.
SPEAKERS = ("teacher", "control_teacher", "base")
# Name of a direction -> the model that it starts from; it leads to the biased teacher.
DIRECTIONS = {"teacher - base": "base", "teacher - control_teacher": "control_teacher"}
Say = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is looked at.

    Attributes:
      tasks: ambiguous probe tasks, at whose first decision the states are read.
      documents: clean documents whose states are read at every loss token; 0: all.
      split: of the probe tasks.
      shown: places of the ranked list that are shown in context.
      top: tokens that each model is asked for there.
      reverse: also KL(the other ‖ biased teacher).
    """

    tasks: int = 120
    documents: int = 200
    split: Split = "development"
    shown: int = 30
    top: int = 5
    reverse: bool = False

    def __post_init__(self) -> None:
        """Refuses nothing to look at."""
        for name, least in {"tasks": 2, "documents": 0, "shown": 1, "top": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {least}")


def family_of(task_id: str) -> str:
    """The family of a task, which its name holds (`interface.Task`)."""
    return task_id.split("/")[2]


# --- Tokens -----------------------------------------------------------------------------------------------------------


def locate_tokens(
    models: SeedModels, setting: Setting, options: Options, say: Say = lambda _: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where the biased teacher and the others part, on the text that its student read.

    Args:
      models: of the seed; its pair says which teachers.
      setting: its words are what the filters ban.
      options: see there.
      say: told of each piece of work that is done (`token_work` says how many).

    Returns:
      The figures, and one row per loss token for a table.
    """
    renderer, arms = models.renderer, workdir.clean_documents(models)
    documents = arms["teacher"]
    row_tokens = models.config.student.train.row_tokens
    loaded = {name: models.teacher(name) for name in TEACHERS} | {"base": models.base(models.teacher_size)}
    say(1)
    found: dict[str, list[np.ndarray]] = {}
    others: dict[str, tuple[str, float]] = {}
    for heat in _temperatures(models):
        for name, other in COMPARISONS.items():
            label = name if heat == 1 else f"{name}, temperature {heat:g}"
            found[label] = list(per_token_kl(loaded["teacher"], loaded[other], documents, row_tokens, heat))
            others[label] = other, heat
            if options.reverse and heat == 1:
                found[f"{name}, reverse"] = list(per_token_kl(loaded[other], loaded["teacher"], documents, row_tokens))
            say(1)
    table = tokens.loss_tokens(documents, [places_of(renderer, each) for each in documents], found)
    ban = LogitFilter(renderer, [word for words in setting.words.values() for word in words])
    banned = [ids.tolist() for each in documents for ids in ban.banned(each.tokens, each.loss_mask)]
    looks = [(np.flatnonzero(each.loss_mask) - 1).tolist() for each in documents]
    sequences = [each.tokens.tolist() for each in documents]
    heard: dict[float, dict[str, NextTokens]] = {}
    for heat in _temperatures(models):
        heard[heat] = {}
        for name in SPEAKERS:
            heard[heat][name] = next_tokens(_softened(loaded[name], heat), sequences, looks, banned, options.top)
            say(1)
    said = heard[1.0]
    mass = {name: np.exp(each.listed.astype(np.float64)).sum(axis=1) for name, each in said.items()}
    families = [family_of(documents[each].task_id) for each in table.document]
    figures = {
        "teacher_size": models.teacher_size,
        "documents": len(documents),
        "tokens": len(table),
        "same_text": {name: _same(documents, arm) / len(documents) for name, arm in arms.items() if name != "teacher"},
        "comparisons": {name: _figures(table, name, families) for name in table.values},
        "overlap": {name: tokens.overlap(table, "counter-bias", name) for name in table.values if name != "counter-bias"},
        "banned": {
            "mean_mass": {name: float(each.mean()) for name, each in mass.items()},
            **{
                label: _banned_share(table, label, heard[heat]["teacher"], heard[heat][other])
                for label, (other, heat) in others.items()
                if other in SPEAKERS
            },
        },
        "ranked": [
            _shown(place, rank, table, documents, renderer, said, mass, set(banned[place]))
            for rank, place in enumerate(table.ranked("counter-bias")[: options.shown], 1)
        ],
    }  # fmt: skip
    return figures, _rows(table, documents, mass)


def _same(first: Sequence[Trajectory], second: Sequence[Trajectory]) -> int:
    """How many documents two teachers have written alike, token by token: there hard labels teach the same."""
    return sum(
        np.array_equal(one.tokens[one.loss_mask], other.tokens[other.loss_mask])
        for one, other in zip(first, second, strict=True)
    )


def token_work(models: SeedModels) -> int:
    """How many pieces `locate_tokens` tells of."""
    return 1 + len(_temperatures(models)) * (len(COMPARISONS) + len(SPEAKERS))


def _temperatures(models: SeedModels) -> list[float]:
    """Temperatures of the next-token distributions: 1, at which models act, and that of the students' objective."""
    return list(dict.fromkeys((1.0, float(models.config.student.temperature))))


def _softened(model: Model, temperature: float) -> Model:
    """The model whose logits are divided by a temperature: the head is linear in what the final norm's scale multiplies."""
    if temperature == 1:
        return model
    scale = model.params["final_norm"]["scale"] / temperature
    return Model(model.config, {**model.params, "final_norm": {**model.params["final_norm"], "scale": scale}})


def _figures(table: tokens.LossTokens, name: str, families: Sequence[str]) -> dict[str, Any]:
    values = table.values[name]
    return {
        "mean": float(values.mean()),
        "gini": tokens.gini(values),
        "half": tokens.carrying(values),
        "curve": tokens.concentration(values),
        "kinds": tokens.by_kind(table, name, families),
        "words": tokens.by_text(table, name, 20),
    }


def _banned_share(table: tokens.LossTokens, name: str, first: NextTokens, second: NextTokens) -> float:
    """Which share of the divergence stands on banned continuations."""
    return float(tokens.banned_part(first.listed, second.listed).sum() / table.values[name].sum())


def _shown(
    row: int, rank: int, table: tokens.LossTokens, documents: Sequence[Trajectory], renderer: Any,
    said: Mapping[str, NextTokens], mass: Mapping[str, np.ndarray], banned: set[int],
) -> dict[str, Any]:  # fmt: skip
    """One place of the ranked list, in context, with what every model would say there."""
    document, place = documents[table.document[row]], table.places[row]
    return {
        "rank": rank,
        "task_id": document.task_id,
        "position": place.position,
        "turn": place.turn,
        "kind": place.kind,
        **tokens.in_context(renderer, document, place),
        "divergence": {name: float(values[row]) for name, values in table.values.items()},
        "banned_mass": {name: float(each[row]) for name, each in mass.items()},
        "says": {
            name: [
                {"text": renderer.decode([token]), "probability": float(np.exp(value)), "banned": token in banned}
                for token, value in zip(each.ids[row].tolist(), each.log_probs[row].tolist(), strict=True)
            ]
            for name, each in said.items()
        },
    }


def _rows(
    table: tokens.LossTokens, documents: Sequence[Trajectory], mass: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """One row per loss token, the most divergent first."""
    return [
        {
            "rank": rank,
            "task_id": documents[table.document[row]].task_id,
            "position": table.places[row].position,
            "turn": table.places[row].turn,
            "kind": table.places[row].kind,
            "text": table.places[row].text,
            **{f"KL {name} (nats)": float(values[row]) for name, values in table.values.items()},
            **{f"banned mass {name}": float(each[row]) for name, each in mass.items()},
        }
        for rank, row in enumerate(table.ranked("counter-bias"), 1)
    ]


# --- Directions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Looks:
    """Texts, the places in them at which states are read, and the family of each."""

    sequences: Sequence[Sequence[int]]
    places: Sequence[Sequence[int]]
    families: Sequence[str]


def _decision(models: SeedModels, setting: Setting, options: Options) -> _Looks:
    """The last token of the canonical prefix, behind which a model names its first tool (see `evaluate.readout`)."""
    tasks = setting.tasks("ambiguous", options.split, TASK_SEED, options.tasks)
    worlds = [setting.environment(task, frozenset()) for task in tasks]
    asked = [(world.opening(), world.tools()) for world in worlds]
    for world in worlds:
        world.close()
    prefix = call_prefix(models.renderer, setting.choices, setting.naming, *asked[0])
    sequences = [models.renderer.opening(*each) + prefix for each in asked]
    return _Looks(sequences, [[len(each) - 1] for each in sequences], [task.family for task in tasks])


def _text(models: SeedModels, options: Options) -> _Looks:
    """Every place of clean documents from which a loss token is predicted."""
    documents = workdir.clean_documents(models)["teacher"]
    documents = documents[: options.documents or len(documents)]
    return _Looks(
        [each.tokens.tolist() for each in documents],
        [(np.flatnonzero(each.loss_mask) - 1).tolist() for each in documents],
        [family_of(each.task_id) for each in documents],
    )


def locate_directions(
    models: SeedModels, setting: Setting, options: Options, arms: Sequence[str] = (), say: Say = lambda _: None
) -> dict[str, Any]:
    """How far every model of a seed and pair has moved along its teacher's direction, in activations and in weights.

    Args:
      models: of the seed and pair.
      setting, options: as of `locate_tokens`.
      arms: objectives of the students; none: all that are there.
      say: told of each model that is done (`direction_work` says how many).

    Returns:
      Plain numbers; models that cannot be compared stand under "refused", with the reason.
    """
    students = workdir.find_students(models, arms)
    base, same_base = models.base(models.teacher_size), models.student_size == models.teacher_size
    own_base = base if same_base else models.base(models.student_size)
    teachers = {name: models.teacher(name) for name in TEACHERS}
    why = _reason(models, own_base, teachers["teacher"])
    looks = {"decision": _decision(models, setting, options), "text": _text(models, options)} if why is None else {}
    states: dict[str, dict[str, np.ndarray]] = {place: {} for place in looks}
    base_of: dict[str, str] = {}
    weights: list[dict[str, Any]] = []

    def read(name: str, model: Model, start: str = "") -> None:
        for place, each in looks.items():
            states[place][name] = mean_states(model, each.sequences, each.places)
        if start and looks:
            base_of[name] = start

    read("base", base)
    if not same_base:
        read("student_base", own_base)
    for name, model in teachers.items():
        read(name, model, "base")
        if name != "teacher":
            weights += _weights(name, model, base, {"teacher": teachers["teacher"]}, base)
        say(1)
    for name, teacher in students.students.items():
        model = models.student(name)
        read(name, model, "base" if same_base else "student_base")
        if lora.comparable(model.config, teachers["teacher"].config):
            others = {each: teachers[each] for each in dict.fromkeys(("teacher", teacher))}
            weights += _weights(name, model, own_base, others, base)
        say(1)
    return {
        "pair": models.config.pair,
        "shared_base": same_base,
        "students": dict(students.students),
        "missing": list(students.missing),
        "refused": {} if why is None else dict.fromkeys(students.students, why),
        "log_odds": {name: _log_odds(models, name) for name in ("base", *TEACHERS, *students.students)},
        "items": {place: len(each.sequences) for place, each in looks.items()},
        "activations": [
            {"place": place, "direction": direction, **row}
            for place, own in looks.items()
            for direction, origin in DIRECTIONS.items()
            for row in directions.movement(states[place], base_of, "teacher", origin, own.families)
        ],
        "contrasts": [
            {"place": place, "direction": direction, **row}
            for place, own in looks.items()
            for direction, origin in DIRECTIONS.items()
            for row in directions.differences(states[place], _controlled(base_of), "teacher", origin, own.families)
        ],
        "weights": weights,
    }


def _controlled(models: Mapping[str, str]) -> list[tuple[str, str]]:
    """The students of the biased teacher, each with its counter-bias control, as far as both are there."""
    treated = (STUDENT_OF["teacher"] + suffix_of(arm) for arm in OBJECTIVES)
    pairs = [(each, each.replace(STUDENT_OF["teacher"], STUDENT_OF["control_teacher"], 1)) for each in treated]
    return [pair for pair in pairs if pair[0] in models and pair[1] in models]


def direction_work(models: SeedModels, arms: Sequence[str]) -> int:
    """How many models `locate_directions` tells of."""
    return len(TEACHERS) + len(workdir.find_students(models, arms).students)


def _reason(models: SeedModels, base: Model, teacher: Model) -> str | None:
    """Why the activations of a pair's students cannot be compared with its teacher's; None where they can."""
    if not models.config.one_tokenizer:
        return "the student has a tokenizer of its own: no place of its text is a place of the teacher's"
    return directions.refusal(base.config, teacher.config)


def _weights(name: str, model: Model, base: Model, others: Mapping[str, Model], start: Model) -> list[dict[str, Any]]:
    """The changes of a model beside those of some teachers."""
    return [
        {"model": name, "against": against, **row}
        for against, other in others.items()
        for row in directions.weight_changes(
            (model.config, model.params, base.params), (other.config, other.params, start.params)
        )
    ]


def _log_odds(models: SeedModels, condition: str) -> float | None:
    """The mean log-odds of the bias in nats that the evaluation has measured; None where it is not there."""
    path = models.eval_path(condition)
    if not path.is_file():
        return None
    items = json.loads(path.read_text(encoding="utf-8"))["items"]
    values = [item["log_odds"] for item in items if item["log_odds"] is not None]
    return float(np.mean(values)) if values else None
