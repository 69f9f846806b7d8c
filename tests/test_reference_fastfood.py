import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from exact_linear import rational
from hypothesis import given, settings
from hypothesis import strategies as st
from intrinsic_fixtures import exact, matrix_of, signs

from loracle.reference import Precision, ShapeError, fastfood_projection, walsh_hadamard
from loracle.reference import fastfood as module
from loracle.reference.fastfood import block_length, fastfood_panels
from loracle.reference.magnitudes import magnitude_of
from loracle.reference.random_projection import STREAM


@pytest.mark.parametrize("power", range(6))
def test_the_transform_is_the_matrix_of_signs(power):
    length = 2**power
    x = np.random.default_rng(power).integers(-9, 10, (2, 3, length))
    expected = x.astype(object) @ signs(length)
    for values in (x.astype(object), x.astype(np.float32), x):
        found = walsh_hadamard(values)
        assert found.dtype == values.dtype
        assert found.shape == (2, 3, length)
        assert np.array_equal(found, expected)


def test_twice_the_transform_is_the_length():
    x = np.arange(16.0)
    assert np.array_equal(walsh_hadamard(walsh_hadamard(x)), 16 * x)
    assert np.array_equal(x, np.arange(16.0))


@pytest.mark.parametrize("length", [0, 3, 12])
def test_another_length_is_refused(length):
    with pytest.raises(ShapeError, match=f"power of two, got {length}"):
        walsh_hadamard(np.zeros(length))


@pytest.mark.parametrize(
    ("d", "length"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (1025, 2048)]
)
def test_a_block_is_the_next_power_of_two(d, length):
    assert block_length(d) == length


def test_the_numbers_are_those_of_the_documented_stream(monkeypatch):
    """Eleven rows in blocks of four, two of which are a panel."""
    monkeypatch.setattr(module, "PANEL", 11)
    found = fastfood_projection(11, 3, 5)
    first, second = (np.random.default_rng((STREAM, 5, panel)) for panel in (0, 1))
    parts = []
    for rng, blocks in ((first, 2), (second, 1)):
        own = 2 * rng.integers(0, 2, (blocks, 4), dtype=np.int8) - 1
        order = rng.permuted(np.array([[0, 1, 2, 3]] * blocks, np.int32), axis=1)
        parts.append((own, order, rng.standard_normal((blocks, 4))))
    drawn, order, normal = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert np.array_equal(found.signs, drawn)
    assert np.array_equal(found.order, order)
    assert (found.signs.dtype, found.order.dtype, found.gaussians.dtype) == (np.int8, np.int32, np.float32)
    scaled = normal / np.sqrt(11 * (normal**2).sum(axis=1))[:, None]
    assert np.abs(found.gaussians - scaled).max() < 2.0**-24
    sizes = [(panel.rows, len(panel.signs)) for panel in fastfood_panels(11, 3, 5)]
    assert sizes == [(8, 2), (3, 1)]


@pytest.mark.parametrize(
    ("D", "d", "sizes"), [(8, 8, [8]), (9, 8, [8, 1]), (5, 5, [5]), (33, 1, [8] * 4 + [1])]
)
def test_panels_are_the_projection_row_by_row(D, d, sizes, monkeypatch):
    monkeypatch.setattr(module, "PANEL", 8)
    panels = list(fastfood_panels(D, d, 3, dtype=np.float64))
    assert [panel.rows for panel in panels] == sizes
    whole, theta = fastfood_projection(D, d, 3, dtype=np.float64), np.arange(1.0, d + 1)
    assert np.array_equal(np.concatenate([panel.forward(theta) for panel in panels]), whole.forward(theta))


@settings(max_examples=25)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_every_column_has_length_one_where_the_blocks_are_whole(power, blocks, seed):
    """But for the rounding of the Gaussians: 2^-52 of each in a sum of squares."""
    length = 2**power
    P = matrix_of(fastfood_projection(length * blocks, length, seed, dtype=np.float64))
    for column in P.T:
        assert abs(np.dot(column, column) - 1) < Fraction(1, 2**49)
    for row in P:
        assert abs(np.dot(row, row) - Fraction(1, blocks)) < Fraction(1, 2**49)


def test_the_mean_over_all_signs_keeps_lengths_exactly():
    """Over the 16 choices of B: ||P theta||^2 is the sum of theta_k^2 times the square of column k."""
    own = exact(fastfood_projection(4, 4, 1, dtype=np.float64))
    theta = rational(np.array([3.0, -1.0, 0.5, 2.0]))
    total = Fraction(0)
    for choice in itertools.product((1, -1), repeat=4):
        image = replace(own, signs=np.array([choice], np.int8)).forward(theta)
        total += np.dot(image, image)
    columns = matrix_of(replace(own, gaussians=own.gaussians))
    assert total / 16 == sum(t * t * np.dot(c, c) for t, c in zip(theta, columns.T, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gaussians_are_rounded_once(dtype):
    wide = fastfood_projection(20, 5, 2, dtype=np.float64)
    narrow = fastfood_projection(20, 5, 2, dtype=dtype)
    assert narrow.gaussians.dtype == dtype
    assert np.array_equal(wide.astype(dtype).gaussians, narrow.gaussians)
    assert np.array_equal(wide.order, narrow.order)
    assert narrow.shape == (20, 5)


def test_a_magnitude_is_that_of_sums_of_all():
    found = walsh_hadamard(magnitude_of(np.array([[1.0, -2.0, 4.0, 0.0]]), Precision(np.float32), 0.5))
    assert found.size.tolist() == [[7.0] * 4]
    assert found.lost.tolist() == [[4.0] * 4]  # of each input half a unit as it came, and half of the sum
    assert found.terms == 4
