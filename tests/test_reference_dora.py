import math
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from dora_problems import (
    ARRAYS,
    GRADIENTS,
    DoraProblem,
    adapted_rows,
    dora_problems,
    exact_dora_problems,
    exact_problems_of,
)
from exact_linear import rational
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    NonFiniteError,
    ShapeError,
    adapted_linear_backward,
    adapted_linear_forward,
    round_fraction,
)
from loracle.reference.dora import (
    dora_backward,
    dora_forward,
    dora_magnitude_start,
    dora_norm,
    row_norms,
    wide_norm,
    widened,
)
from loracle.reference.formats import FORMATS

DTYPES = [form.dtype for form in FORMATS]
F16, BF16, F32, F64 = DTYPES
ALL = pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(object)], ids=str)


def by_hand(dtype):
    """W0 + 2 B A = [[3, 4], [0, 2]], norms 5 and 2, magnitude / norm 2 and 1/2; all below worked out on
    paper.
    """
    return DoraProblem(
        x=np.array([1, 2], dtype),
        dy=np.array([5, 2], dtype),
        W0=np.array([[1, 6], [-4, 6]], dtype),
        A=np.array([[1, -1]], dtype),
        B=np.array([[1], [2]], dtype),
        bias=np.array([1, 1], dtype),
        magnitude=np.array([10, 1], dtype),
        dropout=np.array([2, 0], dtype),
        scaling=2.0,
    )


@ALL
def test_a_layer_worked_out_by_hand(dtype):
    p = by_hand(dtype)
    assert dora_norm(*p.weight).tolist() == [5, 2]
    assert dora_magnitude_start(*p.weight).tolist() == [5, 2]
    assert p.forward().tolist() == [24, 17]
    assert replace(p, bias=None).forward().tolist() == [23, 16]
    gradients = p.backward()
    assert gradients.dx.tolist() == [63, 42]
    assert gradients.dA.tolist() == [[48, 0]]
    assert gradients.dB.tolist() == [[40], [4]]
    assert gradients.dbias.tolist() == [5, 2]
    assert gradients.dmagnitude.tolist() == [6, 0]
    without = replace(p, dropout=None)
    assert without.forward().tolist() == [23, 3]
    gradients = without.backward()
    assert gradients.dx.tolist() == [30, 42]
    assert gradients.dA.tolist() == [[24, 48]]
    assert gradients.dB.tolist() == [[-20], [-2]]
    assert gradients.dbias.tolist() == [5, 2]
    assert gradients.dmagnitude.tolist() == [11, 4]
    for array in (p.forward(), dora_norm(*p.weight), *(getattr(gradients, name) for name in GRADIENTS)):
        assert array.dtype == dtype


def test_ints_stay_exact():
    p = by_hand(object)
    p = replace(p, magnitude=np.array([1, 1], object))
    assert p.forward().tolist() == [1 + 13 + Fraction(-4, 5) * 2 + Fraction(4, 5), 17]
    assert replace(p, norm=np.array([3, 7], object)).backward().dmagnitude.tolist() == [Fraction(30, 3), 0]
    assert all(type(n) is Fraction for n in dora_norm(*p.weight))


@settings(max_examples=40)
@given(st.sampled_from(DTYPES).flatmap(exact_dora_problems))
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(problem):
    """But for dmagnitude, a quotient, which is the exact one rounded once."""
    exact, dtype = problem.map(rational), problem.x.dtype
    assert dora_norm(*problem.weight).tolist() == dora_norm(*exact.weight).tolist()
    assert problem.forward().dtype == dtype
    assert problem.forward().tolist() == exact.forward().tolist()
    computed, expected = problem.backward(), exact.backward()
    for name in GRADIENTS[:-1]:
        assert getattr(computed, name).dtype == dtype
        assert getattr(computed, name).tolist() == getattr(expected, name).tolist()
    assert computed.dmagnitude.dtype == dtype
    assert computed.dmagnitude.tolist() == [round_fraction(d, dtype) for d in expected.dmagnitude]


@settings(max_examples=25)
@given(dora_problems(F32, most=5), st.booleans())
def test_gradients_are_the_exact_difference_quotients(problem, dropout):
    """The norm being a constant, the layer is linear in x, A, B, the bias and the magnitude."""
    problem = exact_problems_of(problem if dropout else replace(problem, dropout=None))[0]
    gradients = problem.backward()

    def loss(**changed):
        moved = replace(problem, **changed)
        return (moved.dy * moved.forward()).sum()

    rng = np.random.default_rng(0)
    for name in ("x", "A", "B", "bias", "magnitude"):
        array, gradient = getattr(problem, name), getattr(gradients, f"d{name}")
        assert gradient.shape == array.shape
        for index in sorted({tuple(rng.integers(0, array.shape)) for _ in range(4)}):
            moved = array.copy()
            moved[index] += Fraction(7, 3)
            assert (loss(**{name: moved}) - loss()) / Fraction(7, 3) == gradient[index]


@settings(max_examples=20)
@given(dora_problems(F32, most=5))
def test_without_dropout_it_is_the_linear_layer_of_the_rescaled_weight(problem):
    exact = exact_problems_of(replace(problem, dropout=None))[0]
    weight = (exact.magnitude / exact.norm)[:, None] * adapted_rows(problem)
    assert exact.forward().tolist() == (exact.x @ weight.T + exact.bias).tolist()
    assert exact.backward().dx.tolist() == (exact.dy @ weight).tolist()


@settings(max_examples=20)
@given(dora_problems(F32, most=5))
def test_with_the_norm_as_magnitude_it_is_the_lora_layer(problem):
    exact = exact_problems_of(problem)[0]
    exact = replace(exact, magnitude=exact.norm)
    lora = adapted_linear_forward(exact.x, exact.W0, [exact.adapter], bias=exact.bias)
    assert exact.forward().tolist() == lora.tolist()
    gradients = adapted_linear_backward(exact.dy, exact.x, exact.W0, [exact.adapter])
    assert exact.backward().dx.tolist() == gradients.dx.tolist()
    assert exact.backward().dA.tolist() == gradients.adapters[0].dA.tolist()
    assert exact.backward().dB.tolist() == gradients.adapters[0].dB.tolist()


@ALL
def test_a_weight_stored_the_other_way_round(dtype):
    p = by_hand(dtype)
    stored, adapter, option = p.W0.T.copy(), p.adapter, {"fan_in_fan_out": True}
    assert dora_norm(stored, adapter, **option).tolist() == [5, 2]
    assert dora_magnitude_start(stored, adapter, **option).tolist() == [5, 2]
    y = dora_forward(p.x, stored, adapter, p.magnitude, bias=p.bias, **option)
    assert y.tolist() == p.forward().tolist()
    assert dora_forward(p.x, stored, adapter, p.magnitude, **option).tolist() == [23, 16]
    gradients = dora_backward(p.dy, p.x, stored, adapter, p.magnitude, **option)
    for name in GRADIENTS:
        assert getattr(gradients, name).tolist() == getattr(p.backward(), name).tolist()


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_leading_axes_are_a_batch(lead):
    rng = np.random.default_rng(1)

    def whole(*shape):
        return rng.integers(-3, 4, shape).astype(float)

    p = DoraProblem(
        x=whole(*lead, 3),
        dy=whole(*lead, 2),
        W0=np.array([[2.0, 3, 6], [1, 2, 2]]),
        A=whole(2, 3),
        B=np.zeros((2, 2)),
        bias=whole(2),
        magnitude=np.array([14.0, 1.5]),
        dropout=rng.integers(0, 2, (*lead, 3)) * 2.0,
        scaling=0.5,
    )
    y, gradients = p.forward(), p.backward()
    assert y.shape == p.dy.shape
    assert gradients.dx.shape == p.x.shape
    total = dict.fromkeys(GRADIENTS[1:-1], 0.0)
    for index in np.ndindex(lead):
        one = replace(p, x=p.x[index], dy=p.dy[index], dropout=p.dropout[index])
        assert np.array_equal(y[index], one.forward())
        assert np.array_equal(gradients.dx[index], one.backward().dx)
        for name in total:
            total[name] = total[name] + getattr(one.backward(), name)
    for name, value in total.items():
        assert np.array_equal(getattr(gradients, name), value)


def rows_only(*rows, dtype=F64):
    W0 = np.array(rows, dtype)
    return W0, LowRank(np.zeros((1, W0.shape[1]), dtype), np.zeros((len(W0), 1), dtype), 1.0)


@pytest.mark.parametrize("size", [1.0, 2.0**-1074, 2.0**-1060, 2.0**-600, 2.0**600, 2.0**1020])
def test_the_norm_neither_overflows_nor_underflows_on_the_way(size):
    row = (3 * size, 0.0, -4 * size)
    assert dora_norm(*rows_only(row, row[::-1])).tolist() == [5 * size, 5 * size]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_evaluated_in_float64_and_rounded_once(dtype):
    """1 + 2^-8 to 1 + 2^-24 and a little: the narrow dtype would lose it at each step."""
    form = FORMATS[DTYPES.index(dtype)]
    small = math.sqrt(2.0 ** (1 - form.precision) * 1.3)
    W0, adapter = rows_only((1.0, small, 0.0, 0.0), dtype=dtype)
    exact = math.sqrt(1 + float(W0[0, 1]) ** 2)
    assert dora_norm(W0, adapter)[0] == round_fraction(Fraction(exact), dtype)
    A, B = np.full((1, 2), 3.0, dtype), np.full((1, 1), 1.0, dtype)
    W0 = np.array([[1.0, 0.0]], dtype)
    expected = math.hypot(2.0, 1.0)
    assert dora_norm(W0, LowRank(A, B, 1 / 3))[0] == round_fraction(Fraction(expected), dtype)


def test_rows_of_nothing_have_a_norm_of_zero():
    assert row_norms(np.zeros((2, 0))).tolist() == [0, 0]
    with pytest.raises(NonFiniteError, match=r"got 0.0 for row 0 of"):
        dora_norm(np.zeros((2, 0)), LowRank(np.zeros((1, 0)), np.zeros((2, 1)), 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_wide_norm_is_float64s_own(dtype):
    """fl(1/3) 3 is 1 in float64; 250 500 is above float16's range."""
    W0, A, B = np.array([[4.0, 0]], dtype), np.array([[0, 3.0]], dtype), np.array([[1.0]], dtype)
    for scaling, length in ((1 / 3, 17**0.5), (1.0, 5.0)):
        norm = wide_norm(W0, LowRank(A, B, scaling))
        assert norm.dtype == F64
        assert norm.tolist() == [length]
    large = np.array([[250.0]], dtype)
    assert wide_norm(large, LowRank(large, large * 2, 1.0)).tolist() == [250 + 250 * 500]
    assert widened(large).dtype == F64
    assert widened(large).tolist() == [[250]]


def test_a_layer_without_outputs_has_exact_gradients_of_nothing():
    p = by_hand(object)
    p = replace(p, W0=p.W0[:0], B=p.B[:0], bias=p.bias[:0], magnitude=p.magnitude[:0], dy=p.dy[:0])
    assert dora_norm(*p.weight).dtype == object
    assert p.backward().dmagnitude.dtype == object


@pytest.mark.parametrize("scaling", [1.0, 0.0])
def test_a_weight_that_overflows_is_refused_without_a_warning(scaling):
    """inf, and inf * 0."""
    large = np.array([[1e200]])
    with pytest.raises(NonFiniteError, match=r"got (nan|inf) for row 0 of"):
        dora_norm(np.ones((1, 1)), LowRank(large, large, scaling))


def test_the_norm_of_fractions_is_exact_or_refused():
    half = Fraction(1, 2)
    W0, adapter = (
        np.array([[3 * half, 2]], object),
        LowRank(np.array([[0, 2]], object), np.array([[half]], object), 0.0),
    )
    assert dora_norm(W0, adapter).tolist() == [5 * half]
    with pytest.raises(
        DTypeError,
        match=r"^norm: expected a rational one, as exact arithmetic needs, got the root of 13/4 for row 1 of "
        r"W0 \+ scaling \* B A; pass a rational norm$",
    ):
        dora_norm(
            np.array([[1, 0], [1, 3 * half]], object), LowRank(adapter.A, np.array([[0], [0]], object), 1.0)
        )


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64, np.dtype(object)], ids=str)
def test_a_norm_of_zero_is_refused(dtype):
    """The second row cancels with its update."""
    W0, A, B = np.array([[1, 0], [-6, 4]], dtype), np.array([[3, -2]], dtype), np.array([[0], [1]], dtype)
    with pytest.raises(
        NonFiniteError,
        match=r"^norm: expected finite numbers above 0, got 0.* for row 1 of W0 \+ scaling \* B A; "
        "such a row has no direction for DoRA to keep$",
    ):
        dora_norm(W0, LowRank(A, B, 2.0))


def test_a_norm_that_is_not_finite_is_refused():
    for value, dtype, got in ((np.nan, F32, "nan"), (np.inf, F64, "(nan|inf)"), (60000.0, F16, "inf")):
        with pytest.raises(NonFiniteError, match=rf"got {got} for row 0 of"):
            dora_norm(*rows_only((value, value), dtype=dtype))
    with pytest.raises(NonFiniteError, match=r"got 0.* for row 1 of"):
        dora_norm(*rows_only((1.0, 1.0), (0.0, 0.0)))


@pytest.mark.parametrize("call", [DoraProblem.forward, DoraProblem.backward])
def test_a_norm_that_is_given_is_used_and_checked(call):
    p = by_hand(F64)
    given = replace(p, norm=np.array([1.0, 4.0]))
    assert given.forward().tolist() == [13 + 1 + 9 * 2 + 10 * 4, 8 + 1 - 0.75 * -8 + 0.25 * 8]
    assert given.backward().dmagnitude.tolist() == [30, 0]
    for bad, got in ((0.0, "0.0"), (-1.0, "-1.0"), (np.nan, "nan"), (np.inf, "inf")):
        with pytest.raises(
            NonFiniteError, match=rf"^norm: expected finite numbers above 0, got {got} for row 1"
        ):
            call(replace(p, norm=np.array([1.0, bad])))
    with pytest.raises(
        ShapeError, match=r"^norm: expected \(2,\) to fit W0 \(2, 2\), got \(3,\); check its axes$"
    ):
        call(replace(p, norm=np.ones(3)))
    with pytest.raises(DTypeError, match=r"^norm: expected float64 as x has, got float32"):
        call(replace(p, norm=np.ones(2, F32)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("W0", (12,), r"^W0: expected \(out, in\), got \(12,\)"),
        ("x", (2, 3), r"^x: expected \(..., 2\).*got \(2, 3\)"),
        ("A", (2,), r"^A: expected \(r, 2\)"),
        ("B", (1, 2), r"^B: expected \(2, 1\)"),
        ("bias", (1, 2), r"^bias: expected \(2,\)"),
        ("dropout", (1, 2), r"^dropout: expected \(2,\)"),
        ("dy", (3,), r"^dy: expected \(2,\)"),
        (
            "magnitude",
            (1, 2),
            r"^magnitude: expected \(2,\) to fit W0 \(2, 2\), got \(1, 2\); check its axes$",
        ),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    wrong = replace(by_hand(F64), **{name: np.ones(shape)})
    for call, names in ((DoraProblem.forward, "dy"), (DoraProblem.backward, "bias")):
        if name != names:
            with pytest.raises(ShapeError, match=message):
                call(wrong)


@pytest.mark.parametrize("name", [name for name in ARRAYS if name not in ("x", "norm")])
def test_mixed_dtypes_are_refused(name):
    p = by_hand(F64)
    wrong = replace(p, **{name: getattr(p, name).astype(F32)})
    for call, other in ((DoraProblem.forward, "dy"), (DoraProblem.backward, "bias")):
        if name != other:
            with pytest.raises(
                DTypeError, match=rf"^{name}: expected float64 as x has, got float32; convert it"
            ):
                call(wrong)


def test_the_norm_checks_its_arguments():
    W0, adapter = by_hand(F64).weight
    for shape in ((), (4,), (1, 2, 2)):
        with pytest.raises(ShapeError, match=r"^W0: expected \(out, in\), got"):
            dora_norm(np.ones(shape), adapter)
    with pytest.raises(ShapeError, match=r"^A: expected \(r, 3\)"):
        dora_norm(np.ones((2, 3)), adapter)
    for name in ("A", "B"):
        with pytest.raises(DTypeError, match=rf"^{name}: expected float64 as W0 has, got float32"):
            dora_norm(W0, replace(adapter, **{name: getattr(adapter, name).astype(F32)}))
    with pytest.raises(DTypeError, match=r"^W0: expected one of float16"):
        dora_norm(np.ones((2, 2), ml_dtypes.float8_e5m2), adapter)
    assert dora_norm(W0, replace(adapter, dropout=np.ones((7, 5)))).tolist() == [5, 2]


def test_adapters_that_dora_has_no_meaning_for_are_refused():
    p = by_hand(F64)
    sliced = replace(p.adapter, rows=slice(0, 2))
    biased = replace(p.adapter, bias=np.ones(2))
    for call in (
        lambda adapter: dora_norm(p.W0, adapter),
        lambda adapter: dora_forward(p.x, p.W0, adapter, p.magnitude),
        lambda adapter: dora_backward(p.dy, p.x, p.W0, adapter, p.magnitude),
    ):
        with pytest.raises(
            ConfigError,
            match=r"^rows: expected None for DoRA, got slice\(0, 2, None\); make each slice a layer "
            "of its own$",
        ):
            call(sliced)
        with pytest.raises(
            ConfigError,
            match=r"^bias of lora_B: expected None for DoRA, got a tensor; add it to the layer's bias$",
        ):
            call(biased)
