"""`LoraConvolution`: a frozen convolution with trainable low-rank updates beside it."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import ConfigError, LowRank, TargetError, merge_bias, merge_convolution

from .arrays import array_of
from .convolution_function import ConvolutionTerm, Geometry, lora_convolution
from .layer import LoraLayer
from .plain_starts import plain_update
from .update import LoraUpdate, UpdateOptions, adapter_dtype

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraConvolution(LoraLayer):
    """``y = conv(x, W0) + bias + sum over adapters of scaling * (conv(dropout(x), lora_A) -> lora_B)``.

    ``lora_A``, (r, in / groups, *kernel), is a convolution of the base's stride, padding, padding mode,
    dilation and groups; ``lora_B``, (out, r, 1, ...), a matrix on its r outputs. So the layer computes what
    the merged one does, whose weight is ``W0 + scaling * lora_B lora_A``. The bias of lora_B is added after
    it, ``scaling * lora_bias``.

    PEFT's A leaves out dilation and padding mode. Of a convolution in groups it sees the channels of all,
    which no grouped weight can hold: such an adapter is refused when it is read, and PEFT does not read ours.

    Dtypes and start as in `loracle.torch_impl.LoraLinear`.

    Args:
        base_layer: an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``; its parameters are frozen.
        path: where it is, for error messages.

    Raises:
        TargetError: another kind of layer.
    """

    kind = "convolution"

    def __init__(self, base_layer: nn.Module, path: str = "base_layer") -> None:
        plain = next((kind for kind in CONVOLUTIONS if isinstance(base_layer, kind)), None)
        if plain is None or type(base_layer).forward is not plain.forward:
            raise TargetError(
                f"{path}: expected nn.Conv1d, Conv2d or Conv3d and its own forward, "
                f"got {type(base_layer).__name__}; leave it out of the targets"
            )
        super().__init__(base_layer)

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter; see `loracle.torch_impl.plain_starts.plain_update`."""
        if options.use_dora:
            raise ConfigError("use_dora: expected False for this layer, got True; it has no magnitude")
        W0 = self.weight
        bias = None
        if options.lora_bias:
            bias = torch.zeros(len(W0), device=W0.device, dtype=adapter_dtype(W0))
        return plain_update(
            W0, convolution_shapes(W0, options.r), options, generator, self.kind, lora_bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, *spatial) to (N, out, *out_spatial); N may be left out."""
        if self.merged or not self.updates:
            y: Tensor = self.base_layer(x)
            return y
        terms = [
            ConvolutionTerm(
                update.lora_A, update.lora_B, update.scaling, update.lora_bias, self._draw(update, x)
            )
            for update in self.updates
        ]
        return lora_convolution(x, self.weight, self.bias, terms, Geometry.of(self.base_layer))

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """See `LoraLayer.merged_arrays`; a bias appears where a bias of lora_B is to go."""
        adapters = [self.low_rank(name) for name in names]
        W0 = self.base_weight
        merged = {"weight": merge_convolution(array_of(W0), adapters, name=f"{label}.weight")}
        if any(adapter.bias is not None for adapter in adapters):
            bias = self.bias if self.bias is not None else W0.new_zeros(len(W0))
            merged["bias"] = merge_bias(array_of(bias), adapters, name=f"{label}.bias")
        return merged

    def low_rank(self, name: str) -> LowRank:
        """Return the named adapter's whole update."""
        update = self.update(name)
        bias = None if update.lora_bias is None else array_of(update.lora_bias)
        return LowRank(array_of(update.lora_A), array_of(update.lora_B), update.scaling, bias=bias)


def convolution_shapes(weight: Tensor, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of lora_A and lora_B beside a weight (out, in / groups, *kernel)."""
    outputs, *window = weight.shape
    return (r, *window), (outputs, r, *(1 for _ in window[1:]))
