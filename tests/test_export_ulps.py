"""Steps between representable numbers: counted by hand, over zero, at the ends, in each dtype."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loracle.export.verification.ulps import bits, histogram, named, ulp_distance

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return request.param


def of_bits(patterns: list[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.array(patterns, f"u{dtype.itemsize}").view(dtype)


def test_bits_are_the_patterns_in_the_order_of_the_entries(dtype: np.dtype[Any]) -> None:
    one = 1 << (8 * dtype.itemsize - 2)
    array = of_bits([0, 1, one, 2, one + 1, 3], dtype).reshape(2, 3)
    assert bits(array).tolist() == [0, 1, one, 2, one + 1, 3]
    assert bits(array.T).tolist() == [0, 2, 1, one + 1, one, 3]
    assert bits(array[0, 0]).tolist() == [0]
    assert bits(array).dtype == np.dtype(f"u{dtype.itemsize}")


def test_steps_are_counted_in_both_directions_and_over_zero(dtype: np.dtype[Any]) -> None:
    sign = 1 << (8 * dtype.itemsize - 1)
    got = of_bits([5, 7, 0, sign, sign + 1, 1, sign + 9, sign + 4, 6], dtype)
    expected = of_bits([7, 5, sign, 0, 1, sign + 1, sign + 4, sign + 9, 6], dtype)
    distance = ulp_distance(got, expected)
    assert distance.tolist() == [2, 2, 1, 1, 3, 3, 5, 5, 0]
    assert distance.dtype == np.uint64
    for shape in ((3, 3), (9, 1)):
        assert ulp_distance(got.reshape(shape), expected.reshape(shape)).shape == shape
    turned = ulp_distance(got.reshape(3, 3).T, expected.reshape(3, 3).T)
    assert turned.tolist() == distance.reshape(3, 3).T.tolist()


def test_infinity_follows_the_largest_number_and_nan_is_beyond(dtype: np.dtype[Any]) -> None:
    most = ml_dtypes.finfo(dtype).max
    infinity = int(bits(np.array(np.inf, dtype))[0])
    assert ulp_distance(np.array([np.inf], dtype), np.array([most], dtype)).tolist() == [1]
    assert ulp_distance(-np.array([np.inf], dtype), np.array([np.inf], dtype)).tolist() == [2 * infinity + 1]
    assert ulp_distance(np.array([np.nan], dtype), np.array([np.inf], dtype))[0] > 0
    whole = (1 << (8 * dtype.itemsize)) - 1
    assert ulp_distance(of_bits([whole], dtype), of_bits([whole >> 1], dtype)).tolist() == [whole]


def test_distances_are_counted_up_to_powers_of_two() -> None:
    distances = np.array([[0, 1, 2, 3], [4, 5, 8, 9], [0, 16, 17, 2**63]], np.uint64)
    assert named(histogram(distances)) == (
        (0, 2),
        (1, 1),
        (2, 1),
        (4, 2),
        (8, 2),
        (16, 2),
        (32, 1),
        (2**63, 1),
    )


def test_every_histogram_has_the_same_buckets() -> None:
    none = histogram(np.zeros(0, np.uint64))
    assert not none.any()
    assert named(none) == ()
    assert all(type(number) is int for pair in named(histogram(np.ones(3, np.uint64))) for number in pair)
    for distance in (0, 1, 2**63, 2**64 - 1):
        counts = histogram(np.array([distance], np.uint64))
        assert counts.shape == none.shape
        assert counts.sum() == 1
