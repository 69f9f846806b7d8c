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
_MARKED_SHARE = 4
"""Where more than one of so many bytes of marks is not zero, all entries are evaluated anew: their indices
would take more memory than the weight."""
_FLOAT64 = np.dtype(np.float64)


def merges_on_device(W0: Tensor, updates: Sequence[LoraUpdate]) -> bool:
    """Whether a weight, (out, in), is merged with updates where it lies: on CUDA, with plain products."""
    return (
        W0.is_cuda
        and W0.dtype in BITS
        and not isinstance(W0, DTensor)
        and all(update.is_product and update.lora_A.is_cuda for update in updates)
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A range of rows on its way.

    Attributes:
        factors: of its update.
        W0, merged: (rows, in); the second is written.
        marks: of entries that are not proven, as `merge_kernel.merge_all` returns them; None where nothing is
            written yet.
    """

    factors: DeviceFactors
    W0: Tensor
    merged: Tensor
    marks: Tensor | None


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
    if not factors.r or not has_triton(W0.device):
        return _Part(factors, W0, merged, None)
    from .merge_kernel import merge_all

    return _Part(factors, W0, merged, merge_all(factors, W0, merged))


def _finish(part: _Part) -> bool:
    """Run the other stages; return whether all numbers are finite."""
    if not part.factors.r:
        return bool(part.W0.isfinite().all())
    if part.marks is not None:
        groups = torch.nonzero(part.marks)
        if len(groups) * _MARKED_SHARE <= part.marks.numel():
            return _settle(part, _marked(part.marks, groups, part.merged.shape[1]))
    return all(_settle(part, found) for found in _tiles_in_float64(part))


def _marked(marks: Tensor, groups: Tensor, columns: int) -> Tensor:
    """Return the flat indices of the entries that are marked, of bytes at ``groups``, (n, 2)."""
    i, group = groups.unbind(1)
    bits = torch.arange(8, dtype=torch.uint8, device=marks.device)
    at, bit = torch.nonzero((marks[i, group, None] >> bits) & 1, as_tuple=True)
    return i[at] * columns + group[at] * 8 + bit


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
        left = some[_prove(part, some)]
        if len(left) and not _merge_on_host(part, left // columns, left % columns):
            return False
    return True


def _prove(part: _Part, found: Tensor) -> Tensor:
    """Write the entries at flat indices in float64; return where they are not proven."""
    factors, W0, merged = part.factors, part.W0, part.merged
    if len(found) and has_triton(W0.device):
        from .prove_kernel import prove

        return prove(factors, W0, merged, found)
    i, j = found // max(1, W0.shape[1]), found % max(1, W0.shape[1])
    b, a, stored = factors.B[i], factors.A[:, j].t(), W0[i, j]
    w = stored.double()
    value = w + (b * a).sum(1)
    low, high = _ends(value, _error(factors, value, factors.row_norms[i], factors.column_norms[j]), W0.dtype)
    # An update of exactly zero keeps W0's number, the sign of a zero with it.
    finite = w.isfinite() & b.isfinite().all(1) & a.isfinite().all(1)
    zero = ((b == 0) | (a == 0)).all(1) & finite
    merged[i, j] = torch.where(zero, stored, low)
    return ~(zero | _same(low, high))


def _merge_on_host(part: _Part, i: Tensor, j: Tensor) -> bool:
    """Write single entries by the reference; return whether all are finite."""
    if not all(t.isfinite().all() for t in (part.W0[i, j], part.factors.B[i], part.factors.A[:, j])):
        return False
    w, factors = array_of(part.W0[i, j]), part.factors.of_entries(i, j)
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
