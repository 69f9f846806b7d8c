from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_problems import problem

from loracle.reference import round_float64, round_fraction
from loracle.reference.factors import norm_bound
from loracle.reference.formats import FORMATS, float_format
from loracle.reference.merge_interval import IntervalEvaluator, store
from loracle.reference.merge_product import block_shape, load
from loracle.reference.merge_proof import evaluation_error

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
# What is worked in, and the target.
PAIRS = [(F64, F32), (F64, BF16), (F64, F16), (F32, BF16), (F32, F16)]
BY_PAIR = pytest.mark.parametrize(("work", "target"), PAIRS, ids=str)


@BY_PAIR
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 4, 12]))
def test_ends_that_agree_are_the_exact_entry_rounded(work, target, seed, spread):
    w, B, A, exact, error = problem(seed, work, target, spread)
    evaluator = IntervalEvaluator(A, work, float_format(target))
    most = max(abs(float(q)) for row in exact for q in row) * 2
    absolute, low = float(error.absolute.max()), np.empty(w.shape, target)
    with np.errstate(over="ignore"):
        high = evaluator.round_ends(w, B, error.relative, absolute, most, low)
    assert high.dtype == target
    assert not np.may_share_memory(low, high)
    agree = low == high
    for i, j in np.argwhere(agree):
        assert low[i, j] == round_fraction(exact[i][j], target)
    for i, j in np.argwhere(~agree):
        own = error.relative * (abs(float(exact[i][j])) if target.itemsize == 2 else most) + absolute
        spacing = 2.0 * float_format(target).unit_roundoff * abs(float(exact[i][j])) + 2.0**-24
        assert float(low[i, j]) <= exact[i][j] + Fraction(spacing)
        assert float(high[i, j]) >= exact[i][j] - Fraction(spacing)
        assert float(high[i, j]) - float(low[i, j]) <= 2.5 * own + 2 * spacing
    if spread == 0:
        assert agree.mean() > 0.7


@BY_PAIR
@given(st.integers(0, 2**32 - 1))
def test_sums_beside_a_midpoint_have_ends_that_differ(work, target, seed):
    """w + b a is a midpoint of the target or lies so near that the dtype worked in cannot tell."""
    rng = np.random.default_rng(seed)
    p = float_format(target).precision
    sign = rng.choice([-1.0, 1.0], (3, 1))
    w = ((1 + rng.integers(0, 2 ** (p - 1), (3, 4)) * 2.0 ** (1 - p)) * sign).astype(target)
    B, A = np.hstack([sign, sign]), np.vstack([np.full(4, 2.0**-p), rng.choice([0, 1, -1], 4) * 2.0**-60])
    error = evaluation_error(
        work,
        2,
        norm_bound(B, axis=1),
        float(norm_bound(A, axis=0).max()),
        through_float32=target.itemsize == 2,
    )
    low = np.empty(w.shape, target)
    evaluator = IntervalEvaluator(A, work, float_format(target))
    high = evaluator.round_ends(w, B, error.relative, float(error.absolute.max()), 4.0, low)
    assert (low < high).all()


@BY_PAIR
def test_the_ends_are_e_below_and_e_above(work, target):
    evaluator = IntervalEvaluator(np.ones((1, 2)), work, float_format(target))
    w, low = np.array([[4.0, -4.0]]).astype(target), np.empty((1, 2), target)
    high = evaluator.round_ends(w, np.zeros((1, 1)), 0.25, 2.0, 4.0, low)
    # e is 0.25 * 4 + 2 of each entry.
    assert low.astype(F64).tolist() == [[1.0, -7.0]]
    assert high.astype(F64).tolist() == [[7.0, -1.0]]


@BY_PAIR
@pytest.mark.parametrize("r", [1, 5])
def test_a_block_may_have_fewer_rows_and_columns_need_not_be_a_whole_number_of_slices(
    monkeypatch, work, target, r
):
    monkeypatch.setattr("loracle.reference.merge_product._BLOCK_ENTRIES", 64)
    monkeypatch.setattr("loracle.reference.merge_product._SERIAL_PRODUCT", 32 * r)
    monkeypatch.setattr("loracle.reference.merge_product._LEAST_COLUMNS", 4)
    w, B, A, exact, error = problem(1, work, target, 0, 3, 13, r)
    evaluator = IntervalEvaluator(A, work, float_format(target))
    assert evaluator.rows >= 3
    absolute = float(error.absolute.max())
    for rows in (3, 1, 2):
        low = np.empty((rows, 13), target)
        high = evaluator.round_ends(w[:rows], B[:rows], error.relative, absolute, 4.0, low)
        assert high.shape == (rows, 13)
        middle = (low.astype(float) + high.astype(float)) / 2
        assert np.allclose(middle, np.array(exact, float)[:rows], rtol=2.0**-7, atol=2.0**-8)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("wide", [F32, F64], ids=str)
def test_numbers_of_any_dtype_are_loaded_exactly(dtype, wide):
    values = np.array([[0.0, -0.0, 1.5, -(2.0**-14)], [3.0, -7.25, 2.0**-24, 65504.0]]).astype(dtype)
    for source in (values, np.asfortranarray(values), values[:, ::2]):
        out = np.full(source.shape, 9, wide)
        load(source, out)
        assert out.tolist() == source.astype(F64).tolist()
        assert np.array_equal(np.signbit(out), np.signbit(source.astype(F64)))


@pytest.mark.parametrize("target", [F16, BF16, F32], ids=str)
def test_numbers_that_are_no_ties_are_stored_rounded(target):
    rng = np.random.default_rng(2)
    values = np.ldexp(rng.uniform(-2, 2, (40, 50)), rng.integers(-12, 12, (40, 50)))
    values = values.astype(F64 if target == F32 else F32)
    expected, out = round_float64(values.astype(F64), target), np.empty((40, 100), target)[:, ::2]
    store(values.copy(), out)
    assert np.array_equal(out, expected)
    infinite = np.array([[np.inf, -np.inf, 3.4e38]], values.dtype)
    with np.errstate(over="ignore"):
        store(infinite, out[:1, :3])
    assert out[0, :3].astype(F64).tolist()[:2] == [np.inf, -np.inf]


@pytest.mark.parametrize(
    ("terms", "columns", "expected"),
    [
        (8, 4096, (32, 128)),  # a block is 131,072 entries; a slice no wider than 128 columns
        (65, 4096, (32, 64)),
        (64, 4096, (32, 64)),  # 32 * 64 * 128 are just too many
        (63, 4096, (32, 128)),
        (9, 100, (1310, 16)),
        (3, 5, (5461, 4)),
        (2000, 4096, (8, 16)),  # fewer rows, so that a slice has 16 columns
        (20000, 26, (1, 8)),
        (300000, 16, (1, 1)),
        (1, 0, (16383, 1)),
        (2, 1 << 20, (1, 128)),
    ],
)
def test_blocks_are_cut_for_the_cache_and_for_one_thread(terms, columns, expected):
    rows, width = block_shape(terms, columns)
    assert (rows, width) == expected
    assert rows * width * terms < 2**18 or width == 1


@BY_PAIR
def test_products_are_small_enough_for_one_thread(monkeypatch, work, target):
    plain, sizes = np.matmul, []

    def logged(a, b, out):
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return plain(a, b, out=out)

    rng = np.random.default_rng(2)
    w, B, A = (
        rng.uniform(-1, 1, (40, 300)).astype(target),
        rng.uniform(-1, 1, (40, 70)),
        rng.uniform(-1, 1, (70, 300)),
    )
    monkeypatch.setattr("loracle.reference.merge_product.np.matmul", logged)
    evaluator, low = IntervalEvaluator(A, work, float_format(target)), np.empty(w.shape, target)
    evaluator.round_ends(w, B, 2.0**-20, 1.0, 4.0, low)
    assert sizes
    assert max(sizes) < 2**18


def test_every_target_but_float64_has_an_evaluation():
    assert {target for _, target in PAIRS} | {F64} == {form.dtype for form in FORMATS}
