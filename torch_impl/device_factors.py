"""The low-rank factors of a merge on a device, and how far from exact products of them may be."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loracle.reference import LowRank
from loracle.reference.factors import Factors, cut_rows

from .arrays import array_of


@dataclass(frozen=True, eq=False)
class DeviceLowRank:
    """`loracle.reference.LowRank` with tensors: ``scaling * B @ A``, added to some rows of a weight.

    Attributes:
        A: (r, in); B: (rows, r).
        scaling: float64, taken as exact.
        rows: start and stop, all where None.
    """

    A: Tensor
    B: Tensor
    scaling: float
    rows: tuple[int, int] | None = None

    def to_host(self) -> LowRank:
        """Return the same on the host."""
        rows = None if self.rows is None else slice(*self.rows)
        return LowRank(array_of(self.A), array_of(self.B), self.scaling, rows=rows)


class DeviceFactors:
    """``sum_g scaling_g * B_g @ A_g``: what is added to a range of rows of a weight.

    Args:
        adapters: (A, B, scaling) of each, B with the range's rows alone.
        shape: (rows, in) of the range.
        device: of the tensors.
    """

    def __init__(
        self, adapters: Sequence[tuple[Tensor, Tensor, float]], shape: tuple[int, int], device: torch.device
    ) -> None:
        self._groups = tuple((A.detach(), B.detach(), scaling) for A, B, scaling in adapters)
        rows, columns = shape
        As = [torch.empty(0, columns, dtype=torch.float64, device=device)]
        Bs = [torch.empty(rows, 0, dtype=torch.float64, device=device)]
        for A, B, scaling in self._groups:
            As.append(A.double())
            Bs.append(B.double() * scaling)
        self.A: Tensor = torch.cat(As)
        """(r, in), float64: all A, one below the other."""
        self.B: Tensor = torch.cat(Bs, dim=1)
        """(rows, r), float64: all B times their scalings, side by side."""

    @property
    def r(self) -> int:
        """The sum of the ranks."""
        return int(self.A.shape[0])

    @cached_property
    def row_norms(self) -> Tensor:
        """(rows,), at least the Euclidean norms of B's rows."""
        return _norm_bound(self.B, dim=1)

    @cached_property
    def column_norms(self) -> Tensor:
        """(in,), at least the Euclidean norms of A's columns."""
        return _norm_bound(self.A, dim=0)

    def of_entries(self, i: Tensor, j: Tensor) -> Factors:
        """Return those of single entries on the host: row and column n of their update are i[n] and j[n]."""
        groups = tuple((array_of(A[:, j]), array_of(B[i]), scaling) for A, B, scaling in self._groups)
        return Factors(0, len(i), groups)


def device_ranges(
    shape: tuple[int, int], adapters: Sequence[DeviceLowRank], device: torch.device
) -> Iterator[tuple[slice, DeviceFactors]]:
    """Cut a weight's rows where an adapter begins or ends; yield each range with its factors, in order."""
    owned = [None if adapter.rows is None else slice(*adapter.rows) for adapter in adapters]
    for start, stop, own in cut_rows(shape[0], owned):
        groups = [(adapters[at].A, adapters[at].B[rows], adapters[at].scaling) for at, rows in own]
        yield slice(start, stop), DeviceFactors(groups, (stop - start, shape[1]), device)


def _norm_bound(matrix: Tensor, dim: int) -> Tensor:
    """As `loracle.reference.factors.norm_bound`."""
    count = matrix.shape[dim]
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=dim)
    return norms * (1 + (count + 4) * 2.0**-53) + math.sqrt(count) * 2.0**-510
