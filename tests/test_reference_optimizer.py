import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from exact_linear import rational
from exact_optimizer import exact_step
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from loracle.reference import (
    AdamWOptions,
    AdamWState,
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    adamw_start,
    adamw_step,
    adamw_step_bound,
    clip_by_global_norm,
    loraplus_rates,
)
from loracle.reference.formats import FORMATS

F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@BY_DTYPE
def test_a_step_worked_out_by_hand(dtype):
    """b = (1/2, 3/4), lr = 1/2, wd = 1/2, eps = 4, first step: 1 - b1 = 1/2, the root of 1 - b2 is 1/2.

    First entry: m = 3/2 + 1/2 = 2, v = 15/4 + 1/4 = 4; 2 over (2 / (1/2) + 4) is 1/4, times lr / (1/2) = 1.
    """
    p, g, m, v = ([2, 8, -8], [1, 9, -9], [3, -1, 1], [5, 21, 21])
    state = AdamWState(0, np.array(m, dtype), np.array(v, dtype))
    options = AdamWOptions(0.5, (0.5, 0.75), 4.0, 0.5)
    moved, after = adamw_step(np.array(p, dtype), np.array(g, dtype), state, options)
    assert moved.tolist() == [1.25, 5.75, -5.75]
    assert after.m.tolist() == [2, 4, -4]
    assert after.v.tolist() == [4, 36, 36]
    assert after.step == 1
    assert moved.dtype == after.m.dtype == after.v.dtype == dtype


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_three_steps_worked_out_by_hand(dtype):
    """b = (1/2, 0), eps = 1, lr = 21/64, no decay: rates 21/32, 7/16, 3/8; the denominator is |g| + 1."""
    options = AdamWOptions(21 / 64, (0.5, 0.0), 1.0, 0.0)
    p = np.array([1.0], dtype)
    state = adamw_start(p)
    means, places = [], []
    for g in (3.0, -1.0, 7.0):
        p, state = adamw_step(p, np.array([g], dtype), state, options)
        means.append(float(state.m[0]))
        places.append(float(p[0]))
        assert state.v.tolist() == [g * g]
    assert means == [1.5, 0.25, 3.625]
    first = 1 - 21 / 32 * 1.5 / 4
    second = first - 7 / 16 * 0.25 / 2
    assert places == [first, second, second - 3 / 8 * 3.625 / 8]
    assert state.step == 3


# Gradients g and v with 3 v / 4 + g^2 / 4 = s^2 and 2 s + 4 a power of two: every operation is exact.
PERFECT = [(0, 0), (1, 5), (2, 4), (4, 0), (3, 45), (6, 36), (9, 21), (12, 0)]


@BY_DTYPE
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(3,), (2, 3), (1, 2, 2)]), st.sampled_from([0.0, 0.5, 1.0])
)
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(dtype, seed, shape, decay):
    rng = np.random.default_rng(seed)
    chosen = np.array(PERFECT)[rng.integers(0, len(PERFECT), shape)]
    g = chosen[..., 0] * rng.choice([-1, 1], shape)
    m = g + 2 * rng.integers(-2, 3, shape)
    p = 2 * rng.integers(-4, 5, shape)
    p, g, m, v = (a.astype(dtype) for a in (p, g, m, chosen[..., 1]))
    state, options = AdamWState(0, m, v), AdamWOptions(0.5, (0.5, 0.75), 4.0, decay)
    moved, after = adamw_step(p, g, state, options)
    exact = exact_step(p, g, state, options)
    for computed, expected in zip((moved, after.m, after.v), exact, strict=True):
        assert computed.dtype == dtype
        assert computed.shape == shape
        assert rational(computed).tolist() == expected.tolist()


def test_the_first_step_goes_against_the_gradient_by_the_learning_rate():
    """m / (1 - b1) = g and v / (1 - b2) = g^2: lr g / (|g| + eps), whatever the betas."""
    g = np.array([3.0, -1e-3, 0.0, 1e-8])
    moved, _ = adamw_step(np.zeros(4), g, adamw_start(g), AdamWOptions(0.1))
    expected = -0.1 * g / (np.abs(g) + 1e-8)
    assert np.abs(moved - expected).max() <= 0.1 * 2.0**-40
    assert moved[2] == 0


def test_the_state_starts_at_zero_and_nothing_is_changed_in_place():
    p = np.arange(6.0).reshape(2, 3).astype(F32)
    state = adamw_start(p)
    assert state.step == 0
    for array in (state.m, state.v):
        assert array.dtype == F32
        assert array.shape == (2, 3)
        assert not array.any()
    for array in (p, state.m, state.v):
        array.setflags(write=False)
    g = p - 3
    g.setflags(write=False)
    moved, after = adamw_step(p, g, state, AdamWOptions(0.1))
    assert after.step == 1
    assert state.step == 0
    assert not np.shares_memory(moved, p)


def test_the_options_are_torchs_by_default_and_frozen():
    options = AdamWOptions(0.001)
    assert (options.betas, options.eps, options.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    with pytest.raises(FrozenInstanceError):
        options.lr = 1.0
    with pytest.raises(FrozenInstanceError):
        loraplus_rates(0.1, 1.0).A = 1.0


def test_wrong_options_are_refused():
    for name in ("lr", "eps", "weight_decay"):
        for value in (-0.5, math.inf, math.nan):
            message = f"{name}: expected a finite number of at least 0, got {value}; correct it"
            refused(lambda n=name, v=value: AdamWOptions(**{"lr": 0.1} | {n: v}), ConfigError, message)
    for betas in ((-0.1, 0.5), (0.5, 1.0), (1.0, 0.5), (0.5, math.nan)):
        message = f"betas: expected two numbers of at least 0 and below 1, got {betas}; correct them"
        refused(lambda b=betas: AdamWOptions(0.1, b), ConfigError, message)
    AdamWOptions(0.0, (0.0, 0.0), 0.0, 0.0)


GOOD = {"parameter": np.ones((2, 3)), "gradient": np.ones((2, 3)), "m": np.ones((2, 3)), "v": np.ones((2, 3))}


@pytest.mark.parametrize(
    "function", [adamw_step, lambda *a: adamw_step_bound(*a, F64)], ids=["step", "bound"]
)
def test_wrong_tensors_are_refused(function):
    def call(step=1, **changed):
        a = GOOD | changed
        return lambda: function(
            a["parameter"], a["gradient"], AdamWState(step, a["m"], a["v"]), AdamWOptions(0.1)
        )

    call()()
    for name in ("gradient", "m", "v"):
        refused(
            call(**{name: np.ones((3, 2))}),
            ShapeError,
            f"{name}: expected (2, 3) as parameter has, got (3, 2)",
        )
        refused(
            call(**{name: np.ones((2, 3), F32)}),
            DTypeError,
            f"{name}: expected float64 as parameter has, got float32; convert it",
        )
    for dtype in (int, object):
        with pytest.raises(DTypeError, match=r"^parameter: expected one of float16, .* in native byte order"):
            call(**{name: value.astype(dtype) for name, value in GOOD.items()})()
    for name in GOOD:
        for value in (math.nan, math.inf, -math.inf):
            wrong = np.ones((2, 3))
            wrong[1, 2] = value
            message = f"{name}: expected finite numbers, got {value} at [1, 2]; correct what it came from"
            refused(call(**{name: wrong}), NonFiniteError, message)
    for step in (-1, True, 1.0, None):
        message = f"step: expected an integer of at least 0, got {step!r}; use adamw_start"
        refused(call(step=step), ConfigError, message)
    call(step=np.int64(0))()
    negative = -GOOD["v"]
    message = "v: expected no number below 0, for it averages squares; are m and v exchanged?"
    refused(call(v=negative), ConfigError, message)


def test_a_result_that_is_not_finite_is_refused():
    """float16 cannot hold eps = 1e-8, nor the square of 1000 over 1,000 twice over."""
    remedy = "raise eps, or keep the parameter in a wider dtype"
    zero = np.zeros(2, F16)
    refused(
        lambda: adamw_step(zero, zero, adamw_start(zero), AdamWOptions(0.1)),
        NonFiniteError,
        f"parameter after the step: expected finite numbers, got nan at [0]; {remedy}",
    )
    large = np.array([1.0, 60000.0], F16)
    refused(
        lambda: adamw_step(large, large, adamw_start(large), AdamWOptions(0.1)),
        NonFiniteError,
        f"v after the step: expected finite numbers, got inf at [1]; {remedy}",
    )


def test_the_rates_of_loraplus():
    rates = loraplus_rates(2e-4, 16.0)
    assert (rates.A, rates.B, rates.embedding) == (2e-4, 2e-4 * 16, 1e-6)
    assert loraplus_rates(0.5, 1.0, 0.25).embedding == 0.25
    assert loraplus_rates(0.0, 0.0, 0.0).B == 0
    for name in ("lr", "ratio", "embedding"):
        for value in (-1.0, math.inf, math.nan):
            arguments = {"lr": 0.1, "ratio": 2.0, "embedding": 0.1} | {name: value}
            message = f"{name}: expected a finite number of at least 0, got {value}; correct it"
            refused(lambda a=arguments: loraplus_rates(**a), ConfigError, message)


@BY_DTYPE
def test_clipping_worked_out_by_hand(dtype):
    """Norms 5 and 12 make 13; 13 / 2 is half of it but for the 1e-6, which float64 alone can see."""
    gradients = [np.array([3, -4], dtype), np.array([[12], [0]], dtype)]
    clipped, norm = clip_by_global_norm(gradients, 6.5)
    assert norm == 13
    factor = dtype.type(6.5 / (13 + 1e-6))
    assert [c.tolist() for c in clipped] == [(g * factor).tolist() for g in gradients]
    assert [c.dtype for c in clipped] == [dtype, dtype]
    assert [c.shape for c in clipped] == [(2,), (2, 1)]
    assert (float(factor) < 0.5) == (dtype in (F32, F64))
    for most in (14.0, math.inf):
        same, norm = clip_by_global_norm(gradients, most)
        assert norm == 13
        assert [c.tolist() for c in same] == [g.tolist() for g in gradients]
    assert clip_by_global_norm([np.full(4, 512, np.float16)], 1.0)[1] == 1024  # 512^2 is beyond float16
    zero, _ = clip_by_global_norm(gradients, 0.0)
    assert not any(c.any() for c in zero)


def test_clipping_nothing_and_zeros():
    assert clip_by_global_norm([], 1.0) == ((), 0.0)
    clipped, norm = clip_by_global_norm([np.zeros(3)], 1.0)
    assert norm == 0
    assert clipped[0].tolist() == [0, 0, 0]
    clipped, _ = clip_by_global_norm([np.array([1.0])], 1.0)
    assert clipped[0][0] == 1 / (1 + 1e-6)


def test_wrong_arguments_of_clipping_are_refused():
    good = np.ones(2)
    for value in (-1.0, math.nan):
        message = f"max_norm: expected a number of at least 0, got {value}; correct it"
        refused(lambda v=value: clip_by_global_norm([good], v), ConfigError, message)
    with pytest.raises(DTypeError, match=r"^gradient 1: expected one of float16"):
        clip_by_global_norm([good, good.astype(int)], 1.0)
    refused(
        lambda: clip_by_global_norm([good, np.array([[1.0, math.nan]])], 1.0),
        NonFiniteError,
        "gradient 1: expected finite numbers, got nan at [0, 1]; skip this step",
    )
    refused(
        lambda: clip_by_global_norm([good * 1e200], 1.0),
        NonFiniteError,
        "norm: expected a finite sum of squares, got an overflow; scale the gradients down",
    )
