import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import DTypeError, LowRank, ShapeError, merge_adapters, unmerge, unmerge_record
from loracle.reference.formats import BFLOAT16, FORMATS, float_format

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
DTYPES = [form.dtype for form in FORMATS]
# The module; the package has a function of that name.
UNMERGE = sys.modules["loracle.reference.unmerge"]


def assert_same_bits(actual, expected):
    bits = float_format(expected.dtype).bits
    assert actual.dtype == expected.dtype
    assert np.array_equal(np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits))


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.booleans(),
)
def test_every_bit_comes_back(seed, dtype, outputs, inputs, count, fan_in_fan_out):
    rng = np.random.default_rng(seed)
    W0 = (rng.normal(size=(outputs, inputs)) * rng.choice([0, 1, 2.0**-6], (outputs, inputs))).astype(dtype)
    W0[rng.integers(0, outputs), rng.integers(0, inputs)] = -0.0
    adapters = [
        LowRank(rng.normal(size=(2, inputs)), rng.normal(size=(outputs, 2)), rng.choice([0.5, -3.0]))
        for _ in range(count)
    ]
    stored = np.ascontiguousarray(W0.T) if fan_in_fan_out else W0
    merged = merge_adapters(stored, adapters, fan_in_fan_out=fan_in_fan_out)
    record = unmerge_record(stored, merged, adapters, fan_in_fan_out=fan_in_fan_out)
    for _ in range(3):
        restored = unmerge(merged, adapters, record, fan_in_fan_out=fan_in_fan_out)
        assert_same_bits(restored, stored)
        merged = merge_adapters(restored, adapters, fan_in_fan_out=fan_in_fan_out)


def test_the_record_holds_what_subtracting_does_not_restore_and_no_more():
    """1 + 100 and 100 + 2^-10 are numbers of float16 with a spacing of 2^-4: the second loses its share of
    W0.
    """
    W0 = np.array([[1.0, 2.0**-10, -0.0, 3.0]], F16)
    adapters = [LowRank(np.full((1, 4), 10.0), np.full((1, 1), 10.0), 1.0)]
    merged = merge_adapters(W0, adapters)
    assert merged.tolist() == [[101.0, 100.0, 100.0, 103.0]]
    record = unmerge_record(W0, merged, adapters)
    assert record.shape == (1, 4)
    assert record.positions.tolist() == [1, 2]
    assert_same_bits(record.values, W0[0, 1:3])
    assert record.nbytes == 2 * 8 + 2 * 2
    assert_same_bits(unmerge(merged, adapters, record, threads=1), W0)


@pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=str)
def test_a_large_weight_comes_back_from_a_record_much_smaller_than_itself(monkeypatch, dtype):
    monkeypatch.setattr(UNMERGE, "_PIECE_ENTRIES", 5000)
    rng = np.random.default_rng(1)
    W0 = (rng.normal(size=(300, 500)) * 0.02).astype(dtype)
    A, B = (rng.normal(size=(8, 500)) * 0.01).astype(F32), (rng.normal(size=(300, 8)) * 0.02).astype(F32)
    adapters = [LowRank(A, B, 2.0, rows=None)]
    merged = merge_adapters(W0, adapters)
    record = unmerge_record(W0, merged, adapters, threads=2)
    assert 0 < len(record.positions) < 0.25 * W0.size
    assert_same_bits(unmerge(merged, adapters, record), W0)


def test_what_does_not_fit_is_named():
    W0, adapters = np.ones((2, 3), F32), [LowRank(np.ones((1, 3)), np.ones((2, 1)), 1.0)]
    merged = merge_adapters(W0, adapters)
    record = unmerge_record(W0, merged, adapters)
    with pytest.raises(ShapeError, match=r"^merged q: expected shape \(2, 3\), got \(3, 2\); merge this W0$"):
        unmerge_record(W0, merged.T, adapters, name="q")
    with pytest.raises(
        DTypeError, match=r"^merged q: expected float32, got float16; merge to W0's own dtype$"
    ):
        unmerge_record(W0, merged.astype(F16), adapters, name="q")
    with pytest.raises(
        ShapeError, match=r"^record of q: expected shape \(3, 2\), got \(2, 3\); find its own"
    ):
        unmerge(merged.T, adapters, record, name="q")
    with pytest.raises(
        DTypeError, match=r"^record of q: expected float16, got float32; find its own record$"
    ):
        unmerge(merged.astype(F16), adapters, record, name="q")
    with pytest.raises(ShapeError, match=r"^lora_A of q: "):
        unmerge_record(W0.T, merged.T, adapters, name="q")
    with pytest.raises(ShapeError, match=r"^lora_A of q: "):
        unmerge(merged.T, adapters, unmerge_record(W0.T, merged.T, []), name="q")


def test_defaults_and_threads_reach_the_merge(monkeypatch):
    plain, given = UNMERGE.merge_adapters, []
    monkeypatch.setattr(
        UNMERGE,
        "merge_adapters",
        lambda *tensors, threads, **options: (
            given.append(threads) or plain(*tensors, threads=threads, **options)
        ),
    )
    W0, adapters = np.ones((2, 3), F32), [LowRank(np.ones((1, 3)), np.ones((2, 1)), 1.0)]
    merged = merge_adapters(W0, adapters)
    record = unmerge_record(W0, merged, adapters, threads=2)
    unmerge(merged, adapters, record, threads=3)
    assert given == [2, 3]
    with pytest.raises(ShapeError, match=r"^merged W0: "):
        unmerge_record(W0, merged.T, adapters)
    with pytest.raises(ShapeError, match=r"^record of W0: "):
        unmerge(merged.T, adapters, record)
