"""The command that a launcher starts: everything behind `--`, one process of it on every host or device."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from subl_jax.parallel import contract

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"


class LaunchError(ValueError):
    """A launch cannot be made; one line with the value, the cause and the remedy."""


def given(arguments: Sequence[str]) -> list[str]:
    """The command of a launcher's arguments, as absl leaves them: the program's name, then all that stands behind `--`.

    Raises:
      LaunchError: there is none; it is no `python -m ...`; it names an experiment that does not exist (the nearest is named).
    """
    command = list(arguments[1:])
    example = "-- python -m experiments.api_deletion --preset=tiny --workdir=runs/mine"
    if not command:
        raise LaunchError(f"no command is given; put it behind two dashes: {example}")
    if command[0].startswith("-") or "=" in command[0]:
        raise LaunchError(f"the command begins with {command[0]!r}; its flags come before the dashes: {example}")
    module = command[2] if len(command) > 2 and command[1] == "-m" else ""
    package, _, name = module.partition(".")
    if package == "experiments" and not (EXPERIMENTS / f"{name}.py").exists():
        known = sorted(path.stem for path in EXPERIMENTS.glob("[!_]*.py"))
        near = difflib.get_close_matches(name, known, 1)
        raise LaunchError(
            f"there is no {module}; {f'did you mean experiments.{near[0]}?' if near else 'experiments are ' + ', '.join(known)}"
        )
    return command


def define_timeouts(start: int) -> None:
    """Flags of the time-outs that processes are told, whose defaults are the environment's, or else these seconds."""
    flags.DEFINE_integer(
        "start_timeout_s",
        contract.seconds(contract.START_TIMEOUT, start),
        "Seconds that processes wait for one another.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_s",
        contract.seconds(contract.HEARTBEAT_TIMEOUT, contract.DEFAULT_HEARTBEAT_TIMEOUT),
        "Seconds of silence after which a process is taken for dead.",
        lower_bound=10,
    )
