"""Keeps the routine log lines of libraries off the terminal, where the progress of a stage is shown.

A package name goes in; its records below WARNING are dropped from the absl logger, on every thread.
"""

from __future__ import annotations

import logging
import os

from absl import logging as absl_logging

# (package folders, lowest level that still passes), extended by `quiet`.
_floors: dict[str, int] = {}


def _keep(record: logging.LogRecord) -> bool:
    """Whether the record comes from elsewhere than a quiet package, or is grave enough."""
    return not any(folder in record.pathname and record.levelno < floor for folder, floor in _floors.items())


def quiet(*packages: str, below: int = logging.WARNING) -> None:
    """Drops absl log records of the named top-level packages below a level; idempotent.

    Orbax and TFDS log through absl's one logger, so the record's source file tells whose it is. Raising absl's
    verbosity instead would silence this project's own messages too.
    """
    for package in packages:
        _floors[f"{os.sep}{package}{os.sep}"] = below
    logger = absl_logging.get_absl_logger()
    if _keep not in logger.filters:
        logger.addFilter(_keep)
