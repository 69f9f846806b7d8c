"""What weights are told apart by: the entries that are read, and how alike they are."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from matching_fixtures import Weights, matrices

from loracle.export.verification.content_signature import (
    as_matrix,
    as_signature,
    layouts,
    least_similarity,
    matrix_shape,
    sampled,
    signature,
    similarity,
)
from loracle.export.verification.weight_signatures import array_groups, natural_order, weight_groups

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("rows", [1, 2, 23, 24, 25, 26, 100, 4096, 150_001])
@pytest.mark.parametrize("columns", [1, 2, 24, 25, 577, 4096])
def test_a_few_hundred_entries_from_end_to_end(rows: int, columns: int) -> None:
    down, across = sampled(rows, columns)
    for indices, size in ((down, rows), (across, columns)):
        assert (indices[0], indices[-1]) == (0, size - 1)
        assert (np.diff(indices) > 0).all()
        if len(indices) < size:
            assert len(indices) % 4 == 0
            assert (np.diff(indices.reshape(-1, 4)) == 1).all()
    assert len(down) * len(across) >= min(rows * columns, 500)
    assert len(down) * len(across) <= 576


def test_a_signature_is_the_entries_that_are_sampled() -> None:
    (matrix,) = matrices(1, (100, 70))
    rows, columns = sampled(100, 70)
    assert np.array_equal(signature(matrix), matrix[rows][:, columns].reshape(-1))
    assert signature(matrix.astype(ml_dtypes.bfloat16)).dtype == np.float32


def test_what_is_no_finite_number_is_zero_and_what_is_huge_is_cut() -> None:
    entries = np.array([np.nan, np.inf, -np.inf, 1e300, -1e30, 2.0])
    assert as_signature(entries).tolist() == [0, 0, 0, 0, -np.float32(1e15), 2]


def test_similarity_is_one_for_equal_rows_alone() -> None:
    zero, one = np.zeros(4), np.array([1.0, 2, 3, 4])
    found = similarity(np.stack([zero, one, 2 * one, -one]), np.stack([zero, one]))
    assert found.tolist() == [[1, 0], [0, 1], [0, 0.8], [0, -1]]


def test_more_must_be_alike_where_fewer_entries_are_compared() -> None:
    assert [least_similarity(entries) for entries in (1, 16, 100, 576, 10_000)] == [
        0.9,
        0.9,
        0.5,
        5 / 24,
        0.2,
    ]


@pytest.mark.parametrize(
    ("shape", "matrix", "found"),
    [
        ((), (1, 1), [(1, 1, False)]),
        ((5,), (5, 1), [(5, 1, False)]),
        ((1, 5), (5, 1), [(5, 1, False)]),
        ((3, 5), (3, 5), [(3, 5, False), (5, 3, True)]),
        ((3, 5, 1, 1), (3, 5), [(3, 5, False), (5, 3, True)]),
        ((2, 3, 5), (2, 15), [(2, 15, False), (6, 5, False)]),
        ((2, 3, 5, 7), (2, 105), [(2, 105, False)]),
    ],
)
def test_the_matrices_that_a_tensor_may_be(
    shape: tuple[int, ...], matrix: tuple[int, int], found: list[tuple[int, int, bool]]
) -> None:
    assert matrix_shape(shape) == matrix
    assert layouts(shape) == found
    array = np.zeros(shape)
    for rows, columns, transposed in found:
        assert as_matrix(array, columns, transposed=transposed).shape == (rows, columns)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    """Numbers may be of any length, and other characters may be digits."""
    names = ["h.10.w", "h.2.w", "h.2.b", "h.1.ln_12", "h.1.ln_2", "a²", "9" * 5000]
    ordered = ["9" * 5000, "a²", "h.1.ln_2", "h.1.ln_12", "h.2.b", "h.2.w", "h.10.w"]
    assert sorted(names, key=natural_order) == ordered


def test_weights_are_grouped_by_shape_with_what_a_merge_makes_of_them() -> None:
    a, b, c, vector = *matrices(3, (40, 30)), matrices(1, (30,))[0]
    changed = {"b": b + 1, "n": vector * 2, "c": (c + 3).reshape(1, 40, 30)}
    weights = Weights({"a": a, "b": b, "n": vector, "c": c.reshape(1, 40, 30), "ids": np.arange(9)}, changed)
    groups = weight_groups(weights)
    assert {shape: group.names for shape, group in groups.items()} == {
        (40, 30): ("a", "b", "c"),
        (30, 1): ("n",),
    }
    base, merged = groups[40, 30].variants
    assert np.array_equal(base, np.stack([signature(array) for array in (a, b, c)]))
    assert np.array_equal(merged, np.stack([signature(array) for array in (a, b + 1, c + 3)]))
    assert np.array_equal(groups[30, 1].variants[1][0], signature((vector * 2)[:, None]))
    assert weights.released == {"a", "b", "n", "c", "ids"}


def test_a_weight_that_the_base_lacks_or_has_in_another_shape_is_the_adapters() -> None:
    head, small = matrices(2, (7, 5))

    class Resized(Weights):
        def base_tensor(self, name: str, dtype: Any = None) -> Array | None:
            return None if name == "head" else small[:3]

        def tensor(self, name: str, dtype: Any = None) -> Array:
            assert name not in self.released
            return super().tensor(name, dtype)

    groups = weight_groups(Resized({"head": head, "table": small}))
    assert np.array_equal(groups[7, 5].variants[0], np.stack([head.reshape(-1), small.reshape(-1)]))


def test_an_update_in_common_with_a_transpose_is_not_enough() -> None:
    """But nearly the same merged weight is, and vectors have no transposes."""
    weight, delta = matrices(2, (24, 24))
    (group,) = weight_groups(Weights({"w": weight}, {"w": weight + delta})).values()
    (turned,) = group.similarity(signature(weight.T + delta)[None])
    assert turned < 0.2
    (changed,) = group.similarity(signature(weight + delta * np.float32(1.1))[None])
    assert changed > 0.9
    vector, other = matrices(2, (576,))
    (group,) = weight_groups(Weights({"v": vector}, {"v": vector + other})).values()
    (half,) = group.similarity(signature((other * 2)[:, None])[None])
    assert half > 0.4


def test_twins_are_equal_with_and_without_the_adapter() -> None:
    one, other = matrices(2, (6, 5))
    base = {"a": one, "b": one, "c": one, "d": other}
    (group,) = weight_groups(Weights(base, {"c": other})).values()
    assert group.twins.tolist() == [0, 0, 2, 3]


def test_arrays_are_grouped_as_they_are_converted() -> None:
    one, other = matrices(2, (6, 5))
    groups = array_groups({"b": one, "a": other, "v": one[0]}, lambda signatures: 2 * signatures)
    assert groups[6, 5].names == ("a", "b")
    assert np.array_equal(groups[6, 5].variants[0], 2 * np.stack([other.reshape(-1), one.reshape(-1)]))
    assert groups[5, 1].names == ("v",)
