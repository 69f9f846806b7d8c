"""Which way an entry goes through the stages of a merge: it must not be seen in the result."""

import sys

import ml_dtypes
import numpy as np
import pytest

from loracle.reference import LowRank, NonFiniteError, merge, merge_exact, merge_product, single_entries
from loracle.reference import merge_block as module
from loracle.reference.factors import row_ranges
from loracle.reference.formats import float_format
from loracle.reference.merge_block import BlockMerger

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
# The module; the package has a function of that name.
MERGE = sys.modules["loracle.reference.merge"]


@pytest.fixture
def log(monkeypatch):
    """What was evaluated in which dtype: "all float32", "single", "settled", with how many entries each."""
    found = []
    ends = module.IntervalEvaluator.round_ends
    prove, settle = single_entries.prove_entries, single_entries.merged_entries

    def logged_ends(self, W0, *rest):
        found.append((f"all {self._product._A.dtype}", W0.size))
        return ends(self, W0, *rest)

    monkeypatch.setattr(module.IntervalEvaluator, "round_ends", logged_ends)
    monkeypatch.setattr(
        single_entries, "prove_entries", lambda w, *rest: found.append(("single", len(w))) or prove(w, *rest)
    )
    monkeypatch.setattr(
        single_entries,
        "merged_entries",
        lambda w, *rest: found.append(("settled", len(w))) or settle(w, *rest),
    )
    return found


def counts(log):
    return {kind: sum(n for own, n in log if own == kind) for kind in dict.fromkeys(kind for kind, _ in log)}


def model_like(dtype, r=8, shape=(64, 96), update=0.1):
    rng = np.random.default_rng(3)
    W0 = (rng.normal(size=shape) * 0.02).astype(dtype)
    A = (rng.normal(size=(r, shape[1])) / 8).astype(F32)
    B = (rng.normal(size=(shape[0], r)) * 0.02 * update).astype(F32)
    return W0, A, B


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(F32, {"all float64"}), (BF16, {"all float32", "single"}), (F16, {"all float32", "single"})],
)
def test_most_entries_are_proven_at_the_first_stage(log, dtype, expected):
    W0, A, B = model_like(dtype)
    merged = merge(W0, A, B, 2.0, threads=1)
    assert np.array_equal(merged, merge_exact(W0, A, B, 2.0, dtype))
    found = counts(log)
    assert set(found) - {"settled"} == expected
    assert found[next(iter(found))] == W0.size
    assert found.get("single", 0) < W0.size / 100
    assert found.get("settled", 0) < W0.size / 1000


def test_a_16_bit_tile_that_float32_does_not_prove_is_followed_by_float64(log, monkeypatch):
    """An update far larger than the weight: float32's error beside it is too large for half of the
    entries.
    """
    monkeypatch.setattr(MERGE, "_TILE_ENTRIES", 1024)
    monkeypatch.setattr(MERGE, "_PANEL_ENTRIES", 1024)
    W0, A, B = model_like(BF16, r=64, shape=(64, 32), update=50)
    merged = merge(W0, A, B, 2.0, threads=1)
    assert np.array_equal(merged, merge_exact(W0, A, B, 2.0, BF16))
    first, *others = [kind for kind, _ in log if kind.startswith("all")]
    assert first == "all float32"
    assert set(others) == {"all float64"}


def test_float32_is_left_alone_for_many_components_and_for_numbers_near_its_ends(log):
    W0, A, B = model_like(BF16, r=1025, shape=(2, 3))
    assert np.array_equal(merge(W0, A, B, 2.0), merge_exact(W0, A, B, 2.0, BF16))
    assert counts(log)["all float64"] == 6
    log.clear()
    W0, A, B = model_like(BF16, r=1024, shape=(2, 3))
    merge(W0, A, B, 2.0)
    assert counts(log)["all float32"] == 6
    big, small = 2.0**121, 2.0**-121
    for weight, a, b, kind in (
        (1.5, 2.0**118, 2.0**-118, "all float32"),
        (1.5, big, small, "all float64"),
        (1.5, small, big, "all float64"),
        (big, 1.0, 1.0, "all float64"),
        (1.5, 2.0**61, 2.0**60, "all float64"),
    ):
        log.clear()
        given = np.full((2, 3), weight, BF16), np.full((1, 3), a), np.full((2, 1), b)
        assert np.array_equal(merge(*given, 1.0), merge_exact(*given, 1.0, BF16))
        assert next(iter(counts(log))) == kind


def test_float64_needs_more_than_float64_for_every_entry(log):
    W0, A, B = model_like(F64, shape=(9, 10))
    assert np.array_equal(merge(W0, A, B, 1 / 3), merge_exact(W0, A, B, 1 / 3, F64))
    assert counts(log) == {"settled": 90}


def test_entries_that_are_left_wait_until_there_are_many(log, monkeypatch):
    monkeypatch.setattr(module, "PENDING_ENTRIES", 10)
    W0, A, B = np.zeros((8, 6), F32), np.zeros((1, 6), F32), np.ones((8, 1), F32)
    A[0, 0] = 1
    (factors,) = row_ranges(8, [LowRank(A, B, 1.0)])
    out = np.full((8, 6), 7, F32)
    merger = BlockMerger(factors, W0, 0.0, out, float_format(F32))
    merger.merge((slice(0, 2), slice(0, 6)))  # 5 zeros in each row are beyond any relative error
    assert "settled" not in counts(log)
    merger.merge((slice(2, 4), slice(0, 6)))
    assert counts(log)["settled"] == 20
    merger.merge((slice(4, 6), slice(0, 6)))
    assert counts(log)["settled"] == 20
    assert merger.finish() is None
    assert counts(log)["settled"] == 30
    assert merger.finish() is None
    assert counts(log)["settled"] == 30
    assert out[:6].tolist() == [[1, 0, 0, 0, 0, 0]] * 6
    assert (out[6:] == 7).all()


def test_the_first_overflow_of_all_tiles_is_reported_at_the_end():
    W0, A, B = np.ones((6, 4), F16), np.full((1, 4), 300.0, F32), np.ones((6, 1), F32)
    B[[1, 4]] = 300
    (factors,) = row_ranges(6, [LowRank(A, B, 1.0)])
    out = np.empty((6, 4), F16)
    merger = BlockMerger(factors, W0, 1.0, out, float_format(F16))
    for tile in ((slice(3, 6), slice(2, 4)), (slice(0, 3), slice(2, 4)), (slice(0, 3), slice(1, 2))):
        merger.merge(tile)
    assert merger.finish() == (1, 1)
    assert out[0, 1:].tolist() == [301] * 3
    assert np.isinf(out[1, 1:]).all()


def test_products_and_blocks_are_cut_so_that_they_fit_the_cache(log, monkeypatch):
    monkeypatch.setattr(merge_product, "_BLOCK_ENTRIES", 96 * 5)
    monkeypatch.setattr(single_entries, "_PRODUCTS_AT_ONCE", 8 * 3)
    W0, A, B = model_like(BF16)
    assert np.array_equal(merge(W0, A, B, 2.0, threads=1), merge_exact(W0, A, B, 2.0, BF16))
    assert max(n for kind, n in log if kind.startswith("all")) == 96 * 5
    assert max(n for kind, n in log if kind == "single") == 3
    assert all(n <= 3 for kind, n in log if kind == "settled")


@pytest.mark.parametrize("target", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tile_of_an_unread_weight_that_is_not_finite_is_left_alone_and_reported(log, target, value):
    W0, A, B = model_like(F32, shape=(6, 8))
    W0[4, 5] = value
    (factors,) = row_ranges(6, [LowRank(A, B, 1.0)])
    out = np.full((6, 8), 7, target)
    merger = BlockMerger(factors, W0, None, out, float_format(target))
    for tile in ((slice(0, 3), slice(0, 8)), (slice(3, 6), slice(0, 4)), (slice(3, 6), slice(4, 8))):
        merger.merge(tile)
    assert merger.finish() == (3, 4)
    assert (out[3:, 4:] == 7).all()
    assert np.array_equal(out[:3], merge_exact(W0[:3], A, B[:3], 1.0, target))
    assert np.array_equal(out[3:, :4], merge_exact(W0[3:, :4], A[:, :4], B[3:], 1.0, target))


def test_an_unread_weights_largest_magnitude_is_its_tiles(log):
    """A bfloat16 tile near the end of the range is left to float64, and no other."""
    W0, A, B = np.ones((4, 8), BF16), np.full((1, 8), 0.3), np.full((4, 1), 0.3)
    W0[:2] = 2.0**121
    (factors,) = row_ranges(4, [LowRank(A, B, 1.0)])
    out = np.empty((4, 8), BF16)
    merger = BlockMerger(factors, W0, None, out, float_format(BF16))
    merger.merge((slice(0, 2), slice(0, 8)))
    merger.merge((slice(2, 4), slice(0, 8)))
    assert merger.finish() is None
    assert [kind for kind, _ in log if kind.startswith("all")] == ["all float64", "all float32"]
    assert np.array_equal(out, merge_exact(W0, A, B, 1.0, BF16))


def near_ties(dtype, distance, r):
    """Sums that lie ``distance`` beside a midpoint of the dtype, above or below, on either side of zero."""
    p, rng = float_format(dtype).precision, np.random.default_rng(6)
    sign = rng.choice([-1.0, 1.0], (40, 1))
    W0 = ((1 + rng.integers(0, 2 ** (p - 1), (40, 30)) * 2.0 ** (1 - p)) * sign).astype(dtype)
    A = np.zeros((r, 30))
    A[0], A[-1] = 2.0**-p, rng.choice([-distance, distance], 30)
    return W0, A, np.repeat(sign, r, axis=1)


@pytest.mark.parametrize("float32", [True, False])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("bits", [20, 23, 24, 25, 26, 30, 50, 52, 53, 54, 60])
def test_sums_beside_a_midpoint_are_right_whatever_is_worked_in(monkeypatch, bits, dtype, float32):
    """In float64 as well, from where a 16-bit target is reached through float32."""
    monkeypatch.setattr(module, "FLOAT32_TERMS", 1 << 10 if float32 else 0)
    monkeypatch.setattr(module, "_FLOAT32_SHARE", 1.0)
    W0, A, B = near_ties(dtype, 2.0**-bits, 2)
    assert np.array_equal(merge(W0, A, B, 1.0), merge_exact(W0, A, B, 1.0, dtype))


def test_numbers_near_the_largest_are_looked_at_twice(log):
    """Ends that overflow alike would agree; and what is uncertain stays so beside an overflow."""
    for dtype in (F16, BF16, F32):
        form = float_format(dtype)
        half = 2.0 ** (form.max_exponent - form.precision)
        W0 = np.array([[form.largest, 1.0, form.largest / 4]], dtype)
        A = np.array([[half * 0.999, 2.0**-form.precision, 1.0]])
        merged = merge(W0, A, np.ones((1, 1)), 1.0)
        assert np.array_equal(merged, merge_exact(W0, A, np.ones((1, 1)), 1.0, dtype))
        with pytest.raises(NonFiniteError, match=r"overflow at \[0, 0\]"):
            merge(W0, A * 4, np.ones((1, 1)), 1.0)


def test_a_panel_and_what_evaluates_it_are_made_once_for_all_its_tiles(monkeypatch):
    made, loaded = [], []
    plain, panel = module.IntervalEvaluator, module.Factors.panel
    monkeypatch.setattr(module, "IntervalEvaluator", lambda *a: made.append(a[1]) or plain(*a))
    monkeypatch.setattr(
        module.Factors, "panel", lambda self, columns: loaded.append(columns) or panel(self, columns)
    )
    W0, A, B = model_like(F32)
    (factors,) = row_ranges(64, [LowRank(A, B, 2.0)])
    merger = BlockMerger(factors, W0, 1.0, np.empty_like(W0), float_format(F32))
    for rows in (slice(0, 20), slice(20, 40), slice(40, 64)):
        merger.merge((rows, slice(0, 96)))
    assert made == [F64]
    assert loaded == [slice(0, 96)]
    merger.merge((slice(0, 20), slice(0, 40)))
    assert made == [F64, F64]
    assert loaded == [slice(0, 96), slice(0, 40)]


@pytest.mark.parametrize(("share", "expected"), [(1.0, "all float32"), (0.0, "all float64")])
def test_a_tile_is_evaluated_in_float32_while_its_share_of_uncertain_entries_is_small(
    log, monkeypatch, share, expected
):
    """Every entry of the first tile is a tie: all of them are uncertain."""
    monkeypatch.setattr(module, "_FLOAT32_SHARE", share)
    W0, A, B = near_ties(BF16, 0.0, 1)
    A[0] = 2.0**-8
    (factors,) = row_ranges(40, [LowRank(A, B, 1.0)])
    merger = BlockMerger(factors, W0, 2.0, np.empty_like(W0), float_format(BF16))
    for rows in (slice(0, 20), slice(20, 40)):
        merger.merge((rows, slice(0, 30)))
    assert [kind for kind, _ in log if kind.startswith("all")] == ["all float32", expected]


def test_float32_is_used_up_to_its_share_and_below_its_size(log, monkeypatch):
    W0, A, B = near_ties(BF16, 0.0, 1)
    A[0, :15], A[0, 15:] = 2.0**-8, 0.0
    monkeypatch.setattr(module, "_FLOAT32_SHARE", 0.5)
    (factors,) = row_ranges(40, [LowRank(A, B, 1.0)])
    merger = BlockMerger(factors, W0, 2.0, np.empty_like(W0), float_format(BF16))
    for rows in (slice(0, 20), slice(20, 40)):
        merger.merge((rows, slice(0, 30)))
    assert [kind for kind, _ in log if kind.startswith("all")] == ["all float32"] * 2
    log.clear()
    monkeypatch.setattr(module, "FLOAT32_SIZE", 2.0)
    merger = BlockMerger(factors, W0, 2.0, np.empty_like(W0), float_format(BF16))
    merger.merge((slice(0, 20), slice(0, 30)))
    assert next(iter(counts(log))) == "all float64"
