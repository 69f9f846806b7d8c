"""In which numbers an evaluation works, and how much relative error its roundings can add up to."""

import math
from dataclasses import dataclass
from typing import Literal

from numpy.typing import DTypeLike

from .errors import ConfigError
from .formats import FloatFormat, float_format

_TF32_UNIT_ROUNDOFF = 2.0**-11
# Bounds are evaluated in float64, in sums of fewer than 2^21 terms: to a relative error below 2^-30.
ROUND_UP = 1.0 + 2.0**-30


@dataclass(frozen=True)
class Precision:
    """The numbers that an evaluation works in; what a bound on its error depends on, beside the inputs.

    Args:
        dtype: in which intermediate results are stored and added up.
        accumulator: in which the terms of a product are summed before they are rounded to ``dtype``.
            ``dtype`` itself by default; kernels for float16 and bfloat16 use float32.
        multiplicands: to what the two factors of each product are rounded before they are multiplied: "tf32"
            for the matrix units of a GPU that are allowed to (11 significant bits, float32's exponents), or
            one of the dtypes. None: they are used as stored.
        failure: None for a bound that always holds. A probability in (0, 1) for the probabilistic bound,
            which holds but for that probability when roundings are independent, of mean zero: it grows with
            the square root of the number of terms, as large sums do in practice.

    Raises:
        DTypeError: a dtype is not float16, bfloat16, float32 or float64.
        ConfigError: the accumulator is less precise than ``dtype``, or ``failure`` is no probability.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., lemma 3.1 (gamma); Blanchard,
    Higham, Lopez, Mary and Pranesh, SIAM J. Sci. Comput. 42 (2020), C124 (rounded multiplicands, wide
    accumulator); Higham and Mary, SIAM J. Sci. Comput. 41 (2019), A2815, theorem 2.4 (probabilistic).
    """

    dtype: DTypeLike
    accumulator: DTypeLike | None = None
    multiplicands: Literal["tf32"] | DTypeLike | None = None
    failure: float | None = None

    def __post_init__(self) -> None:
        if self.wide.precision < self.form.precision:
            raise ConfigError(
                f"accumulator: expected at least the precision of {self.form.dtype}, got {self.wide.dtype}"
            )
        if self.failure is not None and not 0 < self.failure < 1:
            raise ConfigError(f"failure: expected a probability above 0 and below 1, got {self.failure}")
        self.multiplicand_roundoff  # noqa: B018  (raises where it is not known)

    @staticmethod
    def of(precision: "Precision | DTypeLike") -> "Precision":
        """Return ``precision``, or that of plain arithmetic in a dtype."""
        return precision if isinstance(precision, Precision) else Precision(precision)

    @property
    def form(self) -> FloatFormat:
        """The format that results are stored in."""
        return float_format(self.dtype)

    @property
    def wide(self) -> FloatFormat:
        """The format that products are summed in."""
        return self.form if self.accumulator is None else float_format(self.accumulator, "accumulator")

    @property
    def accumulates_wider(self) -> bool:
        """Whether a product has a rounding of its own to the format that it is stored in."""
        return self.wide.precision > self.form.precision

    @property
    def multiplicand_roundoff(self) -> float:
        """The unit roundoff of the factors' own rounding; 0 where they are used as stored."""
        if self.multiplicands is None:
            return 0.0
        if isinstance(self.multiplicands, str) and self.multiplicands == "tf32":
            return _TF32_UNIT_ROUNDOFF
        return float_format(self.multiplicands, "multiplicands").unit_roundoff

    def growth(self, terms: int, stores: int, products: int, paths: float) -> float:
        """Return g: the relative error of a term that has gone through the given numbers of roundings.

        1 + g = (1 + gamma_terms(u_accumulator)) (1 + gamma_stores(u)) (1 + u_multiplicands)^(2 products)

        Args:
            terms: roundings within products and sums; stores: roundings of stored results and inputs;
            products:
                matrix products in a row; paths: how many such terms there are in all, for the probabilistic
                form, which puts `probable_gamma` in the place of gamma in the first factor.

        Raises:
            ConfigError: so many terms in so few bits that there is no bound.
        """
        u = self.wide.unit_roundoff
        summed = gamma(terms, u) if self.failure is None else probable_gamma(terms, u, paths, self.failure)
        stored = gamma(stores, self.form.unit_roundoff)
        rounded = math.expm1(2 * products * math.log1p(self.multiplicand_roundoff))
        # Not as (1 + a)(1 + b) - 1: float64 would lose its own roundoff beside the 1.
        growth = summed + stored + summed * stored
        return (growth + rounded + growth * rounded) * ROUND_UP


def gamma(n: int, u: float) -> float:
    """Return ``n u / (1 - n u)``, a bound on the relative error of n roundings in a row; rounded up.

    Raises:
        ConfigError: ``n * u`` is 1 or more, where there is no such bound.
    """
    if n * u >= 1:
        raise ConfigError(
            f"gamma: expected n * u below 1, got n {n} and u {u}; name a more precise accumulator"
        )
    return n * u / (1 - n * u) * ROUND_UP


def probable_gamma(n: int, u: float, paths: float, failure: float) -> float:
    """Return ``exp(z sqrt(n) u + n u^2 / (1 - u)) - 1``, which n roundings in a row rarely exceed.

    With z = sqrt(2 log(2 paths / failure)) / (1 - u), all of ``paths`` such rows stay within it but for a
    probability of ``failure``, if the roundings are independent, of mean zero and at most u.

    Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
    41 (2019), A2815, theorem 2.4.
    """
    z = math.sqrt(2 * math.log(2 * max(paths, 1.0) / failure)) / (1 - u)
    return math.expm1(z * math.sqrt(n) * u + n * u * u / (1 - u)) * ROUND_UP
