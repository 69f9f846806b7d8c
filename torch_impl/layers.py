"""`LoraLinear`: a frozen linear layer with a trainable low-rank update beside it."""

import math
from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from loracle.reference import ConfigError, ShapeError, TargetError, lora_scaling

from .function import compute_dtype, lora_linear


class LoraLinear(nn.Module):
    """``y = x W0^T + bias + scaling * (dropout(x) lora_A^T) lora_B^T``; W0 and bias stay frozen.

    The wrapped layer is kept as ``base_layer`` (the same object, not a copy). ``lora_A`` is (r, in),
    ``lora_B`` (out, r), both float32 whatever the base's dtype, or float64 beside a float64 base.
    ``lora_B`` starts at zero, so a fresh layer computes what its base does. For the dtype of the products
    see `loracle.torch_impl.lora_linear`.

    Neither ``forward`` nor ``train()`` nor ``eval()`` merges; `set_merged_weight` and `restore_base_weight`
    do, and ``merged`` tells.

    Args:
        base_layer: the layer to adapt; its parameters are frozen.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        dropout: probability in [0, 1) of dropping an entry of the adapter's input while training.
        use_rslora: scaling is ``lora_alpha / sqrt(r)``.
        generator: where ``lora_A``'s start is drawn from; torch's global one when None.

    Raises:
        ConfigError: a wrong rank, alpha or dropout.
        TargetError: ``base_layer`` is not an ``nn.Linear``.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TargetError(
                f"base_layer: expected torch.nn.Linear, got {type(base_layer).__name__}; target linear layers"
            )
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"lora_dropout: expected a probability in [0, 1), got {dropout!r}")
        self.scaling = lora_scaling(r, lora_alpha, use_rslora)
        self.r = r
        self.lora_alpha = lora_alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.base_layer = base_layer
        base_layer.requires_grad_(False)
        W0 = base_layer.weight
        dtype = torch.float64 if W0.dtype is torch.float64 else torch.float32
        A = torch.empty(r, base_layer.in_features, dtype=dtype)
        # PEFT's and loralib's start; drawn on the CPU so that a seed means the same on every device.
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(W0.device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r, dtype=dtype, device=W0.device))
        # In a tuple, so that nn.Module does not register the parameter a second time.
        self._kept: tuple[Tensor] | None = None

    @property
    def in_features(self) -> int:
        """Length of x's last dimension."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Length of y's last dimension."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The weight that ``base_layer`` holds now: W0, or the merged one while ``merged``."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether ``base_layer`` holds the merged weight, and forward is the base's alone."""
        return self._kept is not None

    @property
    def base_weight(self) -> Tensor:
        """W0, merged or not."""
        return self.weight if self._kept is None else self._kept[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.merged:
            return nn.functional.linear(x, self.base_layer.weight, self.base_layer.bias)
        multiplier = None
        if self.training and self.dropout > 0.0:
            keep = 1.0 - self.dropout
            multiplier = torch.empty_like(x, dtype=compute_dtype(x), requires_grad=False)
            multiplier.bernoulli_(keep).div_(keep)
        return lora_linear(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            multiplier,
        )

    def set_merged_weight(self, weight: Tensor) -> None:
        """Put ``weight`` in W0's place and keep W0 for `restore_base_weight`.

        The parameter object is exchanged, so a module that W0 is tied to keeps W0.

        Raises:
            TargetError: the layer is merged already.
            ShapeError: ``weight`` differs from W0 in shape or dtype.
        """
        W0 = self.base_layer.weight
        if self._kept is not None:
            raise TargetError("LoraLinear: expected an unmerged layer, got a merged one; unmerge it first")
        if weight.shape != W0.shape or weight.dtype is not W0.dtype:
            raise ShapeError(
                f"weight: expected {tuple(W0.shape)} {W0.dtype}, got {tuple(weight.shape)} {weight.dtype}; "
                "merge this layer's own lora_A and lora_B"
            )
        self._kept = (W0,)
        self.base_layer.weight = nn.Parameter(weight, requires_grad=False)

    def restore_base_weight(self) -> None:
        """Put W0 itself back, the same object with the same bits; an unmerged layer stays as it is."""
        if self._kept is not None:
            self.base_layer.weight = cast(nn.Parameter, self._kept[0])
            self._kept = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast the kept W0 with the module's parameters."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._kept is not None:
            self._kept[0].data = fn(self._kept[0].data)
        return self

    def extra_repr(self) -> str:
        """Describe the adapter in ``print(model)``."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}, merged={self.merged}"
