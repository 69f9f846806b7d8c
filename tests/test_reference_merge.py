import sys
import threading
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import lora_problems

from loracle.reference import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    merge,
    merge_exact,
    round_float64,
    round_fraction,
)
from loracle.reference.formats import FORMATS, float_format
from loracle.reference.merge_inputs import check_threads

# The module; the package has a function of that name.
MERGE = sys.modules["loracle.reference.merge"]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(array):
    return np.asarray(array).view(float_format(array.dtype).bits)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.array_equal(bits(actual), bits(expected)), np.argwhere(bits(actual) != bits(expected))[:5]


def gaussian(rng, shape, size, dtype=F32):
    return (rng.standard_normal(shape) * size).astype(dtype)


def entry(w, products, scaling, dtype, w_dtype=F64):
    """Merge the single entry ``w + scaling * sum(b a)``; everything is given in float64."""
    b, a = np.array(products, float).T
    return merge(np.array([[w]], w_dtype), a[:, None], b[None, :], scaling, dtype=dtype)[0, 0]


@BY_DTYPE
@pytest.mark.parametrize("scaling", [2.0, 1 / 3, -0.7])
@pytest.mark.parametrize("factor_dtype", [F32, BF16, F16, F64], ids=str)
def test_random_entries_equal_the_rational_oracle(dtype, factor_dtype, scaling):
    rng = np.random.default_rng(3)
    W0 = gaussian(rng, (32, 40), 0.02, dtype)
    A, B = gaussian(rng, (3, 40), 0.1, factor_dtype), gaussian(rng, (32, 3), 0.1, factor_dtype)
    assert_same_bits(merge(W0, A, B, scaling), merge_exact(W0, A, B, scaling, dtype))


@given(lora_problems(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from([1, 3]))
def test_any_shape_and_mixture_of_dtypes_equals_the_rational_oracle(problem, source, target, threads):
    W0, A, B = problem.W0.astype(source), problem.A.astype(F32), problem.B.astype(source)
    merged = merge(W0, A, B, problem.scaling, dtype=target, threads=threads)
    assert_same_bits(merged, merge_exact(W0, A, B, problem.scaling, target))


@BY_DTYPE
def test_bit_patterns_of_all_exponents_equal_the_rational_oracle(dtype):
    rng = np.random.default_rng(4)
    form = float_format(dtype)
    low, high = form.min_exponent - form.precision - 2, form.max_exponent - 3
    W0 = np.ldexp(rng.uniform(-2, 2, (24, 24)), rng.integers(low, high, (24, 1)))
    A = np.ldexp(rng.uniform(-2, 2, (2, 24)), rng.integers(low // 2, high // 2, (1, 24)))
    B = np.ldexp(rng.uniform(-2, 2, (24, 2)), rng.integers(low // 2 - 1, high // 2 - 1, (24, 1)))
    W0 = round_float64(W0, dtype)
    assert_same_bits(merge(W0, A, B, 1.0, dtype=dtype), merge_exact(W0, A, B, 1.0, dtype))


@BY_DTYPE
def test_sums_next_to_a_midpoint_are_rounded_by_what_lies_beyond_float64(dtype):
    p = float_format(dtype).precision
    one, spacing = 1.0, 2.0 ** (1 - p)
    tie = (2.0**-p, 1.0)
    for tiny in (2.0**-60, 2.0**-200, 2.0**-900):
        for sign in (1, -1):
            beyond = (sign * tiny, 1.0)
            up = one + spacing if sign > 0 else one
            assert float(entry(one, [tie, beyond], 1.0, dtype)) == up
            assert float(entry(-one, [tie, beyond], -1.0, dtype)) == -up
            # From the odd neighbour the tie itself goes up.
            assert float(entry(one + spacing, [tie, beyond], 1.0, dtype)) == one + spacing * (
                2 if sign > 0 else 1
            )
    assert float(entry(one, [tie, (0.0, 1.0)], 1.0, dtype)) == one
    assert float(entry(one + spacing, [tie, (0.0, 1.0)], 1.0, dtype)) == one + 2 * spacing


@BY_DTYPE
def test_three_scales_at_a_midpoint_need_the_rational_path_and_get_it(dtype):
    p = float_format(dtype).precision
    # 1 + tie + 2^-400 - 2^-400 + tiny: about 106 bits cannot hold all of it at any moment.
    products = [(2.0**-p, 1.0), (2.0**-400, 1.0), (2.0**-800, 1.0), (-(2.0**-400), 1.0), (-(2.0**-850), 3.0)]
    assert float(entry(1.0, products, 1.0, dtype)) == 1 + 2.0 ** (1 - p)
    products[2] = (-(2.0**-800), 1.0)
    assert float(entry(1.0, products, 1.0, dtype)) == 1.0


@BY_DTYPE
def test_subnormal_sums_next_to_a_midpoint_are_rounded_by_what_lies_beyond_float32(dtype):
    tiny = float_format(dtype).smallest_subnormal
    scaling = min(1.0, tiny * 2.0**40)  # so that float64's own subnormals are reached from ordinary numbers
    for multiple, below, above in ((0.5, 0, 1), (1.5, 1, 2), (6.5, 6, 7)):
        for sign in (1, -1):
            products = [(multiple * (tiny / scaling), 1.0), (sign * (tiny / scaling) * 2.0**-40, 1.0)]
            assert float(entry(0.0, products, scaling, dtype)) == tiny * (above if sign > 0 else below)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_factors_that_cancel_leave_an_error_that_the_proof_sees(dtype):
    """s B A is 2^-40 of its terms or less, so float64's rounding of those shows in the result."""
    rng = np.random.default_rng(13)
    A, B = rng.uniform(1, 2, (2, 60)), rng.uniform(1, 2, (40, 2))
    A[1], B[:, 1] = A[0] * (1 + rng.uniform(-1, 1, 60) * 2.0**-40), -B[:, 0]
    W0 = np.zeros((40, 60), dtype)
    expected = merge_exact(W0, A, B, 1 / 3, dtype)
    assert_same_bits(merge(W0, A, B, 1 / 3), expected)


def test_bfloat16_is_not_rounded_through_float32():
    # float32 cannot hold the 2^-30 beside the 1, so it would see a tie and go to the even neighbour, 1.
    assert float(entry(1.0, [(2.0**-8, 1.0), (2.0**-30, 1.0)], 1.0, BF16)) == 1 + 2.0**-7
    assert float(entry(1.0, [(3 * 2.0**-8, 1.0), (-(2.0**-30), 1.0)], 1.0, BF16)) == 1 + 2.0**-7


def test_the_scaling_is_not_rounded_to_the_dtype_of_the_weights():
    scaling = 1 / 3
    merged = entry(0.0, [(3.0, 1.0)], scaling, F64)
    assert merged == round_fraction(3 * Fraction(scaling), F64)
    witness = 1 + 2.0**-24 + 2.0**-40  # float32 would round this scaling to 1 + 2^-23 and lose the difference
    assert entry(-(1 + 2.0**-23), [(1.0, 1.0)], witness, F32) == np.float32(-(2.0**-24) + 2.0**-40)


@BY_DTYPE
def test_ties_among_small_integers_go_to_even(dtype):
    p = float_format(dtype).precision
    W0 = np.full((1, 8), 2.0**p, dtype)
    A, B = np.arange(-3.0, 5.0, dtype=F32)[None], np.ones((1, 1), F32)
    expected = [round_fraction(Fraction(2) ** p + int(k), dtype) for k in A[0]]
    assert merge(W0, A, B, 1.0)[0].tolist() == expected


@BY_DTYPE
def test_a_zero_update_keeps_every_bit(dtype):
    form = float_format(dtype)
    values = [
        0.0,
        -0.0,
        form.smallest_subnormal,
        -form.smallest_subnormal,
        form.largest,
        -form.largest,
        1.0,
        -3.0,
    ]
    W0 = np.array([values], dtype)
    ones = np.ones((1, 8), F32)
    zero_updates = [
        (ones, np.zeros((1, 1), F32), 1.0),
        (np.zeros((1, 8), F32), np.ones((1, 1), F32), 1.0),
        (ones, np.ones((1, 1), F32), 0.0),
        (np.ones((2, 8), F32), np.array([[1, -1]], F32), 1.0),
        (ones * np.array([0] * 8, F32), np.full((1, 1), -1, F32), -2.0),
    ]
    for A, B, scaling in zero_updates:
        assert_same_bits(merge(W0, A, B, scaling), W0)
        assert_same_bits(merge_exact(W0, A, B, scaling, dtype), W0)


@BY_DTYPE
def test_a_zero_row_or_column_of_the_update_keeps_every_bit(dtype):
    rng = np.random.default_rng(5)
    W0 = gaussian(rng, (6, 7), 1.0, dtype)
    W0[:, 3] = W0[2] = -0.0
    A, B = gaussian(rng, (2, 7), 1.0), gaussian(rng, (6, 2), 1.0)
    A[:, 3] = 0
    B[2] = 0
    merged = merge(W0, A, B, 0.5)
    assert_same_bits(merged[:, 3], W0[:, 3])
    assert_same_bits(merged[2], W0[2])


@BY_DTYPE
def test_cancellation_gives_plus_zero_from_either_side(dtype):
    W0 = np.array([[3.0, -3.0]], dtype)
    merged = merge(W0, np.array([[-1.0, 1.0]], F32), np.array([[1.5]], F32), 2.0)
    assert_same_bits(merged, np.zeros((1, 2), dtype))


@BY_DTYPE
def test_underflow_rounds_to_subnormals_and_keeps_the_sign(dtype):
    tiny = float_format(dtype).smallest_subnormal
    cases = [(0.5, 0.0), (0.75, 1.0), (1.5, 2.0), (2.5, 2.0), (0.25, 0.0)]
    for multiple, expected in cases:
        for sign in (1.0, -1.0):
            # A product of two ordinary numbers, so that float64's own subnormals are rounded as well.
            merged = entry(0.0, [(multiple * 2.0**-10, sign)], tiny * 2.0**10, dtype)
            assert float(merged) == sign * expected * tiny
            assert np.signbit(merged) == (sign < 0)
    assert np.signbit(entry(-0.0, [(2.0**-600, -(2.0**-600))], 1.0, dtype))
    assert not np.signbit(entry(-0.0, [(2.0**-600, 2.0**-600)], 1.0, dtype))


@BY_DTYPE
def test_the_result_overflows_half_a_spacing_above_the_largest_number(dtype):
    form = float_format(dtype)
    half_spacing = 2.0 ** (form.max_exponent - form.precision)
    just_below = [(half_spacing, 1.0), (-form.smallest_subnormal, 1.0)]
    assert float(entry(form.largest, just_below, 1.0, dtype)) == form.largest
    for sign in (1.0, -1.0):
        with pytest.raises(
            NonFiniteError, match=rf"^W0: expected merged numbers.*\({dtype}\).*overflow at \[0, 0\]"
        ):
            entry(sign * form.largest, [(sign * half_spacing, 1.0)], 1.0, dtype)


def test_products_beyond_float64_that_cancel_are_not_an_overflow():
    assert float(entry(1.0, [(1e200, 1e200), (-1e200, 1e200)], 1.0, F32)) == 1.0
    assert float(entry(1.0, [(1e308, 1e5), (-1e308, 1e5), (0.5, 1.0)], 1.0, F64)) == 1.5


def test_a_scaling_far_out_of_range_is_exact():
    assert float(entry(0.0, [(1e-300, 1e-300)], 2.0**1000, F64)) == float(Fraction(1e-300) ** 2 * 2**1000)
    assert float(entry(1.0, [(1e300, 1e300), (-1e300, 1e300), (1.0, 1.0)], 2.0**-1074, F64)) == 1.0


def test_the_first_overflow_is_named_whatever_the_threads():
    W0 = np.ones((700, 600), F16)
    A, B = np.zeros((1, 600), F32), np.ones((700, 1), F32)
    A[0, 500] = A[0, 30] = 70000
    B[:300] = 0
    for threads in (1, 2, 7):
        with pytest.raises(
            NonFiniteError, match=r"^q_proj: .*65504.*overflow at \[300, 30\]; merge to a wider dtype$"
        ):
            merge(W0, A, B, 1.0, threads=threads, name="q_proj")


@pytest.mark.parametrize("target", [F16, BF16, F32, F64], ids=str)
def test_conversion_without_an_update_is_rounded_once_and_refuses_overflow(target):
    rng = np.random.default_rng(6)
    W0 = rng.standard_normal((5, 6))
    zero = np.zeros((1, 6), F32), np.zeros((5, 1), F32)
    assert_same_bits(merge(W0, *zero, 1.0, dtype=target), round_float64(W0, target))
    if target != F64:
        W0[3, 4] = 1e300
        with pytest.raises(NonFiniteError, match=r"overflow at \[3, 4\]"):
            merge(W0, *zero, 1.0, dtype=target)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9000), (9000, 1), (700, 500)], ids=str)
def test_the_result_depends_neither_on_threads_nor_on_blocks(monkeypatch, dtype, shape):
    rng = np.random.default_rng(7)
    W0, r = gaussian(rng, shape, 0.02, dtype), 5
    A, B = gaussian(rng, (r, shape[1]), 0.1), gaussian(rng, (shape[0], r), 0.1)
    expected = merge(W0, A, B, 0.3, threads=1)
    monkeypatch.setattr("loracle.reference.merge_product._BLOCK_ENTRIES", 1000)
    monkeypatch.setattr("loracle.reference.merge_product._SERIAL_PRODUCT", 1500)
    monkeypatch.setattr(MERGE, "_TILE_ENTRIES", 3000)
    monkeypatch.setattr(MERGE, "_PANEL_ENTRIES", 333)
    for threads in (1, 2, 7):
        assert_same_bits(merge(W0, A, B, 0.3, threads=threads), expected)
    sample = rng.integers(0, shape[0], 40), rng.integers(0, shape[1], 40)
    for i, j in zip(*sample, strict=True):
        exact = merge_exact(W0[i : i + 1, j : j + 1], A[:, j : j + 1], B[i : i + 1], 0.3, dtype)
        assert expected[i, j] == exact[0, 0]


@pytest.mark.parametrize("r", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_any_rank_even_above_the_size_of_the_matrix(r, dtype):
    rng = np.random.default_rng(8)
    W0, A, B = gaussian(rng, (6, 5), 1.0, dtype), gaussian(rng, (r, 5), 1.0), gaussian(rng, (6, r), 1.0)
    assert_same_bits(merge(W0, A, B, 0.1), merge_exact(W0, A, B, 0.1, dtype))


@BY_DTYPE
def test_strides_read_only_and_memory_mapped_inputs(tmp_path, dtype):
    rng = np.random.default_rng(9)
    W0, A, B = gaussian(rng, (12, 10), 1.0, dtype), gaussian(rng, (4, 10), 1.0), gaussian(rng, (12, 4), 1.0)
    expected = merge(W0, A, B, 0.5)
    spread = np.zeros((24, 30), dtype)
    spread[::2, ::3] = W0
    assert_same_bits(merge(spread[::2, ::3], np.asfortranarray(A), B[::-1][::-1], 0.5), expected)
    assert_same_bits(merge(W0.T, B.T, A.T, 0.5), np.ascontiguousarray(expected.T))
    W0.tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", dtype, "r", shape=W0.shape)
    merged = merge(mapped, A, B, 0.5)
    assert type(merged) is np.ndarray
    assert_same_bits(merged, expected)
    for tensor in (W0, A, B):
        tensor.setflags(write=False)
    assert_same_bits(merge(W0, A, B, 0.5), expected)


@BY_DTYPE
def test_inputs_are_left_alone_and_out_is_filled(dtype):
    rng = np.random.default_rng(10)
    tensors = gaussian(rng, (12, 10), 1.0, dtype), gaussian(rng, (4, 10), 1.0), gaussian(rng, (12, 4), 1.0)
    before = [tensor.tobytes() for tensor in tensors]
    expected = merge(*tensors, 0.5)
    assert [tensor.tobytes() for tensor in tensors] == before
    assert not np.may_share_memory(expected, tensors[0])
    for out in (
        np.full((12, 10), 7, dtype),
        np.full((24, 30), 7, dtype)[::2, ::3],
        np.full((10, 12), 7, dtype).T,
    ):
        assert merge(*tensors, 0.5, out=out) is out
        assert_same_bits(np.ascontiguousarray(out), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_a_matrix_without_entries_is_returned_as_one(shape):
    merged = merge(np.ones(shape, F32), np.ones((2, shape[1]), F32), np.ones((shape[0], 2), F32), 1.0)
    assert merged.shape == shape


W, LORA_A, LORA_B = np.ones((3, 4), F32), np.ones((2, 4), F32), np.ones((3, 2), F32)


def with_value(array, value):
    array = array.copy()
    array[-1, 1] = value
    return array


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ShapeError, r"^v_proj: expected a matrix, got shape \(12,\)", (W.ravel(), LORA_A, LORA_B, 1.0)),
        (ShapeError, r"^lora_A of v_proj: expected a matrix, got shape \(4,\)", (W, LORA_A[0], LORA_B, 1.0)),
        (ShapeError, r"^lora_A of v_proj: expected \(r, 4\).*got \(2, 3\)", (W, LORA_A[:, 1:], LORA_B, 1.0)),
        (ShapeError, r"^lora_A of v_proj: .* at least 1 .*got \(0, 4\)", (W, LORA_A[:0], LORA_B[:, :0], 1.0)),
        (
            ShapeError,
            r"^lora_B of v_proj: expected \(3, 2\).*got \(2, 3\); is the",
            (W, LORA_A, LORA_B.T, 1.0),
        ),
        (
            DTypeError,
            r"^v_proj: expected one of float16.*got dtype\('int32'\)",
            (W.astype("i4"), LORA_A, LORA_B, 1.0),
        ),
        (DTypeError, r"^lora_A of v_proj: .*got dtype\('>f4'\)", (W, LORA_A.astype(">f4"), LORA_B, 1.0)),
        (DTypeError, r"^lora_B of v_proj: .*got dtype\('O'\)", (W, LORA_A, LORA_B.astype(object), 1.0)),
        (NonFiniteError, r"^v_proj: .*got nan at \[2, 1\]", (with_value(W, np.nan), LORA_A, LORA_B, 1.0)),
        (
            NonFiniteError,
            r"^lora_A of v_proj: .*got inf at \[1, 1\]",
            (W, with_value(LORA_A, np.inf), LORA_B, 1.0),
        ),
        (
            NonFiniteError,
            r"^lora_B of v_proj: .*-inf at \[2, 1\]",
            (W, LORA_A, with_value(LORA_B, -np.inf), 1.0),
        ),
        (NonFiniteError, r"^scaling of v_proj: .*got nan", (W, LORA_A, LORA_B, float("nan"))),
        (NonFiniteError, r"^scaling of v_proj: .*got inf", (W, LORA_A, LORA_B, float("inf"))),
    ],
)
def test_a_wrong_input_is_named_and_nothing_is_written(error, message, arguments):
    out = np.full((3, 4), 7, F32)
    with pytest.raises(error, match=message) as caught:
        merge(*arguments, out=out, dtype=F32, name="v_proj")
    assert "\n" not in str(caught.value)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ConfigError, "^threads: expected at least 1, got 0", {"threads": 0}),
        (DTypeError, "^dtype of the merged W0: expected one of float16", {"dtype": "i4"}),
        (DTypeError, "^out of W0: expected float32, got float64", {"out": np.ones((3, 4))}),
        (
            DTypeError,
            "^out of W0: expected float16, got float32",
            {"out": np.ones((3, 4), F32), "dtype": F16},
        ),
        (ShapeError, r"^out of W0: expected shape \(3, 4\), got \(4, 3\)", {"out": np.ones((4, 3), F32)}),
        (ConfigError, "^out of W0: .*read-only", {"out": np.broadcast_to(np.float32(1), (3, 4))}),
        (ConfigError, "^out of W0: expected memory of its own", {"out": W}),
    ],
)
def test_wrong_options_are_named(error, message, options):
    with pytest.raises(error, match=message):
        merge(W, LORA_A, LORA_B, 1.0, **options)
    assert (W == 1).all()


def test_a_nonfinite_weight_far_inside_is_found_in_row_order():
    W0 = np.ones((600, 500), F32)
    W0[431, 7] = W0[430, 499] = np.nan
    with pytest.raises(NonFiniteError, match=r"at \[430, 499\]"):
        merge(W0, np.ones((1, 500), F32), np.ones((600, 1), F32), 1.0)


@pytest.mark.parametrize(
    ("shape", "r", "dtype", "threads"),
    [
        ((3000, 4000), 2, F32, 8),
        pytest.param((24_000_000, 1), 1, F16, 2, marks=pytest.mark.slow),
        pytest.param((1, 24_000_000), 1, F32, 2, marks=pytest.mark.slow),
        ((64, 2000), 16384, F32, 8),
    ],
    ids=str,
)
def test_extra_memory_stays_below_64_mib(shape, r, dtype, threads):
    W0, out = np.ones(shape, dtype), np.empty(shape, dtype)
    A, B = np.zeros((r, shape[1]), F16), np.zeros((shape[0], r), F16)
    A[0, 0] = B[0, 0] = 1
    tracemalloc.start()
    try:
        merge(W0, A, B, 1.0, out=out, threads=threads)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out[0, 0] == 2
    assert peak < 64 * 2**20


def test_threads_are_one_per_usable_cpu_and_8_at_most(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert check_threads(None) == 3
    assert check_threads(1) == 1
    assert check_threads(100) == 8
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert check_threads(None) == 1


def test_threads_are_gone_afterwards():
    before = threading.active_count()
    merge(np.ones((800, 800), F32), np.ones((1, 800), F32), np.ones((800, 1), F32), 1.0, threads=7)
    assert threading.active_count() == before


def test_almost_everything_is_settled_in_float64(monkeypatch):
    settled = []
    from loracle.reference import single_entries

    original = single_entries.merged_entries
    monkeypatch.setattr(
        single_entries, "merged_entries", lambda w, *rest: settled.append(len(w)) or original(w, *rest)
    )
    rng = np.random.default_rng(11)
    W0, A, B = gaussian(rng, (512, 512), 0.02), gaussian(rng, (8, 512), 0.01), gaussian(rng, (512, 8), 0.01)
    merge(W0, A, B, 2.0)
    assert sum(settled) <= 3
    merge(W0.astype(BF16), A, B, 2.0)
    assert sum(settled) <= 100


@pytest.mark.parametrize("factors", [(0, 1, 1), (1, 0, 1), (1, 1, 0)], ids=["A", "B", "scaling"])
def test_an_update_that_is_zero_throughout_is_a_conversion_without_arithmetic(monkeypatch, factors):
    monkeypatch.setattr(MERGE, "BlockMerger", None)
    W0 = gaussian(np.random.default_rng(14), (5, 6), 1.0)
    a, b, scaling = factors
    merged = merge(W0, np.full((2, 6), a, F32), np.full((5, 2), b, F32), float(scaling), dtype=BF16)
    assert_same_bits(merged, W0.astype(BF16))


def test_ties_are_settled_without_rational_arithmetic(monkeypatch):
    from loracle.reference import merge_entries

    monkeypatch.setattr(merge_entries, "exact_entry", None)
    rng = np.random.default_rng(12)
    for dtype in DTYPES:
        p = float_format(dtype).precision
        W0 = (2.0**p + 2 * rng.integers(0, 2 ** (p - 2), (20, 20))).astype(dtype)
        A, B = rng.integers(-3, 4, (5, 20)).astype(F32), rng.integers(-3, 4, (20, 5)).astype(F32)
        expected = merge_exact(W0, A, B, 1.0, dtype)
        assert_same_bits(merge(W0, A, B, 1.0), expected)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from(DTYPES))
def test_crafted_near_ties_equal_the_rational_oracle(seed, r, dtype):
    """W0 + update lies 2^-k from a midpoint, for k that float64, that 106 bits and that neither resolve."""
    rng = np.random.default_rng(seed)
    p = float_format(dtype).precision
    W0 = (1 + rng.integers(0, 2 ** (p - 1), (4, 4)) * 2.0 ** (1 - p)).astype(dtype)
    B = rng.choice([-1.0, 1.0], (4, r + 1)) * 2.0 ** rng.choice([-50, -60, -120, -170, -300], (4, r + 1))
    A = rng.integers(-3, 4, (r + 1, 4)).astype(F64)
    B[:, 0], A[0] = 2.0**-p, rng.choice([-1.0, 1.0], 4)
    assert_same_bits(merge(W0, A, B, 1.0), merge_exact(W0, A, B, 1.0, dtype))
