from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import LowRank
from loracle.reference.factors import Factors, norm_bound, row_ranges

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))


def adapter(r, outputs, scaling, rows=None, dtype=F32):
    A = np.arange(1, r * 3 + 1).reshape(r, 3).astype(dtype)
    B = np.arange(1, outputs * r + 1).reshape(outputs, r).astype(dtype)
    return LowRank(A, B, scaling, rows=rows)


def test_rows_are_cut_where_an_adapter_begins_or_ends():
    everywhere, middle = adapter(2, 6, 0.5), adapter(1, 3, -2.0, rows=slice(2, 5))
    ranges = row_ranges(6, [everywhere, middle])
    assert [(own.start, own.stop, own.r, len(own.groups)) for own in ranges] == [
        (0, 2, 2, 1),
        (2, 5, 3, 2),
        (5, 6, 2, 1),
    ]
    both = ranges[1]
    assert both.groups[0][1].tolist() == everywhere.B[2:5].tolist()
    assert both.groups[1][1].tolist() == middle.B.tolist()
    assert both.scalings.tolist() == [0.5, 0.5, -2.0]
    assert both.spans == [(slice(0, 2), 0.5), (slice(2, 3), -2.0)]
    assert ranges[2].groups[0][1].tolist() == everywhere.B[5:].tolist()


def test_neighbouring_rows_and_rows_without_an_adapter():
    ranges = row_ranges(5, [adapter(1, 2, 1.0, rows=slice(0, 2)), adapter(1, 2, 3.0, rows=slice(2, 4))])
    assert [(own.start, own.stop, [s for *_, s in own.groups]) for own in ranges] == [
        (0, 2, [1.0]),
        (2, 4, [3.0]),
        (4, 5, []),
    ]
    assert ranges[2].is_zero
    assert row_ranges(0, []) == []
    assert [(own.start, own.stop) for own in row_ranges(3, [])] == [(0, 3)]
    assert [(own.start, own.stop) for own in row_ranges(3, [adapter(1, 0, 1.0, rows=slice(2, 2))])] == [
        (0, 2),
        (2, 3),
    ]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_panels_and_left_factors_are_stacked_in_float64(dtype):
    first, second = adapter(2, 4, 0.5, dtype=dtype), adapter(1, 4, 2.0, dtype=dtype)
    (own,) = row_ranges(4, [first, second])
    panel, left = own.panel(slice(1, 3)), own.left(slice(1, 3))
    assert panel.dtype == left.dtype == F64
    assert panel.flags.c_contiguous
    assert left.flags.c_contiguous
    assert panel.tolist() == [[2, 3], [5, 6], [2, 3]]
    assert left.tolist() == [[3, 4, 2], [5, 6, 3]]
    chosen = np.array([3, 0])
    assert own.left(chosen).tolist() == [[7, 8, 4], [1, 2, 1]]
    assert own.panel(np.array([2, 0])).tolist() == [[3, 1], [6, 4], [3, 1]]


def test_the_transposed_update_has_the_factors_exchanged():
    own = Factors(2, 4, ((np.ones((2, 3)), np.full((2, 2), 5.0), 0.5),))
    turned = own.T
    assert (turned.start, turned.stop, turned.r) == (2, 4, 2)
    (A, B, scaling) = turned.groups[0]
    assert (A.shape, B.shape, scaling) == ((2, 2), (3, 2), 0.5)
    assert (A == 5).all()


@pytest.mark.parametrize("zero", ["A", "B", "scaling"])
def test_an_update_is_zero_if_a_factor_of_every_group_is(zero):
    ones = {"A": np.ones((1, 3), F32), "B": np.ones((2, 1), F32), "scaling": 2.0}
    nothing = {**ones, zero: ones[zero] * 0}
    some = (ones["A"], ones["B"], ones["scaling"])
    none = (nothing["A"], nothing["B"], nothing["scaling"])
    assert Factors(0, 2, (none,)).is_zero
    assert Factors(0, 2, (none, none)).is_zero
    assert not Factors(0, 2, (some,)).is_zero
    assert not Factors(0, 2, (none, some)).is_zero
    assert Factors(0, 2, ()).is_zero


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([0, 200, 520, 600]), st.booleans())
def test_norms_are_never_too_small_and_hardly_too_large(seed, count, spread, rows):
    rng = np.random.default_rng(seed)
    matrix = np.ldexp(rng.uniform(-1, 1, (3, count)), rng.integers(-spread, spread // 2 + 1, (3, count)))
    bound = norm_bound(matrix, axis=1) if rows else norm_bound(matrix.T, axis=0)
    assert bound.shape == (3,)
    for n in range(3):
        square = sum(Fraction(v) ** 2 for v in matrix[n])
        assert Fraction(bound[n]) ** 2 >= square
        beyond = max(Fraction(bound[n]) - Fraction(count) / 2**509, Fraction(0))
        assert beyond**2 <= square * (1 + Fraction(4 * (count + 4), 2**53))


def test_norms_that_overflow_are_infinite_and_those_that_vanish_are_not_zero():
    assert norm_bound(np.array([[1e200, 1.0]]), axis=1).tolist() == [np.inf]
    assert norm_bound(np.array([[2.0**-600] * 4]), axis=1)[0] == 2.0**-509
    assert norm_bound(np.array([[3.0, 4.0]]), axis=1)[0] == 5 * (1 + 6 * 2.0**-53)
