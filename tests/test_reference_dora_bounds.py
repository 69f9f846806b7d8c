from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from dora_problems import (
    GRADIENTS,
    DoraProblem,
    dora_problems,
    enclosed_norms,
    exact_problems_of,
    gaussian_problem,
)
from exact_linear import error
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    Precision,
    ShapeError,
    dora_bounds,
    gamma,
    linear_forward_bound,
    unit_roundoff,
)
from loracle.reference.dora import DoraGradients, dora_norm
from loracle.reference.dora_bounds import dora_backward_bound, dora_forward_bound, dora_norm_bound
from loracle.reference.formats import FORMATS
from loracle.reference.operands import product
from loracle.reference.precision import ROUND_UP

DTYPES = [form.dtype for form in FORMATS]
F16, BF16, F32, F64 = DTYPES
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forward_bound(p, precision):
    return dora_forward_bound(p.x, *p.weight, p.magnitude, precision, bias=p.bias)


def backward_bound(p, precision, bias=None):
    return dora_backward_bound(p.dy, p.x, *p.weight, p.magnitude, precision, bias=bias)


def off(computed, values):
    """Return ``|computed - exact|`` at most, the exact number lying between the two ``values``."""
    return np.maximum(*(error(computed, value) for value in values))


def finite(array):
    return bool(np.isfinite(array.astype(F64)).all())


def bounded(p, precision):
    """Leave out layers of which a norm is not known to half of it."""
    try:
        return (
            forward_bound(p, precision),
            backward_bound(p, precision),
            dora_norm_bound(*p.weight, precision),
        )
    except ConfigError as refused:
        assert "error of each norm" in str(refused)  # noqa: PT017
        return assume(False)


@BY_DTYPE
@settings(max_examples=15)
@given(data=st.data())
def test_the_norm_the_forward_and_the_backward_stay_within_the_bounds(dtype, data):
    p = data.draw(dora_problems(dtype, most=6))
    y_bound, bounds, norm_bound = bounded(p, dtype)
    exact = exact_problems_of(p)
    assert norm_bound.shape == p.magnitude.shape
    assert (off(dora_norm(*p.weight), enclosed_norms(p)) <= norm_bound).all()
    with np.errstate(over="ignore", invalid="ignore"):
        y, gradients = p.forward(), p.backward()
    if finite(y):
        assert y_bound.shape == y.shape
        assert (off(y, [own.forward() for own in exact]) <= y_bound).all()
    expected = [own.backward() for own in exact]
    for name in GRADIENTS:
        computed = getattr(gradients, name)
        if finite(computed):
            assert getattr(bounds, name).shape == computed.shape
            assert (off(computed, [getattr(own, name) for own in expected]) <= getattr(bounds, name)).all(), (
                name
            )


def norm_in_dtype(p, s):
    """As torch does it: the weight in the dtype, its squares in float32 or wider."""
    weight = p.W0 + product(p.B, p.A) * s
    wide = weight.astype(F64 if p.W0.dtype == F64 else F32)
    total = np.zeros(len(wide), wide.dtype)
    for column in wide.T:
        total = total + column * column
    return np.sqrt(total).astype(p.W0.dtype)


def peft_order(p, s):
    g = p.magnitude / norm_in_dtype(p, s)
    result = product(p.x, p.W0.T) + p.bias
    low = product(product(p.x, p.A.T), p.B.T)
    return result + ((g - g.dtype.type(1)) * (result - p.bias) + g * low * s)


def factor_last(p, s):
    g = p.magnitude / norm_in_dtype(p, s)
    return (product(p.x, p.W0.T) + product(product(p.x, p.A.T) * s, p.B.T)) * g + p.bias


def weight_first(p, s):
    weight = (p.W0 + product(p.B * s, p.A)) * (p.magnitude / norm_in_dtype(p, s))[:, None]
    return p.bias + product(p.x, weight.T)


def magnitude_last(p, s):
    weight = (p.W0 + product(p.B, p.A * s)) / norm_in_dtype(p, s)[:, None]
    return product(p.x, weight.T) * p.magnitude + p.bias


@pytest.mark.parametrize("order", [peft_order, factor_last, weight_first, magnitude_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_every_order_of_the_forward_stays_within_the_bound(dtype, order, data):
    p = replace(data.draw(dora_problems(dtype, most=6)), dropout=None)
    bound, _, norm_bound = bounded(p, dtype)
    s = dtype.type(p.scaling)
    with np.errstate(over="ignore", invalid="ignore"):
        computed, norm = order(p, s), norm_in_dtype(p, s)
    if finite(norm):
        assert (off(norm, enclosed_norms(p)) <= norm_bound).all()
    if finite(computed):
        assert computed.dtype == dtype
        assert (off(computed, [own.forward() for own in exact_problems_of(p)]) <= bound).all()


def long_problem(dtype, *, near=False, seed=0):
    rng = np.random.default_rng(seed)
    return gaussian_problem(rng, (3, 24, 4, 5), 1 / 3, 0.5, near=near).astype(dtype)


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64), (BF16, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bounds(wrong, right):
    p = long_problem(wrong)
    exact = exact_problems_of(p)
    assert (off(p.forward(), [own.forward() for own in exact]) > forward_bound(p, right)).any()
    assert (off(dora_norm(*p.weight), enclosed_norms(p)) > dora_norm_bound(*p.weight, right)).any()
    gradients, bounds, expected = p.backward(), backward_bound(p, right), [own.backward() for own in exact]
    for name in GRADIENTS:
        difference = off(getattr(gradients, name), [getattr(own, name) for own in expected])
        assert (difference > getattr(bounds, name)).any(), name


def through_the_norm(p):
    """dA of a layer whose norm is not a constant: less the part of it that lies along the row."""
    weight = p.W0 + p.scaling * p.B @ p.A
    norm = np.linalg.norm(weight, axis=1)
    unit = weight / norm[:, None]
    dw = (p.magnitude / norm)[:, None] * (p.dy.T @ p.x)
    dw = dw - unit * (unit * dw).sum(axis=1, keepdims=True)
    return p.scaling * p.B.T @ dw


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("near", [True, False])
def test_a_wrong_formula_breaks_the_bounds(dtype, near):
    p = long_problem(dtype, near=near)
    frozen = np.linalg.norm(p.W0, axis=1).astype(dtype)
    wrong = {
        "norm of W0 alone": replace(p, norm=frozen),
        "norm over the other axis": replace(p, norm=np.linalg.norm(p.W0[:, :4], axis=0).astype(dtype)),
        "no rescaling": replace(p, magnitude=dora_norm(*p.weight)),
        "no dropout": replace(p, dropout=None),
        "scaling off by a thousandth": replace(p, scaling=p.scaling * 1.001),
        "no bias": replace(p, bias=np.zeros_like(p.bias)),
    }
    exact = exact_problems_of(p)
    y, bound = [own.forward() for own in exact], forward_bound(p, dtype)
    gradients, bounds = [own.backward() for own in exact], backward_bound(p, dtype)
    for name, other in wrong.items():
        assert (off(other.forward(), y) > bound).any(), name
        for own in ("dx", "dA", "dB", "dmagnitude") if name != "no bias" else ():
            if (own, name) != ("dmagnitude", "no rescaling"):
                difference = off(getattr(other.backward(), own), [getattr(g, own) for g in gradients])
                assert (difference > getattr(bounds, own)).any(), (name, own)
    undropped = replace(p, dropout=None)
    expected = [own.backward().dA for own in exact_problems_of(undropped)]
    allowed = backward_bound(undropped, dtype).dA
    assert (off(undropped.backward().dA, expected) <= allowed).all()
    assert (off(through_the_norm(undropped), expected) > allowed).any()


def test_a_row_that_cancels_has_a_norm_of_a_large_relative_error_within_the_bound():
    """In float32 the weight is lost to a part in a thousand; its norm, exactly added up, is no better."""
    rng = np.random.default_rng(5)
    A, B = rng.normal(0, 1, (2, 6)).astype(F32), rng.normal(0, 1, (3, 2)).astype(F32)
    W0 = (-(B.astype(F64) @ A) * (1 + 2.0**-14)).astype(F32)
    p = DoraProblem(None, None, W0, A, B, None, None, None, 1.0)
    computed, norms, bound = norm_in_dtype(p, F32.type(1)), enclosed_norms(p), dora_norm_bound(*p.weight, F32)
    difference = off(computed, norms)
    assert (difference <= bound).all()
    sizes = np.linalg.norm(np.abs(W0) + np.abs(B) @ np.abs(A), axis=1)
    assert (difference > norms[1].astype(F64) * 20 * unit_roundoff(F32)).any()
    assert (bound < 30 * unit_roundoff(F32) * sizes).all()
    assert (bound > norms[1].astype(F64) / 500).any()


def test_squares_that_underflow_in_float32_are_within_the_bound():
    W0 = np.full((1, 9), 1e-25, F32)
    adapter = LowRank(np.zeros((1, 9), F32), np.zeros((1, 1), F32), 1.0)
    with np.errstate(under="ignore"):
        assert np.sqrt((W0 * W0).sum(axis=1, dtype=F32))[0] == 0
    assert dora_norm_bound(W0, adapter, F32)[0] >= 3e-25
    assert dora_norm_bound(W0, adapter, F64)[0] < 1e-38
    with pytest.raises(
        ConfigError,
        match=r"^precision: expected one that bounds the error of each norm by half of it, got 4.6e-19 for "
        r"row 0 of norm 3e-25; name a more precise dtype$",
    ):
        dora_forward_bound(W0, W0, adapter, np.ones(1, F32), F32)


def test_the_first_norm_that_is_not_known_is_named():
    W0, magnitude = np.ones((3, 2)), np.ones(3)
    adapter = LowRank(np.ones((1, 2)), np.array([[0.0], [-1.0], [-1.0]]), 1.0)
    for call in (
        lambda: dora_forward_bound(np.ones(2), W0, adapter, magnitude, F64),
        lambda: dora_backward_bound(magnitude, np.ones(2), W0, adapter, magnitude, F64),
    ):
        with pytest.raises(ConfigError, match=r"got .*e-15 for row 1 of norm 0; name"):
            call()
    adapter = LowRank(np.ones((1, 2)), np.array([[0.0], [0.0], [-1 + 2.0**-6]]), 1.0)
    assert (dora_forward_bound(np.ones(2), W0, adapter, magnitude, F32) > 0).all()
    with pytest.raises(ConfigError, match=r"for row 2 of norm 0.0221"):
        dora_forward_bound(np.ones(2), W0, adapter, magnitude, BF16)


def grown(terms, stores, wide, dtype):
    a, b = gamma(terms, unit_roundoff(wide)), gamma(stores, unit_roundoff(dtype))
    return a + b + a * b


@pytest.mark.parametrize(
    ("precision", "squares", "inputs", "stores"),
    [
        (Precision(F32), F32, F32, 7),
        (Precision(F32), F32, F64, 9),
        (Precision(F64), F64, F32, 6),
        (Precision(BF16), F32, BF16, 7),
        (Precision(F16, accumulator=F32), F32, F16, 8),
        (Precision(F32, accumulator=F64), F64, F32, 8),
        (Precision(F32, failure=0.01), F32, F32, 7),
    ],
    ids=str,
)
def test_the_norms_bound_counts_the_roundings_that_it_says(precision, squares, inputs, stores):
    """All ones: |W0| + 2 |B||A| is 1 + 2 r everywhere; its error is ``grown`` of that, and the norm's the
    sum.

    The roundings that are stored: the scaling, its product, the sum and 4 of slack; with float64 inputs those
    of B and A as well, with a wider accumulator that of the product.
    """
    n_in, r = 16, 3
    W0, A, B = (np.ones(shape, inputs) for shape in ((2, n_in), (r, n_in), (2, r)))
    size = (1 + 2 * r) * 4.0
    entries = grown(r, stores, precision.wide.dtype, precision.dtype) * size
    relative = grown(n_in + 6, 2, squares, precision.dtype)
    expected = entries + relative * (size + entries)
    bound = dora_norm_bound(W0, LowRank(A, B, 2.0), precision)
    # Squares that underflow in float32, and in float16 each of the operations on 16 entries.
    underflows = 3e-18 * (squares == F32) + 2.0**-24 * 500 * (precision.dtype == F16)
    assert (expected <= bound).all()
    assert (bound <= expected * (1 + 2.0**-26) + underflows).all()


@BY_DTYPE
def test_the_factors_error_is_the_norms(dtype):
    """x = e_1, W0 = I, B = 0: y - bias is g; nothing but the norm and the division can be off."""
    W0, magnitude = np.eye(2, dtype=dtype) * dtype.type(2), np.array([6.0, 2.0], dtype)
    adapter = LowRank(np.zeros((1, 2), dtype), np.zeros((2, 1), dtype), 1.0)
    u, norm = unit_roundoff(dtype), dora_norm_bound(W0, adapter, dtype)
    q = norm / (2 - norm)
    bound = dora_forward_bound(np.eye(2, dtype=dtype), W0, adapter, magnitude, dtype)
    direct = linear_forward_bound(np.eye(2, dtype=dtype), W0, adapter.A, adapter.B, 1.0, dtype)
    # |g - 1| is 2 and 0; its error q g and two roundings, once for each entry of x W0^T.
    for i, (g, less) in enumerate(((3, 2), (1, 0))):
        added = bound[i, i] - direct[i, i]
        least = 2 * (g * q[i] + g * u)
        assert least < added < least + 2 * less * grown(12, 12, dtype, dtype) + 20 * 2 * u + 1e-3 * least


@pytest.fixture
def norm_errors(monkeypatch):
    """Make the norms' errors 1/2 in float64, and what the test says in float32."""
    errors = {F64: 0.5}
    monkeypatch.setattr(
        dora_bounds,
        "_norm_error",
        lambda W0, adapter, precision: np.full(len(W0), errors[np.dtype(precision.dtype)]),
    )
    return errors


def sizes_of(magnitude, scaling=1.0, dtype=F32):
    """Of the layer with W0 = 2 I, B = 0."""
    n = len(magnitude)
    adapter = LowRank(np.zeros((1, n), F32), np.zeros((n, 1), F32), scaling)
    return dora_bounds._sizes(np.eye(n, dtype=F32) * F32.type(2), adapter, np.array(magnitude, dtype), F32)


def test_the_factors_sizes_are_those_derived(norm_errors):
    """A norm of 2 +- 1/2 is from 3/2 to 5/2; its error E is 1/4."""
    norm_errors[F32] = 0.25
    m = [2.0, -3.0, 1.5, 6.0]
    sizes = sizes_of(m, 0.5)
    unit = 2.0**-126 * (1 + 3.0)  # the weight of g = 6 / 2
    assert sizes.unit == sizes.reciprocal.unit == unit
    assert sizes.reciprocal.precision == sizes.precision == Precision(F32)
    assert sizes.reciprocal.size.tolist() == [1 / 1.5] * 4
    assert sizes.reciprocal.lost.tolist() == [0.25 / 1.25 / 1.5 * ROUND_UP] * 4
    g = sizes.g
    assert g.size.tolist() == [abs(v) * (1 / 1.5) for v in m]
    assert g.stores == 1
    lost = [unit * (1 / 1.5 + sizes.reciprocal.lost[0]) + abs(v) * sizes.reciprocal.lost[0] + unit for v in m]
    assert np.allclose(g.lost, lost, rtol=1e-15, atol=0)
    # |m / n - 1| is largest at n = 3/2 or, for m = 1.5, at 5/2
    away = np.array([2 / 1.5 - 1, 3, 1 - 1.5 / 2.5, 3])
    away[1] = 3 / 1.5 + 1
    assert sizes.less.size.tolist() == (away + 2.0**-50 * g.size).tolist()
    assert sizes.less.lost.tolist() == g.bound(0).tolist()
    assert (sizes.less.stores, sizes.less.terms, sizes.less.products) == (1, g.terms, g.products)
    assert sizes.less.unit == unit
    assert (sizes.adapter.A.unit, sizes.adapter.A.size.shape) == (unit, (1, 4))


@pytest.mark.parametrize(
    ("magnitude", "scaling", "weight"),
    [
        (2.0, 2.0**-10, 2.0**10),
        (2.0**5, 2.0**-10, 2.0**10),
        (2.0**11, 2.0**-3, 2.0**10),
        (2.0**-9, 2.0**3, 2.0**10),
        (2.0**6, 2.0**5, 2.0**10),
        (2.0**-4, 2.0**-5, 2.0**10),
    ],
)
def test_an_underflow_weighs_as_the_largest_factor(norm_errors, magnitude, scaling, weight):
    """The scaling, g and their product, or what they divide by: the norm is 2."""
    norm_errors[F32] = 0.25
    assert sizes_of([magnitude], scaling).unit == 2.0**-126 * (1 + weight)


def test_the_factors_of_a_narrow_magnitude_are_not_rounded_to_its_dtype(norm_errors):
    norm_errors[F32] = 0.25
    m = float(BF16.type(100.5))
    assert sizes_of([m], 1 / 3, BF16).unit == 2.0**-126 * (1 + m / 2)
    assert sizes_of([m], 5 / 3, BF16).unit == 2.0**-126 * (1 + 5 / 3 * m / 2)


def test_a_norm_has_to_be_known_to_half_of_its_least(norm_errors):
    """That is 3/4."""
    for accepted in (0.25, 0.7, 0.75):
        norm_errors[F32] = accepted
        assert sizes_of([1.0]).g.size.tolist() == [1 / 1.5]
    for refused in (np.nextafter(0.75, 1), 1.0, 1.5, np.nan):
        norm_errors[F32] = refused
        with pytest.raises(ConfigError, match=r"^precision: expected .* for row 0 of norm 2; name"):
            sizes_of([1.0])


def test_the_underflows_of_a_norm_are_those_derived():
    """Of a weight of zeros: sqrt(2 in eta) in float32; in float16 one underflow besides each entry's."""

    def bound(inputs, dtype):
        adapter = LowRank(np.zeros((1, inputs), dtype), np.zeros((1, 1), dtype), 1.0)
        return dora_norm_bound(np.zeros((1, inputs), dtype), adapter, dtype)[0]

    for inputs in (1, 16, 400):
        expected = (1 + grown(inputs + 6, 2, F32, F32)) * (2 * inputs * 2.0**-126) ** 0.5
        assert abs(bound(inputs, F32) / expected - 1) < 2.0**-28
    unit = 2.0**-24 * 2
    assert abs((2 * bound(1, F16) - bound(4, F16)) / unit - 1) < 2.0**-10


def test_a_bias_that_is_subtracted_again_is_allowed_for():
    """A bias of 2^20 costs PEFT's order 20 bits of x W0^T, in y and in dmagnitude."""
    p = replace(long_problem(F32), dropout=None)
    p = replace(p, bias=np.full_like(p.bias, 2.0**20))
    s = F32.type(p.scaling)
    exact = exact_problems_of(p)
    difference = off(peft_order(p, s), [own.forward() for own in exact])
    assert (difference <= forward_bound(p, F32)).all()
    result = product(p.x, p.W0.T) + p.bias
    rescaled = (result - p.bias) + product(product(p.x, p.A.T), p.B.T) * s
    computed = (p.dy * rescaled).sum(axis=0) / norm_in_dtype(p, s)
    difference = off(computed, [own.backward().dmagnitude for own in exact])
    without, allowed = backward_bound(p, F32), backward_bound(p, F32, bias=p.bias)
    assert (difference <= allowed.dmagnitude).all()
    assert (difference > without.dmagnitude).any()
    for name in GRADIENTS[:-1]:
        assert (getattr(without, name) == getattr(allowed, name)).all()


# Stored roundings of y, dx, dA, dB, dbias and dmagnitude, counted by hand: the dropout's product, the scaling
# and its product, g = magnitude / norm and its product, or that with g - 1, the division by the norm, sums, a
# product with a wide accumulator; and 6 of slack.
STORED = {(F32, None, F32): (13, 12, 11, 11, 6, 12), (BF16, F32, BF16): (15, 14, 13, 13, 7, 15)}


@pytest.mark.parametrize(("dtype", "wide", "inputs"), STORED, ids=str)
def test_the_bounds_count_the_roundings_that_they_say(dtype, wide, inputs):
    """All ones but for a dropout of twos; W0 + 2 B A is 5 everywhere, over 4 inputs a norm of 10; g is 2."""
    N, n_in, n_out, r = 5, 4, 3, 2
    shapes = [(N, n_in), (N, n_out), (n_out, n_in), (r, n_in), (n_out, r), (n_out,), (n_out,), (N, n_in)]
    ones = [np.ones(shape, inputs) for shape in shapes]
    ones[6] *= inputs.type(20)
    ones[7] *= inputs.type(2)
    p, precision = DoraProblem(*ones, scaling=2.0), Precision(dtype, accumulator=wide)
    q = dora_norm_bound(*p.weight, precision)[0]
    q = q / (10 - q)

    def counted(bound, terms, size, lost):
        """Return the number of stored roundings that gives the bound, but for the underflows."""
        sizes = [grown(terms, count, precision.wide.dtype, dtype) for count in range(40)]
        sizes = [g * size + (1 + g) * lost for g in sizes]
        return next(n for n in range(39) if sizes[n] <= bound.min() <= bound.max() < sizes[n + 1])

    u = unit_roundoff(dtype)
    g, less = 2 * q, 2 * q + 2 * gamma(1, u) * (1 + q)
    base, low = n_in, 2 * 2 * n_in * r  # without and with dropout and scaling, but for g
    bounds, N_out = backward_bound(p, precision), N * n_out
    counts = (
        counted(
            forward_bound(p, precision),
            n_in + r,
            base + 1 + 2 * base + 2 * low + 2,
            (2 * base + 2) * less + low * g,
        ),
        counted(bounds.dx, n_out + r, n_out * (1 + 2 + 2 * 4 * r), n_out * (2 * less + 4 * r * g)),
        counted(bounds.dA, n_out + N, 2 * 2 * 2 * N_out, 2 * 2 * N_out * g),
        counted(bounds.dB, n_in + N, 2 * 2 * 2 * N * n_in, 2 * 2 * N * n_in * g),
        counted(bounds.dbias, N, N, 0.0),
        counted(bounds.dmagnitude, n_in + r + N, N * (2 * base + low) / 10, N * (2 * base + low) / 10 * q),
    )
    assert counts == STORED[dtype, wide, inputs]


def test_a_factor_that_comes_early_and_is_small_is_allowed_for():
    """scaling * g of 2^-12: what underflows after it weighs as much more, were it applied first, in
    float16.
    """
    x, W0 = np.full((1, 16), 16.0, F16), np.full((1, 16), 1.0, F16)
    adapter = LowRank(np.full((1, 16), 2.0**-13, F16), np.full((1, 1), 2.0**-13, F16), 1.0)
    magnitude = np.full(1, 4 * 2.0**-6, F16)
    g = magnitude / F16.type(4)
    early = product(x, (product(adapter.B * g, adapter.A)).T)
    assert early[0, 0] == 0
    zero = LowRank(adapter.A, np.zeros((1, 1), F16), 1.0)
    with_update = dora_forward_bound(x, W0, adapter, magnitude, F16)
    assert (with_update > dora_forward_bound(x, W0, zero, magnitude, F16) * 0.999).all()
    assert (with_update >= 16 * 16 * 2.0**-32).all()


def test_a_weight_stored_the_other_way_round_has_the_same_bounds():
    p = long_problem(F32)
    option = {"fan_in_fan_out": True}
    weight = p.W0.T.copy(), p.adapter
    assert (dora_norm_bound(*weight, F32, **option) == dora_norm_bound(*p.weight, F32)).all()
    y = dora_forward_bound(p.x, *weight, p.magnitude, F32, bias=p.bias, **option)
    assert np.allclose(y, forward_bound(p, F32), rtol=1e-12, atol=0)
    bounds = dora_backward_bound(p.dy, p.x, *weight, p.magnitude, F32, **option)
    assert isinstance(bounds, DoraGradients)
    for name in GRADIENTS:
        assert np.allclose(getattr(bounds, name), getattr(backward_bound(p, F32), name), rtol=1e-12, atol=0)


def test_a_layer_without_bias_has_a_smaller_bound():
    p = long_problem(F32)
    assert (forward_bound(replace(p, bias=None), F32) < forward_bound(p, F32)).all()


def test_magnitudes_of_zero_and_a_scaling_of_zero_are_bounded():
    p = replace(long_problem(F32), scaling=0.0, magnitude=np.zeros(4, F32))
    assert p.forward().tolist() == [p.bias.tolist()] * 3 or p.dropout is not None
    assert (off(p.forward(), [own.forward() for own in exact_problems_of(p)]) <= forward_bound(p, F32)).all()


def test_wrong_arguments_are_refused():
    p = long_problem(F32)
    with pytest.raises(ShapeError, match=r"^magnitude: expected \(4,\)"):
        forward_bound(replace(p, magnitude=np.ones(3, F32)), F32)
    with pytest.raises(ShapeError, match=r"^magnitude: expected \(4,\)"):
        backward_bound(replace(p, magnitude=np.ones(3, F32)), F32)
    with pytest.raises(ShapeError, match=r"^bias: expected \(4,\)"):
        forward_bound(replace(p, bias=np.ones(3, F32)), F32)
    with pytest.raises(ShapeError, match=r"^bias: expected \(4,\)"):
        backward_bound(p, F32, bias=np.ones(3, F32))
    with pytest.raises(ShapeError, match=r"^dy: expected"):
        backward_bound(replace(p, dy=p.x), F32)
    with pytest.raises(ShapeError, match=r"^dropout: expected"):
        forward_bound(replace(p, dropout=np.ones(3, F32)), F32)
    with pytest.raises(DTypeError, match=r"^dtype: "):
        forward_bound(p, np.int8)
    with pytest.raises(ShapeError, match=r"^W0: expected \(out, in\), got \(\)"):
        dora_norm_bound(np.ones(()), p.adapter, F32)
    with pytest.raises(ConfigError, match=r"^rows: "):
        dora_norm_bound(p.W0, replace(p.adapter, rows=slice(0, 4)), F32)
    assert (dora_norm_bound(p.W0, replace(p.adapter, dropout=np.ones(3)), F32) > 0).all()


def test_enclosed_norms_enclose():
    p = long_problem(F64)
    below, above = enclosed_norms(p)
    squares = [Fraction(sum(w * w for w in row)) for row in exact_rows(p)]
    assert all(b * b <= s <= a * a for b, s, a in zip(below, squares, above, strict=True))
    assert all((a - b) / a < Fraction(2) ** -190 for b, a in zip(below, above, strict=True))


def exact_rows(p):
    from dora_problems import adapted_rows

    return adapted_rows(p)
