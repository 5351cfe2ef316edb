"""What goes to the devices: every token once, in order, cut by an episode's own length; and which prefixes are kept."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.rollout.device import Prefill
from subl_jax.rollout.programs import KEPT, PASSES, Programs
from subl_jax.rollout.requests import Chunk, Kept, prefill_requests
from subl_jax.rollout.sampling import SamplingConfig
from tests.rollout import runs

SLOTS, CONTEXT = 11, 700
# By the lengths of their prefill programs; three replicas each. They compile nothing here.
PROGRAMS = {
    made.chunks: made
    for chunk, rows in ((5, 4), (64, 3))
    for sampling in [SamplingConfig(slots=SLOTS, context=CONTEXT, prefill_chunk=chunk, prefill_rows=rows)]
    for made in [Programs(runs.CONFIG, sampling, jax.local_devices()[:3])]
}
SIZES = list(PROGRAMS)

# Of each replica: slot -> (start, tokens). Lengths around the edges of chunks are likely, long ones happen.
lengths = st.one_of(st.integers(1, 140), st.sampled_from([5, 16, 17, 64, 65, 80, 81, 128, 129, 600]))
replica = st.dictionaries(st.integers(0, SLOTS - 1), st.tuples(st.integers(0, 50), lengths), max_size=SLOTS)
work = st.lists(replica, min_size=3, max_size=3)


def chunks_of(wanted: list[dict[int, tuple[int, int]]]) -> list[list[Chunk]]:
    """Chunks whose tokens name replica, slot and place."""
    return [
        [
            Chunk(slot, start, [1 + n + 1000 * (slot + 100 * own) for n in range(length)])
            for slot, (start, length) in row
        ]
        for own, row in enumerate(each.items() for each in wanted)
    ]


def requests_of(chunks: list[list[Chunk]], sizes: tuple[int, ...]) -> list[Prefill]:
    made = PROGRAMS[sizes]
    return [each for size, planned in Chunk.cut(chunks, sizes) for each in prefill_requests(made, size, planned)]


def cuts(chunks: list[Chunk], sizes: tuple[int, ...]) -> dict[int, list[tuple[int, int, int]]]:
    """Slot -> (size, start, count) of its pieces in order."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for size, [waves] in Chunk.cut([chunks], sizes):
        for piece in [piece for wave in waves for piece in wave]:
            found.setdefault(piece.slot, []).append((size, piece.start, len(piece.tokens)))
    return found


def test_a_long_chunk_goes_by_a_fourth_of_its_length_where_that_is_worth_it():
    assert SIZES == [(5,), (64, 16)]


@settings(deadline=None, max_examples=60)
@given(work, st.sampled_from(SIZES))
def test_every_token_is_fed_once_in_order_at_its_place(wanted, sizes):
    chunks = chunks_of(wanted)
    fed: list[dict[int, dict[int, int]]] = [{} for _ in wanted]
    for request in requests_of(chunks, sizes):
        assert request.tokens.shape[1:] == (PASSES, PROGRAMS[sizes].rows, request.tokens.shape[3])
        assert request.tokens.shape[3] in sizes
        for own, place in np.ndindex(len(wanted), PASSES):
            targets, counts = (part[own, place].tolist() for part in (request.slots, request.counts))
            real = [target for target in targets if target < SLOTS]
            assert len(real) == len(set(real))  # rows of one pass write at once
            assert bool(real) == (place < request.passes[own])
            for row, (slot, count) in enumerate(zip(targets, counts, strict=True)):
                if slot >= SLOTS:
                    assert count == 0
                    continue
                start, tokens = int(request.starts[own, place, row]), request.tokens[own, place, row].tolist()
                written = fed[own].setdefault(slot, {})
                # A later piece attends to the earlier ones, which must be there.
                assert 0 < count <= len(tokens) and start == wanted[own][slot][0] + len(written)
                written |= {start + n: token for n, token in enumerate(tokens[:count])}
    assert fed == [{slot: dict(enumerate(ids, start)) for slot, start, ids in own} for own in chunks]


@settings(deadline=None, max_examples=60)
@given(replica, st.sampled_from(SIZES))
def test_how_an_episode_is_cut_depends_on_its_length_alone(wanted, sizes):
    [chunks] = chunks_of([wanted])
    together = cuts(chunks, sizes)
    assert together == {chunk.slot: cuts([chunk], sizes)[chunk.slot] for chunk in chunks}
    for chunk in chunks:
        [moved] = cuts([Chunk(3, chunk.start, chunk.tokens)], sizes).values()
        assert moved == together[chunk.slot]


@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 80, 81, 128])
def test_what_is_left_over_goes_by_the_short_program_if_it_fits(length):
    [pieces] = cuts([Chunk(0, 0, list(range(length)))], (64, 16)).values()
    full, rest = divmod(length, 64)
    expected = [64] * full + ([16 if rest <= 16 else 64] if rest else [])
    assert [size for size, _, _ in pieces] == expected
    assert sum(count for _, _, count in pieces) == length


def test_replicas_without_work_rest_and_nothing_at_all_is_one_empty_call():
    alone = requests_of([[], [Chunk(4, 0, [1, 2])], []], (64, 16))
    assert [request.passes.tolist() for request in alone] == [[0, 1, 0]]
    [empty] = prefill_requests(PROGRAMS[(5,)], 5, [[], [], []])
    assert empty.passes.tolist() == [0, 0, 0] and (np.asarray(empty.slots) == SLOTS).all()


# --- Kept prefixes -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 7), max_size=9), max_size=20))
def test_kept_prefixes_are_the_last_used_ones_and_a_place_holds_what_it_is_asked_for(dispatches):
    kept = Kept()
    recent: list[int] = []  # least recently used first: the oracle
    places: list[int | None] = [None] * KEPT  # what the device has in them
    for dispatch in dispatches:
        held: set[int] = set()
        saves: dict[int, int] = {}
        loads: list[tuple[int, int]] = []
        for number in dispatch:
            known, place = kept.find((number, number + 1))
            assert known == (number in recent)
            if known:
                recent.remove(number)
            elif len(recent) == KEPT:
                free = [other for other in recent if other not in held]
                assert (place is None) == (not free)
                if not free:
                    continue
                recent.remove(free[0])
            recent.append(number)
            held.add(number)
            assert place is not None and 0 <= place < KEPT
            if known:
                loads.append((number, place))
            else:
                assert place not in saves  # all saves come before all loads: a place is written once
                saves[place] = number
        for place, number in saves.items():
            places[place] = number
        for number, place in loads:
            assert places[place] == number
        kept.release()


def test_copies_name_slots_and_places_of_each_replica():
    copies = [([(7, 2), (3, 0)], [(1, 2)]), ([], []), ([], [(slot, 1) for slot in range(SLOTS)])]
    request = Kept.request(PROGRAMS[(5,)], copies, 41)
    assert (request.saves.tolist(), request.loads.tolist()) == ([2, 0, 0], [1, 0, SLOTS])
    saved = np.stack([request.saved_slot, request.saved_place], axis=-1)
    loaded = np.stack([request.loaded_slot, request.loaded_place], axis=-1)
    assert saved.shape == (3, KEPT, 2) and loaded.shape == (3, SLOTS, 2)
    assert saved[0, :2].tolist() == [[7, 2], [3, 0]]
    assert loaded[0, 0].tolist() == [1, 2] and loaded[2].tolist() == [[slot, 1] for slot in range(SLOTS)]
    assert request.length.tolist() == [41] * 3
