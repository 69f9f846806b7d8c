"""`merge_differences` says what a comparison with the whole merge says, whichever way an entry takes."""

import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import (
    LowRank,
    NonFiniteError,
    ShapeError,
    merge_adapters,
    merge_differences,
)
from loracle.reference.tiles import tiles

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
MODULE = sys.modules["loracle.reference.merge_differences"]
DTYPES = [F16, BF16, F32, F64]


def bits(values):
    return values.view(f"u{values.dtype.itemsize}")


def assert_same(W0, adapters, merged, **options):
    """The differences are those of all bits with the whole merge."""
    right = merge_adapters(W0, adapters, dtype=merged.dtype, **options)
    found = merge_differences(W0, adapters, merged, **options)
    places = np.flatnonzero(bits(np.ascontiguousarray(right)) != bits(np.ascontiguousarray(merged)))
    assert np.array_equal(found.places, places)
    assert found.expected.dtype == merged.dtype
    assert np.array_equal(bits(found.expected), bits(right.reshape(-1)[places]))
    return found


def weight(seed, dtype, shape, spread=2, r=3):
    rng = np.random.default_rng(seed)
    W0 = np.ldexp(rng.uniform(-1, 1, shape), rng.integers(-spread, spread + 1, shape)).astype(dtype)
    W0[rng.random(shape) < 0.05] = 0
    A, B = rng.normal(size=(r, shape[1])).astype(F32), rng.normal(size=(shape[0], r)).astype(F32)
    A[:, rng.random(shape[1]) < 0.1] = 0
    return W0, A, B


def damaged(right, seed, share):
    """The weight with some entries a bit or more away: zeros, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    held = right.copy()
    flat = bits(held).reshape(-1)
    places = np.flatnonzero(rng.random(flat.size) < share)
    width = 8 * held.dtype.itemsize
    flat[places] ^= flat.dtype.type(1) << rng.integers(0, width, len(places)).astype(flat.dtype)
    if flat.size > 8:
        held.reshape(-1)[rng.integers(0, flat.size, 4)] = [0.0, -0.0, np.inf, np.nan]
    return held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 9), st.integers(1, 11)),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.booleans(),
)
def test_it_finds_every_difference_and_no_other(dtype, target, seed, shape, r, share, turned):
    W0, A, B = weight(seed, dtype, shape, r=r)
    adapters = [LowRank(A, B, 1 / 3)]
    held = damaged(merge_adapters(W0, adapters, dtype=target), seed, share)
    if turned:
        W0, held = np.ascontiguousarray(W0.T), np.ascontiguousarray(held.T)
    assert_same(W0, adapters, held, fan_in_fan_out=turned)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2])
def test_tiles_threads_and_ways_cannot_be_seen(monkeypatch, target, threads, share):
    monkeypatch.setattr(MODULE, "merge_tiles", lambda shape, r: tiles(shape, 512, 32))
    monkeypatch.setattr(MODULE, "PENDING_ENTRIES", 20)
    W0, A, B = weight(7, BF16, (96, 80), r=5)
    adapters = [LowRank(A, B, 0.5)]
    held = damaged(merge_adapters(W0, adapters, dtype=target), 8, share)
    assert_same(W0, adapters, held, threads=threads)


@pytest.mark.parametrize("target", [F16, BF16, F32], ids=str)
def test_a_right_weight_is_proven_but_for_a_few_entries(monkeypatch, target):
    counts = {"single": 0, "whole": 0}
    single, whole = MODULE.single_entries, MODULE.TileComparer._compare_all

    def counted(factors, W0, i, j, form):
        counts["single"] += len(i)
        return single(factors, W0, i, j, form)

    def counted_tile(self, tile):
        counts["whole"] += 1
        whole(self, tile)

    monkeypatch.setattr(MODULE, "single_entries", counted)
    monkeypatch.setattr(MODULE.TileComparer, "_compare_all", counted_tile)
    rng = np.random.default_rng(3)
    W0 = (rng.normal(size=(256, 512)) * 0.02).astype(target)
    A, B = (rng.normal(size=(8, 512)) / 64).astype(F32), (rng.normal(size=(256, 8)) * 0.01).astype(F32)
    adapters = [LowRank(A, B, 2.0)]
    right = merge_adapters(W0, adapters)
    assert not len(merge_differences(W0, adapters, right).places)
    assert counts["whole"] == 0
    assert counts["single"] < 0.02 * W0.size
    assert_same(W0, adapters, damaged(right, 1, 0.5), threads=1)
    assert counts["whole"] > 0


@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_slices_of_a_fused_weight_and_rows_that_no_adapter_changes(target):
    W0, A, B = weight(11, F32, (24, 10))
    adapters = [LowRank(A, B[:8], 2.0, rows=slice(0, 8)), LowRank(A, B[8:16], -1.0, rows=slice(16, 24))]
    held = damaged(merge_adapters(W0, adapters, dtype=target), 3, 0.1)
    assert_same(W0, adapters, held)
    W0, held = np.ascontiguousarray(W0.T), np.ascontiguousarray(held.T)
    assert_same(W0, adapters, held, fan_in_fan_out=True)
    assert_same(W0, [], damaged(W0.astype(target), 4, 0.2))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("target", [F16, BF16, F32], ids=str)
def test_large_updates_and_many_terms_are_compared_in_float64(target, share):
    W0, A, B = weight(5, F32, (12, 14), r=1100)
    assert_same(
        W0, [LowRank(A, B, 1.0)], damaged(merge_adapters(W0, [LowRank(A, B, 1.0)], dtype=target), 6, share)
    )
    if target != F16:
        big = [LowRank(A * F32.type(2.0**100), B * F32.type(2.0**-85), 1.0)]
        assert_same(W0, big, damaged(merge_adapters(W0, big, dtype=target), 6, share))


@pytest.mark.parametrize("held", [65504.0, np.inf, 1.0])
@pytest.mark.parametrize("turned", [False, True])
def test_an_overflow_of_the_merge_is_refused_as_by_the_merge(held, turned):
    W0, A, B = np.ones((6, 4), F32), np.full((1, 4), 300.0, F32), np.ones((6, 1), F32)
    B[[1, 4]] = 300
    adapters = [LowRank(A, B, 1.0)]
    W0 = np.ascontiguousarray(W0.T) if turned else W0
    merged = np.full(W0.shape, held, F16)
    with pytest.raises(NonFiniteError) as expected:
        merge_adapters(W0, adapters, dtype=F16, fan_in_fan_out=turned, name="q")
    with pytest.raises(NonFiniteError) as got:
        merge_differences(W0, adapters, merged, fan_in_fan_out=turned, name="q")
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_weight_that_is_not_finite_is_refused_by_name(zero, share):
    W0, A, B = weight(2, F32, (6, 5))
    held = damaged(merge_adapters(W0, [LowRank(A, B, 1.0)]), 2, share)
    W0[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"q: expected finite numbers, got nan at \[3, 2\]"):
        merge_differences(W0, [LowRank(A, B * F32.type(not zero), 1.0)], held, name="q")


def test_another_shape_is_refused():
    W0, A, B = weight(2, F32, (6, 5))
    with pytest.raises(ShapeError, match=r"merged q: expected shape \(6, 5\), got \(5, 6\)"):
        merge_differences(W0, [LowRank(A, B, 1.0)], W0.T, name="q")
