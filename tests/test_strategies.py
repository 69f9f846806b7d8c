from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_linear import GRADIENTS, backward, error, forward, rational
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARRAYS, LoraProblem, exact_limit, exact_problems, lora_problems

from loracle.reference import round_fraction
from loracle.reference.formats import FORMATS

DTYPES = [form.dtype for form in FORMATS]


@given(st.sampled_from(DTYPES).flatmap(exact_problems))
def test_no_partial_sum_of_the_exact_tier_leaves_the_dtype(problem):
    dtype = problem.x.dtype
    magnitudes = LoraProblem(
        *(np.abs(getattr(problem, name).astype(np.float64)) for name in ARRAYS), abs(problem.scaling)
    )
    gradients = backward(magnitudes)
    sums = [forward(magnitudes), *(getattr(gradients, name) for name in GRADIENTS)]
    unscaled = LoraProblem(*(getattr(magnitudes, name) for name in ARRAYS), 1.0)
    sums += [forward(unscaled), backward(unscaled).dA, backward(unscaled).dB]
    for array in (*sums, *(getattr(magnitudes, name) for name in ARRAYS)):
        assert (array <= exact_limit(dtype)).all()
        assert np.array_equal(array * 4, np.round(array * 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quarters_up_to_the_exact_limit_are_numbers_of_the_dtype(dtype):
    limit = exact_limit(dtype)
    values = np.array([limit, limit - 0.25, 0.25, limit / 2 + 0.25])
    assert np.array_equal(values.astype(dtype).astype(float), values)
    assert Fraction(float(round_fraction(Fraction(limit) + Fraction(1, 4), dtype))) != Fraction(
        limit
    ) + Fraction(1, 4)


def test_the_exact_tier_uses_every_sort_of_number():
    seen = set()

    @given(exact_problems(ml_dtypes.bfloat16))
    def look(problem):
        seen.update(float(v) for name in ARRAYS for v in getattr(problem, name).ravel())
        seen.add(("scaling", problem.scaling))

    look()
    assert {-1.0, 0.0, 1.0, 2.0, ("scaling", 0.25), ("scaling", 2.0)} <= seen


@given(lora_problems(most=5, dtype=np.float32))
def test_the_derived_tier_fits_together(problem):
    assert {getattr(problem, name).dtype for name in ARRAYS} == {np.dtype(np.float32)}
    assert forward(problem).shape == problem.dy.shape
    assert problem.dropout.shape == problem.x.shape
    assert max(*problem.W0.shape, *problem.A.shape) <= 5


def test_error_is_exact_where_float64_would_cancel():
    exact = rational([1.0]) + rational([2.0**-80])
    assert 2.0**-80 <= error([1.0], exact)[0] <= 2.0**-80 * 1.001
