import re
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_linear import GRADIENTS, backward, forward, rational_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ARRAYS, LoraProblem, exact_problems, lora_problems

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    ShapeError,
    adapted_linear_forward,
    linear_backward,
    linear_forward,
    merge,
    merge_exact,
)
from loracle.reference.formats import FORMATS
from loracle.reference.linear_shapes import rows_of

DTYPES = [form.dtype for form in FORMATS]


def by_hand(dtype):
    """y and the gradients below were worked out on paper."""
    return LoraProblem(
        x=np.array([1, 2], dtype),
        dy=np.array([1, 0, -1], dtype),
        W0=np.array([[1, 0], [0, 1], [1, 1]], dtype),
        A=np.array([[1, -1]], dtype),
        B=np.array([[1], [2], [3]], dtype),
        bias=np.array([1, 1, 1], dtype),
        dropout=np.array([2, 0], dtype),
        scaling=2.0,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(object)], ids=str)
def test_a_layer_worked_out_by_hand(dtype):
    problem = by_hand(dtype)
    assert forward(problem).tolist() == [6, 11, 16]
    assert forward(problem, bias=False).tolist() == [5, 10, 15]
    assert forward(problem, dropout=False).tolist() == [0, -1, -2]
    gradients = backward(problem)
    assert gradients.dx.tolist() == [-8, -1]
    assert gradients.dA.tolist() == [[-8, 0]]
    assert gradients.dB.tolist() == [[4], [0], [-4]]
    assert gradients.dbias.tolist() == [1, 0, -1]
    without = backward(problem, dropout=False)
    assert without.dx.tolist() == [-4, 3]
    assert without.dA.tolist() == [[-4, -8]]
    assert without.dB.tolist() == [[-2], [0], [2]]
    for array in (forward(problem), *(getattr(gradients, name) for name in GRADIENTS)):
        assert array.dtype == dtype


@given(exact_problems(np.float32), st.booleans())
def test_gradients_are_the_exact_difference_quotients(problem, dropout):
    """The layer is linear in x, in A, in B and in the bias: a difference quotient is the derivative."""
    problem = rational_problem(problem)
    gradients = backward(problem, dropout=dropout)

    def loss(**changed):
        arrays = {name: changed.get(name, getattr(problem, name)) for name in ARRAYS}
        return (problem.dy * forward(LoraProblem(**arrays, scaling=problem.scaling), dropout=dropout)).sum()

    rng = np.random.default_rng(0)
    for name in ("x", "A", "B", "bias"):
        array, gradient = getattr(problem, name), getattr(gradients, f"d{name}")
        assert gradient.shape == array.shape
        for index in {tuple(rng.integers(0, array.shape)) for _ in range(6)}:
            moved = array.copy()
            moved[index] += Fraction(7, 3)
            assert (loss(**{name: moved}) - loss()) / Fraction(7, 3) == gradient[index]


@given(st.sampled_from(DTYPES).flatmap(exact_problems), st.booleans())
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(problem, dropout):
    exact = rational_problem(problem)
    assert forward(problem, dropout=dropout).dtype == problem.x.dtype
    assert forward(problem, dropout=dropout).tolist() == forward(exact, dropout=dropout).tolist()
    for name in GRADIENTS:
        computed, expected = (getattr(backward(p, dropout=dropout), name) for p in (problem, exact))
        assert computed.dtype == problem.x.dtype
        assert computed.tolist() == expected.tolist()


@given(st.sampled_from(DTYPES).flatmap(exact_problems))
def test_in_the_exact_tier_merged_and_unmerged_agree_bit_for_bit(problem):
    W = merge(problem.W0, problem.A, problem.B, problem.scaling)
    nothing = np.zeros_like(problem.A), np.zeros_like(problem.B)
    merged = linear_forward(problem.x, W, *nothing, 0.0, bias=problem.bias)
    assert merged.tolist() == forward(problem, dropout=False).tolist()


@settings(max_examples=20)
@given(lora_problems(most=4))
def test_object_arrays_give_the_exact_layer(problem):
    """With the rows of the identity as x, the exact layer without bias gives the exact merged weight."""
    exact = rational_problem(problem)
    identity = np.array(np.eye(exact.A.shape[1], dtype=int), dtype=object)
    y = linear_forward(identity, exact.W0, exact.A, exact.B, problem.scaling)
    rounded = merge_exact(problem.W0, problem.A, problem.B, problem.scaling, np.float64)
    assert [[float(v) for v in row] for row in y.T] == rounded.tolist()


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 2)])
def test_leading_axes_are_a_batch(lead):
    rng = np.random.default_rng(1)

    def integers(*shape):
        return rng.integers(-3, 4, shape).astype(float)

    x, dy, W0, A, B = integers(*lead, 5), integers(*lead, 4), integers(4, 5), integers(2, 5), integers(4, 2)
    dropout = rng.integers(0, 2, x.shape) * 2.0
    y = linear_forward(x, W0, A, B, 0.5, dropout=dropout)
    gradients = linear_backward(dy, x, W0, A, B, 0.5, dropout=dropout)
    assert y.shape == dy.shape
    assert gradients.dx.shape == x.shape
    total = {"dA": 0.0, "dB": 0.0, "dbias": 0.0}
    for index in np.ndindex(lead):
        one = linear_backward(dy[index], x[index], W0, A, B, 0.5, dropout=dropout[index])
        alone = linear_forward(x[index], W0, A, B, 0.5, dropout=dropout[index])
        assert np.array_equal(y[index], alone)
        assert np.array_equal(gradients.dx[index], one.dx)
        for name in total:
            total[name] = total[name] + getattr(one, name)
    for name, value in total.items():
        assert np.array_equal(getattr(gradients, name), value)
        assert getattr(gradients, name).shape == value.shape


ARGUMENTS = {
    "x": np.ones((2, 4)),
    "W0": np.ones((3, 4)),
    "A": np.ones((2, 4)),
    "B": np.ones((3, 2)),
    "bias": np.ones(3),
    "dropout": np.ones((2, 4)),
    "dy": np.ones((2, 3)),
}


def call(changed):
    arguments = ARGUMENTS | changed
    dy, bias = arguments.pop("dy"), arguments.pop("bias")
    linear_forward(**arguments, scaling=1.0, bias=bias)
    linear_backward(dy, **arguments, scaling=1.0)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("W0", (12,), r"^W0: expected \(out, in\), got \(12,\); pass the weight as a matrix$"),
        ("A", (4,), r"^A: expected \(r, 4\) to fit W0 \(3, 4\), got \(4,\); is it transposed\?$"),
        ("A", (4, 2), r"^A: expected \(r, 4\).*got \(4, 2\)"),
        ("A", (0, 4), r"^A: expected \(r, 4\).*got \(0, 4\)"),
        ("x", (2, 3), r"^x: expected \(..., 4\) to fit W0 \(3, 4\), got \(2, 3\); check its last axis$"),
        ("x", (), r"^x: expected \(..., 4\).*got \(\)"),
        (
            "B",
            (2, 3),
            r"^B: expected \(3, 2\) to fit W0 \(3, 4\) and A \(2, 4\), got \(2, 3\); check its axes$",
        ),
        (
            "bias",
            (1, 3),
            r"^bias: expected \(3,\) to fit W0 \(3, 4\) and x \(2, 4\), got \(1, 3\); check its axes$",
        ),
        ("dropout", (4,), r"^dropout: expected \(2, 4\).*got \(4,\)"),
        ("dy", (3,), r"^dy: expected \(2, 3\).*got \(3,\)"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    with pytest.raises(ShapeError, match=message) as caught:
        call({name: np.ones(shape)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        slice(0, 4),
        slice(-1, 2),
        slice(2, 1),
        slice(None, 2),
        slice(1, None),
        slice(0, 2, 2),
        slice(0, 2, 0),
        slice(0.0, 2),
        slice(0, 2.0),
    ],
    ids=str,
)
def test_rows_that_are_no_range_of_outputs_are_refused(rows):
    own = LowRank(np.ones((2, 4)), np.ones((2, 2)), 1.0, rows=rows)
    message = f"expected a slice of step 1 within 3 outputs, got {rows}; name its start and stop"
    with pytest.raises(ConfigError, match=f"^{re.escape('rows: ' + message)}$"):
        rows_of(own, 3)
    for adapters, name in (([own], "rows"), ([replace(own, rows=slice(0, 2)), own], "rows of adapter 1")):
        with pytest.raises(ConfigError, match=f"^{re.escape(name + ': ' + message)}$"):
            adapted_linear_forward(np.ones((2, 4)), np.ones((3, 4)), adapters)


def test_rows_may_be_none_all_or_any_range_of_outputs():
    own = LowRank(np.ones((2, 4)), np.ones((2, 2)), 1.0)
    ranges = (None, slice(0, 3), slice(1, 3), slice(1, 2, 1), slice(2, 2), slice(0, 0))
    assert [rows_of(replace(own, rows=rows), 3) for rows in ranges] == [3, 3, 2, 1, 0, 0]


@pytest.mark.parametrize("number", [0, 1])
def test_the_dtype_of_every_adapter_is_checked(number):
    adapters = [LowRank(np.ones((2, 4)), np.ones((3, 2)), 1.0)] * 2
    adapters[number] = replace(adapters[number], B=np.ones((3, 2), np.float32))
    message = f"B of adapter {number}: expected float64 as x has, got float32; convert it"
    with pytest.raises(DTypeError, match=f"^{message}$"):
        adapted_linear_forward(np.ones((2, 4)), np.ones((3, 4)), adapters)


@pytest.mark.parametrize("name", ["W0", "A", "B", "bias", "dropout", "dy"])
def test_mixed_dtypes_are_refused(name):
    with pytest.raises(DTypeError, match=rf"^{name}: expected float64 as x has, got float32; convert it"):
        call({name: ARGUMENTS[name].astype(np.float32)})


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, ml_dtypes.float8_e5m2])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(
        DTypeError, match=r"^x: expected one of float16, bfloat16, float32, float64, object, got"
    ):
        call({name: array.astype(dtype) for name, array in ARGUMENTS.items()})
