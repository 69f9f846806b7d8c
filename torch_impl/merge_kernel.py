"""One pass over a weight: every entry merged, with a proof that it is rounded correctly, in Triton.

Each entry of W0 is read once and each merged one written once. bfloat16 is evaluated in float32 for low
ranks, all else in float64, never on units that round their operands; e is that of
`loracle.reference.merge_proof`, of each entry's own row and column. Entries for which ``v - e`` and ``v + e``
do not round to one number are marked, in a bit each: to list them would take longer than to merge them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .device_factors import DeviceFactors
from .rounding_kernel import KINDS, as_float32, coefficients, error_numbers, plain, rounded_ends
from .triton_kernels import launching_at

_FLOAT32_RANK = 32
"""Up to which float32 is enough for bfloat16: there it leaves 0.2% of the entries at r = 16, of float16 seven
times as many, and the share grows with the rank and the size of the update."""
_STEP = 16
"""Components whose loads are issued together."""


def merge_all(factors: DeviceFactors, W0: Tensor, merged: Tensor) -> Tensor:
    """Write ``W0 + B A``, each entry rounded once, but for those whose rounding is not proven.

    Args:
        factors: on the device, at least one.
        W0: (rows, in), float16, bfloat16 or float32, of any strides.
        merged: of its shape and dtype, is written; what lies there of entries that are not proven is any
            number.

    Returns:
        Marks of those, (rows, in / 8) uint8, rounded up: bit n of byte g is entry 8 g + n of the row. Nothing
        waits for the device.
    """
    rows, columns = W0.shape
    marks = torch.empty(rows, triton.cdiv(columns, 8), dtype=torch.uint8, device=W0.device)
    if not rows * columns:
        return marks
    wide = W0.dtype is not torch.bfloat16 or factors.r > _FLOAT32_RANK
    numbers = torch.float64 if wide else torch.float32
    step = min(factors.r, _STEP)
    missing = -factors.r % step
    A, Bt = factors.A.to(numbers), factors.B.t().to(numbers)
    if missing:
        A, Bt = (nn.functional.pad(factor, (0, 0, 0, missing)) for factor in (A, Bt))
    _, of_product, of_sum = error_numbers(factors.r, numbers)
    column_norms = factors.column_norms.to(numbers)
    block_rows, block_columns = block_of(wide)
    with launching_at(W0):
        _merge[triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)](
            plain(W0),
            A.contiguous(),
            Bt.contiguous(),
            factors.row_norms.to(numbers),
            of_product * column_norms + of_sum,
            of_sum * (column_norms + 2),
            coefficients(factors.r, numbers, W0.device),
            plain(merged),
            marks,
            rows,
            columns,
            W0.stride(0),
            W0.stride(1),
            merged.stride(0),
            merged.stride(1),
            R=factors.r + missing,
            STEP=step,
            KIND=KINDS[W0.dtype],
            WIDE=wide,
            WHOLE=rows % block_rows == 0 and columns % block_columns == 0,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return marks


def block_of(wide: bool) -> tuple[int, int]:
    """Rows and columns that a program merges, in float64 where wide."""
    return (32 if wide else 64), 64


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    W0,
    A,
    Bt,
    row_norms,
    slopes,
    offsets,
    error,
    merged,
    marks,
    rows,
    columns,
    W0_row,
    W0_column,
    merged_row,
    merged_column,
    R: tl.constexpr,
    STEP: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    work = tl.float64 if WIDE else tl.float32
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    # Masks cost as much as what they guard: none where all blocks are whole.
    in_rows = (i >= 0) if WHOLE else (i < rows)
    in_columns = (j >= 0) if WHOLE else (j < columns)
    inside = in_rows[:, None] & in_columns[None, :]
    row = i.to(tl.int64)[:, None]
    column = j.to(tl.int64)[None, :]
    stored = tl.load(W0 + row * W0_row + column * W0_column, mask=inside, other=0)
    value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), work)
    for first in range(0, R, STEP):
        for k in tl.static_range(STEP):
            b = tl.load(Bt + (first + k) * rows + i, mask=in_rows, other=0.0)
            a = tl.load(A + (first + k) * columns + j, mask=in_columns, other=0.0)
            value += b[:, None] * a[None, :]
    value += as_float32(stored, KIND).to(work)
    row_norm = tl.load(row_norms + i, mask=in_rows, other=0.0)
    slope = tl.load(slopes + j, mask=in_columns, other=0.0)
    offset = tl.load(offsets + j, mask=in_columns, other=0.0)
    # The terms of e in another order, which the room in them is enough for as well.
    e = tl.load(error) * tl.abs(value) + (row_norm[:, None] * slope[None, :] + offset[None, :])
    low, open_entry = rounded_ends(value - e, value + e, KIND, WIDE)
    tl.store(merged + row * merged_row + column * merged_column, low, mask=inside)
    if not WHOLE:
        open_entry = open_entry & inside
    bits = open_entry.to(tl.int32) << (j[None, :] & 7)
    packed = tl.sum(tl.reshape(bits, (BLOCK_ROWS, BLOCK_COLUMNS // 8, 8)), axis=2)
    width = tl.cdiv(columns, 8)
    group = tl.program_id(1) * (BLOCK_COLUMNS // 8) + tl.arange(0, BLOCK_COLUMNS // 8)
    place = marks + row * width + group[None, :]
    tl.store(place, packed.to(tl.uint8), mask=in_rows[:, None] & (group < width)[None, :])
