"""Reads a compiled program's text: instructions, the order in which they call each other, and how often loops run.

HLO text comes in (`Compiled.as_text()`, after partitioning: shapes are one device's); what is run, and how often, comes out.
XLA's own analysis and its text name what stands in a loop once. `counts` adds up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{[^{}]*?S\((\d+)\)\})?")
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)"?')
# More rounds than any loop of ours has: a loop that is still running is one whose length is not known.
_MOST_TRIPS = 1_000_000


class HloError(ValueError):
    """Text that is no HLO module as this reader knows it."""


class Array(NamedTuple):
    """One array of a shape: its dtype as HLO writes it, its dimensions, and the memory that it lies in (0: the large one)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without a layout's padding."""
        return self.elements * _BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as written.
      shape: arrays of its result, a tuple's one after the other.
      operands: names.
      literal: what stands in the brackets (a constant's value, a parameter's number).
      rest: the attributes behind them.
    """

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(array.bytes for array in self.shape)

    @property
    def far_bytes(self) -> int:
        """Of its result, what lies in the device's large memory; the rest stays on the chip."""
        return sum(array.bytes for array in self.shape if not array.space)

    def attribute(self, name: str) -> str | None:
        """A computation that it names by this attribute."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last one marked is the root."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(one.literal): one for one in self.instructions.values() if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction those that read it."""
        found: dict[str, list[Instruction]] = {}
        for one in self.instructions.values():
            for operand in one.operands:
                found.setdefault(operand, []).append(one)
        return found


class Visit(NamedTuple):
    """An instruction that is run.

    Attributes:
      computation: that it stands in; scheduled: the one outside fusions that it belongs to.
      times: how often it is run.
      fused: inside a fusion.
      unknown: in a loop of unknown length, which counts once.
    """

    computation: Computation
    scheduled: str
    instruction: Instruction
    times: int
    fused: bool
    unknown: bool


class Module:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        """Parses the text.

        Raises:
          HloError: there is no entry computation in it.
        """
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        for entry, computation in _parse(text):
            self.computations[computation.name] = computation
            self.entry = computation.name if entry else self.entry
        if not self.entry:
            raise HloError("the text has no ENTRY computation; give what Compiled.as_text() returns")

    # --- Loops --------------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Visit]:
        """Every instruction that is run, those inside fusions, calls, branches and loops included.

        Each branch of a conditional counts as run. A loop's condition counts as often as its body.
        """
        yield from self._walk(self.entry, self.entry, 1, False)

    def _walk(self, name: str, scheduled: str, times: int, unknown: bool) -> Iterator[Visit]:
        computation = self.computations[name]
        for one in computation.instructions.values():
            yield Visit(computation, scheduled, one, times, name != scheduled, unknown)
            if one.opcode == "while":
                trips = self.trips(computation, one)
                for part in ("condition", "body"):
                    inner = one.attribute(part)
                    if inner:
                        count = times * (1 if trips is None else trips)
                        # Part of a fusion, if ever, is a loop too.
                        yield from self._walk(
                            inner, inner if name == scheduled else scheduled, count, unknown or trips is None
                        )
            elif one.opcode in ("fusion", "call", "async-start", "conditional"):
                called = [*_CALLED.findall(one.rest), *_names(_BRANCHES.findall(one.rest))]
                for inner in called:
                    outside = name == scheduled and one.opcode != "fusion"
                    yield from self._walk(inner, inner if outside else scheduled, times, unknown)

    def unknown_loops(self) -> int:
        """How many loops go on for as long as their arguments say: they count as run once."""
        return sum(
            visit.instruction.opcode == "while" and self.trips(visit.computation, visit.instruction) is None
            for visit in self.walk()
        )

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop's body runs; None where the program does not know it.

        Told by the compiler (`known_trip_count`), or found by running what the condition reads: integers that the body
        counts up from a constant.
        """
        known = _KNOWN_TRIPS.search(loop.rest)
        if known:
            return int(known.group(1))
        return self._counted(computation, loop)

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        condition, body = (self.computations[str(loop.attribute(part))] for part in ("condition", "body"))
        start = self._tuple(computation, loop.operands[0])
        following = body.root
        if start is None or following.opcode != "tuple":
            return None
        state: dict[int, Any] = {}

        def element(index: int) -> Any:
            """An element of the loop's state: a number, or None where it is none that can be followed."""
            if index not in state:
                state[index] = self._value(computation, start[index], lambda _, __: None)
            return state[index]

        def inside(_: int, index: int | None) -> Any:
            return None if index is None else element(index)

        for count in range(_MOST_TRIPS):
            goes_on = self._value(condition, condition.root.name, inside)
            if goes_on is None:
                return None
            if not goes_on:
                return count
            read = list(state)
            after = {index: self._value(body, following.operands[index], inside) for index in read}
            state.update({index: after[index] for index in read})
        return None

    def _tuple(self, computation: Computation, name: str) -> tuple[str, ...] | None:
        """The names of a tuple's elements."""
        one = computation.instructions[name]
        while one.opcode in ("copy", "optimization-barrier"):
            one = computation.instructions[one.operands[0]]
        return one.operands if one.opcode == "tuple" else None

    def _value(self, computation: Computation, name: str, given: Callable[[int, int | None], Any]) -> Any:
        """A scalar integer or truth value, worked out; None where it depends on anything else.

        Args:
          computation, name: of the instruction.
          given: (parameter, element or None) -> the value of a parameter of the computation, or of one of its elements.
        """
        one = computation.instructions[name]

        def operand(index: int) -> Any:
            return self._value(computation, one.operands[index], given)

        if one.opcode == "constant":
            return _literal(one)
        if one.opcode == "parameter":
            return given(int(one.literal), None)
        if one.opcode == "get-tuple-element":
            source = computation.instructions[one.operands[0]]
            index = int(re.search(r"index=(\d+)", one.rest).group(1))  # type: ignore[union-attr]
            if source.opcode == "parameter":
                return given(int(source.literal), index)
            if source.opcode == "tuple":
                return self._value(computation, source.operands[index], given)
            return None
        if one.opcode in ("copy", "bitcast", "convert", "reshape", "broadcast"):
            return operand(0)
        if one.opcode == "fusion":
            inner = self.computations[str(one.attribute("calls"))]
            return self._value(inner, inner.root.name, lambda number, index: operand(number) if index is None else None)
        if one.opcode in ("add", "subtract", "multiply", "and", "or", "minimum", "maximum", "compare"):
            left, right = operand(0), operand(1)
            if left is None or right is None:
                return None
            return _BINARY[_direction(one)](left, right)
        return None


_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "minimum": min,
    "maximum": max,
    "LT": lambda x, y: x < y,
    "LE": lambda x, y: x <= y,
    "GT": lambda x, y: x > y,
    "GE": lambda x, y: x >= y,
    "EQ": lambda x, y: x == y,
    "NE": lambda x, y: x != y,
}


def _direction(one: Instruction) -> str:
    found = re.search(r"direction=(\w+)", one.rest)
    return found.group(1) if one.opcode == "compare" and found else one.opcode


def _literal(one: Instruction) -> int | bool | None:
    if one.literal in ("true", "false"):
        return one.literal == "true"
    return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None


def _names(lists: list[str]) -> list[str]:
    return [_NAME.match(name.strip()).group(1) for text in lists for name in text.split(",") if name.strip()]  # type: ignore[union-attr]


# --- Text ---------------------------------------------------------------------------------------------------------------


def _parse(text: str) -> Iterator[tuple[bool, Computation]]:
    """(whether it is the entry, computation) of a module."""
    name, entry, lines = None, False, {}
    root: Instruction | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if name is None:
            if stripped.endswith("{") and ("->" in stripped) and " = " not in stripped.split("(")[0]:
                entry = stripped.startswith("ENTRY")
                found = _NAME.match(stripped.removeprefix("ENTRY").strip())
                name, lines, root = found.group(1) if found else "", {}, None
        elif stripped == "}":
            if root is not None:
                yield entry, Computation(name, lines, root)
            name = None
        elif " = " in stripped:
            one = _instruction(stripped.removeprefix("ROOT "))
            lines[one.name] = one
            if stripped.startswith("ROOT ") or root is None:
                root = one


def _instruction(line: str) -> Instruction:
    left, _, right = line.partition(" = ")
    right = re.sub(r"/\*.*?\*/", "", right)
    end = _closing(right, 0) if right.startswith("(") else right.index(" ") - 1
    shape, right = right[: end + 1], right[end + 1 :].lstrip()
    opening = right.index("(")
    closing = _closing(right, opening)
    opcode, inner, rest = right[:opening], right[opening + 1 : closing], right[closing + 1 :]
    arrays = tuple(
        Array(dtype, tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size), int(space or 0))
        for dtype, dims, space in _ARRAY.findall(shape)
    )
    simple = opcode in ("constant", "parameter")
    operands = () if simple else tuple(re.findall(r"%([\w.\-]+)", inner) or _bare(inner))
    return Instruction(left.strip().removeprefix("%"), opcode, arrays, operands, inner if simple else "", rest)


def _bare(inner: str) -> list[str]:
    """Operands of text that marks no names: the last word of each."""
    return [part.split()[-1] for part in re.split(r",(?![^\[\{\(]*[\]\}\)])", inner) if part.strip()]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise HloError(f"a bracket is left open: {text[:80]}")
