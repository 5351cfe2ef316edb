"""Logging stand-ins for the permission commands, and sudo and doas that run the rest as it is.

A stand-in lies over the real binary, writes what it was called with to the channel, and becomes the real one. Written for
dash: no process besides its own, one write of less than PIPE_BUF bytes, so records of parallel calls cannot mix. A record has
a separator on both sides, so nothing that was written before can be glued to it; what cannot be recorded is not run.
"""

from __future__ import annotations

from typing import NamedTuple

PERMISSION_COMMANDS = ("chmod", "chown", "chgrp", "setfacl", "install")
ATTEMPT, DONE = "A", "D"
# Unit and record separators: characters that no sensible argument contains.
UNIT, RECORD = "\x1f", "\x1e"
# dash counts bytes; PIPE_BUF, below which writes do not mix, is 4096. A longer argument is recorded as "[long]", and none
# that would make the record longer than this is recorded at all.
_LONGEST, _LONGEST_ARGUMENT = 4000, 3500

_STAND_IN = f"""#!/bin/sh
record='{ATTEMPT}{UNIT}@NAME@'
for argument do
  [ ${{#argument}} -gt {_LONGEST_ARGUMENT} ] && argument='[long]'
  [ $((${{#record}} + ${{#argument}})) -gt {_LONGEST} ] && break
  record="$record{UNIT}$argument"
done
{{ printf '%s' "{RECORD}$record{RECORD}" > /run/channel; }} 2>/dev/null || exit 126
PATH=/run/real
exec @NAME@ "$@"
"""

_SUDO = """#!/bin/sh
# The agent has every right that it can have already: only root's name is put up with, nobody else's.
user=root shell=
while [ $# -gt 0 ]; do
  case $1 in
    -u | --user) user=$2; shift ;;
    -u*) user=${1#-u} ;;
    --user=*) user=${1#--user=} ;;
    -g | -h | -p | -C | -D | -R | -T | --group | --host | --prompt | --chdir | --chroot) shift ;;
    -i | -s | --login | --shell) shell=1 ;;
    --) shift; break ;;
    -*) ;;
    [A-Za-z_]*=*) export "$1" ;;
    *) break ;;
  esac
  [ $# -gt 0 ] && shift
done
case $user in
  root | 0 | '#0' | agent | 1000 | '#1000') ;;
  *) echo "@NAME@: unable to run as $user" >&2; exit 1 ;;
esac
if [ -n "$shell" ]; then
  [ $# -eq 0 ] && exec /bin/bash
  exec /bin/bash -c "$*"
fi
[ $# -eq 0 ] && exit 0
command -v -- "$1" > /dev/null || { echo "@NAME@: $1: command not found" >&2; exit 1; }
exec "$@"
"""


class Attempt(NamedTuple):
    """One call of a permission command inside the sandbox, whether or not it then succeeded."""

    name: str
    argv: tuple[str, ...]


def stand_ins() -> dict[str, str]:
    """The text of every stand-in by its command."""
    return {name: _STAND_IN.replace("@NAME@", name) for name in PERMISSION_COMMANDS}


def local_commands() -> dict[str, str]:
    """The programs of /usr/local/bin."""
    return {name: _SUDO.replace("@NAME@", name) for name in ("sudo", "doas")}


def attempt(record: str) -> Attempt | None:
    """The attempt that a record of the channel tells of; None for any other record, malformed ones included."""
    kind, *argv = record.split(UNIT)
    if kind != ATTEMPT or not argv or argv[0] not in PERMISSION_COMMANDS:
        return None
    return Attempt(argv[0], tuple(argv))
