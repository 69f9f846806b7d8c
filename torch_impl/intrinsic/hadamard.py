"""The Walsh-Hadamard transform in torch."""

from functools import lru_cache

import torch
from torch import Tensor

from loracle.reference import ShapeError

_BITS = 6
"""Of the largest matrix of signs: a product with 64 rows costs less than six passes over the memory."""


def walsh_hadamard(values: Tensor) -> Tensor:
    """Return ``H x`` for each x along the last axis, as `loracle.reference.walsh_hadamard` defines it.

    H is the Kronecker product of smaller ones: the axis is seen as several, and each is multiplied by its
    own. O(L log L) operations for a last axis of L; sums of integers below 2^24 are exact in float32.

    Args:
        values: (..., L), floating-point, L a power of two; it is left alone.

    Raises:
        ShapeError: the length is no power of two.
    """
    length = values.shape[-1]
    if length < 1 or length & (length - 1):
        raise ShapeError(f"values: expected a last axis of a power of two, got {length}; pad it with zeros")
    result, rest = values.reshape(-1, length), length
    for radix in factors(length):
        rest //= radix
        H = _signs(radix, values.dtype, values.device)
        if rest > 1:
            view = result.view(-1, radix, rest)
            result = torch.bmm(H.expand(len(view), radix, radix), view)
        else:
            result = result.view(-1, radix) @ H
    return result.reshape(values.shape)


def factors(length: int) -> list[int]:
    """Return powers of two whose product is ``length``, none above 64, as equal as can be."""
    bits = length.bit_length() - 1
    count = -(-bits // _BITS)
    return [1 << (bits // count + (at < bits % count)) for at in range(count)]


@lru_cache(maxsize=64)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H, (size, size)."""
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H
