import math
from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import frobenius, projector, rational, with_singular_values
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    amplification_factor,
    amplification_factor_bound,
    delta_svd_error_bound,
)
from loracle.reference.formats import FORMATS
from loracle.reference.spectra import size_of_factors
from loracle.reference.subspace import projector_error

DTYPES = [form.dtype for form in FORMATS]


def floats(matrix):
    return np.array([[float(v) for v in row] for row in matrix])


# delta has 8 at (0, 1) and 3 at (2, 0), times the scaling.
A = np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
B = np.array([[4.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
W0 = np.array([[9.0, 2.0, 7.0], [6.0, 5.0, 4.0], [1.5, 0.0, 8.0]])


@pytest.mark.parametrize(
    ("scaling", "r", "expected"),
    [
        (1.0, 1, math.sqrt(73) / 2),
        (1.0, 2, math.sqrt(73) / math.sqrt(81 + 4 + 1.5**2)),
        (1.0, None, math.sqrt(73) / math.sqrt(81 + 4 + 1.5**2)),
        (-0.5, 1, math.sqrt(73) / 4),
        (-0.5, np.int64(2), math.sqrt(73) / 2 / math.sqrt(81 + 4 + 1.5**2)),
    ],
)
def test_factors_by_hand(scaling, r, expected):
    """U^T W0 V is made of the entries of W0 in rows 0 and 2 and columns 1 and 0."""
    bound = amplification_factor_bound(W0, A, B, scaling, r=r)
    assert bound < 1e-9
    found = amplification_factor(W0, A, B, scaling, r=r)
    assert type(found) is float
    assert abs(found - expected) <= bound


def test_the_default_scaling_is_one():
    assert amplification_factor(W0, A, B) == amplification_factor(W0, A, B, 1.0)
    assert amplification_factor_bound(W0, A, B) == amplification_factor_bound(W0, A, B, 1.0)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_of_all_directions_its_square_is_rational(outputs, inputs, r, seed):
    """||delta||_F^2 / ||P_B W0 P_A||_F^2, with the projectors on the columns of B and the rows of A."""
    rng = np.random.default_rng(seed)
    r = min(r, outputs, inputs)
    weight = rng.integers(-3, 4, (outputs, inputs)) + 0.25
    small = np.eye(r, dtype=int)
    B, A = rng.integers(-2, 3, (outputs, r)), rng.integers(-2, 3, (r, inputs))
    B[:r], A[:, :r] = np.tril(B[:r], -1) + small, np.triu(A[:, :r], 1) + small
    B, A = B.astype(float), A.astype(float)
    delta = rational(B) @ rational(A) * Fraction(1.5)
    projected = projector(rational(B).T) @ rational(weight) @ projector(rational(A))
    expected = frobenius(delta) / frobenius(projected)
    bound = amplification_factor_bound(weight, A, B, 1.5)
    assert bound < 1e-6 * expected
    assert abs(amplification_factor(weight, A, B, 1.5) - expected) <= bound
    assert amplification_factor(weight, A, B, 1.5, r=r) == amplification_factor(weight, A, B, 1.5)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_of_the_first_directions(r, seed):
    """The singular vectors are known; rounding the entries counts in the bound's own slack."""
    rng = np.random.default_rng(seed)
    U, delta, Vh = with_singular_values(rng, [40, 11, 3], 5, 4)
    weight = rng.integers(-3, 4, (5, 4)) + 0.25
    A, B = np.eye(4), floats(delta)
    expected = frobenius(delta) / frobenius(U[:, :r].T @ rational(weight) @ Vh[:r].T)
    bound = amplification_factor_bound(weight, A, B, r=r)
    assert bound < 1e-6 * expected
    assert abs(amplification_factor(weight, A, B, r=r) - expected) <= bound


def test_float32_and_another_count_are_outside_the_bound():
    rng = np.random.default_rng(2)
    weight, A, B = rng.standard_normal((6, 5)), rng.standard_normal((3, 5)), rng.standard_normal((6, 3))
    narrow = A.astype(np.float32), B.astype(np.float32)
    for r in (1, 2, 3):
        found, bound = amplification_factor(weight, A, B, r=r), amplification_factor_bound(weight, A, B, r=r)
        assert abs(amplification_factor(weight, *narrow, r=r) - found) > bound
        assert abs(amplification_factor(weight.astype(np.float32), A, B, r=r) - found) > bound
        assert abs(amplification_factor(weight, A, B, r=r % 3 + 1) - found) > bound


def test_where_the_weight_has_nothing_there_the_factor_is_infinite():
    nothing = W0.copy()
    nothing[0] = nothing[2] = 0
    assert amplification_factor(nothing, A, B) == math.inf
    assert amplification_factor_bound(nothing, A, B) == math.inf
    assert amplification_factor(W0 * 0, A, B, r=1) == math.inf
    assert amplification_factor_bound(W0 * 0, A, B, r=1) == math.inf
    equal = B * [1.0, 8 / 3]
    assert amplification_factor_bound(W0, A, equal, r=1) == math.inf
    assert amplification_factor_bound(W0, A, equal, r=2) < 1e-9


def test_the_bound_by_hand():
    for scaling in (1.0, -0.25):
        error, size = delta_svd_error_bound(A, B, scaling), abs(scaling)
        moved = projector_error([8.0 * size, 3.0 * size], 1, error, 3)
        weight = np.linalg.norm(W0)
        lost = (2 * moved + moved**2 + error / (8 * size)) * weight
        expected = (error * 2 + math.sqrt(73) * size * lost) / (2 * (2 - lost))
        bound = amplification_factor_bound(W0, A, B, scaling, r=1)
        assert expected * (1 - 2**-40) < bound < expected * (1 + 2**-20)
    # Of a whole space on either side, whose projector is known.
    error = delta_svd_error_bound(np.eye(2), np.eye(2))
    lost = 3 * error * math.sqrt(10)
    expected = (error * math.sqrt(10) + math.sqrt(2) * lost) / (10 - lost * math.sqrt(10))
    bound = amplification_factor_bound(np.array([[1.0, 2.0], [2.0, 1.0]]), np.eye(2), np.eye(2))
    assert expected * (1 - 2**-30) < bound < expected * (1 + 2**-20)


def test_the_bound_where_the_subspaces_are_hardly_known():
    """Of singular values 1 + 2^-36 and 1: the product of the two projectors' errors counts, too."""
    s = [1 + 2.0**-36, 1.0]
    A, B, weight = np.eye(2), np.diag(s), np.eye(2)
    error = delta_svd_error_bound(A, B)
    moved = projector_error(s, 1, error, 2)
    assert moved > 0.01
    lost = (2 * moved + moved**2 + error / s[0]) * math.sqrt(2)
    expected = (error + math.hypot(*s) * lost) / (1 - lost)
    bound = amplification_factor_bound(weight, A, B, r=1)
    assert expected * (1 - 2**-10) < bound < expected * (1 + 2**-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_work_is_done_in_float64_whatever_the_dtype(dtype):
    rng = np.random.default_rng(1)
    narrow = [rng.standard_normal(shape).astype(dtype) for shape in ((4, 5), (2, 5), (4, 2))]
    wide = [tensor.astype(np.float64) for tensor in narrow]
    assert amplification_factor(*narrow, 0.3) == amplification_factor(*wide, 0.3)
    assert amplification_factor_bound(*narrow, 0.3) == amplification_factor_bound(*wide, 0.3)


@pytest.mark.parametrize("function", [amplification_factor, amplification_factor_bound])
def test_what_does_not_fit_is_refused(function):
    with pytest.raises(ShapeError) as caught:
        function(W0[:2], A, B)
    assert str(caught.value) == "W0: expected (3, 3) to fit B and A, got (2, 3); is it transposed?"
    with pytest.raises(ShapeError, match=r"^B: expected \(out, 2\) to fit A"):
        function(W0, A, B.T)
    with pytest.raises(DTypeError, match=r"^W0: expected one of"):
        function(W0.astype(int), A, B)
    with pytest.raises(NonFiniteError, match=r"^W0: expected finite numbers, got nan"):
        function(W0 * np.nan, A, B)
    with pytest.raises(NonFiniteError, match=r"^scaling: expected a finite number"):
        function(W0, A, B, math.nan)
    for r in (0, 3, -1, 1.0, True):
        with pytest.raises(ConfigError) as caught:
            function(W0, A, B, r=r)
        expected = (
            f"r: expected an integer from 1 to 2, the numerical rank of delta, got {r!r}; choose another"
        )
        assert str(caught.value) == expected


@pytest.mark.parametrize("function", [amplification_factor, amplification_factor_bound])
def test_an_update_of_zero_and_directions_beyond_its_rank_are_refused(function):
    """B A of these is zero, but for roundings; and of rank 1 in the end."""
    for B0, scaling in ((B * 0, 1.0), (B, 0.0)):
        with pytest.raises(ConfigError) as caught:
            function(W0, A, B0, scaling)
        expected = "delta: expected an update that is not zero, got zero; train the adapter first"
        assert str(caught.value) == expected
    cancelling = (
        np.array([[1 / 3, 0.1, 0.7], [1 / 3, 0.1, 0.7]]),
        np.array([[0.3, -0.3], [0.7, -0.7], [0.1, -0.1]]),
    )
    with pytest.raises(ConfigError, match=r"^delta: expected an update that is not zero"):
        function(W0, *cancelling)
    with pytest.raises(
        ConfigError, match=r"^r: expected an integer from 1 to 1, the numerical rank of delta"
    ):
        function(W0, np.array([[1 / 3, 0.1, 0.7], [2 / 3, 0.2, 1.4]]), B, r=2)


def test_the_threshold_of_the_rank_is_relative_to_the_factors():
    """max(out, in) 2u |scaling| ||B||_F ||A||_F: 6u times 3 times 1 here, strictly."""
    B = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    A = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert size_of_factors(A, B, 1.0) == 3
    for factor, known in ((0.9, 1), (1.1, 2)):
        A[1, 1], B[1, 1] = 2.0**-30, factor * 18 * 2.0**-23
        with pytest.raises(ConfigError, match=rf"^r: expected an integer from 1 to {known}, "):
            amplification_factor(W0, A, B, r=3)
