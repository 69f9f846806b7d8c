import ml_dtypes
import numpy as np
import pytest

from loracle.reference import DTypeError
from loracle.reference.formats import FORMATS, float_format, nonfinite_mask


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
    with pytest.raises(
        DTypeError, match=r"^q_proj: expected one of float16, bfloat16, float32, float64 in native"
    ):
        float_format(dtype, "q_proj")


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
