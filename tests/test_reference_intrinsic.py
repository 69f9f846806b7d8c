from fractions import Fraction

import numpy as np
import pytest
from exact_linear import rational
from hypothesis import given
from intrinsic_fixtures import exact_subspace, matrix_of, subspaces

from loracle.reference import (
    ConfigError,
    DTypeError,
    ShapeError,
    Subspace,
    dense_projection,
    fastfood_projection,
    subspace_gradient,
    subspace_parameters,
)


@given(subspaces())
def test_the_point_is_the_formula_exactly(problem):
    subspace, theta, _ = problem
    P, start, theta = matrix_of(subspace.projection), rational(subspace.theta_0), rational(theta)
    inner = subspace.projection.shape[1]
    expected = []
    for i, row in enumerate(P):
        scale = 1 if subspace.layers is None else theta[inner + subspace.layers[i]]
        expected.append(start[i] + scale * sum(p * t for p, t in zip(row, theta[:inner], strict=True)))
    assert subspace_parameters(exact_subspace(subspace), theta).tolist() == expected


@given(subspaces())
def test_the_gradient_is_the_derivative_exactly(problem):
    """theta_D is of second degree in theta_d at most, so a central difference is its derivative."""
    subspace, theta, gradient = problem
    own, theta, gradient = exact_subspace(subspace), rational(theta), rational(gradient)
    found = subspace_gradient(own, theta, gradient)
    assert found.shape == (subspace.dimension,)
    for k in range(subspace.dimension):
        step = rational(np.zeros(len(theta)))
        step[k] = Fraction(1)
        higher, lower = (subspace_parameters(own, theta + sign * step) for sign in (1, -1))
        assert found[k] == np.dot(gradient, higher - lower) / 2


@pytest.mark.parametrize("layers", [None, np.array([0, 0, 1, 2, 2])])
def test_the_start_is_the_model_itself(layers):
    subspace = Subspace(np.arange(5.0), fastfood_projection(5, 2, 0, dtype=np.float64), layers)
    start = subspace.start(np.float64)
    assert start.tolist() == [0, 0] + [1] * (0 if layers is None else 3)
    assert subspace.dimension == len(start)
    assert np.array_equal(subspace_parameters(subspace, start), subspace.theta_0)


def test_numbers_are_rounded_once():
    subspace = Subspace(np.arange(5.0) / 3, dense_projection(5, 2, 0, dtype=np.float64)).astype(np.float32)
    assert subspace.theta_0.dtype == subspace.projection.matrix.dtype == np.float32
    theta = np.ones(2, np.float32)
    assert subspace_parameters(subspace, theta).dtype == np.float32
    assert subspace_gradient(subspace, theta, np.ones(5, np.float32)).dtype == np.float32


SUBSPACE = Subspace(np.zeros(5), dense_projection(5, 2, 0, dtype=np.float64))
LAYERED = Subspace(np.zeros(5), SUBSPACE.projection, np.array([0, 0, 1, 1, 1]))


@pytest.mark.parametrize(
    ("subspace", "theta", "gradient", "kind", "message"),
    [
        (SUBSPACE, np.zeros(3), np.zeros(5), ShapeError, r"theta_d: expected shape \(2,\), got \(3,\)"),
        (LAYERED, np.zeros(2), np.zeros(5), ShapeError, r"theta_d: expected shape \(4,\), got \(2,\)"),
        (SUBSPACE, np.zeros(2), np.zeros(4), ShapeError, r"gradient: expected shape \(5,\), got \(4,\)"),
        (SUBSPACE, np.zeros(2, np.float32), np.zeros(5), DTypeError, "theta_d: expected float64"),
        (SUBSPACE, np.zeros(2), np.zeros(5, np.float32), DTypeError, "gradient: expected float64"),
        (
            Subspace(np.zeros(5, np.float32), SUBSPACE.projection),
            np.zeros(2),
            np.zeros(5),
            DTypeError,
            "P: expected float32 as theta_0 has, got float64",
        ),
        (
            Subspace(np.zeros(4), SUBSPACE.projection),
            np.zeros(2),
            np.zeros(5),
            ShapeError,
            r"theta_0: expected shape \(5,\) to fit P, got \(4,\)",
        ),
        (
            Subspace(np.zeros(5), SUBSPACE.projection, np.zeros(4, int)),
            np.zeros(3),
            np.zeros(5),
            ShapeError,
            r"layers: expected shape \(5,\) to fit P, got \(4,\)",
        ),
        (
            Subspace(np.zeros(5), SUBSPACE.projection, np.array([0, 0, 2, 2, 2])),
            np.zeros(5),
            np.zeros(5),
            ConfigError,
            "layers: expected integers 0, 1, ... without a gap",
        ),
        (
            Subspace(np.zeros(5), SUBSPACE.projection, np.zeros(5)),
            np.zeros(3),
            np.zeros(5),
            ConfigError,
            "layers: expected integers 0, 1, ... without a gap",
        ),
    ],
)
def test_what_does_not_fit_is_named(subspace, theta, gradient, kind, message):
    with pytest.raises(kind, match=message):
        subspace_gradient(subspace, theta, gradient)
    if "gradient" not in message:
        with pytest.raises(kind, match=message):
            subspace_parameters(subspace, theta)


@pytest.mark.parametrize("make", [dense_projection, fastfood_projection])
def test_the_toy_problem_is_solved_by_ten_random_directions_and_not_by_nine(make):
    """Of 1000 numbers each hundred is to have a sum of its own (Li et al., section 2): ten conditions."""
    sums = np.kron(np.eye(10), np.ones(100))
    wanted = np.arange(1.0, 11.0)
    for seed in range(5):
        left = []
        for d in (9, 10):
            P = np.stack([make(1000, d, seed, dtype=np.float64).forward(row) for row in np.eye(d)], axis=1)
            solution = np.linalg.lstsq(sums @ P, wanted)[0]
            left.append(float(np.sum((sums @ P @ solution - wanted) ** 2)))
        assert left[0] > 0.01
        assert left[1] < 1e-12
