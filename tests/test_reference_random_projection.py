import math

import numpy as np
import pytest
from exact_linear import rational
from hypothesis import given, settings
from hypothesis import strategies as st
from intrinsic_fixtures import exact, matrix_of, projections

from loracle.reference import ConfigError, DTypeError, dense_projection, fastfood_projection
from loracle.reference.random_projection import STREAM


def integers(rng, count):
    return np.array([int(v) for v in rng.integers(-9, 10, count)], object)


def test_the_numbers_are_those_of_the_documented_stream():
    drawn = np.random.default_rng((STREAM, 7)).standard_normal((5, 3))
    columns = [drawn[:, k] / math.sqrt(sum(float(v) ** 2 for v in drawn[:, k])) for k in range(3)]
    found = dense_projection(5, 3, 7)
    assert found.shape == (5, 3)
    assert found.matrix.dtype == np.float32
    # The sum of five squares may be rounded in another order: no more than that.
    assert np.abs(found.matrix - np.stack(columns, axis=1)).max() < 2.0**-24
    assert np.array_equal(found.matrix, dense_projection(5, 3, 7).matrix)
    assert not np.array_equal(found.matrix, dense_projection(5, 3, 8).matrix)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_columns_have_length_one(dtype):
    matrix = dense_projection(300, 4, 1, dtype=dtype)
    assert matrix.matrix.dtype == dtype
    lengths = np.linalg.norm(matrix.matrix.astype(np.float64), axis=0)
    assert np.abs(lengths - 1).max() <= 2 * np.finfo(dtype).eps
    assert np.array_equal(matrix.matrix, dense_projection(300, 4, 1, dtype=np.float64).astype(dtype).matrix)


@given(projections(), st.integers(0, 2**32 - 1))
def test_the_projection_is_its_matrix_exactly(projection, seed):
    rng = np.random.default_rng(seed)
    (D, d), P, own = projection.shape, matrix_of(projection), exact(projection)
    theta, gradient = (rational(rng.standard_normal(count)) for count in (d, D))
    assert np.array_equal(own.forward(theta), P @ theta)
    assert np.array_equal(own.adjoint(gradient), P.T @ gradient)


@given(projections(), st.integers(0, 2**32 - 1))
def test_the_adjoint_is_the_transpose_exactly(projection, seed):
    """<P x, y> = <x, P^T y>, over the integers x and y."""
    rng = np.random.default_rng(seed)
    (D, d), own = projection.shape, exact(projection)
    x, y = integers(rng, d), integers(rng, D)
    assert np.dot(own.forward(x), y) == np.dot(x, own.adjoint(y))


@given(projections(), st.integers(0, 2**32 - 1))
def test_it_is_linear_exactly(projection, seed):
    rng = np.random.default_rng(seed)
    (D, d), own = projection.shape, exact(projection)
    for apply, count in ((own.forward, d), (own.adjoint, D)):
        x, y, (a, b) = integers(rng, count), integers(rng, count), integers(rng, 2)
        assert np.array_equal(apply(a * x + b * y), a * apply(x) + b * apply(y))


@settings(max_examples=10)
@given(st.sampled_from([dense_projection, fastfood_projection]), st.integers(0, 99))
def test_lengths_are_kept_in_the_mean_over_the_seeds(make, seed):
    """Within five standard errors of the mean, which the sample itself tells."""
    rng = np.random.default_rng(seed)
    D, d = 37, 9
    theta = rng.standard_normal(d)
    ratios = np.array(
        [np.sum(make(D, d, seed, dtype=np.float64).forward(theta) ** 2) for seed in range(400)]
    ) / np.sum(theta**2)
    error = ratios.std(ddof=1) / math.sqrt(len(ratios))
    assert abs(ratios.mean() - 1) < 5 * error < 0.2


@pytest.mark.parametrize("make", [dense_projection, fastfood_projection])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "D: expected an integer of at least 1, got 0"),
        ((4.0, 1, 0), "D: expected an integer of at least 1, got 4.0"),
        ((4, 5, 0), "d: expected an integer from 1 to 4, the number of parameters, got 5"),
        ((4, 0, 0), "d: expected an integer from 1 to 4, the number of parameters, got 0"),
        ((4, True, 0), "d: expected an integer from 1 to 4, the number of parameters, got True"),
        ((4, 2, -1), "seed: expected an integer of at least 0, got -1"),
        ((4, 2, 0.5), "seed: expected an integer of at least 0, got 0.5"),
    ],
)
def test_what_is_no_size_is_named(make, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(*arguments)


def test_what_is_no_dtype_is_named():
    for make in (dense_projection, fastfood_projection):
        with pytest.raises(DTypeError, match="int32"):
            make(4, 2, 0, dtype=np.int32)
