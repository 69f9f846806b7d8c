"""`LoraLinear`: a frozen linear layer with trainable low-rank updates beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loracle.reference import LowRank, TargetError, merge_adapters, merge_bias, merge_dora

from .arrays import array_of
from .device_factors import DeviceLowRank
from .device_merge import DeviceMerge, merges_on_device
from .dora import check_norm, dora_linear, dora_norm
from .function import Member, Term, lora_products
from .layer import LoraLayer
from .overflow import cannot_overflow
from .quantization import is_quantized
from .shared_input import Sharing
from .starts import linear_update
from .update import LoraUpdate, UpdateOptions, adapter_dtype


class LoraLinear(LoraLayer):
    """``y = x W0^T + bias + sum over adapters of scaling * (dropout(x) lora_A^T + lora_bias) lora_B^T``.

    The bias of lora_B is added after it, ``scaling * lora_bias``. ``lora_A`` is (r, in), ``lora_B`` (out, r),
    both float32 whatever the base's dtype, or float64 beside a float64 base. ``lora_B`` starts at zero
    unless ``init_lora_weights`` says otherwise, so a fresh layer computes what its base does. For the dtype
    of the products see `loracle.torch_impl.lora_linear`.

    With ``use_dora`` each output is rescaled to a magnitude, `loracle.torch_impl.dora_linear`, which starts
    as the norm that it is divided by.

    Args:
        base_layer: the layer to adapt, an ``nn.Linear`` or a transformers ``Conv1D``, whose weight is stored
            (in, out); its parameters are frozen.

    Raises:
        TargetError: another kind of layer.

    Source: LoRA, arXiv 2106.09685, section 4.1; with a bias of lora_B, PEFT's ``lora_bias``.
    """

    kind = "linear"

    def __init__(self, base_layer: nn.Module) -> None:
        if not isinstance(base_layer, nn.Linear | Conv1D) or is_quantized(base_layer):
            raise TargetError(
                f"base_layer: expected nn.Linear or Conv1D, got {type(base_layer).__name__}; "
                "target linear layers"
            )
        super().__init__(base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.sharing: Sharing | None = None

    @property
    def matrix(self) -> Tensor:
        """The base layer's weight as (out, in)."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @property
    def in_features(self) -> int:
        """Length of x's last dimension."""
        return int(self.matrix.shape[1])

    @property
    def out_features(self) -> int:
        """Length of y's last dimension."""
        return int(self.matrix.shape[0])

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter; see `loracle.torch_impl.starts.linear_update`."""
        bias = None
        if options.lora_bias:
            dtype = adapter_dtype(self.weight)
            bias = torch.zeros(self.out_features, device=self.weight.device, dtype=dtype)
        update = linear_update(self.matrix, options, generator, lora_bias=bias)
        if options.use_dora:
            norm = dora_norm(self.matrix, *update.matrices(), update.scaling)
            check_norm(norm)
            update.lora_magnitude_vector = nn.Parameter(norm)
        return update

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        updates = self.updates
        if self.merged or not updates:
            y: Tensor = self.base_layer(x)
            return y
        update = updates[0]
        if update.lora_magnitude_vector is not None:
            A, B = update.matrices()
            operands = (self.matrix, self.bias, A, B, update.scaling, update.lora_magnitude_vector)
            return dora_linear(x, *operands, self._draw(update, x))
        shared = None if self.sharing is None else self.sharing.take(self, x)
        if shared is not None:
            return shared
        return lora_products(x, (self.member(),), self.terms(0, x))[0]

    @property
    def is_low_rank(self) -> bool:
        """Whether the layer now computes its base's product and `terms`, at least one, and nothing else."""
        updates = self.updates
        return bool(updates) and all(update.lora_magnitude_vector is None for update in updates)

    def member(self) -> Member:
        """Return the frozen part, for `lora_products`."""
        return Member(self.matrix, self.bias)

    def terms(self, member: int, x: Tensor) -> list[Term]:
        """Return the active adapters' updates of the given member, for `lora_products`, dropout drawn."""
        terms = []
        for update in self.updates:
            dropout = self._draw(update, x)
            terms.append(
                Term(member, update.lora_A, update.lora_B, update.scaling, update.lora_bias, dropout=dropout)
            )
            if update.start is not None:
                terms.append(Term(member, *update.start, update.scaling, dropout=dropout))
        return terms

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """See `LoraLayer.merged_arrays`; a bias appears where a bias of lora_B is to go."""
        magnitude = self.update(names[0]).lora_magnitude_vector if names else None
        if magnitude is not None:
            return {"weight": self._merged_dora(names[0], array_of(magnitude), f"{label}.weight")}
        adapters = [own for name in names for own in self.low_ranks(name)]
        merged = {
            "weight": merge_adapters(
                array_of(self.base_weight),
                adapters,
                fan_in_fan_out=self.fan_in_fan_out,
                name=f"{label}.weight",
            )
        }
        if any(adapter.bias is not None for adapter in adapters):
            bias = self.bias if self.bias is not None else self.weight.new_zeros(self.out_features)
            merged["bias"] = merge_bias(array_of(bias), adapters, name=f"{label}.bias")
        return merged

    def start_merge(self, names: Sequence[str], label: str) -> Callable[[], Mapping[str, Tensor]]:
        """See `LoraLayer.start_merge`."""
        updates = [self.update(name) for name in names]
        if not merges_on_device(self.base_weight, updates):
            return super().start_merge(names, label)
        adapters = [own for name in names for own in self.device_low_ranks(name)]
        merge = DeviceMerge(
            self.base_weight, adapters, fan_in_fan_out=self.fan_in_fan_out, name=f"{label}.weight"
        )
        return lambda: {"weight": merge.result()}

    def merges_surely(self, names: Sequence[str]) -> bool:
        """See `LoraLayer.merges_surely`: where nothing but the weight is merged, and it can't overflow."""
        return all(self.update(name).is_product for name in names) and cannot_overflow(
            self.base_weight, [own for name in names for own in self.device_low_ranks(name)]
        )

    def _merged_dora(self, name: str, magnitude: NDArray[Any], label: str) -> NDArray[Any]:
        W0, (own,) = array_of(self.base_weight), self.low_ranks(name)
        operands = (own.A, own.B, own.scaling, magnitude)
        merged = merge_dora(W0.T if self.fan_in_fan_out else W0, *operands, name=label)
        return merged.T if self.fan_in_fan_out else merged

    def low_ranks(self, name: str) -> list[LowRank]:
        """Return the named adapter's updates, which add up."""
        update = self.update(name)
        A, B = update.matrices()
        bias = None if update.lora_bias is None else array_of(update.lora_bias)
        return [LowRank(array_of(A), array_of(B), update.scaling, bias=bias)]

    def device_low_ranks(self, name: str) -> list[DeviceLowRank]:
        """Return `low_ranks` as tensors where they lie, without a bias of lora_B."""
        update = self.update(name)
        return [DeviceLowRank(*update.matrices(), update.scaling)]
