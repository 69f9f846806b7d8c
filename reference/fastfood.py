"""Fastfood: a random projection that is never a matrix, in O(D log d) operations and O(D) numbers.

A block is ``H G Pi H B`` (L, L), L the smallest power of two that is at least d: B random signs, Pi a
random permutation, G a diagonal of Gaussians, H the Walsh-Hadamard matrix of signs, without a factor. The D
rows of P are those of ceil(D / L) independent blocks on top of each other, the last one cut; of its L columns
the first d.

Le, Sarlos and Smola multiply by one more diagonal, S, which gives the rows the random lengths that those of a
Gaussian matrix have, and divide by sigma sqrt(L). Here a number takes their place: G is divided by
``sqrt(D sum_j G_j^2)``, block by block. As H is orthogonal but for a factor, every row of a block has the
length sqrt(L / D) over all L columns and, where L divides D, every column of P the length one, as Li et al.
want it, and as the code for the paper of Aghajanyan et al. has it, which takes one block with L >= D. With
d <= L and several blocks a small d costs little, and d may be anything up to D.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import ShapeError
from .formats import Array
from .magnitudes import Magnitude
from .operands import Operand, restructure, total
from .random_projection import STREAM, check_sizes
from .rounding import round_to

PANEL = 2**18
"""Rows that are drawn from one stream of random numbers; a block that is longer has one of its own."""


@dataclass(frozen=True, eq=False)
class Fastfood:
    """P as what it is made of, n blocks of L: ``P = H diag(gaussians) Pi H diag(signs)``, cut to (D, d).

    Attributes:
        rows, columns: D and d; L is the smallest power of two that is at least d, n is ceil(D / L).
        signs: (n, L), int8, 1 or -1.
        order: (n, L), int32: in each row a permutation; ``(Pi x)_j = x[order_j]``.
        gaussians: (n, L), with the whole scaling in them.
    """

    rows: int
    columns: int
    signs: NDArray[np.int8]
    order: NDArray[np.int32]
    gaussians: Operand

    @property
    def shape(self) -> tuple[int, int]:
        """(D, d)."""
        return self.rows, self.columns

    def astype(self, dtype: DTypeLike) -> "Fastfood":
        """Return the projection with each Gaussian rounded once to ``dtype``."""
        return replace(self, gaussians=round_to(self.gaussians, dtype))

    def forward(self, theta: Operand) -> Operand:
        """Return ``P theta``, (D,), of theta, (d,); arrays of one dtype, or magnitudes; unchecked."""
        padded = restructure(theta, lambda a: _padded(a, self.signs.shape[1]))
        mixed = walsh_hadamard(self._signed(padded))
        moved = restructure(mixed, lambda a: np.take_along_axis(a, self.order, axis=1))
        return restructure(walsh_hadamard(moved * self.gaussians), lambda a: a.reshape(-1)[: self.rows])

    def adjoint(self, gradient: Operand) -> Operand:
        """Return ``P^T gradient``, (d,), of a gradient, (D,); as `forward`."""
        blocks = restructure(gradient, lambda a: _padded(a, self.signs.size).reshape(self.signs.shape))
        mixed = walsh_hadamard(blocks) * self.gaussians
        moved = restructure(mixed, self._moved_back)
        return restructure(total(self._signed(walsh_hadamard(moved))), lambda a: a[: self.columns])

    def _signed(self, blocks: Operand) -> Operand:
        """Return the numbers times the signs, which rounds nothing."""
        if isinstance(blocks, Magnitude):
            return blocks.map(lambda a: np.broadcast_to(a, self.signs.shape))
        return self.signs.astype(blocks.dtype) * blocks

    def _moved_back(self, values: Array) -> Array:
        result = np.empty_like(values)
        np.put_along_axis(result, self.order, values, axis=1)
        return result


def walsh_hadamard(values: Operand) -> Operand:
    """Return ``H x`` for each x along the last axis, whose length L is a power of two, in the values' dtype.

    H is Sylvester's: ``H_1 = [1]``, ``H_2L = [[H_L, H_L], [H_L, -H_L]]``, so ``H[i, j]`` is -1 to the number
    of bits that i and j share, H is symmetric, and ``H H = L I``. In L log2 L additions.

    Args:
        values: (..., L): an array of any dtype, object among them, or magnitudes.

    Raises:
        ShapeError: the length is no power of two.
    """
    length = values.shape[-1]
    if length < 1 or length & (length - 1):
        raise ShapeError(f"values: expected a last axis of a power of two, got {length}; pad it with zeros")
    if isinstance(values, Magnitude):
        # Every sum is of all of them; the order of summation is anyone's.
        return values.add_up(lambda a: np.repeat(a.sum(axis=-1, keepdims=True), length, axis=-1), length)
    result, half = values, 1
    while half < length:
        pairs = result.reshape(*values.shape[:-1], length // (2 * half), 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        result = np.stack([upper + lower, upper - lower], axis=-2).reshape(values.shape)
        half *= 2
    return result


def block_length(d: int) -> int:
    """Return L, the smallest power of two that is at least d."""
    return 1 << (d - 1).bit_length()


def fastfood_projection(D: int, d: int, seed: int, *, dtype: DTypeLike = np.float32) -> Fastfood:
    """Return P, (D, d), of Gaussians of ``dtype``; `fastfood_panels` says what is drawn.

    Over the seeds ``||P theta||^2`` is ``||theta||^2`` in the mean, but for the rounding of the Gaussians.

    Arguments and errors as in `dense_projection`.

    Source: Le, Sarlos and Smola, "Fastfood: approximating kernel expansions in loglinear time", ICML 2013
    (arXiv 1408.3060); Li et al., arXiv 1804.08838, section 2; Aghajanyan et al., arXiv 2012.13255, section 3.
    """
    panels = list(fastfood_panels(D, d, seed, dtype=dtype))
    return Fastfood(
        D,
        d,
        np.concatenate([panel.signs for panel in panels]),
        np.concatenate([panel.order for panel in panels]),
        np.concatenate([panel.gaussians for panel in panels]),
    )


def fastfood_panels(D: int, d: int, seed: int, *, dtype: DTypeLike = np.float32) -> Iterator[Fastfood]:
    """Yield P, (D, d), in panels of as many whole blocks as go into `PANEL` rows, at least one; in order.

    Panel p has numbers of its own, from ``np.random.default_rng((STREAM, seed, p))``, with b its blocks drawn
    in this order: signs ``2 * integers(0, 2, (b, L), dtype=int8) - 1``; order ``permuted`` of b rows of the
    int32 numbers 0 to L - 1, along the second axis; Gaussians ``standard_normal((b, L))``, scaled in
    float64 and rounded once to ``dtype``.

    Arguments and errors as in `dense_projection`.
    """
    check_sizes(D, d, seed)
    length = block_length(d)
    blocks, most = math.ceil(D / length), max(1, PANEL // length)
    for panel, first in enumerate(range(0, blocks, most)):
        count = min(most, blocks - first)
        rng = np.random.default_rng((STREAM, seed, panel))
        signs: NDArray[Any] = 2 * rng.integers(0, 2, (count, length), dtype=np.int8) - 1
        steps = np.repeat(np.arange(length, dtype=np.int32)[None], count, axis=0)
        order = rng.permuted(steps, axis=1)
        normal = rng.standard_normal((count, length))
        normal /= np.sqrt(D * np.sum(normal * normal, axis=1, keepdims=True))
        rows = min(count * length, D - first * length)
        yield Fastfood(rows, d, signs.astype(np.int8, copy=False), order, round_to(normal, dtype))


def _padded(vector: Array, length: int) -> Array:
    return np.concatenate([vector, np.zeros(length - len(vector), vector.dtype)])
