import math
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_linear import error, rational
from exact_optimizer import exact_clip, exact_step, root
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

from loracle.reference import (
    AdamWBound,
    AdamWOptions,
    AdamWState,
    ConfigError,
    Precision,
    adamw_start,
    adamw_step,
    adamw_step_bound,
    clip_bound,
    clip_by_global_norm,
    gamma,
    probable_gamma,
    unit_roundoff,
)
from loracle.reference.formats import FORMATS, float_format

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(rng, dtype, size=1.0, shape=(3, 4), step=None):
    def numbers():
        return rng.normal(0, size, shape).astype(dtype)

    state = AdamWState(int(rng.integers(0, 6)) if step is None else step, numbers(), numbers() ** 2)
    return numbers(), numbers(), state


BETAS = [(0.9, 0.999), (0.9, 0.95), (0.3, 0.5), (0.5, 0.75), (0.0, 0.0)]


def outside(computed, exact, bound):
    """Return the names of the results that break their bound."""
    moved, state = computed
    results = {"parameter": moved, "m": state.m, "v": state.v}
    exact = dict(zip(results, exact, strict=True))
    return {
        name for name, value in results.items() if (error(value, exact[name]) > getattr(bound, name)).any()
    }


@BY_DTYPE
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([30.0, 1.0, 0.01]),
    betas=st.sampled_from(BETAS),
    decay=st.sampled_from([0.0, 0.01, 3.0]),
    step=st.sampled_from([None, 0, 1, 1000]),
)
def test_a_step_stays_within_the_bound(dtype, seed, size, betas, decay, step):
    p, g, state = drawn(np.random.default_rng(seed), dtype, size, step=step)
    options = AdamWOptions(0.01, betas, 1e-3 if dtype == F16 else 1e-8, decay)
    bound = adamw_step_bound(p, g, state, options, dtype)
    assert not outside(adamw_step(p, g, state, options), exact_step(p, g, state, options), bound)
    assert bound.parameter.dtype == bound.m.dtype == bound.v.dtype == F64
    assert bound.parameter.shape == p.shape
    if dtype != F16:
        assert np.isfinite(bound.parameter).all()


def scalars(state, options, number):
    (b1, b2), t = options.betas, state.step + 1
    rate, correction = options.lr / (1 - b1**t), math.sqrt(1 - b2**t)
    names = ("b1", "w1", "b2", "w2", "eps", "rate", "correction", "decay")
    values = (b1, 1 - b1, b2, 1 - b2, options.eps, rate, correction, options.lr * options.weight_decay)
    return {name: number(value) for name, value in zip(names, values, strict=True)}


def torch_order(p, g, state, options):
    s = scalars(state, options, p.dtype.type)
    m = state.m + s["w1"] * (g - state.m)
    v = state.v * s["b2"] + s["w2"] * g * g
    p = p * p.dtype.type(1 - options.lr * options.weight_decay)
    return p - s["rate"] * m / (np.sqrt(v) / s["correction"] + s["eps"]), AdamWState(state.step + 1, m, v)


def other_end_order(p, g, state, options):
    s = scalars(state, options, p.dtype.type)
    one = p.dtype.type(1)
    m = g - (g - state.m) * (one - s["w1"])
    v = s["w2"] * (g * g) + s["b2"] * state.v
    denominator = np.sqrt(v) * (one / s["correction"]) + s["eps"]
    return (p - s["decay"] * p) - s["rate"] * (m / denominator), AdamWState(state.step + 1, m, v)


def capturable_order(p, g, state, options):
    s = scalars(state, options, p.dtype.type)
    m = s["b1"] * state.m + s["w1"] * g
    v = s["b2"] * state.v + s["w2"] * g * g
    denominator = np.sqrt(v) / (s["correction"] * s["rate"]) + s["eps"] / s["rate"]
    return p - s["decay"] * p - m / denominator, AdamWState(state.step + 1, m, v)


@pytest.mark.parametrize("order", [torch_order, other_end_order, capturable_order], ids=lambda f: f.__name__)
@BY_DTYPE
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), betas=st.sampled_from(BETAS), size=st.sampled_from([1.0, 0.1]))
def test_every_order_of_a_step_stays_within_the_bound(order, dtype, seed, betas, size):
    if order is other_end_order and betas[0] > 0.5:
        betas = (1 - betas[0], betas[1])  # torch takes this end where 1 - b1 is at least 1/2
    p, g, state = drawn(np.random.default_rng(seed), dtype, size)
    options = AdamWOptions(0.01, betas, 1e-3 if dtype == F16 else 1e-8, 0.1)
    computed = order(p, g, state, options)
    assert computed[0].dtype == dtype
    bound = adamw_step_bound(p, g, state, options, dtype)
    assert not outside(computed, exact_step(p, g, state, options), bound)


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64), (BF16, F64)], ids=str)
def test_a_step_in_a_narrower_dtype_breaks_the_bound(wrong, right):
    p, g, state = drawn(np.random.default_rng(0), wrong)
    options = AdamWOptions(0.1)
    bound = adamw_step_bound(p, g, state, options, right)
    exact = exact_step(p, g, state, options)
    assert outside(adamw_step(p, g, state, options), exact, bound) == {"parameter", "m", "v"}


def with_decay_in_the_gradient(p, g, state, options):
    return adamw_step(p, g + options.weight_decay * p, state, replace(options, weight_decay=0.0))


def with_eps_in_the_root(p, g, state, options):
    moved, after = adamw_step(p, g, state, options)
    s = scalars(state, options, float)
    plain = np.sqrt(after.v) / s["correction"] + s["eps"]
    rooted = np.sqrt(after.v / s["correction"] ** 2 + s["eps"])
    return moved + s["rate"] * after.m * (1 / plain - 1 / rooted), after


def with_decay_after_the_step(p, g, state, options):
    moved, after = adamw_step(p, g, state, replace(options, weight_decay=0.0))
    return moved * (1 - options.lr * options.weight_decay), after


def with_a_step_too_many(p, g, state, options):
    return adamw_step(p, g, replace(state, step=state.step + 1), options)


def with_betas_exchanged(p, g, state, options):
    return adamw_step(p, g, state, replace(options, betas=options.betas[::-1]))


def with_a_rate_off_by_a_thousandth(p, g, state, options):
    return adamw_step(p, g, state, replace(options, lr=options.lr * 1.001))


@pytest.mark.parametrize(
    ("formula", "wrong"),
    [
        (with_decay_in_the_gradient, {"parameter", "m", "v"}),
        (with_eps_in_the_root, {"parameter"}),
        (with_decay_after_the_step, {"parameter"}),
        (with_a_step_too_many, {"parameter"}),
        (with_betas_exchanged, {"parameter", "m", "v"}),
        (with_a_rate_off_by_a_thousandth, {"parameter"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_formula_breaks_the_bound(formula, wrong):
    p, g, state = drawn(np.random.default_rng(1), F64, step=2)
    options = AdamWOptions(0.1, eps=1e-3, weight_decay=0.1)
    exact = exact_step(p, g, state, options)
    for dtype in (F32, F64):
        bound = adamw_step_bound(p, g, state, options, dtype)
        assert outside(formula(p, g, state, options), exact, bound) == wrong


def test_cancellation_and_a_tiny_mean_of_squares_are_within_the_bound():
    """m cancels to a few units of m; v is so small that the root's error is relative to itself."""
    p = np.array([1.0, 1.0, 0.0], F32)
    g = np.array([-9.0, 9e-20, 1e-23], F32)
    state = AdamWState(3, np.array([1.0, 1e-19, 0.0], F32), np.array([1e-38, 0.0, 0.0], F32))
    options = AdamWOptions(1.0, (0.9, 0.999), 1e-8, 0.0)
    bound = adamw_step_bound(p, g, state, options, F32)
    assert np.isfinite(bound.parameter).all()
    assert not outside(adamw_step(p, g, state, options), exact_step(p, g, state, options), bound)


def by_hand_bound(p, g, m, v, t, options, dtype):
    """The docstring's formulas, on Python numbers."""
    u = unit_roundoff(dtype)
    form = float_format(dtype)
    eta = form.smallest_subnormal if dtype == F16 else form.smallest_normal
    eta *= 1.0
    (b1, b2), lr, eps = options.betas, options.lr, options.eps
    growth = gamma(6, u)
    p, g, m = abs(p), abs(g), abs(m)
    mean, square = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    e_m = growth * (mean + (1 - b1 if b1 > 0.5 else 1) * (m + g)) + (1 + growth) * eta * (4 + m + g)
    e_v = growth * square + (1 + growth) * eta * (4 + g + v + g * g)
    low = square - e_v
    e_root = e_v / (math.sqrt(square) + math.sqrt(low)) if low > 0 else math.sqrt(e_v)
    exact1, exact2 = (float(1 - Fraction(b) ** t) for b in (b1, b2))
    c2 = math.sqrt(exact2)
    denominator = math.sqrt(square) / c2 + eps
    off1, off2 = 4 * 2.0**-53 / exact1, 4 * 2.0**-53 / exact2 + 2 * eta / c2
    g1, g2 = growth + off1 + growth * off1, growth + off2 + growth * off2
    e_d = g2 * denominator + (1 + g2) * (e_root / c2 + 3 * eta)
    least = denominator - e_d
    rate = lr / exact1
    update = rate * mean / denominator
    e_q = rate * (1 + g1) * (e_m / denominator + (mean + e_m) * e_d / (denominator * least))
    e_q += g1 * update + eta * (2 + rate + (1 + mean + e_m) / least)
    e_p = (growth + u) * (1 + lr * options.weight_decay) * p + u * update
    e_p += (1 + u) * e_q + (1 + growth) * eta * (3 + p)
    return e_p, e_m, e_v


@BY_DTYPE
@pytest.mark.parametrize("betas", BETAS)
def test_the_bound_is_the_one_in_its_docstring(dtype, betas):
    """Where underflows weigh as much as the rest, too: numbers of the size of the dtype's smallest."""
    form = float_format(dtype)
    sizes = [(1.0, 1.0), (2.0**-3, 1.0), (math.sqrt(form.smallest_normal), 2.0**-4)]
    for size, eps in sizes:
        for t in (1, 2, 50):
            p, g, state = drawn(np.random.default_rng(t), dtype, size, shape=(2,), step=t - 1)
            p = p + dtype.type(1.0)
            options = AdamWOptions(0.03, betas, eps, 0.7)
            bound = adamw_step_bound(p, g, state, options, dtype)
            for i in range(2):
                numbers = (float(a[i]) for a in (p, g, state.m, state.v))
                expected = by_hand_bound(*numbers, t, options, dtype)
                for name, value in zip(("parameter", "m", "v"), expected, strict=True):
                    assert value < getattr(bound, name)[i] < value * (1 + 2.0**-28)
    assert isinstance(bound, AdamWBound)
    assert bound != replace(bound)
    with pytest.raises(FrozenInstanceError):
        bound.m = None


def test_a_denominator_that_may_vanish_has_no_bound():
    zero = np.zeros(2)
    g = np.array([0.0, 1.0])
    options = AdamWOptions(0.1, eps=0.0)
    assert adamw_step_bound(zero, g, adamw_start(g), options, F64).parameter.tolist()[0] == math.inf
    assert np.isfinite(adamw_step_bound(zero, g, adamw_start(g), options, F64).parameter[1])
    half = np.array([1e-4, 1.0], F16)
    bound = adamw_step_bound(half, half, adamw_start(half), AdamWOptions(0.1), F16).parameter
    assert np.isinf(bound).tolist() == [True, False]


def around_the_border(has_bound, low, high):
    """Return the numbers next to the least one that has a bound, which lies between the two."""
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if has_bound(middle) else (middle, high)
    return high + np.spacing(high) * np.arange(-8, 9)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_a_denominator_that_may_just_vanish_has_no_bound_whatever_the_rate(dtype):
    """Some eps is the error of the denominator exactly, and a rate of 0 times infinity is no number."""
    zero = np.zeros(1)

    def bound(eps):
        options = AdamWOptions(0.0, (0.0, 0.0), eps)
        return adamw_step_bound(zero, zero, adamw_start(zero), options, dtype).parameter[0]

    found = [bound(eps) for eps in around_the_border(lambda eps: bound(eps) < math.inf, 0.0, 1.0)]
    assert found[0] == math.inf > found[-1]
    assert not np.isnan(found).any()


def test_clipping_of_gradients_whose_norm_may_just_vanish_has_no_bound():
    """Some norm plus 1e-6 is its own error exactly, beside 11 zeros or another number of them."""

    def bound(size, zeros):
        clipped, _ = clip_bound([np.full(1, size), np.zeros(zeros)], 1.0, F16)
        return clipped[0][0]

    for zeros in range(24):
        border = around_the_border(lambda size, n=zeros: bound(size, n) < math.inf, 0.0, 1.0)
        found = [bound(size, zeros) for size in border]
        assert found[0] == math.inf > found[-1]
        assert not np.isnan(found).any()


def test_clipping_of_nothing():
    """The norm is zero; the root may underflow."""
    clipped, norm = clip_bound([], 1.0, F32)
    assert clipped == ()
    smallest = float_format(F32).smallest_normal
    assert smallest < norm < smallest * (1 + 2.0**-16)


def test_rounded_multiplicands_are_for_products_of_matrices():
    gradients = [np.ones(3, F32)]
    (clipped,), norm = clip_bound(gradients, 0.5, F32)
    (found,), rounded = clip_bound(gradients, 0.5, Precision(F32, multiplicands="tf32"))
    assert (found.tolist(), rounded) == (clipped.tolist(), norm)


def test_betas_that_float64_cannot_tell_from_one_have_no_bound():
    g = np.ones(1)
    beta = 1 - 2.0**-52
    for betas in ((beta, 0.5), (0.5, beta)):
        message = f"betas: expected 1 - beta^t of at least 2^-48, got beta {beta} and t 1; lower it"
        options = AdamWOptions(0.1, betas)
        refused(lambda o=options: adamw_step_bound(g, g, adamw_start(g), o, F64), ConfigError, message)
        adamw_step_bound(g, g, AdamWState(16, g, g), options, F64)
    adamw_step_bound(g, g, adamw_start(g), AdamWOptions(0.1, (1 - 2.0**-48, 0.5)), F64)
    with pytest.raises(ConfigError, match=r"^betas: expected 1 - beta\^t of at least 2\^-48, got beta 0\.99"):
        adamw_step_bound(g, g, adamw_start(g), AdamWOptions(0.1, (1 - 2.0**-49, 0.5)), F64)


def clip_problem(rng, dtype, size=1.0):
    return [rng.normal(0, size, shape).astype(dtype) for shape in ((3, 4), (5,), (2, 2, 2))]


@BY_DTYPE
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1.0, 30.0]), most=st.sampled_from([0.1, 3.0, 1e3])
)
def test_clipped_gradients_stay_within_the_bound(dtype, seed, size, most):
    gradients = clip_problem(np.random.default_rng(seed), dtype, size)
    clipped, norm = clip_by_global_norm(gradients, most)
    exact, exact_norm = exact_clip(gradients, most)
    bounds, norm_bound = clip_bound(gradients, most, dtype)
    assert abs(Fraction(norm) - exact_norm) <= Fraction(norm_bound)
    for computed, expected, bound in zip(clipped, exact, bounds, strict=True):
        assert bound.shape == computed.shape
        assert (error(computed, expected) <= bound).all()


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64)], ids=str)
def test_clipping_in_a_narrower_dtype_or_otherwise_breaks_the_bound(wrong, right):
    gradients = clip_problem(np.random.default_rng(2), wrong)
    exact, _ = exact_clip(gradients, 0.3)
    bounds, norm_bound = clip_bound(gradients, 0.3, right)
    clipped, _ = clip_by_global_norm(gradients, 0.3)
    wide = [g.astype(F64) for g in gradients]
    alone = [g * 0.3 / np.linalg.norm(g) for g in wide]  # each by its own norm
    for others in (clipped, alone):
        broken = [(error(c, e) > b).any() for c, e, b in zip(others, exact, bounds, strict=True)]
        assert all(broken)
    largest = max(np.abs(g).max() for g in wide)
    assert (
        abs(largest - float(root(sum(v**2 for g in map(rational, gradients) for v in g.ravel()))))
        > norm_bound
    )


@pytest.mark.parametrize(
    ("precision", "wide"),
    [
        (F16, F16),
        (BF16, BF16),
        (F32, F32),
        (F64, F64),
        (Precision(BF16, F32), F32),
        (Precision(F32, failure=1e-3), F32),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2.0, 2.0**-60])
def test_the_bound_of_clipping_counts_the_roundings_that_it_says(precision, wide, size):
    """Two gradients of 5 entries in all; 0.75 clips the larger ones and none of the small."""
    dtype = Precision.of(precision).form.dtype
    form = float_format(dtype)
    eta = form.smallest_subnormal if dtype == F16 else form.smallest_normal
    gradients = [np.full((2, 2), size), np.full(1, -size)]
    failure, stores = Precision.of(precision).failure, gamma(8, unit_roundoff(dtype))
    u = unit_roundoff(wide)
    sums = gamma(5, u) if failure is None else probable_gamma(5, u, 5, failure)
    growth = sums + stores + sums * stores
    squares, lost = 5 * size**2, 14 * eta
    low = squares - lost
    e_root = lost / (math.sqrt(squares) + math.sqrt(low)) if low > 0 else math.sqrt(lost)
    norm = math.sqrt(squares)
    e_norm = growth * norm + (1 + growth) * (e_root + eta)
    bounds, norm_bound = clip_bound(gradients, 0.75, precision)
    assert e_norm < norm_bound < e_norm * (1 + 2.0**-28)
    least = norm + 1e-6 - e_norm - eta
    assert [bound.shape for bound in bounds] == [(2, 2), (1,)]
    if least <= 0:
        assert size < 1
        assert dtype == F16
        assert all(np.isinf(bound).all() for bound in bounds)
        return
    relative, last = (e_norm + eta) / least, gamma(6, unit_roundoff(dtype))
    relative += last + relative * last
    expected = relative * min(1, 0.75 / (norm + 1e-6)) * size + eta * (2 + size * (1 + 1 / least))
    for bound in bounds:
        assert (expected < bound).all()
        assert (bound < expected * (1 + 2.0**-28)).all()
