"""The interval that proves the rounding of a merged entry (Ziv's test), and the proof for single entries.

Let q = w + sum_k s_k b_k a_k over the exact reals, s_k the scaling of component k. Evaluated with unit
roundoff u, and eta the largest absolute error of an underflow: b'_k = fl(s_k b_k), p = fl(sum_k b'_k a_k),
v = fl(w + p), each input rounded to the working dtype first. With beta = ||b'||_2 ||a||_2, which is at least
sum |b'_k||a_k|,

    |p - (q - w)| <= (r + 4) u beta (1 + 2^-13) + r eta (||a||_2 + ||b'||_2 + 2) (1 + 2^-13)
    |v - (w + p)| <= u |v|,   and for the rounding of w:   u |w| + eta <= u (|v| (1 + u) + beta) + eta

The first is Higham's gamma_{r+3}: r products, r - 1 sums in any order, fused or not, the roundings of s_k b_k
and of both factors. So with

    e = 4 u |v| + 1.01 (r + 6) u beta + 4 r eta (||a||_2 + ||b'||_2 + 2)

there is room for the roundings in e and in v -+ e, and fl(v - e) <= q <= fl(v + e), also where e is taken
away in the product, by a term more, and 2 e is added to that. Rounding is monotone: if both ends round to the
same finite number, so does q. Where a 16-bit number is reached from float64 through float32, p may be rounded
to it before w is added, and everything after is done in it. Then e has room for that as well: u in its first
term is float32's, and there is u beta + 4 eta with float32's u and eta beside the rest.

Source: Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last bit", ACM TOMS
17 (1991); Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., lemma 3.1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .error_free import Float64
from .formats import Array, FloatFormat
from .rounding import round_float64

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_U = {_FLOAT64: 2.0**-53, _FLOAT32: 2.0**-24}
# float64 has gradual underflow; a library may have had the processor flush float32 to zero.
_ETA = {_FLOAT64: 2.0**-1074, _FLOAT32: 2.0**-126}


@dataclass(frozen=True, eq=False)
class EvaluationError:
    """e = ``relative`` |v| + ``absolute``; one ``absolute`` for each row of the weight, or each column."""

    relative: float
    absolute: Float64


def evaluation_error(
    dtype: np.dtype[Any],
    r: int,
    row_norms: Float64 | float,
    column_norm: Float64 | float,
    *,
    through_float32: bool = False,
) -> EvaluationError:
    """Return e for an evaluation in float32 or float64; see the module.

    Args:
        dtype: worked in.
        r: number of components.
        row_norms: (rows,) at least ||b'||_2; a number, if at least that of all rows.
        column_norm: at least ||a||_2 of every column, or of each row's own, or of each column, (columns,).
        through_float32: whether all that follows the product is done in float32.
    """
    relative, of_product, of_sum = error_coefficients(dtype, r)
    absolute = np.asarray(of_product * (row_norms * column_norm))
    absolute += of_sum * (row_norms + column_norm + 2)
    if through_float32:
        absolute += 1.01 * _U[_FLOAT32] * (row_norms * column_norm) + 4 * _ETA[_FLOAT32]
        return EvaluationError(4 * _U[_FLOAT32], absolute)
    return EvaluationError(relative, absolute)


def error_coefficients(dtype: np.dtype[Any], r: int) -> tuple[float, float, float]:
    """Return what e is made of, for an evaluation in float32 or float64: the factors of ``|v|``, of
    ``||a||_2 ||b'||_2`` and of ``||a||_2 + ||b'||_2 + 2``; see the module.
    """
    u, eta = _U[dtype], _ETA[dtype]
    return 4 * u, 1.01 * (r + 6) * u, 4 * r * eta


def prove_entries(
    w: Float64, b: Float64, a: Float64, error: EvaluationError, target: FloatFormat
) -> tuple[Array, NDArray[np.bool_]]:
    """Return single entries evaluated in float64 and rounded, and which of them are proven right.

    Args:
        w: (n,); b: (n, r), times the scaling; a: (n, r). error: its ``absolute`` is (n,).
        target: a format of at most 24 bits.
    """
    value = w + np.einsum("nk,nk->n", b, a)
    e = error.relative * np.abs(value) + error.absolute
    low, high = round_float64(value - e, target.dtype), round_float64(value + e, target.dtype)
    return low, (low.view(target.bits) == high.view(target.bits)) & np.isfinite(value)
