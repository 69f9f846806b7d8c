"""The autograd function against the reference: exact on small integers, within the bound elsewhere."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import LoraProblem, exact_problems, lora_problems
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_fixtures import same_bits
from torch_modes import (
    MODES,
    Mode,
    arithmetic,
    assert_bounded,
    assert_equal,
    autocast,
    cases,
    exactly,
    finite,
    placed,
)

from loracle.reference import (
    ConfigError,
    DTypeError,
    LinearGradients,
    ShapeError,
    TargetError,
    linear_backward,
    linear_backward_bound,
    linear_forward,
    linear_forward_bound,
)
from loracle.torch_impl import lora_linear
from loracle.torch_impl.arrays import array_of
from loracle.torch_impl.function_rules import compute_dtype


@dataclass(frozen=True)
class Layer:
    """A problem's tensors on the way through torch."""

    x: Tensor
    W0: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    multiplier: Tensor | None
    dy: Tensor


def layer_of(problem: LoraProblem, mode: Mode, *, bias: bool, dropout: bool, device: str = "cpu") -> Layer:
    def tensor(array: Any, dtype: Any) -> Tensor:
        return placed(array, dtype, device)

    return Layer(
        x=tensor(problem.x, mode.base).requires_grad_(),
        W0=tensor(problem.W0, mode.base),
        bias=tensor(problem.bias, mode.base) if bias else None,
        A=tensor(problem.A, mode.adapter).requires_grad_(),
        B=tensor(problem.B, mode.adapter).requires_grad_(),
        multiplier=tensor(problem.dropout, mode.base) if dropout else None,
        dy=tensor(problem.dy, mode.computes),
    )


def run(layer: Layer, scaling: float, mode: Mode) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y, and the gradients of x, A and B; the backward pass runs outside autocast, as a trainer's does."""
    device = layer.x.device.type
    with arithmetic(device, mode):
        with autocast(device, mode):
            y = lora_linear(layer.x, layer.W0, layer.bias, layer.A, layer.B, scaling, layer.multiplier)
        return y.detach(), torch.autograd.grad(y, (layer.x, layer.A, layer.B), layer.dy)


def check_dtypes(layer: Layer, y: Tensor, gradients: tuple[Tensor, ...], mode: Mode) -> None:
    assert array_of(y).dtype == mode.computes
    for tensor, gradient in zip((layer.x, layer.A, layer.B), gradients, strict=True):
        assert gradient.dtype is tensor.dtype
        assert gradient.shape == tensor.shape


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=40)
@given(data=st.data(), bias=st.booleans(), dropout=st.booleans())
def test_small_integers_come_out_exactly(
    device: str, mode: Mode, data: st.DataObject, bias: bool, dropout: bool
) -> None:
    problem = data.draw(exact_problems(mode.computes)).astype(np.float64)
    layer = layer_of(problem, mode, bias=bias, dropout=dropout, device=device)
    y, gradients = run(layer, problem.scaling, mode)
    check_dtypes(layer, y, gradients, mode)
    weights = (problem.W0, problem.A, problem.B, problem.scaling)
    mask = problem.dropout if dropout else None
    expected = linear_forward(problem.x, *weights, bias=problem.bias if bias else None, dropout=mask)
    exact = linear_backward(problem.dy, problem.x, *weights, dropout=mask)
    for got, wanted in zip((y, *gradients), (expected, exact.dx, exact.dA, exact.dB), strict=True):
        assert_equal(got, wanted)


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=25)
@given(data=st.data(), bias=st.booleans(), dropout=st.booleans())
def test_everything_else_stays_within_the_bound(
    device: str, mode: Mode, data: st.DataObject, bias: bool, dropout: bool
) -> None:
    problem = data.draw(lora_problems(most=8))
    layer = layer_of(problem, mode, bias=bias, dropout=dropout, device=device)
    y, gradients = run(layer, problem.scaling, mode)
    check_dtypes(layer, y, gradients, mode)
    assume(finite(y, *gradients))
    x, W0, A, B, dy = (exactly(t) for t in (layer.x, layer.W0, layer.A, layer.B, layer.dy))
    added = None if layer.bias is None else exactly(layer.bias)
    mask = None if layer.multiplier is None else exactly(layer.multiplier)
    weights = (W0, A, B, problem.scaling)
    exact_y = linear_forward(x, *weights, bias=added, dropout=mask)
    exact = linear_backward(dy, x, *weights, dropout=mask)
    floats = [None if a is None else a.astype(np.float64) for a in (x, W0, A, B, dy, added, mask)]
    fx, fW0, fA, fB, fdy, fadded, fmask = floats
    factors = (fW0, fA, fB, problem.scaling, mode.precision)
    allowed_y = linear_forward_bound(fx, *factors, bias=fadded, dropout=fmask)
    allowed: LinearGradients = linear_backward_bound(fdy, fx, *factors, dropout=fmask)
    assert_bounded(y, exact_y, allowed_y, mode)
    assert_bounded(gradients[0], exact.dx, allowed.dx, mode)
    assert_bounded(gradients[1], exact.dA, allowed.dA, mode)
    assert_bounded(gradients[2], exact.dB, allowed.dB, mode)


def normal_layer(shape: tuple[int, ...] = (5, 3), dtype: torch.dtype = torch.float32) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return Layer(
        x=normal(*shape).requires_grad_(),
        W0=normal(4, 3),
        bias=normal(4),
        A=normal(2, 3).requires_grad_(),
        B=normal(4, 2).requires_grad_(),
        multiplier=None,
        dy=normal(*shape[:-1], 4),
    )


def test_autocast_computes_what_casting_by_hand_does() -> None:
    layer = normal_layer()
    y, gradients = run(layer, 0.7, MODES["autocast"])
    low = Layer(
        x=layer.x.detach().bfloat16().requires_grad_(),
        W0=layer.W0.bfloat16(),
        bias=layer.bias.bfloat16() if layer.bias is not None else None,
        A=layer.A,
        B=layer.B,
        multiplier=None,
        dy=layer.dy.bfloat16(),
    )
    by_hand, their_gradients = run(low, 0.7, MODES["bfloat16"])
    assert same_bits(y, by_hand)
    assert same_bits(gradients[0].bfloat16(), their_gradients[0])
    assert all(same_bits(a, b) for a, b in zip(gradients[1:], their_gradients[1:], strict=True))


def test_backward_ignores_an_autocast_that_forward_did_not_see() -> None:
    layer = normal_layer()
    _, expected = run(layer, 0.7, MODES["float32"])
    y = lora_linear(layer.x, layer.W0, layer.bias, layer.A, layer.B, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(y, (layer.x, layer.A, layer.B), layer.dy)
    assert all(same_bits(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3), (1, 3), (2, 1, 2, 3)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = normal_layer(shape)
    y, gradients = run(layer, 0.7, MODES["float32"])
    assert y.shape == (*shape[:-1], 4)
    assert [g.shape for g in gradients] == [layer.x.shape, layer.A.shape, layer.B.shape]
    arrays = [array_of(t) for t in (layer.x, layer.W0, layer.A, layer.B)]
    wide = [a.astype(np.float64) for a in arrays]
    bias = array_of(layer.bias) if layer.bias is not None else None
    error = np.abs(array_of(y) - linear_forward(*wide, 0.7, bias=bias.astype(np.float64)))  # type: ignore[union-attr]
    assert (error <= linear_forward_bound(*wide, 0.7, np.float32, bias=bias)).all()
    if 0 in shape:
        assert not gradients[1].any()
        assert not gradients[2].any()


def test_layouts_do_not_matter() -> None:
    layer = normal_layer((6, 3))
    y, gradients = run(layer, 0.7, MODES["float32"])
    strided = layer.x.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    again = lora_linear(strided, layer.W0.t().contiguous().t(), layer.bias, layer.A, layer.B, 0.7)
    dy = layer.dy.t().contiguous().t()
    others = torch.autograd.grad(again, (strided, layer.A, layer.B), dy)
    arrays = [array_of(t).astype(np.float64) for t in (layer.x, layer.W0, layer.A, layer.B)]
    bias = array_of(layer.bias).astype(np.float64)  # type: ignore[arg-type]
    bound = 2 * linear_forward_bound(*arrays, 0.7, np.float32, bias=bias)
    assert (np.abs(array_of(y) - array_of(again)) <= bound).all()
    bounds = linear_backward_bound(array_of(layer.dy).astype(np.float64), *arrays, 0.7, np.float32)
    for a, b, limit in zip(gradients, others, (bounds.dx, bounds.dA, bounds.dB), strict=True):
        assert (np.abs(array_of(a) - array_of(b)) <= 2 * limit).all()


@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("A", "B"), ("x", "B")])
def test_only_the_gradients_asked_for_are_computed_and_only_their_operands_kept(
    wanted: tuple[str, ...],
) -> None:
    layer = normal_layer()
    _, everything = run(layer, 0.7, MODES["float32"])
    expected = dict(zip(("x", "A", "B"), everything, strict=True))
    inputs = {name: getattr(layer, name).detach().requires_grad_(name in wanted) for name in ("x", "A", "B")}
    y = lora_linear(inputs["x"], layer.W0, layer.bias, inputs["A"], inputs["B"], 0.7)
    kept = [tensor is not None for tensor in y.grad_fn.saved_tensors]  # type: ignore[union-attr]
    needs = {"x": "x" in wanted, "A": "A" in wanted, "B": "B" in wanted}
    # x, W0, multiplier, A, xA, B
    assert kept == [needs["A"], needs["x"], False, needs["x"], needs["B"], needs["x"] or needs["A"]]
    y.backward(layer.dy)
    for name, tensor in inputs.items():
        if name in wanted:
            assert same_bits(tensor.grad, expected[name])
        else:
            assert tensor.grad is None


def test_without_gradients_there_is_no_graph() -> None:
    layer = normal_layer()
    with torch.no_grad():
        assert lora_linear(layer.x, layer.W0, layer.bias, layer.A, layer.B, 0.7).grad_fn is None
    with torch.inference_mode():
        lora_linear(layer.x, layer.W0, layer.bias, layer.A, layer.B, 0.7)


def test_the_result_may_be_modified_in_place() -> None:
    layer = normal_layer()
    y = lora_linear(layer.x, layer.W0, layer.bias, layer.A, layer.B, 0.7)
    y.mul_(2)
    doubled = torch.autograd.grad(y, layer.A, layer.dy)[0]
    assert same_bits(doubled, 2 * run(layer, 0.7, MODES["float32"])[1][1])


def test_neither_x_nor_any_weight_is_modified() -> None:
    layer = normal_layer()
    names = ("x", "W0", "bias", "A", "B", "dy")
    before = {name: getattr(layer, name).detach().clone() for name in names}
    run(layer, 0.7, MODES["float32"])
    run(layer, 0.7, MODES["autocast"])
    assert all(same_bits(getattr(layer, name), before[name]) for name in names)


def test_differentiating_twice_is_refused() -> None:
    layer = normal_layer()
    y = lora_linear(layer.x, layer.W0, layer.bias, layer.A, layer.B, 0.7)
    with pytest.raises(ConfigError, match=r"create_graph: expected False, got True; .* once only"):
        torch.autograd.grad(y, layer.A, layer.dy.requires_grad_(), create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_dropout(reentrant: bool) -> None:
    layer = normal_layer()

    def block(x: Tensor) -> Tensor:
        return lora_linear(
            x, layer.W0, layer.bias, layer.A, layer.B, 0.7, nn.functional.dropout(torch.ones_like(x))
        )

    results = []
    for wrapped in (False, True):
        for tensor in (layer.x, layer.A, layer.B):
            tensor.grad = None
        torch.manual_seed(3)
        y = checkpoint(block, layer.x, use_reentrant=reentrant) if wrapped else block(layer.x)
        y.backward(layer.dy)
        results.append((y, layer.x.grad, layer.A.grad, layer.B.grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


SHAPES: dict[str, tuple[dict[str, Tensor], str]] = {
    "x": ({"x": torch.ones(5, 2)}, r"x: expected shape \(5, 3\) .* got \(5, 2\)"),
    "scalar": ({"x": torch.ones(())}, "x: expected shape"),
    "bias": ({"bias": torch.ones(3)}, r"bias: expected shape \(4,\)"),
    "A": ({"A": torch.ones(2, 4)}, r"lora_A: expected shape \(2, 3\)"),
    "B": ({"B": torch.ones(4, 3)}, r"lora_B: expected shape \(4, 2\)"),
    "multiplier": ({"multiplier": torch.ones(3)}, r"multiplier: expected shape \(5, 3\)"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shapes_are_named(name: str) -> None:
    wrong, message = SHAPES[name]
    layer = normal_layer()
    operands: dict[str, Any] = {n: getattr(layer, n) for n in ("x", "W0", "bias", "A", "B", "multiplier")}
    with pytest.raises(ShapeError, match=message):
        lora_linear(scaling=1.0, **{**operands, **wrong})


def test_wrong_dtypes_and_unfrozen_weights_are_refused() -> None:
    layer = normal_layer()
    with pytest.raises(DTypeError, match=r"x: expected W0's torch\.float32, got torch\.bfloat16"):
        lora_linear(layer.x.bfloat16(), layer.W0, layer.bias, layer.A, layer.B, 1.0)
    trained = layer.W0.clone().requires_grad_()
    with pytest.raises(TargetError, match="W0: expected a frozen weight"):
        lora_linear(layer.x, trained, layer.bias, layer.A, layer.B, 1.0)


def test_compute_dtype() -> None:
    single, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert compute_dtype(single) is torch.float32
    with torch.autocast("cpu", dtype=torch.float16):
        assert compute_dtype(single) is torch.float16
        assert compute_dtype(double) is torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert compute_dtype(single) is torch.float32


def test_a_bias_that_trains_gets_its_gradient() -> None:
    layer = normal_layer((5, 3))
    bias = layer.bias.clone().requires_grad_()  # type: ignore[union-attr]
    y = lora_linear(layer.x, layer.W0, bias, layer.A, layer.B, 0.7)
    y.backward(layer.dy)
    assert same_bits(bias.grad, layer.dy.sum(0))
    assert layer.x.grad is not None
