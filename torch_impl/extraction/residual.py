"""What factors, as they are written, miss of a difference of weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loracle.reference import merge

from .pairing import row_slices

_ITERATIONS = 40
_SETTLED = 1e-3


@dataclass(frozen=True)
class Residual:
    """``D - scaling * B @ A``: its norms.

    Attributes:
        frobenius: the norm, in float64.
        spectral: an estimate of the largest singular value by power iteration: a lower bound, but for
            roundings.
    """

    frobenius: float
    spectral: float


def residual(D: Tensor, A: Tensor, B: Tensor, scaling: float, seed: int) -> Residual:
    """Return the norms of ``D - scaling * B @ A``.

    Args:
        D: (out, in). A: (r, in) and B: (out, r), float64, with the values that are written.
        seed: of the vector that the power iteration starts from.
    """
    left = B * scaling
    total = sum(float((D[rows].double() - left[rows] @ A).square().sum()) for rows in row_slices(D.shape))
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(D.shape[1], generator=generator, dtype=torch.float64)
    largest = 0.0
    for _ in range(_ITERATIONS):
        if not v.any():
            break
        v = v / v.norm()
        u = torch.cat([D[rows].double() @ v - left[rows] @ (A @ v) for rows in row_slices(D.shape)])
        size = float(u.norm())
        settled = abs(size - largest) <= _SETTLED * size
        largest = max(size, largest)
        if settled:
            break
        v = -A.T @ (left.T @ u)
        for rows in row_slices(D.shape):
            v = v + D[rows].double().T @ u[rows]
    # of roundings alone the estimate is larger than what it estimates
    return Residual(total**0.5, min(largest, total**0.5))


def unequal_entries(
    before: NDArray[Any], after: NDArray[Any], A: NDArray[Any], B: NDArray[Any], scaling: float, name: str
) -> int:
    """Return how many entries of the correctly rounded merge are not those of ``after``, bit for bit.

    Args:
        before, after: (out, in). The merge has the dtype of ``before``; ``after`` of another is compared by
            its values.
        A: (r, in). B: (out, r).
        name: what to call the weight in error messages.
    """
    found = 0
    for rows in row_slices(before.shape):
        merged, expected = merge(before[rows], A, B[rows], scaling, name=name), after[rows]
        if merged.dtype == expected.dtype:
            bits = np.dtype(f"u{merged.dtype.itemsize}")
            merged, expected = (
                np.ascontiguousarray(merged).view(bits),
                np.ascontiguousarray(expected).view(bits),
            )
        found += int((merged != expected).sum())
    return found
