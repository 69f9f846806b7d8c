"""The largest singular values and vectors of a difference of weights: all of a small one, some of a large.

A difference is formed in float64, exactly but for one rounding of 2^-53 in each entry. One too large for that
is kept in float32, rounded once more: that moves every singular value by at most 2^-24 of the Frobenius norm,
below what a low-rank update leaves out by orders of magnitude. Factors are float64 either way.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loracle.reference import NonFiniteError, rank_for_energy

from .pairing import row_slices

FULL_SIDE = 768
"""The smaller side up to which all singular values are computed."""

MOST_FLOAT64 = 1 << 27
"""The most entries of a difference that is kept in float64: 1 GiB."""

_OVERSAMPLING = 10
_POWER_ITERATIONS = 4
_FIRST = 16  # singular values, of a large matrix, in the search for a rank by energy
_SHARE = 3  # a randomised decomposition of more than this part of all singular values costs more than all


@dataclass(frozen=True, eq=False)
class Decomposition:
    """``D`` is nearly ``U diag(s) Vh``.

    Attributes:
        U: (out, k). s: (k,), nonincreasing. Vh: (k, in). All float64.
        energy: the sum of the squares of all singular values, ``||D||_F^2``.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    energy: float


def difference(before: NDArray[Any], after: NDArray[Any], name: str) -> Tensor:
    """Return ``after - before``, (out, in), in float64, or float32 where it is large; see the module.

    Raises:
        NonFiniteError: an entry is too large; ``name`` opens the message.
    """
    dtype = np.float64 if before.size <= MOST_FLOAT64 else np.float32
    result = np.empty(before.shape, dtype)
    for rows in row_slices(before.shape):
        with np.errstate(over="ignore"):
            result[rows] = after[rows].astype(np.float64) - before[rows].astype(np.float64)
        if not np.isfinite(result[rows]).all():
            raise NonFiniteError(f"tuned {name} - {name}: expected numbers of {dtype.__name__}; scale them")
    return torch.from_numpy(result)


def decompose(D: Tensor, k: int, seed: int) -> Decomposition:
    """Return the first k singular values and vectors, or all of them where that is as cheap.

    Large matrices are decomposed by random projection (Halko, Martinsson, Tropp 2011, as in
    ``torch.svd_lowrank``), with 10 vectors more than asked for and 4 power iterations.

    Args:
        D: (out, in), float64 or float32.
        k: from 1 to min(out, in).
        seed: of the projection.
    """
    energy = _energy(D)
    side = min(D.shape)
    if side <= FULL_SIDE or (k + _OVERSAMPLING) * _SHARE > side:
        U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
        return Decomposition(U, s, Vh, energy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, s, V = torch.svd_lowrank(D, q=k + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return Decomposition(U[:, :k].double(), s[:k].double(), V[:, :k].T.double(), energy)


def decompose_to_energy(D: Tensor, share: float, seed: int) -> tuple[Decomposition, int]:
    """Return a decomposition, and the smallest rank that keeps this share of ``||D||_F^2``; at least 1."""
    k = min(_FIRST, *D.shape)
    while True:
        found = decompose(D, k, seed)
        if len(found.s) == min(D.shape):
            return found, max(1, rank_for_energy(found.s.numpy(), share))
        kept = torch.cumsum(found.s**2, 0)
        enough = int((kept < share * found.energy).sum()) + 1
        if enough <= len(kept):
            return found, enough
        k *= 2


def factors(found: Decomposition, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of the best update of rank r, with ``scaling * B @ A``; float64.

    Column k of B and row k of A have the same norm.
    """
    root = torch.sqrt(found.s[:r] / abs(scaling))
    A = root[:, None] * found.Vh[:r]
    return A, math.copysign(1.0, scaling) * found.U[:, :r] * root


def _energy(D: Tensor) -> float:
    return math.fsum(float(D[rows].double().square().sum()) for rows in row_slices(D.shape))
