"""The rounding noise of adapted layers: that of the one product which the merged model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loracle.torch_impl.convolution import LoraConvolution
from loracle.torch_impl.convolution_function import Geometry
from loracle.torch_impl.embedding import LoraEmbedding
from loracle.torch_impl.linear import LoraLinear
from loracle.torch_impl.read_weights import LoraModule

from .float64_mode import Float64Mode
from .rounding_noise import Product, product_of

_aten = torch.ops.aten


@contextmanager
def as_merged(model: nn.Module, mode: Float64Mode) -> Iterator[None]:
    """Within the block products of adapters have no noise, and an adapted layer that of ``x W^T``, W merged.

    The layers compute unmerged all the same: only their noise is that of the model which is judged.
    """
    hooks = []
    for module in model.modules():
        if isinstance(module, LoraModule):
            # It computes merged weights; its base's products are those of the merged model.
            hooks.append(module.register_forward_pre_hook(_silencing(mode, True)))
            hooks.append(module.base_layer.register_forward_pre_hook(_silencing(mode, False)))
        elif isinstance(module, LoraLinear | LoraConvolution):
            hooks.append(module.register_forward_pre_hook(_silencing(mode, True)))
            hooks.append(module.register_forward_hook(_with_noise(mode)))
        elif isinstance(module, LoraEmbedding):
            hooks.append(module.register_forward_pre_hook(_silencing(mode, True)))
            hooks.append(module.register_forward_hook(_silencing(mode, False)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _silencing(mode: Float64Mode, silent: bool) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        mode.silent = silent

    return hook


def _with_noise(mode: Float64Mode) -> Callable[..., Any]:
    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mode.silent = False
        if mode.noise is None:
            return output
        mode.suspend(True)
        noise = mode.noise.draw(merged_product(module, inputs[0], output.shape), output)
        mode.suspend(False)
        return output + noise

    return add


def merged_product(layer: LoraLinear | LoraConvolution, x: Tensor, shape: torch.Size) -> Product:
    """Return what the layer multiplies once its adapters are merged, for outputs of a shape."""
    if isinstance(layer, LoraLinear):
        weight = merged_weight(layer, layer.matrix)
        product = product_of(_aten.mm.default, (x.reshape(-1, x.shape[-1]), weight.t()), {})
    else:
        geometry = Geometry.of(layer.base_layer)
        x = geometry.pad(x if x.dim() == layer.weight.dim() else x[None])
        window = geometry.stride, geometry.padding, geometry.dilation
        operands = (x, merged_weight(layer, layer.weight), None, *window, False, [0], geometry.groups)
        product = product_of(_aten.convolution.default, operands, {})
    assert product is not None
    return product._replace(energy=product.energy.reshape(shape))


def merged_weight(layer: LoraLinear | LoraConvolution, W0: Tensor) -> Tensor:
    """Return ``W0 + scaling * B A``, rescaled to DoRA's magnitude where there is one, in W0's shape."""
    W = W0.flatten(1)
    for update in layer.updates:
        A, B = update.matrices()
        W = torch.addmm(W, B.flatten(1), A.flatten(1), alpha=update.scaling)
        if update.lora_magnitude_vector is not None:
            W = W * (update.lora_magnitude_vector / torch.linalg.vector_norm(W, dim=1))[:, None]
    return W.view(W0.shape)
