"""What the host sends to the devices: new tokens cut into chunks of a few lengths, and which prefixes are copied where.

How an episode's tokens are cut depends on their own number alone; which rows share a pass with it does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from subl_jax.rollout.device import Copies, Prefill
from subl_jax.rollout.programs import KEPT, PASSES, Programs


class Chunk(NamedTuple):
    """Tokens that go into a slot from position `start` on."""

    slot: int
    start: int
    tokens: Sequence[int]

    @staticmethod
    def cut(chunks: Sequence[Sequence[Chunk]], sizes: Sequence[int]) -> list[tuple[int, list[list[list[Chunk]]]]]:
        """Cuts every replica's chunks to the programs' lengths.

        Args:
          chunks: per replica, at most one of each slot.
          sizes: of the programs' rows, decreasing.

        Returns:
          (size, per replica a list of waves) in the order in which they must be run. A wave holds at most one chunk of a
          slot; the last and shortest piece of a slot comes in the last wave of its size.
        """
        long, short = sizes[0], sizes[-1]
        full: list[list[list[Chunk]]] = [[] for _ in chunks]
        rest: list[list[list[Chunk]]] = [[[]] for _ in chunks]
        for replica, own in enumerate(chunks):
            for slot, start, tokens in own:
                pieces = [tokens[n : n + long] for n in range(0, len(tokens), long)]
                brief = len(pieces[-1]) <= short < long
                for wave, piece in enumerate(pieces[:-1] if brief else pieces):
                    while len(full[replica]) <= wave:
                        full[replica].append([])
                    full[replica][wave].append(Chunk(slot, start + wave * long, piece))
                if brief:
                    rest[replica][0].append(Chunk(slot, start + (len(pieces) - 1) * long, pieces[-1]))
        planned = [(long, full)]
        if any(waves[0] for waves in rest):
            planned.append((short, rest))
        return [(size, waves) for size, waves in planned if any(any(own) for own in waves)]


def prefill_requests(programs: Programs, size: int, waves: Sequence[Sequence[Sequence[Chunk]]]) -> list[Prefill]:
    """The calls of one prefill program that feed the waves of every replica, one after the other.

    Replicas that need fewer passes than others rest meanwhile; at least one call is made.
    """
    rows, slots = programs.rows, programs.sampling.slots
    passes = [[wave[n : n + rows] for wave in own for n in range(0, len(wave), rows)] for own in waves]
    calls = max([-(-len(own) // PASSES) for own in passes] + [1])
    requests = []
    for call in range(calls):
        count = np.zeros(len(passes), np.int32)
        target = np.full((len(passes), PASSES, rows), slots, np.int32)  # beyond the slots: padding
        starts, counts = (np.zeros((len(passes), PASSES, rows), np.int32) for _ in range(2))
        tokens = np.zeros((len(passes), PASSES, rows, size), np.int32)
        for replica, own in enumerate(passes):
            part = own[call * PASSES : (call + 1) * PASSES]
            count[replica] = len(part)
            for place, chunks in enumerate(part):
                for row, chunk in enumerate(chunks):
                    at = replica, place, row
                    target[at], starts[at], counts[at] = chunk.slot, chunk.start, len(chunk.tokens)
                    tokens[at][: len(chunk.tokens)] = chunk.tokens
        host: Any = (count, target, starts, counts, tokens)  # host arrays in the record
        requests.append(Prefill(*host))
    return requests


class Kept:
    """Which prefixes one replica keeps, the least recently used making room.

    A prefix that a dispatch under construction reads or writes keeps its place until `release`.
    """

    def __init__(self) -> None:
        """Nothing is kept."""
        self._places: dict[tuple[int, ...], int] = {}  # in order of use
        self._held: set[tuple[int, ...]] = set()

    def find(self, prefix: tuple[int, ...]) -> tuple[bool, int | None]:
        """(whether it is kept, its place). One that is not gets a place, or None where all places are in use."""
        place = self._places.pop(prefix, None)
        known = place is not None
        if place is None:
            place = self._room()
        if place is not None:
            self._places[prefix] = place
            self._held.add(prefix)
        return known, place

    def _room(self) -> int | None:
        if len(self._places) < KEPT:
            return next(n for n in range(KEPT) if n not in self._places.values())
        oldest = next((prefix for prefix in self._places if prefix not in self._held), None)
        return None if oldest is None else self._places.pop(oldest)

    def release(self) -> None:
        """The dispatch is complete: every place may be used again."""
        self._held.clear()

    @staticmethod
    def request(
        programs: Programs, copies: Sequence[tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]], length: int
    ) -> Copies:
        """The call that copies, of every replica, prefixes of slots to places and then of places to slots.

        Args:
          programs: tell the shapes.
          copies: per replica (saves, loads), each (slot, place).
          length: of the longest prefix, in tokens.
        """
        replicas, slots = programs.replicas, programs.sampling.slots
        saves, loads = (np.asarray([len(own[n]) for own in copies], np.int32) for n in range(2))
        saved, loaded = np.zeros((2, replicas, KEPT), np.int32), np.zeros((2, replicas, slots), np.int32)
        for replica, (out, back) in enumerate(copies):
            for n, (slot, place) in enumerate(out):
                saved[:, replica, n] = slot, place
            for n, (slot, place) in enumerate(back):
                loaded[:, replica, n] = slot, place
        host: Any = (saves, *saved, loads, *loaded, np.full(replicas, length, np.int32))
        return Copies(*host)
