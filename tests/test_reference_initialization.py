import math
import re
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_linear import error, rational
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    adapter_start,
    embedding_start,
    gamma,
    gaussian_start,
    kaiming_both_start,
    kaiming_start,
    lora_scaling,
    merge,
    merge_exact,
    olora_start,
    orthogonal_start,
    pissa_start,
    round_to,
    unit_roundoff,
)
from loracle.reference.formats import FORMATS, float_format

BF16 = np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
RANDOM = (kaiming_start, kaiming_both_start, gaussian_start, orthogonal_start)
BY_START = pytest.mark.parametrize("start", RANDOM, ids=lambda start: start.__name__)
# A deviation of the mean of n draws that a right generator has once in 10^9 seeds: six standard errors.
SIGMAS = 6


def weight(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def check_moments(values, second, fourth, eighth=None):
    """Check mean and mean square (and, given E x^8, mean fourth power) of draws of mean zero."""
    values = values.astype(F64).ravel()
    n = values.size
    assert abs(values.mean()) <= SIGMAS * math.sqrt(second / n)
    assert abs((values**2).mean() - second) <= SIGMAS * math.sqrt((fourth - second**2) / n)
    if eighth is not None:
        assert abs((values**4).mean() - fourth) <= SIGMAS * math.sqrt((eighth - fourth**2) / n)


def check_uniform(values, bound):
    dtype = values.dtype
    assert np.abs(values).max() <= dtype.type(bound)
    # The largest of n falls below 1 - 20 / n of the bound with probability e^-20.
    assert np.abs(values).max() >= bound * (1 - 20 / values.size)
    check_moments(values, bound**2 / 3, bound**4 / 5, bound**8 / 9)


def check_normal(values, deviation):
    check_moments(values, deviation**2, 3 * deviation**4, 105 * deviation**8)


def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs():
    start = kaiming_start(weight(7, 900), 30, np.random.default_rng(0))
    assert start.A.shape == (30, 900)
    check_uniform(start.A, 1 / 30)
    assert start.B.shape == (7, 30)
    assert not start.B.any()


def test_kaiming_for_both_has_the_bound_of_each_matrixs_own_inputs():
    start = kaiming_both_start(weight(1000, 400), 25, np.random.default_rng(1))
    assert start.A.shape == (25, 400)
    check_uniform(start.A, 1 / 20)
    assert start.B.shape == (1000, 25)
    check_uniform(start.B, 1 / 5)


def test_gaussian_has_a_deviation_of_one_over_the_rank():
    start = gaussian_start(weight(7, 5000), 4, np.random.default_rng(2))
    assert start.A.shape == (4, 5000)
    check_normal(start.A, 1 / 4)
    assert start.B.shape == (7, 4)
    assert not start.B.any()


def test_an_embedding_has_its_zeros_in_lora_a():
    W0 = weight(30, 5000)
    start = embedding_start(W0, 4, np.random.default_rng(3))
    assert start.A.shape == (4, 30)
    assert not start.A.any()
    assert start.B.shape == (5000, 4)
    check_normal(start.B, 1.0)
    start = embedding_start(weight(5000, 3000), 4, np.random.default_rng(3), zero_A=False)
    check_normal(start.A, 1.0)
    check_normal(start.B, 1.0)
    assert start.A[0, 0] != start.B[0, 0]


def orthogonality_error(r):
    """How far the computed factor of an r by r matrix is from an orthogonal one, in the Frobenius norm.

    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., theorem 19.4: sqrt(r) gamma_(c r^2)
    for Householder's QR, with a small constant c: here 10.
    """
    return math.sqrt(r) * gamma(10 * r * r, unit_roundoff(F64))


@BY_DTYPE
@pytest.mark.parametrize("r", [2, 4, 12])
def test_an_orthogonal_start_is_no_update_but_for_rounding(dtype, r):
    for seed in range(3):
        start = orthogonal_start(weight(7, 5), r, np.random.default_rng(seed), dtype=dtype)
        assert start.A.shape == (r, 5)
        assert start.B.shape == (7, r)
        A, B = start.A.astype(F64), start.B.astype(F64)
        assert (np.abs(A).max(axis=1) > 0).all()
        assert (np.abs(B).max(axis=0) > 0).all()
        sizes = np.abs(B) @ np.abs(A)
        u = unit_roundoff(dtype)
        # |H Q_2| |Q_1^T G| / 100 <= |B||A|; the errors of Q weigh |H||G| / 100, and ||Q|| is 1.
        rng = np.random.default_rng(seed)
        rng.standard_normal((r, r))
        G, H = np.abs(rng.standard_normal((r // 2, 5))), np.abs(rng.standard_normal((7, r // 2)))
        wide = 3 * orthogonality_error(r) * np.outer(H.sum(axis=1), G.sum(axis=0)) / 100
        wide += 2 * gamma(r, unit_roundoff(F64)) * r * np.outer(H.sum(axis=1), G.sum(axis=0)) / 100
        tiny = float_format(dtype).smallest_subnormal * (np.abs(A).sum(0) + np.abs(B).sum(1)[:, None] + r)
        bound = (2 * u + u * u) * (1 + 4 * u) * sizes + wide + tiny
        assert (error(start.B.astype(F64) @ A, np.zeros((7, 5))) <= bound + gamma(r, 2.0**-53) * sizes).all()
        # Half of the entries' products would be there if the two took the same rows, or none of Q.
        shuffled = B[:, np.argsort(-np.arange(r))] @ A
        assert r == 2 or (np.abs(shuffled) > bound).any()


def test_an_orthogonal_start_has_normal_factors_a_tenth_in_size_on_half_the_rank():
    start = orthogonal_start(weight(3000, 2000), 8, np.random.default_rng(4), dtype=F64)
    for factor in (start.A, start.B.T):
        singular = np.linalg.svd(factor, compute_uv=False)
        assert (singular[:4] > 1).all()
        assert (singular[4:] < 1e-12).all()
        # Orthogonal rows change no norm: 100 times the sum of squares is that of 4 n normal numbers.
        n = 4 * factor.shape[1]
        assert abs(100 * (factor**2).sum() - n) <= SIGMAS * math.sqrt(2 * n)


def test_an_orthogonal_start_is_the_product_that_it_says():
    rng = np.random.default_rng(5)
    Q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    G, H = rng.standard_normal((3, 5)), rng.standard_normal((7, 3))
    start = orthogonal_start(weight(7, 5), 6, np.random.default_rng(5))
    assert start.A.tolist() == (Q[[0, 2, 4]].T @ G / 10).astype(F32).tolist()
    assert start.B.tolist() == (H @ Q[[1, 3, 5]] / 10).astype(F32).tolist()


@BY_START
@BY_DTYPE
def test_random_starts_depend_on_the_generator_alone_and_leave_the_weight(start, dtype):
    W0 = np.arange(15.0).reshape(3, 5).astype(BF16)
    first, again = (start(W0, 4, np.random.default_rng(6), dtype=dtype) for _ in range(2))
    other = start(W0, 4, np.random.default_rng(7), dtype=dtype)
    assert first.W0 is W0
    assert first.A.dtype == first.B.dtype == dtype
    assert first.A.tobytes() == again.A.tobytes()
    assert first.B.tobytes() == again.B.tobytes()
    assert (first.A != other.A).any()
    # Drawn in float64 and rounded once, whatever the dtype.
    wide = start(W0, 4, np.random.default_rng(6), dtype=F64)
    assert first.A.tobytes() == round_to(wide.A, dtype).tobytes()
    assert first.B.tobytes() == round_to(wide.B, dtype).tobytes()
    transposed = start(W0.T, 4, np.random.default_rng(6), dtype=dtype, fan_in_fan_out=True)
    assert transposed.A.tobytes() == first.A.tobytes()
    assert transposed.B.tobytes() == first.B.tobytes()
    assert start(W0, 4, np.random.default_rng(6)).A.dtype == F32


@BY_DTYPE
@pytest.mark.parametrize("zero_A", [True, False])
def test_an_embeddings_start_depends_on_the_generator_alone_and_leaves_the_weight(dtype, zero_A):
    W0 = np.arange(15.0).reshape(3, 5)
    first, again, other = (
        embedding_start(W0, 2, np.random.default_rng(seed), dtype=dtype, zero_A=zero_A) for seed in (6, 6, 7)
    )
    assert first.W0 is W0
    assert first.A.dtype == first.B.dtype == dtype
    assert first.A.tobytes() == again.A.tobytes()
    assert first.B.tobytes() == again.B.tobytes()
    assert (first.B != other.B).any()
    assert embedding_start(W0, 2, np.random.default_rng(6)).B.dtype == F32
    assert embedding_start(W0, 2, np.random.default_rng(6)).A.dtype == F32


def test_a_start_is_immutable_and_equal_to_itself_alone():
    start = kaiming_start(weight(2, 3), 1, np.random.default_rng(0))
    with pytest.raises(FrozenInstanceError):
        start.W0 = None
    assert start != replace(start)


def test_the_rank_may_exceed_the_weights_where_the_weight_is_left_alone():
    for start in RANDOM:
        made = start(weight(2, 3), 8, np.random.default_rng(0))
        assert (made.A.shape, made.B.shape) == ((8, 3), (2, 8))


SMALL = np.diag([16.0, 4.0, 1.0])[[1, 0, 2]]  # its singular triplets are unit vectors


@pytest.mark.parametrize("transposed", [False, True])
def test_pissa_worked_out_by_hand(transposed):
    """The largest value, 16, over a scaling of 4 is 4 = 2 * 2; without its triplet 4 and 1 are left."""
    W0 = np.pad(SMALL, ((0, 0), (0, 1)))
    start = pissa_start(W0.T if transposed else W0, 1, 4.0, fan_in_fan_out=transposed)
    assert np.abs(start.A).tolist() == [[2, 0, 0, 0]]
    assert np.abs(start.B).tolist() == [[0], [2], [0]]
    assert (start.B @ start.A).tolist() == [[0, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    residual = [[0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert (start.W0.T if transposed else start.W0).tolist() == residual
    assert start.A.dtype == start.B.dtype == F32
    assert start.W0.dtype == F64


@pytest.mark.parametrize("transposed", [False, True])
def test_olora_worked_out_by_hand(transposed):
    """Columns (0, 3, 4) and (0, 4, -3) are orthogonal: Q's columns are their fifths, R is diagonal."""
    W0 = np.array([[0.0, 0.0], [3.0, 4.0], [4.0, -3.0]])
    start = olora_start(W0.T if transposed else W0, 1, 0.5, fan_in_fan_out=transposed, dtype=F64)
    u = 8 * unit_roundoff(F64)
    assert np.abs(np.abs(start.A) - [[5, 0]]).max() <= 5 * u
    assert np.abs(np.abs(start.B) - [[0], [0.6], [0.8]]).max() <= u
    W = start.W0.T if transposed else start.W0
    assert np.abs(W - [[0, 0], [1.5, 4], [2, -3]]).max() <= 8 * u
    assert olora_start(W0, 1, 0.5).A.dtype == F32


def with_gap(rng, out_features, in_features, r):
    """Return W0 and its part of rank r; its r-th singular value is at least three times the next."""
    rank = min(out_features, in_features)
    P, _ = np.linalg.qr(rng.standard_normal((out_features, rank)))
    Q, _ = np.linalg.qr(rng.standard_normal((in_features, rank)))
    S = np.concatenate([rng.uniform(3, 6, r), rng.uniform(0.1, 1, rank - r)])
    return P * S @ Q.T, (P * S)[:, :r] @ Q[:, :r].T, S


def svd_error(W, gap, u):
    """How far a computed best approximation of rank r may be from the exact one, in the 2-norm.

    The computed triplets are those of W + E, ||E|| <= p u ||W|| (LAPACK Users' Guide, section 4.9), p = m n
    here. With P the projector on the left vectors, P' W' - P W = (P' - P) W + P' E, and Wedin's theorem gives
    ||P' - P|| <= ||E|| / (gap - ||E||).
    """
    norm = np.linalg.norm(W, 2)
    E = W.size * u * norm
    return E * (1 + norm / (gap - E))


@st.composite
def problems(draw):
    out_features, in_features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    r = draw(st.integers(1, min(out_features, in_features)))
    scaling = draw(st.sampled_from([1.0, 2.0, 0.25, lora_scaling(3, 16, use_rslora=True)]))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))), out_features, in_features, r, scaling


def rounding_of_factors(A, B, scaling):
    u = unit_roundoff(A.dtype)
    sizes = np.abs(B.astype(F64)) @ np.abs(A.astype(F64))
    subnormal = float_format(A.dtype).smallest_subnormal
    tiny = subnormal * (np.abs(A.astype(F64)).sum(0) + np.abs(B.astype(F64)).sum(1)[:, None] + len(A))
    # Each factor is off by u, and what is compared in float64 by gamma_n of it.
    return scaling * ((2 * u + u * u) * (1 + 4 * u) + gamma(len(A) + 4, unit_roundoff(F64))) * sizes + tiny


@BY_DTYPE
@settings(max_examples=20)
@given(problem=problems())
def test_pissa_takes_out_the_best_approximation_of_its_rank(dtype, problem):
    rng, out_features, in_features, r, scaling = problem
    W0, best, S = with_gap(rng, out_features, in_features, r)
    start = pissa_start(W0, r, scaling, dtype=dtype)
    assert start.A.shape == (r, in_features)
    assert start.B.shape == (out_features, r)
    A, B = start.A.astype(F64), start.B.astype(F64)
    allowed = 2 * svd_error(W0, 2.0, unit_roundoff(F64)) + rounding_of_factors(start.A, start.B, scaling)
    assert (np.abs(scaling * B @ A - best) <= allowed).all()
    # Balanced: both factors carry the root of the singular value over the scaling, largest first.
    expected = np.sort(S[:r])[::-1] / scaling
    close = 4 * unit_roundoff(dtype) + 4 * W0.size * unit_roundoff(F64) * 6
    tiny = float_format(dtype).smallest_subnormal * 16
    for squares in ((A**2).sum(axis=1), (B**2).sum(axis=0)):
        assert (np.abs(squares - expected) <= close * expected + tiny).all()


@settings(max_examples=20)
@given(problems())
def test_a_factor_in_a_narrower_dtype_is_outside_the_tolerance(problem):
    rng, out_features, in_features, r, scaling = problem
    W0, best, _ = with_gap(rng, out_features + 3, in_features + 3, r)
    narrow = pissa_start(W0, r, scaling, dtype=BF16)
    right = pissa_start(W0, r, scaling, dtype=F32)
    allowed = 2 * svd_error(W0, 2.0, unit_roundoff(F64)) + rounding_of_factors(right.A, right.B, scaling)
    update = scaling * narrow.B.astype(F64) @ narrow.A.astype(F64)
    assert (np.abs(update - best) > allowed).any()


@BY_DTYPE
@settings(max_examples=20)
@given(problem=problems())
def test_olora_takes_out_what_its_first_columns_span(dtype, problem):
    rng, out_features, in_features, r, scaling = problem
    W0 = rng.standard_normal((out_features, in_features))
    start = olora_start(W0, r, scaling, dtype=dtype)
    assert start.A.shape == (r, in_features)
    assert start.B.shape == (out_features, r)
    A, B = start.A.astype(F64), start.B.astype(F64)
    assert not np.tril(A, -1).any()
    u = unit_roundoff(dtype)
    turned = math.sqrt(r) * gamma(10 * W0.size, unit_roundoff(F64))
    tiny = 4 * float_format(dtype).smallest_subnormal * out_features
    assert np.abs(B.T @ B - np.eye(r)).max() <= 2 * u + u * u + 3 * turned + tiny
    # Q R gives back the first r columns themselves.
    allowed = turned * np.linalg.norm(W0) + rounding_of_factors(start.A, start.B, 1.0)
    assert (np.abs(B @ A - W0)[:, :r] <= allowed[:, :r]).all()


STARTS = {"pissa": pissa_start, "olora": olora_start}


@pytest.mark.parametrize("name", STARTS)
@BY_DTYPE
@settings(max_examples=15)
@given(problem=problems(), factors=st.sampled_from([BF16, F32]))
def test_the_residual_is_rounded_once_and_merging_gives_the_weight_back(name, dtype, problem, factors):
    rng, out_features, in_features, r, scaling = problem
    W0 = rng.standard_normal((out_features, in_features)).astype(dtype)
    kept = W0.tobytes()
    start = STARTS[name](W0, r, scaling, dtype=factors)
    assert W0.tobytes() == kept
    assert start.W0 is not W0
    assert start.A.dtype == start.B.dtype == factors
    residual = merge_exact(W0, start.A, start.B, -scaling, dtype)
    assert start.W0.tobytes() == residual.tobytes()
    back = merge(start.W0, start.A, start.B, scaling)
    moved = error(back, rational(W0))
    exact = rational(W0) - Fraction(scaling) * (rational(start.B) @ rational(start.A))
    rounding = error(start.W0, exact)
    form = float_format(dtype)
    _, exponents = np.frexp(np.abs(start.W0.astype(F64)))
    unit = np.ldexp(1.0, np.maximum(exponents - 1, form.min_exponent) - form.precision + 1)
    assert (rounding <= unit / 2 * (1 + 2.0**-40)).all()
    assert (moved <= 2 * rounding * (1 + 2.0**-40)).all()
    transposed = STARTS[name](W0.T, r, scaling, dtype=factors, fan_in_fan_out=True)
    for field in ("A", "B"):
        assert getattr(transposed, field).tobytes() == getattr(start, field).tobytes()
    assert np.array_equal(transposed.W0, start.W0.T)


def test_the_weight_does_not_always_come_back():
    """The residual may be the larger one: half its unit is lost for good."""
    W0 = np.array([[1.0, 1.0]], BF16) * BF16.type(0.0078125) + np.array([[1.0, 0.0]], BF16)
    start = olora_start(W0, 1, 300.0, dtype=F32)
    back = merge(start.W0, start.A, start.B, 300.0)
    assert 0 < np.abs(back - W0).astype(F64).max() <= 2.0


@pytest.mark.parametrize("scaling", [-0.5, 0.0])
def test_olora_takes_any_finite_scaling(scaling):
    W0 = np.random.default_rng(8).standard_normal((3, 4))
    start = olora_start(W0, 2, scaling)
    assert start.W0.tobytes() == merge_exact(W0, start.A, start.B, -scaling, F64).tobytes()


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
@pytest.mark.parametrize(
    ("value", "start"),
    [
        (True, kaiming_start),
        (False, kaiming_both_start),
        ("gaussian", gaussian_start),
        ("orthogonal", orthogonal_start),
        ("pissa", pissa_start),
        ("olora", olora_start),
    ],
)
def test_every_start_has_pefts_name(value, start, dtype, fan_in_fan_out):
    W0 = np.random.default_rng(9).standard_normal((3, 5))
    made = adapter_start(
        value, W0, 2, 1.5, np.random.default_rng(1), dtype=dtype, fan_in_fan_out=fan_in_fan_out
    )
    argument = 1.5 if value in ("pissa", "olora") else np.random.default_rng(1)
    expected = start(W0, 2, argument, dtype=dtype, fan_in_fan_out=fan_in_fan_out)
    for field in ("A", "B", "W0"):
        assert getattr(made, field).tobytes() == getattr(expected, field).tobytes()
        assert getattr(made, field).dtype == getattr(expected, field).dtype
    assert (made.W0 is W0) == (value not in ("pissa", "olora"))
    assert adapter_start(value, W0, 2, 1.5, np.random.default_rng(1)).A.dtype == F32
    assert adapter_start(value, W0, 2, 1.5, np.random.default_rng(1)).A.shape == (2, 5)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("pissa_niter_4", "'pissa' is what it approximates"),
        ("eva", "name one of them"),
        ("PiSSA", "name one of them"),
        (None, "name one of them"),
        (1, "name one of them"),
    ],
)
def test_other_names_are_refused(value, remedy):
    names = "True, False, 'gaussian', 'orthogonal', 'pissa', 'olora'"
    message = f"init_lora_weights: expected one of {names}, got {value!r}; {remedy}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        adapter_start(value, weight(3, 5), 2, 1.0, np.random.default_rng(0))


def every_start(W0, r, dtype=F32):
    rng = np.random.default_rng(0)
    calls = [lambda start=start: start(W0, r, rng, dtype=dtype) for start in (*RANDOM, embedding_start)]
    return calls + [
        lambda start=start: start(W0, r, 1.0, dtype=dtype) for start in (pissa_start, olora_start)
    ]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3), (3, 0)])
def test_a_weight_that_is_no_matrix_is_refused(shape):
    for call in every_start(np.zeros(shape), 2):
        refused(
            call,
            ShapeError,
            f"W0: expected (out, in), neither of them 0, got {shape}; pass the weight matrix",
        )


@pytest.mark.parametrize("r", [0, -2, True, 1.0, "2"])
def test_a_rank_that_is_no_positive_integer_is_refused(r):
    for call in every_start(np.ones((3, 4)), r):
        refused(call, ConfigError, f"r: expected an integer of at least 1, got {r!r}; set the adapter's rank")


def test_other_dtypes_are_refused():
    for call in every_start(np.ones((3, 4), int), 2):
        with pytest.raises(DTypeError, match=r"^W0: expected one of float16, .*, got dtype\('int64'\)"):
            call()
    for call in every_start(np.ones((3, 4)), 2, dtype=np.int8):
        with pytest.raises(DTypeError, match=r"^dtype of A and B: expected one of float16, .*'int8'"):
            call()


@pytest.mark.parametrize("r", [1, 3, 5])
def test_an_odd_rank_has_no_orthogonal_start(r):
    refused(
        lambda: orthogonal_start(weight(3, 4), r, np.random.default_rng(0)),
        ConfigError,
        f"r: expected an even rank for an orthogonal start, got {r}; add or drop one",
    )


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_weight_has_no_more_singular_values_than_its_rank(start):
    for shape in ((3, 5), (5, 3)):
        start(np.ones(shape) + np.eye(*shape), 3, 1.0)
        refused(
            lambda shape=shape: start(np.ones(shape), 4, 1.0),
            ConfigError,
            f"r: expected at most 3, the full rank of W0 {shape}, got 4; lower it",
        )
        refused(
            lambda shape=shape: start(np.ones(shape[::-1]), 4, 1.0, fan_in_fan_out=True),
            ConfigError,
            f"r: expected at most 3, the full rank of W0 {shape}, got 4; lower it",
        )


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(start, value):
    W0 = np.ones((3, 5))
    W0[1, 2] = value
    message = f"W0: expected finite numbers, got {value} at [1, 2] of (out, in); fetch it again"
    refused(lambda: start(W0, 1, 1.0), NonFiniteError, message)
    refused(lambda: start(W0.T, 1, 1.0, fan_in_fan_out=True), NonFiniteError, message)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.inf, math.nan])
def test_pissa_divides_by_a_positive_scaling(scaling):
    refused(
        lambda: pissa_start(np.ones((3, 4)), 1, scaling),
        ConfigError,
        "scaling: expected a finite number above 0 to divide singular values by, "
        f"got {scaling}; check lora_alpha",
    )


def test_what_overflows_is_refused():
    W0 = np.full((3, 4), 1e12)
    with pytest.raises(
        NonFiniteError, match=r"^lora_A of W0: expected finite numbers, got -?inf at \[0, 0\]"
    ):
        pissa_start(W0, 1, 1.0, dtype=np.float16)
    with pytest.raises(NonFiniteError, match=r"^W0: expected singular values of at most 1\.7977e\+308, got"):
        pissa_start(np.full((2, 2), 1.5e308), 1, 1.0)
    with pytest.raises(NonFiniteError, match=r"^scaling of W0: expected a finite number, got -inf"):
        olora_start(W0, 1, math.inf)
