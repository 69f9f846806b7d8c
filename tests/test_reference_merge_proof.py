import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_problems import problem

from loracle.reference import round_fraction
from loracle.reference.factors import norm_bound
from loracle.reference.formats import float_format
from loracle.reference.merge_proof import EvaluationError, evaluation_error, prove_entries

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))


def test_the_error_is_the_one_derived():
    rows = np.array([2.0, 0.25])
    r, column = 3, 5.0
    for work, u, eta in ((F64, 2.0**-53, 2.0**-1074), (F32, 2.0**-24, 2.0**-126)):
        expected = 1.01 * (r + 6) * u * rows * column + 4 * r * eta * (rows + column + 2)
        error = evaluation_error(work, r, rows, column)
        assert error.relative == 4 * u
        assert np.allclose(error.absolute, expected, rtol=2.0**-40, atol=0)
        narrow = evaluation_error(work, r, rows, column, through_float32=True)
        assert narrow.relative == 2.0**-22
        through = 1.01 * 2.0**-24 * rows * column + 2.0**-124
        assert np.allclose(narrow.absolute, expected + through, rtol=2.0**-40, atol=0)
    one_sided = evaluation_error(F32, r, rows * 0, column).absolute
    assert one_sided.tolist() == [4 * r * 2.0**-126 * (column + 2)] * 2
    tiny = evaluation_error(F32, r, rows * 0, 0.0)
    assert tiny.absolute.tolist() == [2 * 12 * 2.0**-126] * 2
    assert (
        evaluation_error(F32, r, rows * 0, 0.0, through_float32=True).absolute.tolist()
        == [28 * 2.0**-126] * 2
    )


@pytest.mark.parametrize("target", [BF16, F16], ids=str)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 8]))
def test_what_is_proven_of_single_entries_is_right(target, seed, spread):
    w, B, A, exact, _ = problem(seed, F64, target, spread)
    error = evaluation_error(F64, 3, norm_bound(B, axis=1), float(norm_bound(A, axis=0).max()))
    i, j = np.divmod(np.arange(w.size), w.shape[1])
    single = EvaluationError(error.relative, error.absolute[i])
    with np.errstate(over="ignore"):
        entries, proven = prove_entries(w[i, j].astype(F64), B[i], A[:, j].T, single, float_format(target))
    assert entries.dtype == target
    right = [round_fraction(exact[a][b], target) for a, b in zip(i, j, strict=True)]
    for n in np.flatnonzero(proven):
        assert entries[n] == right[n]
    if spread == 0:
        assert proven.all()


def test_nothing_is_proven_beside_a_midpoint_or_beyond_float64():
    form, nothing = float_format(BF16), EvaluationError(2.0**-51, np.zeros(4))
    w = np.array([1.0, 1.0, 1.0, 1.0])
    b = np.array([[2.0**-8], [2.0**-8 + 2.0**-52], [2.0**-8 + 2.0**-40], [1e308]])
    a = np.array([[1.0], [1.0], [1.0], [10.0]])
    with np.errstate(all="ignore"):
        entries, proven = prove_entries(w, b, a, nothing, form)
    assert proven.tolist() == [False, False, True, False]
    assert float(entries[2]) == 1 + 2.0**-7


def test_an_entry_of_zero_or_near_it_is_proven_by_the_absolute_error_alone():
    """value is 0 or tiny: the ends are -e and e, which differ, or lie together far from a midpoint."""
    form = float_format(BF16)
    error = EvaluationError(2.0**-51, np.full(3, 2.0**-30))
    w, b, a = np.zeros(3), np.array([[0.0], [2.0**-31], [1.25]]), np.ones((3, 1))
    entries, proven = prove_entries(w, b, a, error, form)
    assert proven.tolist() == [False, False, True]
    assert float(entries[2]) == 1.25
    assert float(entries[0]) == -(2.0**-30)
    none = EvaluationError(2.0**-51, np.zeros(3))
    assert prove_entries(w, b, a, none, form)[1].tolist() == [True, True, True]


def test_the_relative_error_grows_with_the_value():
    form = float_format(BF16)
    error = EvaluationError(2.0**-12, np.zeros(2))
    b = np.array([[2.0**10 * (1 + 2.0**-8 + 2.0**-11)], [2.0**-10 * (1 + 2.0**-8 + 2.0**-13)]])
    assert prove_entries(np.zeros(2), b, np.ones((2, 1)), error, form)[1].tolist() == [True, False]
