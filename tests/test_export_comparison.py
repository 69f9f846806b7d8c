"""Every entry of a weight beside the merge: counted in blocks of rows, held against the bound of a merge."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification import comparison
from loracle.export.verification.comparison import Comparison, EntriesApart, compare, least_bound
from loracle.export.verification.one_weight import OneWeight
from loracle.export.verification.verdict import Witness
from loracle.files import LoraPair
from loracle.files.updates import Linear, Update, conversion_bound
from loracle.reference import ConfigError, round_to
from tests.files_fixtures import random_array

Array = NDArray[Any]
FLOAT32, FLOAT16, FLOAT64 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS, R = 12, 16, 3


def pair(scaling: float = 0.5, r: int = R) -> LoraPair:
    return LoraPair(random_array((r, COLUMNS), 1), random_array((ROWS, r), 2), scaling)


def weight_of(dtype: np.dtype[Any], update: Update | None) -> OneWeight:
    W0 = round_to(random_array((ROWS, COLUMNS), 3), dtype)
    return OneWeight("w", W0, update, W0)


def merged(dtype: np.dtype[Any] = FLOAT32) -> tuple[OneWeight, Array]:
    weight = weight_of(dtype, Linear(pair()))
    return weight, np.array(weight.rows(0, ROWS, dtype))


def moved(held: Array, index: tuple[int, ...], steps: int) -> Array:
    """A copy in which one entry lies so many representable numbers further from zero."""
    changed = np.array(held)
    changed.view(f"u{held.dtype.itemsize}")[index] += steps
    return changed


@pytest.fixture(params=[1, 5 * COLUMNS, 1 << 21], ids=["a row", "five rows", "all rows"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compares so many entries at a time, and counts all that are outside."""
    monkeypatch.setattr(comparison, "BLOCK_ENTRIES", request.param)
    monkeypatch.setattr(comparison, "FEW", 1.0)
    return


@pytest.mark.usefixtures("_blocks")
def test_the_merge_is_equal() -> None:
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        weight, held = merged(dtype)
        assert compare(weight, held) == Comparison(held.size, 0, 0, 0, ((0, held.size),), None, False)
        # In the other order in memory, too.
        assert compare(weight, np.asfortranarray(held)).unequal == 0


@pytest.mark.usefixtures("_blocks")
def test_entries_that_differ_are_counted_and_the_furthest_is_named() -> None:
    weight, held = merged()
    apart = moved(moved(moved(held, (1, 2), 1), (7, 15), 3000), (11, 0), 2)
    said = compare(weight, apart)
    assert (said.entries, said.unequal, said.not_finite, said.is_base) == (held.size, 3, 0, False)
    assert said.ulps == ((0, held.size - 3), (1, 1), (2, 1), (4096, 1))
    assert said.witness == Witness((7, 15), float(held[7, 15]), float(apart[7, 15]))
    assert said.outside == 1


@pytest.mark.usefixtures("_blocks")
def test_of_entries_equally_far_the_first_is_named() -> None:
    weight, held = merged()
    said = compare(weight, moved(moved(held, (2, 3), 5), (9, 4), 5))
    assert said.witness is not None
    assert said.witness.index == (2, 3)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_furthest_and_outside(value: float) -> None:
    weight, held = merged()
    held[4, 4] = -held[4, 4]
    held[10, 3] = value
    said = compare(weight, held)
    assert (said.unequal, said.not_finite, said.outside) == (2, 1, 2)
    assert said.witness is not None
    assert said.witness.index == (10, 3)


@pytest.mark.usefixtures("_blocks")
def test_what_is_not_finite_is_counted_in_all_blocks() -> None:
    weight, held = merged()
    for row in (0, 3, ROWS - 1):
        held[row, row] = np.nan
    said = compare(weight, held)
    assert (said.unequal, said.not_finite, said.outside) == (3, 3, 3)


@pytest.mark.usefixtures("_blocks")
def test_entries_outside_in_neighbouring_rows_are_counted_once() -> None:
    weight, held = merged()
    far = held
    for index in ((3, 3), (3, COLUMNS - 1), (4, 0), (4, COLUMNS - 1), (5, 0)):
        far = moved(far, index, 1 << 20)
    assert compare(weight, far).outside == 5


def test_the_witness_of_many_axes_has_as_many_indices() -> None:
    W0 = random_array((4, 2, 3), 5)
    said = compare(OneWeight("w", W0, None, W0), moved(W0, (3, 1, 2), 9))
    assert said.witness is not None
    assert said.witness.index == (3, 1, 2)
    assert all(type(place) is int for place in said.witness.index)


@pytest.mark.usefixtures("_blocks")
def test_whether_all_bits_are_the_bases() -> None:
    weight, _ = merged()
    assert compare(weight, np.array(weight.start)).is_base
    for row in (0, ROWS - 1):
        assert not compare(weight, moved(weight.start, (row, 3), 1)).is_base
    # The base's numbers in a narrower dtype are the base's.
    assert compare(weight, round_to(weight.start, FLOAT16)).is_base
    assert not compare(replace(weight, base=None), np.array(weight.start)).is_base


def test_an_update_that_vanishes_leaves_the_base() -> None:
    weight = weight_of(BFLOAT16, Linear(pair(1e-12)))
    said = compare(weight, np.array(weight.start))
    assert (said.unequal, said.is_base) == (0, True)


def test_a_weight_without_an_update_is_the_bases() -> None:
    weight = weight_of(FLOAT32, None)
    assert compare(weight, np.array(weight.start)).is_base


def bound_in(weight: OneWeight, dtype: np.dtype[Any], precision: np.dtype[Any]) -> Array:
    return weight.bound(0, ROWS, precision, dtype)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("base", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("held_in", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_entries_beyond_the_bound_of_a_merge_in_the_coarser_dtype_are_outside(
    base: np.dtype[Any], held_in: np.dtype[Any]
) -> None:
    weight = weight_of(base, Linear(pair()))
    want = weight.rows(0, ROWS, held_in)
    coarse = BFLOAT16 if BFLOAT16 in (base, held_in) else held_in
    bound = bound_in(weight, held_in, coarse)
    own = conversion_bound(want, held_in, FLOAT64)
    for index in ((0, 7), (4, 7), (5, 0), (ROWS - 1, COLUMNS - 1)):
        allowed = bound[index] + own[index]
        steps, beyond = 0, 1 << 24 if held_in == FLOAT32 else 1 << 9
        while beyond - steps > 1:
            middle = (steps + beyond) // 2
            distance = abs(float(moved(want, index, middle)[index]) - float(want[index]))
            steps, beyond = (middle, beyond) if distance <= allowed else (steps, middle)
        assert compare(weight, moved(want, index, steps)).outside == 0
        assert compare(weight, moved(want, index, beyond)).outside == 1


@pytest.mark.usefixtures("_blocks")
def test_of_a_weight_left_alone_a_merge_that_passes_through_its_dtype_is_inside() -> None:
    weight = weight_of(BFLOAT16, None)
    held = np.array(weight.start.astype(np.float32))
    held[3, 3] *= 1 + 2.0**-9
    held[5, 5] *= 1 + 2.0**-6
    said = compare(weight, held)
    assert (said.unequal, said.outside) == (2, 1)


def test_many_entries_are_outside_at_once() -> None:
    weight, held = merged()
    said = compare(weight, held + np.float32(1.0))
    assert said.outside == said.unequal == held.size


def test_once_they_are_not_few_no_more_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "BLOCK_ENTRIES", 1)
    weight, held = merged()
    assert compare(weight, held + np.float32(1.0)).outside == COLUMNS
    # One entry in a thousand is few: up to 0.192 of 192, none; so the second row is not looked at.
    monkeypatch.setattr(comparison, "FEW", 1.5 / held.size)
    assert compare(weight, moved(moved(held, (0, 0), 1 << 20), (1, 1), 1 << 20)).outside == 2
    monkeypatch.setattr(comparison, "FEW", 1.0 / held.size)
    far = held
    for row in range(4):
        far = moved(far, (row, row), 1 << 20)
    assert compare(weight, far).outside == 2


class Boundless(OneWeight):
    def bound(self, start: int, stop: int, precision: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
        raise ConfigError("no bound")


def test_where_there_is_no_bound_what_is_beyond_the_quick_one_is_outside() -> None:
    weight = weight_of(BFLOAT16, Linear(pair(0.5, 3)))
    boundless = Boundless(weight.name, weight.start, weight.update, weight.base)
    want = np.array(weight.rows(0, ROWS, BFLOAT16))
    far = moved(moved(moved(want, (3, 3), 10 << 7), (9, 9), 10 << 7), (5, 5), 1)
    assert compare(boundless, far).outside == 2
    assert compare(boundless, far).unequal == 3


# In float16 underflows, in proportion to r, weigh more than the roundings.
@pytest.mark.parametrize(
    ("kind", "r"), [(BFLOAT16, 3), (BFLOAT16, 300), (BFLOAT16, 1000), (np.dtype(np.float16), 3)], ids=str
)
def test_sums_of_many_terms_are_in_float32_for_16_bits(kind: np.dtype[Any], r: int) -> None:
    """What is rounded at each step is inside; noise of six units in the last place is not, whatever r is."""
    weight = weight_of(kind, Linear(pair(1 / 3, r)))
    update = weight.update
    assert isinstance(update, Linear)
    A, B = (factor.astype(kind).astype(np.float32) for factor in (update.pair.A, update.pair.B))
    delta = ((B @ A).astype(kind).astype(np.float32) * update.pair.scaling).astype(kind)
    stepwise = (weight.start.astype(np.float32) + delta.astype(np.float32)).astype(kind)
    said = compare(weight, stepwise)
    assert said.unequal > 0
    assert said.outside == 0
    weight = weight_of(kind, Linear(pair(0.01 / r, r)))
    want = np.array(weight.rows(0, ROWS, kind))
    noisy = (want.view(np.uint16) + 6).view(kind)
    assert compare(weight, noisy).outside > 0.9 * want.size


class Spied(OneWeight):
    """Takes down the rows that a bound is computed of."""

    def bound(self, start: int, stop: int, precision: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
        asked.append((start, stop))
        return super().bound(start, stop, precision, dtype)


asked: list[tuple[int, int]] = []


def test_the_bound_is_computed_of_few_rows_or_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "FEW", 1.0)
    weight, held = merged()
    spied = Spied(weight.name, weight.start, weight.update, weight.base)
    for rows, expected in (
        ((), []),
        ((3,), [(3, 4)]),
        ((0, 5, 11), [(0, 1), (5, 6), (11, 12)]),
        ((0, 5, 8, 11), [(0, ROWS)]),
    ):
        asked.clear()
        far = held
        for row in rows:
            far = moved(far, (row, 2), 1 << 20)
        assert compare(spied, far).outside == len(rows)
        assert asked == expected
    # Of the last five rows one is few, and two are not.
    monkeypatch.setattr(comparison, "BLOCK_ENTRIES", 7 * COLUMNS)
    for rows, expected in (((9,), [(9, 10)]), ((9, 11), [(7, ROWS)])):
        asked.clear()
        far = held
        for row in rows:
            far = moved(far, (row, 2), 1 << 20)
        assert compare(spied, far).outside == len(rows)
        assert asked == expected


def test_an_infinity_of_the_bases_that_is_gone_is_outside() -> None:
    W0 = random_array((ROWS, COLUMNS), 3)
    W0[2, 3] = np.inf
    weight = OneWeight("w", W0, None, W0)
    held = np.array(W0)
    assert compare(weight, held).unequal == 0
    held[2, 3] = 5.0
    said = compare(weight, held)
    assert (said.unequal, said.outside, said.not_finite) == (1, 1, 0)


def test_the_quick_bound_is_what_three_roundings_and_the_sums_leave() -> None:
    weight, want = merged()
    places = np.array([0, COLUMNS + 3])
    block = EntriesApart(weight, 4, 7, places, want[4:7].reshape(-1)[places], want[4:7].reshape(-1)[places])
    W0 = weight.start[4:7].reshape(-1)[places].astype(np.float64)
    own = want[4:7].reshape(-1)[places].astype(np.float64)
    size = np.abs(W0) + np.maximum(np.abs(own - W0) - np.abs(own) * 2.0**-7, 0)
    assert np.array_equal(least_bound(block, FLOAT32), (3 + R) * 2.0**-24 * size)
    assert np.array_equal(least_bound(block, BFLOAT16), (2 * 2.0**-8 + (R + 1) * 2.0**-24) * size)
    other = replace(block, weight=weight_of(FLOAT32, None))
    assert least_bound(other, FLOAT32).tolist() == [0.0, 0.0]
