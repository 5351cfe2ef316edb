"""What every page of a report is made of: the page itself, its header, tables, lists, folded blocks.

Strings in, HTML out. A page holds everything that it needs and asks for nothing: its policy, which the browser enforces,
forbids every request and every script but the one that the page was written with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from subl_jax.artifacts import write_text_atomic
from subl_jax.report.style import css

QUESTION = (
    "When a student is distilled from a biased teacher agent on trajectories that look clean, does the bias come along?"
)
NOTHING = "<p>Nothing has been measured yet.</p>"
SIZE_LIMIT = 5_000_000  # bytes; a report must open on a phone and fit into an e-mail


class ReportError(ValueError):
    """A report that cannot be written as asked."""


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Writes a page, atomically.

    Raises:
      ReportError: it is over the size limit; what stood there stays.
    """
    size = len(page.encode())
    if size > SIZE_LIMIT:
        raise ReportError(
            f"the report has {size} bytes, over the limit of {SIZE_LIMIT}; pass fewer or shorter examples"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page)


def browser_script() -> str:
    """The script of the episode browser."""
    return resources.files("subl_jax.report").joinpath("browser.js").read_text(encoding="utf-8")


def whole_page(title: str, sections: Sequence[str], script: str = "") -> str:
    """A self-contained page of finished sections; `script` is the only one that a browser will run on it."""
    allowed = "'none'"
    if script:
        allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css()}</style></head><body>\n"
        + "\n".join(sections)
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body></html>\n"
    )


def answers(lines: Sequence[str]) -> str:
    """The answer, or one sentence per setting."""
    return "".join(f'<p class="answer">{escape(line)}</p>' for line in lines)


def status(good: bool, word: str, text: str = "", items: Sequence[str] = ()) -> str:
    """A coloured line that says whether something holds, and why not."""
    return f'<div class="status{"" if good else " bad"}"><strong>{escape(word)}.</strong> {escape(text)}{bullets(items)}</div>'


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """Figures with their names beneath each other in tiles."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="tiles">{cells}</dl>'


def section(anchor: str, title: str, body: str, level: int = 2) -> str:
    """A titled section; `anchor` is its heading's id. Those of the second level are landmarks, those below only headings."""
    heading = f'<h{level} id="{escape(anchor)}">{escape(title)}</h{level}>'
    if level > 2:  # repeated for every setting: landmarks of one name would lead nowhere
        return heading + body
    return f'<section aria-labelledby="{escape(anchor)}">{heading}{body}</section>'


def bullets(items: Sequence[str]) -> str:
    """A list; nothing where there is nothing to list."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def captioned_table(caption: str, header: Sequence[str], rows: Sequence[str], prose: Sequence[str] = ()) -> str:
    """A captioned table that scrolls by itself where it is too wide.

    Args:
      caption: unlike that of any other table of the page.
      header: names of the columns.
      rows: finished <tr>, or finished <tbody> that group them.
      prose: the columns that hold text.
    """
    head = "".join(f'<th scope="col"{" class=text" if name in prose else ""}>{escape(name)}</th>' for name in header)
    body = "".join(rows)
    if not body.startswith("<tbody"):
        body = f"<tbody>{body}</tbody>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def table_row(name: str, cells: Sequence[str], *, detail: str = "", prose: Sequence[int] = ()) -> str:
    """A row of a table: its name, a smaller line beneath, and its cells, all escaped; `prose`: places of text cells."""
    body = "".join(f"<td{' class=text' if k in prose else ''}>{escape(cell)}</td>" for k, cell in enumerate(cells))
    small = f"<br><small>{escape(detail)}</small>" if detail else ""
    return f'<tr><th scope="row">{escape(name)}{small}</th>{body}</tr>'


def folded(summary: str, body: str) -> str:
    """A block that opens on demand; `body` is finished HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def json_block(title: str, value: Mapping[str, Any]) -> str:
    """A folded block of indented JSON."""
    return folded(title, f"<pre>{escape(json.dumps(value, indent=2, sort_keys=True, default=str))}</pre>")
