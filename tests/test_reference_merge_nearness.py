import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_problems import problem

from loracle.reference import round_fraction
from loracle.reference.formats import float_format
from loracle.reference.merge_nearness import NearnessEvaluator
from loracle.reference.merge_proof import EvaluationError

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
PAIRS = [(F64, F32), (F64, BF16), (F64, F16), (F32, BF16), (F32, F16)]
BY_PAIR = pytest.mark.parametrize(("work", "target"), PAIRS, ids=str)


def rounded(exact, target):
    return np.array([[round_fraction(q, target) for q in row] for row in exact])


def stepped(values, steps):
    """Numbers so many steps away in the order of their bits."""
    return (
        (values.view(f"u{values.dtype.itemsize}") + np.asarray(steps))
        .astype(f"u{values.dtype.itemsize}")
        .view(values.dtype)
    )


@BY_PAIR
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 4, 12]))
def test_only_what_is_right_is_proven_and_most_of_it_is(work, target, seed, spread):
    w, B, A, exact, error = problem(seed, work, target, spread)
    error = EvaluationError(error.relative, error.absolute.max(keepdims=True))
    evaluator = NearnessEvaluator(A, work, float_format(target))
    right = rounded(exact, target)
    held = stepped(right, np.random.default_rng(seed).integers(-1, 2, right.shape))
    with np.errstate(all="ignore"):
        unproven = evaluator.unproven(w, B, error, held)
        left = evaluator.unproven(w, B, error, right)
    proven = np.ones(right.size, bool)
    proven[unproven] = False
    wrong = (held.view(f"u{target.itemsize}") != right.view(f"u{target.itemsize}")).reshape(-1)
    assert not (proven & wrong).any()
    assert set(left.tolist()) >= set(unproven[~wrong[unproven]].tolist())
    if spread == 0:
        assert len(left) <= 0.35 * right.size


@BY_PAIR
@given(st.integers(0, 2**32 - 1))
def test_nothing_is_proven_beside_a_midpoint(work, target, seed):
    rng = np.random.default_rng(seed)
    p = float_format(target).precision
    sign = rng.choice([-1.0, 1.0], (3, 1))
    w = ((1 + rng.integers(0, 2 ** (p - 1), (3, 4)) * 2.0 ** (1 - p)) * sign).astype(target)
    B, A = np.hstack([sign, sign]), np.vstack([np.full(4, 2.0**-p), rng.choice([0, 1, -1], 4) * 2.0**-60])
    error = EvaluationError(4 * 2.0 ** (-53 if work == F64 and target == F32 else -24), np.zeros(1))
    evaluator = NearnessEvaluator(A, work, float_format(target))
    for held in (w, stepped(w, 1)):
        assert len(evaluator.unproven(w, B, error, held)) == 12


@BY_PAIR
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_below_a_power_of_two_the_spacing_is_half_as_large(work, target, sign):
    """The exact entry is three quarters of the lower spacing below 1: its rounding is 1's predecessor."""
    u = float_format(target).unit_roundoff
    error = EvaluationError(4 * 2.0**-53 if target == F32 else 2.0**-22, np.zeros(1))
    value = sign * (1 - 0.75 * u)
    w, B, A = np.zeros((1, 2), target), np.array([[value]]), np.ones((1, 2))
    held = np.array([[sign, sign * (1 - u)]]).astype(target)
    evaluator = NearnessEvaluator(A, work, float_format(target))
    assert evaluator.unproven(w, B, error, held).tolist() == [0]


@BY_PAIR
def test_an_error_that_reaches_below_a_power_of_two_proves_nothing_there(work, target):
    """v is 1 itself, but q may lie below it, where 1's neighbour is half as far away."""
    u = float_format(target).unit_roundoff
    w, B, A = np.ones((1, 1), target), np.zeros((1, 1)), np.ones((1, 1))
    evaluator, held = NearnessEvaluator(A, work, float_format(target)), np.ones((1, 1), target)
    for absolute, proven in ((0.6 * u, False), (0.5 * u, False), (0.2 * u, True)):
        error = EvaluationError(4 * 2.0**-53, np.array([absolute]))
        assert (len(evaluator.unproven(w, B, error, held)) == 0) == proven


@BY_PAIR
def test_zeros_infinities_and_nan_are_never_proven(work, target):
    evaluator = NearnessEvaluator(np.ones((1, 5)), work, float_format(target))
    held = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(target)
    tiny = float_format(target).smallest_subnormal / 8
    with np.errstate(all="ignore"):
        for value in (0.0, tiny, float_format(target).largest, np.inf, np.nan):
            w = np.full((1, 5), value).astype(target)
            error = EvaluationError(2.0**-51 if target == F32 else 2.0**-22, np.zeros(1))
            assert evaluator.unproven(w, np.zeros((1, 1)), error, held).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("work", [F32, F64], ids=str)
def test_subnormal_numbers_of_float16_are_proven_with_the_spacing_there(work):
    smallest = 2.0**-24
    value = np.array([[5.4, 5.6, 5.4, 1023.4, 1024.4, 0.6, 0.4]]) * smallest
    held = np.array([[5, 6, 6, 1023, 1024, 1, 0]]) * smallest
    error = EvaluationError(2.0**-22, np.array([smallest / 100]))
    w = np.zeros((1, 7), F16)
    evaluator = NearnessEvaluator(value, work, float_format(F16))
    assert evaluator.unproven(w, np.ones((1, 1)), error, held.astype(F16)).tolist() == [2, 6]
    wide = EvaluationError(2.0**-22, np.array([smallest / 9]))
    left = evaluator.unproven(w, np.ones((1, 1)), wide, held.astype(F16)).tolist()
    assert left == [0, 1, 2, 5, 6] or left == [0, 1, 2, 3, 4, 5, 6]


def test_an_overflow_is_not_proven_to_be_infinite_nor_the_largest_number():
    w, evaluator = np.zeros((1, 3), F16), NearnessEvaluator(np.ones((1, 3)), F32, float_format(F16))
    error = EvaluationError(2.0**-22, np.zeros(1))
    held = np.array([[65504.0, np.inf, 65504.0]]).astype(F16)
    with np.errstate(all="ignore"):
        for value, left in ((65519.0, [1]), (65520.0, [0, 1, 2]), (65536.0, [0, 1, 2])):
            assert evaluator.unproven(w, np.full((1, 1), value), error, held).tolist() == left


def test_each_column_has_its_own_error():
    evaluator = NearnessEvaluator(np.ones((1, 4)), F64, float_format(BF16))
    error = EvaluationError(2.0**-51, np.array([0.0, 2.0**-9, 2.0**-11, 2.0**-7]))
    held = np.full((2, 4), 1.5).astype(BF16)
    assert evaluator.unproven(held, np.zeros((2, 1)), error, held).tolist() == [1, 3, 5, 7]


def test_half_a_spacing_less_the_error_is_where_the_proof_ends():
    evaluator = NearnessEvaluator(np.ones((1, 1)), F64, float_format(BF16))
    e = 2.0**-12
    error, held = EvaluationError(2.0**-51, np.array([e])), np.array([[1.5]]).astype(BF16)
    for distance, proven in ((2.0**-8 - 1.1 * e, True), (2.0**-8 - e, False), (2.0**-8, False)):
        for sign in (1, -1):
            value = np.array([[1.5 + sign * distance]])
            left = evaluator.unproven(np.zeros((1, 1), BF16), value, error, held)
            assert (len(left) == 0) == proven
    relative = 2.0**-12
    error = EvaluationError(relative, np.zeros(1))
    for share, proven in ((2.1, True), (1.5, False), (1.0, False)):
        value = np.array([[1.5 + 2.0**-8 - share * relative]])
        left = evaluator.unproven(np.zeros((1, 1), BF16), value, error, held)
        assert (len(left) == 0) == proven
