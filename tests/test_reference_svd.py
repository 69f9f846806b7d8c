import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_matrices import frobenius, rational, singular_values_above
from hypothesis import given, settings
from strategies import matrices

from loracle.reference import DTypeError, NonFiniteError, ShapeError, Svd, svd_error_bound
from loracle.reference.formats import FORMATS
from loracle.reference.svd import backward_error, checked, float64_matrix, svd

DTYPES = [form.dtype for form in FORMATS]
U53 = 2.0**-53


def lies_within(exact, computed, bound):
    """Whether every singular value of a matrix of Fractions is within the bound of the computed one."""
    thresholds = [
        (Fraction(float(s)) + Fraction(bound), Fraction(float(s)) - Fraction(bound)) for s in computed
    ]
    return all(
        singular_values_above(exact, above) <= number and singular_values_above(exact, below) > number
        for number, (above, below) in enumerate(thresholds)
    )


@settings(max_examples=25)
@given(matrices())
def test_the_decomposition_is_within_its_backward_error(matrix):
    U, s, Vh = svd(matrix, "matrix")
    m, n = matrix.shape
    k = min(m, n)
    assert (U.shape, s.shape, Vh.shape) == ((m, k), (k,), (k, n))
    exact = rational(U) * rational(s) @ rational(Vh) - rational(matrix)
    assert frobenius(exact) <= backward_error((m, n)) * s[0]
    orthogonal = backward_error((m, n)) / math.sqrt(m * n)
    for basis in (rational(U.T), rational(Vh)):
        # The Frobenius norm of a matrix (k, k) is at most sqrt(k) times the spectral norm.
        assert frobenius(basis @ basis.T - rational(np.eye(k))) <= orthogonal * math.sqrt(k)


@settings(max_examples=25)
@given(matrices(most=5))
def test_singular_values_are_within_the_bound(matrix):
    s = svd(matrix, "matrix").s
    assert (s[1:] <= s[:-1]).all()
    assert lies_within(rational(matrix), s, svd_error_bound(matrix.shape, s[0]))


def test_the_bound_catches_singular_values_of_float32():
    matrix = np.random.default_rng(1).standard_normal((6, 5))
    narrow = np.linalg.svd(matrix.astype(np.float32))[1].astype(np.float64)
    assert not lies_within(rational(matrix), narrow, svd_error_bound((6, 5), narrow[0]))
    moved = svd(matrix, "matrix").s
    moved[4] += 1e-9
    assert not lies_within(rational(matrix), moved, svd_error_bound((6, 5), moved[0]))


def test_the_bounds_by_hand():
    """p(4, 9) = 100 * 9 * 6."""
    assert 5400 * U53 < backward_error((4, 9)) < 5400.001 * U53
    assert backward_error((9, 4)) == backward_error((4, 9))
    assert 300 * U53 < svd_error_bound((1, 1), 1.0) < 300.001 * U53
    assert 3 * 5400 * 2 * U53 < svd_error_bound((4, 9), 2.0) < 3 * 5400.001 * 2 * U53


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_are_taken_to_float64_exactly(dtype):
    given_matrix = np.array([[1 / 3, -2.0], [0.0, 1e-5]], dtype)
    taken = float64_matrix(given_matrix, "W0")
    assert taken.dtype == np.float64
    assert taken.tolist() == [[float(v) for v in row] for row in given_matrix]
    taken[:] = 0
    assert given_matrix[0, 1] == -2


def test_nested_sequences_of_floats_and_other_strides_are_matrices():
    assert float64_matrix([[1.0, 2.0]], "W0").tolist() == [[1, 2]]
    matrix = np.arange(12.0).reshape(3, 4)[::2, ::-1].T
    assert float64_matrix(matrix, "W0").tolist() == matrix.tolist()


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.ones((2, 2), int), DTypeError,
         r"^W0: expected one of float16, bfloat16, .* got dtype\('int64'\); convert it$"),
        (np.ones(3), ShapeError,
         r"^W0: expected a matrix of at least one row and column, got shape \(3,\); give it two axes$"),
        (np.ones((2, 2, 2)), ShapeError, r"^W0: .*got shape \(2, 2, 2\)"),
        (np.ones((0, 2)), ShapeError, r"^W0: .*got shape \(0, 2\)"),
        (np.ones((2, 0)), ShapeError, r"^W0: .*got shape \(2, 0\)"),
        (np.array([[1.0, 2.0], [3.0, np.nan]]), NonFiniteError,
         r"^W0: expected finite numbers, got nan at \[1, 1\]; fetch it again$"),
        (np.array([[1.0, -np.inf]]).astype(ml_dtypes.bfloat16), NonFiniteError, r"got -inf at \[0, 1\]"),
    ],
)  # fmt: skip
def test_what_is_no_finite_matrix_is_refused(matrix, error, message):
    with pytest.raises(error, match=message):
        float64_matrix(matrix, "W0")


def test_an_overflow_of_the_singular_values_is_refused():
    message = "{}: expected singular values of at most 1.7977e+308, got an overflow; scale it down"
    with pytest.raises(NonFiniteError) as caught:
        svd(np.full((2, 2), 1.5e308), "W0")
    assert str(caught.value) == message.format("W0")
    with pytest.raises(NonFiniteError) as caught:
        checked(Svd(np.eye(2), np.array([np.inf, 1.0]), np.eye(2)), "delta")
    assert str(caught.value) == message.format("delta")
    assert svd(np.full((2, 2), 8e307), "W0").s[0] > 1.5e308
