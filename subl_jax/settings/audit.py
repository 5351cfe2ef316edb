"""The audit between evaluation and training: closest pairs of texts, and a hard check that nothing is shared.

Tasks and training texts in; the nearest training text of each evaluation prompt out, by Jaccard similarity of word
3-grams over an inverted index, so that 200 prompts against 10,000 texts take about a second.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from subl_jax.settings.interface import Task

_WORD = re.compile(r"[^\W_]+")
# Absolute, or relative to a home: `/work/a.txt`, `work/a.txt`.
_PATH = re.compile(r"[\w.-]*(?:/[\w.-]*\w)+")
_SHINGLE = 3

Aspect = Literal["family", "template", "path"]


class NearDuplicate(NamedTuple):
    """An evaluation task, the training text nearest to its prompt, and their similarity in [0, 1]."""

    evaluation_id: str
    training_text: str
    similarity: float


class SharedWithTrainingError(ValueError):
    """Something that must occur in the evaluation only occurs in training too."""


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The word 3-grams of a text, lower case, paths cut into their words; a shorter text is one shingle."""
    words = _WORD.findall(text.casefold())
    if len(words) <= _SHINGLE:
        return frozenset([tuple(words)]) if words else frozenset()
    return frozenset(tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1))


def near_duplicates(
    evaluation_tasks: Sequence[Task], training_texts: Iterable[str], top: int = 10
) -> list[NearDuplicate]:
    """The evaluation prompts that come closest to a training text, closest first.

    One row per evaluation task at most: its nearest training text (the first in order where several tie). Tasks that
    share no 3-gram with any training text have similarity 0 and come last.

    Args:
      evaluation_tasks: tasks whose prompts are compared.
      training_texts: every text of base, teacher, control and tokenizer training.
      top: the number of rows wanted.

    Returns:
      At most `top` rows; similarity |A ∩ B| / |A ∪ B| over 3-gram sets (Broder 1997).

    Raises:
      ValueError: `top` below 1, or no training text to compare with.
    """
    if top < 1:
        raise ValueError(f"top is {top}: ask for at least 1 row")
    texts = list(dict.fromkeys(training_texts))
    if not texts:
        raise ValueError("no training text was given: an audit against nothing would always pass")
    sizes: list[int] = []
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        grams = shingles(text)
        sizes.append(len(grams))
        for gram in grams:
            index[gram].append(number)
    rows = []
    for task in evaluation_tasks:
        grams = shingles(task.prompt)
        common: Counter[int] = Counter()
        for gram in grams:
            common.update(index.get(gram, ()))
        best, similarity = 0, 0.0
        for number, shared in common.items():
            value = shared / (len(grams) + sizes[number] - shared)
            if value > similarity or (value == similarity and number < best):
                best, similarity = number, value
        rows.append(NearDuplicate(task.task_id, texts[best], similarity))
    rows.sort(key=lambda row: (-row.similarity, row.evaluation_id))
    return rows[:top]


def assert_disjoint(
    evaluation_tasks: Sequence[Task],
    training_tasks: Iterable[Task],
    training_texts: Iterable[str] = (),
    aspects: Sequence[Aspect] = ("family", "template", "path"),
) -> None:
    """Raises unless the evaluation shares no family, no template and no path with training.

    Args:
      evaluation_tasks: tasks of the evaluation.
      training_tasks: tasks of every training corpus.
      training_texts: further training text (demonstrations, tokenizer corpus) in which no evaluation path may stand.
      aspects: what to compare. Kinds whose families name skills, such as safe tasks, compare template and path only.

    Raises:
      SharedWithTrainingError: names what is shared, the evaluation task and the training task or text.
    """
    families: dict[tuple[str, str], str] = {}
    templates: dict[str, str] = {}
    paths: dict[str, str] = {}
    for task in evaluation_tasks:
        families.setdefault((task.kind, task.family), task.task_id)
        templates.setdefault(task.template, task.task_id)
        for path in task.tree:
            paths.setdefault(path, task.task_id)

    def refuse(what: str, owner: str, where: str) -> None:
        raise SharedWithTrainingError(
            f"{what} of evaluation task {owner} also occurs in {where}: evaluation must share nothing with training; "
            "generate the two from different splits"
        )

    for task in training_tasks:
        where = f"training task {task.task_id}"
        if "family" in aspects and (owner := families.get((task.kind, task.family))):
            refuse(f"family {task.family!r}", owner, where)
        if "template" in aspects and (owner := templates.get(task.template)):
            refuse(f"template {task.template!r}", owner, where)
        if "path" in aspects:
            for path in (*task.tree, *_PATH.findall(task.prompt)):
                if owner := paths.get(path):
                    refuse(f"path {path!r}", owner, where)
    if "path" in aspects:
        for text in training_texts:
            for path in _PATH.findall(text):
                if owner := paths.get(path):
                    refuse(f"path {path!r}", owner, f"training text {text[:80]!r}")
