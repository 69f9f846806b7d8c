"""What becomes of rows of a tensor, and how far a merge that rounds more may be from it: each kind of
update, any range of rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loracle.files import updates
from loracle.files.lora_pair import LoraPair
from loracle.files.updates import (
    Bias,
    Convolution,
    Dora,
    Linear,
    Stacked,
    TokenRows,
    conversion_bound,
    convert,
    merging,
    same_bits,
)
from loracle.reference import (
    DTypeError,
    LowRank,
    NonFiniteError,
    Precision,
    dora_merge_bound,
    merge_bound,
    merge_dora,
)

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
R, SCALING = 2, 0.5
RANGES = [(0, 5), (0, 2), (1, 4), (4, 5)]


def integers(shape: tuple[int, ...], seed: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def pair_of(columns: tuple[int, ...], out: int, **more: Any) -> LoraPair:
    """Factors of integers, so that every merge is exact."""
    B = integers((out, R) + (1,) * (len(columns) - 1), 2)
    return LoraPair(integers((R, *columns), 1), B, SCALING, **more)


def linear_pair(turned: bool) -> LoraPair:
    """Factors of a weight that is stored as (5, 7)."""
    return pair_of((5,), 7) if turned else pair_of((7,), 5)


def delta_of(pair: LoraPair) -> Any:
    return SCALING * np.tensordot(pair.B.reshape(len(pair.B), R), pair.A, axes=1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_rows_of_a_linear_layer(turned: bool, start: int, stop: int) -> None:
    pair = linear_pair(turned)
    delta = delta_of(pair).T if turned else delta_of(pair)
    base, update = integers((5, 7), 3), Linear(pair, turned)
    expected = (base + delta)[start:stop]
    for target in (F32, F16, BF16):
        rows = update.rows(base[start:stop], start, target, 1, "w")
        assert (rows.dtype, rows.tolist()) == (target, expected.tolist())
    wide = update.wide(base[start:stop], start)
    assert (wide.dtype, wide.tolist()) == (F64, expected.tolist())
    with pytest.raises(NonFiniteError, match="the name"):
        update.rows(np.full((stop - start, 7), np.nan, np.float32), start, F32, 1, "the name")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_differences_from_the_merge_of_rows(turned: bool, start: int, stop: int) -> None:
    pair = linear_pair(turned)
    base, update = integers((5, 7), 3), Linear(pair, turned)
    merged = np.array(update.rows(base[start:stop], start, F16, 1, "w"))
    assert not update.differences(base[start:stop], start, merged, 1, "w").places.size
    right = merged[0, 3]
    merged[0, 3] += 1
    found = update.differences(base[start:stop], start, merged, None, "w")
    assert (found.places.tolist(), found.expected.tolist()) == ([3], [right])
    with pytest.raises(NonFiniteError, match="the name"):
        update.differences(np.full((stop - start, 7), np.inf, np.float32), start, merged, 1, "the name")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("start", "stop"), RANGES)
@pytest.mark.parametrize(("precision", "target"), [(F32, F32), (BF16, BF16), (F32, F16)], ids=str)
def test_the_bound_of_a_linear_layer(
    turned: bool, start: int, stop: int, precision: Any, target: Any
) -> None:
    pair = linear_pair(turned)
    base = integers((5, 7), 3)
    W0 = base.T if turned else base
    whole = merge_bound(W0, [LowRank(pair.A, pair.B, SCALING)], merging(precision), dtype=target)
    expected = (whole.T if turned else whole)[start:stop]
    assert np.array_equal(Linear(pair, turned).bound(base[start:stop], start, precision, target), expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_convolution(start: int, stop: int) -> None:
    pair = pair_of((3, 2, 2), 5)
    base, update = integers((5, 3, 2, 2), 3), Convolution(pair)
    rows = update.rows(base[start:stop], start, F16, 1, "w")
    assert (rows.dtype, rows.tolist()) == (F16, (base + delta_of(pair))[start:stop].tolist())
    flat = LowRank(pair.A.reshape(R, -1), pair.B.reshape(5, R), SCALING)
    whole = merge_bound(base.reshape(5, -1), [flat], merging(F32), dtype=F16).reshape(base.shape)
    assert np.array_equal(update.bound(base[start:stop], start, F32, F16), whole[start:stop])
    with pytest.raises(NonFiniteError, match="the name"):
        update.rows(np.full_like(base[start:stop], np.nan), start, F16, 1, "the name")


@pytest.mark.parametrize("kernel", [(), (2, 2)])
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_dora(kernel: tuple[int, ...], start: int, stop: int) -> None:
    magnitude = np.arange(1, 6, dtype=np.float32).reshape(1 if kernel else 5, *((5, 1, 1) if kernel else ()))
    pair = pair_of((3, *kernel), 5, magnitude=magnitude)
    base, update = integers((5, 3, *kernel), 3), Dora(pair)
    A, B = pair.A.reshape(R, -1), pair.B.reshape(5, R)
    whole = merge_dora(base.reshape(5, -1), A, B, SCALING, magnitude.reshape(-1), dtype=F16)
    rows = update.rows(base[start:stop], start, F16, 1, "w")
    assert (rows.dtype, rows.tolist()) == (F16, whole.reshape(base.shape)[start:stop].tolist())
    bound = dora_merge_bound(
        base.reshape(5, -1), LowRank(A, B, SCALING), magnitude.reshape(-1), merging(F32), dtype=F16
    )
    assert np.array_equal(
        update.bound(base[start:stop], start, F32, F16), bound.reshape(base.shape)[start:stop]
    )
    with pytest.raises(NonFiniteError, match="the name"):
        update.rows(np.full_like(base[start:stop], np.nan), start, F16, 1, "the name")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 3), (2, 3)])
def test_stacked_experts(turned: bool, start: int, stop: int) -> None:
    """Of PEFT's factors A has an expert's rows together, and B its columns in turn."""
    experts, out, columns = 3, 5, 7
    A, B = integers((experts * R, columns), 1), integers((out, R * experts), 2)
    factors_a, factors_b = A.reshape(experts, R, columns), B.reshape(out, R, experts).transpose(2, 0, 1)
    delta = SCALING * np.matmul(factors_b, factors_a)
    base = integers((experts, out, columns), 3)
    whole = [
        merge_bound(base[e], [LowRank(factors_a[e], factors_b[e], SCALING)], merging(F32), dtype=F16)
        for e in range(experts)
    ]
    expected, bounds = base + delta, np.stack(whole)
    if turned:
        base, expected, bounds = (own.swapaxes(1, 2) for own in (base, expected, bounds))
    update = Stacked(LoraPair(A, B, SCALING), experts, turned)
    rows = update.rows(base[start:stop], start, F16, 1, "w")
    assert (rows.dtype, rows.tolist()) == (F16, expected[start:stop].tolist())
    assert np.array_equal(update.bound(base[start:stop], start, F32, F16), bounds[start:stop])
    with pytest.raises(NonFiniteError, match="the name"):
        update.rows(np.full_like(base[start:stop], np.nan), start, F16, 1, "the name")


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_bias(start: int, stop: int) -> None:
    pair = pair_of((7,), 5, bias=integers((5,), 4))
    base, update = integers((5,), 3), Bias(pair)
    rows = update.rows(base[start:stop], start, F16, 1, "b")
    assert (rows.dtype, rows.tolist()) == (F16, (base + SCALING * pair.bias)[start:stop].tolist())
    own = LowRank(np.ones((1, 1), np.float32), pair.bias[:, None], SCALING)
    whole = merge_bound(base[:, None], [own], merging(F32), dtype=F16)[:, 0]
    assert np.array_equal(update.bound(base[start:stop], start, F32, F16), whole[start:stop])
    with pytest.raises(NonFiniteError, match="the name"):
        update.rows(np.full_like(base[start:stop], np.nan), start, F16, 1, "the name")


def test_rows_of_trained_tokens() -> None:
    base, values = integers((6, 3), 3), integers((3, 3), 4)
    update = TokenRows((4, 0, 2), values)
    expected = np.array(base)
    expected[[4, 0, 2]] = values
    for start, stop in ((0, 6), (0, 1), (1, 4), (3, 5), (2, 2)):
        rows = update.rows(base[start:stop], start, F16, 1, "table")
        assert (rows.dtype, rows.tolist()) == (F16, expected[start:stop].tolist())
        bound = update.bound(base[start:stop], start, BF16, F16)
        assert np.array_equal(bound, conversion_bound(expected[start:stop], BF16, F16))
    assert base.flags.owndata
    large = TokenRows((1,), np.full((1, 3), 1e30, np.float32))
    with pytest.raises(NonFiniteError, match=r"^table, row 1: 1\.0"):
        large.rows(base[1:3], 1, F16, 1, "table")


def test_sixteen_bits_are_summed_in_float32() -> None:
    assert merging(F16) == Precision(F16, accumulator=np.float32)
    assert merging(BF16) == Precision(BF16, accumulator=np.float32)
    assert (merging(F32), merging(F64)) == (Precision(F32), Precision(F64))


def test_two_conversions_move_a_number_no_further_than_their_bound() -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(2000), [0.0, 1e-7, -3e-8]])
    for precision, target in ((BF16, F16), (F16, BF16), (F32, F16)):
        moved = np.abs(values.astype(precision).astype(target).astype(np.float64) - values)
        bound = conversion_bound(values, precision, target)
        assert (moved <= bound).all()
        assert (moved / bound).max() > 0.5
    first, second = 2.0**-8, 2.0**-11
    tiny = float(ml_dtypes.finfo(BF16).smallest_subnormal), float(ml_dtypes.finfo(F16).smallest_subnormal)
    expected = first * 3 + tiny[0]
    expected += second * (3 + expected) + tiny[1]
    assert conversion_bound(np.array([-3.0]), BF16, F16).tolist() == [expected]


def test_a_conversion_rounds_once_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BLOCK_BYTES", 8 * 4)
    values = np.random.default_rng(0).standard_normal((3, 7))
    assert convert(values, F64, "w") is values
    assert np.array_equal(convert(values, F16, "w"), values.astype(np.float16))
    values[2, 3] = np.inf
    assert convert(values, F32, "w")[2, 3] == np.inf
    values[1, 6] = 1e39
    message = r"^w: 1e\+39 at \(1, 6\) overflows float32; choose a wider dtype$"
    with pytest.raises(NonFiniteError, match=message):
        convert(values, F32, "w")
    for base, target in ((np.arange(3), F32), (values, np.dtype(np.int8))):
        with pytest.raises(
            DTypeError, match=rf"^w: cannot be converted from {base.dtype} to {target}; leave"
        ):
            convert(base, target, "w")


def test_bits_are_compared_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BLOCK_BYTES", 8)
    one = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert same_bits(one, one.copy())
    assert same_bits(one.T, np.ascontiguousarray(one.T))
    for index in range(12):
        other = one.copy()
        other.reshape(-1)[index] += 1
        assert not same_bits(one, other)
    assert not same_bits(one, one.reshape(4, 3))
    assert not same_bits(one, one.view(np.int32))
    assert not same_bits(np.zeros(2), -np.zeros(2))
    assert same_bits(np.full(2, np.nan), np.full(2, np.nan))
    assert same_bits(np.zeros((0, 3)), np.zeros((0, 3)))
