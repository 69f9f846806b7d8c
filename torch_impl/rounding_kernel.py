"""What Triton's kernels of a merge share: to read numbers of three formats, and to round an interval."""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loracle.reference.merge_proof import error_coefficients

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels call the formats."""


def plain(tensor: Tensor) -> Tensor:
    """bfloat16 as its bits: its numbers are those of float32's upper halves."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def error_numbers(r: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """`error_coefficients` of an evaluation in a dtype of torch."""
    return error_coefficients(np.dtype(np.float64 if dtype is torch.float64 else np.float32), r)


@lru_cache(maxsize=64)
def coefficients(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same in memory: numbers that are passed to a kernel, or stand in it, are float32."""
    return torch.tensor(error_numbers(r, dtype), dtype=dtype, device=device)


@triton.jit  # type: ignore[untyped-decorator]
def as_float32(stored, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers as `plain` passes them."""
    if KIND == 1:
        wide = (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = stored.to(tl.float32)
    return wide


@triton.jit  # type: ignore[untyped-decorator]
def rounded_ends(below, above, KIND: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``below`` rounded, as `plain` stores it, and where ``above`` is not rounded to the same finite number.

    Both are float64 where WIDE, else float32.
    """
    if WIDE and KIND != 0:
        below = _float32_to_odd(below)
        above = _float32_to_odd(above)
    if KIND == 1:
        # Half a unit of the last place up, then truncated: a tie may go either way, but the ends differ then.
        low_bits = below.to(tl.uint32, bitcast=True) + 0x8000
        high_bits = above.to(tl.uint32, bitcast=True) + 0x8000
        low = (low_bits >> 16).to(tl.int16)
        differ = ((low_bits ^ high_bits) >= 0x10000) | ((low_bits & 0x7F800000) == 0x7F800000)
    elif KIND == 2:
        low = below.to(tl.float16)
        low_bits = low.to(tl.int16, bitcast=True)
        high_bits = above.to(tl.float16).to(tl.int16, bitcast=True)
        differ = (low_bits != high_bits) | ((low_bits & 0x7C00) == 0x7C00)
    else:
        low = below.to(tl.float32)
        low_bits = low.to(tl.int32, bitcast=True)
        high_bits = above.to(tl.float32).to(tl.int32, bitcast=True)
        differ = (low_bits != high_bits) | ((low_bits & 0x7F800000) == 0x7F800000)
    return low, differ


@triton.jit
def _float32_to_odd(values):  # type: ignore[no-untyped-def]
    """As `rounding.round_float64` reaches 16 bits: truncated, the last bit set where something was lost."""
    nearest = values.to(tl.float32)
    widened = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    truncated = (bits - (tl.abs(widened) > tl.abs(values)).to(tl.int32)) | 1
    return tl.where(widened != values, truncated, bits).to(tl.float32, bitcast=True)
