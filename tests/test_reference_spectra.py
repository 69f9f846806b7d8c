import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import frobenius, rational, singular_values_above
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    Svd,
    delta_singular_values,
    delta_svd,
    delta_svd_error_bound,
    effective_rank,
    gamma,
    rank_for_energy,
    stable_rank,
)
from loracle.reference.formats import FORMATS
from loracle.reference.spectra import size_of_factors

DTYPES = [form.dtype for form in FORMATS]
U53 = 2.0**-53


@st.composite
def adapters(draw, most=6):
    """Gaussian factors, r possibly above in and out, of any of a few sizes and scalings."""
    outputs, inputs, r = (draw(st.integers(1, most)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1.0, 1e-3, 50.0]))
    scaling = draw(st.sampled_from([1.0, 2.0, 1 / 3, -1.7]))
    return size * rng.standard_normal((r, inputs)), rng.standard_normal((outputs, r)), scaling


def delta(A, B, scaling):
    return rational(B) @ rational(A) * Fraction(scaling)


@pytest.mark.parametrize(
    ("A", "B", "scaling", "expected"),
    [
        ([[3.0, 4.0]], [[0.0], [2.0], [0.0]], 1.0, [10]),
        ([[3.0, 4.0]], [[0.0], [2.0], [0.0]], -0.5, [5]),
        ([[3.0, 4.0]], [[0.0], [2.0], [0.0]], 0.0, [0]),
        ([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]], [[2.0, 0.0], [0.0, 4.0]], 1.0, [6, 4]),
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0, 0.0]], 1.0, [2]),
        ([[1.0, 0.0], [1.0, 0.0]], [[1.0, -1.0], [2.0, -2.0]], 1.0, [0, 0]),
    ],
)
def test_singular_values_by_hand(A, B, scaling, expected):
    A, B = np.array(A), np.array(B)
    s = delta_singular_values(A, B, scaling)
    assert s.shape == (len(expected),)
    assert np.abs(s - expected).max() <= delta_svd_error_bound(A, B, scaling)
    assert (s >= 0).all()


@settings(max_examples=30)
@given(adapters())
def test_the_decomposition_is_that_of_the_update(adapter):
    """As the three factors multiply to it, are orthonormal, and each singular value is where it should be."""
    A, B, _ = adapter
    found, bound, exact = delta_svd(*adapter), delta_svd_error_bound(*adapter), delta(*adapter)
    k = min(*B.shape, A.shape[1])
    assert isinstance(found, Svd)
    assert [part.shape for part in found] == [(len(B), k), (k,), (k, A.shape[1])]
    assert (found.s[1:] <= found.s[:-1]).all()
    product = rational(found.U) * rational(found.s) @ rational(found.Vh)
    assert frobenius(product - exact) <= bound
    size = size_of_factors(*adapter)
    for basis in (rational(found.U.T), rational(found.Vh)):
        assert frobenius(basis @ basis.T - rational(np.eye(k))) <= bound / size
    for number, s in enumerate(found.s):
        assert singular_values_above(exact, Fraction(float(s)) + Fraction(bound)) <= number
        assert singular_values_above(exact, Fraction(float(s)) - Fraction(bound)) > number
    assert delta_singular_values(*adapter).tolist() == found.s.tolist()


def test_the_bound_catches_float32_and_a_wrong_scaling():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((3, 6)), rng.standard_normal((5, 3))
    found, bound = delta_svd(A, B, 2.0), delta_svd_error_bound(A, B, 2.0)
    narrow = delta_svd(A.astype(np.float32), B.astype(np.float32), 2.0)
    for other in (narrow, delta_svd(A, B, 2.0000001), delta_svd(A, B, -2.0)):
        assert frobenius(rational(other.U * other.s) @ rational(other.Vh) - delta(A, B, 2.0)) > bound
    assert np.abs(found.s - 2 * delta_singular_values(A, B)).max() <= bound


def test_the_default_scaling_is_one():
    A, B = np.array([[3.0, 4.0]]), np.array([[2.0], [1.0]])
    assert delta_singular_values(A, B).tolist() == delta_singular_values(A, B, 1.0).tolist()
    assert delta_svd(A, B).s.tolist() == delta_svd(A, B, 1.0).s.tolist()
    assert delta_svd_error_bound(A, B) == delta_svd_error_bound(A, B, 1.0)


def test_the_bound_by_hand():
    """Sizes 5 and 2, |scaling| 3; p(4, 1) = 800, p(1, 9) = 2700, p(1, 1) = 100."""
    A, B = np.array([[3.0, 4.0, *[0.0] * 7]]), np.array([[0.0], [2.0], [0.0], [0.0]])
    assert size_of_factors(A, B, -3.0) == 30
    expected = 3 * (800 + 2700 + 100) * U53 * 30
    assert expected < delta_svd_error_bound(A, B, -3.0) < expected * (1 + 2**-20)
    # r = 3 above out = 2: the small matrix is (2, 3); p(2, 3) sqrt(6) twice, p(3, 4) sqrt(12).
    A, B = np.eye(3, 4), np.eye(2, 3)
    expected = 3 * (2 * 300 * math.sqrt(6) + 400 * math.sqrt(12)) * U53 * math.sqrt(6)
    assert expected < delta_svd_error_bound(A, B, 1.0) < expected * (1 + 2**-20)
    # The transpose: r = 3 above in = 2.
    assert expected < delta_svd_error_bound(B.T, A.T, 1.0) < expected * (1 + 2**-20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_work_is_done_in_float64_whatever_the_dtype(dtype):
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((2, 5)).astype(dtype), rng.standard_normal((4, 2)).astype(dtype)
    wide = A.astype(np.float64), B.astype(np.float64)
    for found, expected in zip(delta_svd(A, B, 0.3), delta_svd(*wide, 0.3), strict=True):
        assert found.dtype == np.float64
        assert found.tolist() == expected.tolist()
    assert delta_svd_error_bound(A, B, 0.3) == delta_svd_error_bound(*wide, 0.3)


@pytest.mark.parametrize("function", [delta_svd, delta_singular_values, delta_svd_error_bound])
def test_factors_that_do_not_fit_are_refused(function):
    A, B = np.ones((2, 5)), np.ones((4, 2))
    with pytest.raises(ShapeError) as caught:
        function(A, B.T)
    assert str(caught.value) == "B: expected (out, 2) to fit A (2, 5), got (2, 4); is it transposed?"
    with pytest.raises(ShapeError, match=r"^A: expected a matrix"):
        function(A[0], B)
    with pytest.raises(DTypeError, match=r"^B: expected one of"):
        function(A, B.astype(int))
    with pytest.raises(NonFiniteError, match=r"^B: expected finite numbers, got nan"):
        function(A, B * np.nan)
    for scaling in (math.nan, math.inf):
        with pytest.raises(NonFiniteError) as caught:
            function(A, B, scaling)
        assert str(caught.value) == f"scaling: expected a finite number, got {scaling}; check lora_alpha"


def test_an_overflow_of_the_update_is_refused():
    A, B = np.full((1, 3), 1e200), np.full((2, 1), 1e200)
    with pytest.raises(NonFiniteError) as caught:
        delta_svd(A, B)
    expected = "the product of B and A: expected finite numbers, got an overflow; scale them down"
    assert str(caught.value) == expected
    A, B = np.eye(2) * 1e154, np.ones((2, 2)) * 1e154
    with pytest.raises(NonFiniteError, match=r"^the product of B and A: expected singular values of at most"):
        delta_svd(A, B)
    with pytest.raises(NonFiniteError, match=r"^delta: expected singular values of at most"):
        delta_svd(np.eye(1) * 1e200, np.eye(1), 1e200)


spectra = st.lists(
    st.floats(0, 1e6) | st.sampled_from([0.0, 1.0, 1e-300, 1e300]), min_size=1, max_size=12
).map(lambda values: np.array(sorted(values, reverse=True)))


@given(spectra)
def test_effective_rank_to_the_accuracy_that_is_promised(s):
    found = effective_rank(s)
    if s[0] == 0:
        assert found == 0
        return
    with localcontext(prec=60):
        values = [Decimal(float(v)) for v in s if v]
        shares = [v / sum(values) for v in values]
        entropy = -sum(p * p.ln() for p in shares)
        exact = entropy.exp()
        bound = Decimal(gamma(10, U53)) * (2 + Decimal(len(s)).ln()) * exact
        assert abs(Decimal(found) - exact) <= bound


@given(spectra)
def test_stable_rank_to_the_accuracy_that_is_promised(s):
    found = stable_rank(s)
    exact = sum(Fraction(float(v)) ** 2 for v in s) / Fraction(float(s[0])) ** 2 if s[0] else Fraction(0)
    assert abs(Fraction(found) - exact) <= Fraction(gamma(4, U53)) * exact


@given(spectra, st.floats(0, 1, exclude_min=True))
def test_rank_for_energy_is_the_smallest_rank_with_that_share(s, share):
    energies = [Fraction(float(v)) ** 2 for v in s]
    r = rank_for_energy(s, share)
    assert sum(energies[:r]) >= Fraction(share) * sum(energies)
    assert r == 0 or sum(energies[: r - 1]) < Fraction(share) * sum(energies)
    assert rank_for_energy(s, 1) == np.count_nonzero(s)
    assert rank_for_energy(s) == rank_for_energy(s, 0.99)


@pytest.mark.parametrize(
    ("s", "effective", "stable", "energy"),
    [
        ([1.0], 1, 1, 1),
        ([5.0, 5.0, 5.0, 5.0], 4, 4, 4),
        ([7.0, 7.0, 0.0], 2, 2, 2),
        ([4.0, 2.0, 2.0], 2 * math.sqrt(2), 1.5, 3),
        ([10.0, 1.0], 11 / 10 ** (10 / 11), 1.01, 1),
        ([9.0, 1.0], 10 / 9**0.9, 82 / 81, 2),
        ([0.0, 0.0], 0, 0, 0),
        ([1e-320], 1, 1, 1),
    ],
)
def test_ranks_by_hand(s, effective, stable, energy):
    """Of 4, 2, 2 the shares are 1/2, 1/4, 1/4: an entropy of 3/2 log 2."""
    s = np.array(s)
    assert abs(effective_rank(s) - effective) <= gamma(20, U53) * (2 + math.log(len(s))) * effective
    assert abs(stable_rank(s) - stable) <= gamma(8, U53) * stable
    assert rank_for_energy(s) == energy
    assert [type(f(s)) for f in (effective_rank, stable_rank, rank_for_energy)] == [float, float, int]


def test_shares_at_the_border():
    assert rank_for_energy(np.array([2.0, 2.0]), 0.5) == 1
    assert rank_for_energy(np.array([2.0, 2.0]), math.nextafter(0.5, 1)) == 2
    assert rank_for_energy(np.array([2.0, 1e-30]), 1.0) == 2
    assert rank_for_energy(np.array([2.0, 1e-30]), np.float32(1)) == 2
    assert rank_for_energy(np.array([2.0, 1e-30]), 1e-300) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_spectrum_may_be_of_any_dtype(dtype):
    s = np.array([4.0, 2.0, 2.0], dtype)
    assert stable_rank(s) == 1.5
    assert rank_for_energy(s, 0.75) == 2


@pytest.mark.parametrize("function", [effective_rank, stable_rank, rank_for_energy])
def test_what_is_no_spectrum_is_refused(function):
    with pytest.raises(DTypeError, match=r"^singular_values: expected one of"):
        function(np.array([2, 1]))
    for wrong in (np.eye(2), np.zeros(0), np.float64(3)):
        with pytest.raises(ShapeError) as caught:
            function(wrong)
        assert str(caught.value) == (
            f"singular_values: expected a vector of at least one, got shape {wrong.shape}; pass them alone"
        )
    for wrong in ([np.nan], [np.inf, 1.0], [2.0, np.nan]):
        with pytest.raises(NonFiniteError) as caught:
            function(np.array(wrong))
        expected = "singular_values: expected finite numbers, got NaN or infinity; compute them anew"
        assert str(caught.value) == expected
    for wrong in ([1.0, 2.0], [3.0, 1.0, 2.0], [1.0, -1.0]):
        with pytest.raises(ConfigError) as caught:
            function(np.array(wrong))
        assert str(caught.value) == (
            "singular_values: expected nonnegative numbers in nonincreasing order, got others; sort them"
        )


@pytest.mark.parametrize("share", [0, -0.5, 1.5, math.nan, "1", True, None])
def test_shares_are_checked(share):
    with pytest.raises(ConfigError) as caught:
        rank_for_energy(np.ones(2), share)
    expected = f"share: expected a number above 0 and at most 1, got {share!r}; choose another"
    assert str(caught.value) == expected
