"""torch layers that hold the numbers of the tests' problems, with and without adapters."""

from collections.abc import Iterable
from typing import Any

import torch
from convolution_cases import ConvolutionProblem
from torch import Tensor, nn
from torch_modes import placed

from loracle.reference import LowRank
from loracle.torch_impl.convolution_function import ConvolutionTerm
from loracle.torch_impl.layer import LoraLayer
from loracle.torch_impl.update import UpdateOptions

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def frozen(array: Any, dtype: Any, device: str) -> nn.Parameter:
    """A parameter of the array's values that does not train."""
    return nn.Parameter(placed(array, dtype, device), requires_grad=False)


def convolution_of(problem: ConvolutionProblem, dtype: Any, device: str = "cpu", *, bias: bool = True) -> Any:
    """torch's own convolution of the problem's geometry, base weight and bias, frozen."""
    g, axes = problem.geometry, problem.x.ndim - 2
    channels, outputs, kernel = problem.x.shape[1], len(problem.W0), problem.W0.shape[2:]
    layer = CONVOLUTIONS[axes](
        channels, outputs, kernel, g.stride, g.padding, g.dilation, g.groups, bias, g.padding_mode
    )
    layer.weight = frozen(problem.W0, dtype, device)
    layer.bias = frozen(problem.bias, dtype, device) if bias else None
    return layer


def convolution_terms(
    problem: ConvolutionProblem, base: Any, adapter: Any, device: str
) -> list[ConvolutionTerm]:
    """The problem's adapters, their tensors leaves with gradients; masks in the base's dtype."""
    kernel = (1,) * (problem.x.ndim - 2)

    def leaf(array: Any) -> Tensor:
        return placed(array, adapter, device).requires_grad_()

    return [
        ConvolutionTerm(
            leaf(own.A),
            leaf(own.B.reshape(*own.B.shape[:2], *kernel)),
            own.scaling,
            None if own.bias is None else leaf(own.bias),
            None if own.dropout is None else placed(own.dropout, base, device),
        )
        for own in problem.adapters
    ]


def give(layer: LoraLayer, adapters: Iterable[LowRank], dtype: Any, device: str) -> None:
    """Give a layer the adapters, active, with their values, named by number; A and B as in a file."""
    names = []
    for number, own in enumerate(adapters):
        name = f"adapter{number}"
        # Of rank 1, so that any scaling is exactly alpha / r; the tensors have the adapter's own rank.
        layer.add_adapter(name, UpdateOptions(1, own.scaling, lora_bias=own.bias is not None))
        update = layer.update(name)
        for parameter, array in (
            (update.lora_A, own.A),
            (update.lora_B, own.B),
            (update.lora_bias, own.bias),
        ):
            if parameter is not None:
                parameter.data = placed(array, dtype, device)
        names.append(name)
    layer.activate(names)


def gradients_of(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the leaves, by their names."""
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
