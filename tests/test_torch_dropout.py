"""Masks of dropout that a seed stands for."""

import math

import numpy as np
import pytest
import torch

from loracle.torch_impl.dropout import SeededDropout, drawn_dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 7), (2, 3, 5)])
def test_a_mask_is_ones_and_zeros_and_the_same_when_drawn_again(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    like = torch.empty(1, dtype=dtype)
    dropout = SeededDropout(0.5, 2**62 + 3)
    mask = dropout.mask(like, shape)
    assert mask.shape == shape
    assert mask.dtype is dtype
    assert set(mask.flatten().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, dropout.mask(like, torch.Size(shape)))
    assert torch.equal(mask.double(), dropout.mask(torch.empty(1, dtype=torch.float64), shape))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_entries_are_dropped_with_the_probability_and_independently(p: float) -> None:
    """Each frequency lies within 5 standard deviations; neighbours in a row, and rows, do not depend."""
    n, width = 4096, 64
    dropped = 1.0 - SeededDropout(p, 7).mask(torch.empty(1), (n, width)).double().numpy()
    pairs = {
        "one": (dropped, p),
        "two in a row": (dropped[:, :-1] * dropped[:, 1:], p * p),
        "four apart": (dropped[:, :-4] * dropped[:, 4:], p * p),
        "two in a column": (dropped[:-1] * dropped[1:], p * p),
    }
    for name, (events, expected) in pairs.items():
        # Products of neighbours share entries: twice the variance of independent ones is an upper bound.
        deviation = math.sqrt(2 * expected * (1 - expected) / events.size)
        assert abs(events.mean() - expected) <= 5 * deviation, name
    columns = dropped.mean(0)
    assert np.abs(columns - p).max() <= 5 * math.sqrt(p * (1 - p) / n)


def test_other_seeds_have_other_masks() -> None:
    like = torch.empty(1)
    masks = [SeededDropout(0.5, seed).mask(like, (64,)) for seed in (0, 1, 2**32, 2**62)]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


@pytest.mark.parametrize(("p", "expected"), [(0.05, 3277 / 65536), (0.25, 0.25), (0.9999999, 65535 / 65536)])
def test_a_probability_is_taken_to_the_nearest_that_the_mask_can_have(p: float, expected: float) -> None:
    drawn = drawn_dropout(p)
    assert drawn.p == expected
    assert drawn.factor == 1 / (1 - expected)


def test_the_global_generator_decides_the_seed() -> None:
    torch.manual_seed(3)
    first, second = drawn_dropout(0.5), drawn_dropout(0.5)
    torch.manual_seed(3)
    assert (first, second) == (drawn_dropout(0.5), drawn_dropout(0.5))
    assert first != second
