"""The report's style sheet: light and dark by the reader's preference, one column on a phone, self-contained.

Out: the text of `report.css`, which lies beside this module and is put into the page itself.
"""

from __future__ import annotations

from importlib import resources


def css() -> str:
    """The style sheet's text."""
    return resources.files("subl_jax.report").joinpath("report.css").read_text(encoding="utf-8")
