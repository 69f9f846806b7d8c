"""Whether what a weight differs by is a low-rank update, or rounding and other noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_HELD = 0.9
"""Of independent errors of one size the first quarter of the singular values hold about half of the energy,
in a square matrix, and less in others (Marchenko and Pastur); of an update of low rank, all but noise."""

_NOISE = 1.5
"""The largest singular value of independent errors is about their largest row's norm plus their largest
column's (Bandeira and van Handel, Ann. Probab. 44, 2016)."""


@dataclass(frozen=True)
class LowRankPart:
    """An update of low rank.

    Attributes:
        rank: its directions; where noise lies over them, those that stand out.
        whole: whether it is all that there is, but for a little noise.
    """

    rank: int
    whole: bool

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.whole else f"rank {self.rank} or more"


def low_rank_part(difference: NDArray[np.float64]) -> LowRankPart | None:
    """The low-rank update in a difference, (rows, ...); None where none stands out from noise.

    Rows and columns are scaled to one size first, which keeps the rank, so that errors in proportion to
    weights of different sizes are not taken for one.
    """
    if difference.ndim < 2 or min(len(difference), difference[0].size) < 2:
        return None
    matrix = difference.reshape(len(difference), -1)
    size = np.abs(matrix).max()
    if not np.isfinite(size) or size == 0:
        return None
    matrix = _equilibrated(_equilibrated(matrix / size).T)
    values = np.linalg.svd(matrix, compute_uv=False)
    energies = values**2
    few = max(1, len(values) // 4)
    if energies[:few].sum() >= _HELD * energies.sum():
        ratios = values[: len(values) // 2] / np.maximum(values[1 : len(values) // 2 + 1], values[0] * 1e-12)
        rank = int(ratios.argmax()) + 1
        # A few entries fit any matrix of as many degrees of freedom.
        return LowRankPart(rank, True) if np.count_nonzero(matrix) > rank * sum(matrix.shape) else None
    edge = _NOISE * (np.linalg.norm(matrix, axis=1).max() + np.linalg.norm(matrix, axis=0).max())
    out = int(np.count_nonzero(values > edge))
    return LowRankPart(out, False) if out else None


def _equilibrated(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix with rows of norm 1, those of zeros left alone."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = matrix / np.where(norms > 0, norms, 1.0)
    return scaled
