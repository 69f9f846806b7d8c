"""float64 tensors rounded to nearest, ties to even, exactly once; on any device."""

import torch
from torch import Tensor

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""The integers of each format's width."""


def round_float64(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 numbers rounded once to float16, bfloat16 or float32; the same shape.

    A conversion of torch to 16 bits passes through float32 and rounds twice; here the step to float32 is to
    odd, which no second rounding can see. Overflows are infinities. See `loracle.reference.rounding`.
    """
    if dtype is torch.float32:
        return values.to(dtype)
    return _float32_to_odd(values).to(dtype)


def _float32_to_odd(values: Tensor) -> Tensor:
    """Return the numbers truncated to float32, with the last bit set where something was lost."""
    nearest = values.to(torch.float32)
    widened, bits = nearest.double(), nearest.view(torch.int32)
    inexact = widened != values
    # Truncation is one step towards zero where rounding went away from it; infinities of an overflow become
    # the largest finite number, which is odd.
    truncated = bits - (widened.abs() > values.abs()).to(torch.int32)
    return torch.where(inexact, truncated | 1, bits).view(torch.float32)
