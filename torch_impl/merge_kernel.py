"""One pass over a weight: every entry merged, with a proof that it is rounded correctly, in Triton.

Each entry of W0 is read once and each merged one written once. bfloat16 is evaluated in float32 for low
ranks, all else in float64, never on units that round their operands; e is that of
`loracle.reference.merge_proof`, of each entry's own row and column. Entries are listed for which ``v - e``
and ``v + e`` do not round to one number.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loracle.reference.merge_proof import error_coefficients

from .device_factors import DeviceFactors

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FOUND_SHARE = 1 << 6
_FOUND_LEAST = 1 << 12
_FLOAT32_RANK = 32
"""Up to which float32 is enough for bfloat16: there it leaves 0.2% of the entries at r = 16, of float16 seven
times as many, and the share grows with the rank and the size of the update."""
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def merge_all(factors: DeviceFactors, W0: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``W0 + B A``, each entry rounded once, but for those whose rounding is not proven.

    Args:
        factors: on the device, at least one.
        W0: (rows, in), float16, bfloat16 or float32, of any strides.
        merged: of its shape and dtype, is written; what lies there of entries that are not proven is any
            number.

    Returns:
        The flat indices of those, int64, in any order, and how many there are, (1,), which may be more than
        there is room for. Nothing waits for the device.
    """
    rows, columns = W0.shape
    kind = _KINDS[W0.dtype]
    wide = W0.dtype is not torch.bfloat16 or factors.r > _FLOAT32_RANK
    numbers = torch.float64 if wide else torch.float32
    room = rows * columns // _FOUND_SHARE + _FOUND_LEAST
    found = torch.empty(room, dtype=torch.int64, device=W0.device)
    count = torch.zeros(1, dtype=torch.int32, device=W0.device)
    if not rows * columns:
        return found, count
    block_rows, block_columns = (32, 128) if wide else (64, 128)
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))
    _merge[grid](
        _plain(W0),
        factors.A.to(numbers),
        factors.B.to(numbers).t().contiguous(),
        factors.row_norms.to(numbers),
        factors.column_norms.to(numbers),
        _coefficients(factors.r, numbers, W0.device),
        _plain(merged),
        found,
        count,
        rows,
        columns,
        W0.stride(0),
        W0.stride(1),
        merged.stride(0),
        merged.stride(1),
        room,
        R=factors.r,
        KIND=kind,
        WIDE=wide,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=8,
    )
    return found, count


@lru_cache(maxsize=64)
def _coefficients(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """In memory: numbers that are passed to a kernel, or stand in it, are float32."""
    work = _FLOAT64 if dtype is torch.float64 else _FLOAT32
    return torch.tensor(error_coefficients(work, r), dtype=dtype, device=device)


def _plain(tensor: Tensor) -> Tensor:
    """bfloat16 as its bits: its numbers are those of float32's upper halves."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


@triton.jit
def _float32_to_odd(values):  # type: ignore[no-untyped-def]
    """As `rounding.round_float64` reaches 16 bits: truncated, the last bit set where something was lost."""
    nearest = values.to(tl.float32)
    widened = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    truncated = (bits - (tl.abs(widened) > tl.abs(values)).to(tl.int32)) | 1
    return tl.where(widened != values, truncated, bits).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    W0,
    A,
    Bt,
    row_norms,
    column_norms,
    coefficients,
    merged,
    found,
    count,
    rows,
    columns,
    W0_row,
    W0_column,
    merged_row,
    merged_column,
    room,
    R: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    work = tl.float64 if WIDE else tl.float32
    i = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)[None, :]
    inside = (i < rows) & (j < columns)
    value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), work)
    for k in range(R):
        b = tl.load(Bt + k * rows + i, mask=i < rows, other=0.0)
        a = tl.load(A + k * columns + j, mask=j < columns, other=0.0)
        value += b * a
    stored = tl.load(W0 + i * W0_row + j * W0_column, mask=inside, other=0)
    if KIND == 1:
        w = (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        value += w.to(work)
    else:
        value += stored.to(work)
    row_norm = tl.load(row_norms + i, mask=i < rows, other=0.0)
    column_norm = tl.load(column_norms + j, mask=j < columns, other=0.0)
    e = tl.load(coefficients) * tl.abs(value) + tl.load(coefficients + 1) * (row_norm * column_norm)
    e += tl.load(coefficients + 2) * (row_norm + column_norm + 2)
    below = value - e
    above = value + e
    if WIDE and KIND != 0:
        below = _float32_to_odd(below)
        above = _float32_to_odd(above)
    if KIND == 1:
        # Half a unit of the last place up, then truncated: a tie may go either way, but the ends differ then.
        low = ((below.to(tl.uint32, bitcast=True) + 0x8000) >> 16).to(tl.int16)
        high = ((above.to(tl.uint32, bitcast=True) + 0x8000) >> 16).to(tl.int16)
        same = (low == high) & (((low >> 7) & 0xFF) != 0xFF)
    elif KIND == 2:
        low = below.to(tl.float16)
        low_bits = low.to(tl.int16, bitcast=True)
        high_bits = above.to(tl.float16).to(tl.int16, bitcast=True)
        same = (low_bits == high_bits) & (((low_bits >> 10) & 0x1F) != 0x1F)
    else:
        low = below.to(tl.float32)
        low_bits = low.to(tl.int32, bitcast=True)
        high_bits = above.to(tl.float32).to(tl.int32, bitcast=True)
        same = (low_bits == high_bits) & (((low_bits >> 23) & 0xFF) != 0xFF)
    tl.store(merged + i * merged_row + j * merged_column, low, mask=inside)
    left = (inside & ~same).to(tl.int32)
    own = tl.sum(tl.sum(left, axis=1), axis=0)
    if own > 0:
        flat = tl.reshape(left, (BLOCK_ROWS * BLOCK_COLUMNS,))
        place = tl.atomic_add(count, own) + tl.cumsum(flat, axis=0) - 1
        index = tl.reshape(i * columns + j, (BLOCK_ROWS * BLOCK_COLUMNS,))
        tl.store(found + place, index, mask=(flat != 0) & (place < room))
