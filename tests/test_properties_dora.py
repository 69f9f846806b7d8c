"""DoRA in NumPy, in plain torch with autograd, and in PEFT: one meaning.

Exact tier: bit for bit. Derived tier: within the a-priori bound around the reference in float64, with that
one's own bound added. PEFT's dropout is replaced by a module that multiplies by the array given.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from dora_problems import GRADIENTS, DoraProblem, dora_problems, exact_dora_problems, gaussian_problem
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from loracle.reference import ConfigError, LowRank
from loracle.reference.dora import dora_forward, dora_magnitude_start, dora_norm
from loracle.reference.dora_bounds import dora_backward_bound, dora_forward_bound, dora_norm_bound
from loracle.reference.dora_merge import merge_dora

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BY_DTYPE = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
Results = dict[str, Any]


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def leaf(array: Any) -> torch.Tensor:
    return tensor(array).requires_grad_()


def by_autograd(p: DoraProblem) -> Results:
    """y and the gradients from the layer's formula, with the norm detached."""
    x, A, B, m, bias = (leaf(array) for array in (p.x, p.A, p.B, p.magnitude, p.bias))
    W0 = tensor(p.W0)
    norm = torch.linalg.vector_norm(W0 + p.scaling * (B @ A), dim=1).detach()
    g = m / norm
    dropped = x if p.dropout is None else x * tensor(p.dropout)
    y = x @ W0.T + bias + (g - 1) * (dropped @ W0.T) + g * (p.scaling * ((dropped @ A.T) @ B.T))
    y.backward(tensor(p.dy))
    leaves = (x, A, B, bias, m)
    return {
        "y": y.detach().numpy(),
        **dict(zip(GRADIENTS, (own.grad.numpy() for own in leaves), strict=True)),
    }


class Mask(torch.nn.Module):
    """Multiplies by a given array where a dropout would draw one."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def adapted(layer: torch.nn.Module, r: int, scaling: float, dtype: Any, **options: Any) -> Any:
    """Return PEFT's DoRA layer around ``layer``."""
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"], use_dora=True, **options)
    model = peft.get_peft_model(torch.nn.Sequential(layer), config, autocast_adapter_dtype=False)
    own = model.base_model.model[0]
    own.scaling["default"] = scaling
    return own.to(torch.float64 if dtype == F64 else torch.float32)


def peft_linear(p: DoraProblem, *, conv1d: bool = False) -> Any:
    out_features, in_features = p.W0.shape
    base = Conv1D(out_features, in_features) if conv1d else torch.nn.Linear(in_features, out_features)
    layer = adapted(base, len(p.A), p.scaling, p.W0.dtype, fan_in_fan_out=conv1d)
    with torch.no_grad():
        base.weight.data = tensor(p.W0.T if conv1d else p.W0)
        base.bias.data = tensor(p.bias)
        layer.lora_A["default"].weight.data = tensor(p.A)
        layer.lora_B["default"].weight.data = tensor(p.B)
        layer.lora_magnitude_vector["default"].weight.data = tensor(p.magnitude)
    base.bias.requires_grad_()
    if p.dropout is not None:
        layer.lora_dropout["default"] = Mask(tensor(p.dropout))
    return layer.train(p.dropout is not None)


def by_peft(p: DoraProblem, *, conv1d: bool = False) -> Results:
    layer = peft_linear(p, conv1d=conv1d)
    x = leaf(p.x)
    y = layer(x)
    y.backward(tensor(p.dy))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m, bias = layer.lora_magnitude_vector["default"].weight, layer.base_layer.bias
    assert layer.base_layer.weight.grad is None
    leaves = (x, A, B, bias, m)
    return {
        "y": y.detach().numpy(),
        **dict(zip(GRADIENTS, (own.grad.numpy() for own in leaves), strict=True)),
    }


def by_reference(p: DoraProblem) -> Results:
    gradients = p.backward()
    return {"y": p.forward(), **{name: getattr(gradients, name) for name in GRADIENTS}}


def bounds(p: DoraProblem, dtype: Any) -> Results:
    try:
        own = dora_backward_bound(p.dy, p.x, *p.weight, p.magnitude, dtype, bias=p.bias)
        y = dora_forward_bound(p.x, *p.weight, p.magnitude, dtype, bias=p.bias)
    except ConfigError as refused:
        assert "error of each norm" in str(refused)  # noqa: PT017
        assume(False)
    return {"y": y, **{name: getattr(own, name) for name in GRADIENTS}}


@BY_DTYPE
@settings(max_examples=25)
@given(data=st.data())
def test_exact_tier_numpy_torch_and_peft_agree_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(exact_dora_problems(dtype))
    expected = by_reference(p)
    for implementation in (by_autograd(p), by_peft(p), by_peft(p, conv1d=True)):
        for name, value in expected.items():
            assert implementation[name].dtype == value.dtype == dtype
            assert implementation[name].shape == value.shape
            assert np.array_equal(implementation[name], value), name


@settings(max_examples=25)
@given(dora_problems(F32))
def test_derived_tier_float32_stays_within_the_bounds_of_float64(p: DoraProblem) -> None:
    exact, allowed, own = by_reference(p.astype(F64)), bounds(p, F32), bounds(p, F64)
    for implementation in (by_reference(p), by_autograd(p), by_peft(p), by_peft(p, conv1d=True)):
        for name, value in exact.items():
            assert implementation[name].dtype == F32
            assert (np.abs(implementation[name] - value) <= allowed[name] + own[name]).all(), name


@settings(max_examples=20)
@given(dora_problems(F64))
def test_derived_tier_in_float64_they_stay_within_twice_the_bounds(p: DoraProblem) -> None:
    own, allowed = by_reference(p), bounds(p, F64)
    for implementation in (by_autograd(p), by_peft(p), by_peft(p, conv1d=True)):
        for name, value in own.items():
            assert implementation[name].dtype == F64
            assert (np.abs(implementation[name] - value) <= 2 * allowed[name]).all(), name


def test_bfloat16_breaks_the_bounds_of_float32_and_so_does_a_gradient_through_the_norm() -> None:
    p = gaussian_problem(np.random.default_rng(3), (4, 24, 5, 3), 0.5, 1.0).astype(F32)
    exact, allowed, own = by_reference(p.astype(F64)), bounds(p, F32), bounds(p, F64)
    x, A, B, m = (leaf(array).to(torch.bfloat16) for array in (p.x, p.A, p.B, p.magnitude))
    W0 = tensor(p.W0).bfloat16()
    g = m / torch.linalg.vector_norm(W0 + p.scaling * (B @ A), dim=1)
    narrow = (x @ W0.T + tensor(p.bias) + (g - 1) * (x @ W0.T) + g * p.scaling * (x @ A.T @ B.T)).float()
    assert (np.abs(narrow.detach().numpy() - exact["y"]) > allowed["y"] + own["y"]).any()
    p = replace(p, dropout=None).astype(F64)
    A, B = leaf(p.A), leaf(p.B)
    weight = tensor(p.W0) + p.scaling * (B @ A)
    g = tensor(p.magnitude) / torch.linalg.vector_norm(weight, dim=1)
    (tensor(p.x) @ (g[:, None] * weight).T).backward(tensor(p.dy))
    detached, allowed = by_reference(p), bounds(p, F64)
    for name, through in (("dA", A.grad), ("dB", B.grad)):
        assert (np.abs(through.numpy() - detached[name]) > 2 * allowed[name]).any()


@pytest.mark.parametrize("conv1d", [False, True])
def test_peft_starts_with_the_norm_as_magnitude(conv1d: bool) -> None:
    in_features, out_features = 7, 4
    base = Conv1D(out_features, in_features) if conv1d else torch.nn.Linear(in_features, out_features)
    layer = adapted(base, 3, 1.0, F32, fan_in_fan_out=conv1d, init_lora_weights=False)
    W0 = base.weight.detach().numpy()
    A, B = (own["default"].weight.detach().numpy() for own in (layer.lora_A, layer.lora_B))
    assert np.abs(B).min() > 0
    started = layer.lora_magnitude_vector["default"].weight.detach().numpy()
    adapter = LowRank(A, B, 1.0)
    magnitude = dora_magnitude_start(W0, adapter, fan_in_fan_out=conv1d)
    bound = dora_norm_bound(W0, adapter, F32, fan_in_fan_out=conv1d)
    assert started.shape == magnitude.shape == (out_features,)
    assert (np.abs(started.astype(F64) - magnitude) <= 2 * bound).all()


CONVOLUTIONS = [
    (torch.nn.Conv1d, (5, 4, 3)),
    (torch.nn.Conv2d, (5, 4, 3, 2)),
    (torch.nn.Conv3d, (5, 4, 2, 3, 2)),
]


@pytest.mark.parametrize(("kind", "shape"), CONVOLUTIONS, ids=lambda own: getattr(own, "__name__", ""))
def test_the_norms_and_the_merge_of_a_convolution_are_those_of_its_matrix(kind: Any, shape: Any) -> None:
    base = kind(shape[1], shape[0], shape[2:], bias=False)
    layer = adapted(base, 2, 1.5, F32, init_lora_weights=False)
    W0 = base.weight.detach().numpy().reshape(shape[0], -1)
    A = layer.lora_A["default"].weight.detach().numpy().reshape(2, -1)
    B = layer.lora_B["default"].weight.detach().numpy().reshape(shape[0], 2)
    magnitude = layer.lora_magnitude_vector["default"].weight
    started = dora_magnitude_start(W0, LowRank(A, B, 1.0))  # PEFT's own scaling when it was made
    assert magnitude.shape == (1, shape[0], *[1] * (len(shape) - 2))
    bound = dora_norm_bound(W0, LowRank(A, B, 1.0), F32)
    assert (np.abs(magnitude.detach().numpy().ravel().astype(F64) - started) <= 2 * bound).all()
    magnitude.data *= torch.linspace(0.5, -2, shape[0]).reshape(magnitude.shape)
    m, W0 = magnitude.detach().numpy().ravel().copy(), W0.copy()
    layer.merge()
    _assert_merged(base.weight.detach().numpy().reshape(shape[0], -1), W0, LowRank(A, B, 1.5), m)


def test_the_norms_and_the_merge_of_an_embedding_are_those_of_its_transpose() -> None:
    base = torch.nn.Embedding(11, 6)
    layer = adapted(base, 2, 1.5, F32, init_lora_weights=False)
    W0 = base.weight.detach().numpy().T.copy()
    A, B = (
        own["default"].detach().numpy().copy() for own in (layer.lora_embedding_A, layer.lora_embedding_B)
    )
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.shape == (6,)
    m = magnitude.detach().numpy().copy()
    adapter = LowRank(A, B, 1.5)
    ids, g = torch.arange(11), m / dora_norm(W0, adapter)
    y = layer(ids).detach().numpy()
    # Every token once: the layer's outputs are the rows of the rescaled weight.
    allowed = dora_forward_bound(np.eye(11, dtype=F32), W0, adapter, m, F32)
    exact = (g[:, None] * (W0 + 1.5 * B @ A)).T
    assert (np.abs(y - exact) <= 2 * allowed).all()
    layer.merge()
    _assert_merged(base.weight.detach().numpy().T, W0, adapter, m)


@pytest.mark.parametrize("conv1d", [False, True])
def test_peft_merges_within_the_bound_of_the_correctly_rounded_merge(conv1d: bool) -> None:
    p = gaussian_problem(np.random.default_rng(4), (1, 24, 9, 3), 0.7, 0.1).astype(F32)
    layer = peft_linear(p, conv1d=conv1d)
    layer.merge()
    merged = layer.base_layer.weight.detach().numpy()
    adapter = replace(p.adapter, dropout=None)
    _assert_merged(merged.T if conv1d else merged, p.W0, adapter, p.magnitude)
    # And a magnitude off by a thousandth is seen.
    with pytest.raises(AssertionError):
        _assert_merged(merged.T if conv1d else merged, p.W0, adapter, p.magnitude * F32.type(1.001))


def _assert_merged(theirs: Any, W0: Any, adapter: LowRank, magnitude: Any) -> None:
    """A merge that rounds at every step is the layer without bias on the unit vectors, one for each
    column.
    """
    unit = np.eye(W0.shape[1], dtype=F32)
    bound = dora_forward_bound(unit, W0, adapter, magnitude, F32).T
    ours = merge_dora(W0, adapter.A, adapter.B, adapter.scaling, magnitude, dtype=F64)
    assert (np.abs(theirs - ours) <= bound).all()
    wide = replace(adapter, A=adapter.A.astype(F64), B=adapter.B.astype(F64))
    y = dora_forward(unit.astype(F64), W0.astype(F64), wide, magnitude.astype(F64))
    own = dora_forward_bound(unit, W0, adapter, magnitude, F64).T
    assert (np.abs(y.T - ours) <= own + np.abs(ours) * 2.0**-53).all()
