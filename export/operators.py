"""onnxruntime's operators, emitted at trace time in place of a transformers model's modules.

The traced model computes what the original does; only the spelling differs, so that no pattern matching
over the finished graph is needed:

* `nn.Linear`   -> `com.microsoft.FusedMatMul(x, W, transB=1)`: W stays (out, in), as the checkpoint stores it
* `Conv1D`      -> `MatMul(x, W)`, W (in, out) as the checkpoint stores it
* RMS norm      -> `SimplifiedLayerNormalization(x, weight)`
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class FusedLinear(nn.Module):
    """`x W^T + b`, x (..., in), W (out, in), b (out,) or None."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.onnx.ops.symbolic(
            "com.microsoft::FusedMatMul",
            (x, self.weight),
            {"transB": 1},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.weight.shape[0]),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class InputMajorLinear(nn.Module):
    """`x W + b`, x (..., in), W (in, out), b (out,): without the flattening of transformers' Conv1D."""

    def __init__(self, linear: Conv1D) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.matmul(x, self.weight) + self.bias
        return y


class FusedRMSNorm(nn.Module):
    """`(weight + offset) * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in float32."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",
            (x, weight),
            {"axis": -1, "epsilon": self.eps, "stash_type": 1},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


def rms_norm_of(module: nn.Module) -> FusedRMSNorm | None:
    """Return the fused form of a module that is an RMS norm, as its own answers show; None for others.

    Its name does not tell: some add one to the weight.
    """
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1 or not isinstance(eps, float):
        return None
    if "Norm" not in type(module).__name__ or isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return None
    probe = copy.deepcopy(module)
    width = parameters["weight"].shape[0]
    weight = torch.linspace(0.25, 2.0, width, dtype=torch.float32)
    probe.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.sin(torch.arange(3.0 * width)).reshape(3, width)
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    with torch.no_grad():
        y = probe(x)
    for offset in (0.0, 1.0):
        if torch.allclose(y, normal * (weight + offset), rtol=1e-5, atol=1e-6):
            return FusedRMSNorm(parameters["weight"], eps, offset)
    return None


def fuse_modules(model: nn.Module) -> None:
    """Replace every linear layer and every RMS norm of `model`, in place, by the forms above."""
    for name, module in list(model.named_modules()):
        fused: nn.Module | None
        if isinstance(module, nn.Linear):
            fused = FusedLinear(module)
        elif isinstance(module, Conv1D):
            fused = InputMajorLinear(module)
        else:
            fused = rms_norm_of(module)
        if fused is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fused)
