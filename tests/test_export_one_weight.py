"""One weight, row by row: the merge, the base's rows and the bound, however an adapter changes it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loracle.export.verification.one_weight import FLOAT64, coarser, row_blocks, weight_of
from loracle.files import Adapter, Checkpoint, MergedWeights
from loracle.files.updates import Linear, conversion_bound
from loracle.reference import DTypeError, LowRank, NonFiniteError, Precision, merge_bound, round_to
from tests.files_fixtures import Q0, random_array, small_adapter, small_tensors, write_model

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NORM, SCALAR, BIG = "model.norm.weight", "model.layers.0.scale", "model.layers.0.big"


@pytest.fixture
def weights(tmp_path: Path) -> MergedWeights:
    """An adapter that adds to two weights and takes the place of a third."""
    own = {SCALAR: np.array(0.1, np.float32), BIG: np.array([1e30], np.float32)}
    write_model(tmp_path / "base", [{**small_tensors(), **own}])
    plain = small_adapter(modules_to_save=("norm",))
    adapter = Adapter(plain.config, plain.pairs, {NORM: random_array((6,), 40)})
    return MergedWeights(Checkpoint(tmp_path / "base"), adapter)


def test_a_weight_with_an_update(weights: MergedWeights) -> None:
    name = f"{Q0}.weight"
    weight = weight_of(weights, name)
    assert weight.name == name
    assert weight.merged
    assert weight.base is weight.start
    assert weight.update is weights.update(name)
    for dtype in (FLOAT32, BFLOAT16):
        assert np.array_equal(weight.rows(2, 5, dtype), weights.tensor(name, dtype)[2:5])
        base = weight.base_rows(2, 5, dtype)
        assert base is not None
        assert np.array_equal(base, round_to(weights.checkpoint.tensor(name), dtype)[2:5])
    pair = small_adapter().pairs[Q0]
    own = LowRank(pair.A, pair.B[2:5], pair.scaling)
    assert np.array_equal(
        weight.bound(2, 5, BFLOAT16, FLOAT32),
        merge_bound(weight.start[2:5], [own], Precision(BFLOAT16, accumulator=FLOAT32), dtype=FLOAT32),
    )
    assert np.array_equal(
        weight.bound(2, 5, FLOAT32, FLOAT16), merge_bound(weight.start[2:5], [own], FLOAT32, dtype=FLOAT16)
    )
    A, B = pair.A.astype(np.float64), pair.B.astype(np.float64)
    exact = weight.start.astype(np.float64) + pair.scaling * (B @ A)
    assert np.array_equal(weight.wide(2, 5), exact[2:5])


def test_a_weight_that_is_left_alone(weights: MergedWeights) -> None:
    name = "model.embed_tokens.weight"
    weight = weight_of(weights, name)
    assert not weight.merged
    assert weight.base is weight.start
    assert weight.update is None
    held = weights.checkpoint.tensor(name)
    assert np.array_equal(weight.start, held)
    assert np.array_equal(weight.rows(3, 9, FLOAT16), round_to(held[3:9], FLOAT16))
    wide = weight.wide(3, 9)
    assert wide.dtype == FLOAT64
    assert np.array_equal(wide, held[3:9].astype(FLOAT64))
    assert np.array_equal(
        weight.bound(3, 9, BFLOAT16, FLOAT16), conversion_bound(held[3:9], BFLOAT16, FLOAT16)
    )


def test_a_tensor_that_takes_the_place_of_the_bases(weights: MergedWeights) -> None:
    weight = weight_of(weights, NORM)
    assert weight.merged
    assert weight.update is None
    assert np.array_equal(weight.rows(0, 6, FLOAT32), random_array((6,), 40))
    base = weight.base_rows(1, 3, FLOAT16)
    assert base is not None
    assert np.array_equal(base, round_to(weights.checkpoint.tensor(NORM)[1:3], FLOAT16))


def test_a_weight_that_the_base_has_not(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    plain = small_adapter(modules_to_save=("score",), task_type="SEQ_CLS")
    adapter = Adapter(plain.config, plain.pairs, {"score.weight": random_array((3, 6), 41)})
    weights = MergedWeights(Checkpoint(tmp_path / "base"), adapter)
    weight = weight_of(weights, "score.weight")
    assert weight.merged
    assert weight.base is None
    assert weight.base_rows(0, 3, FLOAT32) is None
    assert np.array_equal(weight.rows(0, 3, FLOAT32), random_array((3, 6), 41))


def test_a_scalar_is_a_row_of_one_entry(weights: MergedWeights) -> None:
    weight = weight_of(weights, SCALAR)
    assert weight.start.shape == (1,)
    assert not weight.merged
    assert weight.rows(0, 1, FLOAT32).tolist() == [float(np.float32(0.1))]
    base = weight.base_rows(0, 1, FLOAT32)
    assert base is not None
    assert base.shape == (1,)


def test_a_scalar_in_the_place_of_the_bases(tmp_path: Path) -> None:
    write_model(tmp_path / "base", [{**small_tensors(), "model.norm.scale": np.array(2.0, np.float32)}])
    plain = small_adapter(modules_to_save=("norm",))
    tensors = {NORM: random_array((6,), 40), "model.norm.scale": np.array(3.0, np.float32)}
    weights = MergedWeights(Checkpoint(tmp_path / "base"), Adapter(plain.config, plain.pairs, tensors))
    weight = weight_of(weights, "model.norm.scale")
    assert weight.merged
    assert weight.rows(0, 1, FLOAT32).tolist() == [3.0]
    base = weight.base_rows(0, 1, FLOAT32)
    assert base is not None
    assert base.tolist() == [2.0]


def test_what_cannot_be_converted_is_named(weights: MergedWeights) -> None:
    big = weight_of(weights, BIG)
    for rows in (big.rows, big.base_rows):
        with pytest.raises(NonFiniteError, match=rf"^{BIG}: .*overflows float16"):
            rows(0, 1, FLOAT16)
    with pytest.raises(DTypeError, match=r"^model\.steps: "):
        weight_of(weights, "model.steps").rows(0, 3, FLOAT32)
    merged = weight_of(weights, f"{Q0}.weight")
    with pytest.raises(DTypeError, match=Q0):
        merged.rows(0, 8, np.dtype(np.int64))


def test_blocks_cover_all_rows_once() -> None:
    assert list(row_blocks((7, 3), 6)) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(row_blocks((6, 3), 6)) == [(0, 2), (2, 4), (4, 6)]
    assert list(row_blocks((4, 3, 2), 12)) == [(0, 2), (2, 4)]
    assert list(row_blocks((3, 10), 4)) == [(0, 1), (1, 2), (2, 3)]
    assert list(row_blocks((5,), 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(row_blocks((5, 0), 3)) == [(0, 3), (3, 5)]
    assert list(row_blocks((0, 4), 3)) == []
    assert all(type(row) is int for block in row_blocks((7, 3), 6) for row in block)


def test_the_coarser_dtype_has_the_larger_spacing() -> None:
    order = [FLOAT64, FLOAT32, FLOAT16, BFLOAT16]
    for place, one in enumerate(order):
        for other in order[place:]:
            assert coarser(one, other) == coarser(other, one) == other


@pytest.mark.parametrize("name", [f"{Q0}.weight", NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5)])
def test_differences_are_where_bits_are_others(
    weights: MergedWeights, name: str, start: int, stop: int
) -> None:
    weight = weight_of(weights, name)
    right = np.array(weight.rows(start, stop, FLOAT16))
    assert not weight.differences(start, right).places.size
    held, flat = right.copy(), right.reshape(-1)
    held.reshape(-1)[[1, -1]] += 1
    found = weight.differences(start, held)
    assert found.places.tolist() == [1, flat.size - 1]
    assert found.expected.tolist() == [flat[1], flat[-1]]
    large = replace(weight, start=np.full_like(weight.start, 1e30))
    with pytest.raises(NonFiniteError, match=name):
        large.differences(start, right)


def test_work_is_divided_among_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    weights = MergedWeights(Checkpoint(folder), small_adapter(), threads=3)
    weight = weight_of(weights, f"{Q0}.weight")
    assert weight.threads == 3
    given: list[Any] = []

    class Recorded(Linear):
        def rows(self, *arguments: Any) -> Any:
            given.append(arguments[-2:])
            return super().rows(*arguments)

        def differences(self, *arguments: Any) -> Any:
            given.append(arguments[-2:])
            return super().differences(*arguments)

    assert isinstance(weight.update, Linear)
    own = replace(weight, update=Recorded(weight.update.pair, weight.update.turned))
    own.differences(0, own.rows(0, 4, FLOAT16))
    assert given == [(3, weight.name)] * 2
