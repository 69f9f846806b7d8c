from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from convolution_cases import (
    ConvolutionProblem,
    backward,
    backward_bound,
    forward,
    forward_bound,
    gaussian_convolutions,
    named,
)
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    Convolution,
    DTypeError,
    LowRank,
    Precision,
    ShapeError,
    convolution_backward_bound,
    convolution_forward_bound,
    gamma,
    unit_roundoff,
)
from loracle.reference.formats import FORMATS

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@BY_DTYPE
@settings(max_examples=15)
@given(data=st.data())
def test_forward_and_backward_stay_within_the_bounds(dtype, data):
    p = data.draw(gaussian_convolutions(dtype))
    exact = p.rational()
    assert (error(forward(p), forward(exact)) <= forward_bound(p, dtype)).all()
    bounds, gradients = named(backward_bound(p, dtype)), named(backward(exact))
    for name, computed in named(backward(p)).items():
        assert (error(computed, gradients[name]) <= bounds[name]).all(), name


def long_problem(dtype, seed=0):
    """Two groups of two channels on 9 by 8 pixels, kernel 3 by 2: 42 windows, K = 12, r = 3."""
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rng.normal(0, 0.5, shape)

    own = LowRank(
        numbers(3, 2, 3, 2), numbers(4, 3), 1 / 3, numbers(4), rng.integers(0, 2, (2, 4, 9, 8)) * 2.0
    )
    other = LowRank(numbers(1, 2, 3, 2), numbers(4, 1), 0.7)
    geometry = Convolution(stride=(2, 1), padding=1, padding_mode="replicate", dilation=(2, 1), groups=2)
    return ConvolutionProblem(
        numbers(2, 4, 9, 8), numbers(2, 4, 4, 9), numbers(4, 2, 3, 2), numbers(4), (own, other), geometry
    ).astype(dtype)


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64), (BF16, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bound(wrong, right):
    p = long_problem(wrong)
    exact = p.rational()
    assert (error(forward(p), forward(exact)) > forward_bound(p, right)).any()
    bounds, gradients = named(backward_bound(p, right)), named(backward(exact))
    for name, computed in named(backward(p)).items():
        assert (error(computed, gradients[name]) > bounds[name]).any(), name


WRONG = {
    "scaling off by a thousandth": lambda a: replace(a, scaling=a.scaling * 1.001),
    "scaling twice": lambda a: replace(a, scaling=a.scaling**2),
    "no update": lambda a: replace(a, scaling=0.0),
    "no dropout": lambda a: replace(a, dropout=None),
    "taps mirrored": lambda a: replace(a, A=np.ascontiguousarray(a.A[..., ::-1, ::-1])),
    "groups exchanged": lambda a: replace(a, B=np.concatenate([a.B[2:], a.B[:2]])),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_breaks_the_bound(dtype, name):
    right = long_problem(dtype)
    first, second = right.adapters
    wrong = replace(right, adapters=(WRONG[name](first), second))
    exact, bounds = right.rational(), backward_bound(right, dtype)
    assert (error(forward(wrong), forward(exact)) > forward_bound(right, dtype)).any()
    assert (error(backward(wrong).dx, backward(exact).dx) > bounds.dx).any()


@pytest.mark.parametrize(
    "changed",
    [
        {"dilation": 1, "padding": (1, 1)},
        {"padding_mode": "zeros"},
        {"padding_mode": "reflect"},
        {"groups": 1},
    ],
)
def test_a_wrong_geometry_breaks_the_bound(changed):
    """As PEFT's A has it, which drops dilation and padding mode."""
    right = long_problem(F32)
    wrong = replace(right, geometry=replace(right.geometry, **changed))
    if "dilation" in changed:
        wrong = replace(wrong, geometry=replace(wrong.geometry, padding=(0, 1)))
    if "groups" in changed:
        wrong = replace(
            wrong,
            W0=np.repeat(wrong.W0, 2, axis=1),
            adapters=tuple(replace(a, A=np.repeat(a.A, 2, axis=1)) for a in wrong.adapters),
        )
    y, exact = forward(wrong), forward(right.rational())
    assert y.shape[1:] == exact.shape[1:] or "dilation" in changed
    rows = min(y.shape[2], exact.shape[2])
    bound = forward_bound(right, F32)[:, :, :rows]
    assert (error(y[:, :, :rows], exact[:, :, :rows]) > bound).any()


def growth(n, c, wide, dtype):
    a, b = gamma(n, unit_roundoff(wide)), gamma(c, unit_roundoff(dtype))
    return a + b + a * b


# Roundings that are stored, for y, dx, dA, dB and the two dbias, counted by hand: an input (or the scaling)
# that need not be a number of the dtype, a product or a sum with a wide accumulator, an elementwise product,
# a sum of two; and the slack, 4 with an adapter.
STORED = {
    (F32, None, F32): (9, 8, 7, 7, 4, 6),
    (F32, None, F64): (13, 12, 11, 11, 5, 7),
    (BF16, F32, BF16): (11, 11, 10, 9, 5, 7),
    (F64, None, F32): (8, 7, 6, 6, 4, 5),
}


@pytest.mark.parametrize("r", [2, 5])
@pytest.mark.parametrize(("dtype", "wide", "inputs"), STORED, ids=str)
def test_the_bounds_count_the_roundings_that_they_say(dtype, wide, inputs, r):
    """With every tensor of ones, but dropout of twos, the sizes are counted by hand; nothing underflows."""
    # Two groups of two channels and three outputs; three taps on five places; two images of three windows.
    N, L, K, m, most = 2, 3, 6, 3, 3
    shapes = [(N, 4, 5), (N, 6, L), (6, 2, 3), (6,), (r, 2, 3), (6, r), (6,), (N, 4, 5)]
    x, dy, W0, bias, A, B, own_bias, dropout = (np.ones(shape, inputs) for shape in shapes)
    own = LowRank(A, B, 2.0, own_bias, dropout + dropout)
    p = ConvolutionProblem(x, dy, W0, bias, (own,), Convolution(groups=2))
    precision = Precision(dtype, accumulator=wide)

    def counted(bound, terms, size):
        """Return the one number of stored roundings that gives the bound, but for the underflows."""
        sizes = [growth(terms, count, precision.wide.dtype, dtype) * size for count in range(40)]
        return next((n for n in range(39) if sizes[n] <= bound.max() < sizes[n + 1]), None)

    bounds = backward_bound(p, precision)
    adapter = bounds.adapters[0]
    counts = (
        counted(forward_bound(p, precision), K + r, K + 1 + 4 * K * r + 2),
        counted(bounds.dx, m + r + (most - 1) * max(m, r), most * (m + 4 * m * r)),
        counted(adapter.dA, m + 2 * N * L, 4 * 2 * N * L * m),
        counted(adapter.dB, K + N * L, 4 * N * L * K),
        counted(bounds.dbias, N * L, N * L),
        counted(adapter.dbias, N * L, 2 * N * L),
    )
    assert counts == STORED[dtype, wide, inputs]
    assert bounds.dx.argmax() == 2
    for name, bound in named(bounds).items():
        assert bound.dtype == F64
        assert bound.shape == named(backward(p))[name].shape


def sequential(terms, dtype):
    """Add up in order, a rounding each time."""
    total = dtype.type(0)
    for term in terms:
        total = dtype.type(total + term)
    return total


def test_sums_over_outputs_and_windows_at_once_are_within_the_bounds():
    """As kernels that form no columns add up: every term loses the same way, in one long sum."""
    # One number that is in 3 windows of 2 channels and 12 outputs; 1.1171875 in bfloat16, added up in order.
    value = BF16.type(1.1171875)
    W0 = np.full((12, 1, 3), value, BF16)
    x, dy = np.ones((1, 1, 5), BF16), np.ones((1, 12, 3), BF16)
    bounds = convolution_backward_bound(dy, x, W0, (), BF16)
    lost = 36 * float(value) - float(sequential([value] * 36, BF16))
    assert bounds.dx[0, 0, 2] >= lost > 0
    per_window = gamma(12 + 2 + 3 + 1, unit_roundoff(BF16)) * 36 * float(value)
    assert bounds.dx[0, 0, 2] > per_window * 1.5


def test_the_sum_over_many_groups_may_be_added_up_in_any_order():
    """By windows of all groups in one sum, or delta's gradient first and then by outputs of all groups."""
    ones = np.ones
    for outputs, length in ((1, 12), (12, 1)):
        own = LowRank(ones((1, 1, 1)), ones((4 * outputs, 1)), 1.0)
        geometry = Convolution(groups=4)
        dy, x, W0 = ones((1, 4 * outputs, length)), ones((1, 4, length)), ones((4 * outputs, 1, 1))
        bound = convolution_backward_bound(dy, x, W0, [own], F32, geometry=geometry).adapters[0].dA
        least = max(outputs + 4 * length, length + 4 * outputs)
        assert bound[0, 0, 0] >= gamma(least, unit_roundoff(F32)) * 4 * outputs * length


@BY_DTYPE
def test_padding_zeros_add_nothing_to_the_bound(dtype):
    """A window of zeros alone has an error of zero but for underflows, and y there is the bias."""
    x, W0 = np.ones((1, 1, 2)), np.ones((1, 1, 1))
    geometry = Convolution(padding=3, stride=5)
    bound = convolution_forward_bound(x, W0, (), dtype, geometry=geometry)
    assert (bound < 2.0**-20).all()


def test_wrong_arguments_are_refused():
    p = long_problem(F64)
    with pytest.raises(ShapeError, match=r"^x: "):
        forward_bound(replace(p, x=p.x[:, :3]), F32)
    with pytest.raises(ShapeError, match=r"^bias: "):
        forward_bound(replace(p, bias=p.bias[:3]), F32)
    with pytest.raises(ShapeError, match=r"^dy: "):
        backward_bound(replace(p, dy=p.x), F32)
    with pytest.raises(DTypeError, match=r"^dtype: "):
        forward_bound(p, np.int8)
    with pytest.raises(ConfigError, match=r"^gamma: .* name a more precise accumulator$"):
        convolution_forward_bound(np.ones((1, 300, 1)), np.ones((1, 300, 1)), (), BF16)
    plain = convolution_forward_bound(p.x, np.ones((4, 4, 3, 2)), (), F32)
    assert plain.shape == (2, 4, 7, 7)
    assert convolution_backward_bound(plain, p.x, np.ones((4, 4, 3, 2)), (), F32).dx.shape == p.x.shape
