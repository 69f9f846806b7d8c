"""The projections in torch: the reference's numbers, within its bounds, bit for bit where all is exact."""

from typing import Any

import numpy as np
import pytest
import torch
from exact_linear import error, rational
from intrinsic_fixtures import exact
from torch_fixtures import same_bits

from loracle.reference import (
    ConfigError,
    DenseProjection,
    Fastfood,
    ShapeError,
    Subspace,
    dense_projection,
    fastfood_projection,
    subspace_gradient_bound,
    subspace_parameters_bound,
)
from loracle.reference import fastfood as reference_module
from loracle.reference import walsh_hadamard as reference_transform
from loracle.torch_impl.intrinsic import projection as module
from loracle.torch_impl.intrinsic.hadamard import factors, walsh_hadamard
from loracle.torch_impl.intrinsic.projection import (
    FastfoodProjection,
    is_dense,
    make_projection,
    project,
)

SIZES = [(1, 1), (5, 3), (40, 1), (64, 16), (41, 7), (100, 100), (33, 32)]


def pair(name: Any, D: int, d: int) -> tuple[Any, DenseProjection | Fastfood]:
    make = {"dense": dense_projection, "fastfood": fastfood_projection}[name]
    return make_projection(name, D, d, 3), make(D, d, 3)


@pytest.mark.parametrize("power", [0, 1, 5, 6, 7, 12, 13])
def test_the_transform_is_the_references_bit_for_bit(power: int) -> None:
    """Across one, two and three factors; all sums are integers below 2^24."""
    x = np.random.default_rng(power).integers(-9, 10, (3, 2**power)).astype(np.float32)
    found = walsh_hadamard(torch.from_numpy(x))
    assert same_bits(found, torch.from_numpy(reference_transform(x)))
    assert found.is_contiguous()


def test_a_length_is_divided_evenly() -> None:
    assert [factors(2**bits) for bits in (0, 1, 6, 7, 13)] == [[], [2], [64], [16, 8], [32, 16, 16]]


def test_any_leading_axes_and_strides() -> None:
    x = torch.arange(4 * 128.0).reshape(128, 2, 2).permute(1, 2, 0)
    assert torch.equal(walsh_hadamard(x), torch.from_numpy(reference_transform(x.numpy())))
    with pytest.raises(ShapeError, match="power of two, got 12"):
        walsh_hadamard(torch.zeros(12))


@pytest.mark.parametrize("panel", [8, 2**18])
@pytest.mark.parametrize("name", ["dense", "fastfood"])
@pytest.mark.parametrize(("D", "d"), SIZES)
def test_both_ways_are_within_the_bounds(
    name: str, D: int, d: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_module, "PANEL", panel)
    ours, reference = pair(name, D, d)
    own = exact(reference)
    rng = np.random.default_rng(D)
    theta, gradient = (rng.standard_normal(count).astype(np.float32) for count in (d, D))
    subspace = Subspace(np.zeros(D, np.float32), reference)
    point = ours.forward_numbers(torch.from_numpy(theta)).numpy()
    assert np.all(
        error(point, own.forward(rational(theta))) <= subspace_parameters_bound(subspace, theta, np.float32)
    )
    back = ours.adjoint_numbers(torch.from_numpy(gradient)).numpy()
    bound = subspace_gradient_bound(subspace, theta, gradient, np.float32)
    assert np.all(error(back, own.adjoint(rational(gradient))) <= bound)


@pytest.mark.parametrize(("D", "d"), SIZES)
def test_integers_are_projected_bit_for_bit(D: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "PANEL", 32)
    ours, reference = pair("fastfood", D, d)
    assert isinstance(reference, Fastfood)
    rng = np.random.default_rng(d)
    whole = rng.integers(-3, 4, reference.gaussians.shape).astype(np.float32)
    start = 0
    for panel in ours.panels:
        panel.gaussians.copy_(torch.from_numpy(whole[start : start + len(panel.signs)]))
        start += len(panel.signs)
    assert start == len(whole)
    integers = Fastfood(D, d, reference.signs, reference.order, whole)
    theta, gradient = (rng.integers(-3, 4, count).astype(np.float32) for count in (d, D))
    assert np.array_equal(ours.forward_numbers(torch.from_numpy(theta)).numpy(), integers.forward(theta))
    assert np.array_equal(
        ours.adjoint_numbers(torch.from_numpy(gradient)).numpy(), integers.adjoint(gradient)
    )


@pytest.mark.parametrize("name", ["dense", "fastfood"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_is_the_transpose_whatever_autocast(name: Any, autocast: bool) -> None:
    projection = make_projection(name, 40, 6, 1)
    theta = torch.randn(6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        point = project(projection, theta)
        point.backward(gradient)  # type: ignore[no-untyped-call]
    assert theta.grad is not None
    assert same_bits(point, projection.forward_numbers(theta.detach()))
    assert same_bits(theta.grad, projection.adjoint_numbers(gradient))


def test_a_small_projection_is_dense_and_a_large_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE", 60)
    assert [is_dense(name, 20, 3) for name in module.PROJECTIONS] == [True, True, False, True]
    assert [is_dense(name, 20, 4) for name in module.PROJECTIONS] == [False, True, False, False]
    assert isinstance(make_projection("auto", 20, 4, 0), FastfoodProjection)


def test_what_cannot_be_made_is_named() -> None:
    wrong: Any = "sparse"
    with pytest.raises(ConfigError, match="projection: expected one of auto, dense, fastfood, said"):
        make_projection(wrong, 4, 2, 0)
    with pytest.raises(
        ConfigError, match="projection: expected at most 2147483648 numbers of a dense P, got"
    ):
        make_projection("dense", 2**26, 33, 0)
    with pytest.raises(ConfigError, match="d: expected an integer from 1 to 4"):
        make_projection("auto", 4, 5, 0)


def test_it_moves_with_its_model_and_is_not_saved() -> None:
    projection = make_projection("fastfood", 40, 6, 1)
    assert not projection.state_dict()
    assert not list(projection.parameters())
    assert {buffer.device.type for buffer in projection.to("meta").buffers()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "fastfood"])
def test_a_gpu_is_within_the_bounds(name: str) -> None:
    ours, reference = pair(name, 300, 17)
    ours, own = ours.cuda(), exact(reference)
    theta = np.random.default_rng(0).standard_normal(17).astype(np.float32)
    point = ours.forward_numbers(torch.from_numpy(theta).cuda()).cpu().numpy()
    bound = subspace_parameters_bound(Subspace(np.zeros(300, np.float32), reference), theta, np.float32)
    assert np.all(error(point, own.forward(rational(theta))) <= bound)
