"""Ways of merging that round more than once: each gives the bits that a candidate made so would have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loracle.files import LoraPair
from loracle.files.updates import Update
from loracle.reference import round_to

from .alternatives import with_pair
from .one_weight import FLOAT64, OneWeight

Array = NDArray[Any]

_DTYPES = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True, eq=False)
class Rounding:
    """One way: what it does, in words, and the rows of the weight that it gives.

    Attributes:
        narrower: whether it goes through a dtype narrower than the base's and the candidate's, as no merge
            in either of them does.
    """

    words: str
    rows: Array
    narrower: bool = False


def roundings(weight: OneWeight, start: int, stop: int, dtype: np.dtype[Any]) -> Iterator[Rounding]:
    """The rows of a weight, in `dtype`, by each way that differs from rounding once.

    The sum of W0 and the update in float64 stands for the exact one: what is rounded to a narrower dtype
    afterwards differs only where that sum is within a few 2^-53 of a tie.
    """
    exact = weight.wide(start, stop)
    fewest = min(_bits(dtype), _bits(weight.start.dtype))
    for middle in _DTYPES:
        if middle != dtype:
            words = f"to {middle}, then to {dtype}"
            yield Rounding(words, _to(_to(exact, middle), dtype), _bits(middle) < fewest)
    if weight.update is None:
        return
    W0 = weight.start[start:stop].astype(FLOAT64)
    delta = exact - W0
    scaling = _scaling(weight.update)
    for middle in dict.fromkeys((dtype, weight.start.dtype)):
        base, own = _to(W0, middle), _to(delta, middle)
        then = "" if middle == dtype else f", then to {dtype}"
        yield Rounding(f"the update to {middle}, then the sum{then}", _to(_sum(base, own, middle), dtype))
        if scaling:
            product = _to(_to(delta / scaling, middle).astype(FLOAT64) * scaling, middle)
            yield Rounding(
                f"B A to {middle}, then its scaling, then the sum{then}",
                _to(_sum(base, product, middle), dtype),
            )
    for middle in _DTYPES:
        rounded = with_pair(weight.update, partial(_narrowed, dtype=middle))
        if rounded is not None:
            rows = replace(weight, update=rounded).rows(start, stop, dtype)
            yield Rounding(f"A and B to {middle} before the merge", rows, _bits(middle) < fewest)


def _scaling(update: Update) -> float | None:
    pair = getattr(update, "pair", None)
    return None if pair is None else float(pair.scaling)


def _narrowed(pair: LoraPair, *, dtype: np.dtype[Any]) -> LoraPair:
    return replace(pair, A=_to(pair.A, dtype), B=_to(pair.B, dtype))


def _bits(dtype: np.dtype[Any]) -> int:
    return int(ml_dtypes.finfo(dtype).nmant)


def _sum(one: Array, other: Array, dtype: np.dtype[Any]) -> Array:
    return _to(one.astype(FLOAT64) + other.astype(FLOAT64), dtype)


def _to(array: Array, dtype: np.dtype[Any]) -> Array:
    return array if array.dtype == dtype else round_to(array, dtype)
