"""Exchange a model's quantised linear layers for plain ones, their adapters with them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from loracle.reference import TargetError

from .injected import injected_or_new
from .layer import LoraLayer
from .linear import LoraLinear
from .module_tree import base_modules, put, wrappers
from .quantization import dequantized, is_quantized
from .quantized import LoraQuantizedLinear
from .shared_input import watch_siblings
from .whole_tensors import WholeTensor


def dequantize(model: nn.Module, *, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Replace every quantised linear layer by an ``nn.Linear`` of the numbers it stands for, and return their
    paths.

    Adapters stay what they are, on a `LoraLinear` now, which can be merged: into the dequantised weight, not
    the one from before it was quantised, to which an adapter can be merged with `loracle merge`.

    Args:
        model: changed in place; its weights take two to eight times the memory afterwards.
        dtype: of the weights, each number rounded to it; None for the one they are dequantised to, which is
            the weight's own from before for bitsandbytes' 4 bits, and float32 for its 8.

    Raises:
        TargetError: the model has no such layers.
    """
    modules = base_modules(model)
    quantized = {path: module for path, module in modules.items() if is_quantized(module)}
    if not quantized:
        raise TargetError(
            f"{type(model).__name__}: expected quantised linear layers, got none; there is nothing to do"
        )
    placed = wrappers(model)
    plain: dict[int, nn.Linear] = {}
    layers: dict[int, LoraLayer] = {}
    for path, module in quantized.items():
        if id(module) not in plain:
            plain[id(module)] = _plain(module, dtype)
        own: nn.Module = plain[id(module)]
        wrapper = placed.get(path)
        if isinstance(wrapper, LoraQuantizedLinear):
            own = layers[id(wrapper)] = _rewrapped(wrapper, plain[id(module)])
        put(model, path, own)
    _exchange(model, layers, plain)
    _forget_quantizer(model)
    watch_siblings((path, own) for path, own in wrappers(model).items() if isinstance(own, LoraLinear))
    return tuple(quantized)


def _plain(module: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    weight = dequantized(module)
    weight = weight.to(weight.dtype if dtype is None else dtype)
    # Made without numbers, which are not random but the module's.
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias = cast(nn.Parameter | None, module.bias)
    if bias is not None:
        # The same object: it may be one that trains.
        bias.data = bias.data.to(weight.dtype)
    plain.register_parameter("bias", bias)
    return plain.train(module.training)


def _rewrapped(wrapper: LoraQuantizedLinear, plain: nn.Linear) -> LoraLinear:
    bias = cast(nn.Parameter | None, plain.bias)
    trains = bias is not None and bias.requires_grad
    layer = LoraLinear(plain)
    if bias is not None:
        bias.requires_grad_(trains)
    layer.adapters = wrapper.adapters
    layer.activate(wrapper.active)
    return layer.train(wrapper.training)


def _exchange(model: nn.Module, layers: Mapping[int, LoraLayer], plain: Mapping[int, nn.Linear]) -> None:
    """Let the model's adapters know their new layers, and what trains whole its new places."""
    state = injected_or_new(model)

    def moved(tensor: WholeTensor) -> WholeTensor:
        places = []
        for place in tensor.places:
            owner = plain.get(id(place.module))
            if owner is not None:
                place = replace(place, module=owner)
                for own in (tensor.original, tensor.trained):
                    own.data = own.data.to(owner.weight.dtype)
            places.append(place)
        return replace(tensor, places=tuple(places))

    for name, adapter in state.adapters.items():
        state.adapters[name] = replace(
            adapter,
            layers={path: layers.get(id(layer), layer) for path, layer in adapter.layers.items()},
            whole={full: moved(tensor) for full, tensor in adapter.whole.items()},
        )


def _forget_quantizer(model: nn.Module) -> None:
    """Let a transformers model be saved as what it is now."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (getattr(model, "config", None), "quantization_config"),
    ):
        if owner is not None and name in vars(owner):
            delattr(owner, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            setattr(model, name, False)
