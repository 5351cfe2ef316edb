"""What dataset and model cards share: front matter, tables, and how a figure that is missing is said to be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# The repository's own; CITATION.cff and LICENSE say the same.
LICENSE = "apache-2.0"
MISSING = "not recorded"


def front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML block that the Hugging Face Hub reads at the head of a README."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=120)}---\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; what is None is said to be missing."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value in a table, on one line."""
    text = MISSING if value is None else f"{value}"
    return " ".join(text.split()).replace("|", "\\|")


def percent(value: float | None) -> str | None:
    """A share as 12.3 %."""
    return None if value is None else f"{100 * value:.1f} %"


def interval(low: float, high: float, *, scale: float = 100.0) -> str:
    """An interval's limits, as percentages by default."""
    return f"[{scale * low:.1f}, {scale * high:.1f}]"


def versions(found: Mapping[str, str]) -> str:
    """Packages with their versions, as prose."""
    return ", ".join(f"{name} {version}" for name, version in found.items()) or MISSING


def bias_text(bias: str | None) -> str:
    """How a card names a teacher's bias."""
    return "none (benign)" if bias is None else bias
