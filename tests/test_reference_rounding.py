import math
import struct
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import DTypeError, round_float64, round_fraction, round_to
from loracle.reference.formats import FORMATS, float_format
from loracle.reference.rounding import _float32_to_odd, round_sum_to_odd

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [form.dtype for form in FORMATS]
NARROW = [np.dtype(np.float16), BF16]


def bits(array):
    array = np.asarray(array)
    return array.view(float_format(array.dtype).bits)


def finite_numbers(dtype):
    """All finite non-negative numbers of a 16-bit dtype, ascending, as float64."""
    return np.arange(float_format(dtype).infinity_bits, dtype=np.uint16).view(dtype).astype(np.float64)


def float64_bit_patterns(rng, count, dtype):
    """Float64 numbers of random bits whose exponents cover the range of ``dtype`` and a little more."""
    form = float_format(dtype)
    low, high = form.min_exponent - form.precision - 3, form.max_exponent + 2
    exponent = np.clip(rng.integers(low, high + 1, count), -1074, 1023)
    value = np.ldexp(1.0 + rng.random(count), exponent)
    # Half of them end in many zeros, so that ties and exact numbers come up.
    short = rng.integers(0, 2, count).astype(bool)
    cut = np.uint64(2**64 - 2 ** (52 - form.precision if form.precision < 53 else 0))
    value[short] = (value.view(np.uint64)[short] & cut).view(np.float64)
    return np.where(np.isfinite(value), value, 1.0) * rng.choice([-1.0, 1.0], count)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_midpoint_of_the_16_bit_formats_goes_to_the_even_neighbour(dtype):
    numbers = finite_numbers(dtype)
    midpoints = (numbers[:-1] + numbers[1:]) / 2
    even = np.arange(len(midpoints)) + np.arange(len(midpoints)) % 2
    for sign, sign_bit in ((1.0, 0), (-1.0, 0x8000)):
        assert np.array_equal(bits(round_float64(sign * midpoints, dtype)), even | sign_bit)
        below, above = np.nextafter(midpoints, 0), np.nextafter(midpoints, np.inf)
        assert np.array_equal(bits(round_float64(sign * below, dtype)), np.arange(len(midpoints)) | sign_bit)
        assert np.array_equal(bits(round_float64(sign * above, dtype)), np.arange(1, len(numbers)) | sign_bit)
    assert [int(bits(round_fraction(Fraction(m), dtype))) for m in midpoints[::97]] == even[::97].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_the_format_are_unchanged(dtype):
    form = float_format(dtype)
    values = np.array([0.0, -0.0, form.smallest_subnormal, form.smallest_normal, -form.largest, 1.0, -1.5])
    assert np.array_equal(bits(round_float64(values, dtype)), bits(values.astype(dtype)))
    assert [round_fraction(Fraction(v), dtype) for v in values] == values.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_begins_half_a_spacing_above_the_largest_number(dtype):
    form = float_format(dtype)
    largest = Fraction(form.largest)
    half_spacing = Fraction(2) ** (form.max_exponent - form.precision)
    for sign in (1, -1):
        assert round_fraction(sign * (largest + half_spacing), dtype) == sign * math.inf
        assert (
            round_fraction(sign * (largest + half_spacing - Fraction(1, 2**2000)), dtype)
            == sign * form.largest
        )
        assert round_fraction(sign * Fraction(10) ** 400, dtype) == sign * math.inf
    if form.precision < 53:
        limit = float(largest + half_spacing)
        rounded = round_float64(np.array([limit, np.nextafter(limit, 0), -limit, 1.7e308]), dtype)
        assert rounded.astype(float).tolist() == [math.inf, form.largest, -math.inf, math.inf]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_underflow_begins_at_half_the_smallest_number_and_keeps_the_sign(dtype):
    tiny = Fraction(float_format(dtype).smallest_subnormal)
    for sign in (1, -1):
        tie = round_fraction(sign * tiny / 2, dtype)
        assert tie == 0
        assert math.copysign(1, tie) == sign
        assert round_fraction(sign * (tiny / 2 + tiny / 2**900), dtype) == sign * float(tiny)
        assert round_fraction(sign * tiny * Fraction(3, 2), dtype) == sign * 2 * float(tiny)
    rounded = round_float64(np.array([-float(tiny) / 4, -5e-324]), dtype)
    assert np.signbit(rounded).all()
    assert math.copysign(1, round_fraction(Fraction(0), dtype)) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_float64_bit_patterns_round_as_the_exact_rational_does(dtype):
    values = float64_bit_patterns(np.random.default_rng(1), 4000, dtype)
    expected = np.array([round_fraction(Fraction(v), dtype) for v in values], dtype)
    assert np.array_equal(bits(round_float64(values, dtype)), bits(expected))


def check_that_no_neighbour_is_nearer(q, dtype):
    form = float_format(dtype)
    value = float(round_fraction(q, dtype))
    if math.isinf(value):
        assert abs(q) >= Fraction(form.largest) + Fraction(2) ** (form.max_exponent - form.precision)
        return
    error = abs(q - Fraction(value))
    one_step = int(bits(np.array([value], dtype))[0])
    for neighbour in (one_step - 1, one_step + 1):
        other = np.array([neighbour & (2 * form.magnitude_mask + 1)], form.bits).view(dtype).astype(float)[0]
        if math.isfinite(other) and other != value:
            assert error <= abs(q - Fraction(other))


@given(st.fractions(), st.integers(-1100, 1100), st.sampled_from(DTYPES))
def test_round_fraction_gives_the_nearest_number(q, exponent, dtype):
    check_that_no_neighbour_is_nearer(q * Fraction(2) ** exponent, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rationals_that_no_format_holds_are_rounded_to_the_nearest(dtype):
    rng = np.random.default_rng(4)
    for numerator, denominator in rng.integers(1, 2**62, (200, 2)).tolist():
        check_that_no_neighbour_is_nearer(Fraction(numerator, denominator), dtype)
        check_that_no_neighbour_is_nearer(Fraction(-numerator, denominator % 1000 * 2**20 + 3), dtype)


@given(st.floats(allow_nan=False))
def test_float64_and_float32_agree_with_the_platform(value):
    assert struct.pack("d", value) == round_float64(np.array([value]), np.float64).tobytes()
    if math.isfinite(value):
        assert round_fraction(Fraction(value), np.float64) == value
        with np.errstate(over="ignore"):
            assert round_fraction(Fraction(value), np.float32) == np.float32(value)


def test_bfloat16_is_not_rounded_through_float32():
    witness = np.array([1 + 2.0**-8 + 2.0**-30, 1 + 3 * 2.0**-8 - 2.0**-30])
    assert round_float64(witness, BF16).astype(float).tolist() == [1 + 2.0**-7, 1 + 2.0**-7]
    assert witness.astype(np.float32).astype(BF16).astype(float).tolist() == [1.0, 1 + 2.0**-6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_through(dtype):
    values = np.array([np.nan, -np.nan, np.inf, -np.inf])
    rounded = round_float64(values, dtype).astype(float)
    assert np.isnan(rounded[:2]).all()
    assert rounded[2:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", NARROW, ids=str)
def test_round_to_from_16_bits_is_the_rounding_of_the_same_number(source, target):
    patterns = np.arange(2**16, dtype=np.uint16).view(source)
    patterns = patterns[np.isfinite(patterns.astype(np.float32))]
    rounded = round_to(patterns, target)
    assert rounded.dtype == target
    assert np.array_equal(bits(rounded), bits(round_float64(patterns.astype(np.float64), target)))


@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_round_to_from_float32_is_the_rounding_of_the_same_number(target):
    values = float64_bit_patterns(np.random.default_rng(2), 4000, target)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    values = values[np.isfinite(values)]
    assert np.array_equal(
        bits(round_to(values, target)), bits(round_float64(values.astype(np.float64), target))
    )


@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_round_to_from_float64_is_round_float64(target):
    values = float64_bit_patterns(np.random.default_rng(3), 4000, target)
    assert np.array_equal(bits(round_to(values, target)), bits(round_float64(values, target)))


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_no_floating_point_error_is_reported_whatever_numpy_is_told(source, target):
    form = float_format(source)
    signalling = np.array([form.infinity_bits + 1], form.bits).view(source)
    numbers = np.array([form.largest, form.smallest_subnormal, 1.0, np.nan, np.inf], source)
    values = np.concatenate([signalling, numbers, -numbers])
    with np.errstate(all="raise"):
        rounded = round_to(values, target)
        if source == np.float64:
            assert np.array_equal(bits(rounded), bits(round_float64(values, target)))
    assert np.isnan(rounded[[0, 4]]).all()


def test_round_float64_widens_what_is_narrower_first():
    for dtype in DTYPES[:3]:
        values = np.array([1.0 + 2.0**-7, -0.0, float_format(dtype).largest], dtype)
        for target in DTYPES:
            expected = round_float64(values.astype(np.float64), target)
            assert np.array_equal(bits(round_float64(values, target)), bits(expected))


def test_round_to_makes_no_other_copy_of_a_float32_array():
    values = np.ones(2**20, np.float32)
    tracemalloc.start()
    rounded = round_to(values, np.float16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * rounded.nbytes


def test_round_to_never_returns_its_argument():
    for dtype in DTYPES:
        values = np.ones(3, dtype)
        assert not np.shares_memory(round_to(values, dtype), values)


def test_rounding_keeps_the_shape_and_accepts_any_strides():
    values = np.arange(24.0).reshape(2, 3, 4)[:, ::-1, ::2]
    for dtype in DTYPES:
        assert np.array_equal(round_float64(values, dtype).astype(float), values)


def test_other_dtypes_are_refused():
    for call in (
        lambda: round_fraction(Fraction(1), np.int8),
        lambda: round_float64(np.ones(2), np.int8),
        lambda: round_to(np.ones(2), np.int8),
    ):
        with pytest.raises(DTypeError, match=r"^dtype: expected one of .* got dtype\('int8'\); convert it$"):
            call()
    for call in (round_float64, round_to):
        with pytest.raises(
            DTypeError, match=r"^values: expected one of .* got dtype\('int64'\); convert it$"
        ):
            call(np.ones(2, np.int64), np.float32)


@given(st.floats(-4, 4), st.floats(-4, 4), st.integers(-80, 80))
def test_round_sum_to_odd_then_once_more_is_the_rounding_of_the_exact_sum(high, low, exponent):
    low = math.ldexp(low, exponent)
    odd = round_sum_to_odd(np.array([high]), np.array([low]))
    exact = Fraction(high) + Fraction(low)
    for dtype in DTYPES[:3]:
        assert round_float64(odd, dtype)[0] == round_fraction(exact, dtype)
    if Fraction(odd[0]) != exact:
        assert odd.view(np.uint64)[0] & 1
        assert abs(Fraction(odd[0]) - exact) < Fraction(float(np.spacing(abs(odd[0]))))


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        (1.0, 2.0**-100, 1 + 2.0**-52),
        (1.0, -(2.0**-100), 1 - 2.0**-53),
        (-1.0, 2.0**-100, -1 + 2.0**-53),
        (-1.0, -(2.0**-100), -1 - 2.0**-52),
        (1 + 2.0**-52, 2.0**-100, 1 + 2.0**-52),
        (1.0, 2.0**-52, 1 + 2.0**-52),
        (2.0, 2.0**-52, 2 + 2.0**-51),
        (1.0, -1.0, 0.0),
    ],
)
def test_round_sum_to_odd_by_hand(high, low, expected):
    assert round_sum_to_odd(np.array([high]), np.array([low]))[0] == expected


def test_float32_to_odd_truncates_and_sets_the_last_bit_of_what_was_inexact():
    step = 2.0**-23
    values = np.array(
        [1.0, 1 + step, 1 + step / 8, 1 + 7 * step / 8, 1 + 9 * step / 8, -1 - 15 * step / 8, 1e300]
    )
    largest = float(np.finfo(np.float32).max)
    expected = [1.0, 1 + step, 1 + step, 1 + step, 1 + step, -1 - step, largest]
    with np.errstate(over="ignore"):
        assert _float32_to_odd(values).tolist() == expected


@pytest.mark.parametrize("source", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("target", ["f2", "f4", "f8", "bf16"])
@pytest.mark.parametrize("count", [(1 << 16) - 1, 1 << 16, (1 << 16) + 3])
def test_many_16_bit_numbers_are_rounded_as_each_alone(source, target, count):
    target = np.dtype(ml_dtypes.bfloat16) if target == "bf16" else np.dtype(target)
    numbers = np.random.default_rng(1).permutation(count).astype(np.uint16).view(source)
    values = np.asfortranarray(numbers[: count // 3 * 3].reshape(3, -1))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float32).astype(target)
    rounded = round_to(values, target)
    assert rounded.dtype == target
    assert rounded.shape == values.shape
    assert rounded.flags.writeable
    same = rounded.view(f"u{target.itemsize}") == np.ascontiguousarray(expected).view(f"u{target.itemsize}")
    assert (same | np.isnan(expected)).all()
    assert np.array_equal(np.isnan(rounded), np.isnan(expected))
