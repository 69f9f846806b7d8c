from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from loracle.reference import DTypeError, Precision
from loracle.reference.formats import FORMATS, float_format
from loracle.reference.magnitudes import Magnitude, magnitude_of, underflow_unit

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
PLAIN, WIDE = Precision(F32), Precision(BF16, accumulator=F32)
UNIT = 0.5  # far larger than any real one, so that every underflow shows
COUNTS = ("terms", "stores", "products", "paths")


def magnitude(size, lost=0.0, precision=PLAIN, counts=(0, 0, 0, 1.0)):
    size = np.asarray(size, float)
    lost = np.broadcast_to(np.asarray(lost, float), size.shape)
    return Magnitude(size, lost, UNIT, precision, *counts)


def is_just(result, size, lost, counts):
    """Check every field of a result but the two that operations pass on."""
    assert result.size.tolist() == size
    assert result.lost.tolist() == lost
    assert tuple(getattr(result, name) for name in COUNTS) == counts
    assert result.unit == UNIT


def test_an_input_alone_has_gone_through_no_rounding():
    assert tuple(getattr(Magnitude(np.ones(2), np.ones(2), UNIT, PLAIN), name) for name in COUNTS) == (
        0,
        0,
        0,
        1.0,
    )


@pytest.mark.parametrize(("precision", "stored"), [(PLAIN, 0), (WIDE, 1)], ids=["plain", "wide"])
def test_a_matrix_product(precision, stored):
    a = magnitude([[1, 2, 3], [4, 5, 6]], 0.25, precision, (2, 3, 5, 7.0))
    b = magnitude([[1, 0], [2, 1], [0, 4]], 2.0, precision, (11, 13, 17, 19.0))
    # lost: 0.25 times the sums of b's columns with their loss, (3 + 6, 5 + 6), and 2 times the sums of a's
    # rows, 6 and 15, and an underflow of 0.5 in each of 3 products and 3 sums.
    lost = [[0.25 * 9 + 2 * 6 + 3, 0.25 * 11 + 2 * 6 + 3], [0.25 * 9 + 2 * 15 + 3, 0.25 * 11 + 2 * 15 + 3]]
    counts = (2 + 11 + 3, 3 + 13 + stored, 5 + 17 + 1, 7.0 * 19.0 * 3)
    is_just(a @ b, [[5, 14], [14, 29]], lost, counts)
    assert (a @ b).precision is precision


def test_a_batch_of_matrix_products_adds_up_over_the_last_axis():
    a, b = magnitude(np.ones((2, 3, 4))), magnitude(np.ones((2, 4, 5)))
    assert (a @ b).shape == (2, 3, 5)
    assert (a @ b).terms == 4


def test_a_matrix_product_over_nothing_is_one_path_still():
    empty = magnitude(np.ones((2, 0))) @ magnitude(np.ones((0, 3)))
    is_just(empty, [[0.0] * 3] * 2, [[0.0] * 3] * 2, (0, 0, 1, 1.0))
    assert (magnitude([[1.0]], 0, PLAIN, (0, 0, 0, 2.0)) @ magnitude([[1.0]])).paths == 2.0


@pytest.mark.parametrize("precision", [PLAIN, WIDE], ids=["plain", "wide"])
def test_an_elementwise_product(precision):
    a = magnitude([2, 3], [0.25, 0.5], precision, (2, 3, 5, 7.0))
    b = magnitude([8, 4], [1, 2], precision, (11, 13, 17, 19.0))
    lost = [0.25 * 9 + 2 * 1 + UNIT, 0.5 * 6 + 3 * 2 + UNIT]
    is_just(a * b, [16, 12], lost, (2 + 11, 3 + 13 + 1, 5 + 17, 7.0 * 19.0))
    assert (a * b).precision is precision


@pytest.mark.parametrize("precision", [PLAIN, WIDE], ids=["plain", "wide"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_has_the_longer_of_two_paths(precision, swapped):
    a = magnitude([2, 3], [0.25, 0.5], precision, (2, 30, 5, 7.0))
    b = magnitude([8, 4], [1, 2], precision, (11, 13, 17, 19.0))
    result = b + a if swapped else a + b
    is_just(result, [10, 7], [1.25 + UNIT, 2.5 + UNIT], (11, 31, 17, 26.0))
    assert result.precision is precision


def test_selecting_and_moving_entries_moves_what_they_have_lost():
    counts = (2, 3, 5, 7.0)
    a = magnitude([[1, 2, 3], [4, 5, 6]], [[10, 20, 30], [40, 50, 60]], WIDE, counts)
    assert a.shape == (2, 3)
    is_just(a[1], [4, 5, 6], [40, 50, 60], counts)
    is_just(a[..., :2], [[1, 2], [4, 5]], [[10, 20], [40, 50]], counts)
    is_just(a.T, [[1, 4], [2, 5], [3, 6]], [[10, 40], [20, 50], [30, 60]], counts)
    is_just(a.map(lambda m: m[::-1]), [[4, 5, 6], [1, 2, 3]], [[40, 50, 60], [10, 20, 30]], counts)
    assert a[0].precision is a.T.precision is a.map(np.copy).precision is WIDE


def test_stacked_parts_have_the_largest_of_their_counts():
    parts = [
        magnitude([1, 2], [10, 20], WIDE, (2, 3, 5, 7.0)),
        magnitude([3, 4], [30, 40], WIDE, (11, 30, 5, 7.0)),
        magnitude([5, 6], [50, 60], WIDE, (1, 3, 17, 70.0)),
    ]
    stacked = Magnitude.stack(parts)
    is_just(stacked, [[1, 2], [3, 4], [5, 6]], [[10, 20], [30, 40], [50, 60]], (11, 30, 17, 70.0))
    assert stacked.precision is WIDE
    alone = magnitude([1, 2], [10, 20], WIDE, (2, 3, 5, 7.0))
    is_just(Magnitude.stack([alone]), [[1, 2]], [[10, 20]], (2, 3, 5, 7.0))


@pytest.mark.parametrize(("precision", "stored"), [(PLAIN, 0), (WIDE, 1)], ids=["plain", "wide"])
def test_a_gathered_sum(precision, stored):
    a = magnitude([1, 2, 4], [10, 20, 40], precision, (2, 3, 5, 7.0))

    def ends(values):
        return np.array([values[0] + values[2], values[1]])

    # Each number that is gathered may have underflowed.
    is_just(a.add_up(ends, 2), [5, 2], [50 + 2 * UNIT, 20 + UNIT], (4, 3 + stored, 5, 14.0))
    assert a.add_up(ends, 0).paths == 7.0
    assert a.add_up(ends, 1).paths == 7.0
    assert a.add_up(ends, 2).precision is precision


def test_a_sum_over_an_axis_adds_up_as_many_terms_as_the_axis_is_long():
    a = magnitude([[1, 2, 3], [4, 5, 6]], 1.0, WIDE, (2, 3, 5, 7.0))
    is_just(a.sum(axis=0), [5, 7, 9], [3.0] * 3, (2 + 2, 4, 5, 14.0))
    is_just(a.sum(axis=1), [6, 15], [4.5] * 2, (2 + 3, 4, 5, 21.0))


@pytest.mark.parametrize("failure", [None, 1e-6])
@pytest.mark.parametrize("slack", [0, 4])
def test_a_bound_is_the_growth_of_the_size_and_of_what_is_lost(slack, failure):
    precision = Precision(F32, multiplicands="tf32", failure=failure)
    a = magnitude([[1.0, 1e9], [0.0, 7.0]], [[2.0, 0.0], [3.0, 1e9]], precision, (20, 3, 2, 50.0))
    g = Fraction(precision.growth(20, 3 + slack, 2, 50.0 * 4))
    bound = a.bound(slack)
    assert bound.dtype == F64
    for size, lost, computed in zip(a.size.ravel(), a.lost.ravel(), bound.ravel(), strict=True):
        exact = g * Fraction(size) + (1 + g) * Fraction(lost)
        assert exact < Fraction(computed) < exact * (1 + Fraction(1, 2**29))


def test_a_bound_on_one_number_has_the_paths_that_lead_to_it_and_no_more():
    precision = Precision(F32, failure=1e-6)
    growth = precision.growth(20, 0, 0, 50.0)
    assert magnitude([1.0], 0.0, precision, (20, 0, 0, 50.0)).bound(0)[0] == pytest.approx(growth, rel=1e-8)
    assert precision.growth(20, 0, 0, 100.0) > growth * 1.01


def test_a_bound_on_nothing_is_empty_and_no_error():
    assert magnitude(np.ones((0, 3)), 0.0, Precision(F32, failure=0.5)).bound(0).shape == (0, 3)


@pytest.mark.parametrize(
    ("given", "dtype", "rounded"),
    [
        (F32, F32, 0),
        (F16, F32, 0),
        (BF16, F32, 0),
        (F32, F64, 0),
        (F64, F32, 1),
        (F32, BF16, 1),
        (F16, BF16, 1),  # fits in range, not in digits
        (BF16, F16, 1),  # fits in digits, not in range
    ],
    ids=str,
)
def test_an_input_is_rounded_where_it_need_not_be_a_number_of_the_dtype(given, dtype, rounded):
    precision = Precision(dtype)
    result = magnitude_of(np.array([[-1.5, 2.0, -0.0]], given), precision, UNIT)
    is_just(result, [[1.5, 2.0, 0.0]], [[UNIT] * 3], (0, rounded, 0, 1.0))
    assert result.size.dtype == result.lost.dtype == F64
    assert result.precision is precision


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(DTypeError, match=r"^tensor: expected one of .*, got dtype\('int64'\); convert it$"):
        magnitude_of(np.ones(2, np.int64), PLAIN, UNIT)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_an_underflow_costs_a_subnormal_in_float16_and_a_normal_number_elsewhere(form):
    one = 2.0**-24 if form.dtype == F16 else {8: 2.0**-126, 24: 2.0**-126, 53: 2.0**-1022}[form.precision]
    assert underflow_unit(form) == one
    assert underflow_unit(form, 0.0) == one
    assert underflow_unit(form, 1.0) == 2 * one


def test_an_underflow_before_or_after_the_scaling_weighs_more():
    form = float_format(F32)
    assert underflow_unit(form, -0.25) == 5 * 2.0**-126
    assert underflow_unit(form, -4.0) == 5 * 2.0**-126
    assert underflow_unit(form, 1.0, 0.125, 0.0, -2.0) == 9 * 2.0**-126
