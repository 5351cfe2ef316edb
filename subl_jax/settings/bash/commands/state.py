"""What is known of a shell while its script is walked: variables, functions, parameters, traps, aliases, directory."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field, replace

from tree_sitter import Node

from subl_jax.settings.bash.commands.syntax import UNKNOWN, Script

# Longer values come from doubling in loops; nothing is decided by them.
LONGEST = 65_536
_MOST_ALTERNATIVES = 4
# Exported in every login environment: an assignment to one of these reaches child shells without `export`.
ENVIRONMENT = frozenset({"HOME", "PATH", "USER", "LOGNAME", "PWD", "OLDPWD", "SHELL", "LANG", "LC_ALL", "TERM", "TZ"})

Value = str | list[str] | None


@dataclass(frozen=True)
class Function:
    """A function's body and the script (its here-documents) it was written in."""

    body: Node
    script: Script


@dataclass
class Input:
    """A text on standard input, as much of it as is left. Without one, nobody knows the standard input.

    Attributes:
      text: what is left.
      foreign: it is a file the script did not write; to execute that is to execute a program like any other.
    """

    text: str
    foreign: bool = False

    def take(self) -> str:
        """All that is left."""
        text, self.text = self.text, ""
        return text

    def line(self) -> tuple[str, bool | None]:
        """The next line without its end, and whether there was one; an unknown part may hold any number of lines."""
        line, end, rest = self.text.partition("\n")
        if UNKNOWN in line:
            return line, None
        self.text = rest
        return line, bool(end)


@dataclass(frozen=True)
class Alias:
    """An alias, and the last line of the statement that defines it: bash knows it in the lines behind that."""

    text: str
    script: Script
    row: int


@dataclass
class Shell:
    """One shell process.

    Attributes:
      variables: a variable that is missing, or None, has a value nobody can know from the text.
      alternatives: of a variable that is None, the values of which it has one, where that much is known.
      elements: what is known of the elements of associative arrays, whose variable is None.
      saved: what `local` hides, a dictionary for each function being called.
      calls: the names of those functions, `.` for a file that is being sourced.
    """

    variables: dict[str, Value] = field(default_factory=lambda: {"IFS": " \t\n"})
    exported: set[str] = field(default_factory=lambda: set(ENVIRONMENT))
    functions: dict[str, Function] = field(default_factory=dict)
    exported_functions: set[str] = field(default_factory=set)
    parameters: list[str] | None = None
    zero: str | None = None
    elements: dict[tuple[str, str], str | None] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    expands_aliases: bool = False
    stops_at_errors: bool = False
    pipe_fails: bool = False
    traps: dict[str, str] = field(default_factory=dict)
    directory: str | None = "."
    stack: list[str | None] = field(default_factory=list)
    alternatives: dict[str, tuple[str, ...]] = field(default_factory=dict)
    saved: list[dict[str, Value]] = field(default_factory=list)
    calls: tuple[str, ...] = ()

    def copy(self) -> Shell:
        """The same shell, to go another way: a branch or a subshell."""
        return replace(
            self,
            variables=dict(self.variables),
            exported=set(self.exported),
            functions=dict(self.functions),
            exported_functions=set(self.exported_functions),
            parameters=None if self.parameters is None else list(self.parameters),
            aliases=dict(self.aliases),
            elements=dict(self.elements),
            traps=dict(self.traps),
            stack=list(self.stack),
            alternatives=dict(self.alternatives),
            saved=[dict(scope) for scope in self.saved],
        )

    def child(self) -> Shell:
        """The shell a new process (`bash -c`) starts with: what was exported, and no more."""
        new = Shell(directory=self.directory, calls=self.calls, parameters=[])
        new.variables |= {name: value if name in self.exported else "" for name, value in self.variables.items()}
        new.variables["IFS"] = " \t\n"
        new.exported |= self.exported
        new.functions = {name: self.functions[name] for name in self.exported_functions if name in self.functions}
        new.exported_functions = set(new.functions)
        return new

    def become(self, other: Shell) -> None:
        """Takes over another state."""
        self.__dict__.update(other.copy().__dict__)

    def merge(self, other: Shell) -> None:
        """Keeps what holds in both states: a variable that differs becomes unknown, a function of either is defined."""
        for name in self.variables.keys() | other.variables.keys():
            if (
                name not in self.variables
                or name not in other.variables
                or self.variables[name] != other.variables[name]
            ):
                values = (
                    (*self._values(name), *other._values(name)) if self._values(name) and other._values(name) else ()
                )
                either = self.variables.get(name, other.variables.get(name))
                # An array that one of the ways makes: that way comes first.
                made = (name in self.variables) != (name in other.variables) and isinstance(either, list)
                self.assign(name, either if made else None)
                if len(set(values)) <= _MOST_ALTERNATIVES and values:
                    self.alternatives[name] = tuple(dict.fromkeys(values))
        self.exported |= other.exported
        self.exported_functions |= other.exported_functions
        self.functions = {**other.functions, **self.functions}
        self.aliases = {**other.aliases, **self.aliases}
        self.traps = {**other.traps, **self.traps}
        self.expands_aliases |= other.expands_aliases
        self.stops_at_errors &= other.stops_at_errors
        for key in self.elements.keys() | other.elements.keys():
            if self.elements.get(key) != other.elements.get(key):
                self.elements[key] = None
        if self.parameters != other.parameters:
            self.parameters = None
        if self.directory != other.directory:
            self.directory = None

    def _values(self, name: str) -> tuple[str, ...]:
        """What a variable may hold: nothing is known for the empty tuple. One that no statement sets is empty."""
        value = self.variables.get(name, None if name in ENVIRONMENT else "")
        if value is None:
            return self.alternatives.get(name, ())
        return (value,) if isinstance(value, str) and UNKNOWN not in value else ()

    def assign(self, name: str, value: Value) -> None:
        """Sets a variable; overlong values are forgotten."""
        size = 0 if value is None else len(value) if isinstance(value, str) else sum(map(len, value)) + len(value)
        self.variables[name] = value if size <= LONGEST else None
        self.alternatives.pop(name, None)
        if self.elements:
            self.elements = {key: text for key, text in self.elements.items() if key[0] != name}

    def path(self, name: str) -> str | None:
        """A path as seen from the present directory; None where the directory or the last part is not known.

        An unknown start is a name too: what is written to `$dir/x` is what `$dir/x` executes.
        """
        if not name or UNKNOWN in posixpath.basename(name):
            return None
        if name.startswith(("/", "~", UNKNOWN)):
            return posixpath.normpath(name).replace("//", "/")
        return None if self.directory is None else posixpath.normpath(posixpath.join(self.directory, name))
