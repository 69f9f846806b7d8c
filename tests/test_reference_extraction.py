import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_matrices import frobenius, rational, singular_values_above
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import matrices

from loracle.reference import (
    ConfigError,
    DTypeError,
    ExtractedAdapter,
    LowRank,
    NonFiniteError,
    ShapeError,
    extract_adapter,
    merge,
    rank_for_energy,
    svd_error_bound,
)
from loracle.reference.formats import FORMATS

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [form.dtype for form in FORMATS]
SCALINGS = [1.0, 2.0, 1 / 3, -1.7, 16 / math.sqrt(8)]


def missed(W0, W, adapter):
    """What the adapter misses of the tuned weight, exactly."""
    return rational(W) - rational(W0) - rational(adapter.B) @ rational(adapter.A) * Fraction(adapter.scaling)


W0 = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
W = W0 + np.array([[0.0, -9.0, 0.0], [4.0, 0.0, 0.0]])


def test_an_adapter_by_hand():
    """The difference has singular values 9 and 4; with scaling 1/4 the factors have 6 = 3 / sqrt(1/4)."""
    found = extract_adapter(W0, W, r=1, scaling=0.25)
    bound = found.error_bound
    assert isinstance(found, ExtractedAdapter)
    assert isinstance(found.adapter, LowRank)
    assert found.r == 1
    assert found.adapter.scaling == 0.25
    assert [found.adapter.bias, found.adapter.dropout, found.adapter.rows] == [None] * 3
    assert (found.adapter.B.shape, found.adapter.A.shape) == ((2, 1), (1, 3))
    assert np.abs(np.abs(found.adapter.B) - [[6], [0]]).max() <= bound
    assert np.abs(np.abs(found.adapter.A) - [[0, 6, 0]]).max() <= bound
    assert np.abs(found.adapter.B @ found.adapter.A * 0.25 - [[0, -9, 0], [0, 0, 0]]).max() <= bound
    assert np.abs(found.singular_values - [9, 4]).max() <= bound
    assert abs(found.frobenius_residual - 4) <= bound
    assert abs(found.spectral_residual - 4) <= bound
    assert abs(found.relative_residual - 4 / math.hypot(9, 4)) <= bound
    assert bound == svd_error_bound((2, 3), found.singular_values[0])
    assert extract_adapter(W0, W, r=1).adapter.scaling == 1.0


@settings(max_examples=30)
@given(matrices(most=6), matrices(most=6), st.sampled_from(SCALINGS), st.data())
def test_the_residuals_reported_are_those_of_the_adapter(before, after, scaling, data):
    m, n = (min(pair) for pair in zip(before.shape, after.shape, strict=True))
    before, after = before[:m, :n], after[:m, :n]
    r = data.draw(st.integers(1, min(m, n)))
    found = extract_adapter(before, after, r=r, scaling=scaling)
    bound = found.error_bound
    assert found.r == r
    assert found.adapter.scaling == scaling
    missing = missed(before, after, found.adapter)
    assert abs(frobenius(missing) - found.frobenius_residual) <= bound
    above, below = (Fraction(found.spectral_residual) + sign * Fraction(bound) for sign in (1, -1))
    assert singular_values_above(missing, above) == 0
    assert below <= 0 or singular_values_above(missing, below) > 0
    total = frobenius(rational(after) - rational(before))
    assert abs(found.relative_residual * total - found.frobenius_residual) <= bound
    norms = [np.linalg.norm(found.adapter.B, axis=0), np.linalg.norm(found.adapter.A, axis=1)]
    assert np.abs(norms[0] ** 2 - norms[1] ** 2).max() * abs(scaling) <= bound


@settings(max_examples=30)
@given(*[st.integers(1, 6)] * 2, st.integers(1, 3), st.sampled_from(SCALINGS), st.integers(0, 2**32 - 1))
def test_a_merged_adapter_is_found_again(outputs, inputs, r, scaling, seed):
    """A difference of rank r or less is all in the adapter, within the bound; here the merge is exact."""
    rng = np.random.default_rng(seed)
    r = min(r, outputs, inputs)
    A, B = rng.integers(-4, 5, (r, inputs)) * 1.0, rng.integers(-4, 5, (outputs, r)) * 1.0
    before = rng.integers(-99, 100, (outputs, inputs)) * 1.0
    after = merge(before, A, B, 0.5)
    found = extract_adapter(before, after, r=r, scaling=scaling)
    assert frobenius(missed(before, after, found.adapter)) <= found.error_bound
    assert max(found.frobenius_residual, found.spectral_residual) <= found.error_bound


def test_float32_and_a_wrong_scaling_are_outside_the_bound():
    rng = np.random.default_rng(0)
    before, after = rng.standard_normal((2, 6, 5))
    found = extract_adapter(before, after, r=5)
    narrow = extract_adapter(before.astype(np.float32), after.astype(np.float32), r=5).adapter
    doubled = LowRank(found.adapter.A, found.adapter.B, 2.0)
    assert frobenius(missed(before, after, found.adapter)) <= found.error_bound
    for wrong in (narrow, doubled):
        assert frobenius(missed(before, after, wrong)) > found.error_bound


@pytest.mark.parametrize(
    ("energy", "r"), [(None, 3), (0.99, 3), (0.9, 2), (0.5, 1), (1.0, 4), (1e-3, 1), (np.float32(0.5), 1)]
)
def test_the_rank_by_a_share_of_the_energy(energy, r):
    """Singular values 8, 4, 2 and 0.5: energies 64, 16, 4 and 0.25 of 84.25."""
    before = np.ones((4, 5))
    after = before.copy()
    after[range(4), [3, 0, 4, 1]] += [2, 8, 0.5, 4]
    found = extract_adapter(before, after, energy=energy)
    assert found.r == r == rank_for_energy(found.singular_values, energy or 0.99)
    assert found.frobenius_residual**2 <= (1 - (energy or 0.99)) * 84.25 + found.error_bound
    same = extract_adapter(before, after, r=r)
    assert same.adapter.A.tolist() == found.adapter.A.tolist()
    assert same.adapter.B.tolist() == found.adapter.B.tolist()


def test_no_difference_gives_an_adapter_of_zeros():
    for found in (extract_adapter(W0, W0), extract_adapter(W0, W0, r=1, scaling=2.0)):
        assert found.r == 1
        assert not found.adapter.A.any()
        assert not found.adapter.B.any()
        residuals = (found.frobenius_residual, found.relative_residual, found.spectral_residual)
        assert residuals == (0, 0, 0)
        assert found.error_bound == 0


@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("after", DTYPES, ids=str)
def test_the_difference_is_formed_in_float64(before, after):
    """1 + 2^-7 less 1 - 2^-8 and the like, which the dtypes themselves would round or lose."""
    W0 = np.array([[1 - 2.0**-8, 3e-4], [100.0, -2.0]]).astype(before)
    W = np.array([[1 + 2.0**-7, 1.0], [1e-3, 7.0]]).astype(after)
    found = extract_adapter(W0, W, r=2)
    for array in (found.adapter.A, found.adapter.B, found.singular_values):
        assert array.dtype == np.float64
    assert frobenius(missed(W0, W, found.adapter)) <= found.error_bound
    wide = extract_adapter(W0.astype(np.float64), W.astype(np.float64), r=2)
    assert wide.adapter.A.tolist() == found.adapter.A.tolist()
    assert wide.adapter.B.tolist() == found.adapter.B.tolist()


def test_the_difference_of_float16_weights_is_exact():
    """From the smallest subnormal to the largest number: 2^-24 to 65504."""
    tiny, large = np.float16(2.0**-24), np.float16(65504)
    found = extract_adapter(np.array([[tiny]]), np.array([[large]]), r=1)
    assert abs(found.singular_values[0] - (65504 - 2.0**-24)) <= found.error_bound
    assert float(large) - float(tiny) == Fraction(65504) - Fraction(1, 2**24)


def refused(error, message, *arguments, **options):
    with pytest.raises(error) as caught:
        extract_adapter(*arguments, **options)
    assert str(caught.value) == message


def test_options_are_checked():
    both = "energy: expected none beside r, got 0.5 and r 1; choose one"
    refused(ConfigError, both, W0, W, r=1, energy=0.5)
    for r in (0, 3, 1.0, True):
        message = f"r: expected an integer from 1 to 2, the smaller side of (2, 3), got {r!r}; choose another"
        refused(ConfigError, message, W0, W, r=r)
    for energy in (0, 1.5, "1"):
        message = f"energy: expected a number above 0 and at most 1, got {energy!r}; choose another"
        refused(ConfigError, message, W0, W, energy=energy)
    for scaling in (0.0, math.nan, -math.inf):
        message = f"scaling: expected a finite number other than 0, got {scaling}; check lora_alpha"
        refused(ConfigError, message, W0, W, r=1, scaling=scaling)


def test_weights_are_checked_and_named():
    shapes = "tuned q_proj: expected (2, 3) as q_proj has, got (3, 2); is it of another model?"
    refused(ShapeError, shapes, W0, W.T, r=1, name="q_proj")
    for arguments, error, start in [
        ((W0[0], W), ShapeError, "^W0: expected a matrix"),
        ((W0, W.astype(int)), DTypeError, "^tuned W0: expected one of"),
        ((W0.astype(int), W), DTypeError, "^W0: expected one of"),
        ((W0, W * np.nan), NonFiniteError, "^tuned W0: expected finite numbers, got nan"),
        ((W0 * np.inf, W), NonFiniteError, "^W0: expected finite numbers, got inf"),
    ]:
        with pytest.raises(error, match=start):
            extract_adapter(*arguments, r=1)
    huge = np.array([[1.0, 1e308]])
    overflow = "tuned W0 - W0: expected finite numbers, got an overflow at [0, 1]; check both"
    refused(NonFiniteError, overflow, -huge, huge)
    too_large = (
        "tuned W0 - W0: expected singular values of at most 1.7977e+308, got an overflow; scale it down"
    )
    refused(NonFiniteError, too_large, np.zeros((2, 2)), np.full((2, 2), 1.5e308))
