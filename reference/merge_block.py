"""One block of a merge in float64, with a proof for each entry that its rounding is the correct one."""

import numpy as np

from .error_free import Float64
from .formats import Array, FloatFormat, nonfinite_mask
from .merge_entries import Index, merged_entries
from .tiles import Position, Tile

# A product of at most this many multiplications is too small for OpenBLAS to start threads of its own for.
_SERIAL_PRODUCT = 1 << 18
_BLOCK_ENTRIES = 1 << 16
_PRODUCTS_AT_ONCE = 1 << 15
_U = 2.0**-53
_ETA = 2.0**-1074


class BlockMerger:
    """Merges tiles one after the other; owns the scratch memory of one thread and the panel of A in use.

    **Ziv's test.** For an entry q = w + s (BA) let B' = fl(s B), p = fl(B' A), v = fl(w + p), with u = 2^-53
    and eta = 2^-1074, the smallest subnormal. With b = ||B'_i||_1 max|A|, which is at least (|B'||A|)_ij,

        |p - s (BA)| <= 2 (r + 1) u b + 2 r eta (max|A| + 1)
        |v - (w + p)| <= u |v|

    The first is Higham's gamma_{r+1} (r products, r - 1 sums in any order, fused or not, the rounding of B'),
    plus an underflow in each B' and each product. Let

        e = 4 u |v| + 4 (r + 4) u b + 4 r eta (max|A| + 1)

    This is twice the sum of the two, so there is room for the roundings in b, in e and in v -+ e, and
    fl(v - e) <= q <= fl(v + e). Rounding is monotone: if both ends round to the same finite number, so does
    q. A 16-bit target is reached through float32; the ends stay ends if e has room for that rounding as well,
    which 2^-23 |v| in place of 4 u |v| and an additional 2^-149 provide.
    """

    def __init__(self, A: Array, B: Array, scaling: float, target: FloatFormat) -> None:
        self._A, self._B, self._scaling, self._target = A, B, scaling, target
        self._narrow = target.dtype.itemsize == 2
        self._panel_columns = slice(0, 0)
        self._panel = np.empty((A.shape[0], 0))
        self._buffers: tuple[Array, ...] = ()

    def merge(self, W0: Array, tile: Tile, out: Array) -> Position | None:
        """Write ``out[tile]``; return where in the tile it first overflows, or None."""
        rows, columns = tile
        if columns != self._panel_columns:
            self._panel_columns = columns
            self._panel = self._A[:, columns].astype(np.float64, order="C")
        B = self._B[rows].astype(np.float64, order="C")
        if self._target.precision == 53:
            # The ends never round to one number in the very format that they are computed in.
            uncertain = np.arange(out[tile].size)
        else:
            with np.errstate(all="ignore"):
                uncertain = self._round_certain(W0[tile], B * self._scaling, out[tile])
        return self._settle(W0[tile], B, uncertain, out[tile])

    def _round_certain(self, W0: Array, B: Float64, out: Array) -> Index:
        """Round W0 + B @ panel into ``out``; return the flat indices of what is not proven right."""
        (rows, columns), r, bits = out.shape, B.shape[1], self._target.bits
        largest = float(np.abs(self._panel).max())
        constant = 4 * (r + 4) * _U * np.abs(B).sum(axis=1, keepdims=True) * largest
        constant += 4 * r * _ETA * (largest + 1) + (2.0**-149 if self._narrow else 0.0)
        relative = 2.0**-23 if self._narrow else 4 * _U
        # Below this error no number comes near the largest of the target.
        harmless = relative * self._target.largest / 2
        indices = []
        step = max(1, _BLOCK_ENTRIES // columns)
        for start in range(0, rows, step):
            block = slice(start, start + step)
            result = out[block]
            value, error, low, high, other, uncertain = self._scratch(result.shape)
            _multiply(B[block], self._panel, value)
            np.add(value, W0[block], out=value)
            np.abs(value, out=error)
            np.multiply(error, relative, out=error)
            np.add(error, constant[block], out=error)
            if self._narrow:
                np.subtract(value, error, out=low, casting="same_kind")
                np.add(value, error, out=high, casting="same_kind")
                np.copyto(result, low, casting="same_kind")
                np.copyto(other, high, casting="same_kind")
            else:
                np.subtract(value, error, out=result, casting="same_kind")
                np.add(value, error, out=other, casting="same_kind")
            np.not_equal(result.view(bits), other.view(bits), out=uncertain)
            if not error.max() < harmless:
                np.logical_or(uncertain, nonfinite_mask(result), out=uncertain)
            if uncertain.any():
                indices.append(np.flatnonzero(uncertain) + start * columns)
        return np.concatenate(indices) if indices else np.empty(0, np.intp)

    def _scratch(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        """Return the scratch arrays for a block; they are made anew only when the blocks' shape changes."""
        if not self._buffers or self._buffers[0].shape != shape:
            dtypes = (np.float64, np.float64, np.float32, np.float32, self._target.dtype, np.bool_)
            self._buffers = tuple(np.empty(shape, dtype) for dtype in dtypes)
        return self._buffers

    def _settle(self, W0: Array, B: Float64, uncertain: Index, out: Array) -> Position | None:
        """Compute the entries at the flat indices in more than float64; return the first that overflows."""
        step = max(1, _PRODUCTS_AT_ONCE // B.shape[1])
        for start in range(0, len(uncertain), step):
            i, j = np.divmod(uncertain[start : start + step], out.shape[1])
            w = W0[i, j].astype(np.float64)
            entries = merged_entries(w, i, j, self._panel, B, self._scaling, self._target)
            out[i, j] = entries
            overflow = np.flatnonzero(nonfinite_mask(entries))
            if overflow.size:
                return int(i[overflow[0]]), int(j[overflow[0]])
        return None


def _multiply(B: Float64, A: Float64, out: Float64) -> None:
    """Write ``B @ A`` into ``out``, as a stack of products that OpenBLAS computes in the calling thread."""
    (m, r), c = B.shape, A.shape[1]
    group = max(1, min(m, _SERIAL_PRODUCT // max(1, r * c)))
    whole = m // group * group
    np.matmul(B[:whole].reshape(-1, group, r), A, out=out[:whole].reshape(-1, group, c))
    if whole < m:
        np.matmul(B[whole:], A, out=out[whole:])
