import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_matrices import frobenius, rational, singular_values_above, with_singular_values
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import matrices

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRankApproximation,
    NonFiniteError,
    ShapeError,
    low_rank_approximation,
    numerical_rank,
    rank,
    svd_error_bound,
)
from loracle.reference.formats import FORMATS, float_format
from loracle.reference.low_rank_approximation import count_above, relative_threshold

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [form.dtype for form in FORMATS]
U53 = 2.0**-53


def residual(matrix, B, A):
    """The matrix minus B A, exactly."""
    return rational(matrix) - rational(B) @ rational(A)


def bound_of(matrix, found):
    return svd_error_bound(matrix.shape, found.singular_values[0])


def diagonal(*values, shape=None):
    matrix = np.zeros(shape or (len(values), len(values)))
    matrix[range(len(values)), range(len(values))] = values
    return matrix


@pytest.mark.parametrize(
    ("matrix", "r", "spectral", "squared", "relative"),
    [
        (diagonal(8, 2, 1), 1, 2, 5, math.sqrt(5 / 69)),
        (diagonal(1, 8, 2), 2, 1, 1, math.sqrt(1 / 69)),
        (diagonal(8, 2, 1), 3, 0, 0, 0),
        (diagonal(-4, 3, shape=(2, 5)), 1, 3, 9, 3 / 5),
        (diagonal(-4, 3, shape=(5, 2)), 1, 3, 9, 3 / 5),
        (np.array([[0.0, 5.0], [1.0, 0.0]]), 1, 1, 1, math.sqrt(1 / 26)),
        (np.ones((2, 2)), 1, 0, 0, 0),
        (np.array([[1.0, 1.0], [-1.0, 1.0]]) * 2, 1, math.sqrt(8), 8, math.sqrt(1 / 2)),
        (np.zeros((2, 3)), 1, 0, 0, 0),
    ],
)
def test_errors_by_hand(matrix, r, spectral, squared, relative):
    """Diagonals, permuted ones, and 2 sqrt(2) times a rotation."""
    found = low_rank_approximation(matrix, r)
    bound = bound_of(matrix, found)
    assert isinstance(found, LowRankApproximation)
    assert (found.r, found.B.shape, found.A.shape) == (r, (len(matrix), r), (r, matrix.shape[1]))
    assert found.singular_values.shape == (min(matrix.shape),)
    assert abs(found.spectral_error - spectral) <= bound
    assert abs(found.frobenius_error - math.sqrt(squared)) <= bound
    assert abs(found.relative_error * np.linalg.norm(matrix) - math.sqrt(squared)) <= 2 * bound
    assert abs(found.relative_error - relative) <= 2 * bound / max(np.linalg.norm(matrix), 1)
    for error in (found.spectral_error, found.frobenius_error, found.relative_error):
        assert type(error) is float


def test_factors_by_hand():
    """Each factor has the square root of the singular value: 3 of 9, 2 of 4."""
    matrix = np.array([[0.0, 9.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = low_rank_approximation(matrix, 2)
    bound = bound_of(matrix, found)
    assert np.abs(np.abs(found.B) - [[3, 0], [0, 2], [0, 0]]).max() <= bound
    assert np.abs(np.abs(found.A) - [[0, 3, 0], [2, 0, 0]]).max() <= bound
    kept = np.array([[0.0, 9.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.abs(found.B @ found.A - kept).max() <= bound


@settings(max_examples=30)
@given(matrices(most=6), st.data())
def test_the_errors_reported_are_those_of_the_factors(matrix, data):
    r = data.draw(st.integers(1, min(matrix.shape)))
    found = low_rank_approximation(matrix, r)
    bound = bound_of(matrix, found)
    missing = residual(matrix, found.B, found.A)
    assert abs(frobenius(missing) - found.frobenius_error) <= bound
    below = Fraction(found.spectral_error) - Fraction(bound)
    assert singular_values_above(missing, Fraction(found.spectral_error) + Fraction(bound)) == 0
    assert below <= 0 or singular_values_above(missing, below) > 0
    total = frobenius(rational(matrix))
    assert abs(found.relative_error * total - found.frobenius_error) <= bound
    # Column k of B and row k of A have the same norm.
    norms = [np.linalg.norm(found.B, axis=0), np.linalg.norm(found.A, axis=1)]
    assert np.abs(norms[0] ** 2 - norms[1] ** 2).max() <= bound
    assert np.abs(norms[0] ** 2 - found.singular_values[:r]).max() <= bound


@settings(max_examples=30)
@given(matrices(), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-2, 1e-4]), st.data())
def test_no_competitor_of_that_rank_is_nearer(matrix, seed, distance, data):
    """Neither the best factors moved a little nor random ones with the best of second factors."""
    r = data.draw(st.integers(1, min(matrix.shape)))
    found = low_rank_approximation(matrix, r)
    bound = bound_of(matrix, found)
    rng = np.random.default_rng(seed)

    def moved(factor):
        return factor + distance * np.abs(factor).max(initial=1.0) * rng.standard_normal(factor.shape)

    B = rng.standard_normal(found.B.shape)
    competitors = [(moved(found.B), moved(found.A)), (B, np.linalg.lstsq(B, matrix)[0])]
    for left, right in competitors:
        missing = residual(matrix, left, right)
        assert frobenius(missing) >= found.frobenius_error - bound
        below = Fraction(found.spectral_error) - Fraction(bound)
        assert below <= 0 or singular_values_above(missing, below) > 0


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_matrix_of_known_singular_values(r, seed):
    """Made of exact reflectors; the roundings of its entries to float64, u each, move it by less."""
    U, M, Vh = with_singular_values(np.random.default_rng(seed), [60, 31, 9, 4, 1], 6, 5)
    matrix = np.array([[float(v) for v in row] for row in M])
    found = low_rank_approximation(matrix, r)
    bound = bound_of(matrix, found) + U53 * frobenius(M)
    kept = U[:, :r] * np.array([Fraction(v) for v in (60, 31, 9, 4, 1)[:r]]) @ Vh[:r]
    assert np.abs(found.singular_values - [60, 31, 9, 4, 1]).max() <= bound
    assert abs(found.frobenius_error - math.hypot(*(60, 31, 9, 4, 1)[r:])) <= bound
    # The projector on the kept vectors moves by 2 ||E|| / (gap - ||E||) (Wedin), M times it by 60 as much.
    gap = [29, 22, 5, 3, 1][r - 1]
    assert frobenius(rational(found.B) @ rational(found.A) - kept) <= bound * (1 + 2 * 2 * 60 / gap)


def test_an_approximation_in_float32_and_one_of_the_wrong_directions_break_the_bound():
    matrix = np.random.default_rng(0).standard_normal((6, 5))
    found = low_rank_approximation(matrix, 2)
    bound = bound_of(matrix, found)
    U, s, Vh = np.linalg.svd(matrix.astype(np.float32), full_matrices=False)
    narrow = frobenius(residual(matrix, U[:, :2] * s[:2], Vh[:2]))
    assert abs(frobenius(residual(matrix, found.B, found.A)) - found.frobenius_error) <= bound
    assert abs(s[2:].astype(float) - found.singular_values[2:]).max() > bound
    assert abs(frobenius(residual(matrix, (U * s)[:, 1:3], Vh[1:3])) - found.frobenius_error) > bound
    assert narrow >= found.frobenius_error - bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_work_is_done_in_float64_whatever_the_dtype(dtype):
    matrix = np.random.default_rng(2).standard_normal((5, 4)).astype(dtype)
    found, wide = low_rank_approximation(matrix, 2), low_rank_approximation(matrix.astype(np.float64), 2)
    for name in ("A", "B", "singular_values"):
        assert getattr(found, name).dtype == np.float64
        assert getattr(found, name).tolist() == getattr(wide, name).tolist()


def test_norms_of_huge_and_of_tiny_numbers_neither_overflow_nor_vanish():
    for size in (2.0**1000, 2.0**-1000):
        found = low_rank_approximation(diagonal(4, 3, 4) * size, 1)
        bound = 5 * svd_error_bound((3, 3), 4.0)
        assert abs(found.frobenius_error / size - 5) <= bound
        assert abs(found.relative_error - 5 / math.sqrt(41)) <= bound
    # The norm of the whole is too large for float64, its parts are not.
    found = low_rank_approximation(diagonal(1.6, 1.5) * 1e308, 1)
    assert abs(found.relative_error - 1.5 / math.hypot(1.6, 1.5)) <= svd_error_bound((2, 2), 1.6)


@pytest.mark.parametrize("r", [0, 3, -1, 1.0, True, None])
def test_the_rank_asked_for_must_fit(r):
    for matrix in (np.ones((2, 4)), np.ones((4, 2))):
        with pytest.raises(ConfigError) as caught:
            low_rank_approximation(matrix, r)
        expected = f"the smaller side of {matrix.shape}, got {r!r}; choose another"
        assert str(caught.value) == f"r: expected an integer from 1 to 2, {expected}"


@pytest.mark.parametrize("function", [numerical_rank, lambda matrix: low_rank_approximation(matrix, 1)])
def test_what_is_no_finite_matrix_is_refused(function):
    with pytest.raises(
        DTypeError, match=r"^matrix: expected one of float16.* got dtype\('int64'\); convert it$"
    ):
        function(np.ones((2, 2), int))
    with pytest.raises(ShapeError, match=r"^matrix: expected a matrix of at least one row and column, got"):
        function(np.ones(2))
    with pytest.raises(NonFiniteError, match=r"^matrix: expected finite numbers, got inf at \[0, 0\]"):
        function(np.array([[np.inf]]))
    with pytest.raises(NonFiniteError, match=r"^matrix: expected singular values of at most"):
        function(np.full((2, 2), 1.5e308))


@settings(max_examples=40)
@given(matrices(), st.booleans())
def test_the_numerical_rank_is_numpys(matrix, narrow):
    matrix = matrix.astype(np.float32) if narrow else matrix
    s = np.linalg.svd(matrix.astype(np.float64))[1]
    eps = np.finfo(matrix.dtype).eps
    assert numerical_rank(matrix) == np.linalg.matrix_rank(
        matrix.astype(np.float64), tol=s[0] * max(matrix.shape) * eps
    )
    if not narrow:
        assert numerical_rank(matrix) == np.linalg.matrix_rank(matrix)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_numerical_rank_of_small_integers_is_the_rank(m, n, seed):
    matrix = np.random.default_rng(seed).integers(-2, 3, (m, n)) * 1.0
    assert numerical_rank(matrix) == rank(matrix)
    assert numerical_rank(matrix.astype(np.float32)) == rank(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_the_default_threshold_is_strict_and_of_the_dtype(dtype, shape):
    """max(m, n) 2u sigma_1 itself counts as zero, the next larger number of the dtype does not."""
    u = float_format(dtype).unit_roundoff
    at = np.zeros(shape, dtype)
    at[0, 0], at[1, 1] = 1, 3 * 2 * u
    above = at.copy()
    above[1, 1] *= dtype.type(1.25)
    assert numerical_rank(at) == 1
    assert numerical_rank(above) == 2
    assert numerical_rank(at * dtype.type(64)) == 1
    assert numerical_rank(np.zeros(shape, dtype)) == 0
    assert relative_threshold(shape, float_format(dtype)) == 6 * u


def test_a_threshold_of_ones_own():
    matrix = diagonal(4, 2, 1)
    assert [numerical_rank(matrix, tol=tol) for tol in (0, 0.5, 1, 1.5, 2.5, np.float32(5))] == [
        3,
        3,
        2,
        2,
        1,
        0,
    ]
    assert numerical_rank(diagonal(1, 1e-300), tol=0) == 2
    assert numerical_rank(np.ones((200, 2), BF16), tol=0.5) == 1
    assert count_above(np.array([3.0, 2.0, 2.0]), 2.0) == 1
    for tol in (-1.0, math.nan, math.inf, "1", True):
        with pytest.raises(ConfigError) as caught:
            numerical_rank(matrix, tol=tol)
        expected = f"tol: expected a finite number of at least 0, got {tol!r}; choose another"
        assert str(caught.value) == expected


def test_where_the_default_threshold_says_nothing_one_is_asked_for():
    """bfloat16 has 2u = 2^-7."""
    assert numerical_rank(np.ones((127, 2), BF16)) == 1
    for shape in ((128, 2), (2, 128)):
        with pytest.raises(ConfigError) as caught:
            numerical_rank(np.ones(shape, BF16))
        assert str(caught.value) == (
            f"tol: expected a threshold, as the default, 1 sigma_1 for {shape} in bfloat16, is above every "
            "singular value; pass tol"
        )
