"""`LoraMultiheadAttention`: an ``nn.MultiheadAttention`` with low-rank updates of its projections."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import ConfigError, LowRank, TargetError, merge_adapters, merge_bias

from .arrays import array_of
from .layer import LoraLayer
from .read_weights import LoraModule, LoraWeight, add_product
from .starts import linear_update
from .update import LoraUpdate, UpdateOptions, adapter_dtype


class LoraProjection(LoraWeight):
    """The updates of a matrix (out, in) of an ``nn.MultiheadAttention``: ``W0 + scaling * lora_B lora_A``.

    lora_A is (r, in), lora_B (out, r), for all of query, key and value at once where the matrix is theirs.
    """

    kind = "linear"

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter; see `loracle.torch_impl.starts.linear_update`.

        Raises:
            ConfigError: dropout, which has no input to act on here, or a magnitude.
        """
        if options.use_dora:
            raise ConfigError(
                "use_dora: expected False for nn.MultiheadAttention, got True; it has no magnitude"
            )
        if options.dropout > 0.0:
            raise ConfigError(
                f"lora_dropout: expected 0 for nn.MultiheadAttention, whose projections' inputs no layer "
                f"sees, got {options.dropout}; leave it out of the targets, or train without dropout"
            )
        W0 = self.base_weight
        bias = None
        if options.lora_bias:
            bias = torch.zeros(len(W0), device=W0.device, dtype=adapter_dtype(W0))
        return linear_update(W0, options, generator, lora_bias=bias)

    def added(self, weight: Tensor, update: LoraUpdate, *, in_place: bool) -> Tensor:
        """See `LoraWeight.added`."""
        A, B = (factor.to(weight.dtype) for factor in update.matrices())
        return add_product(weight, B, A, update.scaling, in_place=in_place)

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """See `LoraLayer.merged_arrays`; a bias appears where a bias of lora_B is to go."""
        adapters = [self.low_rank(name) for name in names]
        W0 = self.base_weight
        merged = {self.name: merge_adapters(array_of(W0), adapters, name=f"{label}.{self.name}")}
        if any(adapter.bias is not None for adapter in adapters):
            own = getattr(self.base_layer, self.bias_name)
            bias = own if own is not None else W0.new_zeros(len(W0))
            merged[self.bias_name] = merge_bias(array_of(bias), adapters, name=f"{label}.{self.bias_name}")
        return merged

    def low_rank(self, name: str) -> LowRank:
        """Return the named adapter's whole update."""
        update = self.update(name)
        A, B = update.matrices()
        bias = None if update.lora_bias is None else array_of(update.lora_bias)
        return LowRank(array_of(A), array_of(B), update.scaling, bias=bias)


class LoraMultiheadAttention(LoraModule):
    """An ``nn.MultiheadAttention`` with updates of ``in_proj_weight`` and ``out_proj.weight``, added once.

    (PEFT adds that of out_proj twice.) Every option of the module's forward works, and torch's fast path,
    which reads the updated matrices. In a file the updates lie as PEFT has them: those of ``in_proj_weight``,
    A (r, d) and B (3 d, r), under the module's own path, those of the output under ``out_proj`` in it.

    Args:
        base_layer: the module to adapt; its parameters are frozen.
        path: where it is, for error messages.

    Raises:
        TargetError: another kind of module, or one with a matrix for each of query, key and value, which
            PEFT's files have no place for.
    """

    def __init__(self, base_layer: nn.Module, path: str = "base_layer") -> None:
        if (
            not isinstance(base_layer, nn.MultiheadAttention)
            or type(base_layer).forward is not nn.MultiheadAttention.forward
        ):
            raise TargetError(
                f"{path}: expected nn.MultiheadAttention and its own forward, "
                f"got {type(base_layer).__name__}; leave it out of the targets"
            )
        if base_layer.in_proj_weight is None:
            raise TargetError(
                f"{path}: expected keys and values of the queries' {base_layer.embed_dim} features, got kdim "
                f"{base_layer.kdim} and vdim {base_layer.vdim}; such projections are apart, and PEFT's "
                "format has no place for their updates: leave it out of the targets"
            )
        inner = LoraProjection(base_layer, "in_proj_weight", "in_proj_bias")
        outer = LoraProjection(base_layer.out_proj, "weight", "bias")
        super().__init__(base_layer, [inner, outer])

    @property
    def out_proj(self) -> LoraWeight:
        """The output projection's updates; its ``weight`` and ``bias`` are what the module computes with."""
        return dict(self._weights())["weight"]

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What torch's transformer layers ask of their attention."""
        return True

    def lora_layers(self) -> dict[str, LoraLayer]:
        """See `LoraModule.lora_layers`; that of query, key and value has the module's own path."""
        return {"": dict(self._weights())["in_proj_weight"], "out_proj": self.out_proj}
