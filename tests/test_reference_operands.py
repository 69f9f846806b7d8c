from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from loracle.reference import DTypeError
from loracle.reference.balls import Ball
from loracle.reference.formats import FORMATS
from loracle.reference.magnitudes import magnitude_of, underflow_unit
from loracle.reference.operands import (
    add_up,
    as_rows,
    check_dtypes,
    masked,
    place_rows,
    product,
    restructure,
    scale,
    stack,
    total,
)
from loracle.reference.precision import Precision

DTYPES = [form.dtype for form in FORMATS]
ALL = [*DTYPES, np.dtype(object)]
BY_DTYPE = pytest.mark.parametrize("dtype", ALL, ids=str)
F32 = Precision(np.float32)
UNIT = 1e-9


def magnitude(values, precision=F32):
    return magnitude_of(np.asarray(values, float), precision, UNIT)


def table(dtype):
    return np.array([[1, -2, 3], [0, 4, -1]], dtype)


def same(left, right):
    """Equal magnitudes in every respect."""
    assert left.size.tolist() == right.size.tolist()
    assert left.lost.tolist() == right.lost.tolist()
    counts = ("unit", "precision", "terms", "stores", "products", "paths")
    assert [getattr(left, name) for name in counts] == [getattr(right, name) for name in counts]


@BY_DTYPE
def test_a_product_keeps_the_dtype(dtype):
    result = product(table(dtype), table(dtype).T)
    assert result.dtype == dtype
    assert result.tolist() == [[14, -11], [-11, 17]]


def test_a_product_of_stacks_and_of_fractions():
    stack = np.stack([table(float), 2 * table(float)])
    assert product(stack, stack.swapaxes(1, 2))[1].tolist() == [[56, -44], [-44, 68]]
    third = np.array([[Fraction(1, 3), 2]], dtype=object)
    assert product(third, third.T).tolist() == [[Fraction(37, 9)]]


def test_a_product_of_magnitudes_is_theirs():
    m = magnitude(table(float))
    same(product(m, m.T), m @ m.T)
    assert product(m, m.T).terms == 3


@BY_DTYPE
def test_scaling_rounds_the_factor_to_the_dtype(dtype):
    result = scale(table(dtype), 1 / 3)
    assert result.dtype == dtype
    factor = Fraction(1 / 3) if dtype.kind == "O" else dtype.type(1 / 3)
    assert result.tolist() == (table(dtype) * factor).tolist()
    assert result[0, 0] == factor


def test_among_fractions_the_factor_is_the_float64_number():
    assert scale(np.array([3], dtype=object), 0.1)[0] == 3 * Fraction(0.1)
    assert scale(np.array([3], dtype=object), 0.1)[0] != Fraction(3, 10)


def test_scaling_a_magnitude_counts_the_factors_own_rounding():
    m = magnitude(table(float).astype(np.float32))
    scaled = scale(m, -2.0)
    assert scaled.size.tolist() == (2 * m.size).tolist()
    assert scaled.stores == m.stores + 2
    wide = magnitude(table(float), Precision(np.float64))
    assert scale(wide, -2.0).stores == 1
    # The factor, too, may be lost to underflow.
    assert np.all(scaled.lost >= 2 * UNIT + m.size * UNIT)


def test_rearranging_and_adding_up():
    values = table(float)
    assert restructure(values, np.flipud).tolist() == values[::-1].tolist()
    assert add_up(values, lambda a: a.sum(axis=1), 3).tolist() == [2, 3]
    m = magnitude(values)
    same(restructure(m, np.flipud), m.map(np.flipud))
    same(add_up(m, lambda a: a.sum(axis=1), 3), m.sum(axis=1))
    assert add_up(m, lambda a: a.sum(axis=1), 7).terms == 7
    assert restructure(m, np.flipud).size.tolist() == [[0, 4, 1], [1, 2, 3]]


def test_no_dropout_leaves_the_values_as_they_are():
    values = table(float)
    assert masked(values, None) is values
    assert masked(values, values).tolist() == (values**2).tolist()
    m = magnitude(values)
    assert masked(m, None) is m
    same(masked(m, m), m * m)


@BY_DTYPE
def test_rows_are_placed_among_zeros(dtype):
    values = table(dtype)
    placed = place_rows(values, slice(1, 4), 6)
    assert placed.dtype == dtype
    assert placed.tolist() == [[0, 1, -2, 3, 0, 0], [0, 0, 4, -1, 0, 0]]
    assert place_rows(values, slice(0, 3), 3).tolist() == values.tolist()
    assert place_rows(values, slice(2, 5), 5).tolist() == [[0, 0, 1, -2, 3], [0, 0, 0, 4, -1]]
    assert place_rows(values[None], slice(0, 3), 4).tolist() == [[[1, -2, 3, 0], [0, 4, -1, 0]]]
    assert place_rows(values[0], slice(0, 3), 4).tolist() == [1, -2, 3, 0]
    assert place_rows(values, None, 3) is values


def test_rows_of_magnitudes_lose_nothing_where_they_are_zero():
    placed = place_rows(magnitude(table(float)), slice(1, 4), 6)
    assert placed.size[0].tolist() == [0, 1, 2, 3, 0, 0]
    assert placed.lost[0].tolist() == [0, UNIT, UNIT, UNIT, 0, 0]


@BY_DTYPE
def test_leading_axes_become_one(dtype):
    values = np.arange(12).reshape(2, 3, 2).astype(dtype)
    assert as_rows(values).tolist() == values.reshape(6, 2).tolist()
    assert as_rows(values[0]).tolist() == values[0].tolist()
    assert as_rows(values[0, 0]).tolist() == [values[0, 0].tolist()]
    for shape, rows in (((2, 3, 0), 6), ((0, 3, 2), 0), ((2, 0, 0), 0), ((0,), 1)):
        assert as_rows(np.zeros(shape, dtype)).shape == (rows, shape[-1])
    assert as_rows(magnitude(np.ones((2, 3, 2)))).shape == (6, 2)


@BY_DTYPE
def test_parts_are_stacked_along_a_new_first_axis(dtype):
    parts = [table(dtype), 2 * table(dtype)]
    stacked = stack(parts)
    assert stacked.dtype == dtype
    assert stacked.shape == (2, 2, 3)
    assert stacked.tolist() == [part.tolist() for part in parts]
    assert stack(parts[1:]).tolist() == [parts[1].tolist()]
    magnitudes = stack([magnitude(part.astype(float)) for part in parts])
    assert magnitudes.size.tolist() == np.abs(stacked).tolist()


def test_balls_go_through_the_same_operations():
    ball = Ball.of(table(float), F32, UNIT)

    def equal(left, right):
        assert isinstance(left, Ball)
        assert left.centre.tolist() == right.centre.tolist()
        assert left.radius.tolist() == right.radius.tolist()

    turned = ball.map(np.transpose)
    equal(product(ball, turned), ball @ turned)
    equal(scale(ball, 0.3), ball.scaled(0.3))
    equal(restructure(ball, np.transpose), turned)
    equal(add_up(ball, lambda a: a.sum(axis=0), 2), ball.add_up(lambda a: a.sum(axis=0), 2))
    equal(masked(ball, ball), ball * ball)


@BY_DTYPE
def test_the_total_is_over_the_first_axis(dtype):
    result = total(table(dtype))
    assert result.dtype == dtype
    assert result.tolist() == [1, 2, 2]


def test_the_total_of_magnitudes_counts_its_terms():
    m = magnitude(np.ones((5, 2)))
    same(total(m), m.sum(axis=0))
    assert total(m).terms == 5
    assert total(m).size.tolist() == [5, 5]


@BY_DTYPE
def test_tensors_of_one_dtype_are_accepted(dtype):
    check_dtypes(x=table(dtype), bias=None, W0=table(dtype))


def test_another_dtype_is_named_beside_the_first_tensor():
    with pytest.raises(DTypeError) as caught:
        check_dtypes(x=None, W0=table(np.float16), A=table(np.float16), B=table(np.float64))
    assert str(caught.value) == "B: expected float16 as W0 has, got float64; convert it"


@pytest.mark.parametrize("dtype", [np.int32, np.complex128, ml_dtypes.float8_e4m3fn, bool], ids=str)
def test_an_unknown_dtype_is_named(dtype):
    with pytest.raises(DTypeError) as caught:
        check_dtypes(dy=table(float).astype(dtype))
    assert str(caught.value) == (
        f"dy: expected one of float16, bfloat16, float32, float64, object, got {np.dtype(dtype)}; convert it"
    )


def test_an_underflow_weighs_as_the_scaling_says():
    half, single = FORMATS[0], FORMATS[2]
    assert underflow_unit(half) == 2.0**-24
    assert underflow_unit(single) == 2.0**-126
    assert underflow_unit(half, 1.0) == 2 * 2.0**-24
    assert underflow_unit(half, 0.0) == 2.0**-24
    for scaling in (8.0, -8.0, 0.125):
        assert underflow_unit(half, scaling) == 9 * 2.0**-24
    assert underflow_unit(half, 2.0, 0.125, 4.0, 0.0) == 9 * 2.0**-24
