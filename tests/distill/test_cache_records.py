"""Records of the teacher cache: packed ids against Python's integers, atoms against float64, the error on Zipf's law."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.distill.teacher_cache import packed_ids
from subl_jax.distill.teacher_cache import records as cache_records

# A vocabulary of the Qwen family.
LARGE_VOCAB = 152_064


def zipf(tokens: int, seed: int, exponent: float = 1.1) -> np.ndarray:
    """Log-probabilities [tokens, LARGE_VOCAB] of Zipf's law, the ranks shuffled for each token."""
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(LARGE_VOCAB) for _ in range(tokens)]) + 1.0
    logits = -exponent * np.log(ranks)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def records_of(log_probs: np.ndarray, k: int = 64) -> np.ndarray:
    """Records of dense float64 log-probabilities, by NumPy alone."""
    ids = np.sort(np.argpartition(-log_probs, k, axis=1)[:, :k], axis=1).astype(np.int32)
    chosen = np.take_along_axis(log_probs, ids, axis=1)
    rest = np.exp(log_probs)
    np.put_along_axis(rest, ids, 0.0, axis=1)
    drops = (chosen.max(axis=1, keepdims=True) - chosen).astype(np.float32)
    tail = np.log(rest.sum(axis=1)).astype(np.float32)
    return cache_records.encode(ids, drops, tail, np.zeros(len(ids), np.float32), log_probs.shape[1])


# --- Ids --------------------------------------------------------------------------------------------------------------


@st.composite
def id_sets(draw) -> tuple[int, list[list[int]]]:
    """A vocabulary, and rows of equally many different ids below it, in ascending order."""
    vocab = draw(st.one_of(st.integers(1, 70), st.integers(1, 1 << 24), st.sampled_from([128_256, LARGE_VOCAB])))
    k, rows = draw(st.integers(1, min(vocab, 70))), draw(st.integers(0, 4))
    row = st.lists(st.integers(0, vocab - 1), min_size=k, max_size=k, unique=True).map(sorted)
    if vocab <= 70:  # hardly ever drawn by chance: nearly the whole vocabulary
        row = st.permutations(range(vocab)).map(lambda order: sorted(order[:k]))
    return vocab, [draw(row) for _ in range(rows)] if rows else [list(range(vocab - k, vocab))]


def read_with_integers(row: bytes, k: int, vocab: int) -> list[int]:
    """Elias' and Fano's code, decoded bit by bit from Python's integers. The split is the one of the smallest size."""
    low = min(range(25), key=lambda bits: (k * bits + k + ((vocab - 1) >> bits), bits))
    lows, highs = -(-k * low // 8), max(3, -(-(k + ((vocab - 1) >> low)) // 8))
    assert len(row) == lows + highs
    below, above = int.from_bytes(row[:lows], "little"), int.from_bytes(row[lows:], "little")
    ones = [place for place in range(highs * 8) if above >> place & 1]
    assert len(ones) == k
    return [((place - i) << low) | (below >> (i * low) & ((1 << low) - 1)) for i, place in enumerate(ones)]


@settings(deadline=None, max_examples=150)
@given(id_sets())
def test_packed_ids_are_read_back_and_agree_with_python_integers(drawn):
    vocab, rows = drawn
    ids = np.asarray(rows, np.int32)
    packed = packed_ids.pack(ids, vocab)
    assert packed.shape == (len(rows), packed_ids.width(ids.shape[1], vocab))
    np.testing.assert_array_equal(packed_ids.unpack(packed, ids.shape[1], vocab), ids)
    assert [read_with_integers(row.tobytes(), ids.shape[1], vocab) for row in packed] == rows


@pytest.mark.parametrize("ids", [[3, 3], [4, 2], [-1, 2], [2, 9]])
def test_ids_that_do_not_ascend_below_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match=r"ascend .* \[0, 9\)"):
        packed_ids.pack(np.array([ids], np.int32), 9)


def test_damaged_or_wrongly_sized_rows_of_ids_are_refused():
    packed = packed_ids.pack(np.array([[1, 2, 8]], np.int32), 1000)
    with pytest.raises(ValueError, match="damaged"):
        packed_ids.unpack(np.full_like(packed, 255), 3, 1000)
    with pytest.raises(ValueError, match=r"rows of .* bytes where 3 ids of 9"):
        packed_ids.unpack(packed, 3, 9)
    with pytest.raises(ValueError, match="lower k"):
        packed_ids.width(10, 9)


# --- Records ----------------------------------------------------------------------------------------------------------


def test_atoms_sum_to_one_and_each_is_within_half_a_step():
    rng = np.random.default_rng(0)
    for log_probs in (
        zipf(4, 1),
        np.log(rng.dirichlet(np.full(500, 0.02), 8) + 1e-30),
        np.log(np.full((2, 99), 1 / 99)),
    ):
        read = cache_records.decode(records_of(log_probs), log_probs.shape[1])
        np.testing.assert_allclose(np.exp(read.log_probs).sum(axis=1) + np.exp(read.log_tail), 1, atol=3e-7)
        exact = np.take_along_axis(log_probs, read.ids, axis=1)
        step = (exact.max(axis=1) - exact.min(axis=1)) / 65535
        # Half a step for the drop itself and as much for the likeliest one's share, and float32.
        assert (np.abs(read.log_probs - exact).max(axis=1) <= step + 2e-6 * np.abs(exact).max(axis=1)).all()


@pytest.mark.parametrize(("exponent", "noise"), [(1.1, 0.3), (1.5, 1.0)])
def test_added_error_on_zipfs_law_is_the_tails_and_not_the_grids(exponent, noise):
    # V = 152064 against a student that is off by independent noise at every id: the worst case for a tail bucket.
    log_p = zipf(12, 3, exponent)
    log_q = log_p + np.random.default_rng(4).normal(0, noise, log_p.shape)
    log_q -= np.log(np.exp(log_q).sum(axis=1, keepdims=True))
    full = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    read = cache_records.decode(records_of(log_p), LARGE_VOCAB)
    chosen = np.take_along_axis(log_q, read.ids, axis=1)
    rest = np.log1p(-np.exp(chosen).sum(axis=1))
    stored = cache_records.atoms_kl(read.log_probs, read.log_tail, chosen, rest)
    exact = np.take_along_axis(log_p, read.ids, axis=1)
    tail = 1 - np.exp(exact).sum(axis=1)
    atoms = (np.exp(exact) * (exact - chosen)).sum(axis=1) + tail * (np.log(tail) - rest)
    print(f"Zipf {exponent}: KL {full.mean():.4f}, atoms {atoms.mean():.4f}, tail {tail.mean():.3f}, "
          f"grid {np.abs(stored - atoms).max():.1e}")  # fmt: skip
    assert (atoms <= full + 1e-12).all()  # a coarser view never sees a larger divergence
    # To first order, a step of the grid times the mean size of log(p / q).
    step = (exact.max(axis=1) - exact.min(axis=1)) / 65535
    assert (np.abs(stored - atoms) <= step * (np.exp(exact) * np.abs(exact - chosen)).sum(axis=1) + 1e-6).all()
    assert np.abs(stored - atoms).max() <= 1e-4


def test_where_teacher_and_student_agree_the_added_error_is_zero():
    log_p = zipf(4, 5)
    read = cache_records.decode(records_of(log_p), LARGE_VOCAB)
    exact = np.take_along_axis(log_p, read.ids, axis=1)
    kl = cache_records.atoms_kl(read.log_probs, read.log_tail, exact, np.log1p(-np.exp(exact).sum(axis=1)))
    assert np.abs(kl).max() < 2e-7


def test_numbers_that_no_softmax_gives_are_refused():
    ids, one = np.array([[0, 1]], np.int32), np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="1 of 1 loss tokens are not finite"):
        cache_records.encode(ids, np.array([[0, np.nan]], np.float32), one, one, 5)
    with pytest.raises(ValueError, match="not finite"):
        cache_records.encode(ids, np.zeros((1, 2), np.float32), np.full(1, np.nan, np.float32), one, 5)
