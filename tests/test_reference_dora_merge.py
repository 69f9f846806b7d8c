import math
import os
import re
import threading
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    dora_block,
    dora_entries,
    dora_merge,
    merge,
    round_fraction,
)
from loracle.reference.dora_entries import exact_merged, exact_square, round_root
from loracle.reference.dora_merge import merge_dora, merge_dora_exact
from loracle.reference.formats import FORMATS, float_format

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
# Whether mutants are tested, of which one wrong entry is enough to be seen.
BRIEF = os.environ.get("LORACLE_TEST_PROFILE") == "mutation"
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(array):
    array = np.array(array, order="C")
    return array.view(float_format(array.dtype).bits)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.array_equal(bits(actual), bits(expected)), np.argwhere(bits(actual) != bits(expected))[:5]


def is_nearest(value, sign, numerator, denominator):
    """Whether ``value`` is sign * sqrt(numerator / denominator) rounded to nearest, ties to even.

    Decided without a root, in ints alone: by the squares of the two midpoints around the value.
    """
    form = float_format(value.dtype)
    if numerator == 0:
        return bits(value).item() == 0
    if bool(np.signbit(value)) != (sign < 0):
        return False
    pattern, p = bits(np.abs(value)).item(), form.precision

    def number(pattern):
        """The number of that bit pattern in smallest subnormals; of infinity's, the next power of two."""
        exponent, fraction = divmod(pattern, 1 << (p - 1))
        return fraction if exponent == 0 else (fraction + (1 << (p - 1))) << (exponent - 1)

    def beside(midpoint):
        """The sign of the root minus a midpoint, which is given in halves of the smallest subnormal."""
        root = (numerator << (2 * (p - form.min_exponent))) - midpoint * midpoint * denominator
        return (root > 0) - (root < 0)

    limit = 0 if pattern % 2 else 1
    if pattern < form.infinity_bits and beside(number(pattern) + number(pattern + 1)) >= limit:
        return False
    return pattern == 0 or beside(number(pattern) + number(pattern - 1)) > -limit


def whole(array):
    """Return ints and k with ``array == ints / 2^k``."""
    ratios = [float(v).as_integer_ratio() for v in np.asarray(array).ravel()]
    k = max(d.bit_length() - 1 for _, d in ratios)
    ints = np.array([n * 2**k // d for n, d in ratios] + [None], object)[:-1]
    return ints.reshape(np.shape(array)), k


def assert_nearest(merged, W0, A, B, scaling, magnitude):
    (W0, w_bits), (A, a_bits), (B, b_bits), (m, m_bits) = map(whole, (W0, A, B, magnitude))
    s, s_bits = whole(scaling)
    w = W0 * 2 ** (a_bits + b_bits + s_bits) + s.item() * (B @ A) * 2**w_bits
    for i, row in enumerate(w):
        square = int((row * row).sum()) << 2 * m_bits
        for j, v in enumerate(row):
            assert is_nearest(merged[i, j], m[i] * v, (m[i] * v) ** 2, square), (i, j, merged[i, j])


def gaussian(rng, shape, size, dtype=F32):
    return (rng.standard_normal(shape) * size).astype(dtype)


def row(w, m, dtype, update=None, scaling=1.0):
    """Merge the single row ``w + scaling * update`` given in float64."""
    w = np.array([w], float)
    update = np.zeros_like(w) if update is None else np.array([update], float)
    return merge_dora(w, update, np.ones((1, 1)), scaling, np.array([m]), dtype=dtype)[0]


def band_merger(W0, A, B, magnitude, dtype=F64):
    W0, A, B, magnitude = (np.array(tensor, float) for tensor in (W0, A, B, magnitude))
    return dora_block.BandMerger(W0, A, B, 1.0, magnitude, np.empty(W0.shape, dtype))


def row_merger(rows, norm, dtype=F64, magnitude=1.0):
    """Of rows without an update."""
    W0 = np.array(rows, float)
    r1 = np.zeros((1, W0.shape[1])), np.zeros((len(W0), 1))
    return dora_entries.RowMerger(
        W0, *r1, 1.0, np.full(len(W0), magnitude), np.array(norm, float), float_format(dtype)
    )


def exact_places(monkeypatch, merger):
    """Return a list to which the places are added that are not settled in double-double."""
    found, original = [], merger._exact
    monkeypatch.setattr(
        merger, "_exact", lambda row, column: found.append((row, column)) or original(row, column)
    )
    return found


@pytest.mark.parametrize(
    ("block", "depth", "panels"), [(8, 3, 1), (5, 3, 2), (4, 2, 2), (2, 1, 4), (1, 0, 8)]
)
def test_a_bands_error_is_the_one_derived(monkeypatch, block, depth, panels):
    """Norm 4; r is 3, max|A| is 3 or 1/2, ||B'||_1 is 5, and 0 in a row of nothing but underflow."""
    monkeypatch.setattr(dora_block, "_BLOCK_COLUMNS", block)
    W0 = np.array([[2.0, 2, 2, 2, 0, 0, 0, 0]] * 2)
    B = np.array([[1.0, -2, 2], [0, 0, 0]])
    for peak in (3.0, 0.5):
        A = np.zeros((3, 8))
        merger = band_merger(W0, A, B, [1, 1])
        A[0, 0], A[1, 0], A[1, 5] = 2 * peak, peak, peak / 4
        merger._A = A  # cancels in the first column of the first row
        A[0, 0], A[1, 0] = -peak, -peak / 2
        norm, constant, doubt = merger._norms(W0, B)
        assert norm[1] == 4
        u, eta = 2.0**-53, 2.0**-1074
        assert constant.tolist() == [2 * 7 * u * 5 * peak, 6 * eta * (peak + 1)]
        steps = (7 + depth + panels) * u
        assert doubt.tolist() == [steps + constant[0] * 8**0.5 / norm[0], steps]


def test_the_error_of_a_rescaled_row_is_the_one_derived():
    """E = |q~| (2 d + 8 u) + 2 |f| c + 2^-1000"""
    relative, constant = dora_block._error_terms(
        np.array([-3.0, 0]), np.array([2.0**-990, 1]), np.array([2.0**-20, np.inf])
    )
    assert relative.tolist() == [2.0**-19 + 2.0**-50, np.inf]
    assert constant.tolist() == [6 * 2.0**-990 + 2.0**-1000, 2.0**-1000]


def test_a_row_whose_norm_is_known_to_an_eighth_is_settled_in_float64(monkeypatch):
    settled, original = [], dora_entries.RowMerger.entries
    monkeypatch.setattr(
        dora_entries.RowMerger, "entries", lambda own, i, j: settled.append(len(i)) or original(own, i, j)
    )
    assert dora_block._LARGEST_DOUBT == 1 / 8
    W0 = [[3.0, 4.0]]
    merger = band_merger(W0, np.zeros((1, 2)), [[0.0]], [1.1], F16)
    _, _, doubt = merger._norms(np.array(W0), np.zeros((1, 1)))
    for limit, expected in ((doubt[0], 0), (np.nextafter(doubt[0], 0), 2)):
        monkeypatch.setattr(dora_block, "_LARGEST_DOUBT", limit)
        settled.clear()
        assert merger.merge((slice(0, 1), slice(0, 2))) is None
        assert sum(settled) == expected


def test_a_row_without_a_norm_is_reported_at_its_first_column():
    merger = band_merger([[1, 1], [0, 0], [0, 0]], np.zeros((1, 2)), np.zeros((3, 1)), [1, 1, 1])
    assert merger.merge((slice(0, 3), slice(0, 2))) == (1, 0)


@pytest.mark.parametrize("serial", [1, 11, 12, 23, 24])
def test_products_are_as_small_as_they_are_said_to_be(monkeypatch, serial):
    monkeypatch.setattr(dora_block, "_SERIAL_PRODUCT", serial)
    taken, matmul = [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, out: taken.append(len(a)) or matmul(a, b, out=out))
    rng = np.random.default_rng(0)
    W0, scaled, A = (rng.integers(-3, 4, shape).astype(float) for shape in ((5, 3), (5, 2), (2, 3)))
    assert np.array_equal(dora_block._evaluate(W0, scaled, A), W0 + scaled @ A)
    assert max(taken) == max(1, serial // 6)
    assert sum(taken) == 5


@pytest.mark.parametrize(("products", "width"), [(100, 5), (10, 5), (9, 5), (8, 4), (5, 3), (3, 2), (1, 1)])
def test_rows_and_places_are_taken_as_many_at_once_as_is_said(monkeypatch, products, width):
    """Also that each norm is computed once."""
    monkeypatch.setattr(dora_entries, "_PRODUCTS_AT_ONCE", products)
    rng = np.random.default_rng(1)
    W0, A, B = rng.normal(0, 1, (6, 5)), rng.normal(0, 1, (2, 5)), rng.normal(0, 1, (6, 2))
    m, norm = np.ones(6), np.linalg.norm(W0 + B @ A, axis=1)
    merger = dora_entries.RowMerger(W0, A, B, 1.0, m, norm, float_format(BF16))
    chunks, places, norms_of, entries = [], [], merger._norms_of, merger._entries
    monkeypatch.setattr(merger, "_norms_of", lambda rows: chunks.append(len(rows)) or norms_of(rows))
    monkeypatch.setattr(merger, "_entries", lambda i, j: places.append(len(i)) or entries(i, j))
    i, j = (index.ravel() for index in np.indices((6, 5)))
    exact = merge_dora_exact(W0, A, B, 1.0, m, BF16)
    for _ in range(2):
        assert_same_bits(merger.entries(i, j).reshape(6, 5), exact)
    assert merger._width() == width
    together = min(6, math.ceil(products / (2 * width)))
    assert chunks == [together] * (6 // together) + [6 % together] * (6 % together > 0)
    step = min(30, math.ceil(products / 2))
    assert places == 2 * ([step] * (30 // step) + [30 % step] * (30 % step > 0))
    assert merger.entries(i[:0], j[:0]).dtype == BF16


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 100])
def test_the_error_of_a_norm_is_the_one_derived(monkeypatch, columns, width):
    """T = 10 u^2 + 4 u^2 (L + 4)^2 + sum d / th, where each d is 2^-60 or 2^-59, and the norms 4 and 8."""
    monkeypatch.setattr(dora_entries, "_PRODUCTS_AT_ONCE", width)
    merger = row_merger(np.zeros((2, columns)), [4, 8])

    def merged(rows, places):
        return (
            (places == 0) * np.array([4.0, 8.0])[rows],
            np.zeros(len(rows)),
            np.array([1.0, 2.0])[rows] * 2.0**-60,
        )

    monkeypatch.setattr(merger, "_merged", merged)
    high, low, relative = merger._norms_of(np.arange(2))
    assert high.tolist() == [4, 8]
    assert low.tolist() == [0, 0]
    width = min(width, columns)
    steps = math.ceil(math.log2(width)) + math.ceil(columns / width)
    own = (10 + 4 * (steps + 4) ** 2) * 2.0**-106
    assert relative.dtype == F64
    assert relative.tolist() == [own + columns * 2.0**-62 * (1 + columns * 2.0**-50)] * 2


def test_a_norm_is_the_root_of_what_is_not_negligible():
    """The entry 2^-200 of the norm, or less, is seen in the root's low part if at all."""
    ends = np.array([2.0**-200, np.nextafter(2.0**-200, 0), 2.0**-500])
    for size in (1.0, 1024.0, 2.0**-10):
        high, low, relative = row_merger([[size, end * size] for end in ends], [size] * 3)._norms_of(
            np.arange(3)
        )
        assert high.tolist() == [size] * 3
        assert low.tolist() == [size * 2.0**-401, 0, 0]
        assert np.isfinite(relative).all()


def test_a_norm_that_has_cancelled_is_not_trusted():
    _, _, relative = row_merger([[1.0], [1.0]], [2.0**100, 2.0**101])._norms_of(np.arange(2))
    assert np.isfinite(relative).tolist() == [True, False]
    assert relative.dtype == F64


@pytest.mark.parametrize("size", [0.0, 2.0**-700, 2.0**-300, 2.0**600, 2.0**1000])
def test_norms_that_are_given_need_not_be_right(size):
    rows = np.array([[3.0, -4.0, 0.0], [1.0, 1.0, 1.0]]) * size
    merged = row_merger(rows, [1.0, 2.0]).entries(np.array([0, 0, 0, 1]), np.array([0, 1, 2, 0]))
    expected = np.array([0.6, -0.8, 0, 3**-0.5]) if size else np.zeros(4)
    assert merged.tolist() == expected.tolist()


def test_a_quotient_is_trusted_as_far_as_its_error_is_derived(monkeypatch):
    """T is at most 2^-60, and m w / ||w|| at least 2^-900."""
    for relative, expected in ((2.0**-60, []), (np.nextafter(2.0**-60, 1), [(0, 0), (0, 1)])):
        merger = row_merger([[3, 4]], [5], F16)
        merger._prepare(np.array([0]))
        merger._norms[2] = relative
        found = exact_places(monkeypatch, merger)
        merged = merger.entries(np.zeros(2, int), np.arange(2))
        assert merged.tolist() == [F16.type(0.6), F16.type(0.8)]
        assert found == expected
    for m, expected in ((2.0**-900, []), (np.nextafter(2.0**-900, 0), [(0, 0)])):
        merger = row_merger([[1, 0]], [1], F64, m)
        found = exact_places(monkeypatch, merger)
        assert merger.entries(np.zeros(2, int), np.arange(2)).tolist() == [m, 0]
        assert found == expected
    merger = row_merger([[2.0, 2.0, 2.0, 2.0]], [4], F16, 2.0**12 + 2)  # the interval's ends round apart
    found = exact_places(monkeypatch, merger)
    assert float(merger.entries(np.array([0]), np.array([0]))[0]) == 2**11
    assert found == [(0, 0)]


def test_the_error_of_a_quotient_is_the_one_derived():
    """|q| (64 u^2 + 2 T) + 2 |m| d / th"""
    q, relative, m = np.array([-3.0, 1.0]), np.array([2.0**-105, 0]), np.array([0.5, -8.0])
    error = dora_entries._quotient_error(q, relative, m, np.array([0, 2.0**-100]), np.array([1.0, 4.0]))
    assert error.tolist() == [3 * 68 * 2.0**-106, 2.0**-100 + 2.0**-98]
    error = dora_entries._quotient_error(q, relative, m, np.full(2, 2.0**-100), np.full(2, 0.25))
    assert error.tolist() == [204 * 2.0**-106 + 2.0**-98, 2.0**-100 + 2.0**-94]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_an_interval_are_taken_one_step_outwards(sign):
    """The end on the side of the number itself is a tie, which goes to even: that alone decides nothing."""

    def decided(high, low, error):
        low = np.array([sign * low])
        result, sure = dora_entries._round_between(
            np.array([sign * high]), low, np.array([error]), float_format(F64)
        )
        assert result.dtype == F64
        return sure.item()

    tie, error = 2.0**-53, 2.0**-70
    odd = 1 + 2.0**-52
    assert not decided(1.0, tie - error, error)
    assert not decided(odd, tie + error, error)
    assert not decided(odd, -tie + error, error)
    assert decided(1.0, tie - 3 * error, error)
    assert decided(odd, -tie + 3 * error, error)
    assert not decided(1.0, 0.0, 1.0)
    for bad in (
        (np.inf, 0.0, 0.0),
        (1.0, np.inf, 0.0),
        (1.0, 0.0, np.inf),
        (1.0, np.nan, 0.0),
        (1.0, 0.0, np.nan),
    ):
        with np.errstate(invalid="ignore"):
            assert not decided(*bad)


@BY_DTYPE
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_on_the_way_decides_nothing(dtype, bad):
    parts = np.array([[bad, 1, 1, bad, 1.5], [0, bad, 0, bad, bad], [0, 0, bad, bad, bad]])
    with np.errstate(invalid="ignore"):
        _, decided = dora_entries._round_between(*parts, float_format(dtype))
    assert not decided.any()


def test_the_factors_of_an_entry_are_as_many_on_both_sides():
    with pytest.raises(ValueError, match="shorter"):
        exact_merged(0.0, [1.0, 2.0], [1.0], 1.0)
    assert exact_merged(0.5, [1.0, 2.0], [1.0, 4.0], 0.25) == Fraction(11, 4)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_the_definition_rounds_once(dtype):
    """Just above a tie that is rounded down; in float64 it is that tie."""
    p = float_format(dtype).precision
    m = float(2 ** (p + 1) + 2)
    W0, A, B = np.full((1, 4), 1.0), np.array([[2.0**-90, 0, 0, 0]]), np.ones((1, 1))
    merged = merge_dora_exact(W0, A, B, 1.0, np.array([m]), dtype)
    assert merged.dtype == dtype
    assert merged.astype(float).tolist() == [[2**p + 2, 2**p, 2**p, 2**p]]


@BY_DTYPE
@pytest.mark.parametrize("source", [F32, BF16, F16, F64], ids=str)
def test_random_entries_are_the_nearest_to_the_rational_ones(dtype, source):
    rng = np.random.default_rng(3)
    for scaling, shape in ((2.0, (30, 50)), (1 / 3, (12, 60)), (-0.7, (60, 6)))[2 * BRIEF :]:
        W0, A, B = (
            gaussian(rng, shape, 0.02, dtype),
            gaussian(rng, (3, shape[1]), 0.1, source),
            gaussian(rng, (shape[0], 3), 0.1, source),
        )
        m = gaussian(rng, shape[0], 1.0, source)
        assert_nearest(merge_dora(W0, A, B, scaling, m), W0, A, B, scaling, m)


@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from([1, 3]))
def test_any_shape_and_mixture_of_dtypes_is_the_rational_oracle(seed, source, target, threads):
    rng = np.random.default_rng(seed)
    out, columns, r = rng.integers(1, 9, 3)
    size = rng.choice([1.0, 0.02, 30.0])
    W0, A, B = (
        gaussian(rng, (out, columns), size, source),
        gaussian(rng, (r, columns), size),
        gaussian(rng, (out, r), 1, source),
    )
    m = gaussian(rng, out, size, rng.choice([F32, F64]))
    scaling = float(rng.choice([1.0, 1 / 3, -1.7, 0.0]))
    merged = merge_dora(W0, A, B, scaling, m, dtype=target, threads=threads)
    assert_same_bits(merged, merge_dora_exact(W0, A, B, scaling, m, target))
    assert_nearest(merged, W0, A, B, scaling, m)


@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
def test_entries_of_all_exponents_are_the_nearest(seed, dtype):
    rng = np.random.default_rng(seed)
    form = float_format(dtype)
    low, high = form.min_exponent - form.precision - 2, form.max_exponent - 3
    W0 = np.ldexp(rng.uniform(-2, 2, (5, 6)), rng.integers(low, high, (5, 6)))
    A = np.ldexp(rng.uniform(-2, 2, (2, 6)), rng.integers(low // 2, high // 2, (1, 6)))
    B = np.ldexp(rng.uniform(-2, 2, (5, 2)), rng.integers(low // 2, high // 2 - 1, (5, 1)))
    m = np.ldexp(rng.uniform(-2, 2, 5), rng.integers(low, high, 5))
    assert_nearest(merge_dora(W0, A, B, 1.0, m, dtype=dtype), W0, A, B, 1.0, m)


TIE_ROW = [3.0, 1.0, -1.0, 1.0, 2.0]  # of norm 4


@BY_DTYPE
@pytest.mark.parametrize("sign", [1, -1])
def test_exact_ties_go_to_even_and_near_ties_to_where_they_lie(dtype, sign):
    """With m odd, 3 m / 4 has one bit more than the dtype. A tiny change of the row moves it off the
    midpoint.
    """
    p = float_format(dtype).precision
    for m in [2**p // 3 + k for k in range(1, 7)]:
        m += 1 - m % 2
        tie = Fraction(3 * m, 4)
        assert (3 * m).bit_length() == p + 1
        merged = row(TIE_ROW, sign * float(m), dtype)
        assert float(merged[0]) == sign * float(round_fraction(tie, dtype))
        assert_nearest(merged[None], *one_row(TIE_ROW, [0.0] * 5), 1.0, np.array([sign * float(m)]))
        for tiny in (2.0**-60, 2.0**-100, 2.0**-200, 2.0**-600):
            # More in the first column lengthens that entry, more in the last shortens it.
            for column, up in ((0, 1), (4, -1)):
                update = [0.0] * 5
                update[column] = tiny
                moved = float(row(TIE_ROW, sign * float(m), dtype, update)[0])
                assert moved == sign * float(round_fraction(tie + Fraction(up, 8), dtype))


def one_row(w, update):
    return np.array([w]), np.array([update]), np.ones((1, 1))


@BY_DTYPE
def test_a_magnitude_of_the_norm_gives_the_merge_where_the_norm_is_a_whole_number(dtype):
    rng = np.random.default_rng(6)
    rows = np.array([TIE_ROW, [2, 3, 6, 0, 0], [0, 1, 4, 8, 0], [4, 4, 0, 7, 0]], float)
    A, B = rng.integers(-2, 3, (2, 5)).astype(float), rng.integers(-2, 3, (4, 2)).astype(float)
    W0 = (rows - 0.5 * B @ A).astype(dtype)
    merged = merge_dora(W0, A, B, 0.5, np.array([4.0, 7, 9, 9]))
    assert_same_bits(merged + dtype.type(0), merge(W0, A, B, 0.5) + dtype.type(0))


@BY_DTYPE
def test_an_exact_zero_is_plus_zero_whatever_the_signs(dtype):
    for m in (2.0, -2.0, 0.0, -0.0):
        merged = row([0.0, -0.0, 1.0, 5.0, -5.0], m, dtype, [0.0, 0.0, -1.0, 0.0, 0.0])
        assert bits(merged)[:3].tolist() == [0, 0, 0]
        assert bits(merged).any() == (m != 0)
    W0, A, B = np.ones((3, 4), dtype), np.ones((1, 4), F32), np.ones((3, 1), F32)
    merged = merge_dora(W0, A, B, 1.0, np.array([1.0, 0.0, -1.0]))
    assert merged.astype(float).tolist() == [[0.5] * 4, [0.0] * 4, [-0.5] * 4]
    assert not bits(merged[1]).any()


@BY_DTYPE
def test_an_underflow_rounds_to_a_subnormal_and_keeps_the_sign(dtype):
    tiny = float_format(dtype).smallest_subnormal
    # The row's norm is 2 but for 2^-80, so its first entry is tiny times the multiple.
    for multiple, expected in ((0.4, 0), (0.6, 1), (0.9, 1), (2.6, 3)):
        for sign in (1, -1):
            half = 2.0 if dtype != F64 else 1.0
            w = [sign * 2.0**-40 * half * multiple, -1.0, 1.0, 1.0, 1.0]
            m = tiny * 2.0**41 / half
            merged = row(w, m, dtype)
            assert float(merged[0]) == sign * expected * tiny
            assert np.signbit(merged[0]) == (sign < 0)
            assert_nearest(merged[None], *one_row(w, [0.0] * 5), 1.0, np.array([m]))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_result_overflows_half_a_spacing_above_the_largest_number(dtype, sign):
    """The entry is 4 m / 5."""
    form = float_format(dtype)
    limit = (form.largest + 2.0 ** (form.max_exponent - form.precision)) * 1.25
    assert float(row([4.0, 3.0], sign * np.nextafter(limit, 0), dtype)[0]) == sign * form.largest
    message = (
        f"W0: expected merged numbers of magnitude {form.largest:.5g} at most ({dtype}), got an overflow at "
        "[0, 1]; merge to a wider dtype"
    )
    with pytest.raises(NonFiniteError, match=f"^{re.escape(message)}$"):
        row([3.0, 4.0], sign * limit, dtype)


def test_in_float64_nothing_overflows():
    largest = float_format(F64).largest
    for w in ([3.0, 4.0], [2.0**1023, 2.0**1020], [2.0**-1074, 0.0], [1.0, 2.0**-1074]):
        merged = row(w, -largest, F64)
        assert_nearest(merged[None], *one_row(w, [0.0, 0.0]), 1.0, np.array([-largest]))


def test_the_first_overflow_is_named_whatever_the_threads():
    W0, m = np.ones((700, 600), F16), np.ones(700, F32)
    W0[300:, 30] = W0[400:, 500] = 600
    m[300:] = 70000
    for threads in (1, 2, 7):
        with pytest.raises(
            NonFiniteError,
            match=r"^q_proj: .*65504 at most.*overflow at \[300, 30\]; merge to a wider dtype$",
        ):
            merge_dora(W0, np.zeros((1, 600)), np.ones((700, 1)), 1.0, m, threads=threads, name="q_proj")


def test_the_first_overflow_is_the_first_in_the_order_of_rows_whatever_the_panels(monkeypatch):
    W0 = np.full((3, 6), 0.5)
    W0[0, 5] = W0[1, 0] = 60000
    for columns in (2, 4, 8192):
        monkeypatch.setattr(dora_block, "_BLOCK_COLUMNS", columns)
        with pytest.raises(NonFiniteError, match=r"got an overflow at \[0, 5\]; merge"):
            merge_dora(W0, np.zeros((1, 6)), np.zeros((3, 1)), 1.0, np.full(3, 70000.0), dtype=F16)


ZERO_ROWS = {
    "zeros": (np.zeros(6), np.zeros((3, 6)), np.zeros(3)),
    "cancelled": (np.arange(6.0), -np.tile(np.arange(6.0), (3, 1)), np.array([0.25, 0.25, 0.5])),
    # fl(s 3b) a - fl(s b) (3a) leaves rounding errors in float64 where the exact row is zero.
    "cancelled but for float64": (
        np.zeros(6),
        np.outer([1, 3, 0], np.arange(1.0, 7) / 8),
        np.array([3.0, -1, 5]) * 0.7,
    ),
    "tiny": (np.full(6, 2.0**-1074), -np.full((3, 6), 2.0**-1074), np.array([1.0, 0, 0])),
}


@pytest.mark.parametrize("kind", ZERO_ROWS)
@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
def test_a_norm_of_exactly_zero_is_refused_and_its_row_named(kind, dtype):
    w, A, b = ZERO_ROWS[kind]
    scaling = 1 / 3 if kind == "cancelled but for float64" else 1.0
    if kind == "cancelled but for float64":
        b = np.array([3 * 0.625, -0.625, 5.0]) * (1 + 2.0**-20)
    W0, B = np.ones((4, 6)) * 64, np.ones((4, 3))
    W0[2:], B[2:] = w, b
    for threads in (1, 2):
        with pytest.raises(
            NonFiniteError,
            match=r"^k_proj: expected rows of W0 \+ scaling \* B A with a norm above 0, got zeros in row 2; "
            "such a row has no direction for DoRA to keep$",
        ):
            merge_dora(W0, A, B, scaling, np.ones(4), dtype=dtype, threads=threads, name="k_proj")
    if kind == "cancelled but for float64":
        assert np.abs(B[2] * scaling @ A).max() > 0


@BY_DTYPE
def test_rows_that_cancel_but_for_a_trace_are_the_nearest(dtype):
    """W0 + s B A is 2^-45 of its terms or less: float64's roundings are a good part of it, or all."""
    rng = np.random.default_rng(13)
    A, B = rng.uniform(1, 2, (2, 9)), rng.uniform(1, 2, (12, 2))
    for exponent in (20, 45, 60, 200):
        A[1], B[:, 1] = A[0] * (1 + rng.uniform(-1, 1, 9) * 2.0**-exponent), -B[:, 0]
        A[1, 0] = A[0, 0] * (1 + 2.0**-50)
        W0, m = np.zeros((12, 9)), rng.normal(0, 1, 12)
        assert_nearest(merge_dora(W0, A, B, 1 / 3, m, dtype=dtype), W0, A, B, 1 / 3, m)
        W0[:6] = 2.0**-exponent
        assert_nearest(merge_dora(W0, A, B, 1 / 3, m, dtype=dtype), W0, A, B, 1 / 3, m)


@BY_DTYPE
@pytest.mark.parametrize("size", [2.0**-1060, 2.0**-600, 2.0**-300, 2.0**-249, 2.0**449, 2.0**460, 2.0**1000])
def test_rows_whose_squares_leave_the_range_are_the_nearest(dtype, size):
    rng = np.random.default_rng(14)
    W0, A, B = (
        rng.normal(0, 1, (3, 5)) * size,
        rng.normal(0, 1, (2, 5)) * min(size, 2.0**900),
        rng.normal(0, 1, (3, 2)),
    )
    W0[1, 2], A[:, 2] = size * 2.0**-220, 0
    m = rng.normal(0, 1, 3)
    assert_nearest(merge_dora(W0, A, B, 0.7, m, dtype=dtype), W0, A, B, 0.7, m)


@BY_DTYPE
def test_magnitudes_at_the_ends_of_the_range_are_the_nearest(dtype):
    rng = np.random.default_rng(15)
    W0, A, B = rng.normal(0, 1, (6, 5)), rng.normal(0, 1, (2, 5)), rng.normal(0, 1, (6, 2))
    m = np.array([2.0**-1074, -(2.0**-1030), 2.0**-950, 2.0**-890, -(2.0**-149), 2.0**-133])
    for size in (1.0, 2.0**440, 2.0**-240):
        merged = merge_dora(W0 * size, A * size, B, 0.7, m, dtype=dtype)
        assert_nearest(merged, W0 * size, A * size, B, 0.7, m)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 150), (150, 1), (25, 30)], ids=str)
def test_the_result_depends_neither_on_threads_nor_on_bands_nor_on_panels(monkeypatch, dtype, shape):
    rng = np.random.default_rng(7)
    W0, r = gaussian(rng, shape, 0.02, dtype), 5
    A, B, m = (
        gaussian(rng, (r, shape[1]), 0.1),
        gaussian(rng, (shape[0], r), 0.1),
        gaussian(rng, shape[0], 1.0),
    )
    expected = merge_dora(W0, A, B, 0.3, m, threads=1)
    sample = rng.integers(0, shape[0], 3)
    assert_nearest(expected[sample], W0[sample], A, B[sample], 0.3, m[sample])
    for band, columns, panel, serial, products in ((90, 16, 1 << 20, 300, 100), (40, 8192, 60, 1, 20)):
        monkeypatch.setattr(dora_merge, "_BAND_ENTRIES", band)
        monkeypatch.setattr(dora_block, "_BLOCK_COLUMNS", columns)
        monkeypatch.setattr(dora_block, "_PANEL_ENTRIES", panel)
        monkeypatch.setattr(dora_block, "_SERIAL_PRODUCT", serial)
        monkeypatch.setattr(dora_entries, "_PRODUCTS_AT_ONCE", products)
        for threads in (1, 3):
            assert_same_bits(merge_dora(W0, A, B, 0.3, m, threads=threads), expected)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 40])
@BY_DTYPE
def test_any_rank_even_above_the_size_of_the_matrix(r, dtype):
    rng = np.random.default_rng(8)
    W0, A, B, m = (
        gaussian(rng, (6, 5), 1.0, dtype),
        gaussian(rng, (r, 5), 1.0),
        gaussian(rng, (6, r), 1.0),
        gaussian(rng, 6, 1.0),
    )
    assert_nearest(merge_dora(W0, A, B, 0.1, m), W0, A, B, 0.1, m)


@BY_DTYPE
def test_strides_read_only_and_memory_mapped_inputs(tmp_path, dtype):
    rng = np.random.default_rng(9)
    W0, A, B, m = (
        gaussian(rng, (12, 10), 1.0, dtype),
        gaussian(rng, (4, 10), 1.0),
        gaussian(rng, (12, 4), 1.0),
        gaussian(rng, 12, 1.0),
    )
    expected = merge_dora(W0, A, B, 0.5, m)
    spread = np.zeros((24, 30), dtype)
    spread[::2, ::3] = W0
    twice = np.repeat(m, 2)
    assert_same_bits(
        merge_dora(spread[::2, ::3], np.asfortranarray(A), B[::-1][::-1], 0.5, twice[::2]), expected
    )
    stored = np.ascontiguousarray(W0.T)
    assert_same_bits(merge_dora(stored.T, A, B, 0.5, m), expected)
    W0.tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", dtype, "r", shape=W0.shape)
    merged = merge_dora(mapped, A, B, 0.5, m)
    assert type(merged) is np.ndarray
    assert_same_bits(merged, expected)
    for tensor in (W0, A, B, m):
        tensor.setflags(write=False)
    before = [tensor.tobytes() for tensor in (W0, A, B, m)]
    assert_same_bits(merge_dora(W0, A, B, 0.5, m), expected)
    assert [tensor.tobytes() for tensor in (W0, A, B, m)] == before
    for out in (np.full((12, 10), 7, dtype), spread[::2, ::3], np.full((10, 12), 7, dtype).T):
        assert merge_dora(W0, A, B, 0.5, m, out=out) is out
        assert_same_bits(np.ascontiguousarray(out), expected)
    assert_same_bits(merge_dora(W0.tolist() if dtype == F64 else W0, A, B, 0.5, m), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_a_matrix_without_entries_is_returned_as_one(shape):
    A, B = np.ones((2, shape[1]), F32), np.ones((shape[0], 2), F32)
    merged = merge_dora(np.ones(shape, F32), A, B, 1.0, np.ones(shape[0], F32))
    assert merged.shape == shape
    assert merged.dtype == F32


W, LORA_A, LORA_B, MAGNITUDE = (
    np.ones((3, 4), F32),
    np.ones((2, 4), F32),
    np.ones((3, 2), F32),
    np.ones(3, F32),
)


def with_value(array, value):
    array = array.copy()
    array[-1, ...] = value
    return array


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ShapeError, r"^v_proj: expected a matrix, got shape \(12,\)", {"W0": W.ravel()}),
        (ShapeError, r"^lora_A of v_proj: expected \(r, 4\).*got \(2, 3\)", {"A": LORA_A[:, 1:]}),
        (ShapeError, r"^lora_B of v_proj: expected \(3, 2\).*got \(2, 3\)", {"B": LORA_B.T}),
        (DTypeError, r"^v_proj: expected one of float16.*got dtype\('int32'\)", {"W0": W.astype("i4")}),
        (NonFiniteError, r"^v_proj: .*got nan at \[2, 0\]", {"W0": with_value(W, np.nan)}),
        (NonFiniteError, r"^lora_A of v_proj: .*got inf at \[1, 0\]", {"A": with_value(LORA_A, np.inf)}),
        (NonFiniteError, r"^lora_B of v_proj: .*-inf at \[2, 0\]", {"B": with_value(LORA_B, -np.inf)}),
        (NonFiniteError, r"^scaling of v_proj: .*got nan", {"scaling": float("nan")}),
        (
            ShapeError,
            r"^magnitude of v_proj: expected \(3,\) to fit a weight \(3, 4\), got \(1, 3\); flatten it$",
            {"magnitude": MAGNITUDE[None]},
        ),
        (
            DTypeError,
            r"^magnitude of v_proj: expected one of .*got dtype\('int64'\)",
            {"magnitude": [1, 2, 3]},
        ),
        (
            NonFiniteError,
            r"^magnitude of v_proj: expected finite numbers, got nan at \[1\]; fetch it again$",
            {"magnitude": np.array([1.0, np.nan, np.inf], BF16)},
        ),
        (
            NonFiniteError,
            r"^magnitude of v_proj: .*got -inf at \[2\]",
            {"magnitude": with_value(MAGNITUDE, -np.inf)},
        ),
        (ConfigError, "^threads: expected at least 1, got 0", {"threads": 0}),
        (DTypeError, "^dtype of the merged v_proj: expected one of float16", {"dtype": "i4"}),
    ],
)
def test_a_wrong_input_is_named_and_nothing_is_written(error, message, changed):
    out = np.full((3, 4), 7, F32)
    given = {"W0": W, "A": LORA_A, "B": LORA_B, "scaling": 1.0, "magnitude": MAGNITUDE} | changed
    with pytest.raises(error, match=message) as caught:
        merge_dora(**given, out=out, name="v_proj")
    assert "\n" not in str(caught.value)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (DTypeError, "^out of W0: expected float32, got float64", {"out": np.ones((3, 4))}),
        (
            DTypeError,
            "^out of W0: expected float16, got float32",
            {"out": np.ones((3, 4), F32), "dtype": F16},
        ),
        (ShapeError, r"^out of W0: expected shape \(3, 4\), got \(4, 3\)", {"out": np.ones((4, 3), F32)}),
        (ConfigError, "^out of W0: .*read-only", {"out": np.broadcast_to(np.float32(1), (3, 4))}),
        (ConfigError, "^out of W0: expected memory of its own, got an input's", {"out": W}),
    ],
)
def test_wrong_options_are_named(error, message, options):
    with pytest.raises(error, match=message):
        merge_dora(W, LORA_A, LORA_B, 1.0, MAGNITUDE, **options)
    assert (W == 1).all()


def test_an_out_that_overlaps_the_magnitude_is_refused():
    out = np.ones((3, 4), F32)
    with pytest.raises(
        ConfigError, match=r"^out of W0: expected memory of its own, got the magnitude's; pass a new array$"
    ):
        merge_dora(W, LORA_A, LORA_B, 1.0, out[:, 0], out=out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("shape", "r", "rows"),
    [((9, 5), 1, 4), ((9, 5), 3, 4), ((9, 5), 10, 3), ((9, 5), 31, 1), ((9, 30), 1, 1), ((2, 1), 9, 3)],
)
def test_a_band_is_as_many_rows_as_is_said(monkeypatch, shape, r, rows):
    """Of 24 entries at most, and of 30 of B, but a row at least."""
    monkeypatch.setattr(dora_merge, "_BAND_ENTRIES", 24)
    monkeypatch.setattr(dora_merge, "_ROWS_OF_B_ENTRIES", 30)
    made, tiles = [], dora_merge.tiles
    monkeypatch.setattr(dora_merge, "tiles", lambda *given: made.append(given) or tiles(*given))
    merge_dora(np.ones(shape), np.zeros((r, shape[1])), np.zeros((shape[0], r)), 1.0, np.ones(shape[0]))
    ((weight, entries, columns),) = made
    assert (weight, entries // columns, columns) == (shape, rows, shape[1])


@pytest.mark.parametrize(
    ("shape", "r", "dtype", "threads"),
    [
        ((300, 300), 2, F64, 8),
        ((1_000_000, 1), 1, F32, 8),
        ((3000, 4000), 2, F32, 8),
        ((1, 9_000_000), 1, F32, 2),
        ((16, 1000), 16384, F32, 8),
    ][: 1 if BRIEF else None],
    ids=str,
)
def test_extra_memory_stays_below_64_mib(shape, r, dtype, threads):
    W0, out = np.ones(shape, dtype), np.empty(shape, dtype)
    A, B, m = np.zeros((r, shape[1]), F16), np.zeros((shape[0], r), F16), np.ones(shape[0], F16)
    A[0, 0] = B[0, 0] = 1
    tracemalloc.start()
    try:
        merge_dora(W0, A, B, 1.0, m, out=out, threads=threads)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert abs(float(out[0, 0]) - 2 / (3 + shape[1]) ** 0.5) < 1e-3
    assert peak < 64 * 2**20


def test_threads_are_gone_afterwards():
    before = threading.active_count()
    merge_dora(
        np.ones((800, 300), F32),
        np.ones((1, 300), F32),
        np.ones((800, 1), F32),
        1.0,
        np.ones(800, F32),
        threads=7,
    )
    assert threading.active_count() == before


def test_almost_everything_is_settled_in_float64(monkeypatch):
    settled, original = [], dora_entries.RowMerger.entries
    monkeypatch.setattr(
        dora_entries.RowMerger, "entries", lambda own, i, j: settled.append(len(i)) or original(own, i, j)
    )
    rng = np.random.default_rng(11)
    W0, A, B = gaussian(rng, (512, 512), 0.02), gaussian(rng, (8, 512), 0.01), gaussian(rng, (512, 8), 0.01)
    m = gaussian(rng, 512, 1.0)
    merge_dora(W0, A, B, 2.0, m)
    assert sum(settled) <= 10
    merge_dora(W0.astype(BF16), A, B, 2.0, m)
    assert sum(settled) <= 10


def test_almost_everything_of_float64_is_settled_in_double_double(monkeypatch):
    monkeypatch.setattr(dora_entries, "round_root", None)
    monkeypatch.setattr(dora_entries, "exact_square", None)
    rng = np.random.default_rng(12)
    W0, A, B, m = (
        gaussian(rng, (20, 60), 0.02, F64),
        gaussian(rng, (8, 60), 0.01, F16),
        gaussian(rng, (20, 8), 0.01),
        gaussian(rng, 20, 1.0),
    )
    W0[:, 3] *= 2.0**-210  # so small beside the others that their squares are left out of the norm
    A[:, 3] = 0
    m[7] = W0[3, 5] = 0
    B[3] = 0
    merged = merge_dora(W0, A, B, 2.0, m)
    assert not bits(merged[7]).any()
    assert not bits(merged[3, 5]).any()
    monkeypatch.undo()
    assert_same_bits(merged, merge_dora_exact(W0, A, B, 2.0, m, F64))


@given(st.integers(0, 2**32 - 1))
def test_the_double_double_error_bound_holds_and_is_not_far_above_the_error(seed):
    """What RowMerger computes before it rounds, against the rational norm."""
    rng = np.random.default_rng(seed)
    columns, r = int(rng.integers(1, 40)), int(rng.integers(1, 5))
    W0, A, B = rng.normal(0, 1, (3, columns)), rng.normal(0, 1, (r, columns)), rng.normal(0, 1, (3, r))
    cancels = bool(rng.integers(0, 2))
    if cancels:  # to 2^-40 of the products, so that what double-double loses of those is most of the error
        A = np.concatenate([A, A * (1 + rng.uniform(-1, 1, A.shape) * 2.0**-40)])
        W0, B = np.zeros_like(W0), np.concatenate([B, -B], axis=1)
    norm = np.linalg.norm(W0 + B @ A / 3, axis=1)
    merger = dora_entries.RowMerger(W0, A, B, 1 / 3, np.ones(3), norm, float_format(F64))
    high, low, relative = merger._norms_of(np.arange(3))
    for i in range(3):
        square = exact_square(W0[i], A, B[i], 1 / 3)
        computed = Fraction(high[i]) + Fraction(low[i])
        error = abs(computed * computed - square) / (2 * square)
        assert error <= Fraction(relative[i])
        assert relative[i] < (2.0**-50 if cancels else 2.0**-90)


def test_the_square_of_a_row_is_exact_in_panels_of_any_width(monkeypatch):
    rng = np.random.default_rng(16)
    w, A, b = (
        rng.normal(0, 1, 9) * 2.0**40,
        rng.normal(0, 1, (2, 9)) * 2.0 ** rng.integers(-900, 0, 9),
        rng.normal(0, 1, 2),
    )
    exact = [
        Fraction(v) + Fraction(0.3) * sum(Fraction(x) * Fraction(y) for x, y in zip(b, a, strict=True))
        for v, a in zip(w, A.T, strict=True)
    ]
    for products in (1, 3, 8, 1 << 15):
        monkeypatch.setattr(dora_entries, "_PRODUCTS_AT_ONCE", products)
        assert exact_square(w, A, b, 0.3) == sum(v * v for v in exact)
    assert exact_square(w[:0], A[:, :0], b, 0.3) == 0


@given(st.fractions(), st.integers(-300, 300), st.sampled_from(DTYPES), st.booleans())
def test_the_root_of_a_rational_is_the_nearest_number(root, exponent, dtype, negative):
    for square in (root * root * Fraction(4) ** exponent, abs(root) * Fraction(2) ** exponent):
        value = round_root(square, negative, dtype)
        assert value.dtype == dtype
        assert is_nearest(value, -1 if negative else 1, square.numerator, square.denominator)


@BY_DTYPE
def test_roots_on_and_beside_midpoints(dtype):
    form = float_format(dtype)
    p = form.precision
    for whole, even in ((2**p + 1, 2**p), (2**p + 3, 2**p + 4), (2 ** (p + 1) - 1, 2 ** (p + 1))):
        tie = Fraction(whole) ** 2
        assert float(round_root(tie, False, dtype)) == even
        for off in (Fraction(1, 2**200), Fraction(-1, 2**200)):
            value = float(round_root(tie + off, True, dtype))
            assert value == -(whole + 1 if off > 0 else whole - 1)
    half = Fraction(form.smallest_subnormal) / 2
    assert float(round_root(half**2, False, dtype)) == 0
    assert float(round_root(half**2 * Fraction(1001, 1000), False, dtype)) == form.smallest_subnormal
    assert np.signbit(round_root(half**2 / 4, True, dtype))
    assert int(bits(round_root(Fraction(0), True, dtype))) == 0
    assert np.isinf(float(round_root((Fraction(form.largest) * 2) ** 2, False, dtype)))


def test_is_nearest_sees_a_neighbour():
    one = np.array(1.0, F16)[()]
    assert is_nearest(one, 1, 7, 7)
    for wrong in (
        np.nextafter(one, F16.type(2)),
        np.nextafter(one, F16.type(0)),
        -one,
        F16.type(0),
        F16.type(np.inf),
    ):
        assert not is_nearest(wrong, 1, 7, 7)
    assert not is_nearest(F16.type(-0.0), 1, 0, 7)
    tie = (2**11 + 1) ** 2
    assert is_nearest(F16.type(2**11), 1, tie, 1)
    assert not is_nearest(F16.type(2**11 + 2), 1, tie, 1)
    assert is_nearest(F16.type(-(2**11) - 2), -1, tie * 10**9 + 1, 10**9)
    assert not is_nearest(F16.type(2**11), 1, tie * 10**9 + 1, 10**9)
    assert is_nearest(F16.type(np.inf), 1, 65520**2, 1)
    assert not is_nearest(F16.type(np.inf), 1, 65520**2 - 1, 1)
    assert is_nearest(F16.type(2.0**-24), 1, 9, 4**26)
    assert not is_nearest(F16.type(0), 1, 9, 4**26)
