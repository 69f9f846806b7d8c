"""The merge of a weight where it lies: the numbers of `loracle.reference.merge_adapters`, bit for bit.

In stages, each for the entries that the one before did not prove right, as in
`loracle.reference.merge_proof`: all entries, in one pass of a kernel where Triton is, else in float64; single
entries in float64; and the few that are left, ties and the like, on the host by the reference. Each stage
gives the correct rounding or none, so which of them an entry goes through cannot be seen in the result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loracle.reference import merge_adapters
from loracle.reference.formats import float_format
from loracle.reference.merge_proof import error_coefficients
from loracle.reference.single_entries import single_entries

from .arrays import array_of, tensor_of
from .device_factors import DeviceFactors, DeviceLowRank, device_ranges
from .rounding import BITS, round_float64
from .triton_kernels import has_triton
from .update import LoraUpdate

_TILE_ENTRIES = 1 << 22
_PRODUCTS_AT_ONCE = 1 << 24
_FLOAT64 = np.dtype(np.float64)


def merges_on_device(W0: Tensor, updates: Sequence[LoraUpdate]) -> bool:
    """Whether a weight, (out, in), is merged with updates where it lies: on CUDA, with plain products."""
    return (
        W0.is_cuda
        and W0.dtype in BITS
        and not isinstance(W0, DTensor)
        and all(
            update.lora_magnitude_vector is None and update.lora_bias is None and update.lora_A.is_cuda
            for update in updates
        )
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A range of rows on its way.

    Attributes:
        factors: of its update.
        W0, merged: (rows, in); the second is written.
        found: flat indices of entries that are not proven, in any order; None where nothing is written yet.
        count: of them, which may be more than ``found`` holds, and whether all operands are finite; (2,),
            int64.
    """

    factors: DeviceFactors
    W0: Tensor
    merged: Tensor
    found: Tensor | None
    count: Tensor


class DeviceMerge:
    """A merge that has been started; what it launched on the device runs while others are started.

    Args:
        W0: (out, in), or (in, out) with ``fan_in_fan_out``; float16, bfloat16 or float32.
        adapters: on its device, of shapes that fit it.
        fan_in_fan_out: how W0 is stored.
        name: what to call W0 in error messages.
    """

    def __init__(
        self, W0: Tensor, adapters: Sequence[DeviceLowRank], *, fan_in_fan_out: bool = False, name: str = "W0"
    ) -> None:
        self._W0, self._adapters = W0.detach(), tuple(adapters)
        self._transposed, self._name = fan_in_fan_out, name
        self._merged = torch.empty_like(self._W0)
        W, merged = (t.t() if fan_in_fan_out else t for t in (self._W0, self._merged))
        ranges = device_ranges((W.shape[0], W.shape[1]), self._adapters, W.device)
        self._parts = [_start(factors, W[rows], merged[rows]) for rows, factors in ranges]

    def result(self) -> Tensor:
        """Return the merged weight, stored as W0 is.

        Raises:
            NonFiniteError: NaN or infinity in an operand, or a merged number too large for the dtype.
        """
        if all(_finish(part) for part in self._parts):
            return self._merged
        # The reference names the operand or the entry.
        adapters = [adapter.to_host() for adapter in self._adapters]
        array = merge_adapters(
            array_of(self._W0), adapters, fan_in_fan_out=self._transposed, name=self._name
        )  # fmt: skip
        return tensor_of(array).to(self._W0.device)


def _start(factors: DeviceFactors, W0: Tensor, merged: Tensor) -> _Part:
    """Launch the first stage, where it is one kernel."""
    if not factors.r:
        merged.copy_(W0)
        nothing = torch.empty(0, dtype=torch.int64, device=W0.device)
        return _Part(factors, W0, merged, nothing, torch.stack([nothing.sum(), W0.isfinite().all().long()]))
    if not has_triton(W0.device):
        return _Part(factors, W0, merged, None, factors.finite().long().expand(2))
    from .merge_kernel import merge_all

    found, count = merge_all(factors, W0, merged)
    return _Part(factors, W0, merged, found, torch.stack([count.view(()).long(), factors.finite().long()]))


def _finish(part: _Part) -> bool:
    """Run the other stages; return whether all numbers are finite."""
    count, finite = part.count.tolist()
    if not finite:
        return False
    found = part.found
    if found is None or count > len(found):
        left = [_settle(part, found) for found in _tiles_in_float64(part)]
    else:
        left = [_settle(part, found[:count])]
    return all(left)


def _tiles_in_float64(part: _Part) -> Iterator[Tensor]:
    """Write all entries, a few rows at a time; yield the flat indices of those that are not proven."""
    rows, columns = part.merged.shape
    step = max(1, _TILE_ENTRIES // max(1, columns))
    for start in range(0, rows, step):
        own = slice(start, min(start + step, rows))
        factors, merged = part.factors, part.merged[own]
        value = torch.addmm(part.W0[own].double(), factors.B[own], factors.A)
        e = _error(factors, value, factors.row_norms[own, None], factors.column_norms)
        low, high = _ends(value, e, merged.dtype)
        merged.copy_(low)
        yield torch.nonzero(~_same(low, high).view(-1)).view(-1) + start * columns


def _settle(part: _Part, found: Tensor) -> bool:
    """Write the entries at flat indices; return whether all are finite."""
    columns = max(1, part.merged.shape[1])
    step = max(1, _PRODUCTS_AT_ONCE // max(1, part.factors.r))
    for some in torch.split(found, step):
        i, j = some // columns, some % columns
        left = _prove(part, i, j)
        if len(left) and not _merge_on_host(part, i[left], j[left]):
            return False
    return True


def _prove(part: _Part, i: Tensor, j: Tensor) -> Tensor:
    """Write single entries in float64; return which of them are not proven."""
    factors, W0 = part.factors, part.W0[i, j]
    b, a, w = factors.B[i], factors.A[:, j].t(), W0.double()
    value = w + (b * a).sum(1)
    low, high = _ends(value, _error(factors, value, factors.row_norms[i], factors.column_norms[j]), W0.dtype)
    # An update of exactly zero keeps W0's number, the sign of a zero with it.
    zero = ((b == 0) | (a == 0)).all(1) & w.isfinite()
    part.merged[i, j] = torch.where(zero, W0, low)
    return torch.nonzero(~(zero | _same(low, high))).view(-1)


def _merge_on_host(part: _Part, i: Tensor, j: Tensor) -> bool:
    """Write single entries by the reference; return whether all are finite."""
    w, factors = array_of(part.W0[i, j]), part.factors.of_entries(i, j)
    if not np.isfinite(w.astype(np.float64)).all():
        return False
    own = np.arange(len(w))
    target = float_format(w.dtype)
    entries = single_entries(factors, np.broadcast_to(w[:, None], (len(w), len(w))), own, own, target)
    part.merged[i, j] = tensor_of(entries).to(part.merged.device)
    return bool(np.isfinite(entries.astype(np.float64)).all())


def _error(factors: DeviceFactors, value: Tensor, row_norms: Tensor, column_norms: Tensor) -> Tensor:
    """Return e of entries that were evaluated in float64; see `loracle.reference.merge_proof`."""
    relative, of_product, of_sum = error_coefficients(_FLOAT64, factors.r)
    e = value.abs().mul_(relative)
    e += of_product * (row_norms * column_norms)
    e += of_sum * (row_norms + column_norms + 2)
    return e


def _ends(value: Tensor, e: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return round_float64(value - e, dtype), round_float64(value + e, dtype)


def _same(low: Tensor, high: Tensor) -> Tensor:
    """Return where both ends were rounded to the same finite number."""
    bits = BITS[low.dtype]
    return (low.view(bits) == high.view(bits)) & low.isfinite()
