"""`LoraFusedLinear`: several projections in one weight, each with an update of its own, or none."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, compress, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.files import LoraPair
from loracle.reference import ConfigError, LowRank, ShapeError, TargetError, fused_adapters

from .arrays import array_of, assign
from .device_factors import DeviceLowRank
from .function import Term
from .linear import LoraLinear
from .starts import linear_update
from .update import LoraUpdate, UpdateOptions, adapter_dtype


class LoraFusedLinear(LoraLinear):
    """A linear layer whose outputs are slices, such as query, key and value, some with an update each.

    With r ranks for each of the n slices that are enabled, ``lora_A`` is (r * n, in) and ``lora_B`` (sum of
    the enabled widths, r), slice after slice; to the outputs of slice i is added

        scaling * (dropout(x) A_i^T) B_i^T

    with one dropout for all. That is loralib's ``MergedLinear`` for slices of one width; a projection with
    grouped heads has others. No slice enabled leaves the base alone. See `loracle.reference.fused_adapters`.

    Args:
        base_layer: an ``nn.Linear`` or a transformers ``Conv1D``, as for `LoraLinear`.
        widths: how many outputs each slice has, in order.
        enabled: whether the slice has an update.

    Raises:
        TargetError: another kind of layer.
        ConfigError: not a flag for each slice.
        ShapeError: the widths are not the layer's outputs.

    Source: loralib 0.1.2, ``MergedLinear``.
    """

    def __init__(self, base_layer: nn.Module, *, widths: Sequence[int], enabled: Sequence[bool]) -> None:
        super().__init__(base_layer)
        self.widths, self.enabled = tuple(widths), tuple(enabled)
        if len(self.enabled) != len(self.widths):
            raise ConfigError(
                f"enabled: expected a flag for each of the {len(self.widths)} slices, got "
                f"{len(self.enabled)}; give all"
            )
        if sum(self.widths) != self.out_features or any(width < 1 for width in self.widths):
            raise ShapeError(
                f"widths: expected positive ones that add up to {self.out_features} outputs, got "
                f"{self.widths}; give those of all slices"
            )

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(start, stop) of each enabled slice among the outputs."""
        return list(compress(pairwise(accumulate(self.widths, initial=0)), self.enabled))

    @property
    def is_low_rank(self) -> bool:
        """See `LoraLinear.is_low_rank`."""
        return super().is_low_rank and any(self.enabled)

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter: each slice starts as a layer of its own does.

        Raises:
            ConfigError: DoRA, whose norms the reference defines for whole layers only.
        """
        if options.use_dora:
            raise ConfigError("use_dora: expected False for this layer, got True; it has no magnitude")
        W0, dtype = self.matrix, adapter_dtype(self.weight)
        own = [linear_update(W0[start:stop], options, generator) for start, stop in self.rows]
        width = sum(stop - start for start, stop in self.rows)
        A, B = (
            torch.cat([part.detach() for part in parts])
            for parts in (
                [W0.new_empty(0, self.in_features, dtype=dtype), *(update.lora_A for update in own)],
                [W0.new_empty(0, options.r, dtype=dtype), *(update.lora_B for update in own)],
            )
        )
        bias = W0.new_zeros(width, dtype=dtype) if options.lora_bias else None
        starts = [update.start for update in own if update.start is not None]
        taken = None
        if starts:
            taken = torch.cat([A for A, _ in starts]), torch.cat([-minus_B for _, minus_B in starts])
        return LoraUpdate(options, A, B, bias, start=taken)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if not any(self.enabled):
            # `lora_products` is for layers that have an update.
            y: Tensor = self.base_layer(x)
            return y
        return super().forward(x)

    def terms(self, member: int, x: Tensor) -> list[Term]:
        """See `LoraLinear.terms`: one for each enabled slice, all with the adapter's one dropout."""
        terms: list[Term] = []
        rows = self.rows
        if not rows:
            return terms
        widths = [stop - start for start, stop in rows]
        for update in self.updates:
            dropout, scaling, r = self._draw(update, x), update.scaling, update.options.r
            biases: Sequence[Tensor | None] = [None] * len(rows)
            if update.lora_bias is not None:
                biases = torch.split(update.lora_bias, widths)
            for A, B in _factors(update):
                slices = zip(torch.split(A, r), torch.split(B, widths), biases, rows, strict=True)
                terms += [Term(member, a, b, scaling, bias, own, dropout) for a, b, bias, own in slices]
                biases = [None] * len(rows)
        return terms

    def low_ranks(self, name: str) -> list[LowRank]:
        """Return the named adapter's updates, each on the rows of its slice."""
        update = self.update(name)
        adapters: list[LowRank] = []
        for A, B in _factors(update):
            matrices = array_of(A), array_of(B)
            adapters += fused_adapters(*matrices, update.scaling, self.widths, self.enabled)
        if update.lora_bias is None:
            return adapters
        biases = iter(_cut(array_of(update.lora_bias), self.rows))
        # Only the trained part comes with the bias, not what is taken away.
        return [replace(own, bias=next(biases, None)) for own in adapters]

    def device_low_ranks(self, name: str) -> list[DeviceLowRank]:
        """See `LoraLinear.device_low_ranks`; each on the rows of its slice."""
        update = self.update(name)
        if not self.rows:
            return []
        widths = [stop - start for start, stop in self.rows]
        return [
            DeviceLowRank(a, b, update.scaling, rows)
            for A, B in _factors(update)
            for a, b, rows in zip(
                torch.split(A, update.options.r), torch.split(B, widths), self.rows, strict=True
            )
        ]

    def pair(self, name: str) -> LoraPair:
        """Return the named adapter as the pair of a plain linear layer that computes the same.

        Its A is (r * n, in) and its B (out, r * n), each slice's on its own rows and ranks and zeros
        elsewhere; twice as many ranks where the update starts as a part of W0. So its configuration has rank
        r * n, and an alpha n times as large for the same scaling. Trained on as a plain layer, the zeros
        train, too.
        """
        update = self.update(name)
        As, Bs = zip(*((array_of(A), self._spread(array_of(B))) for A, B in _factors(update)), strict=True)
        bias = None
        if update.lora_bias is not None:
            bias = np.zeros(self.out_features, array_of(update.lora_bias).dtype)
            for (start, stop), own in zip(
                self.rows, _cut(array_of(update.lora_bias), self.rows), strict=True
            ):
                bias[start:stop] = own
        return LoraPair(np.concatenate(As), np.concatenate(Bs, axis=1), update.scaling, bias=bias)

    def fill(self, name: str, pair: LoraPair) -> None:
        """Give the named adapter the values of a pair like that of `pair`.

        Raises:
            ShapeError: its shapes are others.
            TargetError: its B has numbers where the ranks of one slice meet the rows of another.
        """
        update = self.update(name)
        factors = _factors(update)
        ranks = len(update.lora_A)
        wanted = (len(factors) * ranks, self.in_features), (self.out_features, len(factors) * ranks)
        if (pair.A.shape, pair.B.shape) != wanted:
            raise ShapeError(
                f"{name}: expected lora_A {wanted[0]} and lora_B {wanted[1]} for these slices, got "
                f"{pair.A.shape} and {pair.B.shape}; give what pair() returns"
            )
        gathered = []
        for spread in np.split(pair.B, len(factors), axis=1):
            blocks = [
                spread[start:stop, number * update.options.r : (number + 1) * update.options.r]
                for number, (start, stop) in enumerate(self.rows)
            ]
            gathered.append(np.concatenate([spread[:0, : update.options.r], *blocks]))
            if not np.array_equal(self._spread(gathered[-1]), spread):
                raise TargetError(
                    f"{name}.lora_B: expected zeros but for each slice's ranks on its own rows, got others; "
                    "load it into a plain LoraLinear"
                )
        for (A, B), own_A, own_B in zip(factors, np.split(pair.A, len(factors)), gathered, strict=True):
            assign(A, own_A)
            assign(B, own_B)
        if update.lora_bias is not None and pair.bias is not None:
            bias = [pair.bias[:0], *(pair.bias[start:stop] for start, stop in self.rows)]
            assign(update.lora_bias, np.concatenate(bias))

    def _spread(self, B: NDArray[Any]) -> NDArray[Any]:
        """Return (out, r * n), B's rows of each slice at that slice's outputs and ranks."""
        r = B.shape[1]
        spread = np.zeros((self.out_features, r * len(self.rows)), B.dtype)
        slices = zip(self.rows, _cut(B, self.rows), strict=True)
        for number, ((start, stop), own) in enumerate(slices):
            spread[start:stop, number * r : (number + 1) * r] = own
        return spread


def _factors(update: LoraUpdate) -> list[tuple[Tensor, Tensor]]:
    """Return A and B of what trains and, with B's sign changed, of what is taken away."""
    trained = (update.lora_A, update.lora_B)
    return [trained] if update.start is None else [trained, update.start]


def _cut(array: NDArray[Any], rows: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
    """Return the parts of slices that lie next to one another, of these rows' lengths."""
    ends = accumulate((stop - start for start, stop in rows), initial=0)
    return [array[start:stop] for start, stop in pairwise(ends)]
