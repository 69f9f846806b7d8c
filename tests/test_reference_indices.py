import re

import numpy as np
import pytest

from loracle.reference import DTypeError, ShapeError
from loracle.reference.indices import check_indices, most_in_one

WEIGHT = np.ones((4, 7))
INTEGERS = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_any_width_become_array_indices(dtype):
    values = np.array([[0, 3, 1], [2, 0, 3]], dtype)
    found = check_indices("ids", values, 4, WEIGHT)
    assert found.dtype == np.intp
    assert found.tolist() == values.tolist()
    assert found is not values
    assert check_indices("ids", values[:0], 4, WEIGHT).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["f8", "f2", "?", "O", "m8[s]", "c16", "S1"])
def test_what_is_no_integer_is_refused(dtype):
    values = np.zeros(2, dtype)
    with pytest.raises(DTypeError) as caught:
        check_indices("expert", values, 4, WEIGHT)
    assert str(caught.value) == f"expert: expected integers, got {values.dtype}; convert it"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([[0, 1], [4, 9]], "4 at (1, 0)"),
        ([[0, -1], [4, 9]], "-1 at (0, 1)"),
        ([[5]], "5 at (0, 0)"),
        ([3, 0, -2], "-2 at (2,)"),
    ],
)
def test_the_first_that_is_out_of_range_is_named(values, found):
    message = f"ids: expected integers from 0 to 3 to fit W0 (4, 7), got {found}; check where they come from"
    with pytest.raises(ShapeError, match="^" + re.escape(message) + "$"):
        check_indices("ids", np.array(values), 4, WEIGHT)


@pytest.mark.parametrize(
    ("indices", "most"), [([], 0), ([5], 1), ([1, 0, 1], 2), ([[2, 0], [2, 2]], 3), ([[], []], 0)]
)
def test_the_most_frequent(indices, most):
    found = most_in_one(np.array(indices, np.intp))
    assert type(found) is int
    assert found == most
