from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loracle.reference import merge_entries
from loracle.reference.exact import exact_entry
from loracle.reference.formats import FORMATS
from loracle.reference.merge_entries import merged_entries, sum_in_double_double


def numbers(rng, shape, spread):
    """Full 53-bit numbers, and short ones, of exponents -spread to spread."""
    full = rng.uniform(-1, 1, shape)
    short = np.round(full * 8) / 8
    return np.ldexp(
        np.where(rng.integers(0, 2, shape), full, short), rng.integers(-spread, spread + 1, shape)
    )


def exact(w, i, j, A, B, spans):
    total = Fraction(w)
    for span, scaling in spans:
        products = zip(B[i, span], A[span, j], strict=True)
        total += Fraction(scaling) * sum(Fraction(b) * Fraction(a) for b, a in products)
    return total


def entry(w, i, j, A, B, spans, dtype):
    return exact_entry(w, [(B[i, span], A[span, j], scaling) for span, scaling in spans], dtype)


def whole(scaling):
    return [(slice(None), scaling)]


SCALINGS = [1.0, 0.5, 1 / 3, -1.1, 1 + 2.0**-52, 2.0**300, 0.0]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.sampled_from([0, 3, 60, 150]),
    st.sampled_from(SCALINGS),
    st.sampled_from([0, 0, 1]),
    st.integers(0, 9),
)
def test_the_exact_sum_lies_within_the_error_and_no_error_means_exact(seed, r, spread, scaling, cancel, cut):
    rng = np.random.default_rng(seed)
    A, B, w = numbers(rng, (r, 6), spread), numbers(rng, (5, r), spread), numbers(rng, 30, spread)
    i, j = np.divmod(np.arange(30), 6)
    spans = whole(scaling) if not 0 < cut < r else [(slice(0, cut), scaling), (slice(cut, r), 0.75)]
    if cancel:
        w = -sum(s * np.einsum("nk,kn->n", B[i][:, span], A[span][:, j]) for span, s in spans)
    high, low, error = sum_in_double_double(w, i, j, A, B, spans)
    assert np.array_equal(high, high + low)
    for n in range(30):
        truth = exact(w[n], i[n], j[n], A, B, spans)
        off = abs(truth - Fraction(high[n]) - Fraction(low[n]))
        assert off <= Fraction(error[n])
        scale = exact(abs(w[n]), i[n], j[n], abs(A), abs(B), [(span, abs(s)) for span, s in spans])
        assert Fraction(error[n]) <= scale * Fraction(r + 4) / 2**98 + Fraction(1, 2**1060)


def test_integers_are_summed_without_error():
    rng = np.random.default_rng(1)
    A, B = rng.integers(-9, 10, (7, 6)).astype(float), rng.integers(-9, 10, (5, 7)).astype(float)
    i, j = np.divmod(np.arange(30), 6)
    w = rng.integers(-9, 10, 30) * 2.0**40
    high, low, error = sum_in_double_double(w, i, j, A, B, whole(0.25))
    assert not error.any()
    assert [Fraction(h) + Fraction(v) for h, v in zip(high, low, strict=True)] == [
        exact(w[n], i[n], j[n], A, B, whole(0.25)) for n in range(30)
    ]


def test_a_loss_that_underflows_in_the_product_with_the_scaling_is_still_a_loss():
    """The sum of 1 and 2^-54 - 2^-60 has no room for the third number, which is zero times the scaling."""
    A = np.array([[1.0], [2.0**-54 - 2.0**-60], [2.0**-500]])
    B, index = np.ones((1, 3)), np.array([0])
    _, _, error = sum_in_double_double(np.zeros(1), index, index, A, B, whole(2.0**-700))
    assert error[0] > 0


def lost(w, products, spans):
    """The error of the sum of w and the products, given as pairs of factors (b, a)."""
    b, a = np.array(products).T
    A, B = np.stack([a, np.zeros(len(a)), a], axis=1), b[None]  # three columns, so that r is the rows
    zero, index = np.array([0]), np.array([2])
    high, low, error = sum_in_double_double(np.array([w]), zero, index, A, B, spans)
    assert abs(exact(w, 0, 2, A, B, spans) - Fraction(high[0]) - Fraction(low[0])) <= Fraction(error[0])
    return error[0]


def test_what_is_lost_is_known_and_grows_by_the_roundings_of_its_own_sum():
    """2^-60 + 2^-120 has no room for the last number: that is lost, times 1 + (4 r + 16 groups) 2^-53."""
    groups = [(slice(0, 1), 1.0), (slice(1, 2), 1.0)]
    error = lost(1.0, [(1.0, 2.0**-60), (1.0, 2.0**-120)], groups)
    assert error == np.nextafter(2.0**-120 * (1 + 40 * 2.0**-53), 1)


@pytest.mark.parametrize("scaling", [1.0, -1024.0])
@pytest.mark.parametrize("first", range(4))
def test_what_is_lost_in_any_pair_of_products_is_scaled_and_added_up(first, scaling):
    """1 + 2^-60 (1 + 2^-52)^2 has 2^-164 too many; k and k + 2 are added first."""
    fine = (2.0**-60 * (1 + 2.0**-52), 1 + 2.0**-52)
    products = [(0.0, 0.0)] * 4
    products[first], products[(first + 2) % 4] = (1.0, 1.0), fine
    error = lost(0.0, products, whole(scaling))
    assert 1 < error / (abs(scaling) * 2.0**-164) < 1 + 2.0**-40


def row_of(w, products, form):
    """The merged entries of a row, each with its own w and products, a group for every product."""
    count = max(map(len, products))
    padded = [[*row, *[0.0] * (count - len(row))] for row in products]
    spans = [(slice(k, k + 1), 1.0) for k in range(count)]
    index = np.arange(len(w))
    ones = np.ones((1, count))
    return merged_entries(np.array(w), np.zeros_like(index), index, np.array(padded).T, ones, spans, form)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_signs_of_zero(form):
    """A zero update keeps the sign, an exact cancellation is +0; what is beside it is untouched."""
    w = [-0.0, 0.0, -1.0, 1.0, -0.0, 2.5, -0.0]
    merged = row_of(w, [[0.0], [-0.0], [1.0], [-1.0], [1.0, -1.0], [0.5], [-0.25]], form)
    assert merged.dtype == form.dtype
    assert merged.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 3.0, -0.25]
    assert np.signbit(merged).tolist() == [True, False, False, False, True, False, True]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_a_tie_is_broken_by_what_double_double_has_lost(form):
    """2^-120 is lost beside 2^-60, which is taken away again: the sum that is left is a tie."""
    half = form.unit_roundoff
    rows, expected = [], []
    for trace, above in ((2.0**-120, True), (-(2.0**-120), False)):
        rows += [[half, 2.0**-60, trace, -(2.0**-60)], [3 * half, 2.0**-60, trace, -(2.0**-60)]]
        expected += [1 + 2 * half, 1 + 4 * half] if above else [1.0, 1 + 2 * half]
    rows += [[half], [3 * half]]
    expected += [1.0, 1 + 4 * half]  # without a trace the even neighbour
    assert row_of([1.0] * 6, rows, form).astype(float).tolist() == expected
    negative = row_of([-1.0] * 6, (-np.array([[*r, *[0.0] * (4 - len(r))] for r in rows])).tolist(), form)
    assert negative.astype(float).tolist() == [-v for v in expected]


def test_what_double_double_decides_needs_no_rational_arithmetic(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(merge_entries, "exact_entry", refuse)
    rng = np.random.default_rng(3)
    A, B, w = numbers(rng, (5, 6), 3), numbers(rng, (5, 5), 3), numbers(rng, 30, 3)
    i, j = np.divmod(np.arange(30), 6)
    for form in FORMATS:
        merged_entries(w, i, j, A, B, whole(1 / 3), form)
        row_of([-0.0, 1.0, 1.0], [[0.0], [-1.0], [form.unit_roundoff]], form)


@example(0, 4, FORMATS[3])
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from(FORMATS))
def test_entries_are_rounded_as_the_rational_sum(seed, r, form):
    rng = np.random.default_rng(seed)
    A, B, w = numbers(rng, (r, 6), 20), numbers(rng, (5, r), 20), numbers(rng, 30, 20)
    i, j = np.divmod(rng.permutation(30), 6)
    spans = whole(1 / 3) if r == 1 else [(slice(0, r - 1), 1 / 3), (slice(r - 1, r), -1.7)]
    merged = merged_entries(w, i, j, A, B, spans, form)
    assert merged.dtype == form.dtype
    expected = [entry(w[n], i[n], j[n], A, B, spans, form.dtype) for n in range(30)]
    assert merged.tolist() == [v.item() if hasattr(v, "item") else v for v in expected]


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**-530, 2.0**520, 2.0**511])
def test_products_at_the_ends_of_float64_are_left_to_rational_arithmetic(scale):
    rng = np.random.default_rng(2)
    A, B = rng.uniform(1, 2, (3, 4)) * scale, rng.uniform(1, 2, (4, 3)) * scale
    i, j = np.divmod(np.arange(16), 4)
    w = np.zeros(16)
    merged = merged_entries(w, i, j, A, B, whole(1.5), FORMATS[3])
    assert merged.tolist() == [
        float(entry(0.0, a, b, A, B, whole(1.5), np.float64)) for a, b in zip(i, j, strict=True)
    ]
