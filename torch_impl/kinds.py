"""Which class adapts which kind of module."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from loracle.reference import TargetError

from .layer import LoraLayer
from .linear import LoraLinear


def adapted_layer(module: nn.Module, path: str) -> LoraLayer:
    """Return a `LoraLayer` around the module, without adapters yet.

    Raises:
        TargetError: there is no such layer for this class of module.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return LoraLinear(module)
    raise TargetError(
        f"{path}: expected a linear, embedding, convolution or nn.MultiheadAttention layer, "
        f"got {type(module).__name__}; leave it out of the targets"
    )


def factor_shapes(module: nn.Module, r: int, parameter: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of lora_A and lora_B for a module, or for a named stacked parameter of it."""
    assert isinstance(module, nn.Linear | Conv1D)
    shape = tuple(module.weight.shape)
    out_features, in_features = shape if isinstance(module, nn.Linear) else shape[::-1]
    return (r, in_features), (out_features, r)
