"""Factors whose product is a matrix of small integers exactly, where floating-point ones are off by an ulp.

Half of an ulp does not matter where it is rounded away. It does where a merged entry is zero, and is to stay
zero. A difference that was computed without a rounding has entries that are integers times a power of two.
If it has rank r, its rows are integer combinations of r such vectors, a basis of the lattice of its rows.
"""

import math

import numpy as np
from numpy.typing import NDArray

_MOST_BITS = 30  # of the entries as integers: products with small factors stay below 2^53
_LARGEST = float(2**52)
_INTEGER = 1e-6


def integer_factors(D: NDArray[np.float64], r: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return A (r, in) and B (out, r) with ``B @ A`` equal to D, exactly; None where none are found.

    Args:
        D: (out, in), numerically of rank r or less, not zero.
        r: rows of A beyond the rank are zeros.
    """
    exponent = _common_exponent(D)
    if exponent is None:
        return None
    M = np.ldexp(D, -exponent)
    basis = _reduced(_independent_rows(M, r))
    if not len(basis):
        return None
    # each step at least halves the volume of the basis, which is that of the lattice at last
    for _ in range(_MOST_BITS * len(basis) + 1):
        coefficients = M @ np.linalg.pinv(basis)
        whole = np.rint(coefficients)
        off = np.abs(coefficients - whole)
        failing = np.flatnonzero(off.max(axis=1) > _INTEGER)
        if not len(failing):
            break
        row = failing[0]
        vector = M[row] - whole[row] @ basis
        # the vector takes the place of one that it has a part of
        places = np.flatnonzero(off[row] > _INTEGER)
        longest = places[np.argmax(np.square(basis[places]).sum(axis=1))]
        basis[longest] = np.rint(vector)
        basis = _reduced(basis)
        if np.abs(basis).max() > _LARGEST:
            return None
    else:
        return None
    exact = len(basis) * np.abs(whole).max() * np.abs(basis).max() <= _LARGEST
    if not exact or not np.array_equal(whole @ basis, M):
        return None
    A, B = np.zeros((r, D.shape[1])), np.zeros((len(D), r))
    A[: len(basis)], B[:, : len(basis)] = np.ldexp(basis, exponent), whole
    return A, B


def _common_exponent(D: NDArray[np.float64]) -> int | None:
    """Return e where all entries are integers of few bits times 2^e; None where they are not."""
    values = np.abs(D[D != 0])
    if not values.size:
        return None
    mantissas, exponents = np.frexp(values)
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    lowest = whole & -whole
    e = int((exponents - 53 + np.log2(lowest.astype(np.float64)).astype(int)).min())
    return e if math.frexp(float(values.max()))[1] - e <= _MOST_BITS else None


def _independent_rows(M: NDArray[np.float64], r: int) -> NDArray[np.float64]:
    """Return up to r rows that are independent, each the one farthest from those before."""
    left = M.copy()
    size = np.square(M).sum()
    chosen: list[int] = []
    for _ in range(r):
        norms = np.square(left).sum(axis=1)
        row = int(norms.argmax())
        if norms[row] <= 1e-18 * size:
            break
        chosen.append(row)
        direction = left[row] / math.sqrt(norms[row])
        left -= np.outer(left @ direction, direction)
    return M[chosen]


def _reduced(basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a basis of the same lattice with shorter vectors: each less whole multiples of the others."""
    basis = basis.copy()
    for _ in range(100):
        changed = False
        for i in range(len(basis)):
            products = basis @ basis[i]
            norms = np.square(basis).sum(axis=1)
            shares = np.rint(products / np.maximum(norms, 1e-300))
            shares[i] = 0
            j = int(np.argmax(np.abs(shares) * norms))
            if shares[j]:
                shorter = basis[i] - shares[j] * basis[j]
                if np.square(shorter).sum() < np.square(basis[i]).sum():
                    basis[i], changed = shorter, True
        if not changed:
            break
    return basis
