from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from exact_linear import GRADIENTS, backward, error, forward, rational, rational_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ARRAYS, LoraProblem, lora_problems

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    Precision,
    ShapeError,
    adapted_linear_forward_bound,
    gamma,
    linear_backward_bound,
    linear_forward,
    linear_forward_bound,
    merge_bound,
    merged_against_unmerged_bound,
    merged_forward_bound,
    product_noise,
    unit_roundoff,
)
from loracle.reference.formats import FORMATS

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forward_bound(p, precision):
    return linear_forward_bound(p.x, p.W0, p.A, p.B, p.scaling, precision, bias=p.bias, dropout=p.dropout)


def backward_bound(p, precision):
    return linear_backward_bound(p.dy, p.x, p.W0, p.A, p.B, p.scaling, precision, dropout=p.dropout)


def dot(pairs, start, order):
    """Sum products one after the other in the operands' dtype, a rounding each time."""
    dtype = pairs[0][0].dtype
    total = start
    for a, b in pairs[::order]:
        total = dtype.type(total + dtype.type(a * b))
    return total


def product(a, b, order=1, start=None):
    """a @ b.T, every operation rounded to the dtype of a; ``start`` is what the sums begin with."""
    start = np.zeros((len(a), len(b)), a.dtype) if start is None else start
    rows = [
        [dot(list(zip(u, v, strict=True)), start[i, j], order) for j, v in enumerate(b)]
        for i, u in enumerate(a)
    ]
    return np.array(rows, a.dtype)


def peft_order(p, s):
    return product(p.x, p.W0) + p.bias + product(product(p.x * p.dropout, p.A), p.B) * s


def addmm_order(p, s):
    base = product(p.x, p.W0, -1) + p.bias
    return product(product(p.x * p.dropout, p.A, -1) * s, p.B, start=base)


def scaled_b_order(p, s):
    return (product(p.x, p.W0) + product(product(p.x * p.dropout, p.A), p.B * s, -1)) + p.bias


def scaled_x_order(p, s):
    return product(p.x, p.W0) + (product(product(p.x * p.dropout * s, p.A), p.B) + p.bias)


def delta_first_order(p, s):
    delta = product(p.B, np.ascontiguousarray(p.A.T)) * s
    return product(p.x * p.dropout, delta, start=product(p.x, p.W0)) + p.bias


ORDERS = [peft_order, addmm_order, scaled_b_order, scaled_x_order, delta_first_order]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_every_order_of_the_forward_stays_within_the_bound(dtype, order, data):
    problem = data.draw(lora_problems(most=9, dtype=dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        computed = order(problem, dtype.type(problem.scaling))
    assert computed.dtype == dtype
    if np.isfinite(computed.astype(F64)).all():
        assert (error(computed, forward(rational_problem(problem))) <= forward_bound(problem, dtype)).all()


@BY_DTYPE
@settings(max_examples=25)
@given(data=st.data())
def test_forward_and_backward_stay_within_the_bounds(dtype, data):
    problem = data.draw(lora_problems(most=12, dtype=dtype))
    exact = rational_problem(problem)
    with np.errstate(over="ignore", invalid="ignore"):
        y, gradients = forward(problem), backward(problem)
    bounds = backward_bound(problem, dtype)
    if np.isfinite(y.astype(F64)).all():
        assert (error(y, forward(exact)) <= forward_bound(problem, dtype)).all()
    for name in GRADIENTS:
        computed = getattr(gradients, name)
        if np.isfinite(computed.astype(F64)).all():
            assert (error(computed, getattr(backward(exact), name)) <= getattr(bounds, name)).all()


def long_problem(dtype, size=0.5, in_features=64, seed=0):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rng.normal(0, size, shape)

    problem = LoraProblem(
        x=numbers(7, in_features),
        dy=numbers(7, 3),
        W0=numbers(3, in_features),
        A=numbers(8, in_features),
        B=numbers(3, 8),
        bias=numbers(3),
        dropout=rng.integers(0, 2, (7, in_features)) * 2.0,
        scaling=1 / 3,
    )
    return problem.astype(dtype)


@BY_DTYPE
def test_long_sums_stay_within_the_bound(dtype):
    for seed in range(4):
        problem = long_problem(dtype, seed=seed)
        exact, bounds = rational_problem(problem), backward_bound(problem, dtype)
        assert (error(forward(problem), forward(exact)) <= forward_bound(problem, dtype)).all()
        for name in GRADIENTS:
            difference = error(getattr(backward(problem), name), getattr(backward(exact), name))
            assert (difference <= getattr(bounds, name)).all()


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64), (BF16, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bound(wrong, right):
    problem = long_problem(wrong)
    exact = rational_problem(problem)
    y, gradients = forward(problem), backward(problem)
    assert (error(y, forward(exact)) > forward_bound(problem, right)).any()
    bounds = backward_bound(problem, right)
    for name in GRADIENTS:
        difference = error(getattr(gradients, name), getattr(backward(exact), name))
        assert (difference > getattr(bounds, name)).any(), name


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "name", ["scaling off by a thousandth", "no dropout", "no bias", "no update", "scaling twice"]
)
def test_a_wrong_formula_breaks_the_bound(dtype, name):
    right = long_problem(dtype)
    arrays = {array: getattr(right, array) for array in ARRAYS}
    wrong = {
        "scaling off by a thousandth": LoraProblem(**arrays, scaling=right.scaling * 1.001),
        "no dropout": LoraProblem(**arrays | {"dropout": np.ones_like(right.x)}, scaling=right.scaling),
        "no bias": LoraProblem(**arrays | {"bias": np.zeros_like(right.bias)}, scaling=right.scaling),
        "no update": LoraProblem(**arrays, scaling=0.0),
        "scaling twice": LoraProblem(**arrays, scaling=right.scaling**2),
    }[name]
    assert (error(forward(wrong), forward(rational_problem(right))) > forward_bound(right, dtype)).any()


def test_float16_products_that_underflow_are_within_the_bound():
    def column(value, n=16):
        return np.full((1, n), value, F16)

    nothing = np.zeros((1, 16), F16), np.zeros((1, 1), F16)
    x, W0 = column(2.0**-14), column(2.0**-12)
    assert product(x, W0)[0, 0] == 0
    exact = 2.0**-22
    assert exact > gamma(40, unit_roundoff(F16)) * exact
    assert linear_forward_bound(x, W0, *nothing, 1.0, F16)[0, 0] >= exact
    assert merged_forward_bound(x, W0, F16)[0, 0] >= exact
    zero = np.zeros((1, 16), F16)
    # The adapter's: x A^T underflows and B is large; then scaling * B underflows and x A^T is large.
    bound = linear_forward_bound(x, zero, W0, np.full((1, 1), 2.0**10, F16), 1.0, F16)
    assert bound[0, 0] >= 2.0**10 * exact
    bound = linear_forward_bound(
        column(8.0), zero, column(8.0), np.full((1, 1), 2.0**-10, F16), 2.0**-15, F16
    )
    assert bound[0, 0] >= 16 * 64 * 2.0**-25
    bounds = linear_backward_bound(
        np.full((1, 1), 2.0**-14, F16), x, W0, W0, np.full((1, 1), 2.0**-12, F16), 1.0, F16
    )
    assert (bounds.dx >= 2.0**-26).all()
    assert (bounds.dA >= 2.0**-40).all()
    assert (bounds.dB >= 2.0**-36).all()


def growth(n, c, wide, dtype):
    a, b = gamma(n, unit_roundoff(wide)), gamma(c, unit_roundoff(dtype))
    return a + b + a * b


# Roundings that are stored, for y, dx, dA, dB, dbias and the merged y, counted by hand: an input (or the
# scaling) that need not be a number of the dtype, a product with a wide accumulator, an elementwise product,
# a sum; and the slack, 4 with an adapter and 3 without.
STORED = {
    (F32, None, F32): (8, 8, 7, 7, 4, 4),
    (F32, None, F64): (12, 12, 11, 11, 5, 6),
    (F16, None, BF16): (12, 12, 11, 11, 5, 6),
    (BF16, F32, BF16): (10, 10, 9, 9, 5, 5),
    (BF16, F32, F32): (14, 14, 13, 13, 6, 7),
    (F64, None, F32): (7, 7, 6, 6, 4, 4),
}


@pytest.mark.parametrize(("dtype", "wide", "inputs"), STORED, ids=str)
def test_the_bounds_count_the_roundings_that_they_say(dtype, wide, inputs):
    """With every tensor of ones, but dropout of twos, the sizes are counted by hand; nothing underflows."""
    N, n_in, n_out, r = 5, 7, 3, 2
    shapes = [(N, n_in), (N, n_out), (n_out, n_in), (r, n_in), (n_out, r), (n_out,), (N, n_in)]
    *ones, dropout = (np.ones(shape, inputs) for shape in shapes)
    p = LoraProblem(*ones, dropout=dropout + dropout, scaling=2.0)
    precision = Precision(dtype, accumulator=wide)

    def counted(bound, terms, size):
        """Return the one number of stored roundings that gives the bound, but for the underflows."""
        sizes = [growth(terms, count, precision.wide.dtype, dtype) * size for count in range(40)]
        return next(n for n in range(39) if sizes[n] <= bound.min() <= bound.max() < sizes[n + 1])

    bounds = backward_bound(p, precision)
    merged = merged_forward_bound(p.x, p.W0, precision, bias=p.bias)
    counts = (
        counted(forward_bound(p, precision), n_in + r, n_in + 1 + 4 * n_in * r),
        counted(bounds.dx, n_out + r, n_out + 4 * n_out * r),
        counted(bounds.dA, n_out + N, 4 * N * n_out),
        counted(bounds.dB, n_in + N, 4 * N * n_in),
        counted(bounds.dbias, N, N),
        counted(merged, n_in, n_in + 1),
    )
    assert counts == STORED[dtype, wide, inputs]


def test_sums_that_lose_the_same_way_each_time_reach_a_good_part_of_the_bound():
    x, W0 = np.ones((1, 64), BF16), np.full((1, 64), 1.1171875, BF16)
    exact = linear_forward(
        rational(x), rational(W0), rational(np.zeros((1, 64))), rational(np.zeros((1, 1))), 0.0
    )
    ratio = error(product(x, W0), exact) / merged_forward_bound(x, W0, BF16)
    assert 1 / 8 < ratio[0, 0] <= 1


def test_a_float32_accumulator_bounds_what_bfloat16_alone_cannot():
    problem = long_problem(F32, in_features=300)
    with pytest.raises(
        ConfigError, match=r"^gamma: expected n \* u below 1, got n 308 .* more precise accumulator"
    ):
        forward_bound(problem, BF16)
    bound = forward_bound(problem, Precision(BF16, accumulator=F32))
    p = problem.astype(BF16)
    wide = p.astype(F32)

    def stored(values):
        return values.astype(BF16).astype(F32)

    s = np.float32(BF16.type(p.scaling))
    h = stored(stored(wide.x * wide.dropout) @ wide.A.T)
    y = stored(stored(stored(wide.x @ wide.W0.T) + wide.bias) + stored(stored(h @ wide.B.T) * s))
    difference = error(y, forward(rational_problem(problem)))
    assert (difference <= bound).all()
    narrow_bound = forward_bound(problem, F32)
    assert (difference > narrow_bound).all()


def test_the_bound_of_a_rounded_merge_counts_the_roundings_that_it_says():
    """Two adapters of ones in bfloat16. Of stored roundings there are, of each update, the scaling's own and
    the multiplication's, and the first is added to once more: 4, and a slack of 5. W0 is added to twice, and
    has a slack of 1."""
    W0, A, B = np.ones((3, 7), BF16), np.ones((2, 7), BF16), np.ones((3, 2), BF16)
    adapters = [LowRank(A, B, 2.0), LowRank(A, B[:2], -0.5, rows=slice(1, 3))]
    size = np.array([[5.0], [6.0], [6.0]]) @ np.ones((1, 7))
    before = growth(2, 9, BF16, BF16) * (size - 1) + growth(2, 3, BF16, BF16)
    for stored in (BF16, F16):
        expected = before + unit_roundoff(stored) * (size + before)
        bound = merge_bound(W0, adapters, BF16, dtype=stored)
        assert (bound > expected).all()
        assert bound == pytest.approx(expected + (stored == F16) * 2.0**-14, rel=1e-8)
    assert np.array_equal(merge_bound(W0, adapters, BF16), merge_bound(W0, adapters, BF16, dtype=BF16))


def test_a_rounded_merge_of_nothing_may_underflow_when_it_is_stored():
    nothing = np.zeros((3, 4), F16), [LowRank(np.zeros((2, 4), F16), np.zeros((3, 2), F16), 1.0)]
    bound = merge_bound(*nothing, F16)
    assert ((bound > 2.0**-14) & (bound < 1.1 * 2.0**-14)).all()


def test_a_rounded_merge_needs_a_matrix_and_adapters_without_dropout():
    own = LowRank(np.ones((2, 4)), np.ones((3, 2)), 1.0)
    with pytest.raises(ShapeError, match=r"^W0: expected \(out, in\), got \(4,\)"):
        merge_bound(np.ones(4), [own], F32)
    with pytest.raises(ShapeError, match=r"^dropout: expected \(0, 4\) to fit .*, got \(1, 4\)"):
        merge_bound(np.ones((3, 4)), [replace(own, dropout=np.ones((1, 4)))], F32)


@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("low_bias", [False, True])
@pytest.mark.parametrize(
    ("precision", "stored"), [(BF16, BF16), (F64, BF16), (BF16, F64), (F64, None), (F32, None)], ids=str
)
def test_merged_against_unmerged_is_bounded_by_three_terms(precision, stored, low_bias, own_bias):
    """Each layer's own bound, and the rounding of the merged weight; dropout counts for neither."""
    rng = np.random.default_rng(5)

    def numbers(*shape):
        return rng.normal(size=shape).astype(F32)

    x, W0, bias = numbers(5, 7), numbers(4, 7), numbers(4) if own_bias else None
    adapters = [
        LowRank(numbers(2, 7), numbers(4, 2), -2.0, dropout=numbers(5, 7)),
        LowRank(numbers(3, 7), numbers(2, 3), 0.5, rows=slice(1, 3), bias=numbers(2) if low_bias else None),
        LowRank(numbers(1, 7), numbers(4, 1), -1.5, bias=numbers(4) if low_bias else None),
    ]
    weight = abs(W0.astype(F64))
    shift = np.zeros(4) if bias is None else abs(bias.astype(F64))
    for own in adapters:
        rows = own.rows or slice(None)
        weight[rows] += abs(own.scaling) * (abs(own.B.astype(F64)) @ abs(own.A.astype(F64)))
        shift[rows] += 0 if own.bias is None else abs(own.scaling) * abs(own.bias.astype(F64))
    rounding = unit_roundoff(F32 if stored is None else stored) * weight
    undropped = [replace(own, dropout=None) for own in adapters]
    expected = (
        adapted_linear_forward_bound(x, W0, undropped, precision, bias=bias)
        + merged_forward_bound(x, weight + rounding, precision, bias=shift if low_bias or own_bias else None)
        + abs(x.astype(F64)) @ rounding.T * (1 + 2.0**-20)
    )
    bound = merged_against_unmerged_bound(x, W0, adapters, precision, bias=bias, dtype=stored)
    assert bound == pytest.approx(expected, rel=1e-9)


def test_a_merged_weight_may_underflow_when_it_is_stored():
    x, W0 = np.ones((1, 7), F16), np.zeros((3, 7), F16)
    bound = merged_against_unmerged_bound(x, W0, [], F64)
    assert bound == pytest.approx(np.full((1, 3), 7 * 2.0**-24), rel=1e-5)


def test_the_merged_bound_holds_and_catches_a_narrower_dtype():
    problem = long_problem(F32)
    exact = forward(
        LoraProblem(*(rational(getattr(problem, name)) for name in ARRAYS), scaling=0.0), dropout=False
    )
    computed = problem.x @ problem.W0.T + problem.bias
    bound = merged_forward_bound(problem.x, problem.W0, F32, bias=problem.bias)
    assert (error(computed, exact) <= bound).all()
    narrow = problem.astype(F16)
    assert (error(narrow.x @ narrow.W0.T + narrow.bias, exact) > bound).any()
    assert (error(problem.x @ problem.W0.T, exact) > bound).any()


@BY_DTYPE
def test_a_scaling_of_zero_is_bounded(dtype):
    problem = long_problem(dtype)
    p = LoraProblem(*(getattr(problem, name) for name in ARRAYS), scaling=0.0)
    assert np.isfinite(forward_bound(p, dtype)).all()
    assert (error(forward(p), forward(rational_problem(p))) <= forward_bound(p, dtype)).all()


def test_unit_roundoff_and_gamma():
    assert [unit_roundoff(dtype) for dtype in DTYPES] == [2.0**-11, 2.0**-8, 2.0**-24, 2.0**-53]
    assert gamma(0, 2.0**-8) == 0
    exact = 100 * 2.0**-24 / (1 - 100 * 2.0**-24)
    assert exact < gamma(100, 2.0**-24) < exact * 1.00001
    for n in (256, 257):
        with pytest.raises(ConfigError, match="expected n"):
            gamma(n, 2.0**-8)
    assert gamma(255, 2.0**-8) >= 255


def test_noise_is_as_large_as_real_errors_and_never_smaller():
    rng = np.random.default_rng(3)
    k, u = 576, unit_roundoff(F32)
    x, w = rng.standard_normal(k).astype(F32), rng.standard_normal((400, k)).astype(F32)
    computed = np.zeros(400, F32)
    for i in range(k):
        computed += x[i] * w[:, i]
    exact = (w.astype(np.longdouble) @ x.astype(np.longdouble)).astype(float)
    rms = np.sqrt(np.mean((computed - exact) ** 2))
    energy = np.linalg.norm(w.astype(float) * x, axis=1)
    noise = product_noise(k, u, energy)
    assert noise.shape == (400,)
    assert 0.1 < rms / np.sqrt(np.mean(noise**2)) < 1
    assert product_noise(4, 2.0**-24, 3.0) == 6 * 2.0**-24
    assert product_noise(4, 2.0**-24, energy.astype(F32)).dtype == F64


def test_bounds_have_the_shapes_of_what_they_bound():
    rng = np.random.default_rng(4)
    x, dy = rng.random((2, 3, 5)), rng.random((2, 3, 4))
    W0, A, B = rng.random((4, 5)), rng.random((2, 5)), rng.random((4, 2))
    assert linear_forward_bound(x, W0, A, B, 1.0, F64).shape == dy.shape
    assert linear_forward_bound(x[0, 0], W0, A, B, 1.0, F64).shape == (4,)
    assert merged_forward_bound(x, W0, F64).shape == dy.shape
    for lead in ((), (0,), (0, 0)):
        bounds = linear_backward_bound(dy[lead], x[lead], W0, A, B, 1.0, F64)
        shapes = [getattr(bounds, name).shape for name in GRADIENTS]
        assert shapes == [x[lead].shape, A.shape, B.shape, (4,)]
        assert all(getattr(bounds, name).dtype == F64 for name in GRADIENTS)


def test_wrong_arguments_are_refused():
    x, W0, A, B = np.ones((2, 4)), np.ones((3, 4)), np.ones((2, 4)), np.ones((3, 2))
    with pytest.raises(ShapeError, match=r"^B: "):
        linear_forward_bound(x, W0, A, B.T, 1.0, F32)
    with pytest.raises(ShapeError, match=r"^dy: "):
        linear_backward_bound(x, x, W0, A, B, 1.0, F32)
    with pytest.raises(ShapeError, match=r"^x: "):
        merged_forward_bound(x, W0.T, F32)
    with pytest.raises(DTypeError, match=r"^dtype: "):
        linear_forward_bound(x, W0, A, B, 1.0, np.int8)
    with pytest.raises(DTypeError, match=r"^tensor: .*got dtype"):
        linear_forward_bound(x.astype(int), W0, A, B, 1.0, F32)
    with pytest.raises(
        ConfigError, match=r"^accumulator: expected at least the precision of float32, got bfloat16"
    ):
        linear_forward_bound(x, W0, A, B, 1.0, Precision(F32, accumulator=BF16))
