"""Several adapters, slices and storage layouts in one merge: one rounding in all."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    LowRank,
    NonFiniteError,
    ShapeError,
    fused_adapters,
    merge,
    merge_adapters,
    round_fraction,
)
from loracle.reference.formats import BFLOAT16, FORMATS, float_format
from loracle.reference.merge import merge_tiles

F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same_bits(actual, expected):
    bits = float_format(expected.dtype).bits
    assert actual.dtype == expected.dtype
    assert np.array_equal(np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits))


def exactly(W0, adapters, dtype):
    """W0 plus every update on its rows, in rational arithmetic, rounded once."""
    total = np.array([[Fraction(float(v)) for v in row] for row in W0], object).reshape(W0.shape)
    for adapter in adapters:
        rows = range(W0.shape[0])[adapter.rows or slice(None)]
        for (i, row), j, k in (
            (pair, j, k)
            for pair in enumerate(rows)
            for j in range(W0.shape[1])
            for k in range(len(adapter.A))
        ):
            product = Fraction(float(adapter.B[i, k])) * Fraction(float(adapter.A[k, j]))
            total[row, j] += Fraction(adapter.scaling) * product
    merged = np.empty(W0.shape, dtype)
    for index in np.ndindex(*W0.shape):
        keep = total[index] == 0 and W0[index] == 0
        merged[index] = W0[index] if keep else round_fraction(total[index], dtype)
    return merged


@st.composite
def problems(draw):
    outputs, inputs = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    adapters = []
    for _ in range(draw(st.integers(0, 3))):
        start, stop = sorted(rng.integers(0, outputs + 1, 2).tolist())
        rows = draw(st.sampled_from([None, slice(start, stop)]))
        count, r = outputs if rows is None else stop - start, draw(st.integers(1, 4))
        A, B = rng.normal(size=(r, inputs)), rng.normal(size=(count, r))
        dtypes = draw(st.tuples(*[st.sampled_from(DTYPES)] * 2))
        scaling = draw(st.sampled_from([1.0, 1 / 3, -2.0, 0.0]))
        adapters.append(LowRank(A.astype(dtypes[0]), B.astype(dtypes[1]), scaling, rows=rows))
    W0 = rng.normal(size=(outputs, inputs)).astype(draw(st.sampled_from(DTYPES)))
    return W0, adapters, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 3]))


@settings(max_examples=80)
@given(problems())
def test_any_adapters_on_any_rows_are_rounded_once_in_all(problem):
    W0, adapters, dtype, threads = problem
    expected = exactly(W0, adapters, dtype)
    assert_same_bits(merge_adapters(W0, adapters, dtype=dtype, threads=threads), expected)
    turned = np.ascontiguousarray(W0.T)
    merged = merge_adapters(turned, adapters, dtype=dtype, threads=threads, fan_in_fan_out=True)
    assert merged.flags.c_contiguous
    assert_same_bits(merged, expected.T)


@BY_DTYPE
def test_two_updates_that_each_fall_on_a_tie_are_not_rounded_in_turn(dtype):
    half = 2.0 ** -float_format(dtype).precision
    one = np.ones((1, 1), dtype)
    adapter = LowRank(np.ones((1, 1)), np.ones((1, 1)), half)
    assert merge(one, adapter.A, adapter.B, half) == 1
    assert merge_adapters(one, [adapter, adapter]) == 1 + 2 * half
    assert merge_adapters(one, [adapter, LowRank(adapter.A, adapter.B, -half)]) == 1
    beyond = LowRank(np.full((1, 1), 2.0**-300), np.ones((1, 1)), half)
    assert merge_adapters(one, [adapter, beyond]) == 1 + 2 * half


@BY_DTYPE
def test_updates_that_cancel_keep_every_bit(dtype):
    rng = np.random.default_rng(1)
    W0 = rng.normal(size=(4, 5)).astype(dtype)
    W0[1, 2] = -0.0
    A, B = rng.normal(size=(2, 5)), rng.normal(size=(4, 2))
    assert_same_bits(merge_adapters(W0, [LowRank(A, B, 0.3), LowRank(A, -B, 0.3)]), W0)
    assert_same_bits(merge_adapters(W0, []), W0)
    assert_same_bits(merge_adapters(W0, [], dtype=F64), W0.astype(F64))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=str)
def test_a_large_fused_projection_is_merged_slice_by_slice(dtype, fan_in_fan_out):
    """Rows without an adapter keep their bits, the others are those of a merge of the slice alone."""
    rng = np.random.default_rng(2)
    widths, enabled = (600, 300, 300), (True, False, True)
    W0 = (rng.normal(size=(1200, 700)) * 0.02).astype(dtype)
    A, B = rng.normal(size=(8, 700)).astype(F32) * 0.05, rng.normal(size=(900, 4)).astype(F32) * 0.05
    adapters = fused_adapters(A, B, 0.5, widths, enabled)
    stored = np.ascontiguousarray(W0.T) if fan_in_fan_out else W0
    out = np.full(stored.shape, 7, dtype)
    merged = merge_adapters(stored, adapters, fan_in_fan_out=fan_in_fan_out, out=out, threads=2)
    assert merged is out
    merged = merged.T if fan_in_fan_out else merged
    assert_same_bits(merged[600:900], W0[600:900])
    assert_same_bits(merged[:600], merge(W0[:600], A[:4], B[:600], 0.5))
    assert_same_bits(merged[900:], merge(W0[900:], A[4:], B[600:], 0.5))


@pytest.mark.parametrize(("fan_in_fan_out", "position"), [(False, r"\[5, 1\]"), (True, r"\[1, 5\]")])
def test_positions_are_those_of_the_weight_as_it_is_stored(fan_in_fan_out, position):
    W0 = np.ones((7, 3), F16)
    big = np.zeros((3, 1), F32)
    big[1] = 70000
    adapters = [
        LowRank(np.array([[0, 1, 0]], F32), big, 1.0, rows=slice(4, 7)),
        LowRank(big.T, big, 0.0, rows=slice(0, 3)),
    ]
    stored = W0.T.copy() if fan_in_fan_out else W0
    with pytest.raises(
        NonFiniteError, match=rf"^c_attn: .*65504.*\(float16\), got an overflow at {position}; "
    ):
        merge_adapters(stored, adapters, fan_in_fan_out=fan_in_fan_out, name="c_attn")
    stored[(1, 5) if fan_in_fan_out else (5, 1)] = np.nan
    with pytest.raises(NonFiniteError, match=rf"^c_attn: expected finite numbers, got nan at {position}; "):
        merge_adapters(stored, adapters, fan_in_fan_out=fan_in_fan_out, name="c_attn")


def test_what_does_not_fit_is_named_with_the_number_of_its_adapter():
    W0, A, B = np.ones((3, 4), F32), np.ones((2, 4), F32), np.ones((3, 2), F32)
    good = LowRank(A, B, 1.0)
    with pytest.raises(ShapeError, match=r"^lora_A of adapter 1 of W0: expected \(r, 4\).*got \(2, 3\)"):
        merge_adapters(W0, [good, LowRank(A[:, 1:], B, 1.0)])
    with pytest.raises(ShapeError, match=r"^lora_B of adapter 0 of W0: expected \(2, 2\).*got \(3, 2\)"):
        merge_adapters(W0, [LowRank(A, B, 1.0, rows=slice(0, 2)), good])
    with pytest.raises(ConfigError, match=r"^rows of W0: expected a slice of step 1 within 3 outputs, got"):
        merge_adapters(W0, [LowRank(A, B, 1.0, rows=slice(1, 4))])
    with pytest.raises(
        NonFiniteError, match=r"^scaling of adapter 1 of W0: expected a finite number, got inf"
    ):
        merge_adapters(W0, [good, LowRank(A, B, float("inf"))])
    with pytest.raises(NonFiniteError, match=r"^lora_B of adapter 1 of W0: expected finite numbers, got nan"):
        merge_adapters(W0, [good, LowRank(A, B * np.nan, 1.0)])
    with pytest.raises(ShapeError, match=r"^lora_A of W0: expected \(r, 3\) .*to fit W0 \(4, 3\)"):
        merge_adapters(W0, [good], fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("r", "rows", "columns"),
    [
        (1, 64, 4096),  # 2^18 entries of rows as wide as a panel may be
        (64, 64, 4096),  # 2^18 entries of A
        (65, 65, 4032),  # and not more, in steps of 16 columns
        (512, 256, 512),  # 2^17 entries of B
        (1000, 131, 256),
        (5000, 26, 48),
        (20000, 6, 16),
        (200000, 1, 16),
    ],
)
def test_tiles_are_cut_for_the_rank(r, rows, columns):
    work = merge_tiles((300, 10000), r)
    first_rows, first_columns = work[0]
    assert first_columns == slice(0, columns)
    assert first_rows == slice(0, min(rows, 300))
    covered = np.zeros((300, 10000), int)
    for tile in work:
        covered[tile] += 1
    assert (covered == 1).all()
