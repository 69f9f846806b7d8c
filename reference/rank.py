"""The exact rank of a matrix, its rank factorization, and how many numbers that leaves to store."""

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .arguments import is_integer
from .errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from .formats import FORMATS, Array

Matrix: TypeAlias = Array | Sequence[Sequence[Any]]
"""An array, or a sequence of rows."""

_FLOATS: tuple[type[Any], ...] = (float, *(form.dtype.type for form in FORMATS))


class RankFactorization(NamedTuple):
    """``M = C R`` with inner dimension the rank r of M: C (m, r), R (r, n), object arrays of `Fraction`."""

    C: Array
    R: Array


def rank(matrix: Matrix) -> int:
    """Return the number of linearly independent rows, which is that of the columns; exactly.

    Args:
        matrix: (m, n): integers, `Fraction`, or floats, each taken as the rational number that it is; an
            array or nested sequences. A float matrix that was rounded nearly always has full rank, however
            close to one of low rank it is: see `numerical_rank`.

    The first two columns here are multiples of the third; with one number changed they are not:

    >>> rank([[10, 20, 5], [12, 24, 6], [14, 28, 7]])
    1
    >>> rank([[10, 20, 5], [12, 24, 6], [14, 28, 70]])
    2

    In integers of unlimited size, m n r operations on numbers of up to r times the digits of an entry: for
    matrices of up to a few hundred rows.

    Raises:
        ShapeError: not a matrix.
        DTypeError, NonFiniteError: an entry is no number of these kinds, or no finite one.

    Source: Bareiss, "Sylvester's identity and multistep integer-preserving Gaussian elimination", Math. Comp.
    22 (1968).
    """
    return len(_eliminate(_whole_rows(_exact(matrix))).pivots)


def rank_factorization(matrix: Matrix) -> RankFactorization:
    """Return C (m, r) and R (r, n) with ``C R`` equal to the matrix, where r is its rank; exactly.

    C holds the pivot columns of the matrix, R the nonzero rows of its reduced row echelon form: a column is a
    combination of the pivot columns before it, with the numbers in the same column of R.

    >>> M = np.array([[10, 20, 5], [12, 24, 6], [14, 28, 7]])
    >>> C, R = rank_factorization(M)
    >>> C.shape, R.shape
    ((3, 1), (1, 3))
    >>> print(C.T, R)
    [[Fraction(10, 1) Fraction(12, 1) Fraction(14, 1)]] [[Fraction(1, 1) Fraction(2, 1) Fraction(1, 2)]]
    >>> bool((C @ R == M).all())
    True

    Arguments, cost and errors as in `rank`; a matrix of zeros gives C (m, 0) and R (0, n).

    Source: Strang, "Introduction to Linear Algebra", 6th ed., section 1.4 (A = CR).
    """
    exact = _exact(matrix)
    rows, pivots, last = _eliminate(_whole_rows(exact))
    reduced = [[Fraction(value, last) for value in row] for row in rows[: len(pivots)]]
    R = np.array(reduced, dtype=object).reshape(len(pivots), exact.shape[1])
    return RankFactorization(exact[:, list(pivots)], R)


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers there are to store: of the whole matrices, and of their two factors."""

    dense: int
    factored: int

    @property
    def percentage(self) -> float:
        """The factors' share, in percent of the whole."""
        return 100 * self.factored / self.dense


def parameter_counts(shape: tuple[int, int], r: int) -> ParameterCounts:
    """Return ``m n`` and ``r (m + n)``: the numbers in a matrix, and in factors (m, r) and (r, n).

    >>> parameter_counts((3, 3), 1)
    ParameterCounts(dense=9, factored=6)
    >>> parameter_counts((1024, 1024), 2)
    ParameterCounts(dense=1048576, factored=4096)
    >>> parameter_counts((1024, 1024), 2).percentage
    0.390625

    Raises:
        ShapeError: not two positive integers.
        ConfigError: r is not an integer of at least 0; it may be above m and n, where nothing is saved.
    """
    _check_shape(shape)
    _check_least(r, 0)
    m, n = map(int, shape)
    return ParameterCounts(dense=m * n, factored=int(r) * (m + n))


def adapter_parameter_counts(shapes: Iterable[tuple[int, int]], r: int) -> ParameterCounts:
    """Return the numbers in the adapted weights, each (out, in), and in their ``lora_B`` and ``lora_A``.

    An adapter of rank r has r (out + in) numbers. GPT-3 with r = 4 for the query and value of 96 layers:

    >>> counts = adapter_parameter_counts([(12288, 12288)] * 2 * 96, r=4)
    >>> counts
    ParameterCounts(dense=28991029248, factored=18874368)
    >>> print(f"{counts.percentage:.3f}%")
    0.065%

    Raises:
        ShapeError: no shapes, or one that is not two positive integers.
        ConfigError: r is not an integer of at least 1.

    Source: LoRA, arXiv 2106.09685, section 4.2.
    """
    _check_least(r, 1)
    counts = [parameter_counts(shape, r) for shape in shapes]
    if not counts:
        raise ShapeError("shapes: expected (out, in) of each adapted weight, got none; name at least one")
    return ParameterCounts(sum(own.dense for own in counts), sum(own.factored for own in counts))


class _Eliminated(NamedTuple):
    """Integer rows, of which the first are ``last`` times the reduced row echelon form, the others zero."""

    rows: Array
    pivots: tuple[int, ...]
    last: int


def _eliminate(rows: Array) -> _Eliminated:
    """Return what Gauss-Jordan elimination makes of a matrix of integers, without a fraction.

    After each step every entry is a minor of the matrix, so that the division by the previous pivot, which is
    on the diagonal of all earlier pivot rows, leaves no remainder (Sylvester's identity).
    """
    pivots: list[int] = []
    last = 1
    for column in range(rows.shape[1]):
        row = len(pivots)
        candidates = np.flatnonzero(rows[row:, column])
        if candidates.size == 0:
            continue
        found = row + int(candidates[0])
        order = np.arange(len(rows))
        order[[row, found]] = order[[found, row]]
        rows = rows[order]
        own, pivot = rows[row].copy(), rows[row, column]
        rows = (pivot * rows - np.outer(rows[:, column], own)) // last
        rows[row] = own
        pivots.append(column)
        last = pivot
    return _Eliminated(rows, tuple(pivots), last)


def _whole_rows(exact: Array) -> Array:
    """Return the matrix with each row multiplied by the least number that makes it whole."""
    rows = [[value * math.lcm(*(v.denominator for v in row)) for value in row] for row in exact]
    return np.array([[int(v) for v in row] for row in rows], dtype=object).reshape(exact.shape)


def _exact(matrix: Matrix) -> Array:
    """Return the matrix as an object array of Fractions equal to the numbers given."""
    # As objects from the start: among floats a large integer would be rounded.
    values = np.array(matrix, dtype=object)
    if values.ndim != 2:
        raise ShapeError(f"matrix: expected rows of equal length, got shape {values.shape}; give it two axes")
    exact = np.empty(values.shape, dtype=object)
    for index, value in np.ndenumerate(values):
        exact[index] = _fraction(value, list(index))
    return exact


def _fraction(value: object, position: list[int]) -> Fraction:
    if isinstance(value, numbers.Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    if not isinstance(value, _FLOATS):
        raise DTypeError(
            f"matrix: expected integers, fractions or floats, got {type(value).__name__} at {position}; "
            "convert it"
        )
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteError(
            f"matrix: expected finite numbers, got {number} at {position}; a rank is not defined"
        )
    return Fraction(number)


def _check_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or not all(is_integer(size) and size >= 1 for size in shape):
        raise ShapeError(f"shape: expected two positive integers, got {shape}; give that of a matrix")


def _check_least(r: int, least: int) -> None:
    if not is_integer(r) or r < least:
        raise ConfigError(f"r: expected an integer of at least {least}, got {r!r}; set the rank")
