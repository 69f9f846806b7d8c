"""How much an adapter amplifies directions that its weight has already."""

import math
from typing import NamedTuple

import numpy as np

from .arguments import check_count
from .errors import ConfigError, ShapeError
from .formats import Array
from .low_rank_approximation import count_above, relative_threshold
from .precision import ROUND_UP
from .spectra import delta_svd, delta_svd_error_bound, size_of_factors
from .subspace import projector_error
from .svd import F64, float64_matrix


def amplification_factor(
    W0: Array, A: Array, B: Array, scaling: float = 1.0, *, r: int | None = None
) -> float:
    """Return ``||delta||_F / ||U^T W0 V||_F``, U and V the first r singular vectors of delta as columns.

    With ``delta = scaling * B @ A``, the ratio of what the adapter adds to what the weight has in the same
    directions; infinite where the weight has nothing there.

    Args:
        W0: (out, in), the weight. A: (r, in), the tensor ``lora_A``. B: (out, r), the tensor ``lora_B``.
            float16, bfloat16, float32 or float64; the work is done in float64.
        scaling: see `lora_scaling`.
        r: how many directions; by default all of delta's, its numerical rank.

    `amplification_factor_bound` says how far the result is off.

    >>> W0 = np.array([[2.0, 1.0], [1.0, 5.0], [0.0, 7.0]])
    >>> round(amplification_factor(W0, A=np.array([[4.0, 0.0]]), B=np.array([[1.0], [0.0], [0.0]])), 12)
    2.0

    Raises:
        DTypeError, ShapeError, NonFiniteError: naming the tensor, what was expected and what came.
        ConfigError: r is out of range, or delta is zero.

    Source: LoRA, arXiv 2106.09685, section 7.3 and table 7.
    """
    terms = _terms(W0, A, B, scaling, r)
    return terms.delta_norm / terms.projected_norm if terms.projected_norm else math.inf


def amplification_factor_bound(
    W0: Array, A: Array, B: Array, scaling: float = 1.0, *, r: int | None = None
) -> float:
    """Return a bound on ``|computed - exact|`` of `amplification_factor`; infinite where there is none.

    With e the `delta_svd_error_bound`: the numerator is off by e at most, the denominator by ``||W0||_F``
    times the errors of the projectors on the two subspaces, see `subspace_similarity_bound`.

    Arguments and errors as in `amplification_factor`.
    """
    terms = _terms(W0, A, B, scaling, r)
    error = delta_svd_error_bound(A, B, scaling)
    left, right = (projector_error(terms.s, terms.r, error, side) for side in terms.shape)
    # The last term is for the roundings of the products with the weight and of the norms.
    moved = (left + right + left * right + error / terms.s[0]) * terms.weight_norm
    remaining = terms.projected_norm - moved
    if not remaining > 0:
        return math.inf
    numerator = error * terms.projected_norm + terms.delta_norm * moved
    return numerator / (terms.projected_norm * remaining) * ROUND_UP


class _Terms(NamedTuple):
    shape: tuple[int, int]
    r: int
    s: list[float]
    delta_norm: float
    projected_norm: float
    weight_norm: float


def _terms(W0: Array, A: Array, B: Array, scaling: float, r: int | None) -> _Terms:
    decomposition = delta_svd(A, B, scaling)
    shape = (decomposition.U.shape[0], decomposition.Vh.shape[1])
    weight = float64_matrix(W0, "W0")
    if weight.shape != shape:
        raise ShapeError(f"W0: expected {shape} to fit B and A, got {weight.shape}; is it transposed?")
    U, s, Vh = decomposition
    size = size_of_factors(np.asarray(A), np.asarray(B), scaling)
    known = count_above(s, relative_threshold(shape, F64) * size)
    if known == 0:
        raise ConfigError("delta: expected an update that is not zero, got zero; train the adapter first")
    r = known if r is None else check_count(r, known, "r", "the numerical rank of delta")
    projected = U[:, :r].T @ weight @ Vh[:r].T
    return _Terms(shape, r, s.tolist(), _norm(s), _norm(projected), _norm(weight))


def _norm(values: Array) -> float:
    """Return the root of the sum of squares."""
    return math.hypot(*values.ravel().tolist())
