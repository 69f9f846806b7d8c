from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_linear import rational
from refusal import refused

from loracle.reference import (
    AdamWOptions,
    ConfigError,
    DTypeError,
    ShapeError,
    adamw_start,
    adamw_step,
    adapter_step,
    linear_backward,
    linear_forward,
    squared_error_gradient,
    train_linear,
    training_start,
)
from loracle.reference.formats import FORMATS

BF16 = np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [form.dtype for form in FORMATS]


SIGNS = AdamWOptions(0.25, (0.0, 0.0), 2.0**-60, 1.0)
"""Every entry moves by the learning rate against its gradient's sign, after a decay of 1 - lr."""


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_two_training_steps_worked_out_by_hand(dtype):
    """x = (1, 2), W0 = (1, 0), A = (1, 1), B = 0, scaling 2, target 3; B learns twice as fast as A.

    Step 1: h = 3, y = 1, dy = -2; dA = 0, dB = -12: A = 3/4, B = 0 + 1/2.
    Step 2: h = 9/4, y = 1 + 2 h / 2 = 13/4, dy = 1/4; both gradients are positive: A = 9/16 - 1/4 and
    B = 1/4 - 1/2.
    """
    x, W0 = np.array([[1, 2]], dtype), np.array([[1, 0]], dtype)
    start = training_start(np.array([[1, 1]], dtype), np.array([[0]], dtype))
    outputs = []

    def dy_of(y, k):
        outputs.append((float(y[0, 0]), k))
        return y - np.array([[3]], dtype)

    trained = train_linear(start, [x, x], dy_of, W0, 2.0, SIGNS, loraplus_ratio=2.0)
    assert outputs == [(1.0, 0), (3.25, 1)]
    assert trained.A.tolist() == [[0.3125, 0.3125]]
    assert trained.B.tolist() == [[-0.25]]
    assert trained.state_A.step == trained.state_B.step == 2
    assert trained.state_A.m.tolist() == [[0.25, 0.5]]
    assert trained.state_B.m.tolist() == [[1.125]]
    assert trained.A.dtype == trained.B.dtype == dtype


def test_no_batches_are_no_steps():
    start = training_start(np.ones((1, 2)), np.ones((3, 1)))
    assert train_linear(start, [], lambda y, k: y, np.ones((3, 2)), 1.0, SIGNS) is start
    assert start.state_A.m.shape == (1, 2)
    assert start.state_B.m.shape == (3, 1)


@pytest.mark.parametrize("ratio", [None, 1.0, 4.0])
@pytest.mark.parametrize("options", [SIGNS, AdamWOptions(0.01)], ids=["signs", "default"])
def test_training_is_forward_backward_and_a_step_for_each_matrix(options, ratio):
    rng = np.random.default_rng(3)
    W0, A, B, bias = (
        rng.normal(size=(3, 4)),
        rng.normal(size=(2, 4)),
        rng.normal(size=(3, 2)),
        rng.normal(size=3),
    )
    batches, targets = rng.normal(size=(4, 5, 4)), rng.normal(size=(4, 5, 3))
    dropouts = rng.integers(0, 2, (4, 5, 4)) * 2.0

    def dy_of(y, k):
        return squared_error_gradient(y, targets[k])

    more = {} if ratio is None else {"loraplus_ratio": ratio}
    for extra in ({}, {"bias": bias}, {"dropouts": dropouts}, {"bias": bias, "dropouts": dropouts}):
        trained = train_linear(training_start(A, B), batches, dy_of, W0, 0.7, options, **more, **extra)
        now = {"A": A, "B": B}
        states = {name: adamw_start(value) for name, value in now.items()}
        for k, x in enumerate(batches):
            dropout = extra["dropouts"][k] if "dropouts" in extra else None
            y = linear_forward(x, W0, now["A"], now["B"], 0.7, bias=extra.get("bias"), dropout=dropout)
            gradients = linear_backward(dy_of(y, k), x, W0, now["A"], now["B"], 0.7, dropout=dropout)
            for name, rate in (("A", options.lr), ("B", options.lr * (ratio or 1.0))):
                gradient = getattr(gradients, f"d{name}")
                now[name], states[name] = adamw_step(
                    now[name], gradient, states[name], replace(options, lr=rate)
                )
        for name in "AB":
            assert getattr(trained, name).tobytes() == now[name].tobytes()
            state = getattr(trained, f"state_{name}")
            assert state.step == 4
            assert state.m.tobytes() == states[name].m.tobytes()
            assert state.v.tobytes() == states[name].v.tobytes()


def test_a_training_is_immutable_and_equal_to_itself_alone():
    training = training_start(np.ones((1, 2)), np.ones((3, 1)))
    for value, field in ((training, "A"), (training.state_A, "m")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)
        assert value != replace(value)


def test_training_may_be_cut_anywhere():
    rng = np.random.default_rng(4)
    W0, A, B = rng.normal(size=(3, 4)), rng.normal(size=(2, 4)), rng.normal(size=(3, 2))
    batches = rng.normal(size=(5, 2, 4))

    def train(training, xs):
        return train_linear(training, xs, lambda y, k: y, W0, 0.7, AdamWOptions(0.01))

    whole = train(training_start(A, B), batches)
    parts = train(train(training_start(A, B), batches[:2]), batches[2:])
    for name in "AB":
        assert getattr(whole, name).tobytes() == getattr(parts, name).tobytes()


def test_a_step_of_both_matrices_takes_any_layers_gradients():
    start = training_start(np.ones((1, 2)), np.ones((3, 1)))
    after = adapter_step(start, np.array([[1.0, -1.0]]), np.full((3, 1), 2.0), SIGNS)
    assert after.A.tolist() == [[0.5, 1.0]]
    assert after.B.tolist() == [[0.5], [0.5], [0.5]]
    after = adapter_step(start, np.array([[1.0, -1.0]]), np.full((3, 1), 2.0), SIGNS, 2.0)
    assert after.A.tolist() == [[0.5, 1.0]]
    assert after.B.tolist() == [[0.0], [0.0], [0.0]]
    assert start.A.tolist() == [[1.0, 1.0]]
    with pytest.raises(ShapeError, match=r"^gradient: expected \(3, 1\) as parameter has, got \(1, 3\)"):
        adapter_step(start, np.ones((1, 2)), np.ones((1, 3)), SIGNS)


def test_the_gradient_of_the_squared_error_is_the_central_difference_quotient():
    """The loss is a parabola in each entry, for which the central quotient is exact."""
    rng = np.random.default_rng(5)
    y, target = rational(rng.integers(-4, 5, (2, 4))), rational(rng.integers(-4, 5, (2, 4)))

    def loss(values):
        return ((values - target) ** 2).sum() / 8

    gradient = squared_error_gradient(y, target)
    for index in np.ndindex(y.shape):
        step = np.zeros_like(y)
        step[index] = Fraction(1, 3)
        assert gradient[index] == (loss(y + step) - loss(y - step)) / Fraction(2, 3)
    for dtype in DTYPES:
        computed = squared_error_gradient(y.astype(float).astype(dtype), target.astype(float).astype(dtype))
        assert computed.dtype == dtype
        assert computed.tolist() == gradient.tolist()


def test_wrong_arguments_of_training_are_refused():
    refused(
        lambda: squared_error_gradient(np.ones((2, 3)), np.ones(3)),
        ShapeError,
        "target: expected (2, 3) as y has, got (3,); check its axes",
    )
    refused(
        lambda: squared_error_gradient(np.ones(3), np.ones(3, F32)),
        DTypeError,
        "target: expected float64 as y has, got float32; convert it",
    )
    start = training_start(np.ones((1, 2)), np.ones((3, 1)))
    batches = np.ones((2, 4, 2))
    for dropouts in (batches[:1], np.ones((3, 4, 2))):
        refused(
            lambda d=dropouts: train_linear(
                start, batches, lambda y, k: y, np.ones((3, 2)), 1.0, SIGNS, dropouts=d
            ),
            ConfigError,
            f"dropouts: expected one for each of the 2 batches, got {len(dropouts)}; give all",
        )
    with pytest.raises(ConfigError, match=r"^ratio: expected a finite number of at least 0, got -1"):
        adapter_step(start, start.A, start.B, SIGNS, -1.0)
