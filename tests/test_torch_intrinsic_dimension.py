"""d90 out of scores: which learning rate counts, and which d is enough."""

import pytest

from loracle.torch_impl.intrinsic.dimension import Point, Score, best_points, intrinsic_dimension


def point(d: int | None, score: float) -> Point:
    return Point(d, 0.1, score, score, score, score)


def test_the_validation_split_chooses_the_rate_and_the_test_split_scores() -> None:
    points = best_points(
        [
            Score(30, 0.1, 0, 0.6, 0.9),
            Score(30, 0.01, 0, 0.7, 0.5),
            Score(10, 0.1, 0, 0.4, 0.4),
            Score(10, 0.01, 0, 0.4, 0.3),
            Score(None, 1e-4, 0, 0.9, 0.8),
        ]
    )
    assert points == (
        Point(10, 0.01, 0.3, 0.3, 0.3, 0.4),  # of equal rates the smaller
        Point(30, 0.01, 0.5, 0.5, 0.5, 0.7),
        Point(None, 1e-4, 0.8, 0.8, 0.8, 0.9),
    )


def test_a_point_is_the_mean_of_its_seeds_with_their_spread() -> None:
    (found,) = best_points([Score(5, 0.1, seed, 0.5, test) for seed, test in enumerate((0.25, 1.0, 0.25))])
    assert found == Point(5, 0.1, 0.5, 0.25, 1.0, 0.5)


def test_a_rate_that_diverged_with_any_seed_does_not_count() -> None:
    scores = [Score(5, 0.1, 0, 0.9, 0.9), Score(5, 0.1, 1, None, None), Score(5, 0.01, 0, 0.2, 0.1)]
    assert [found.lr for found in best_points(scores)] == [0.01]
    assert best_points(scores[:2]) == ()


@pytest.mark.parametrize(
    ("start", "d90", "above"),
    [(0.0, 30, 30), (0.5, 30, 300), (0.7, 30, 300)],
)
def test_d90_is_the_smallest_that_reaches_the_threshold(start: float, d90: int, above: int) -> None:
    points = [point(10, 0.71), point(30, 0.72), point(100, 0.6), point(300, 0.79), point(1000, 0.8)]
    found = intrinsic_dimension(points, 0.8, start)
    assert found.threshold == pytest.approx(0.72)
    assert found.threshold_above_start == pytest.approx(start + 0.9 * (0.8 - start))
    assert (found.d90, found.d90_above_start, found.d100) == (d90, above, 1000)


def test_none_is_enough_where_none_reaches_it() -> None:
    found = intrinsic_dimension([point(10, 0.1), point(None, 0.8)], 0.8, 0.0)
    assert (found.d90, found.d90_above_start, found.d100) == (None, None, None)
