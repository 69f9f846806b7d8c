"""Weighted least squares over the updates of rank r in the neighbourhood of one.

Near ``U diag(s) V^T`` they are, but for terms of second order, what ``X V^T + U Y^T`` adds to it. The normal
equations have a block (r, r) for each row of X and for each row of Y, and an entry's weight couples two of
them. The larger side is eliminated, and the rest factorized, where that is cheap; else conjugate gradients
are used, with the blocks for a preconditioner.
"""

import torch
from torch import Tensor

_MOST_ITERATIONS = 2000
_CHUNK_ENTRIES = 1 << 23
_JITTER = 1e-14  # times the mean of a block's diagonal; there are r^2 directions that add nothing


class WeightedFit:
    """The updates in the neighbourhood of ``U diag(s) V^T``.

    Args:
        U: (m, r) and
        V: (n, r), orthonormal columns, float64.
    """

    def __init__(self, U: Tensor, V: Tensor) -> None:
        self._U, self._V = U, V
        self._scratch = torch.empty(len(U), len(V), dtype=U.dtype)

    def update(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return ``X V^T + U Y^T``, (m, n), of X (m, r) and Y (n, r)."""
        return torch.cat([X, self._U], 1) @ torch.cat([self._V, Y], 1).T

    def solve(self, weights: Tensor, gradient: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return X and Y whose update d has the least ``sum(weights d^2 / 2 + gradient d)``.

        Args:
            weights: (m, n), not negative. gradient: (m, n).
            tolerance: by which factor the preconditioned gradient is to shrink, where it is iterated.
        """
        (m, r), n = self._U.shape, len(self._V)
        if not _is_cheap(max(m, n), min(m, n), r):
            return self._iterate(weights, gradient, tolerance)
        if m < n:
            Y, X = _eliminate(weights.T, gradient.T, self._V, self._U)
            return X, Y
        return _eliminate(weights, gradient, self._U, self._V)

    def _iterate(self, weights: Tensor, gradient: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Conjugate gradients; X and Y are the rows of one matrix."""
        U, V, m = self._U, self._V, len(self._U)
        blocks = _cholesky(torch.cat([_blocks(weights, V), _blocks(weights.T, U)]))

        def solve_blocks(residual: Tensor) -> Tensor:
            return torch.cholesky_solve(residual[:, :, None], blocks)[:, :, 0]

        residual = -torch.cat([gradient @ V, gradient.T @ U])
        solution = torch.zeros_like(residual)
        preconditioned = solve_blocks(residual)
        direction = preconditioned
        size = first = float((residual * preconditioned).sum())
        for _ in range(_MOST_ITERATIONS):
            if size <= tolerance**2 * first:
                break
            torch.mm(torch.cat([direction[:m], U], 1), torch.cat([V, direction[m:]], 1).T, out=self._scratch)
            self._scratch.mul_(weights)
            image = torch.cat([self._scratch @ V, self._scratch.T @ U])
            step = size / float((direction * image).sum())
            solution = solution + step * direction
            residual = residual - step * image
            preconditioned = solve_blocks(residual)
            before, size = size, float((residual * preconditioned).sum())
            direction = preconditioned + (size / before) * direction
        return solution[:m], solution[m:]


def _is_cheap(larger: int, smaller: int, r: int) -> bool:
    """Tell whether elimination costs less than some hundred iterations."""
    return r**3 * smaller <= 450 * (8 * r + 40) and smaller * r <= 1 << 13


def _blocks(weights: Tensor, V: Tensor) -> Tensor:
    """Return ``sum_j weights[i, j] v_j v_j^T`` for each row i: (m, r, r)."""
    n, r = V.shape
    return (weights @ (V[:, :, None] * V[:, None, :]).reshape(n, r * r)).reshape(-1, r, r)


def _cholesky(blocks: Tensor) -> Tensor:
    """Return factors of positive semidefinite blocks, with a little more on the diagonal of each."""
    r = blocks.shape[-1]
    scale = torch.diagonal(blocks, dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)
    jitter = torch.full_like(scale, _JITTER)
    found: Tensor
    while True:
        found, failed = torch.linalg.cholesky_ex(
            blocks + (jitter * scale)[..., None, None] * torch.eye(r, dtype=blocks.dtype)
        )
        if not failed.any():
            return found
        jitter = torch.where(failed > 0, 10 * jitter, jitter)


def _eliminate(weights: Tensor, gradient: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return X and Y by way of the Schur complement for Y, (n r, n r)."""
    (m, r), n = U.shape, len(V)
    rows = _cholesky(_blocks(weights, V))
    own = _blocks(weights.T, U)
    schur = torch.zeros(n * r, n * r, dtype=U.dtype)
    step = max(1, _CHUNK_ENTRIES // (n * r * r))
    for start in range(0, m, step):
        part = slice(start, min(m, start + step))
        inner = torch.linalg.solve_triangular(rows[part], V.T.expand(part.stop - start, r, n), upper=False)
        inner = inner * weights[part, None, :]
        coupling = (inner[:, :, :, None] * U[part, None, None, :]).reshape(-1, n * r)
        schur.addmm_(coupling.T, coupling, alpha=-1)
    places = torch.arange(n)
    schur.view(n, r, n, r)[places, :, places, :] += own
    X = torch.cholesky_solve(-(gradient @ V)[:, :, None], rows)[:, :, 0]
    right = -(gradient.T @ U) - (weights * (X @ V.T)).T @ U
    scale = torch.diagonal(own, dim1=1, dim2=2).reshape(-1).clamp(min=1e-300).rsqrt()
    factor = _cholesky(schur * scale[:, None] * scale)
    Y = (torch.cholesky_solve((right.reshape(-1) * scale)[:, None], factor)[:, 0] * scale).reshape(n, r)
    right = (weights * (U @ Y.T)) @ V
    return X - torch.cholesky_solve(right[:, :, None], rows)[:, :, 0], Y
