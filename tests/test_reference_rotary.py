import math
from fractions import Fraction

import numpy as np
import pytest
from exact_linear import rational
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    apply_rotary,
    apply_rotary_backward,
    rotary_tables,
)
from loracle.reference.formats import FORMATS

DTYPES = [*(form.dtype for form in FORMATS), np.dtype(object)]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_the_tables_are_the_definitions():
    cos, sin = rotary_tables(np.array([0, 1, 3]), 6, theta=100.0)
    assert cos.dtype == sin.dtype == np.float64
    for row, position in enumerate((0, 1, 3)):
        for column in range(6):
            angle = position * 100.0 ** (-2 * (column % 3) / 6)
            assert cos[row, column] == pytest.approx(math.cos(angle), rel=0, abs=2**-51)
            assert sin[row, column] == pytest.approx(math.sin(angle), rel=0, abs=2**-51)


def test_theta_is_ten_thousand_by_default_and_positions_may_lie_between_tokens():
    cos, sin = rotary_tables(np.array([2.5]), 4)
    angles = [2.5, 0.025, 2.5, 0.025]
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles], rel=0, abs=2**-51)
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles], rel=0, abs=2**-51)
    given = rotary_tables([0, 7], 2, theta=0.5)
    assert np.array_equal(given[0][:, 0], np.cos([0.0, 7.0]))


@BY_DTYPE
def test_a_rotation_worked_out_by_hand(dtype):
    x = np.array([[1, 2, 3, 4], [1, 2, 3, 4]]).astype(dtype)
    cos, sin = (
        np.array([[1, 2, 3, 4], [0, 1, 0, 1]]).astype(dtype),
        np.array([[5, 6, 7, 8], [1, 0, 1, 0]]).astype(dtype),
    )
    y = apply_rotary(x, cos, sin)
    assert y.tolist() == [[1 - 15, 4 - 24, 9 + 7, 16 + 16], [-3, 2, 1, 4]]
    dx = apply_rotary_backward(x, cos, sin)
    assert dx.tolist() == [[1 + 21, 4 + 32, 9 - 5, 16 - 12], [3, 2, -1, 4]]
    assert y.dtype == dx.dtype == dtype


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_backward_is_the_transpose_for_any_tables(n, length, half, seed):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rational(rng.integers(-9, 10, shape) / 4)

    x, dy = numbers(n, length, 2 * half), numbers(n, length, 2 * half)
    cos, sin = numbers(length, 2 * half), numbers(length, 2 * half)
    there, back = (dy * apply_rotary(x, cos, sin)).sum(), (apply_rotary_backward(dy, cos, sin) * x).sum()
    assert isinstance(there, Fraction)
    assert there == back


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_pairs_are_rotated_as_complex_numbers(half, seed):
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, 4, (5, half))
    cos, sin = (np.tile(np.array(table)[quarters], 2) for table in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    x = rng.integers(-9, 10, (2, 5, 2 * half)) * 1.0
    turned = (x[..., :half] + 1j * x[..., half:]) * np.array([1, 1j, -1, -1j])[quarters]
    assert np.array_equal(apply_rotary(x, cos, sin), np.concatenate([turned.real, turned.imag], axis=-1))
    assert np.array_equal(apply_rotary_backward(apply_rotary(x, cos, sin), cos, sin), x)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8))
    cos, sin = rotary_tables(np.arange(9), 8)
    rows = apply_rotary(np.tile(q, (9, 1)), cos, sin) @ apply_rotary(np.tile(k, (9, 1)), cos, sin).T
    for offset in range(-5, 6):
        diagonal = np.diagonal(rows, offset)
        # Angles below 9 to 2^-50, and sums of 8 products: 2^-45 of the norms.
        assert np.ptp(diagonal) < 2**-45 * np.linalg.norm(q) * np.linalg.norm(k)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([[0, 1]], 4), ShapeError, r"^positions: expected \(T,\), got \(1, 2\); give one a token$"),
        (
            ([0.0, np.nan], 4),
            NonFiniteError,
            r"^positions: expected finite numbers, got \[ 0\. nan\]; count the tokens from 0$",
        ),
        (([0], 3), ConfigError, r"^head_dim: expected an even number above 0, got 3; pairs are rotated$"),
        (([0], 0), ConfigError, r"^head_dim: expected an even number above 0, got 0; pairs are rotated$"),
        (([0], -2), ConfigError, r"^head_dim: expected an even number above 0, got -2"),
        (
            ([0], 4, 0.0),
            ConfigError,
            r"^theta: expected a finite number above 0, got 0\.0; Llama's is 10000$",
        ),
        (([0], 4, np.inf), ConfigError, r"^theta: expected a finite number above 0, got inf; Llama's is"),
    ],
)
def test_wrong_arguments_of_the_tables_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        rotary_tables(*arguments)


@pytest.mark.parametrize(("call", "name"), [(apply_rotary, "x"), (apply_rotary_backward, "dy")])
def test_tables_that_do_not_fit_are_named(call, name):
    x, table = np.ones((2, 3, 4)), np.ones((3, 4))
    with pytest.raises(
        ShapeError,
        match=rf"^cos: expected \(3, 4\) to fit {name} \(2, 3, 4\), got \(4, 3\); give a row a token$",
    ):
        call(x, table.T, table)
    with pytest.raises(ShapeError, match=rf"^sin: expected \(3, 4\) to fit {name} .*got \(3, 2\)"):
        call(x, table, table[:, :2])
    for wrong in (np.ones((3, 3)), np.ones(4)):
        with pytest.raises(
            ShapeError,
            match=rf"^{name}: expected \(\.\.\., T, D\) with D even, got .*; pairs are rotated$",
        ):
            call(wrong, wrong, wrong)
    for position, named in ((1, "cos"), (2, "sin")):
        arrays = [x, table, table]
        arrays[position] = table.astype(np.float32)
        with pytest.raises(DTypeError, match=rf"^{named}: expected float64 as {name} has, got float32"):
            call(*arrays)
    assert call(x[0], table, table).shape == (3, 4)
