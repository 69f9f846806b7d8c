import math
import re

import ml_dtypes
import numpy as np
import pytest

from loracle.reference import DTypeError
from loracle.reference.formats import (
    FORMATS,
    first_nonfinite,
    float_format,
    largest_magnitude,
    nonfinite_mask,
)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_a_format_agrees_with_the_library_that_implements_it(form):
    info = ml_dtypes.finfo(form.dtype)
    assert form.largest == float(info.max)
    assert form.smallest_normal == float(info.smallest_normal)
    assert form.smallest_subnormal == float(info.smallest_subnormal)
    assert 2 * form.unit_roundoff == float(info.eps)
    infinity = np.array([np.inf], form.dtype).view(form.bits)
    assert int(infinity[0]) == form.infinity_bits
    assert form.bits.itemsize == form.dtype.itemsize
    assert int(np.array([-0.0], form.dtype).view(form.bits)[0]) == form.magnitude_mask + 1


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, ">f4", np.complex64, ml_dtypes.float8_e4m3fn, object])
def test_other_dtypes_are_refused_by_name(dtype):
    message = "expected one of float16, bfloat16, float32, float64 in native byte order, got "
    rest = re.escape(f"{message}{np.dtype(dtype)!r}; convert it")
    with pytest.raises(DTypeError, match=f"^q_proj: {rest}$"):
        float_format(dtype, "q_proj")
    with pytest.raises(DTypeError, match=f"^dtype: {rest}$"):
        float_format(dtype)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_nonfinite_mask_finds_nan_and_infinity_of_both_signs_and_nothing_else(form):
    values = [
        0.0,
        -0.0,
        form.largest,
        -form.largest,
        form.smallest_subnormal,
        np.inf,
        -np.inf,
        np.nan,
        -np.nan,
    ]
    array = np.array(values, form.dtype)
    assert nonfinite_mask(array).tolist() == [False] * 5 + [True] * 4
    assert nonfinite_mask(array[::-2]).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_largest_magnitude_is_exact_and_ignores_signs(form):
    tiny = form.smallest_subnormal
    for values, expected in [
        ([], 0.0),
        ([-0.0], 0.0),
        ([tiny, -0.0], tiny),
        ([0.5, -1.5, 1.0], 1.5),
        ([form.largest, -1.0], form.largest),
        ([-form.largest], form.largest),
        ([1.0, -np.inf], math.inf),
    ]:
        largest = largest_magnitude(np.array(values, form.dtype))
        assert type(largest) is float
        assert largest == expected
        assert math.copysign(1, largest) == 1
    assert math.isnan(largest_magnitude(np.array([np.inf, -np.nan, 1.0], form.dtype)))
    assert largest_magnitude(np.array([[1.0, 7.0], [-3.0, 7.0]], form.dtype)[:, ::2]) == 3.0


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_the_first_that_is_not_finite_is_found_row_by_row(form):
    matrix = np.ones((3, 4), form.dtype)
    assert first_nonfinite(matrix) is None
    assert first_nonfinite(matrix[:0]) is None
    matrix[2, 0], matrix[1, 3], matrix[1, 2] = np.nan, np.inf, -np.inf
    position = first_nonfinite(matrix)
    assert position == (1, 2)
    assert [type(index) for index in position] == [int, int]
