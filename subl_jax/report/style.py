"""The report's style sheet: light and dark by the reader's preference, one column on a phone, self-contained.

Out: the text of `report.css`, which lies beside this module and is put into the page itself, and its colours.
"""

from __future__ import annotations

import functools
import re
from importlib import resources


@functools.cache
def css() -> str:
    """The style sheet's text."""
    return resources.files("subl_jax.report").joinpath("report.css").read_text(encoding="utf-8")


def light_colours() -> dict[str, str]:
    """Colour property -> "#rrggbb" of the light theme, which the sheet states first; figures in files have these."""
    light = css().partition("@media")[0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})\b", light))
