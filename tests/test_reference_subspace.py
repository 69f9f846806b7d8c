import math
from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import projector, rational, with_singular_values
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    subspace_similarity,
    subspace_similarity_bound,
    subspace_similarity_grid,
    svd_error_bound,
)
from loracle.reference.formats import FORMATS
from loracle.reference.subspace import projector_error

DTYPES = [form.dtype for form in FORMATS]
HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0


def rows(*values):
    return np.array(values, dtype=float)


E = np.eye(4)


@pytest.mark.parametrize(
    ("A1", "A2", "i", "j", "expected"),
    [
        (rows(2 * E[0], E[1]), rows(3 * E[0], E[2]), 1, 1, 1),
        (rows(2 * E[0], E[1]), rows(3 * E[0], E[2]), 1, 2, 1),
        (rows(2 * E[0], E[1]), rows(3 * E[0], E[2]), 2, 2, 1 / 2),
        (rows(E[1], 2 * E[0]), rows(E[2], 3 * E[1]), 1, 1, 0),
        (rows(E[1], 2 * E[0]), rows(E[2], 3 * E[1]), 2, 1, 1),
        (rows(E[1], 2 * E[0]), rows(E[2], 3 * E[1]), 1, 2, 0),
        (rows([3, 4, 0, 0]), rows([1, 0, 0, 0]), 1, 1, 9 / 25),
        (rows([3, 4, 0, 0]), rows([0, -2, 0, 0], [0, 0, 1, 0]), 1, 2, 16 / 25),
        (HADAMARD * rows([4], [3], [2], [1]), rows(3 * E[0], 2 * E[1], E[2]), 2, 3, 3 / 4),
        (HADAMARD * rows([4], [3], [2], [1]), rows(3 * E[0], 2 * E[1], E[2]), 3, 3, 3 / 4),
        (HADAMARD * rows([4], [3], [2], [1]), rows(3 * E[0], 2 * E[1], E[2]), 1, 2, 1 / 2),
        (HADAMARD * rows([4], [3], [2], [1]), rows(3 * E[0], 2 * E[1], E[2]), 4, 2, 1),
    ],
)  # fmt: skip
def test_similarities_by_hand(A1, A2, i, j, expected):
    bound = subspace_similarity_bound(A1, A2, i, j)
    assert bound < 1e-9
    similarity = subspace_similarity(A1, A2, i, j)
    assert type(similarity) is float
    assert abs(similarity - expected) <= bound
    assert abs(subspace_similarity(A2, A1, j, i) - expected) <= bound
    assert subspace_similarity_grid(A1, A2)[i - 1, j - 1] == similarity


@st.composite
def full_rank_pairs(draw, most=6):
    """Small integer matrices (r1, in) and (r2, in) with independent rows."""
    inputs = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pair = []
    for _ in range(2):
        r = draw(st.integers(1, inputs))
        A = rng.integers(-3, 4, (r, inputs))
        A[:, :r] = np.tril(A[:, :r], -1) + np.eye(r, dtype=int)
        pair.append(A[:, rng.permutation(inputs)].astype(float))
    return pair


@settings(max_examples=40)
@given(full_rank_pairs())
def test_of_whole_row_spaces_it_is_the_trace_of_the_projectors_product(pair):
    """P = A^T (A A^T)^-1 A is rational, so the exact value is."""
    A1, A2 = pair
    r1, r2 = len(A1), len(A2)
    exact = (projector(rational(A1)) * projector(rational(A2))).sum() / Fraction(min(r1, r2))
    bound = subspace_similarity_bound(A1, A2, r1, r2)
    assert bound < 1e-6
    assert abs(Fraction(subspace_similarity(A1, A2, r1, r2)) - exact) <= Fraction(bound)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_of_given_singular_vectors(k1, k2, inputs, seed):
    """Matrices of known singular vectors; rounding their entries counts in the bound's own slack."""
    rng = np.random.default_rng(seed)
    k1, k2 = min(k1, inputs), min(k2, inputs)
    _, M1, V1 = with_singular_values(rng, [29, 13, 5, 2][:k1], 5, inputs)
    _, M2, V2 = with_singular_values(rng, [31, 9, 4][:k2], 4, inputs)
    A1, A2 = (np.array([[float(v) for v in row] for row in M]) for M in (M1, M2))
    grid = subspace_similarity_grid(A1, A2)
    assert grid.shape == (k1, k2)
    for i in range(1, k1 + 1):
        for j in range(1, k2 + 1):
            exact = ((V1[:i] @ V2[:j].T) ** 2).sum() / Fraction(min(i, j))
            bound = subspace_similarity_bound(A1, A2, i, j)
            assert bound < 1e-8
            assert abs(Fraction(float(grid[i - 1, j - 1])) - exact) <= Fraction(bound)


@settings(max_examples=25)
@given(full_rank_pairs(), st.integers(0, 2**32 - 1))
def test_identities(pair, seed):
    """1 of a space with itself, in [0, 1], and the same after another choice of the rows of either."""
    A1, A2 = pair
    r1, r2 = len(A1), len(A2)
    assert 1 - subspace_similarity(A1, A1, r1, r1) <= subspace_similarity_bound(A1, A1, r1, r1)
    grid = subspace_similarity_grid(A1, A2)
    assert grid.shape == (r1, r2)
    assert grid.dtype == np.float64
    assert (grid >= 0).all()
    assert (grid <= 1).all()
    rng = np.random.default_rng(seed)
    invertible = np.tril(rng.integers(-1, 2, (r1, r1)), -1) + np.eye(r1)
    mixed = rng.permutation(invertible) @ A1
    bounds = [subspace_similarity_bound(A, A2, r1, r2) for A in (A1, mixed)]
    assert abs(subspace_similarity(mixed, A2, r1, r2) - grid[-1, -1]) <= sum(bounds)


def test_orthogonal_subspaces_and_a_whole_space():
    A1, A2 = rows([1, 2, 0, 0, 0], [2, -3, 0, 0, 0]), rows([0, 0, 1, 1, 0], [0, 0, 4, 0, 1], [0, 0, 0, 0, 7])
    assert subspace_similarity_grid(A1, A2).max() <= subspace_similarity_bound(A1, A2, 2, 3)
    whole = np.random.default_rng(0).standard_normal((5, 5))
    assert 1 - subspace_similarity(whole, A2, 5, 2) <= subspace_similarity_bound(whole, A2, 5, 2)


def test_float32_and_another_direction_are_outside_the_bound():
    rng = np.random.default_rng(3)
    A1, A2 = rng.standard_normal((3, 6)), rng.standard_normal((4, 6))
    narrow = subspace_similarity_grid(A1.astype(np.float32), A2)
    for i in range(1, 4):
        for j in range(1, 5):
            similarity, bound = subspace_similarity(A1, A2, i, j), subspace_similarity_bound(A1, A2, i, j)
            assert abs(similarity - narrow[i - 1, j - 1]) > bound
            assert abs(similarity - subspace_similarity(A1[::, ::-1], A2, i, j)) > bound


def test_the_bound_says_nothing_where_the_subspace_is_arbitrary():
    equal, A2 = rows(2 * E[0], 2 * E[1], E[2]), rows(3 * E[0])
    assert subspace_similarity_bound(equal, A2, 1, 1) == 1
    assert subspace_similarity_bound(A2, equal, 1, 1) == 1
    assert subspace_similarity_bound(equal, A2, 2, 1) < 1e-11
    close = rows(2 * E[0], (2 - 1e-13) * E[1])
    assert subspace_similarity_bound(close, A2, 1, 1) == 1


def test_the_bound_by_hand():
    """e = 3 p(2, 4) u sigma_1 = 3 * 100 * 4 * sqrt(8) u * 8 and, of one row, 3 * 100 * 4 * 2 u * 3."""
    A1, A2 = rows(8 * E[0], 2 * E[1]), rows(3 * E[2])
    relative1, relative2 = (svd_error_bound(shape, 1.0) for shape in ((2, 4), (1, 4)))
    moved1 = {1: relative1 * 8 * (2 / 6 + 1 / 8), 2: relative1 * 8 * (2 / 2 + 1 / 8)}
    moved2 = relative2 * (2 + 1)
    for i in (1, 2):
        expected = moved1[i] + moved2 * math.sqrt(i) + relative1 + relative2
        assert expected < subspace_similarity_bound(A1, A2, i, 1) < expected * (1 + 2**-20)
    both = (moved1[2] * math.sqrt(2) * 2) / 2 + 2 * relative1
    assert both < subspace_similarity_bound(A1, A1, 2, 2) < both * (1 + 2**-20)

    # Of a whole space, whose projector is known; on either side.
    whole = rows([8, 0], [0, 2])
    relative3, relative4 = (svd_error_bound(shape, 1.0) for shape in ((2, 2), (1, 2)))
    expected = (relative3 + relative4 * 3 * math.sqrt(2)) + relative3 + relative4
    for bound in (
        subspace_similarity_bound(whole, rows([3, 0]), 2, 1),
        subspace_similarity_bound(rows([3, 0]), whole, 1, 2),
    ):
        assert expected < bound < expected * (1 + 2**-20)


def test_the_bound_by_hand_where_two_errors_are_large():
    """Singular values 2 and 2 - 2^-37 of the same matrix twice: the product of the errors counts."""
    A1 = rows(2 * E[0], (2 - 2.0**-37) * E[1])
    relative = svd_error_bound((2, 4), 1.0)
    moved = 2 * relative * (2 / (2.0**-37 - 2 * relative) + 1 / 2)
    assert 0.1 < moved < 0.3
    expected = 2 * moved + moved**2 + 2 * relative
    # The singular values themselves may be off by a few units in the last place.
    slack = 8 * 2.0**-51 / (2.0**-37 - 2 * relative)
    assert abs(subspace_similarity_bound(A1, A1, 1, 1) / expected - 1) < slack


def test_projector_errors_by_hand():
    assert projector_error([4.0, 2.0], 2, 0.5, 2) == 0.125
    assert projector_error([4.0, 2.0], 1, 0.5, 2) == 0.5 * (2 / 1.5 + 0.25)
    assert projector_error([4.0, 2.0], 2, 0.5, 3) == 0.5 * (2 / 1.5 + 0.25)
    assert projector_error([4.0, 2.0, 1.0], 1, 2.0, 3) == math.inf
    assert projector_error([4.0, 2.0, 1.0], 1, 3.0, 3) == math.inf
    assert projector_error([4.0, 2.0, 1.0], 1, 1.0, 3) == 2.25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_work_is_done_in_float64_whatever_the_dtype(dtype):
    rng = np.random.default_rng(1)
    A1, A2 = rng.standard_normal((2, 5)).astype(dtype), rng.standard_normal((3, 5)).astype(dtype)
    wide = A1.astype(np.float64), A2.astype(np.float64)
    assert subspace_similarity_grid(A1, A2).tolist() == subspace_similarity_grid(*wide).tolist()
    assert subspace_similarity_bound(A1, A2, 2, 2) == subspace_similarity_bound(*wide, 2, 2)


@pytest.mark.parametrize("function", [subspace_similarity, subspace_similarity_bound])
def test_no_more_directions_than_the_numerical_rank(function):
    """Beyond it they are arbitrary: here A1 has rank 1 of 2, and A2 rank 2 of 3, but for a rounding."""
    A1, A2 = rows([1, 2, 3], [2, 4, 6]), rows([1, 0, 0], [0, 1, 0], [1 / 3, 2 / 3, 1e-17])
    assert subspace_similarity_grid(A1, A2).shape == (1, 2)
    for i in (0, 2, -1, 1.0, True):
        with pytest.raises(ConfigError) as caught:
            function(A1, A2, i, 1)
        expected = f"i: expected an integer from 1 to 1, the numerical rank of A1, got {i!r}; choose another"
        assert str(caught.value) == expected
    with pytest.raises(ConfigError) as caught:
        function(A1, A2, 1, 3)
    expected = "j: expected an integer from 1 to 2, the numerical rank of A2, got 3; choose another"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "function",
    [
        subspace_similarity_grid,
        lambda A1, A2: subspace_similarity(A1, A2, 1, 1),
        lambda A1, A2: subspace_similarity_bound(A1, A2, 1, 1),
    ],
)
def test_what_does_not_fit_is_refused(function):
    A1, A2 = np.ones((2, 4)), np.ones((3, 5))
    with pytest.raises(ShapeError) as caught:
        function(A1, A2)
    expected = "A2: expected (r, 4) to fit A1 (2, 4), got (3, 5); compare adapters of one weight"
    assert str(caught.value) == expected
    with pytest.raises(ShapeError, match=r"^A1: expected a matrix"):
        function(A1[0], A2)
    with pytest.raises(DTypeError, match=r"^A2: expected one of"):
        function(A1, A1.astype(int))
    with pytest.raises(NonFiniteError, match=r"^A2: expected finite numbers, got nan"):
        function(A1, A1 * np.nan)
    for pair, name in (((A1, A1 * 1.7e308), "A2"), ((A1 * 1.7e308, A1), "A1")):
        with pytest.raises(NonFiniteError, match=rf"^{name}: expected singular values of at most"):
            function(*pair)
