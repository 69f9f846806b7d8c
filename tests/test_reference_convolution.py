from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from convolution_cases import (
    ConvolutionProblem,
    backward,
    by_definition,
    delta,
    exact_convolutions,
    forward,
    gaussian_convolutions,
    largest_sum,
    named,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import exact_limit

from loracle.reference import (
    Convolution,
    LowRank,
    convolution_backward,
    convolution_delta_factors,
    convolution_forward,
    merge,
    merge_exact,
)
from loracle.reference.formats import FORMATS

DTYPES = [form.dtype for form in FORMATS]


def by_hand(dtype):
    """Two groups of a channel each, kernel 2, A over both taps; what follows was worked out on paper."""
    own = LowRank(
        A=np.array([[[1, -1]]], dtype),
        B=np.array([[2], [1]], dtype),
        scaling=0.5,
        bias=np.array([2, 4], dtype),
        dropout=np.array([[[2, 0, 2], [0, 2, 2]]], dtype),
    )
    return ConvolutionProblem(
        x=np.array([[[1, 2, 3], [0, 1, -1]]], dtype),
        dy=np.array([[[1, 2], [3, -1]]], dtype),
        W0=np.array([[[1, 1]], [[2, 0]]], dtype),
        bias=np.array([1, -1], dtype),
        adapters=(own,),
        geometry=Convolution(groups=2),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(object)], ids=str)
def test_a_layer_worked_out_by_hand(dtype):
    p = by_hand(dtype)
    # x * dropout is 2 0 6 and 0 2 -2; A makes 2 -6 and -2 4 of it.
    assert forward(p).tolist() == [[[3 + 1 + 2 + 1, 5 + 1 - 6 + 1], [0 - 1 - 1 + 2, 2 - 1 + 2 + 2]]]
    gradients = backward(p)
    # dh is dy times 1 in the first group and dy / 2 in the second: 1 2 and 3/2 -1/2.
    assert gradients.dx.tolist() == [[[1 + 2, 3, 2 - 4], [6, -2 - 4, 1]]]
    assert gradients.dbias.tolist() == [3, 2]
    own = gradients.adapters[0]
    assert own.dA.tolist() == [[[2 - 1, 12 + 3 + 1]]]
    assert own.dB.tolist() == [[-5], [-5]]
    assert own.dbias.tolist() == [1.5, 1]
    for array in (forward(p), *named(gradients).values()):
        assert array.dtype == dtype


@settings(max_examples=40)
@given(exact_convolutions(np.float64))
def test_the_layer_is_its_definition(problem):
    p = problem.rational()
    assert forward(p).tolist() == by_definition(p).tolist()


@settings(max_examples=25)
@given(exact_convolutions(np.float32))
def test_gradients_are_the_exact_difference_quotients(problem):
    """The layer is linear in x, in each A, B and bias: a difference quotient is the derivative."""
    p = problem.rational()
    gradients = named(backward(p))
    loss = (p.dy * forward(p)).sum()
    moved = {"dx": (p.x, lambda v: replace(p, x=v)), "dbias": (p.bias, lambda v: replace(p, bias=v))}
    for n, own in enumerate(p.adapters):
        for name in ("A", "B", "bias"):
            if (array := getattr(own, name)) is not None:

                def change(value, n=n, own=own, name=name):
                    new = replace(own, **{name: value})
                    return replace(p, adapters=(*p.adapters[:n], new, *p.adapters[n + 1 :]))

                moved[f"d{name}{n}"] = array, change
    assert moved.keys() == gradients.keys()
    rng = np.random.default_rng(0)
    for name, (array, change) in moved.items():
        assert gradients[name].shape == array.shape
        for index in {tuple(rng.integers(0, array.shape)) for _ in range(3)}:
            value = array.copy()
            value[index] += Fraction(7, 3)
            difference = (p.dy * forward(change(value))).sum() - loss
            assert difference / Fraction(7, 3) == gradients[name][index], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(dtype, data):
    p = data.draw(exact_convolutions(dtype))
    assert largest_sum(p.astype(np.float64)) <= exact_limit(dtype)
    exact = p.rational()
    assert forward(p).dtype == dtype
    assert forward(p).tolist() == forward(exact).tolist()
    expected = named(backward(exact))
    for name, gradient in named(backward(p)).items():
        assert gradient.dtype == dtype
        assert gradient.tolist() == expected[name].tolist()


@settings(max_examples=25)
@given(exact_convolutions(np.float32))
def test_in_the_exact_tier_merged_and_unmerged_agree_bit_for_bit(problem):
    """Whatever the geometry and the groups, W0 is a matrix that A and B update."""
    p = replace(problem, adapters=tuple(replace(a, dropout=None, bias=None) for a in problem.adapters))
    W = p.W0.reshape(len(p.W0), -1)
    for adapter in p.adapters:
        A, B = convolution_delta_factors(adapter, p.W0.shape)
        assert (A.shape, B.shape) == ((len(A), W.shape[1]), (len(W), len(A)))
        W = merge(W, A, B, adapter.scaling)
    merged = convolution_forward(p.x, W.reshape(p.W0.shape), (), bias=p.bias, geometry=p.geometry)
    assert merged.tolist() == forward(p).tolist()


@settings(max_examples=20)
@given(gaussian_convolutions(np.float32))
def test_the_factors_give_the_exact_merged_weight(p):
    """As a window in which one number is 1 sees it: a kernel as large as the input, the identity as x."""
    shape = p.W0.shape
    own = replace(p.adapters[0], dropout=None, bias=None)
    exact = replace(p, adapters=(own,)).rational()
    K = int(np.prod(shape[1:]))
    identity = np.array(np.eye(K, dtype=int), dtype=object).reshape(K, *shape[1:])
    y = convolution_forward(identity, exact.W0, exact.adapters)
    assert y.shape == (K, shape[0], *(1 for _ in shape[2:]))
    W = merge_exact(
        p.W0.reshape(len(p.W0), K), *convolution_delta_factors(own, shape), own.scaling, np.float64
    )
    assert [[float(v) for v in row] for row in y.reshape(K, -1).T] == W.tolist()
    update = exact.W0 + delta(exact.adapters[0], shape)
    assert y.reshape(K, -1).T.tolist() == update.reshape(-1, K).tolist()


def test_without_adapters_it_is_the_convolution_of_the_base():
    p = replace(by_hand(np.float64), adapters=())
    assert forward(p).tolist() == [[[4, 6], [-1, 1]]]
    assert convolution_forward(p.x, p.W0, (), geometry=p.geometry).tolist() == [[[3, 5], [0, 2]]]
    gradients = backward(p)
    assert gradients.dx.tolist() == [[[1, 3, 2], [6, -2, 0]]]
    assert gradients.adapters == ()


def test_the_default_geometry_is_one_window_after_the_other():
    x, W0 = np.array([[[1.0, 2, 3, 4]]]), np.array([[[1.0, 10]]])
    own = LowRank(np.ones((1, 1, 2)), np.ones((1, 1)), 1.0)
    assert convolution_forward(x, W0, [own]).tolist() == [[[21 + 3, 32 + 5, 43 + 7]]]
    gradients = convolution_backward(np.array([[[1.0, 0, 2]]]), x, W0, [own])
    assert gradients.dx.tolist() == [[[1 + 1, 10 + 1, 2 + 2, 20 + 2]]]
    assert gradients.adapters[0].dbias is None


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients():
    p = by_hand(np.float64)
    own = replace(p.adapters[0], dropout=np.ones((0, 2, 3)))
    empty = replace(p, x=np.ones((0, 2, 3)), dy=np.ones((0, 2, 2)), adapters=(own,))
    assert forward(empty).shape == (0, 2, 2)
    gradients = named(backward(empty))
    assert gradients.pop("dx").shape == (0, 2, 3)
    for name, gradient in gradients.items():
        assert gradient.shape == named(backward(p))[name].shape
        assert not gradient.any()
