"""Random projections as the matrices that they are, and small subspaces, for tests."""

from dataclasses import replace
from typing import Any

import numpy as np
from exact_linear import rational
from hypothesis import strategies as st

from loracle.reference import DenseProjection, Fastfood, Subspace, dense_projection, fastfood_projection


def signs(length: int) -> Any:
    """Return H, (L, L), entry by entry: -1 to the number of bits that i and j share; ints."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(length)] for i in range(length)], object)


def matrix_of(projection: DenseProjection | Fastfood) -> Any:
    """Return P, (D, d), as a product of matrices of Fractions."""
    if isinstance(projection, DenseProjection):
        return rational(projection.matrix)
    blocks, length = projection.signs.shape
    H, whole = signs(length), []
    for block in range(blocks):
        # H G times Pi H B: a diagonal scales columns, Pi orders rows.
        left = H * rational(projection.gaussians[block])
        whole.append(left @ (H[projection.order[block]] * projection.signs[block].astype(object)))
    return np.concatenate(whole)[: projection.rows, : projection.columns]


def exact(projection: DenseProjection | Fastfood) -> DenseProjection | Fastfood:
    """Return the projection with its numbers as Fractions."""
    if isinstance(projection, DenseProjection):
        return DenseProjection(rational(projection.matrix))
    return replace(projection, gaussians=rational(projection.gaussians))


def exact_subspace(subspace: Subspace) -> Subspace:
    """Return the subspace with its numbers as Fractions."""
    return Subspace(rational(subspace.theta_0), exact(subspace.projection), subspace.layers)


@st.composite
def projections(draw: st.DrawFn, dtype: Any = np.float64, most: int = 24) -> DenseProjection | Fastfood:
    """Either kind; d around powers of two, D a multiple of the block or not, one block or more."""
    D = draw(st.integers(1, most))
    d = draw(st.integers(1, D))
    seed = draw(st.integers(0, 2**40))
    make = draw(st.sampled_from([dense_projection, fastfood_projection]))
    return make(D, d, seed, dtype=dtype)


@st.composite
def subspaces(draw: st.DrawFn, dtype: Any = np.float64, most: int = 16) -> tuple[Subspace, Any, Any]:
    """A subspace with layers or without, a theta_d and a gradient of theta_D, Gaussians of ``dtype``."""
    projection = draw(projections(dtype, most))
    rows, _ = projection.shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = None
    if draw(st.booleans()):
        count = draw(st.integers(1, min(4, rows)))
        layers = rng.permutation(np.arange(rows) % count)
    subspace = Subspace(rng.standard_normal(rows).astype(dtype), projection, layers)
    theta = rng.standard_normal(subspace.dimension).astype(dtype)
    return subspace, theta, rng.standard_normal(rows).astype(dtype)
