"""Bounds in other precisions than a plain dtype, of merges, and of merged against unmerged."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import lora_problems

from loracle.reference import (
    LowRank,
    Precision,
    adapted_linear_forward,
    linear_backward,
    linear_backward_bound,
    linear_forward,
    linear_forward_bound,
    merge_adapters,
    merge_bound,
    merge_exact,
    merged_against_unmerged_bound,
    merged_forward_bound,
    round_float64,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
TF32 = Precision(F32, multiplicands="tf32")


def to_tf32(values):
    """Round float32 numbers to 11 significant bits, ties to even."""
    bits = values.astype(F32).view(np.uint32)
    even = ((bits >> np.uint32(13)) & np.uint32(1)) + np.uint32((1 << 12) - 1)
    return ((bits + even) & ~np.uint32((1 << 13) - 1)).view(F32)


def tf32_product(a, b):
    return to_tf32(a) @ to_tf32(b)


def long_arrays(seed, rows=7, n_in=64, n_out=5, r=8):
    rng = np.random.default_rng(seed)
    shapes = [(rows, n_in), (rows, n_out), (n_out, n_in), (r, n_in), (n_out, r)]
    return [rng.normal(size=shape).astype(F32) for shape in shapes]


def test_tf32_keeps_eleven_bits():
    assert to_tf32(np.array([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -(1 + 2.0**-12)])).tolist() == [
        1 + 2.0**-10,
        1,
        1 + 2.0**-9,
        -1,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_products_of_tf32_are_inside_its_bound_and_outside_float32s(seed):
    x, dy, W0, A, B = long_arrays(seed)
    wide = [array.astype(F64) for array in (x, dy, W0, A, B)]
    s = np.float32(0.3)
    h, dh = tf32_product(x, A.T), tf32_product(dy, B) * s
    computed = {
        "y": tf32_product(x, W0.T) + tf32_product(h, B.T) * s,
        "dx": tf32_product(dy, W0) + tf32_product(dh, A),
        "dA": tf32_product(dh.T, x),
        "dB": tf32_product(dy.T, h) * s,
    }
    gradients = linear_backward(wide[1], wide[0], *wide[2:], 0.3)
    exact = {"y": linear_forward(wide[0], *wide[2:], 0.3)}
    exact |= {name: getattr(gradients, name) for name in ("dx", "dA", "dB")}
    for precision, holds in ((TF32, True), (F32, False)):
        bounds = linear_backward_bound(dy, x, W0, A, B, 0.3, precision)
        allowed = {"y": linear_forward_bound(x, W0, A, B, 0.3, precision)}
        allowed |= {name: getattr(bounds, name) for name in ("dx", "dA", "dB")}
        for name, value in computed.items():
            # What float64 itself is off by is 2^-20 of the smaller of the two bounds.
            inside = np.abs(value.astype(F64) - exact[name]) <= allowed[name]
            assert inside.all() if holds else not inside.all(), name


def test_tf32_counts_two_roundings_for_each_product_on_the_longest_path():
    """With products of ones and nothing lost, the bound's multiple of the size is the growth itself."""
    x, W0, A, B = np.ones((1, 4), F32), np.ones((1, 4), F32), np.ones((1, 4), F32), np.ones((1, 1), F32)
    u = 2.0**-11
    merged = merged_forward_bound(x, W0, TF32) - merged_forward_bound(x, W0, F32)
    assert merged[0, 0] / 4 == pytest.approx((1 + u) ** 2 - 1, rel=2.0**-10)
    both = linear_forward_bound(x, W0, A, B, 1.0, TF32) - linear_forward_bound(x, W0, A, B, 1.0, F32)
    assert both[0, 0] / 8 == pytest.approx((1 + u) ** 4 - 1, rel=2.0**-10)


def test_multiplicands_may_be_of_any_dtype():
    x, W0 = np.ones((1, 4), F32), np.ones((1, 4), F32)
    half = merged_forward_bound(x, W0, Precision(F32, multiplicands=BF16)) - merged_forward_bound(x, W0, F32)
    assert half[0, 0] / 4 == pytest.approx((1 + 2.0**-8) ** 2 - 1, rel=2.0**-10)


@pytest.mark.parametrize("failure", [1e-2, 1e-9])
@pytest.mark.parametrize("n_in", [256, 4096])
def test_the_probabilistic_bound_holds_for_large_sums_and_is_much_smaller(n_in, failure):
    """Sums one term after the other, rounded each time: where the worst case grows with n, errors do not."""
    x, _, W0, A, B = long_arrays(1, rows=3, n_in=n_in, n_out=4, r=2)
    likely, certain = (
        linear_forward_bound(x, W0, A, B, 0.5, Precision(F32, failure=p)) for p in (failure, None)
    )

    def product(a, b):
        total = np.zeros((len(a), b.shape[1]), F32)
        for k in range(a.shape[1]):
            total += a[:, k : k + 1] * b[k : k + 1]
        return total

    y = product(x, W0.T) + product(product(x, A.T), B.T) * np.float32(0.5)
    exact = linear_forward(*(array.astype(F64) for array in (x, W0, A, B)), 0.5)
    off = np.abs(y.astype(F64) - exact)
    assert (off <= likely).all()
    assert (off > linear_forward_bound(x, W0, A, B, 0.5, F64)).any()
    z = math.sqrt(2 * math.log(2 * n_in * 2 * 12 / failure))
    assert (likely < certain * 1.5 * z / math.sqrt(n_in)).all()
    stricter = linear_forward_bound(x, W0, A, B, 0.5, Precision(F32, failure=failure / 2))
    assert (stricter > likely).all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_a_merge_that_rounds_after_every_operation_is_inside_the_bound(dtype, data):
    """PEFT's order, in the weight's own dtype, and with float32 factors that are rounded to it at the end."""
    p = data.draw(lora_problems(most=8, dtype=dtype))
    exact = merge_exact(*(rational_to(p, name) for name in ("W0", "A", "B")), p.scaling, F64)
    slack_of_float64 = np.abs(exact) * 2.0**-52 + 1e-300
    for work in (dtype, F32) if dtype.itemsize == 2 else (dtype,):
        A, B = p.A.astype(work), p.B.astype(work)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = (B @ A).astype(work) * work.type(p.scaling)
            merged = (p.W0.astype(work) + delta).astype(dtype)
        bound = merge_bound(p.W0, [LowRank(A, B, p.scaling)], work, dtype=dtype)
        if np.isfinite(merged.astype(F64)).all():
            assert (np.abs(merged.astype(F64) - exact) <= bound + slack_of_float64).all()


def rational_to(problem, name):
    return getattr(problem, name).astype(F64)


def test_the_merge_bound_catches_a_narrower_dtype_a_missing_adapter_and_a_wrong_scaling():
    rng = np.random.default_rng(2)
    W0, A, B = (rng.normal(size=shape).astype(F32) for shape in [(9, 12), (4, 12), (9, 4)])
    half = LowRank(A[:2], B[4:, :2], 0.5, rows=slice(4, 9))
    adapters = [LowRank(A, B, 0.3), half]
    exact = merge_adapters(W0, adapters, dtype=F64)
    bound = merge_bound(W0, adapters, F32)
    assert bound.shape == W0.shape

    def merged(cast=F32, scaling=0.3, rows=slice(4, 9)):
        delta = ((B.astype(cast) @ A.astype(cast)).astype(cast) * cast.type(scaling)).astype(F32)
        result = W0 + delta
        result[rows] += (half.B @ half.A) * np.float32(0.5)
        return result.astype(F64)

    assert (np.abs(merged() - exact) <= bound).all()
    for wrong in (merged(cast=F16), merged(scaling=0.3003), merged(rows=slice(3, 8)), W0.astype(F64)):
        assert (np.abs(wrong - exact) > bound).any()
    to_half = merge_bound(W0, adapters, F32, dtype=F16)
    assert (np.abs(merged().astype(F16).astype(F64) - exact) <= to_half).all()
    assert (np.abs(merged().astype(F16).astype(F64) - exact) > bound).any()
    assert (to_half > 2.0**-11 * np.abs(exact)).all()


@pytest.mark.parametrize("weight", [F32, BF16, F16], ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_merged_and_unmerged_layers_differ_by_no_more_than_their_bound(weight, data):
    p = data.draw(lora_problems(most=10, dtype=F32))
    W0 = p.W0.astype(weight)
    rows = slice(len(W0) // 2, len(W0))
    adapters = [
        LowRank(p.A, p.B, p.scaling, bias=p.bias, dropout=p.dropout),
        LowRank(p.A, p.B[rows], 0.5, bias=p.bias[rows], rows=rows),
    ]
    plain = [replace(adapter, dropout=None) for adapter in adapters]
    unmerged = adapted_linear_forward(p.x, W0.astype(F32), plain, bias=p.bias)
    W = merge_adapters(W0, adapters).astype(F32)
    bias = p.bias + np.float32(p.scaling) * p.bias
    bias[rows] += np.float32(0.5) * p.bias[rows]
    merged = p.x @ W.T + bias
    bound = merged_against_unmerged_bound(p.x, W0, adapters, F32, bias=p.bias)
    assert (np.abs(merged.astype(F64) - unmerged.astype(F64)) <= bound).all()


def test_merged_against_unmerged_counts_the_rounding_of_the_weight_and_catches_what_is_missing():
    rng = np.random.default_rng(3)
    x, W0, A, B, bias = (rng.normal(size=shape) for shape in [(4, 16), (6, 16), (2, 16), (6, 2), (6,)])
    adapters = [LowRank(A, B, 0.5, bias=bias)]
    exact = adapted_linear_forward(x, W0, adapters)
    wide = merged_against_unmerged_bound(x, W0, adapters, F64)
    narrow = merged_against_unmerged_bound(x, W0, adapters, F64, dtype=F32)
    sizes = np.abs(x) @ (np.abs(W0) + 0.5 * np.abs(B) @ np.abs(A)).T
    assert (narrow >= 2.0**-24 * sizes).all()
    assert (narrow <= 2.0**-24 * sizes * 1.001).all()
    W = merge_adapters(W0, adapters)
    merged = x @ W.T + 0.5 * bias
    assert (np.abs(merged - exact) <= wide).all()
    rounded = x @ round_float64(W, F32).astype(F64).T + 0.5 * bias
    assert (np.abs(rounded - exact) <= narrow).all()
    assert (np.abs(rounded - exact) > wide).any()
    for wrong in (x @ W.T, x @ W0.T + 0.5 * bias, x @ W.T + bias):
        assert (np.abs(wrong - exact) > narrow).any()
    without = merged_against_unmerged_bound(x, W0, [LowRank(A, B, 0.5)], F64)
    assert (without < wide).all()
    own = merged_against_unmerged_bound(x, W0, [LowRank(A, B, 0.5)], F64, bias=bias)
    assert (own > without).all()
