"""Single entries of a merge in float64, with the same proof as for all, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_factors import DeviceFactors
from .rounding_kernel import KINDS, as_float32, coefficients, plain, rounded_ends
from .triton_kernels import launching_at

_BLOCK = 128


def prove(factors: DeviceFactors, W0: Tensor, merged: Tensor, found: Tensor) -> Tensor:
    """Write entries of ``W0 + B A``, each rounded once, but for those whose rounding is not proven.

    An update of exactly zero keeps W0's number, the sign of a zero with it.

    Args:
        factors: on the device.
        W0: (rows, in), float16, bfloat16 or float32, of any strides.
        merged: of its shape and dtype, is written at the entries.
        found: (n,) int64, flat indices of at least one entry.

    Returns:
        (n,) bool, which of them are not proven: what was written there is any number.
    """
    left = torch.empty(len(found), dtype=torch.bool, device=W0.device)
    A, B = factors.A, factors.B
    with launching_at(W0):
        _prove[(triton.cdiv(len(found), _BLOCK),)](
            plain(W0),
            A,
            B,
            factors.row_norms,
            factors.column_norms,
            coefficients(factors.r, torch.float64, W0.device),
            plain(merged),
            found,
            left,
            len(found),
            W0.shape[1],
            W0.stride(0),
            W0.stride(1),
            merged.stride(0),
            merged.stride(1),
            A.stride(0),
            A.stride(1),
            B.stride(0),
            B.stride(1),
            factors.r,
            KIND=KINDS[W0.dtype],
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return left


@triton.jit  # type: ignore[untyped-decorator]
def _prove(  # type: ignore[no-untyped-def]
    W0,
    A,
    B,
    row_norms,
    column_norms,
    error,
    merged,
    found,
    left,
    count,
    columns,
    W0_row,
    W0_column,
    merged_row,
    merged_column,
    A_row,
    A_column,
    B_row,
    B_column,
    r,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    flat = tl.load(found + n, mask=inside, other=0)
    i = flat // columns
    j = flat % columns
    stored = tl.load(W0 + i * W0_row + j * W0_column, mask=inside, other=0)
    w = as_float32(stored, KIND).to(tl.float64)
    value = w
    # 0, or NaN where an operand is not finite.
    spoilt = w - w
    updated = n < 0
    for k in range(r):
        b = tl.load(B + i * B_row + k * B_column, mask=inside, other=0.0)
        a = tl.load(A + k * A_row + j * A_column, mask=inside, other=0.0)
        value += b * a
        spoilt += (b - b) + (a - a)
        updated = updated | ((b != 0) & (a != 0))
    row_norm = tl.load(row_norms + i, mask=inside, other=0.0)
    column_norm = tl.load(column_norms + j, mask=inside, other=0.0)
    e = tl.load(error) * tl.abs(value) + tl.load(error + 1) * (row_norm * column_norm)
    e += tl.load(error + 2) * (row_norm + column_norm + 2)
    low, differ = rounded_ends(value - e, value + e, KIND, True)
    kept = (spoilt == 0) & (updated == 0)
    tl.store(merged + i * merged_row + j * merged_column, tl.where(kept, stored, low), mask=inside)
    tl.store(left + n, differ & (kept == 0), mask=inside)
