import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import merge_exact, round_fraction
from loracle.reference.exact import exact_entry
from loracle.reference.formats import FORMATS, float_format

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [form.dtype for form in FORMATS]


def entry_of(w, b, a, scaling, dtype):
    """The exact entry of a merge with one adapter."""
    return exact_entry(w, [(b, a, scaling)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_by_hand(dtype):
    entry = entry_of(1.0, [0.5, -1.0], [3.0, 0.25], -0.5, dtype)
    assert entry.dtype == dtype
    assert entry == 1 - 0.5 * (0.5 * 3 - 0.25)


def test_several_adapters_are_summed_before_the_one_rounding():
    groups = [([2.0**-8], [1.0], 1.0), ([0.5, 1.0], [2.0, 1.0], 2.0**-40), ([4.0], [0.25], -(2.0**-39))]
    assert exact_entry(1.0, groups, BF16) == 1.0
    assert exact_entry(1.0, groups[:2], BF16) == 1 + 2.0**-7
    assert exact_entry(1.0, groups, np.float64) == 1 + 2.0**-8
    assert exact_entry(1.5, [], BF16) == 1.5
    assert exact_entry(-1.0, [([1.0], [1.0], 0.5), ([1.0], [1.0], 0.5)], np.float32) == 0


def test_nothing_is_rounded_on_the_way():
    assert entry_of(1.0, [2.0**-30], [2.0**-30], 2.0**-40, np.float64) == 1.0
    assert entry_of(-1.0, [1.0, 2.0**-30], [1.0, 2.0**-30], 1.0, np.float64) == 2.0**-60
    assert entry_of(2.0**-60, [1.0, -1.0], [1e300, 1e300], 1e300, np.float64) == 2.0**-60
    # 1/3 as the float64 that it is: three of it are 2^-54 short of 1.
    assert entry_of(-1.0, [3.0], [1.0], 1 / 3, np.float64) == -(2.0**-54)


def test_a_tie_of_bfloat16_goes_to_the_even_neighbour_unless_a_trace_is_left():
    assert entry_of(1.0, [2.0**-8], [1.0], 1.0, BF16) == 1.0
    assert entry_of(1.0, [2.0**-8, 2.0**-40], [1.0, 2.0**-40], 1.0, BF16) == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("w", "b", "a", "sign"),
    [
        (-0.0, [0.0], [1.0], -1),  # the weight's own zero is kept
        (0.0, [0.0], [-1.0], 1),
        (-0.0, [1.0, -1.0], [1.0, 1.0], -1),
        (1.0, [-1.0], [1.0], 1),  # an exact cancellation is +0
        (-1.0, [1.0], [1.0], 1),
    ],
)
def test_signs_of_zero(w, b, a, sign, dtype):
    entry = entry_of(w, b, a, 1.0, dtype)
    assert entry.dtype == dtype
    assert entry == 0
    assert math.copysign(1, entry) == sign


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_underflow_keeps_its_sign_and_an_overflow_is_an_infinity(dtype):
    form = float_format(dtype)
    tiny = entry_of(0.0, [-form.smallest_subnormal], [1.0], 0.25, dtype)
    assert tiny == 0
    assert math.copysign(1, tiny) == -1
    assert entry_of(form.largest, [form.largest], [1.0], 1.0, dtype) == math.inf
    assert entry_of(-form.largest, [form.largest], [1.0], -1.0, dtype) == -math.inf


def test_factors_of_different_lengths_are_refused():
    for b, a in (([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="zip"):
            entry_of(0.0, b, a, 1.0, np.float32)


@given(
    *(st.integers(1, 4) for _ in range(3)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_a_merge_is_the_definition_entry_by_entry(out, inputs, r, seed, given_dtype, dtype):
    rng = np.random.default_rng(seed)
    W0, A, B = (rng.normal(size=s).astype(given_dtype) for s in ((out, inputs), (r, inputs), (out, r)))
    merged = merge_exact(W0, A, B, 1 / 3, dtype)
    assert merged.dtype == dtype
    assert merged.shape == (out, inputs)
    for i in range(out):
        for j in range(inputs):
            update = sum(Fraction(float(B[i, k])) * Fraction(float(A[k, j])) for k in range(r))
            exact = Fraction(float(W0[i, j])) + Fraction(1 / 3) * update
            assert merged[i, j] == round_fraction(exact, dtype)


def test_a_merge_is_rounded_once_to_the_dtype_asked_for():
    W0, A, B = np.array([[1.0]]), np.array([[1.0], [2.0**-40]]), np.array([[2.0**-8, 2.0**-40]])
    assert merge_exact(W0, A, B, 1.0, BF16)[0, 0] == 1 + 2.0**-7
    assert merge_exact(W0, A, B, 1.0, np.float64)[0, 0] == 1 + 2.0**-8


def test_a_merge_has_the_shape_and_dtype_asked_for_even_if_empty():
    merged = merge_exact(np.ones((0, 3)), np.ones((2, 3)), np.ones((0, 2)), 1.0, np.float16)
    assert merged.shape == (0, 3)
    assert merged.dtype == np.float16
