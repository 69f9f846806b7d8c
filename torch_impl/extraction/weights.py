"""One weight's update: the factors that are written, and what they miss."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loracle.files import LoraPair

from .decomposition import Decomposition, factors
from .lattice import integer_factors
from .nudging import nudged
from .refinement import refine, roundings_explain
from .residual import residual, unequal_entries
from .summary import ExtractedTensor


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that differs, (out, in) whatever way it is stored.

    Attributes:
        name: of the base's tensor.
        before, after: the base's and the tuned one.
        stored: the shape in the checkpoint.
    """

    name: str
    before: NDArray[Any]
    after: NDArray[Any]
    stored: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Written:
    """Factors in the dtype that they are written in, and how many merged entries are not the tuned ones."""

    A: NDArray[Any]
    B: NDArray[Any]
    unequal: int
    steps: int | None = None


def fit(
    weight: Weight, D: Tensor, found: Decomposition, r: int, scaling: float, *, narrow: bool, seed: int
) -> tuple[LoraPair, ExtractedTensor]:
    """Return the pair of rank r that is nearest to the difference, and what it misses.

    Where the difference is of rank r but for the roundings of the tuned weight, the factors are chosen among
    those that merge to it bit for bit, if some are found: in float64, where float32 cannot hold them.

    Args:
        weight: that differs.
        D: its difference.
        found: at least r singular values and vectors of D.
        r: from 1 to min(out, in).
        scaling: not 0.
        narrow: whether factors have to be float32, and only those of the singular vectors are tried.
        seed: of the estimate of the spectral norm.
    """
    written = _written(weight, D, found, r, scaling, narrow=narrow)
    A, B = (torch.from_numpy(own.astype(np.float64)) for own in (written.A, written.B))
    missed = residual(D, A, B, scaling, seed)
    size = found.energy**0.5
    report = ExtractedTensor(
        name=weight.name,
        shape=weight.stored,
        r=r,
        dtype=str(written.A.dtype),
        frobenius=size,
        frobenius_residual=missed.frobenius,
        relative_residual=missed.frobenius / size if size else 0.0,
        spectral_residual=missed.spectral,
        unequal=written.unequal,
        entries=weight.before.size,
        refinements=written.steps,
    )
    return LoraPair(written.A, written.B, scaling), report


def left_out(weight: Weight, D: Tensor, seed: int) -> ExtractedTensor:
    """Return what is missed of a weight that gets no update: all."""
    A, B = torch.zeros(1, D.shape[1], dtype=torch.float64), torch.zeros(D.shape[0], 1, dtype=torch.float64)
    missed = residual(D, A, B, 1.0, seed)
    return ExtractedTensor(
        name=weight.name,
        shape=weight.stored,
        r=0,
        dtype=None,
        frobenius=missed.frobenius,
        frobenius_residual=missed.frobenius,
        relative_residual=1.0,
        spectral_residual=missed.spectral,
        unequal=unequal_entries(weight.before, weight.after, A.numpy(), B.numpy(), 1.0, weight.name),
        entries=weight.before.size,
    )


def _written(
    weight: Weight, D: Tensor, found: Decomposition, r: int, scaling: float, *, narrow: bool
) -> _Written:
    """Return the factors to write: of the singular vectors, unless others merge to the tuned weight."""

    def rounded(A: NDArray[Any], B: NDArray[Any], steps: int | None = None) -> _Written:
        """Round to float32."""
        return judged(A.astype(np.float32), B.astype(np.float32), steps)

    def judged(A: NDArray[Any], B: NDArray[Any], steps: int | None = None) -> _Written:
        unequal = unequal_entries(weight.before, weight.after, A, B, scaling, weight.name)
        return _Written(A, B, unequal, steps)

    A, B = factors(found, r, scaling)
    plain = rounded(A.numpy(), B.numpy())
    if plain.unequal == 0 or narrow or not roundings_explain(weight.before, weight.after, A, B * scaling):
        return plain
    candidates = [plain, judged(A.numpy(), B.numpy())]
    whole = integer_factors(D.numpy().astype(np.float64), r)
    if whole is not None:
        candidates.append(rounded(whole[0] / scaling, whole[1]))
        if candidates[-1].unequal == 0:
            return candidates[-1]
    refined = refine(weight.before, weight.after, found, r, scaling)
    A_near, B_near, steps = refined.A.numpy(), refined.B.numpy(), refined.steps
    candidates.append(rounded(A_near, B_near, steps))
    if candidates[-1].unequal:
        candidates.append(judged(A_near, B_near, steps))
    if candidates[-1].unequal:
        B_near = nudged(weight.before, weight.after, A_near, B_near, scaling)
        candidates.append(judged(A_near, B_near, steps))
    if candidates[-1].unequal and whole is not None:
        candidates.append(judged(whole[0] / scaling, whole[1]))
    best = min(candidates, key=lambda written: written.unequal)
    return replace(best, steps=refined.steps)
