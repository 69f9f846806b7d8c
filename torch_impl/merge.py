"""Merge a model's adapters into its weights, and put the weights back bit for bit."""

from typing import Any

from numpy.typing import NDArray
from torch import nn

from loracle.reference import TargetError
from loracle.reference import merge as merge_arrays

from .arrays import array_of, tensor_of
from .inject import lora_layers


def merge(model: nn.Module) -> tuple[str, ...]:
    """Give each `LoraLinear` the weight ``W0 + scaling * lora_B @ lora_A``, correctly rounded to W0's
    dtype.

    All weights are computed before the first is exchanged, so an error leaves the model as it was. W0 is
    kept: a merged model holds both. See `loracle.reference.merge`.

    Returns:
        The paths of the merged layers.

    Raises:
        TargetError: the model has no adapters, or one is merged already.
        NonFiniteError: a tensor holds NaN or infinity, or a merged entry overflows; it is named.
    """
    layers = lora_layers(model)
    if not layers:
        raise TargetError(f"{type(model).__name__}: expected a model with adapters, got none; inject() first")
    for path, layer in layers.items():
        if layer.merged:
            raise TargetError(f"{path}: expected an unmerged adapter, got a merged one; unmerge() first")
    merged: dict[str, NDArray[Any]] = {
        path: merge_arrays(
            array_of(layer.base_weight),
            array_of(layer.lora_A),
            array_of(layer.lora_B),
            layer.scaling,
            name=f"{path}.weight",
        )
        for path, layer in layers.items()
    }
    for path, layer in layers.items():
        layer.set_merged_weight(tensor_of(merged[path]).to(layer.base_weight.device))
    return tuple(layers)


def unmerge(model: nn.Module) -> tuple[str, ...]:
    """Put each merged layer's kept W0 back, the same tensor and bits; return those layers' paths."""
    merged = {path: layer for path, layer in lora_layers(model).items() if layer.merged}
    for layer in merged.values():
        layer.restore_base_weight()
    return tuple(merged)
