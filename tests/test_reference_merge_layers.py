"""The merge of embeddings, convolutions, experts and biases: the layer's own answers, rounded once."""

import sys
from fractions import Fraction

import numpy as np
import pytest
from exact_linear import rational

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    NonFiniteError,
    ShapeError,
    merge,
    merge_adapters,
    merge_bias,
    merge_convolution,
    merge_embedding,
    merge_exact,
    merge_experts,
    round_fraction,
)
from loracle.reference.formats import BFLOAT16, FORMATS, float_format

F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
BY_DTYPE = pytest.mark.parametrize("dtype", [form.dtype for form in FORMATS], ids=str)


def assert_same_bits(actual, expected):
    bits = float_format(expected.dtype).bits
    assert actual.dtype == expected.dtype
    assert np.array_equal(np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits))


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@BY_DTYPE
def test_an_embedding_is_merged_as_its_transpose(dtype):
    W0, A, B = numbers(1, 11, 4).astype(dtype), numbers(2, 3, 11), numbers(3, 4, 3)
    merged = merge_embedding(W0, [LowRank(A, B, 1 / 3)], threads=1)
    assert_same_bits(merged, merge_exact(W0.T, A, B, 1 / 3, dtype).T)
    out = np.zeros((11, 4), F32)
    assert merge_embedding(W0, [LowRank(A, B, 1 / 3)], dtype=F32, out=out) is out
    assert_same_bits(out, merge_exact(W0.T, A, B, 1 / 3, F32).T)
    with pytest.raises(ShapeError, match=r"^lora_A of wte: expected \(r, 11\) .*got \(4, 3\)"):
        merge_embedding(W0, [LowRank(B, A, 1.0)], name="wte")


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 2)], ids=str)
@BY_DTYPE
def test_a_convolution_is_merged_as_a_matrix(dtype, kernel):
    W0, A = numbers(1, 5, 2, *kernel).astype(dtype), numbers(2, 3, 2, *kernel)
    flat, peft = numbers(3, 5, 3), numbers(3, 5, 3).reshape(5, 3, *[1] * len(kernel))
    expected = merge_exact(W0.reshape(5, -1), A.reshape(3, -1), flat, 0.7, dtype).reshape(W0.shape)
    for B in (flat, peft):
        merged = merge_convolution(W0, [LowRank(A, B, 0.7)])
        assert merged.shape == W0.shape
        assert_same_bits(merged, expected)
    turned = np.moveaxis(np.ascontiguousarray(np.moveaxis(W0, 0, -1)), -1, 0)
    assert not turned.flags.c_contiguous
    assert_same_bits(merge_convolution(turned, [LowRank(A, flat, 0.7)], threads=1), expected)
    out = np.zeros(W0.shape, F64)
    assert merge_convolution(W0, [LowRank(A, flat, 0.7)], dtype=F64, out=out) is out
    assert_same_bits(out, merge_exact(W0.reshape(5, -1), A.reshape(3, -1), flat, 0.7, F64).reshape(W0.shape))


def test_a_convolutions_wrong_output_is_refused_before_anything_is_written():
    W0, adapter = np.ones((4, 2, 3), F32), LowRank(np.ones((1, 2, 3)), np.ones((4, 1)), 1.0)
    got = r"got \(4, .* with strides \(.*\); allocate it with numpy.empty$"
    message = rf"^out of conv: expected C-contiguous \(4, 2, 3\), {got}"
    for out in (np.zeros((4, 3, 2), F32), np.zeros((3, 2, 4), F32).T):
        with pytest.raises(ShapeError, match=message):
            merge_convolution(W0, [adapter], out=out, name="conv")
        assert not out.any()
    with pytest.raises(ShapeError, match=r"^A: "):
        merge_convolution(W0, [LowRank(np.ones((1, 3, 2)), np.ones((4, 1)), 1.0)])
    with pytest.raises(NonFiniteError, match=r"^lora_A of conv: expected finite numbers, got nan"):
        merge_convolution(W0, [LowRank(adapter.A * np.nan, adapter.B, 1.0)], name="conv")


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@BY_DTYPE
def test_each_expert_is_merged_with_its_own_factors(dtype, fan_in_fan_out):
    W0, A, B = numbers(1, 3, 4, 5).astype(dtype), numbers(2, 3, 2, 5), numbers(3, 3, 4, 2)
    second = LowRank(numbers(4, 3, 1, 5), numbers(5, 3, 4, 1), -1.5)
    stored = np.ascontiguousarray(W0.transpose(0, 2, 1)) if fan_in_fan_out else W0
    merged = merge_experts(stored, [LowRank(A, B, 0.5), second], fan_in_fan_out=fan_in_fan_out)
    for e in range(3):
        own = [LowRank(A[e], B[e], 0.5), LowRank(second.A[e], second.B[e], -1.5)]
        expected = merge_adapters(W0[e], own)
        assert_same_bits(merged[e].T if fan_in_fan_out else merged[e], expected)
    one = merge_experts(stored, [LowRank(A, B, 0.5)], fan_in_fan_out=fan_in_fan_out, dtype=F64, threads=1)
    assert_same_bits(one[1].T if fan_in_fan_out else one[1], merge_exact(W0[1], A[1], B[1], 0.5, F64))


def test_experts_are_all_checked_before_anything_is_written():
    W0, A, B = np.ones((2, 3, 4), F32), np.ones((2, 1, 4)), np.ones((2, 3, 1))
    out = np.full((2, 3, 4), 7, F32)
    A[1, 0, 2] = np.inf
    message = r"^lora_A of experts\[1\]: expected finite numbers, got inf at \[0, 2\]"
    with pytest.raises(NonFiniteError, match=message):
        merge_experts(W0, [LowRank(A, B, 1.0)], out=out, name="experts")
    assert (out == 7).all()
    A[1] = 1
    assert merge_experts(W0, [LowRank(A, B, 1.0)], out=out, name="experts") is out
    assert (out == 2).all()
    big = np.zeros((2, 3, 1))
    big[1, 2], A[1, 0, :3] = 1e39, 0
    with pytest.raises(NonFiniteError, match=r"^experts\[1\]: .*overflow at \[2, 3\]"):
        merge_experts(W0, [LowRank(A, big, 1.0)], name="experts")


def test_what_does_not_fit_experts_is_named():
    W0, A, B = np.ones((2, 3, 4), F32), np.ones((2, 1, 4)), np.ones((2, 3, 1))
    with pytest.raises(
        ShapeError, match=r"^mlp: expected \(E, out, in\), got shape \(3, 4\); stack the experts"
    ):
        merge_experts(W0[0], [LowRank(A, B, 1.0)], name="mlp")
    with pytest.raises(
        ShapeError, match=r"^lora_A of mlp: expected 3 axes, the first of 2 experts, got \(1, 4\); stack"
    ):
        merge_experts(W0, [LowRank(A[0], B, 1.0)], name="mlp")
    with pytest.raises(
        ShapeError, match=r"^lora_B of adapter 1 of mlp: .* of 2 experts, got \(1, 3, 1\); stack"
    ):
        merge_experts(W0, [LowRank(A, B, 1.0), LowRank(A, B[:1], 1.0)], name="mlp")
    with pytest.raises(
        ConfigError, match=r"^rows of mlp: expected None for experts, got slice\(0, 1, None\)"
    ):
        merge_experts(W0, [LowRank(A, B, 1.0, rows=slice(0, 1))], name="mlp")
    with pytest.raises(
        ShapeError, match=r"^out of mlp: expected shape \(2, 3, 4\), got \(2, 4, 3\); allocate"
    ):
        merge_experts(W0, [LowRank(A, B, 1.0)], out=np.zeros((2, 4, 3), F32), name="mlp")
    with pytest.raises(ConfigError, match=r"^threads: "):
        merge_experts(W0, [LowRank(A, B, 1.0)], threads=0)


@BY_DTYPE
def test_biases_of_lora_b_are_scaled_and_rounded_once_in_all(dtype):
    A, B, bias = np.ones((1, 1)), np.ones((3, 1)), numbers(1, 3).astype(dtype)
    first, second = numbers(2, 3).astype(F32), numbers(3, 2).astype(BFLOAT16)
    adapters = [
        LowRank(A, B, 1 / 3, bias=first),
        LowRank(A, B[1:], -2.0, bias=second, rows=slice(1, 3)),
        LowRank(A, B, 5.0),
    ]
    exact = rational(bias) + Fraction(1 / 3) * rational(first)
    exact[1:] -= 2 * rational(second)
    assert_same_bits(merge_bias(bias, adapters), np.array([round_fraction(q, dtype) for q in exact]))
    wide = merge_bias(bias, adapters, dtype=F64)
    assert_same_bits(wide, np.array([round_fraction(q, F64) for q in exact]))
    assert_same_bits(merge_bias(bias, adapters[2:]), bias)
    assert merge_bias(bias, adapters).shape == (3,)


def test_wrong_biases_are_named():
    A, B, bias = np.ones((1, 1)), np.ones((3, 1)), np.ones(3, F32)
    with pytest.raises(
        ShapeError, match=r"^c_fc.bias: expected \(out,\), got shape \(1, 3\); pass the bias as a"
    ):
        merge_bias(bias[None], [], name="c_fc.bias")
    with pytest.raises(
        ShapeError, match=r"^bias of lora_B: expected \(out,\), got shape \(3, 1\); pass it as"
    ):
        merge_bias(bias, [LowRank(A, B, 1.0, bias=B)])
    with pytest.raises(ShapeError, match=r"^lora_B of c_fc.bias: expected \(3, 1\)"):
        merge_bias(bias, [LowRank(A, B, 1.0, bias=bias[1:])], name="c_fc.bias")
    with pytest.raises(NonFiniteError, match=r"^bias: .*overflow at \[0, 0\]"):
        merge_bias(bias.astype(F16), [LowRank(A, B, 1e9, bias=bias)])
    assert merge(np.ones((1, 1), F32), A, A, 1.0) == 2


def test_defaults_and_threads_reach_the_merge(monkeypatch):
    """Each function calls the weight W0 unless told otherwise, and merges with the threads that it is
    given.
    """
    module = sys.modules["loracle.reference.merge_layers"]
    plain, given = module.merge_adapters, []
    monkeypatch.setattr(
        module,
        "merge_adapters",
        lambda *tensors, threads=None, **options: (
            given.append(threads) or plain(*tensors, threads=threads, **options)
        ),
    )
    W, A, B = np.ones((3, 4), F32), np.ones((1, 4)), np.ones((3, 1))
    nan = np.full((3, 4), np.nan, F32)
    cases = [
        (merge_embedding, W.T, nan.T, LowRank(A, B, 1.0)),
        (merge_convolution, W.reshape(3, 2, 2), nan.reshape(3, 2, 2), LowRank(A.reshape(1, 2, 2), B, 1.0)),
        (merge_experts, W[None], nan[None], LowRank(A[None], B[None], 1.0)),
    ]
    for function, weight, wrong, adapter in cases:
        given.clear()
        assert (function(weight, [adapter], threads=3) == 2).all()
        assert given == [3]
        name = r"W0\[0\]" if function is merge_experts else "W0"
        with pytest.raises(NonFiniteError, match=rf"^{name}: expected finite numbers, got nan at \[0, 0\]"):
            function(wrong, [adapter])
    given.clear()
    merge_bias(np.ones(3, F32), [])
    assert given == [1]


def test_experts_in_another_dtype_are_checked_for_it():
    with pytest.raises(DTypeError, match=r"^dtype of the merged W0\[0\]: expected one of float16"):
        merge_experts(np.ones((1, 3, 4), F32), [], dtype="i4", out=np.zeros((1, 3, 4), "i4"))


def test_an_adapter_without_a_bias_does_not_hide_the_next():
    A, B = np.ones((1, 1)), np.ones((3, 1))
    adapters = [LowRank(A, B, 1.0), LowRank(A, B, 2.0, bias=np.ones(3, F16))]
    assert merge_bias(np.zeros(3, F32), adapters).tolist() == [2, 2, 2]
    with pytest.raises(
        ShapeError, match=r"^bias of lora_B of adapter 1: expected \(out,\), got shape \(3, 1\)"
    ):
        merge_bias(np.zeros(3, F32), [adapters[0], LowRank(A, B, 1.0, bias=B)])
