"""The low-rank factors that are added to one range of rows of a weight, and where each range lies."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .error_free import Float64
from .formats import Array, largest_magnitude
from .low_rank import LowRank

Factor = tuple[Array, Array, float]


@dataclass(frozen=True, eq=False)
class Factors:
    """``sum_g scaling_g * B_g @ A_g``: what is added to the weight's rows from ``start`` to ``stop``.

    A_g (r_g, in) and B_g (stop - start, r_g) are of any of the four dtypes; ``r`` is the sum of the r_g.
    """

    start: int
    stop: int
    groups: tuple[Factor, ...]

    @property
    def r(self) -> int:
        return sum(A.shape[0] for A, _, _ in self.groups)

    @property
    def T(self) -> "Factors":  # noqa: N802
        """The factors of the transposed update, for a weight that is stored (in, out)."""
        return Factors(self.start, self.stop, tuple((B.T, A.T, scaling) for A, B, scaling in self.groups))

    def part(self, rows: slice, columns: slice) -> "Factors":
        """Return the factors of some rows, counted from ``start``, and columns of the update."""
        groups = tuple((A[:, columns], B[rows], scaling) for A, B, scaling in self.groups)
        return Factors(self.start + rows.start, self.start + rows.stop, groups)

    @property
    def is_zero(self) -> bool:
        """Whether the update is zero throughout because one factor of each product is."""
        return all(
            scaling == 0 or largest_magnitude(A) == 0 or largest_magnitude(B) == 0
            for A, B, scaling in self.groups
        )

    def panel(self, columns: slice | NDArray[np.intp]) -> Float64:
        """Return the columns of all A, one below the other: (r, columns), contiguous."""
        return np.concatenate([A[:, columns].astype(np.float64) for A, _, _ in self.groups])

    def left(self, rows: slice | NDArray[np.intp]) -> Float64:
        """Return ``rows`` of all B, side by side and without the scaling: (rows, r), contiguous."""
        return np.concatenate([B[rows].astype(np.float64) for _, B, _ in self.groups], axis=1)

    @property
    def scalings(self) -> Float64:
        """The scaling of each of the r columns of `left`."""
        return np.repeat([scaling for _, _, scaling in self.groups], [A.shape[0] for A, _, _ in self.groups])

    @property
    def spans(self) -> list[tuple[slice, float]]:
        """The range of the r components that each group is, and its scaling."""
        ends = np.cumsum([A.shape[0] for A, _, _ in self.groups]).tolist()
        starts = [0, *ends[:-1]]
        return [
            (slice(start, end), scaling)
            for start, end, (_, _, scaling) in zip(starts, ends, self.groups, strict=True)
        ]


def row_ranges(out_features: int, adapters: Sequence[LowRank]) -> list[Factors]:
    """Cut the weight's rows where an adapter begins or ends; return the factors of each range, in order."""
    ranges = []
    for start, stop, own in cut_rows(out_features, [adapter.rows for adapter in adapters]):
        groups = tuple(
            (adapters[at].A, adapters[at].B[rows], float(adapters[at].scaling)) for at, rows in own
        )
        ranges.append(Factors(start, stop, groups))
    return ranges


def cut_rows(
    out_features: int, owned: Sequence[slice | None]
) -> Iterator[tuple[int, int, list[tuple[int, slice]]]]:
    """Cut rows where an owner of some, or of all for None, begins or ends; yield each range in order.

    Yields (start, stop, owners): of each owner its number, and which of its own rows the range is.
    """
    spans = [(0, out_features) if rows is None else (rows.start, rows.stop) for rows in owned]
    for start, stop in pairwise(sorted({0, out_features, *(end for span in spans for end in span)})):
        yield (
            start,
            stop,
            [
                (at, slice(start - first, stop - first))
                for at, (first, last) in enumerate(spans)
                if first <= start and stop <= last
            ],
        )


def norm_bound(matrix: Float64, axis: int) -> Float64:
    """Return at least the Euclidean norms along axis 0 or 1, whatever underflows; an overflow is infinite."""
    count = matrix.shape[axis]
    with np.errstate(over="ignore", under="ignore"):
        norms: Float64 = np.sqrt(np.einsum("ij,ij->i" if axis == 1 else "ij,ij->j", matrix, matrix))
    # The squares, the sum and the root have fewer than count + 4 roundings; a square may also underflow.
    norms *= 1 + (count + 4) * 2.0**-53
    norms += math.sqrt(count) * 2.0**-510
    return norms
