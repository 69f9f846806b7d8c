from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference.error_free import two_product, two_sum

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def one(x):
    return np.array([x])


@given(FINITE, FINITE)
def test_two_sum_loses_nothing(a, b):
    with np.errstate(over="ignore", invalid="ignore"):
        s, t = two_sum(one(a), one(b))
        assert s[0] == one(a)[0] + one(b)[0]
    if np.isfinite(s[0]):
        assert Fraction(s[0]) + Fraction(t[0]) == Fraction(a) + Fraction(b)
    else:
        assert not np.isfinite(t[0])


@given(FINITE, FINITE)
def test_two_product_loses_nothing_or_says_so(a, b):
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        p, t = two_product(one(a), one(b))
    if np.isfinite(t[0]):
        assert Fraction(p[0]) + Fraction(t[0]) == Fraction(a) * Fraction(b)
    else:
        size = abs(Fraction(a) * Fraction(b))
        assert size < Fraction(2) ** -959 or size > Fraction(2) ** 1020 or max(abs(a), abs(b)) > 2.0**990


@given(st.lists(st.tuples(st.floats(1, 2), st.floats(1, 2)), min_size=1))
def test_two_product_is_captured_for_ordinary_numbers(pairs):
    a, b = np.array(pairs).T
    p, t = two_product(a, b)
    exact = [Fraction(x) * Fraction(y) for x, y in pairs]
    assert [Fraction(x) + Fraction(y) for x, y in zip(p, t, strict=True)] == exact


@pytest.mark.parametrize(
    ("a", "b", "captured"),
    [
        (0.0, 2.0**-1074, True),
        (2.0**-1074, -0.0, True),
        (2.0**-500 * 1.5, 2.0**-400 * 1.25, True),
        (2.0**-500 * 1.5, 2.0**-500 * 1.25, False),
        (2.0**-480, 2.0**-480, True),
        (2.0**-480, -(2.0**-481), False),
        (2.0**-1074, 0.5, False),
        (2.0**1000, 2.0**-1000, False),
        (2.0**600, 2.0**600, False),
    ],
)
def test_two_product_marks_what_it_cannot_capture(a, b, captured):
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        _, t = two_product(one(a), one(b))
    assert bool(np.isfinite(t[0])) == captured
