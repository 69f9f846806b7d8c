import math
from fractions import Fraction

import numpy as np
import pytest

from loracle.reference import ConfigError
from loracle.reference.arguments import check_count, check_share, is_integer, is_real


def test_kinds_of_numbers():
    integers = [0, -3, np.int8(4), np.uint64(5)]
    reals = [0.5, math.inf, np.float32(2), np.float64(2), Fraction(1, 3)]
    neither = [True, False, np.True_, None, "1", [1], 1j, np.ones(1)]
    assert all(map(is_integer, integers))
    assert all(map(is_real, integers + reals))
    assert not any(map(is_integer, reals + neither))
    assert not any(map(is_real, neither))


def test_counts():
    assert [check_count(count, 3, "i", "") for count in (1, 2, 3)] == [1, 2, 3]
    assert type(check_count(np.int64(2), 3, "i", "")) is int
    for wrong in (0, 4, -1, 1.0, True, None):
        with pytest.raises(ConfigError) as caught:
            check_count(wrong, 3, "i", "the rank of A")
        expected = f"i: expected an integer from 1 to 3, the rank of A, got {wrong!r}; choose another"
        assert str(caught.value) == expected


def test_shares():
    for share in (1, 0.5, 5e-324, np.float32(1), Fraction(1, 4)):
        assert check_share(share, "energy") == share
        assert type(check_share(share, "energy")) is float
    for wrong in (0, -0.5, math.nextafter(1, 2), math.nan, math.inf, True, None, "1"):
        with pytest.raises(ConfigError) as caught:
            check_share(wrong, "energy")
        expected = f"energy: expected a number above 0 and at most 1, got {wrong!r}; choose another"
        assert str(caught.value) == expected
