import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import (
    DTYPES,
    ExpertsProblem,
    assert_difference_quotients,
    assert_exact_tier,
    assert_within_bounds,
    breaks_forward,
    broken_gradients,
    experts_problems,
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
    expert_factors_from_peft,
    experts_backward,
    experts_backward_bound,
    experts_forward,
    experts_forward_bound,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
EXAMPLES = settings(max_examples=30)


def by_hand(dtype, **options):
    """E = 3, in = 2, out = 1, r = 1; nothing goes to expert 1. All was worked out on paper."""
    return ExpertsProblem(
        dy=np.array([[1], [2], [3]], dtype),
        W0=np.array([[[1, 2]], [[5, 5]], [[3, -1]]], dtype),
        adapters=(
            LowRank(
                np.array([[[1, 1]], [[9, 9]], [[2, 0]]], dtype),
                np.array([[[2]], [[9]], [[-1]]], dtype),
                2.0,
                dropout=np.array([[2, 0], [1, 1], [2, 2]], dtype),
            ),
        ),
        x=np.array([[1, 2], [3, 4], [0, 1]], dtype),
        expert=np.array([2, 0, 2]),
        bias=np.array([[10], [20], [30]], dtype),
        **options,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(object)], ids=str)
def test_experts_worked_out_by_hand(dtype):
    p = by_hand(dtype)
    assert p.forward().tolist() == [[23], [49], [29]]
    assert replace(p, bias=None).forward().tolist() == [[-7], [39], [-1]]
    gradients = p.backward()
    assert gradients["x"].tolist() == [[-5, -1], [10, 12], [-15, -3]]
    assert gradients["bias"].tolist() == [[2], [0], [4]]
    assert gradients[0, "A"].tolist() == [[[24, 32]], [[0, 0]], [[-4, -12]]]
    assert gradients[0, "B"].tolist() == [[[28]], [[0]], [[8]]]
    assert (0, "bias") not in gradients
    for array in (p.forward(), *gradients.values()):
        assert array.dtype == dtype


@EXAMPLES
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: experts_problems(dtype, exact=True)))
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(problem):
    assert_exact_tier(problem)


@EXAMPLES
@given(experts_problems(F32, exact=True))
def test_gradients_are_the_exact_difference_quotients(problem):
    assert_difference_quotients(problem.rational())


@EXAMPLES
@given(experts_problems(F64, exact=True))
def test_each_expert_is_a_linear_layer_on_its_own_rows(problem):
    p, gradients = problem, problem.backward()
    y = p.forward()
    for e in range(len(p.W0)):
        own = p.expert == e
        adapters = [
            replace(a, A=a.A[e], B=a.B[e], dropout=None if a.dropout is None else a.dropout[own])
            for a in p.adapters
        ]
        bias = None if p.bias is None else p.bias[e]
        turned = {"fan_in_fan_out": p.fan_in_fan_out}
        alone = adapted_linear_forward(p.x[own], p.W0[e], adapters, bias=bias, **turned)
        assert y[own].tolist() == alone.tolist()
        expected = adapted_linear_backward(p.dy[own], p.x[own], p.W0[e], adapters, **turned)
        assert gradients["x"][own].tolist() == expected.dx.tolist()
        assert gradients["bias"][e].tolist() == expected.dbias.tolist()
        for number, low in enumerate(expected.adapters):
            assert gradients[number, "A"][e].tolist() == low.dA.tolist()
            assert gradients[number, "B"][e].tolist() == low.dB.tolist()


def test_an_expert_without_rows_has_zero_gradients_and_nothing_to_bound():
    p = by_hand(F64)
    bounds = p.backward_bound(F64)
    for key in ("bias", (0, "A"), (0, "B")):
        assert not p.backward()[key][1].any()
        assert (bounds[key][1] < 1e-300).all()
        assert (bounds[key][[0, 2]] > 1e-17).any()
    nobody = replace(p.with_adapter(0, dropout=None), x=p.x[:0], dy=p.dy[:0], expert=p.expert[:0])
    assert nobody.forward().shape == (0, 1)
    assert {key: g.shape for key, g in nobody.backward().items()} == {
        "x": (0, 2),
        "bias": (3, 1),
        (0, "A"): (3, 1, 2),
        (0, "B"): (3, 1, 1),
    }
    assert not any(g.any() for g in nobody.backward().values())
    assert nobody.forward_bound(F32).shape == (0, 1)
    assert nobody.backward_bound(F32)[0, "A"].shape == (3, 1, 2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64], ids=str)
def test_experts_of_any_integer_width(dtype):
    p = by_hand(F64)
    assert replace(p, expert=p.expert.astype(dtype)).forward().tolist() == p.forward().tolist()


def test_the_order_of_rows_is_kept():
    p = by_hand(F64)
    order = np.array([1, 2, 0])
    turned = replace(p, x=p.x[order], dy=p.dy[order], expert=p.expert[order]).with_adapter(
        0, dropout=p.adapters[0].dropout[order]
    )
    assert turned.forward().tolist() == p.forward()[order].tolist()
    assert turned.backward()["x"].tolist() == p.backward()["x"][order].tolist()
    assert turned.backward()[0, "A"].tolist() == p.backward()[0, "A"].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_forward_and_backward_stay_within_the_bounds(dtype, data):
    assert_within_bounds(data.draw(experts_problems(dtype)))


def long_problem(dtype, **changes):
    rng = np.random.default_rng(6)
    E, N, n_in, n_out, r = 3, 24, 12, 4, 3
    adapters = tuple(
        LowRank(
            rng.normal(size=(E, r, n_in)),
            rng.normal(size=(E, n_out, r)),
            scaling,
            dropout=rng.integers(0, 2, (N, n_in)) * 2.0,
        )
        for scaling in (1 / 3, 2.0)
    )
    problem = ExpertsProblem(
        dy=rng.normal(size=(N, n_out)),
        W0=rng.normal(size=(E, n_out, n_in)),
        adapters=adapters,
        x=rng.normal(size=(N, n_in)),
        expert=rng.integers(0, E, N),
        bias=rng.normal(size=(E, n_out)),
    )
    return replace(problem.astype(dtype), **changes)


ADAPTERS = {(0, "A"), (0, "B"), (1, "A"), (1, "B")}
ALL = ADAPTERS | {"x", "bias"}


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bounds(wrong, right):
    problem = long_problem(wrong)
    assert breaks_forward(problem, problem, right)
    assert broken_gradients(problem, problem, right) == ALL


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_wrong_formula_breaks_the_bounds(dtype):
    right = long_problem(dtype)
    other = replace(right, expert=np.where(right.expert == 0, 1, right.expert))
    assert breaks_forward(other, right, dtype)
    assert broken_gradients(other, right, dtype) == ALL
    dropped = replace(right, adapters=right.adapters[:1])
    assert breaks_forward(dropped, right, dtype)
    assert broken_gradients(dropped, right, dtype) == {"x"}
    louder = right.with_adapter(1, scaling=2.001)
    assert breaks_forward(louder, right, dtype)
    assert broken_gradients(louder, right, dtype) == {"x", (1, "A"), (1, "B")}
    undropped = right.with_adapter(0, dropout=None)
    assert breaks_forward(undropped, right, dtype)
    assert broken_gradients(undropped, right, dtype) == {"x", (0, "A"), (0, "B")}
    assert breaks_forward(replace(right, bias=None), right, dtype)


@pytest.mark.parametrize("turned", [False, True])
def test_the_bounds_are_those_of_a_linear_layer_with_the_busiest_experts_rows(turned):
    """With every tensor of ones, an expert's bound is the linear layer's on as many rows."""
    E, n_in, n_out, r, most = 3, 5, 4, 2, 6
    expert = np.array([1] * 2 + [2] * most + [1])
    N = len(expert)
    W0 = np.ones((E, n_in, n_out) if turned else (E, n_out, n_in))
    adapters = [LowRank(np.ones((E, r, n_in)), np.ones((E, n_out, r)), 1 / 3, dropout=np.ones((N, n_in)))]
    x, dy, bias = np.ones((N, n_in)), np.ones((N, n_out)), np.ones((E, n_out))
    precision = Precision(BF16, accumulator=F32)
    y = experts_forward_bound(x, expert, W0, adapters, precision, bias=bias, fan_in_fan_out=turned)
    bounds = experts_backward_bound(dy, x, expert, W0, adapters, precision, fan_in_fan_out=turned)
    own = [replace(adapters[0], A=np.ones((r, n_in)), B=np.ones((n_out, r)), dropout=np.ones((most, n_in)))]
    busiest = x[:most], np.ones((n_out, n_in)), own, precision
    expected = adapted_linear_backward_bound(dy[:most], *busiest)
    assert y.shape == (N, n_out)
    assert np.array_equal(y[:most], adapted_linear_forward_bound(*busiest, bias=bias[0]))
    assert np.array_equal(bounds.dx[:most], expected.dx)
    assert np.array_equal(bounds.dbias[2], expected.dbias)
    assert np.array_equal(bounds.adapters[0].dA[2], expected.adapters[0].dA)
    assert np.array_equal(bounds.adapters[0].dB[2], expected.adapters[0].dB)
    ratio = bounds.adapters[0].dA[1] / expected.adapters[0].dA
    assert np.allclose(ratio, 3 / most, rtol=1e-6, atol=0)
    assert bounds.adapters[0].dbias is None


def test_the_exact_values_may_have_other_dtypes_than_the_precision():
    problem = long_problem(F64)
    narrow = problem.astype(F32)
    assert (error(narrow.forward(), problem.rational().forward()) <= problem.forward_bound(F32)).all()


def test_pefts_factors_are_taken_apart():
    """Row e r + k of lora_A and column k E + e of lora_B belong to rank k of expert e."""
    E, r, n_in, n_out = 3, 2, 4, 5
    lora_A = np.arange(E * r * n_in).reshape(E * r, n_in)
    lora_B = np.arange(n_out * r * E).reshape(n_out, r * E)
    A, B = expert_factors_from_peft(lora_A, lora_B, E)
    assert A.shape == (E, r, n_in)
    assert B.shape == (E, n_out, r)
    for e in range(E):
        for k in range(r):
            assert A[e, k].tolist() == lora_A[e * r + k].tolist()
            assert B[e, :, k].tolist() == lora_B[:, k * E + e].tolist()
    one_A, one_B = expert_factors_from_peft(lora_A, lora_B, 1)
    assert one_A.tolist() == [lora_A.tolist()]
    assert expert_factors_from_peft(lora_A[:1], lora_B[:, :1], 1)[1].shape == (1, n_out, 1)
    assert one_B.tolist() == [lora_B.tolist()]


@pytest.mark.parametrize(
    ("A", "B", "experts", "message"),
    [
        (
            (7, 4),
            (5, 7),
            3,
            "lora_A: expected (r * 3, in) for 3 experts, got (7, 4); check their number",
        ),
        ((0, 4), (5, 0), 3, "lora_A: expected (r * 3, in) for 3 experts, got (0, 4); check their number"),
        ((6,), (5, 6), 3, "lora_A: expected (r * 3, in) for 3 experts, got (6,); check their number"),
        ((6, 4), (6, 5), 3, "lora_B: expected (out, 6) to fit lora_A (6, 4), got (6, 5); is it transposed?"),
        ((6, 4), (6,), 3, "lora_B: expected (out, 6) to fit lora_A (6, 4), got (6,); is it transposed?"),
    ],
)
def test_factors_that_do_not_fit_are_refused(A, B, experts, message):
    with pytest.raises(ShapeError) as caught:
        expert_factors_from_peft(np.ones(A), np.ones(B), experts)
    assert str(caught.value) == message


@pytest.mark.parametrize("experts", [0, -2])
def test_a_number_of_experts_below_one_is_refused(experts):
    with pytest.raises(ConfigError) as caught:
        expert_factors_from_peft(np.ones((4, 3)), np.ones((2, 4)), experts)
    message = f"experts: expected 1 or more, got {experts}; it is the first axis of the weight"
    assert str(caught.value) == message


ARGUMENTS = {
    "x": np.ones((6, 4)),
    "expert": np.array([0, 1, 4, 0, 2, 3]),
    "W0": np.ones((5, 3, 4)),
    "A": np.ones((5, 2, 4)),
    "B": np.ones((5, 3, 2)),
    "dropout": np.ones((6, 4)),
    "bias": np.ones((5, 3)),
    "dy": np.ones((6, 3)),
}


def calls(adapters=None, **changed):
    a = ARGUMENTS | changed
    own = [LowRank(a["A"], a["B"], 1.0, dropout=a["dropout"])] if adapters is None else adapters
    given = a["x"], a["expert"], a["W0"], own
    backward = {
        "backward": lambda: experts_backward(a["dy"], *given),
        "backward bound": lambda: experts_backward_bound(a["dy"], *given, F32),
    }
    forward = {
        "forward": lambda: experts_forward(*given, bias=a["bias"]),
        "forward bound": lambda: experts_forward_bound(*given, F32, bias=a["bias"]),
    }
    if "dy" in changed:
        return backward
    return forward if "bias" in changed else forward | backward


def refused(kind, message, attempts):
    assert attempts
    for attempt in attempts.values():
        with pytest.raises(kind, match="^" + re.escape(message) + "$"):
            attempt()


FIT = "to fit W0 (5, 3, 4) and x (6, 4)"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("W0", (3, 4), "W0: expected (E, out, in), got (3, 4); stack the experts' weights"),
        ("W0", (4,), "W0: expected (E, out, in), got (4,); stack the experts' weights"),
        ("x", (6, 3), "x: expected (N, 4) to fit W0 (5, 3, 4), got (6, 3); make its leading axes one"),
        ("x", (2, 3, 4), "x: expected (N, 4) to fit W0 (5, 3, 4), got (2, 3, 4); make its leading axes one"),
        ("A", (5, 4, 2), "A: expected (5, r, 4) to fit W0 (5, 3, 4), got (5, 4, 2); check its axes"),
        ("A", (4, 2, 4), "A: expected (5, r, 4) to fit W0 (5, 3, 4), got (4, 2, 4); check its axes"),
        ("A", (5, 0, 4), "A: expected (5, r, 4) to fit W0 (5, 3, 4), got (5, 0, 4); check its axes"),
        ("A", (2, 4), "A: expected (5, r, 4) to fit W0 (5, 3, 4), got (2, 4); check its axes"),
        ("B", (5, 2, 3), f"B: expected (5, 3, 2) {FIT}, got (5, 2, 3); check its axes"),
        ("dropout", (4,), f"dropout: expected (6, 4) {FIT}, got (4,); check its axes"),
        ("bias", (3,), f"bias: expected (5, 3) {FIT}, got (3,); check its axes"),
        ("dy", (6, 4), f"dy: expected (6, 3) {FIT}, got (6, 4); check its axes"),
        ("expert", (5,), f"expert: expected (6,) {FIT}, got (5,); check its axes"),
        ("expert", (6, 1), f"expert: expected (6,) {FIT}, got (6, 1); check its axes"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    dtype = int if name == "expert" else float
    refused(ShapeError, message, calls(**{name: np.ones(shape, dtype)}))


def test_a_turned_weight_is_checked_as_what_it_is():
    a = ARGUMENTS
    with pytest.raises(ShapeError, match=r"^x: expected \(N, 3\) to fit W0 \(5, 4, 3\), got \(6, 4\)"):
        experts_forward(a["x"], a["expert"], a["W0"], [], fan_in_fan_out=True)
    for turned in (a["W0"].swapaxes(1, 2), np.ones(4), np.ones((3, 4))):
        given = a["x"], a["expert"], turned, []
        if turned.ndim == 3:
            y = experts_forward(*given, fan_in_fan_out=True)
            assert y.tolist() == experts_forward(a["x"], a["expert"], a["W0"], []).tolist()
        else:
            message = f"W0: expected (E, out, in), got {turned.T.shape}"
            with pytest.raises(ShapeError, match="^" + re.escape(message)):
                experts_forward(*given, fan_in_fan_out=True)


@pytest.mark.parametrize(("value", "position"), [(5, 2), (-1, 0), (9, 5)])
def test_an_expert_out_of_range_is_named_with_its_position(value, position):
    expert = ARGUMENTS["expert"].copy()
    expert[position] = value
    message = (
        f"expert: expected integers from 0 to 4 to fit W0 (5, 3, 4), got {value} at ({position},); "
        "check where they come from"
    )
    refused(ShapeError, message, calls(expert=expert))


def test_experts_that_are_no_integers_are_refused():
    message = "expert: expected integers, got float64; convert it"
    refused(DTypeError, message, calls(expert=ARGUMENTS["expert"].astype(float)))


def test_the_adapter_is_named_among_several():
    a = ARGUMENTS
    good, bad = LowRank(a["A"], a["B"], 1.0), LowRank(a["A"], a["B"][:4], 1.0)
    message = f"B of adapter 1: expected (5, 3, 2) {FIT}, got (4, 3, 2); check its axes"
    refused(ShapeError, message, calls(adapters=[good, bad]))
    message = "A of adapter 0: expected (5, r, 4) to fit W0 (5, 3, 4), got (5, 2, 3); check its axes"
    refused(ShapeError, message, calls(adapters=[LowRank(a["A"][..., :3], a["B"], 1.0), good]))
    message = f"dropout of adapter 1: expected (6, 4) {FIT}, got (5, 4); check its axes"
    bad = LowRank(a["A"], a["B"], 1.0, dropout=np.ones((5, 4)))
    refused(ShapeError, message, calls(adapters=[good, bad]))


@pytest.mark.parametrize(
    ("field", "value", "name"), [("bias", np.ones(3), "bias of lora_B"), ("rows", slice(0, 3), "rows")]
)
def test_what_stacked_experts_have_not_is_refused_by_name(field, value, name):
    plain = LowRank(ARGUMENTS["A"], ARGUMENTS["B"], 1.0)
    own = replace(plain, **{field: value})
    message = "expected None, stacked experts have none; leave it out"
    refused(ConfigError, f"{name}: {message}", calls(adapters=[own]))
    refused(ConfigError, f"{name} of adapter 1: {message}", calls(adapters=[plain, own]))


@pytest.mark.parametrize("name", ["W0", "A", "B", "dropout", "bias", "dy"])
def test_mixed_dtypes_are_refused(name):
    attempts = calls(**{name: ARGUMENTS[name].astype(np.float32)})
    for kind in ("forward", "backward"):
        if kind in attempts:
            with pytest.raises(DTypeError) as caught:
                attempts[kind]()
            assert str(caught.value) == f"{name}: expected float64 as x has, got float32; convert it"
