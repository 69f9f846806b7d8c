"""The parts of the search for factors that round to a tuned weight: intervals, fits, the interior point."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from extraction_fixtures import rounded_weight, whole_weight
from files_fixtures import BFLOAT16
from torch import Tensor

from loracle.reference import merge, round_fraction
from loracle.torch_impl.extraction import weighted_fit
from loracle.torch_impl.extraction.decomposition import decompose, difference, factors
from loracle.torch_impl.extraction.interior import find_inside
from loracle.torch_impl.extraction.intervals import rounding_intervals
from loracle.torch_impl.extraction.nudging import nudged
from loracle.torch_impl.extraction.refinement import refine, roundings_explain
from loracle.torch_impl.extraction.weighted_fit import WeightedFit

F64 = torch.float64


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
def test_what_is_inside_an_interval_rounds_to_the_entry_and_what_is_outside_does_not(dtype: Any) -> None:
    """At powers of two, at zero, in the subnormal range and at the largest number too, in exact numbers."""
    smallest = np.nextafter(np.zeros(1, dtype), np.ones(1, dtype))[0]
    last = np.nextafter(np.full(1, np.inf, dtype), np.zeros(1, dtype))[0]
    values = [1, -1, 1.5, 3, 0, smallest, last, -last, 4]
    after = np.array([values], dtype)
    before = np.zeros_like(after)
    centre, width = (own[0].tolist() for own in rounding_intervals(before, after))
    for value, c, h in zip(after[0], centre, width, strict=True):
        inside, outside = Fraction(h) * Fraction(999, 1000), Fraction(h) * Fraction(1001, 1000)
        for sign in (1, -1):
            found = round_fraction(Fraction(c) + sign * inside, dtype)
            assert found == value
            other = round_fraction(Fraction(c) + sign * outside, dtype)
            assert other != value


def test_an_interval_is_relative_to_the_base() -> None:
    before, after = np.array([[3.0]], np.float32), np.array([[5.0]], np.float32)
    centre, width = rounding_intervals(before, after)
    assert (centre.item(), width.item()) == (2, 2.0**-22)


def orthonormal(m: int, r: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=F64))[0]


def test_both_ways_to_solve_give_the_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy's, on the explicit matrix of X and Y; weights differ by six orders of magnitude."""
    m, n, r = 9, 7, 2
    U, V = orthonormal(m, r, 0), orthonormal(n, r, 1)
    generator = torch.Generator().manual_seed(2)
    weights = 10 ** (6 * torch.rand(m, n, generator=generator, dtype=F64))
    target = torch.randn(m, n, generator=generator, dtype=F64)
    columns = []
    for size in (m * r, n * r):
        for place in range(size):
            X, Y = torch.zeros(m * r, dtype=F64), torch.zeros(n * r, dtype=F64)
            (X if size == m * r and len(columns) < m * r else Y)[place] = 1
            columns.append((X.reshape(m, r) @ V.T + U @ Y.reshape(n, r).T).reshape(-1))
    root = weights.reshape(-1).sqrt()
    matrix = (torch.stack(columns, 1) * root[:, None]).numpy()
    z, *_ = np.linalg.lstsq(matrix, (target.reshape(-1) * root).numpy(), rcond=1e-12)
    expected = torch.from_numpy(matrix @ z) / root
    for cheap in (True, False):
        monkeypatch.setattr(weighted_fit, "_is_cheap", lambda *_, cheap=cheap: cheap)
        for turned in (False, True):
            fit = WeightedFit(V, U) if turned else WeightedFit(U, V)
            own, goal = (weights.T, target.T) if turned else (weights, target)
            found = fit.update(*fit.solve(own, -own * goal, 1e-12))
            found = found.T if turned else found
            assert ((found.reshape(-1) - expected).abs() * root).max() < 1e-6 * root.max()


def test_a_small_weight_is_eliminated_and_a_large_one_iterated() -> None:
    assert weighted_fit._is_cheap(1536, 576, 1)
    assert weighted_fit._is_cheap(64, 48, 8)
    assert not weighted_fit._is_cheap(1536, 576, 8)


@pytest.mark.parametrize("cheap", [True, False])
def test_a_change_inside_is_found(cheap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted_fit, "_is_cheap", lambda *_: cheap)
    m, n, r = 30, 20, 2
    U, V = orthonormal(m, r, 0), orthonormal(n, r, 1)
    generator = torch.Generator().manual_seed(2)
    h = torch.rand(m, n, generator=generator, dtype=F64) ** 3 + 1e-4
    X, Y = (torch.randn(size, r, generator=generator, dtype=F64) for size in (m, n))
    fit = WeightedFit(U, V)
    e = h * (2 * torch.rand(m, n, generator=generator, dtype=F64) - 1) - fit.update(X, Y)
    found = find_inside(fit, e, h)
    assert found.outside == 0
    assert ((e + fit.update(found.X, found.Y)).abs() < h).all()
    assert 1 < found.steps < 20


def test_contradictions_end_and_are_counted() -> None:
    m, n, r = 30, 20, 2
    fit = WeightedFit(orthonormal(m, r, 0), orthonormal(n, r, 1))
    e = torch.randn(m, n, generator=torch.Generator().manual_seed(2), dtype=F64)
    found = find_inside(fit, e, torch.full((m, n), 0.1, dtype=F64))
    assert found.outside > 100
    assert found.steps < 60


def test_entries_that_do_not_matter_may_be_anywhere() -> None:
    fit = WeightedFit(orthonormal(6, 1, 0), orthonormal(5, 1, 1))
    h = torch.full((6, 5), torch.inf, dtype=F64)
    h[2, 3] = 1e-9
    found = find_inside(fit, torch.ones(6, 5, dtype=F64), h)
    assert found.outside == 0


def test_roundings_explain_a_merge_and_nothing_else() -> None:
    weight = rounded_weight((40, 30), 2, seed=1)
    D = difference(weight.before, weight.after, "w")
    A, B = factors(decompose(D, 2, 0), 2, 1.0)
    assert roundings_explain(weight.before, weight.after, A, B)
    assert not roundings_explain(weight.before, weight.after, A[:1], B[:, :1])
    assert not roundings_explain(weight.before.astype(float), weight.after.astype(float), A, B)


def test_refined_factors_have_the_scaling_and_equal_norms() -> None:
    weight = rounded_weight((40, 30), 2, seed=1)
    D = difference(weight.before, weight.after, "w")
    refined = refine(weight.before, weight.after, decompose(D, 2, 0), 2, -0.5)
    A, B = refined.A.numpy(), refined.B.numpy()
    assert np.array_equal(merge(weight.before, A, B, -0.5), weight.after)
    assert np.allclose(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0), rtol=1e-6)


def test_zeros_that_no_factors_in_float64_hit_do_not_spoil_the_rest() -> None:
    weight = whole_weight((40, 30), 3, seed=2)
    D = difference(weight.before, weight.after, "w")
    refined = refine(weight.before, weight.after, decompose(D, 3, 0), 3, 1.0)
    off = merge(weight.before, refined.A.numpy(), refined.B.numpy(), 1.0) != weight.after
    assert not off[weight.after != 0].any()
    assert refined.steps < 20


def test_a_difference_of_roundings_alone_has_no_rank() -> None:
    rng = np.random.default_rng(0)
    before = rng.standard_normal((40, 30)).astype(np.float32)
    up = np.where(rng.random((40, 30)) < 0.5, np.float32(9), np.float32(-9))
    after = np.where(rng.random((40, 30)) < 0.1, np.nextafter(before, up), before)
    refined = refine(before, after, decompose(difference(before, after, "w"), 2, 0), 2, 1.0)
    assert refined.steps == 0
    assert not refined.A.any()


def test_the_last_entries_are_nudged() -> None:
    """An entry of -1 + (1 + 2^-24), whose interval ends 2^-49 from it, is missed by 2^-47."""
    before = np.array([[-1.0, 1.0], [1.0, 2.0]], np.float32)
    after = np.array([[2.0**-24, 2.5], [1.0, 2.0]], np.float32)
    A, B = np.array([[1.0, 1.0], [0.5, 1.0]]), np.array([[0.5 + 2.0**-24 + 2.0**-47, 1.0], [0.0, 0.0]])
    assert (merge(before, A, B, 1.0) != after).sum() == 1
    B = nudged(before, after, A, B, 1.0)
    assert np.array_equal(merge(before, A, B, 1.0), after)
    assert np.abs(B - [[0.5 + 2.0**-24, 1.0], [0.0, 0.0]]).max() <= 2.0**-46


def test_what_is_wrong_everywhere_is_not_nudged() -> None:
    weight = whole_weight((40, 40), 2, seed=0)
    A, B = np.zeros((2, 40)), np.zeros((40, 2))
    assert not nudged(weight.before, weight.after, A, B, 1.0).any()
