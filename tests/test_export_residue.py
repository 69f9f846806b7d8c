"""Which differences are updates of low rank, and which are noise."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification.residue import LowRankPart, low_rank_part

Array = NDArray[np.float64]


def normal(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def low_rank(rank: int, shape: tuple[int, int] = (48, 64), seed: int = 1) -> Array:
    return normal((shape[0], rank), seed) @ normal((rank, shape[1]), seed + 1)


@pytest.mark.parametrize("rank", [1, 2, 5, 11])
def test_an_update_of_low_rank_is_one(rank: int) -> None:
    for shape in ((48, 64), (64, 48)):
        assert low_rank_part(low_rank(rank, shape)) == LowRankPart(rank, True)
        assert low_rank_part(1e-200 * low_rank(rank, shape)) == LowRankPart(rank, True)
        assert low_rank_part(1e200 * low_rank(rank, shape)) == LowRankPart(rank, True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(48, 64), (32, 32), (200, 40)])
def test_noise_is_none(shape: tuple[int, int], seed: int) -> None:
    assert low_rank_part(normal(shape, seed)) is None


def test_an_update_under_a_little_noise_keeps_its_rank() -> None:
    assert low_rank_part(low_rank(3) + 1e-3 * normal((48, 64), 9)) == LowRankPart(3, True)


def test_of_an_update_under_noise_the_directions_that_stand_out_are_counted() -> None:
    noise = normal((200, 240), 5)
    u, v = np.linalg.qr(normal((200, 2), 6))[0], np.linalg.qr(normal((240, 2), 7))[0]
    assert low_rank_part(noise + 100 * u @ v.T) == LowRankPart(2, False)
    assert low_rank_part(noise + 100 * u[:, :1] @ v[:, :1].T) == LowRankPart(1, False)
    assert low_rank_part(noise + 5 * u @ v.T) is None


def test_errors_in_proportion_to_rows_and_columns_of_different_sizes_are_noise() -> None:
    noise = normal((48, 64), 3)
    rows, columns = np.logspace(0, 6, 48)[:, None], np.logspace(0, 6, 64)
    assert low_rank_part(noise * rows) is None
    assert low_rank_part(noise * columns) is None
    assert low_rank_part(low_rank(2) * rows) == LowRankPart(2, True)
    assert low_rank_part(low_rank(2) * columns) == LowRankPart(2, True)


def test_rows_and_columns_of_zeros_are_left_alone() -> None:
    update = low_rank(2)
    update[3], update[:, 5] = 0, 0
    assert low_rank_part(update) == LowRankPart(2, True)


def test_kernels_are_flattened() -> None:
    assert low_rank_part(low_rank(2, (16, 72)).reshape(16, 8, 3, 3)) == LowRankPart(2, True)


def test_a_few_entries_are_no_update() -> None:
    single = np.zeros((48, 64))
    single[3, 7] = 1.0
    assert low_rank_part(single) is None
    # One full row is of rank 1, and has fewer entries than a rank-1 matrix has numbers.
    row = np.zeros((48, 64))
    row[3] = 1.0
    assert low_rank_part(row) is None
    # As many as 1 * (48 + 64) fit any matrix of rank 1; more do not.
    exactly = np.zeros((48, 64))
    exactly[:8, :14] = 1.0
    assert low_rank_part(exactly) is None
    exactly[:8, :15] = 1.0
    assert low_rank_part(exactly) == LowRankPart(1, True)


@pytest.mark.parametrize(
    "difference",
    [
        np.zeros((8, 8)),
        np.ones(8),
        np.ones((1, 8)),
        np.ones((8, 1)),
        np.ones((8, 1, 1)),
        np.full((8, 8), np.nan),
        np.where(np.eye(8) > 0, np.inf, 1.0),
    ],
    ids=["zeros", "vector", "one row", "one column", "one tap", "NaN", "infinity"],
)
def test_what_has_no_rank_to_speak_of(difference: NDArray[Any]) -> None:
    assert low_rank_part(difference) is None


def test_two_rows_have_one() -> None:
    assert low_rank_part(np.outer([1.0, 2.0], np.arange(1.0, 9.0))) == LowRankPart(1, True)
    assert low_rank_part(np.outer(np.arange(1.0, 9.0), [1.0, 2.0])) == LowRankPart(1, True)


def test_a_rank_is_said_to_be_the_least_where_noise_may_hide_more() -> None:
    assert str(LowRankPart(3, True)) == "rank 3"
    assert str(LowRankPart(3, False)) == "rank 3 or more"
