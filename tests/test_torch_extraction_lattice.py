"""Exact factors of matrices of integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import rank
from loracle.torch_impl.extraction.lattice import integer_factors


def exact(D: np.ndarray, r: int) -> None:
    found = integer_factors(D, r)
    assert found is not None
    A, B = found
    assert (A.shape, B.shape) == ((r, D.shape[1]), (len(D), r))
    assert (B.astype(object) @ A.astype(object) == D.astype(object)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 30),
    st.integers(2, 30),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.integers(-40, 40),
)
def test_products_of_integers_are_factorized(
    m: int, n: int, r: int, most: int, seed: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    r = min(r, m, n)
    D = np.ldexp(
        (rng.integers(-most, most + 1, (m, r)) @ rng.integers(-most, most + 1, (r, n))) * 1.0, exponent
    )
    if D.any():
        exact(D, r)


def test_rows_that_are_no_basis() -> None:
    """Rows 2 and 3 times a vector: one of them does not generate the other, their difference does both."""
    exact(np.outer([2.0, 3.0, 0.0], [1.0, 5.0, 7.0]), 1)
    exact(np.array([[10.0, 20, 5], [12, 24, 6], [14, 28, 7]]), 1)  # the talk's
    exact(np.array([[6.0, 0.0], [0.0, 10.0], [15.0, 15.0], [4.0, 9.0]]), 2)


def test_rank_below_what_is_asked_for() -> None:
    exact(np.outer([1.0, 2.0, 3.0], [1.0, 0.0, 4.0]), 3)


@pytest.mark.parametrize(
    ("D", "r"),
    [
        (np.random.default_rng(0).standard_normal((5, 4)), 2),  # too many bits
        (np.array([[1.0, 0.0], [0.0, 1.0]]), 1),  # of a larger rank
        (np.zeros((3, 2)), 1),
        (np.array([[1.0, 2.0**40]]), 1),
    ],
)
def test_there_may_be_none(D: np.ndarray, r: int) -> None:
    assert integer_factors(D, r) is None


def test_of_rank_sixteen() -> None:
    rng = np.random.default_rng(1)
    D = (rng.integers(-3, 4, (64, 16)) @ rng.integers(-3, 4, (16, 48))) * 1.0
    assert rank(D.astype(int)[:20, :20]) == 16
    exact(D, 16)
