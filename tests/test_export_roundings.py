"""Ways of rounding more than once: each gives the bits of a merge made so, and says what it does."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification.one_weight import OneWeight
from loracle.export.verification.roundings import Rounding, roundings
from loracle.files import LoraPair
from loracle.files.experts import OwnUpdates
from loracle.files.updates import Linear, TokenRows
from loracle.reference import round_to
from tests.files_fixtures import random_array

Array = NDArray[Any]
FLOAT64, FLOAT32, FLOAT16 = np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPE, SCALING = (12, 16), 3.0


def of_dtype(dtype: np.dtype[Any], scaling: float = SCALING) -> OneWeight:
    pair = LoraPair(random_array((2, 16), 1), random_array((12, 2), 2), scaling)
    W0 = round_to(random_array(SHAPE, 3), dtype)
    return OneWeight("w", W0, Linear(pair), W0)


def ways(weight: OneWeight, dtype: np.dtype[Any], start: int = 2, stop: int = 9) -> dict[str, Rounding]:
    found = list(roundings(weight, start, stop, dtype))
    by_words = {own.words: own for own in found}
    assert len(by_words) == len(found)
    assert all(own.rows.dtype == dtype and own.rows.shape == (stop - start, 16) for own in found)
    return by_words


def rounded(array: Array, *dtypes: np.dtype[Any]) -> Array:
    for dtype in dtypes:
        array = round_to(array, dtype)
    return array


def exact(weight: OneWeight) -> tuple[Array, Array, Array]:
    """W0, B A and the scaling times it in float64, rows 2 to 9."""
    assert isinstance(weight.update, Linear)
    pair = weight.update.pair
    product = pair.B[2:9].astype(FLOAT64) @ pair.A.astype(FLOAT64)
    return weight.start[2:9].astype(FLOAT64), product, pair.scaling * product


WORDS = {
    (FLOAT32, FLOAT32): {
        "to float16, then to float32": True,
        "to bfloat16, then to float32": True,
        "the update to float32, then the sum": False,
        "B A to float32, then its scaling, then the sum": False,
        "A and B to float32 before the merge": False,
        "A and B to float16 before the merge": True,
        "A and B to bfloat16 before the merge": True,
    },
    (BFLOAT16, FLOAT32): {
        "to float16, then to float32": False,
        "to bfloat16, then to float32": False,
        "the update to float32, then the sum": False,
        "B A to float32, then its scaling, then the sum": False,
        "the update to bfloat16, then the sum, then to float32": False,
        "B A to bfloat16, then its scaling, then the sum, then to float32": False,
        "A and B to float32 before the merge": False,
        "A and B to float16 before the merge": False,
        "A and B to bfloat16 before the merge": False,
    },
    (FLOAT32, FLOAT16): {
        "to float32, then to float16": False,
        "to bfloat16, then to float16": True,
        "the update to float16, then the sum": False,
        "B A to float16, then its scaling, then the sum": False,
        "the update to float32, then the sum, then to float16": False,
        "B A to float32, then its scaling, then the sum, then to float16": False,
        "A and B to float32 before the merge": False,
        "A and B to float16 before the merge": False,
        "A and B to bfloat16 before the merge": True,
    },
}


@pytest.mark.parametrize(("base", "held"), WORDS, ids=str)
def test_each_way_is_said_and_whether_it_is_narrower_than_both(
    base: np.dtype[Any], held: np.dtype[Any]
) -> None:
    found = ways(of_dtype(base), held)
    assert {words: own.narrower for words, own in found.items()} == WORDS[base, held]


@pytest.mark.parametrize("base", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("held", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_each_way_has_the_bits_of_a_merge_made_so(base: np.dtype[Any], held: np.dtype[Any]) -> None:
    weight = of_dtype(base)
    W0, product, delta = exact(weight)
    found = ways(weight, held)
    expected: dict[str, Array] = {}
    for middle in (FLOAT32, FLOAT16, BFLOAT16):
        if middle != held:
            expected[f"to {middle}, then to {held}"] = rounded(W0 + delta, middle, held)
    for middle in {base, held}:
        then = "" if middle == held else f", then to {held}"
        own, start = rounded(delta, middle).astype(FLOAT64), rounded(W0, middle).astype(FLOAT64)
        expected[f"the update to {middle}, then the sum{then}"] = rounded(start + own, middle, held)
        scaled = rounded(rounded(product, middle).astype(FLOAT64) * SCALING, middle).astype(FLOAT64)
        expected[f"B A to {middle}, then its scaling, then the sum{then}"] = rounded(
            start + scaled, middle, held
        )
    for middle in (FLOAT32, FLOAT16, BFLOAT16):
        assert isinstance(weight.update, Linear)
        pair = weight.update.pair
        narrow = replace(pair, A=rounded(pair.A, middle), B=rounded(pair.B, middle))
        merged = replace(weight, update=Linear(narrow)).rows(2, 9, held)
        expected[f"A and B to {middle} before the merge"] = merged
    assert found.keys() == expected.keys()
    for words, rows in expected.items():
        # The update is taken as the sum less W0: off by a few of float64's roundings.
        differ = np.count_nonzero(found[words].rows != rows)
        assert differ == 0, (words, differ)


def test_ways_differ_from_one_another_and_from_rounding_once() -> None:
    weight = of_dtype(BFLOAT16)
    right = weight.rows(0, 12, BFLOAT16)
    found = ways(weight, BFLOAT16, 0, 12)
    for words in ("the update to bfloat16, then the sum", "A and B to bfloat16 before the merge"):
        assert np.count_nonzero(found[words].rows != right) > 10
    twice = found["B A to bfloat16, then its scaling, then the sum"].rows
    assert np.count_nonzero(twice != found["the update to bfloat16, then the sum"].rows) > 10


def test_without_an_update_there_are_only_other_dtypes() -> None:
    W0 = random_array(SHAPE, 3)
    found = ways(OneWeight("w", W0, None, W0), FLOAT32)
    assert list(found) == ["to float16, then to float32", "to bfloat16, then to float32"]
    assert np.array_equal(found["to bfloat16, then to float32"].rows, rounded(W0[2:9], BFLOAT16, FLOAT32))


def test_a_float64_candidate_may_come_from_any_dtype() -> None:
    found = ways(of_dtype(FLOAT64), FLOAT64)
    assert list(found)[:3] == [
        f"to {middle}, then to float64" for middle in ("float32", "float16", "bfloat16")
    ]
    assert all(own.narrower == ("the sum" not in words) for words, own in found.items())


def test_a_scaling_of_zero_is_not_divided_by() -> None:
    found = ways(of_dtype(FLOAT32, scaling=0.0), FLOAT32)
    assert "the update to float32, then the sum" in found
    assert not any("its scaling" in words for words in found)


def test_updates_without_a_pair_have_none_to_round() -> None:
    W0 = random_array(SHAPE, 3)
    weight = OneWeight("w", W0, TokenRows((3, 5), random_array((2, 16), 4)), W0)
    assert list(ways(weight, FLOAT32)) == [
        "to float16, then to float32",
        "to bfloat16, then to float32",
        "the update to float32, then the sum",
    ]
    pair = LoraPair(random_array((2, 16), 1), random_array((4, 2), 2), SCALING)
    stacked = random_array((3, 4, 16), 5)
    experts = OneWeight("w", stacked, OwnUpdates({(1, 0): Linear(pair)}, 1), stacked)
    words = [own.words for own in roundings(experts, 0, 3, FLOAT32)]
    assert "A and B to bfloat16 before the merge" in words
    assert not any("its scaling" in own for own in words)
