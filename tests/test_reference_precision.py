import math
import re
from decimal import Decimal, localcontext
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import ConfigError, DTypeError, Precision, gamma, probable_gamma
from loracle.reference.formats import FORMATS

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
TF32 = 2.0**-11
# What evaluating a bound in float64, rounded up, may add to it.
SLIGHTLY = 1 + Fraction(1, 2**28)


def exact_gamma(n, u):
    return n * Fraction(u) / (1 - n * Fraction(u))


def exact_probable_gamma(n, u, paths, failure):
    with localcontext() as context:
        context.prec = 60
        n, u, paths, failure = (Decimal(number) for number in (n, u, paths, failure))
        z = (2 * (2 * paths / failure).ln()).sqrt() / (1 - u)
        return Fraction((z * n.sqrt() * u + n * u * u / (1 - u)).exp() - 1)


def is_just_above(computed, exact):
    return exact < Fraction(computed) < exact * SLIGHTLY


def test_plain_arithmetic_in_a_dtype():
    for form in FORMATS:
        precision = Precision(form.dtype)
        assert precision.form is precision.wide is form
        assert not precision.accumulates_wider
        assert precision.multiplicand_roundoff == 0


@pytest.mark.parametrize(("dtype", "wide"), [(F16, F32), (BF16, F32), (F32, F64), (BF16, F16)], ids=str)
def test_a_wide_accumulator(dtype, wide):
    precision = Precision(dtype, accumulator=wide)
    assert (precision.form.dtype, precision.wide.dtype) == (dtype, wide)
    assert precision.accumulates_wider
    assert not Precision(wide, accumulator=wide).accumulates_wider
    message = f"accumulator: expected at least the precision of {wide}, got {dtype}"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Precision(wide, accumulator=dtype)


def test_rounded_multiplicands():
    assert Precision(F32, multiplicands="tf32").multiplicand_roundoff == TF32
    assert Precision(F32, multiplicands=BF16).multiplicand_roundoff == 2.0**-8
    assert Precision(F32, multiplicands="float16").multiplicand_roundoff == 2.0**-11


def test_a_dtype_is_taken_for_plain_arithmetic_in_it():
    precision = Precision(F32, accumulator=F64, multiplicands="tf32", failure=0.5)
    assert Precision.of(precision) is precision
    assert Precision.of(BF16) == Precision(BF16)
    assert Precision.of("float64").form.dtype == F64


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("dtype", lambda: Precision(np.int8)),
        ("accumulator", lambda: Precision(F32, accumulator=np.int8)),
        ("multiplicands", lambda: Precision(F32, multiplicands=np.int8)),
    ],
)
def test_other_dtypes_are_refused_by_name(name, make):
    with pytest.raises(DTypeError, match=rf"^{name}: expected one of .*, got dtype\('int8'\); convert it$"):
        make()


@pytest.mark.parametrize("failure", [0, 0.0, 1, 1.0, 1.5, -0.25, math.nan])
def test_failure_is_a_probability_and_neither_certain_nor_impossible(failure):
    message = re.escape(f"failure: expected a probability above 0 and below 1, got {failure}")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Precision(F32, failure=failure)


def test_any_other_probability_will_do():
    assert Precision(F32, failure=1e-300).failure == 1e-300
    assert Precision(F32, failure=1 - 2.0**-53).failure == 1 - 2.0**-53


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_gamma_is_the_smallest_number_that_is_proven(form):
    u = form.unit_roundoff
    assert gamma(0, u) == 0
    for n in (1, 2, 100, 2**form.precision - 1):
        assert is_just_above(gamma(n, u), exact_gamma(n, u))


@pytest.mark.parametrize("n", [256, 257, 1000])
def test_gamma_ends_where_n_roundings_may_lose_everything(n):
    message = f"gamma: expected n * u below 1, got n {n} and u 0.00390625; name a more precise accumulator"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        gamma(n, 2.0**-8)


@pytest.mark.parametrize("n", [1, 7, 4096])
@pytest.mark.parametrize("u", [2.0**-8, 2.0**-24])
@pytest.mark.parametrize("paths", [1.0, 3.0, 1e9])
@pytest.mark.parametrize("failure", [0.5, 1e-12])
def test_probable_gamma_is_the_theorems(n, u, paths, failure):
    assert is_just_above(probable_gamma(n, u, paths, failure), exact_probable_gamma(n, u, paths, failure))


def test_probable_gamma_of_no_path_is_that_of_one():
    assert probable_gamma(5, 2.0**-24, 0.0, 0.1) == probable_gamma(5, 2.0**-24, 1.0, 0.1)
    assert probable_gamma(0, 2.0**-24, 1.0, 0.1) == 0


def test_probable_gamma_is_below_gamma_for_long_sums_and_grows_with_what_is_asked():
    u = 2.0**-24
    assert probable_gamma(4096, u, 1e6, 1e-6) < gamma(4096, u) / 5
    assert probable_gamma(4096, u, 1e6, 1e-6) < probable_gamma(4096, u, 1e6, 1e-7)
    assert probable_gamma(4096, u, 1e6, 1e-6) < probable_gamma(4096, u, 1e7, 1e-6)
    assert probable_gamma(4 * 4096, u, 1e6, 1e-6) == pytest.approx(
        2 * probable_gamma(4096, u, 1e6, 1e-6), rel=1e-3
    )


def test_random_roundings_stay_below_probable_gamma():
    """Of 20000 rows of 64 roundings, uniform in [-u, u], about 10 may exceed the bound for one of 2000."""
    u, n = 2.0**-8, 64
    factors = np.prod(1 + np.random.default_rng(0).uniform(-u, u, (20000, n)), axis=1)
    exceeded = np.abs(factors - 1) > probable_gamma(n, u, 1.0, 1 / 2000)
    assert exceeded.sum() <= 10
    assert (np.abs(factors - 1) > probable_gamma(n, u, 1.0, 1 / 2000) / 3).sum() > 10


@given(
    st.integers(0, 100),
    st.integers(0, 20),
    st.integers(0, 3),
    st.sampled_from(
        [(F16, F32, None), (F32, None, "tf32"), (F32, F64, BF16), (F64, None, None), (BF16, F32, F16)]
    ),
)
def test_growth_is_the_product_of_its_three_factors(terms, stores, products, numbers):
    dtype, accumulator, multiplicands = numbers
    precision = Precision(dtype, accumulator, multiplicands)
    factors = (
        1 + exact_gamma(terms, precision.wide.unit_roundoff),
        1 + exact_gamma(stores, precision.form.unit_roundoff),
        (1 + Fraction(precision.multiplicand_roundoff)) ** (2 * products),
    )
    exact = math.prod(factors) - 1
    computed = precision.growth(terms, stores, products, 1.0)
    assert is_just_above(computed, exact) if exact else computed == 0


def test_growth_with_a_probability_of_failure_replaces_the_first_factor_alone():
    precision = Precision(BF16, accumulator=F32, multiplicands=F16, failure=1e-3)
    first = 1 + exact_probable_gamma(300, 2.0**-24, 20.0, 1e-3)
    exact = first * (1 + exact_gamma(5, 2.0**-8)) * (1 + Fraction(2.0**-11)) ** 4 - 1
    assert is_just_above(precision.growth(300, 5, 2, 20.0), exact)


def test_so_many_terms_that_there_is_no_bound():
    with pytest.raises(ConfigError, match=r"^gamma: .* got n 256 and u 0\.00390625; "):
        Precision(BF16).growth(256, 0, 1, 1.0)
    with pytest.raises(ConfigError, match=r"^gamma: .* got n 2048 and u 0\.00048828125; "):
        Precision(F16, accumulator=F32).growth(3, 2048, 1, 1.0)
    assert math.isfinite(Precision(BF16, failure=0.01).growth(256, 0, 1, 1.0))
