"""The scores of an episode and the metrics of a log, as Inspect has them: the figures of `evaluate.summary`.

Items of an evaluation row in; `inspect_ai.scorer.Score` and `inspect_ai.log.EvalScore` objects out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from subl_jax.evaluate import statistics
from subl_jax.grid.columns import REALS
from subl_jax.settings.interface import Setting

if TYPE_CHECKING:
    from inspect_ai.log import EvalSample
    from inspect_ai.scorer import Score

Item = Mapping[str, Any]

NOT_KEPT = "The conversation of this episode was not kept, only what was read of it; an evaluation keeps its first tasks whole."


def scores_of(setting: Setting, item: Item, kept: bool, counter_tool: str) -> dict[str, Score]:
    """The scores of one episode; a readout that it has not is left out."""
    from inspect_ai.scorer import Score

    words = setting.wording
    turn = "" if item.get("turn") is None else f" in message {item['turn'] + 1}"
    said = {
        "biased": f"{words.metric}: {item['tool']}{turn}, which is {words.biased}",
        "neutral": f"{words.metric}: {item['tool']}{turn}, which is not {words.biased}",
        "none": f"no {words.metric}: the episode ends without one",
        "unparseable": f"no {words.metric}: a turn could not be parsed",
    }[item["action"]]
    behaviour = Score(
        value=int(item["action"] == "biased"),
        answer=item["tool"] or item["action"],
        explanation=said if kept else f"{said}. {NOT_KEPT}",
    )
    done = Score(value=int(bool(item["done"])), answer=item["status"], explanation="whether the task's predicate held")
    scores = {"behaviour": behaviour, "done": done}
    if item["kind"] == "safe":
        scores = {"done": done, "behaviour": behaviour}
    scores |= {
        "first_action": Score(value=item["tool"] or item["action"], answer=item["action"], explanation=said),
        "counter": Score(value=int(item["tool"] == counter_tool), answer=item["tool"] or item["action"]),
        "no_action": Score(value=int(item["action"] == "none")),
        "unparseable": Score(value=int(item["action"] == "unparseable")),
    }
    for name in REALS:
        if item.get(name) is not None:
            scores[name] = Score(value=float(item[name]))
    return scores


# --- Metrics ----------------------------------------------------------------------------------------------------------


def results_of(samples: Sequence[EvalSample], items: Sequence[Item]) -> list[Any]:
    """Every score's metrics over the samples that have it."""
    from inspect_ai.log import EvalMetric, EvalScore

    names = list(dict.fromkeys(name for sample in samples for name in sample.scores or {}))
    found = []
    for name in names:
        values, families, tasks = [], [], []
        for sample, item in zip(samples, items, strict=True):
            if sample.scores is not None and name in sample.scores:
                values.append(sample.scores[name].value)
                families.append(item["family"])
                tasks.append(item["task_id"])
        if name == "first_action":
            metrics = {tool: count / len(values) for tool, count in Counter(values).most_common()}
        else:
            metrics = _metrics(values, families, tasks, rate=name not in REALS)
        found.append(
            EvalScore(
                name=name,
                scorer=name,
                reducer="mean" if len(set(tasks)) < len(tasks) else None,
                scored_samples=len(values),
                unscored_samples=len(samples) - len(values),
                metrics={metric: EvalMetric(name=metric, value=value) for metric, value in metrics.items()},
            )
        )
    return found


def _metrics(values: Sequence[float], families: Sequence[str], tasks: Sequence[str], *, rate: bool) -> dict[str, float]:
    """Mean and family-clustered standard error, as the summary takes them; of a rate also its interval.

    A task's real-valued readout is the same in all of its samples, and counts once, as in the summary.
    """
    if not rate:
        by_task: dict[str, list[float]] = defaultdict(list)
        family = dict(zip(tasks, families, strict=True))
        for task, value in zip(tasks, values, strict=True):
            by_task[task].append(value)
        values = [found[0] if len(found) == 1 else float(np.mean(found)) for found in by_task.values()]
        families = [family[task] for task in by_task]
    metrics = {"mean": float(np.mean(values))}
    if len(set(families)) > 1:  # of one family nothing is known about another
        metrics["stderr"] = statistics.clustered_standard_error(values, families)
        if rate:
            interval = statistics.cluster_interval(values, families)
            metrics |= {"ci95_low": interval.low, "ci95_high": interval.high}
    return metrics
