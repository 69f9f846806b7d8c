"""How alike the directions of two adapters are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .arguments import check_count
from .errors import ShapeError
from .formats import Array
from .low_rank_approximation import count_above, relative_threshold
from .precision import ROUND_UP
from .svd import F64, float64_matrix, svd, svd_error_bound


def subspace_similarity(A1: Array, A2: Array, i: int, j: int) -> float:
    """Return ``phi = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j)``, from 0, orthogonal, to 1, one in the other.

    U1 and U2 are the right-singular vectors of A1 and A2, by decreasing singular value, as columns.

    Args:
        A1, A2: (r1, in) and (r2, in), the tensors ``lora_A`` of two adapters of the same weight: of different
            ranks, or of different seeds. To compare the left-singular vectors of ``lora_B``, (out, r), pass
            its transpose.
        i, j: how many singular vectors of each, up to its numerical rank: beyond that they are arbitrary.

    float16, bfloat16, float32 or float64; the work is done in float64. Where the i-th singular value equals
    the next, the subspace is arbitrary too: `subspace_similarity_bound` says how far the result is off.

    >>> A1, A2 = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    >>> [round(subspace_similarity(A1, A2, i, j), 12) for i, j in [(2, 2), (2, 1), (1, 2)]]
    [0.5, 1.0, 0.0]

    Raises:
        DTypeError, ShapeError, NonFiniteError: naming the tensor, what was expected and what came.
        ConfigError: i or j is out of range.

    Source: LoRA, arXiv 2106.09685, section 7.2, equation 4.
    """
    first, second, i, j = _checked_directions(A1, A2, i, j)
    return float(_similarities(first, second)[i - 1, j - 1])


def subspace_similarity_grid(A1: Array, A2: Array) -> Array:
    """Return `subspace_similarity` for all i and j: (k1, k2), entry [i - 1, j - 1], k the numerical ranks.

    Arguments and errors as in `subspace_similarity`.

    Source: LoRA, arXiv 2106.09685, figure 3.
    """
    return _similarities(*_directions(A1, A2))


def subspace_similarity_bound(A1: Array, A2: Array, i: int, j: int) -> float:
    """Return a bound on ``|computed - exact|`` of `subspace_similarity`, at most 1.

    The subspace of the first i singular vectors moves by an angle whose sine is at most sqrt(2) e / gap,
    where e is the `svd_error_bound` and the gap, less e, separates the i-th singular value from the next. A
    bound of 1, which says nothing, means that they are too close together to say which directions come first.

    Arguments and errors as in `subspace_similarity`.

    Source: Wedin, "Perturbation bounds in connection with singular value decomposition", BIT 12 (1972).
    """
    first, second, i, j = _checked_directions(A1, A2, i, j)
    moved1 = projector_error(first.s, i, first.error, first.Vh.shape[1])
    moved2 = projector_error(second.s, j, second.error, second.Vh.shape[1])
    overlap = moved1 * math.sqrt(j) + moved2 * math.sqrt(i) + moved1 * moved2
    # For the roundings of the products of the vectors, which are far fewer than those of a decomposition.
    rounding = first.error / first.s[0] + second.error / second.s[0]
    return min((overlap / min(i, j) + rounding) * ROUND_UP, 1.0)


def projector_error(s: Sequence[float], count: int, error: float, dimension: int) -> float:
    """Return a bound, in the Frobenius norm, on the error of the projector on the first singular vectors.

    Args:
        s: the singular values as computed; those that are left out are zero.
        count: how many singular vectors.
        error: the Frobenius norm of a perturbation, as `svd_error_bound` has it, that their exact
            decomposition belongs to; ``error / s[0]`` bounds their deviation from orthonormality.
        dimension: of the space; all of it has one projector.

    Infinite where the count-th and the next singular value may be equal.
    """
    if count == dimension:
        return error / s[0]
    following = s[count] if count < len(s) else 0.0
    gap = s[count - 1] - following - error
    return error * (2 / gap + 1 / s[0]) if gap > 0 else math.inf


class _Directions(NamedTuple):
    """Right-singular vectors as rows of Vh, the first ``known`` of them of nonzero singular values."""

    Vh: Array
    s: list[float]
    known: int
    error: float


def _directions(A1: Array, A2: Array) -> tuple[_Directions, _Directions]:
    first, second = float64_matrix(A1, "A1"), float64_matrix(A2, "A2")
    if first.shape[1] != second.shape[1]:
        raise ShapeError(
            f"A2: expected (r, {first.shape[1]}) to fit A1 {first.shape}, got {second.shape}; "
            "compare adapters of one weight"
        )
    return _right_directions(first, "A1"), _right_directions(second, "A2")


def _right_directions(A: Array, name: str) -> _Directions:
    _, s, Vh = svd(A, name)
    shape = (A.shape[0], A.shape[1])
    largest = float(s[0])
    known = count_above(s, relative_threshold(shape, F64) * largest)
    return _Directions(Vh, s.tolist(), known, svd_error_bound(shape, largest))


def _checked_directions(A1: Array, A2: Array, i: int, j: int) -> tuple[_Directions, _Directions, int, int]:
    first, second = _directions(A1, A2)
    i = check_count(i, first.known, "i", "the numerical rank of A1")
    return first, second, i, check_count(j, second.known, "j", "the numerical rank of A2")


def _similarities(first: _Directions, second: _Directions) -> Array:
    """Return phi for all i and j."""
    cosines = first.Vh[: first.known] @ second.Vh[: second.known].T
    sums = np.cumsum(np.cumsum(cosines**2, axis=0), axis=1)
    sizes = [np.arange(1, count + 1) for count in cosines.shape]
    # Rounding may lead out of the range, the exact value cannot.
    similarities: Array = np.minimum(sums / np.minimum.outer(*sizes), 1.0)
    return similarities
