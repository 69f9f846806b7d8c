from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.reference import round_fraction
from loracle.reference.factors import norm_bound
from loracle.reference.formats import FORMATS, float_format
from loracle.reference.merge_interval import IntervalEvaluator, multiply
from loracle.reference.merge_proof import EvaluationError, evaluation_error, prove_entries, round_once_more

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
# What is worked in, and the target.
PAIRS = [(F64, F32), (F64, BF16), (F64, F16), (F32, BF16), (F32, F16)]
BY_PAIR = pytest.mark.parametrize(("work", "target"), PAIRS, ids=str)


def test_the_error_is_the_one_derived():
    rows = np.array([2.0, 0.25])
    r, column = 3, 5.0
    for work, u, eta in ((F64, 2.0**-53, 2.0**-1074), (F32, 2.0**-24, 2.0**-126)):
        expected = 1.01 * (r + 6) * u * rows * column + 4 * r * eta * (rows + column + 2)
        error = evaluation_error(work, float_format(F32), r, rows, column)
        assert error.relative == 4 * u
        assert np.allclose(error.absolute, expected, rtol=2.0**-40, atol=0)
        narrow = evaluation_error(work, float_format(BF16), r, rows, column)
        assert narrow.relative == 2.0**-22
        assert np.allclose(narrow.absolute, expected + 2.0**-124, rtol=2.0**-40, atol=0)
    tiny = evaluation_error(F32, float_format(F32), r, rows * 0, 0.0)
    assert tiny.absolute.tolist() == [2 * 12 * 2.0**-126] * 2


def test_a_wide_number_reaches_16_bits_through_float32():
    values = np.array([1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-9)])
    out = np.empty(3, BF16)
    round_once_more(values, out)
    assert out.astype(float).tolist() == [1, 1 + 2.0**-7, -1]
    round_once_more(values.astype(F32), out)
    assert out.astype(float).tolist() == [1, 1 + 2.0**-7, -1]
    single = np.empty(3, F32)
    round_once_more(values, single)
    assert single.tolist() == values.astype(F32).tolist()


def problem(seed, work, target, spread, rows=4, columns=5, r=3):
    """Inputs of the dtypes given, the exact entries, and an error that is meant to hold for the
    evaluation.
    """
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return np.ldexp(rng.uniform(-1, 1, shape), rng.integers(-spread, spread + 1, shape))

    w, B, A = numbers(rows, columns).astype(target), numbers(rows, r), numbers(r, columns)
    scaling = 1 / 3
    exact = [
        [Fraction(float(w[i, j])) + Fraction(scaling) * dot(B[i], A[:, j]) for j in range(columns)]
        for i in range(rows)
    ]
    scaled = B * scaling
    norms, norm = norm_bound(scaled, axis=1), float(norm_bound(A, axis=0).max())
    return w, scaled, A, exact, evaluation_error(work, float_format(target), r, norms, norm)


def dot(b, a):
    return sum(Fraction(x) * Fraction(y) for x, y in zip(b, a, strict=True))


@BY_PAIR
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 4, 12]))
def test_the_interval_of_every_entry_holds_the_exact_one(work, target, seed, spread):
    w, B, A, exact, error = problem(seed, work, target, spread)
    evaluator = IntervalEvaluator(work, float_format(target))
    most = max(abs(float(q)) for row in exact for q in row) * 2
    absolute = float(error.absolute.max())
    low, high = evaluator.ends(w, B.astype(work), A.astype(work), error.relative, absolute, most)
    assert low.dtype == high.dtype == (F32 if target.itemsize == 2 else F64)
    assert not np.may_share_memory(low, high)
    for i, j in np.ndindex(*w.shape):
        assert Fraction(float(low[i, j])) <= exact[i][j] <= Fraction(float(high[i, j]))
        own = error.relative * (abs(float(exact[i][j])) if target.itemsize == 2 else most) + absolute
        assert high[i, j] - low[i, j] <= 2.5 * own


@BY_PAIR
def test_evaluators_may_be_used_for_blocks_of_changing_shape(work, target):
    evaluator = IntervalEvaluator(work, float_format(target))
    for shape in ((3, 4), (3, 4), (2, 4), (2, 7)):
        w, B, A, exact, error = problem(1, work, target, 0, *shape)
        absolute = float(error.absolute.max())
        low, high = evaluator.ends(w, B.astype(work), A.astype(work), error.relative, absolute, 4.0)
        assert low.shape == high.shape == shape
        middle = (low.astype(float) + high) / 2
        assert np.allclose(middle, np.array(exact, float), rtol=2.0**-18, atol=2.0**-18)
        assert (low <= middle).all()


@pytest.mark.parametrize("target", [BF16, F16], ids=str)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 8]))
def test_what_is_proven_of_single_entries_is_right(target, seed, spread):
    w, B, A, exact, error = problem(seed, F64, target, spread)
    i, j = np.divmod(np.arange(w.size), w.shape[1])
    single = EvaluationError(error.relative, error.absolute[i])
    with np.errstate(over="ignore"):
        entries, proven = prove_entries(w[i, j].astype(F64), B[i], A[:, j].T, single, float_format(target))
    assert entries.dtype == target
    right = [round_fraction(exact[a][b], target) for a, b in zip(i, j, strict=True)]
    for n in np.flatnonzero(proven):
        assert entries[n] == right[n]
    if spread == 0:
        assert proven.mean() > 0.8


def test_nothing_is_proven_beside_a_midpoint_or_beyond_float64():
    form, nothing = float_format(BF16), EvaluationError(2.0**-22, np.zeros(4))
    w = np.array([1.0, 1.0, 1.0, 1.0])
    b = np.array([[2.0**-8], [2.0**-8 + 2.0**-24], [2.0**-8 + 2.0**-16], [1e308]])
    a = np.array([[1.0], [1.0], [1.0], [10.0]])
    with np.errstate(all="ignore"):
        entries, proven = prove_entries(w, b, a, nothing, form)
    assert proven.tolist() == [False, False, True, False]
    assert float(entries[2]) == 1 + 2.0**-7


@pytest.mark.parametrize("r", [1, 3, 64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 300), (64, 3000)], ids=str)
def test_products_are_cut_into_stacks_and_nothing_is_left_out(monkeypatch, r, shape):
    rng = np.random.default_rng(1)
    B, A = rng.integers(-4, 5, (shape[0], r)).astype(F32), rng.integers(-4, 5, (r, shape[1])).astype(F32)
    sizes = []
    plain = np.matmul
    monkeypatch.setattr(
        "loracle.reference.merge_interval.np.matmul",
        lambda a, b, out: sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1]) or plain(a, b, out=out),
    )
    out = np.full(shape, 9, F32)
    multiply(B, A, out)
    monkeypatch.undo()
    assert np.array_equal(out, (B.astype(int) @ A.astype(int)).astype(F32))
    assert max(sizes) <= max(2**18, r * shape[1])
    assert max(sizes) * 2 > min(2**18, B.size * shape[1])


def test_every_target_but_float64_has_an_evaluation():
    assert {target for _, target in PAIRS} | {F64} == {form.dtype for form in FORMATS}
