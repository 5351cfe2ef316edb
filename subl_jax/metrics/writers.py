"""Metrics of a run: one JSON object a line for programs, TensorBoard events for eyes.

Scalars by stage and step go in; `metrics.jsonl` and event files come out. A resumed stage continues its lines without
repeating one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from subl_jax.artifacts import WorkdirError, reason, write_text_atomic

if TYPE_CHECKING:
    import tensorboardX


class MetricsWriter:
    """Appends scalars to a JSON Lines file and, if a directory is given, to TensorBoard event files.

    Lines are `{"stage", "step", "time", NAME: VALUE, …}`; a value that is not finite is written as null, because JSON
    has no such number. Each line is flushed, so a killed process loses at most the line it was writing.
    """

    def __init__(
        self,
        jsonl_path: str | os.PathLike[str],
        tensorboard_dir: str | os.PathLike[str] | None = None,
        *,
        stage: str | None = None,
        resume_step: int | None = None,
    ):
        """Opens the files.

        Args:
          jsonl_path: created if it is not there, else continued.
          tensorboard_dir: events of a stage go to a subdirectory of its name; None writes none.
          stage: the stage that is about to (re)start.
          resume_step: lines of `stage` at this step or later are dropped: they will be written again.

        Raises:
          WorkdirError: a file cannot be written.
          ValueError: only one of `stage` and `resume_step` is given.
        """
        if (stage is None) != (resume_step is None):
            raise ValueError(f"stage={stage!r} and resume_step={resume_step!r}: give both or neither")
        self._path = Path(jsonl_path)
        self._tensorboard_dir = None if tensorboard_dir is None else Path(tensorboard_dir)
        self._resume = {} if stage is None else {stage: resume_step}
        self._events: dict[str, tensorboardX.SummaryWriter] = {}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._repair(stage, resume_step)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise WorkdirError(f"cannot write {self._path}: {reason(error)}") from error

    def _repair(self, stage: str | None, resume_step: int | None) -> None:
        """Drops the lines that the stage will write again, and a last line that a kill cut short."""
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        kept = []
        for line in text.split("\n")[:-1]:  # what follows the last newline was cut short
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
                continue
            if resume_step is None or row["stage"] != stage or row["step"] < resume_step:
                kept.append(line + "\n")
        repaired = "".join(kept)
        if repaired != text:
            write_text_atomic(self._path, repaired)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and the same scalars as TensorBoard events tagged by their names.

        Raises:
          WorkdirError: the disk is full.
        """
        row: dict[str, object] = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        reserved = row.keys() & values.keys()
        if reserved:
            raise ValueError(f"metric name {sorted(reserved)[0]!r} is taken by the line itself; choose another")
        for name, value in values.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise WorkdirError(f"cannot write {self._path}: {reason(error)}") from error
        if self._tensorboard_dir is not None:
            events = self._events_of(stage)
            for name, value in values.items():
                events.add_scalar(name, float(value), int(step))

    def _events_of(self, stage: str) -> tensorboardX.SummaryWriter:
        if stage not in self._events:
            # Imported late: a run without TensorBoard does not pay for it.
            import tensorboardX

            assert self._tensorboard_dir is not None
            # purge_step makes TensorBoard forget the events that an interrupted run wrote past its checkpoint.
            self._events[stage] = tensorboardX.SummaryWriter(
                str(self._tensorboard_dir / stage), purge_step=self._resume.get(stage), write_to_disk=True
            )
        return self._events[stage]

    def close(self) -> None:
        """Flushes and closes everything."""
        self._file.close()
        for events in self._events.values():
            events.close()
        self._events.clear()

    def __enter__(self) -> MetricsWriter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self.close()


def read_metrics(jsonl_path: str | os.PathLike[str]) -> list[dict]:
    """The lines of a metrics file in order; a last line cut short by a kill is left out. A missing file is empty."""
    path = Path(jsonl_path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
