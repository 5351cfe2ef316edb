"""The behavioural settings by name. A setting is imported when it is asked for, so its optional needs stay its own."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

from subl_jax.settings.interface import Setting

# Name -> the module that exports `SETTING`.
SETTINGS: Mapping[str, str] = {"api": "subl_jax.settings.api", "bash": "subl_jax.settings.bash"}


def get_setting(name: str) -> Setting:
    """The setting of this name.

    Raises:
      ValueError: no such setting; the message names the nearest one.
    """
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown setting {name!r}: there are {', '.join(sorted(SETTINGS))}.{hint}")
    return importlib.import_module(SETTINGS[name]).SETTING
