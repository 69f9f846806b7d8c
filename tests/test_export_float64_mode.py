"""Operators in float64, whatever a model asks for, and the noise of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusal import refused
from torch import nn

from loracle.export.verification.float64_mode import in_float64
from loracle.export.verification.rounding_noise import RoundingNoise, product_of
from loracle.reference import TargetError, product_noise, unit_roundoff

FLOAT32 = np.dtype(np.float32)
aten = torch.ops.aten


def in_mode(call: Callable[[], object], noise: RoundingNoise | None = None) -> None:
    with in_float64(nn.Identity(), noise):
        call()


def test_an_operator_that_would_round_to_float32_or_hide_its_products_is_refused() -> None:
    x, narrow = torch.ones(1, 2, 4, 4, dtype=torch.float64), torch.ones(4)
    refused(
        lambda: in_mode(lambda: x.view(torch.float32)),
        TargetError,
        "aten.view.dtype: expected a float64 result, got torch.float32; such a model cannot be evaluated in "
        "float64",
    )
    refused(
        lambda: in_mode(lambda: narrow.copy_(x[0, 0, 0])),
        TargetError,
        "aten.copy_.default: expected to write to a float64 tensor, got torch.float32; such a model cannot "
        "be evaluated in float64",
    )
    noise = RoundingNoise(2.0**-24, 2.0**-24, 0)
    with pytest.raises(
        TargetError, match="expected products by mm, bmm and convolution, got an operator that"
    ):
        in_mode(lambda: nn.functional.scaled_dot_product_attention(x, x, x), noise)
    with pytest.raises(TargetError, match="aten::dot: expected products by mm"):
        in_mode(lambda: torch.dot(x[0, 0, 0], x[0, 0, 0]), noise)


def test_constants_casts_and_factories_are_float64_within_the_mode() -> None:
    narrow = torch.full((3,), 0.1)
    with in_float64(nn.Identity(), None):
        x = torch.linspace(0, 1, 3)
        results = [
            narrow[1:],
            x,
            x.to(torch.float16),
            x.float(),
            torch.softmax(x, 0, dtype=torch.float32),
            torch.zeros(2, dtype=torch.bfloat16),
            torch.arange(3) / 3,
            torch.ones_like(x, dtype=torch.float16),
            torch.tensor(0.1),
            x.sum(dtype=torch.float32),
        ]
    assert [tensor.dtype for tensor in results] == [torch.float64] * len(results)
    assert torch.equal(results[6], torch.arange(3, dtype=torch.float64) / 3)
    assert float(results[2][1]) == 0.5
    assert float(results[8]) == 0.1
    assert float(results[0][0]) == float(np.float32(0.1))


class RepeatedRotaryEmbedding(nn.Module):
    """Angles that are float32 because torch's quotients of integers are."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(4) / 3
        return angles.cos(), angles.float().sin()


def test_rotary_angles_are_those_of_float32_widened() -> None:
    rotary = RepeatedRotaryEmbedding()
    expected = rotary(torch.ones(1))
    with in_float64(rotary, None):
        got = rotary(torch.ones(1, dtype=torch.float64))
        after = torch.arange(4) / 3
    for own, wanted in zip(got, expected, strict=True):
        assert own.dtype is torch.float64
        assert torch.equal(own, wanted.double())
    assert after.dtype is torch.float64


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


X, W, C = random(5, 6), random(6, 7), random(5, 7)
IMAGE, KERNEL = random(2, 4, 5, 5), random(6, 2, 3, 3)
WINDOW = ([2, 2], [1, 1], [1, 1])
PRODUCTS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], int, Callable[[], torch.Tensor]]] = {
    "mm": (aten.mm.default, (X, W), {}, 6, lambda: torch.einsum("ik,kj->ij", X**2, W**2)),
    "float32 operands": (
        aten.mm.default,
        (X.float(), W.float()),
        {},
        6,
        lambda: torch.einsum("ik,kj->ij", X.float().double() ** 2, W.float().double() ** 2),
    ),
    "addmm": (
        aten.addmm.default,
        (C, X, W),
        {"alpha": 3, "beta": 5},
        6,
        lambda: 9 * torch.einsum("ik,kj->ij", X**2, W**2),
    ),
    "bmm": (
        aten.bmm.default,
        (X[None], W[None]),
        {},
        6,
        lambda: torch.einsum("ik,kj->ij", X**2, W**2)[None],
    ),
    "baddbmm": (
        aten.baddbmm.default,
        (C[None], X[None], W[None]),
        {"alpha": 0.5},
        6,
        lambda: torch.einsum("ik,kj->ij", X**2, W**2)[None] / 4,
    ),
    "convolution in groups": (
        aten.convolution.default,
        (IMAGE, KERNEL, None, *WINDOW, False, [0, 0], 2),
        {},
        18,
        lambda: nn.functional.conv2d(IMAGE**2, KERNEL**2, None, *WINDOW, 2),
    ),
    "transposed convolution": (
        aten.convolution.default,
        (random(2, 6, 3, 3), KERNEL, None, *WINDOW, True, [0, 0], 2),
        {},
        27,
        lambda: nn.functional.conv_transpose2d(random(2, 6, 3, 3) ** 2, KERNEL**2, None, 2, 1, 0, 2),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_variance_of_a_products_noise_is_the_contracts(name: str) -> None:
    """``product_noise`` of the energy, and half an ulp of operand and result, at every output."""
    func, args, kwargs, terms, energy = PRODUCTS[name]
    before = [arg.clone() for arg in args if isinstance(arg, torch.Tensor)]
    y = func(*args, **kwargs)
    product = product_of(func, args, kwargs)
    assert product is not None
    assert product.terms == terms
    assert all(map(torch.equal, before, (arg for arg in args if isinstance(arg, torch.Tensor))))
    stored, accumulated = 2.0**-11, 2.0**-24
    noise = RoundingNoise(stored, accumulated, 3).draw(product, y)
    normal = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    summed = product_noise(terms, accumulated, energy().sqrt().numpy()) ** 2
    variance = summed + (energy() + y**2).numpy() * stored**2 / 3
    assert np.allclose(noise, normal * np.sqrt(variance), rtol=64 * unit_roundoff(FLOAT32), atol=0)


@pytest.mark.parametrize(("beta", "counts"), [(1, False), (0, True)])
def test_a_product_added_in_place_does_not_round_what_had_been_stored_again(beta: int, counts: bool) -> None:
    y, args = C.clone(), (X, W)
    product = product_of(aten.addmm_.default, (y, *args), {"beta": beta})
    plain = product_of(aten.mm.default, args, {})
    assert product is not None
    assert plain is not None
    got, whole = (RoundingNoise(2.0**-11, 2.0**-24, 3).draw(own, y) for own in (product, plain))
    assert torch.equal(got, whole) is counts
    assert bool((got.abs() <= whole.abs()).all())


def test_what_is_no_product_has_no_noise() -> None:
    assert product_of(aten.mul.Tensor, (X, X), {}) is None
