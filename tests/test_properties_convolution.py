"""LoRA on convolutions: the reference against torch's convolutions and autograd, and against PEFT's layers.

Exact tier: small integers, where all must agree bit for bit. Derived tier: gaussians, where each stays within
the a-priori bound around the reference in float64.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from convolution_cases import (
    NUMPYS_MODES,
    ConvolutionProblem,
    backward,
    backward_bound,
    convolve,
    delta,
    exact_convolutions,
    forward,
    forward_bound,
    gaussian_convolutions,
    named,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from loracle.reference import ConfigError, Convolution, LowRank, ShapeError, convolution_forward
from loracle.reference.windows import spatial_axes

# torch pads the far end by a copy where "same" padding is odd, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CLASSES = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}


def torch_layer(p, *, bias=True):
    """torch's own convolution of the problem's geometry and base weight."""
    g, axes = p.geometry, p.x.ndim - 2
    layer = CLASSES[axes](
        p.x.shape[1],
        len(p.W0),
        p.W0.shape[2:],
        g.stride,
        g.padding,
        g.dilation,
        g.groups,
        bias,
        g.padding_mode,
        dtype=torch.from_numpy(p.W0).dtype,
    )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(p.W0))
        if bias:
            layer.bias.copy_(torch.from_numpy(p.bias))
    layer.weight.requires_grad_(False)
    return layer


def torch_run(p):
    """y and the gradients by autograd, with delta formed: merged where there is no dropout."""
    layer = torch_layer(p)
    tensors = {"dx": torch.from_numpy(p.x.copy()), "dbias": layer.bias.data}
    for n, own in enumerate(p.adapters):
        for name in ("A", "B", "bias"):
            if (array := getattr(own, name)) is not None:
                tensors[f"d{name}{n}"] = torch.from_numpy(array.copy())
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    x, weight, bias = tensors["dx"], layer.weight, tensors["dbias"]
    dropped = []
    for n, own in enumerate(p.adapters):
        A, B = tensors[f"dA{n}"], tensors[f"dB{n}"]
        update = own.scaling * (B.reshape(len(B), len(A)) @ A.reshape(len(A), -1)).reshape(weight.shape)
        if own.bias is not None:
            bias = bias + own.scaling * tensors[f"dbias{n}"]
        if own.dropout is None:
            weight = weight + update
        else:
            dropped.append((x * torch.from_numpy(own.dropout), update))
    y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    for inputs, update in dropped:
        nothing = torch.zeros_like(bias)
        y = y + torch.func.functional_call(layer, {"weight": update, "bias": nothing}, (inputs,))
    y.backward(torch.from_numpy(p.dy.copy()))
    return y.detach().numpy(), {name: tensor.grad.numpy() for name, tensor in tensors.items()}


def same(left, right):
    """Equal numbers, dtypes and shapes; +0 and -0 are one number (a sum's order decides its zero)."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.array_equal(left, right)


def within(computed, exact, *bounds):
    assert computed.dtype == F32
    assert np.all(np.abs(computed.astype(F64) - exact) <= sum(bounds))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@settings(max_examples=60)
@given(data=st.data())
def test_exact_tier_forward_and_backward_agree_bit_for_bit(dtype, data):
    p = data.draw(exact_convolutions(dtype))
    y, gradients = torch_run(p)
    same(forward(p), y)
    own = named(backward(p))
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        same(own[name], gradient)


@settings(max_examples=60)
@given(gaussian_convolutions(F32))
def test_derived_tier_forward_and_backward_stay_within_the_bounds(p):
    """Float64 stands for the exact value, with its own bound added."""
    wide = p.astype(F64)
    y, gradients = torch_run(p)
    exact, bounds = forward(wide), [forward_bound(p, dtype) for dtype in (F32, F64)]
    for computed in (y, forward(p)):
        within(computed, exact, *bounds)
    exact, bounds = named(backward(wide)), [named(backward_bound(p, dtype)) for dtype in (F32, F64)]
    for computed in (gradients, named(backward(p))):
        assert computed.keys() == exact.keys()
        for name, gradient in computed.items():
            within(gradient, exact[name], *(bound[name] for bound in bounds))


def test_many_channels_and_windows_stay_within_the_bounds():
    """Sums that oneDNN splits among blocks and threads, in forward and backward."""
    rng = np.random.default_rng(0)

    def numbers(*shape):
        return rng.normal(0, 1, shape)

    own = LowRank(
        numbers(8, 16, 3, 3), numbers(32, 8), 0.5, numbers(32), rng.integers(0, 2, (2, 32, 9, 7)) * 2.0
    )
    geometry = Convolution((2, 1), (2, 1), "circular", (1, 2), 2)
    p = ConvolutionProblem(
        numbers(2, 32, 9, 7), numbers(2, 32, 6, 5), numbers(32, 16, 3, 3), numbers(32), (own,), geometry
    ).astype(F32)
    y, gradients = torch_run(p)
    wide = p.astype(F64)
    within(y, forward(wide), forward_bound(p, F32), forward_bound(p, F64))
    exact, bounds = named(backward(wide)), [named(backward_bound(p, dtype)) for dtype in (F32, F64)]
    for name, gradient in gradients.items():
        within(gradient, exact[name], *(bound[name] for bound in bounds))


@settings(max_examples=200)
@given(data=st.data())
def test_the_reference_refuses_the_geometries_that_torch_refuses(data):
    count = data.draw(st.integers(1, 3))

    def numbers(least, most):
        return tuple(data.draw(st.integers(least, most)) for _ in range(count))

    padding = data.draw(st.sampled_from(["same", "valid", *[numbers(0, 3)] * 3]))
    stride = (1,) * count if padding == "same" else numbers(1, 3)
    mode = data.draw(st.sampled_from(list(NUMPYS_MODES)))
    spatial, kernel, dilation = numbers(0, 4), numbers(1, 4), numbers(1, 2)
    layer = CLASSES[count](1, 1, kernel, stride, padding, dilation, 1, False, mode, dtype=torch.float64)
    x = np.ones((1, 1, *spatial))
    geometry = Convolution(stride, padding, mode, dilation)
    W0 = layer.weight.detach().numpy()
    try:
        shape = layer(torch.from_numpy(x)).shape
    except RuntimeError:
        with pytest.raises(ShapeError, match=r"^x: expected at least \d+ on spatial axis"):
            convolution_forward(x, W0, (), geometry=geometry)
        return
    assert convolution_forward(x, W0, (), geometry=geometry).shape == shape
    assert tuple(axis.windows for axis in spatial_axes(spatial, kernel, geometry)) == shape[2:]


@pytest.mark.parametrize(
    "fields",
    [{"padding": "same", "stride": 2}, {"padding": "full"}, {"padding_mode": "wrap"}, {"groups": 0}],
    ids=str,
)
def test_torch_refuses_the_arguments_that_the_reference_refuses(fields):
    with pytest.raises(ConfigError, match=r"^(padding|padding_mode|groups): "):
        Convolution(**fields)
    with pytest.raises(ValueError, match=r"padding|groups"):
        torch.nn.Conv1d(2, 2, 1, **fields)


def peft_layer(p):
    """The problem's base under PEFT's layer, with its first adapter."""
    own = p.adapters[0]
    r = len(own.A)
    config = LoraConfig(r=r, lora_alpha=own.scaling * r, target_modules=["0"], lora_bias=own.bias is not None)
    model = inject_adapter_in_model(config, torch.nn.Sequential(torch_layer(p)))
    layer = model[0]
    ones = (1,) * (p.x.ndim - 2)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.from_numpy(own.A))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(own.B.reshape(len(own.B), r, *ones)))
        if own.bias is not None:
            layer.lora_B["default"].bias.copy_(torch.from_numpy(own.bias))
    return layer


def peft_problem(p):
    """What PEFT gets right: one group, no dilation, zeros, one adapter (and no dropout of its own mask)."""
    geometry = replace(p.geometry, groups=1, dilation=1, padding_mode="zeros")
    W0, inputs = p.W0, p.W0.shape[1]
    own = replace(p.adapters[0], dropout=None)
    x = p.x[:, :inputs]
    y = convolve(np.zeros(x.shape, object), np.zeros(W0.shape, object), geometry)
    rng = np.random.default_rng(0)
    dy = rng.integers(-3, 4, y.shape).astype(W0.dtype)
    return replace(p, x=x, dy=dy, adapters=(own,), geometry=geometry)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_peft_agrees_bit_for_bit_where_it_is_right(dtype, data):
    p = peft_problem(data.draw(exact_convolutions(dtype)))
    layer = peft_layer(p)
    x = torch.from_numpy(p.x.copy()).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(p.dy))
    same(forward(p), y.detach().numpy())
    gradients, own = backward(p), p.adapters[0]
    same(gradients.dx, x.grad.numpy())
    same(gradients.adapters[0].dA, layer.lora_A["default"].weight.grad.numpy())
    dB = layer.lora_B["default"].weight.grad.numpy()
    same(gradients.adapters[0].dB, dB.reshape(own.B.shape))
    # Its product for a 1 x 1 kernel takes any kernel that begins so for one of two axes.
    if p.W0.shape[2:4] != (1, 1) or p.W0.ndim == 4:
        same(delta(own, p.W0.shape), layer.get_delta_weight("default").detach().numpy())
    if own.bias is not None:
        same(gradients.adapters[0].dbias, layer.lora_B["default"].bias.grad.numpy())


@pytest.mark.parametrize(
    "geometry",
    [Convolution(dilation=2), Convolution(padding=1, padding_mode="circular")],
    ids=["dilation", "padding mode"],
)
def test_the_reference_is_what_peft_merges_where_its_unmerged_layer_is_another(geometry):
    """PEFT's A leaves out dilation, which changes its output's size, and padding mode; its delta is right."""
    rng = np.random.default_rng(0)
    own = LowRank(rng.normal(size=(2, 2, 3)), rng.normal(size=(3, 2)), 1.0)
    x, W0, bias = rng.normal(size=(1, 2, 9)), rng.normal(size=(3, 2, 3)), rng.normal(size=3)
    y = convolution_forward(x, W0, [own], bias=bias, geometry=geometry)
    p = ConvolutionProblem(x, np.zeros_like(y), W0, bias, (own,), geometry)
    layer, bound = peft_layer(p), 2 * forward_bound(p, F64)
    with torch.no_grad():
        if geometry.dilation == 1:
            assert (np.abs(layer(torch.from_numpy(x)).numpy() - y) > bound).any()
        else:
            with pytest.raises(RuntimeError, match=r"size of tensor"):
                layer(torch.from_numpy(x))
        layer.merge()
        assert (np.abs(layer(torch.from_numpy(x)).numpy() - y) <= bound).all()


def test_peft_trains_an_adapter_of_a_grouped_weight_that_cannot_be_merged():
    base = torch.nn.Conv1d(4, 6, 3, groups=2)
    with pytest.warns(UserWarning, match=r"groups > 1\. Merging is not supported"):
        layer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(base))[0]
    A, B = (layer.get_submodule(f"lora_{n}.default").weight.detach().numpy() for n in "AB")
    x, W0 = np.ones((1, 4, 5), F32), base.weight.detach().numpy()
    with pytest.raises(
        ShapeError, match=r"^A: expected \(r, 2, 3\) .*, got \(2, 4, 3\); .* as PEFT trains it"
    ):
        convolution_forward(x, W0, [LowRank(A, B, 1.0)], geometry=Convolution(groups=2))
    with pytest.raises(NotImplementedError, match="groups > 1"):
        layer.merge()
