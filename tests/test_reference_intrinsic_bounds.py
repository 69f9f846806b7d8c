import numpy as np
import pytest
from exact_linear import error, rational
from hypothesis import given, settings
from hypothesis import strategies as st
from intrinsic_fixtures import exact_subspace, subspaces

from loracle.reference import (
    Precision,
    Subspace,
    fastfood_projection,
    subspace_gradient,
    subspace_gradient_bound,
    subspace_parameters,
    subspace_parameters_bound,
)


@settings(max_examples=40)
@given(st.data(), st.sampled_from([np.float16, np.float32, np.float64]))
def test_an_evaluation_is_within_the_bound(data, dtype):
    subspace, theta, gradient = data.draw(subspaces(dtype))
    own, exact_theta = exact_subspace(subspace), rational(theta)
    point = error(subspace_parameters(subspace, theta), subspace_parameters(own, exact_theta))
    assert np.all(point <= subspace_parameters_bound(subspace, theta, dtype))
    pulled = error(
        subspace_gradient(subspace, theta, gradient),
        subspace_gradient(own, exact_theta, rational(gradient)),
    )
    bound = subspace_gradient_bound(subspace, theta, gradient, dtype)
    assert bound.shape == pulled.shape
    assert np.all(pulled <= bound)


@pytest.mark.parametrize("layers", [None, np.arange(32) % 2])
def test_a_lower_precision_is_seen(layers):
    """One that rounds theta_d to float16 is far outside the bound of float32, but within float16's own."""
    rng = np.random.default_rng(3)
    subspace = Subspace(np.zeros(32, np.float32), fastfood_projection(32, 8, 1), layers)
    theta = rng.standard_normal(subspace.dimension).astype(np.float32)
    gradient = rng.standard_normal(32).astype(np.float32)
    own = exact_subspace(subspace)
    low = theta.astype(np.float16).astype(np.float32)
    point = error(subspace_parameters(subspace, low), subspace_parameters(own, rational(theta)))
    assert np.any(point > subspace_parameters_bound(subspace, theta, np.float32))
    assert np.all(point <= subspace_parameters_bound(subspace, theta, Precision(np.float16)))
    rounded = gradient.astype(np.float16).astype(np.float32)
    exact = subspace_gradient(own, rational(theta), rational(gradient))
    pulled = error(subspace_gradient(subspace, theta, rounded), exact)
    assert np.any(pulled > subspace_gradient_bound(subspace, theta, gradient, np.float32))
    assert np.all(pulled <= subspace_gradient_bound(subspace, theta, gradient, np.float16))


def test_a_bound_grows_with_the_numbers():
    subspace = Subspace(np.zeros(16), fastfood_projection(16, 4, 1, dtype=np.float64))
    theta, gradient = np.ones(4), np.ones(16)
    assert np.all(
        subspace_parameters_bound(subspace, 2 * theta, np.float64)
        > 1.9 * subspace_parameters_bound(subspace, theta, np.float64)
    )
    assert np.all(
        subspace_gradient_bound(subspace, theta, 2 * gradient, np.float64)
        > 1.9 * subspace_gradient_bound(subspace, theta, gradient, np.float64)
    )
