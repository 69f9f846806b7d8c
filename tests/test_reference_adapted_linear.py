import re
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import (
    DTYPES,
    LinearProblem,
    assert_difference_quotients,
    assert_exact_tier,
    assert_within_bounds,
    breaks_forward,
    broken_gradients,
    linear_problems,
)

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    Precision,
    ShapeError,
    adapted_linear_backward,
    adapted_linear_backward_bound,
    adapted_linear_forward,
    adapted_linear_forward_bound,
    linear_backward,
    linear_backward_bound,
    linear_forward,
    linear_forward_bound,
    merge_bound,
    merged_against_unmerged_bound,
    merged_forward_bound,
)
from loracle.reference.linear import weight_update
from loracle.reference.precision import gamma

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
EXAMPLES = settings(max_examples=30)


def by_hand(dtype, **options):
    """in = 2, out = 3, two adapters of rank 1; y and the gradients below were worked out on paper."""
    return LinearProblem(
        dy=np.array([[1, 2, -1], [0, 1, 1]], dtype),
        W0=np.array([[1, 0], [0, 1], [1, 1]], dtype),
        adapters=(
            LowRank(
                np.array([[1, 1]], dtype),
                np.array([[1], [0], [2]], dtype),
                2.0,
                bias=np.array([1, 2, 0], dtype),
            ),
            LowRank(
                np.array([[0, 1]], dtype),
                np.array([[3], [1]], dtype),
                -1.0,
                bias=np.array([0, 4], dtype),
                dropout=np.array([[1, 2], [2, 0]], dtype),
                rows=slice(1, 3),
            ),
        ),
        x=np.array([[1, 2], [3, -1]], dtype),
        bias=np.array([1, 0, 1], dtype),
        **options,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(object)], ids=str)
def test_two_adapters_worked_out_by_hand(dtype):
    p = by_hand(dtype)
    assert p.forward().tolist() == [[10, -6, 8], [10, 3, 7]]
    gradients = p.backward()
    assert gradients["x"].tolist() == [[-2, -11], [5, 6]]
    assert gradients["bias"].tolist() == [1, 3, 0]
    assert gradients[0, "A"].tolist() == [[10, -8]]
    assert gradients[0, "B"].tolist() == [[6], [16], [-2]]
    assert gradients[0, "bias"].tolist() == [2, 6, 0]
    assert gradients[1, "A"].tolist() == [[-29, -20]]
    assert gradients[1, "B"].tolist() == [[-8], [4]]
    assert gradients[1, "bias"].tolist() == [-3, 0]
    for array in (p.forward(), *gradients.values()):
        assert array.dtype == dtype
    turned = replace(p, W0=p.W0.T, fan_in_fan_out=True)
    assert turned.forward().tolist() == p.forward().tolist()
    for key, gradient in turned.backward().items():
        assert gradient.tolist() == gradients[key].tolist()


@EXAMPLES
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: linear_problems(dtype, exact=True)))
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(problem):
    assert_exact_tier(problem)


@EXAMPLES
@given(linear_problems(F32, exact=True))
def test_gradients_are_the_exact_difference_quotients(problem):
    assert_difference_quotients(problem.rational())


def undropped(problem):
    adapters = tuple(replace(own, dropout=None) for own in problem.adapters)
    return replace(problem, adapters=adapters)


@EXAMPLES
@given(linear_problems(F64, exact=True))
def test_without_dropout_the_layer_is_one_with_the_sum_of_the_updates(problem):
    p = undropped(problem).rational()
    W0 = p.W0.T if p.fan_in_fan_out else p.W0
    weight, bias = W0, np.zeros(len(W0), int) if p.bias is None else p.bias
    for own in p.adapters:
        weight = weight + weight_update(own, len(W0))
        rows = slice(None) if own.rows is None else own.rows
        if own.bias is not None:
            bias = bias.astype(object)
            bias[rows] = bias[rows] + own.bias * Fraction(own.scaling)
    assert p.forward().tolist() == (p.x @ weight.T + bias).tolist()
    dx = p.backward()["x"]
    assert dx.tolist() == (p.dy @ weight).tolist()


@EXAMPLES
@given(linear_problems(F64, exact=True))
def test_a_weight_update_is_zero_outside_its_rows(problem):
    out = problem.dy.shape[-1]
    for own in problem.adapters:
        delta = weight_update(own, out)
        rows = slice(0, out) if own.rows is None else own.rows
        assert delta.shape == (out, problem.x.shape[-1])
        assert delta[rows].tolist() == (own.scaling * (own.B @ own.A)).tolist()
        assert not delta[: rows.start].any()
        assert not delta[rows.stop :].any()


def test_the_order_of_adapters_is_the_order_of_their_gradients():
    p = by_hand(F64)
    turned = replace(p, adapters=p.adapters[::-1])
    assert turned.forward().tolist() == p.forward().tolist()
    for number in (0, 1):
        for name in ("A", "B", "bias"):
            gradient = p.backward()[number, name]
            assert turned.backward()[1 - number, name].tolist() == gradient.tolist()


def test_no_adapter_leaves_the_base_layer():
    p = replace(by_hand(F64), adapters=())
    assert p.forward().tolist() == (p.x @ p.W0.T + p.bias).tolist()
    assert set(p.backward()) == {"x", "bias"}
    assert p.backward()["x"].tolist() == (p.dy @ p.W0).tolist()
    assert np.array_equal(p.forward_bound(F32), merged_forward_bound(p.x, p.W0, F32, bias=p.bias))


def test_the_layer_with_one_adapter_is_the_simple_one():
    p = by_hand(F64)
    own = replace(p.adapters[0], bias=None, dropout=p.adapters[1].dropout)
    one = replace(p, adapters=(own,))
    arguments = (p.x, p.W0, own.A, own.B, own.scaling)
    options = {"dropout": own.dropout}
    assert linear_forward(*arguments, bias=p.bias, **options).tolist() == one.forward().tolist()
    bound = linear_forward_bound(*arguments, F32, bias=p.bias, **options)
    assert np.array_equal(bound, one.forward_bound(F32))
    for simple, general in (
        (linear_backward(p.dy, *arguments, **options), one.backward()),
        (linear_backward_bound(p.dy, *arguments, F32, **options), one.backward_bound(F32)),
    ):
        assert np.array_equal(simple.dx, general["x"])
        assert np.array_equal(simple.dbias, general["bias"])
        assert np.array_equal(simple.dA, general[0, "A"])
        assert np.array_equal(simple.dB, general[0, "B"])
        assert (0, "bias") not in general


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_forward_and_backward_stay_within_the_bounds(dtype, data):
    assert_within_bounds(data.draw(linear_problems(dtype)))


def long_problem(dtype):
    """Two adapters with everything: different rows and dropout, biases of lora_B."""
    rng = np.random.default_rng(7)
    N, n_in, n_out = 9, 24, 6
    adapters = tuple(
        LowRank(
            rng.normal(size=(r, n_in)),
            rng.normal(size=(rows.stop - rows.start, r)),
            scaling,
            bias=rng.normal(size=rows.stop - rows.start),
            dropout=rng.integers(0, 2, (N, n_in)) * 2.0,
            rows=rows,
        )
        for r, scaling, rows in ((3, 1 / 3, slice(0, 4)), (2, 1.7, slice(2, 5)))
    )
    return LinearProblem(
        dy=rng.normal(size=(N, n_out)),
        W0=rng.normal(size=(n_out, n_in)),
        adapters=adapters,
        x=rng.normal(size=(N, n_in)),
        bias=rng.normal(size=n_out),
    ).astype(dtype)


OWN = {(i, name) for i in (0, 1) for name in ("A", "B", "bias")}


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bounds(wrong, right):
    problem = long_problem(wrong)
    assert breaks_forward(problem, problem, right)
    assert broken_gradients(problem, problem, right) == OWN | {"x", "bias"}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_wrong_formula_breaks_the_bounds(dtype):
    right = long_problem(dtype)
    first, second = right.adapters

    def check(wrong, gradients):
        assert breaks_forward(wrong, right, dtype)
        assert broken_gradients(wrong, right, dtype) == gradients

    check(replace(right, adapters=(first,)), {"x"})
    check(right.with_adapter(1, rows=slice(1, 4)), {"x", (1, "A"), (1, "B"), (1, "bias")})
    check(right.with_adapter(0, rows=slice(1, 5)), {"x", (0, "A"), (0, "B"), (0, "bias")})
    unscaled = (second.bias / dtype.type(1.7)).astype(dtype)
    check(right.with_adapter(1, bias=unscaled), set())
    check(right.with_adapter(1, bias=None), set())
    check(right.with_adapter(0, dropout=None), {"x", (0, "A"), (0, "B")})
    check(right.with_adapter(0, dropout=second.dropout), {"x", (0, "A"), (0, "B")})
    check(right.with_adapter(1, scaling=1.701), {"x", (1, "A"), (1, "B"), (1, "bias")})
    check(replace(right, bias=None), set())
    swapped = replace(
        right, adapters=(replace(first, scaling=second.scaling), replace(second, scaling=first.scaling))
    )
    check(swapped, OWN | {"x"})


def growth(n, c, wide, dtype):
    a = gamma(n, Precision(wide).form.unit_roundoff)
    b = gamma(c, Precision(dtype).form.unit_roundoff)
    return a + b + a * b


@pytest.mark.parametrize(
    ("dtype", "wide", "counts"),
    [(F32, F32, (12, 11, 8, 8, 8)), (F64, F64, (11, 10, 7, 7, 7)), (BF16, F32, (14, 13, 10, 10, 9))],
    ids=str,
)
def test_the_bounds_count_the_roundings_that_they_say(dtype, wide, counts):
    """Three adapters with biases, every tensor of ones; counted by hand, the slack is 3 and the adapters.

    Of y: two products that are stored where the accumulator is wide; the bias of lora_B; the scaling and, but
    in float64, its own rounding; and the first adapter is added to, two more times: three sums.
    """
    N, n_in, n_out, r = 5, 7, 3, 2
    x, dy, W0 = np.ones((N, n_in), dtype), np.ones((N, n_out), dtype), np.ones((n_out, n_in), dtype)
    own = LowRank(np.ones((r, n_in), dtype), np.ones((n_out, r), dtype), 2.0, bias=np.ones(n_out, dtype))
    precision = Precision(dtype, accumulator=wide)

    def counted(bound, terms, size):
        sizes = [growth(terms, count, wide, dtype) * size for count in range(40)]
        return next(n for n in range(39) if sizes[n] <= bound.min() <= bound.max() < sizes[n + 1])

    y = adapted_linear_forward_bound(x, W0, [own] * 3, precision)
    bounds = adapted_linear_backward_bound(dy, x, W0, [own] * 3, precision)
    low = bounds.adapters[2]
    found = (
        counted(y, n_in + r, n_in + 3 * 2 * (n_in * r + 1)),
        counted(bounds.dx, n_out + r, n_out + 3 * 2 * n_out * r),
        counted(low.dA, n_out + N, 2 * N * n_out),
        counted(low.dB, n_in + N, 2 * N * n_in),
        counted(low.dbias, N, 2 * N),
    )
    assert found == counts


def test_float16_products_that_underflow_before_a_large_scaling_are_within_the_bound():
    """dA computed as ``scaling * ((dy B)^T x)``: every product underflows to zero, and all is lost."""
    for scaling in (1.0, 16.0, 512.0):
        dy, x = np.full((8, 1), 2.0**-13, F16), np.full((8, 1), 2.0**-12, F16)
        assert dy[0, 0] * x[0, 0] == 0
        one, nothing = np.ones((1, 1), F16), np.zeros((1, 1), F16)
        bounds = linear_backward_bound(dy, x, nothing, nothing, one, scaling, F16)
        assert bounds.dA[0, 0] >= scaling * 8 * 2.0**-25


@settings(max_examples=20)
@given(linear_problems(F32), st.sampled_from([F32, BF16]))
def test_a_merge_with_a_rounding_each_time_stays_within_its_bound(problem, stored):
    p = undropped(problem)
    W0 = p.W0.T if p.fan_in_fan_out else p.W0
    merged, exact = W0, replace(p, W0=W0).rational().W0
    for own, true in zip(p.adapters, p.rational().adapters, strict=True):
        merged = merged + weight_update(own, len(W0))
        exact = exact + weight_update(true, len(W0))
    bound = merge_bound(W0, p.adapters, F32, dtype=stored)
    assert bound.shape == W0.shape
    assert (error(merged.astype(stored), exact) <= bound).all()


def test_the_merge_bound_is_broken_by_what_is_wrong():
    p = undropped(long_problem(F32))
    exact = p.rational()
    right = sum((weight_update(own, 6) for own in exact.adapters), exact.W0)
    bound = merge_bound(p.W0, p.adapters, F32)
    assert (bound == merge_bound(p.W0, p.adapters, F32, dtype=F32)).all()
    for wrong in (
        p.W0 + weight_update(p.adapters[0], 6),
        sum((weight_update(own, 6) for own in p.adapters), p.W0).astype(F16),
        sum((weight_update(replace(own, scaling=own.scaling * 1.001), 6) for own in p.adapters), p.W0),
    ):
        assert (error(wrong, right) > bound).any()
    assert (merge_bound(p.W0, p.adapters, F32, dtype=BF16) > 2.0**-9 * np.abs(p.W0)).all()
    with pytest.raises(ShapeError, match=r"^B of adapter 0: expected \(4, 3\)"):
        merge_bound(p.W0, (replace(p.adapters[0], B=np.ones((6, 3), F32)), p.adapters[1]), F32)


@settings(max_examples=15)
@given(linear_problems(F32))
def test_merged_and_unmerged_differ_by_no_more_than_their_bound(problem):
    p = undropped(problem)
    W0 = p.W0.T if p.fan_in_fan_out else p.W0
    exact = replace(p, W0=W0).rational()
    weight = sum((weight_update(own, len(W0)) for own in exact.adapters), exact.W0)
    bias = np.zeros(len(W0)) if p.bias is None else p.bias.astype(F64)
    for own in p.adapters:
        if own.bias is not None:
            rows = slice(None) if own.rows is None else own.rows
            bias[rows] += own.scaling * own.bias.astype(F64)
    merged = p.x @ weight.astype(F64).astype(F32).T + bias.astype(F32)
    bound = merged_against_unmerged_bound(p.x, W0, problem.adapters, F32, bias=p.bias)
    difference = np.abs(merged.astype(F64) - p.forward().astype(F64))
    assert bound.shape == difference.shape
    assert (difference <= bound).all()


def test_the_bound_between_merged_and_unmerged_is_broken_by_what_is_wrong():
    p = undropped(long_problem(F32))
    bound = merged_against_unmerged_bound(p.x, p.W0, p.adapters, F32, bias=p.bias)
    for wrong in (
        replace(p, adapters=p.adapters[:1]),
        p.with_adapter(0, bias=None),
        p.with_adapter(1, rows=slice(1, 4)),
        replace(p, bias=None),
    ):
        assert (np.abs(wrong.forward() - p.forward()) > bound).any()
    narrow = p.astype(F16).forward().astype(F32)
    assert (np.abs(narrow - p.forward()) > bound).any()
    wide = merged_against_unmerged_bound(p.x, p.W0, p.adapters, F32, bias=p.bias, dtype=F16)
    assert (wide > 100 * bound).all()


ARGUMENTS = {"x": np.ones((2, 4)), "W0": np.ones((3, 4)), "bias": np.ones(3), "dy": np.ones((2, 3))}
ADAPTER = LowRank(np.ones((2, 4)), np.ones((2, 2)), 1.0, bias=np.ones(2), rows=slice(1, 3))


def attempts(adapters, turned=False, **changed):
    a = ARGUMENTS | changed
    options = {"fan_in_fan_out": turned}
    return [
        lambda: adapted_linear_forward(a["x"], a["W0"], adapters, bias=a["bias"], **options),
        lambda: adapted_linear_forward_bound(a["x"], a["W0"], adapters, F32, bias=a["bias"], **options),
        lambda: adapted_linear_backward(a["dy"], a["x"], a["W0"], adapters, **options),
        lambda: adapted_linear_backward_bound(a["dy"], a["x"], a["W0"], adapters, F32, **options),
    ]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"A": np.ones((4, 2))}, ShapeError, "A{}: expected (r, 4) to fit W0 (3, 4), got (4, 2)"),
        (
            {"B": np.ones((3, 2))},
            ShapeError,
            "B{}: expected (2, 2) to fit W0 (3, 4) and A (2, 4), got (3, 2)",
        ),
        (
            {"bias": np.ones(3)},
            ShapeError,
            "bias of lora_B{}: expected (2,) to fit W0 (3, 4) and A (2, 4), got (3,)",
        ),
        (
            {"dropout": np.ones(4)},
            ShapeError,
            "dropout{}: expected (2, 4) to fit W0 (3, 4) and A (2, 4), got (4,)",
        ),
        (
            {"rows": slice(1, 4)},
            ConfigError,
            "rows{}: expected a slice of step 1 within 3 outputs, got slice(1, 4, None)",
        ),
    ],
)
def test_all_functions_check_every_adapter(changes, kind, message):
    bad = replace(ADAPTER, **changes)
    for adapters, suffix in (([bad], ""), ([ADAPTER, bad], " of adapter 1")):
        for attempt in attempts(adapters):
            with pytest.raises(kind, match="^" + re.escape(message.format(suffix)) + "; "):
                attempt()


def test_all_functions_check_the_layers_own_tensors():
    forward, forward_bound, backward, backward_bound = attempts(
        [ADAPTER], bias=np.ones(4), dy=np.ones((2, 4))
    )
    for attempt in (forward, forward_bound):
        with pytest.raises(ShapeError, match=r"^bias: expected \(3,\)"):
            attempt()
    for attempt in (backward, backward_bound):
        with pytest.raises(ShapeError, match=r"^dy: expected \(2, 3\)"):
            attempt()
    for attempt in attempts([ADAPTER], turned=True):
        with pytest.raises(ShapeError, match=r"^x: expected \(..., 3\) to fit W0 \(4, 3\)"):
            attempt()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["A", "B", "bias", "dropout"])
def test_mixed_dtypes_are_refused(name, several):
    whole = replace(ADAPTER, dropout=np.ones((2, 4)))
    bad = replace(whole, **{name: getattr(whole, name).astype(F32)})
    forward, _, backward, _ = attempts([whole, bad] if several else [bad])
    said = {"bias": "bias of lora_B"}.get(name, name) + (" of adapter 1" if several else "")
    for attempt in (forward, backward):
        with pytest.raises(DTypeError) as caught:
            attempt()
        assert str(caught.value) == f"{said}: expected float64 as x has, got float32; convert it"
