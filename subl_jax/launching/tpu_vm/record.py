"""What this machine remembers of a TPU: how it was asked for, which version it got, which command runs on it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from subl_jax.launching.command import LaunchError
from subl_jax.launching.tpu_vm.resource import Tpu


def default_folder() -> Path:
    """Where records lie, by the XDG rules: outside the checkout, which must stay without changes."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "subl_jax" / "tpu_vm"


@dataclasses.dataclass
class Record:
    """One TPU's file."""

    path: Path
    tpu: Tpu
    commit: str = ""
    extra: str = "tpu"
    command: list[str] = dataclasses.field(default_factory=list)
    # Counts the starts of the command, so that a worker can tell this one's exit from the last one's.
    attempt: int = 0

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {**dataclasses.asdict(self), "schema": 1}
        del held["path"]
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


def load(folder: Path, name: str) -> Record | None:
    """The record of a TPU, if there is one.

    Raises:
      LaunchError: the file is none of this program's.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if held.pop("schema") != 1:
            raise ValueError("another schema")
        asked = held.pop("tpu")
        asked["create_flags"] = tuple(asked["create_flags"])
        return Record(path=path, tpu=Tpu(**asked), **held)
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"{path} is no record of a TPU ({error}); remove it and name --zone and --project again"
        ) from None
