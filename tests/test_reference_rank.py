from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ParameterCounts,
    RankFactorization,
    ShapeError,
    adapter_parameter_counts,
    numerical_rank,
    parameter_counts,
    rank,
    rank_factorization,
)
from loracle.reference.formats import FORMATS

DTYPES = [form.dtype for form in FORMATS]
TALK = [[10, 20, 5], [12, 24, 6], [14, 28, 7]]


def test_the_example_of_the_talk():
    """The first two columns are multiples of the third, until one number becomes 70."""
    assert rank(TALK) == 1
    C, R = rank_factorization(TALK)
    assert C.tolist() == [[10], [12], [14]]
    assert R.tolist() == [[1, 2, Fraction(1, 2)]]
    assert C.size + R.size == 6
    changed = [row[:] for row in TALK]
    changed[2][2] = 70
    assert rank(changed) == 2
    assert parameter_counts((3, 3), 1) == ParameterCounts(dense=9, factored=6)
    assert parameter_counts((1024, 1024), 2) == ParameterCounts(dense=2**20, factored=4096)


@pytest.mark.parametrize(
    ("matrix", "C", "R"),
    [
        ([[5]], [[5]], [[1]]),
        ([[0]], [[]], []),
        ([[0, 0, 0], [0, 0, 0]], [[], []], []),
        ([[0, 1], [1, 0]], [[0, 1], [1, 0]], [[1, 0], [0, 1]]),
        ([[0, 2, 4]], [[2]], [[0, 1, 2]]),
        ([[0], [3], [6]], [[0], [3], [6]], [[1]]),
        ([[1, 2, 1], [2, 4, 3]], [[1, 1], [2, 3]], [[1, 2, 0], [0, 0, 1]]),
        ([[0, 0, 2, 1], [0, 3, 1, 2]], [[0, 2], [3, 1]],
         [[0, 1, 0, Fraction(1, 2)], [0, 0, 1, Fraction(1, 2)]]),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2], [4, 5], [7, 8]], [[1, 0, -1], [0, 1, 2]]),
        ([[Fraction(1, 2), Fraction(1, 3)], [3, 2]], [[Fraction(1, 2)], [3]], [[1, Fraction(2, 3)]]),
        ([[Fraction(1, 2), Fraction(1, 3)], [3, 3]],
         [[Fraction(1, 2), Fraction(1, 3)], [3, 3]], [[1, 0], [0, 1]]),
    ],
)  # fmt: skip
def test_factorizations_by_hand(matrix, C, R):
    found = rank_factorization(matrix)
    assert isinstance(found, RankFactorization)
    assert found.C.dtype == found.R.dtype == object
    assert found.C.tolist() == C
    assert found.R.tolist() == R
    assert found.R.shape == (len(R), len(matrix[0]))
    assert rank(matrix) == len(R)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_a_matrix_without_entries_has_rank_0(shape):
    assert rank(np.zeros(shape)) == 0
    C, R = rank_factorization(np.zeros(shape))
    assert C.shape == (shape[0], 0)
    assert R.shape == (0, shape[1])


def of_known_rank(rng, m, n, r, size=4):
    """A product of integer factors that hold a unit triangular matrix each, rows and columns shuffled."""
    left, right = rng.integers(-size, size + 1, (m, r)), rng.integers(-size, size + 1, (r, n))
    left[:r], right[:, :r] = np.tril(left[:r], -1) + np.eye(r, dtype=int), np.eye(r, dtype=int)
    return (rng.permutation(left) @ rng.permutation(right, axis=1)).astype(object)


@st.composite
def known_ranks(draw, most=7):
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    r = draw(st.integers(0, min(m, n)))
    return of_known_rank(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), m, n, r), r


@given(known_ranks())
def test_the_rank_of_a_product_of_known_factors(problem):
    matrix, r = problem
    assert rank(matrix) == rank(matrix.T) == r
    assert np.linalg.matrix_rank(matrix.astype(float)) == r


@given(known_ranks(), st.integers(0, 2**32 - 1))
def test_the_factors_are_pivot_columns_and_the_reduced_row_echelon_form(problem, seed):
    matrix, r = problem
    rng = np.random.default_rng(seed)
    denominators = [[Fraction(1, int(d))] for d in rng.integers(1, 9, len(matrix))]
    matrix = matrix * np.array(denominators, dtype=object)
    C, R = rank_factorization(matrix)
    assert C.shape == (len(matrix), r)
    assert R.shape == (r, matrix.shape[1])
    assert {type(v) for v in (*C.ravel(), *R.ravel())} <= {Fraction}
    assert np.array_equal(C @ R, matrix)
    pivots = [next(j for j, v in enumerate(row) if v) for row in R]
    assert all(before < after for before, after in pairwise(pivots))
    assert np.array_equal(R[:, pivots], np.eye(r, dtype=int))
    assert np.array_equal(C, matrix[:, pivots])


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_numpy_finds_the_same_rank_of_small_integers(m, n, seed):
    matrix = np.random.default_rng(seed).integers(-1, 2, (m, n))
    assert rank(matrix) == np.linalg.matrix_rank(matrix)
    C, R = rank_factorization(matrix)
    assert np.array_equal(C @ R, matrix)


@pytest.mark.parametrize("dtype", [*DTYPES, "i1", "u1", "i8", "u8", "?", "O", ">i4", ">f4"], ids=str)
def test_every_kind_of_array(dtype):
    matrix = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 1]]).astype(dtype)
    C, R = rank_factorization(matrix)
    assert C.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert R.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert rank(matrix) == 2


def test_every_kind_of_sequence():
    assert rank(((1, 2.0), [Fraction(1, 2), np.float32(1)])) == 1
    assert rank([np.array([1, 2]), np.array([2, 4])]) == 1
    assert rank([[ml_dtypes.bfloat16(0.5), np.float16(1)], [np.uint8(1), True]]) == 2


def test_no_integer_is_rounded_and_none_wraps_around():
    """In float64 2^60 + 1 is 2^60; in int64 the products are taken modulo 2^64."""
    big = 2**60
    assert rank([[big, 0.5], [2 * big + 2, 1.0]]) == 2
    assert rank([[big + 1, 0.5], [2 * big + 2, 1.0]]) == 1
    assert rank(np.array([[2**62, 2**62 - 1], [2**62 - 1, 2**62 - 2]])) == 2
    assert rank([[2**40, 0], [0, 2**40]]) == 2
    entries = [[np.int64(2**62), np.int64(2**61)], [np.int64(2**61), np.int64(2**60)]]
    C, R = rank_factorization(entries)
    assert C.tolist() == [[2**62], [2**61]]
    assert R.tolist() == [[1, Fraction(1, 2)]]
    assert type(C[0, 0].numerator) is int


def test_a_float_is_the_rational_number_that_it_is():
    """A third is rounded, so the rows are independent; by their singular values they hardly are."""
    matrix = np.array([[1.0, 1 / 3], [3.0, 1.0]])
    assert rank(matrix) == 2
    assert numerical_rank(matrix) == 1
    assert rank_factorization([[0.1]]).C.tolist() == [[Fraction(0.1)]]


def test_the_matrix_given_is_left_alone():
    matrix = np.array([[0, 2], [4, 6]], dtype=object)
    C, R = rank_factorization(matrix)
    C[:], R[:] = 7, 7
    assert matrix.tolist() == [[0, 2], [4, 6]]


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        ([1, 2], ShapeError, r"got shape \(2,\); give it two axes$"),
        ([[1, 2], [3]], ShapeError, r"^matrix: expected rows of equal length, got shape \(2,\); give it"),
        (np.ones((1, 2, 3)), ShapeError, r"got shape \(1, 2, 3\); give it two axes$"),
        (5, ShapeError, r"got shape \(\);"),
        ([[1, 2], [3, "4"]], DTypeError,
         r"^matrix: expected integers, fractions or floats, got str at \[1, 1\]; convert it$"),
        ([[1j]], DTypeError, r"got complex at \[0, 0\]; convert it$"),
        ([[1, None]], DTypeError, r"got NoneType at \[0, 1\]"),
        (np.ones((1, 1), np.longdouble), DTypeError, "got longdouble at"),
        ([[1, 2], [np.nan, 3]], NonFiniteError,
         r"^matrix: expected finite numbers, got nan at \[1, 0\]; a rank is not defined$"),
        (np.array([[1, np.inf]], np.float16), NonFiniteError, r"got inf at \[0, 1\]"),
        (np.array([[1, -np.inf]], ml_dtypes.bfloat16), NonFiniteError, r"got -inf at \[0, 1\]"),
    ],
)  # fmt: skip
def test_what_is_no_matrix_of_numbers_is_refused(matrix, error, message):
    for function in (rank, rank_factorization):
        with pytest.raises(error, match=message):
            function(matrix)


def test_parameter_counts():
    assert parameter_counts((2, 5), 3) == ParameterCounts(dense=10, factored=21)
    assert parameter_counts((2, 5), 0) == ParameterCounts(dense=10, factored=0)
    assert parameter_counts((2, 5), 3).percentage == 210.0
    counts = parameter_counts((np.int64(2), np.int32(3)), np.int8(1))
    assert counts == ParameterCounts(6, 5)
    assert [type(counts.dense), type(counts.factored)] == [int, int]
    large = parameter_counts((np.int32(2**20), np.int32(2**20)), np.int32(2**20))
    assert large == ParameterCounts(2**40, 2**41)


def test_adapter_parameter_counts():
    """GPT-3 with r = 4 on query and value: two bytes each are the 35 MB of the paper."""
    gpt3 = adapter_parameter_counts([(12288, 12288)] * 192, 4)
    assert gpt3 == ParameterCounts(192 * 12288**2, 192 * 4 * 24576)
    assert 35 < gpt3.factored * 2 / 2**20 < 37
    mixed = adapter_parameter_counts(iter([(4, 6), (3, 5)]), r=2)
    assert mixed == ParameterCounts(24 + 15, 20 + 16)
    assert mixed.percentage == pytest.approx(100 * 36 / 39, rel=2**-51, abs=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, -1), (3,), (1, 2, 3), (2.0, 3), (True, 2)])
def test_shapes_are_checked(shape):
    for call in (lambda: parameter_counts(shape, 1), lambda: adapter_parameter_counts([(1, 1), shape], 1)):
        with pytest.raises(ShapeError) as caught:
            call()
        expected = f"shape: expected two positive integers, got {shape}; give that of a matrix"
        assert str(caught.value) == expected


def test_ranks_are_checked():
    for r in (-1, 1.0, None, True):
        with pytest.raises(
            ConfigError, match=rf"^r: expected an integer of at least 0, got {r}; set the rank$"
        ):
            parameter_counts((2, 2), r)
    for r in (0, "1"):
        with pytest.raises(
            ConfigError, match=rf"^r: expected an integer of at least 1, got {r!r}; set the rank$"
        ):
            adapter_parameter_counts([(2, 2)], r)
    assert adapter_parameter_counts([(2, 2)], 1).factored == 4
    with pytest.raises(ShapeError) as caught:
        adapter_parameter_counts([], 1)
    expected = "shapes: expected (out, in) of each adapted weight, got none; name at least one"
    assert str(caught.value) == expected
