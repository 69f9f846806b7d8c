"""Error-free transformations of float64 arrays: a sum or product as the rounded result plus its exact
residual.

Source: Knuth, TAOCP 2, 4.2.2 theorem B (sum); Dekker 1971, Veltkamp's splitting (product); both as in
Ogita, Rump and Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005).
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_SPLITTER = 134217729.0  # 2^27 + 1
_SAFE_PRODUCT = 2.0**-960


def two_sum(a: Float64, b: Float64) -> tuple[Float64, Float64]:
    """Return ``(s, t)`` with ``s = fl(a + b)`` and ``s + t == a + b`` exactly.

    Holds with underflow; after an overflow ``t`` is NaN or infinite.
    """
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def two_product(a: Float64, b: Float64 | float) -> tuple[Float64, Float64]:
    """Return ``(p, t)`` with ``p = fl(a * b)`` and ``p + t == a * b`` exactly, or ``t`` not finite where
    that cannot be had: an operand, or the product, so large that the splitting overflows, or a product so
    small (below 2^-960, and 2^-969 is where the residual's last bit may fall below the smallest subnormal)
    that the residual may be rounded.
    """
    p = np.multiply(a, b)
    ah, al = _split(a)
    bh, bl = _split(b)
    t = al * bl - (((p - ah * bh) - al * bh) - ah * bl)
    t[(np.abs(p) < _SAFE_PRODUCT) & (np.not_equal(a, 0.0) & np.not_equal(b, 0.0))] = np.nan
    return p, t


def _split(a: Float64 | float) -> tuple[Float64, Float64]:
    c = np.multiply(a, _SPLITTER)
    high = c - (c - a)
    return high, a - high
