"""All of float16, and every kind of float32, against NumPy's conversions."""

import numpy as np
import pytest

from loracle.reference.float16_bits import narrow, widen

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(128, 512)


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_every_float16_is_widened_exactly(order):
    values = {"C": EVERY, "F": np.asfortranarray(EVERY), "strided": np.repeat(EVERY, 2, axis=1)[:, ::2]}[
        order
    ]
    out = np.full(EVERY.shape, 9, np.float32)
    others = widen(values, out)
    with np.errstate(invalid="ignore"):
        expected = EVERY.astype(np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(out.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(out[nan]).all()
    magnitude = np.abs(expected)
    normal = (magnitude >= 2.0**-14) & (magnitude < np.inf)
    assert np.array_equal(others, np.flatnonzero(~normal))
    assert len(others) == 2 * 2 * 1024


def neighbours(values):
    """Each number, the float32 numbers beside it, and the midpoints to the next float16, with their own."""
    wide = values.astype(np.float32)
    middle = (wide + np.nextafter(values, np.float16(np.inf)).astype(np.float32)) / 2
    both = np.stack([wide, middle])
    return np.concatenate(
        [both, np.nextafter(both, np.float32(np.inf)), np.nextafter(both, np.float32(-np.inf))]
    ), middle


def test_all_float32_numbers_around_those_of_float16_are_rounded_to_nearest():
    with np.errstate(over="ignore", invalid="ignore"):
        finite = EVERY[np.isfinite(EVERY)]
        values, _ = neighbours(finite)
        expected = values.astype(np.float16)
    out = np.empty(values.shape, np.float16)
    narrow(values.copy(), out)
    ties = (values.view(np.uint32) & 0x1FFF) == 0x1000
    normal = np.abs(values) >= 2.0**-14
    same = out.view(np.uint16) == expected.view(np.uint16)
    assert same[~(ties & normal)].all()
    # A tie of a normal number goes away from zero: to the even neighbour or the one above it.
    up = out.view(np.uint16)[~same] - expected.view(np.uint16)[~same]
    assert set(up.tolist()) == {1}


def test_numbers_of_all_exponents_infinities_and_nan_are_rounded_as_numpy_rounds_them():
    rng = np.random.default_rng(5)
    values = rng.integers(0, 1 << 32, (64, 1024), dtype=np.uint64).astype(np.uint32).view(np.float32)
    values[0, :6] = [np.inf, -np.inf, 65519.996, 65520, -65520, 0]
    values[values.view(np.uint32) & 0x1FFF == 0x1000] = 1
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    out = np.empty((64, 2048), np.float16)[:, ::2]
    with np.errstate(all="raise"):
        narrow(values.copy(), out)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(out), nan)
    assert np.array_equal(np.signbit(out), np.signbit(expected))
    assert np.array_equal(out[~nan], expected[~nan])
