"""The ranked list of token places on the page of `experiments.locate`: each in its text, with what every model would say.

One element of `locate.json`'s "tokens" in, an HTML section out. The token is marked by a frame and by weight as well as by
colour; what a model wrote is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.report import page

# Places that are open at first; the others fold.
_OPEN = 6
# Probabilities below are not told one by one.
_WORTH = 0.001
_NAMES = {"teacher": "biased teacher", "control_teacher": "counter-bias teacher", "base": "base"}


def ranked_section(part: Mapping[str, Any]) -> str:
    """The section of one size of teachers: per seed the words that carry most, and the places in context."""
    size = str(part["teacher_size"]).replace("_", " ")
    several = len(part["ranked"]) > 1
    blocks = []
    for number, (seed, places) in enumerate(part["ranked"].items()):
        words = _words(
            f"Words that carry most, all their places together, {size} teachers, seed {seed}", part["words"][seed]
        )
        items = [_place(each) for each in places]
        lists = _list(items[:_OPEN], 1)
        if items[_OPEN:]:
            lists += page.folded(f"Ranks {_OPEN + 1} to {len(items)}", _list(items[_OPEN:], _OPEN + 1))
        body = f"{lists}{words}"
        blocks.append(page.folded(f"Seed {seed}", body) if number else (f"<h3>Seed {seed}</h3>" * several + body))
    intro = (
        "<p>Ranked by KL(biased teacher ‖ counter-bias teacher) in nats. The framed token is the one that the text goes on "
        "with; below it is what each model finds likely at that place.</p>"
    )
    return page.section(
        f"ranked-{part['teacher_size']}", f"The most divergent places: {size} teachers", intro + "".join(blocks)
    )


def _list(items: Sequence[str], start: int) -> str:
    return f'<ol class="ranked" start="{start}">{"".join(items)}</ol>'


def _place(row: Mapping[str, Any]) -> str:
    # Those at temperature 1, as the words below them.
    values = ", ".join(f"{escape(name)} {value:.3f}" for name, value in row["divergence"].items() if ", " not in name)
    says = "".join(_says(name, row) for name in row["says"])
    return (
        f'<li><p class="note"><b>{escape(row["kind"])}</b>, turn {row["turn"] + 1} of <code>{escape(row["task_id"])}</code>; '
        f'nats against {values}</p><p class="prompt">… {escape(row["before"])}<mark>{escape(row["text"])}</mark>'
        f"{escape(row['after'])} …</p><dl>{says}</dl></li>"
    )


def _says(name: str, row: Mapping[str, Any]) -> str:
    words = [
        f"<code>{escape(each['text']) or '(empty)'}</code> {_percent(each['probability'])}{' (banned)' * each['banned']}"
        for place, each in enumerate(row["says"][name])
        if not place or each["banned"] or each["probability"] >= _WORTH
    ]
    return (
        f"<dt>{escape(_NAMES.get(name, name))}</dt><dd>{', '.join(words)}; "
        f"all banned continuations {_percent(row['banned_mass'][name])}</dd>"
    )


def _percent(share: float) -> str:
    """A probability in per cent; what is hardly there is told as less than the least that is shown."""
    return f"{100 * share:.1f}\u00a0%" if share >= _WORTH else f"under {100 * _WORTH:g}\u00a0%"


def _words(caption: str, words: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f'<tr><th scope="row"><code>{escape(each["text"]) or "(empty)"}</code></th><td class="text">{escape(each["kind"])}</td>'
        f"<td>{each['places']}</td><td>{100 * each['divergence_share']:.1f}</td></tr>"
        for each in words
    ]
    table = page.captioned_table(
        caption, ("token", "kind of place", "places", "% of the divergence"), rows, prose=("kind of place",)
    )
    return page.folded(f"By word: the {len(words)} that carry most", table)
