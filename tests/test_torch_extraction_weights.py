"""Factors of one weight: bit for bit where only roundings hide the rank, and honest figures elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from extraction_fixtures import rounded_weight, whole_weight
from files_fixtures import BFLOAT16

from loracle.reference import extract_adapter, merge, svd_error_bound
from loracle.torch_impl.extraction.decomposition import decompose, difference
from loracle.torch_impl.extraction.summary import ExtractedTensor
from loracle.torch_impl.extraction.weights import Weight, fit, left_out


def fitted(
    weight: Weight, r: int, scaling: float = 1.0, *, narrow: bool = False
) -> tuple[Any, ExtractedTensor]:
    D = difference(weight.before, weight.after, weight.name)
    return fit(weight, D, decompose(D, r, 0), r, scaling, narrow=narrow, seed=0)


def bits(array: Any) -> Any:
    return array.view(f"u{array.dtype.itemsize}")


def unequal(weight: Weight, pair: Any) -> int:
    merged = merge(weight.before, pair.A, pair.B, pair.scaling)
    return int((bits(merged) != bits(weight.after)).sum())


@pytest.mark.parametrize("r", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_a_rounded_merge_is_found_again_bit_for_bit(shape: tuple[int, int], r: int) -> None:
    weight = rounded_weight(shape, r, seed=r)
    pair, report = fitted(weight, r)
    assert unequal(weight, pair) == report.unequal == 0
    assert report.dtype == "float64"  # float32 factors are too coarse for an update as large as the weight
    assert report.refinements is not None
    assert (pair.r, report.r, report.entries) == (r, r, 48 * 64)
    plain, plain_report = fitted(weight, r, narrow=True)
    assert unequal(weight, plain) == plain_report.unequal > 300
    assert (plain.A.dtype, plain_report.refinements) == (np.float32, None)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 30.0])
@pytest.mark.parametrize("scaling", [2.0, -0.3])
def test_updates_of_any_size_and_scaling(size: float, scaling: float) -> None:
    weight = rounded_weight((40, 32), 3, seed=1, size=size)
    pair, report = fitted(weight, 3, scaling)
    assert pair.scaling == scaling
    assert unequal(weight, pair) == report.unequal == 0


@pytest.mark.parametrize(("dtype", "factors"), [(np.float16, "float64"), (BFLOAT16, "float32")], ids=str)
def test_half_precision_too_in_float32_factors_where_they_will_do(dtype: Any, factors: str) -> None:
    weight = rounded_weight((64, 48), 2, seed=2, dtype=dtype)
    pair, report = fitted(weight, 2)
    assert unequal(weight, pair) == 0
    assert report.dtype == str(pair.A.dtype) == str(pair.B.dtype) == factors


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", [(512, 384), (1536, 576)])
def test_large_weights_too(shape: tuple[int, int], r: int) -> None:
    weight = rounded_weight(shape, r, seed=1)
    assert unequal(weight, fitted(weight, r)[0]) == 0


def test_more_rank_than_there_is_becomes_zeros() -> None:
    weight = rounded_weight((40, 32), 2, seed=3)
    pair, report = fitted(weight, 5)
    assert unequal(weight, pair) == 0
    assert report.r == 5
    assert not pair.A[2:].any()
    assert not pair.B[:, 2:].any()


def test_rows_and_columns_that_stay_are_exactly_zero() -> None:
    """An update of 1e-17 on a weight of zero would be seen."""
    rng = np.random.default_rng(4)
    before = rng.standard_normal((30, 24)).astype(np.float32)
    before[3], before[:, 5] = 0, 0
    A, B = rng.standard_normal((2, 24)).astype(np.float32), rng.standard_normal((30, 2)).astype(np.float32)
    A[:, 5], B[3] = 0, 0
    weight = Weight("w", before, merge(before, A, B, 1.0), (30, 24))
    pair, _ = fitted(weight, 2)
    assert unequal(weight, pair) == 0
    assert not pair.A[:, 5].any()
    assert not pair.B[3].any()


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_integers_are_found_again_zeros_included(r: int) -> None:
    weight = whole_weight((64, 48), r, seed=r)
    assert (weight.after == 0).sum() > 20
    pair, report = fitted(weight, r)
    assert unequal(weight, pair) == 0
    assert report.frobenius_residual == report.spectral_residual == report.relative_residual == 0
    assert report.dtype == "float32"
    assert np.array_equal(pair.A, np.rint(pair.A))


def test_integers_with_a_scaling_that_is_no_power_of_two() -> None:
    weight = whole_weight((20, 16), 1, seed=1)
    pair, report = fitted(weight, 1, scaling=1.7)
    assert report.unequal == unequal(weight, pair)
    assert report.relative_residual < 1e-6


def test_of_a_full_fine_tune_the_best_is_kept_and_the_rest_is_said() -> None:
    rng = np.random.default_rng(5)
    before = rng.standard_normal((30, 20)).astype(np.float32)
    after = before + (0.1 * rng.standard_normal((30, 20))).astype(np.float32)
    weight = Weight("w", before, after, (30, 20))
    pair, report = fitted(weight, 4)
    best = extract_adapter(before, after, r=4)
    assert (pair.A.dtype, pair.B.dtype, report.refinements) == (np.float32, np.float32, None)
    missed = after.astype(np.float64) - before - pair.B.astype(np.float64) @ pair.A.astype(np.float64)
    assert report.frobenius_residual == pytest.approx(np.linalg.norm(missed), rel=1e-12)
    assert report.frobenius_residual >= best.frobenius_residual - best.error_bound
    # of the best factors by as much as their roundings to float32
    rounded = 2.0**-23 * np.linalg.norm(np.abs(pair.B) @ np.abs(pair.A))
    assert report.frobenius_residual <= best.frobenius_residual + rounded + svd_error_bound((30, 20), 1.0)
    assert report.frobenius == pytest.approx(np.linalg.norm(best.singular_values), rel=1e-12)
    assert report.relative_residual == report.frobenius_residual / report.frobenius
    assert 0.9 * best.spectral_residual <= report.spectral_residual <= best.spectral_residual + rounded
    assert report.unequal == unequal(weight, pair) > 500


def test_what_was_rounded_twice_has_no_such_factors_and_says_so() -> None:
    """As PEFT merges: the update is rounded, and then the sum."""
    rng = np.random.default_rng(6)
    before = rng.standard_normal((48, 40)).astype(np.float32)
    A, B = rng.standard_normal((4, 40)).astype(np.float32), rng.standard_normal((48, 4)).astype(np.float32)
    weight = Weight("w", before, before + B @ A, (48, 40))
    pair, report = fitted(weight, 4)
    assert report.unequal == unequal(weight, pair)
    assert 0 < report.unequal <= fitted(weight, 4, narrow=True)[1].unequal
    assert report.relative_residual < 1e-6


def test_of_two_dtypes_the_values_are_compared() -> None:
    before = rounded_weight((12, 10), 1, seed=7).before
    after = (before + np.float32(1)).astype(BFLOAT16)
    weight = Weight("w", before, after, (12, 10))
    pair, report = fitted(weight, 10)
    merged = merge(before, pair.A, pair.B, 1.0)
    assert report.unequal == (merged.astype(float) != after.astype(float)).sum() > 0
    assert report.refinements is None


def test_zeros_of_another_sign_are_no_update() -> None:
    before = np.array([[-0.0, 1.0], [2.0, 3.0]], np.float32)
    pair, report = fitted(Weight("w", before, np.abs(before), (2, 2)), 1)
    assert not pair.A.any()
    assert (report.relative_residual, report.unequal) == (0, 1)


def test_a_weight_without_an_update_misses_all() -> None:
    weight = rounded_weight((12, 10), 1, seed=7)
    report = left_out(weight, difference(weight.before, weight.after, "w"), 0)
    D = weight.after.astype(np.float64) - weight.before
    assert (report.r, report.dtype, report.relative_residual) == (0, None, 1.0)
    assert report.frobenius == report.frobenius_residual == pytest.approx(np.linalg.norm(D), rel=1e-14)
    assert report.spectral_residual == pytest.approx(np.linalg.norm(D, 2), rel=1e-2)
    assert report.unequal == (weight.before != weight.after).sum()
