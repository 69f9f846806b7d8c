"""The adapter that comes nearest to the difference between a tuned weight and the one it came from."""

import math
from dataclasses import dataclass

import numpy as np

from .arguments import check_count, check_share
from .errors import ConfigError, NonFiniteError, ShapeError
from .formats import Array, first_nonfinite
from .low_rank import LowRank
from .low_rank_approximation import truncated
from .spectra import rank_for_energy
from .svd import float64_matrix, svd, svd_error_bound

DEFAULT_ENERGY = 0.99


@dataclass(frozen=True, eq=False)
class ExtractedAdapter:
    """An adapter for ``W0 + scaling * B @ A``, and by how much that misses the tuned weight.

    ``adapter`` has A (r, in) and B (out, r) in float64, the scaling that was asked for, and nothing else.
    With D the difference of the weights, the residuals are

        frobenius_residual = ||D - scaling * B @ A||_F,   relative_residual = that / ||D||_F (0 where D is 0),
        spectral_residual = ||D - scaling * B @ A||_2,

    no adapter of that rank has smaller ones. ``singular_values`` are all of D's, nonincreasing: of ranks not
    chosen, too, they tell the residuals. ``error_bound`` says how far each of these numbers, but for the
    relative one, may be off, as `svd_error_bound` explains.
    """

    adapter: LowRank
    frobenius_residual: float
    relative_residual: float
    spectral_residual: float
    singular_values: Array
    error_bound: float

    @property
    def r(self) -> int:
        """The adapter's rank."""
        return int(self.adapter.A.shape[0])


def extract_adapter(
    W0: Array,
    W: Array,
    *,
    r: int | None = None,
    energy: float | None = None,
    scaling: float = 1.0,
    name: str = "W0",
) -> ExtractedAdapter:
    """Return the best adapter for a full fine-tune: ``scaling * B @ A`` is nearest to ``W - W0`` of all.

    Where the difference has rank r or less the adapter holds all of it, but for the roundings of the SVD.

    Args:
        W0: (out, in), the weight before.
        W: (out, in), the weight after. Each may be float16, bfloat16, float32 or float64. The difference is
            formed in float64: exactly for two float16 weights, else each entry rounded once, to a relative
            error of 2^-53 at most.
        r: the rank, from 1 to min(out, in).
        energy: in place of r, the share of the squared Frobenius norm of the difference that the adapter
            is to have, see `rank_for_energy`; 0.99 by default. No difference gives an adapter of rank 1.
        scaling: not 0. What the adapter will be used with, see `lora_scaling`: the factors are divided by
            the root of it, B by a negative one, so that column k of B and row k of A have the same norm.
        name: what to call W0 in error messages.

    >>> W0 = np.array([[1.0, 1.0], [1.0, 1.0]])
    >>> W = W0 + np.array([[0.0, 8.0], [0.5, 0.0]])
    >>> found = extract_adapter(W0, W)
    >>> found.r, round(found.frobenius_residual, 12), found.singular_values.round(12).tolist()
    (1, 0.5, [8.0, 0.5])
    >>> found = extract_adapter(W0, W, r=2, scaling=lora_scaling(r=2, lora_alpha=4))
    >>> adapter = found.adapter
    >>> bool(np.abs(W0 + adapter.scaling * adapter.B @ adapter.A - W).max() <= found.error_bound)
    True

    Raises:
        DTypeError, ShapeError, NonFiniteError: naming the weight, what was expected and what came.
        ConfigError: both r and energy, one of them out of range, or a scaling that is zero or not finite.
    """
    if r is not None and energy is not None:
        raise ConfigError(f"energy: expected none beside r, got {energy!r} and r {r!r}; choose one")
    scaling = float(scaling)
    if scaling == 0 or not math.isfinite(scaling):
        raise ConfigError(f"scaling: expected a finite number other than 0, got {scaling}; check lora_alpha")
    energy = check_share(DEFAULT_ENERGY if energy is None else energy, "energy")
    difference = _difference(W0, W, name)
    shape = (difference.shape[0], difference.shape[1])
    if r is not None:
        r = check_count(r, min(shape), "r", f"the smaller side of {shape}")
    decomposition = svd(difference, f"tuned {name} - {name}")
    if r is None:
        r = max(1, rank_for_energy(decomposition.s, energy))
    best = truncated(decomposition, r)
    root = math.sqrt(abs(scaling))
    return ExtractedAdapter(
        adapter=LowRank(A=best.A / root, B=best.B / math.copysign(root, scaling), scaling=scaling),
        frobenius_residual=best.frobenius_error,
        relative_residual=best.relative_error,
        spectral_residual=best.spectral_error,
        singular_values=best.singular_values,
        error_bound=svd_error_bound(shape, float(best.singular_values[0])),
    )


def _difference(W0: Array, W: Array, name: str) -> Array:
    """Return ``W - W0`` in float64."""
    before, after = float64_matrix(W0, name), float64_matrix(W, f"tuned {name}")
    if before.shape != after.shape:
        raise ShapeError(
            f"tuned {name}: expected {before.shape} as {name} has, got {after.shape}; is it of another model?"
        )
    with np.errstate(over="ignore"):
        difference: Array = after - before
    position = first_nonfinite(difference)
    if position is not None:
        raise NonFiniteError(
            f"tuned {name} - {name}: expected finite numbers, got an overflow at {list(position)}; check both"
        )
    return difference
