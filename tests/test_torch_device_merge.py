"""A weight is merged where it lies as the reference merges it, bit for bit, in every stage.

The kernel is compiled on CUDA; elsewhere Triton's interpreter runs it.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_fixtures import Chain, same_bits

from loracle.files import LoraConfig
from loracle.reference import LowRank, NonFiniteError, merge_adapters
from loracle.torch_impl import device_merge, inject, lora_layers, merge
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.device_factors import DeviceLowRank
from loracle.torch_impl.device_merge import DeviceMerge, merges_on_device
from loracle.torch_impl.layer import LoraLayer

# Triton's interpreter is NumPy, which warns of what a device computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FLOAT64, INTERPRETED, COMPILED = "float64", "interpreted", "compiled"


@pytest.fixture(
    params=[FLOAT64, INTERPRETED, pytest.param(COMPILED, marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors lie, with the first stage that the parameter names."""
    way = request.param
    monkeypatch.setattr(device_merge, "has_triton", lambda device: way != FLOAT64)
    if way == INTERPRETED:
        triton = pytest.importorskip("triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("the kernel is compiled here")
    return "cuda" if way == COMPILED else "cpu"


def merged(W0: Tensor, adapters: list[DeviceLowRank], device: str, *, fan_in_fan_out: bool = False) -> Tensor:
    """Merge on the device; assert that the result is the reference's."""
    moved = [DeviceLowRank(own.A.to(device), own.B.to(device), own.scaling, own.rows) for own in adapters]
    result = DeviceMerge(W0.to(device), moved, fan_in_fan_out=fan_in_fan_out).result().cpu()
    expected = merge_adapters(
        array_of(W0), [own.to_host() for own in adapters], fan_in_fan_out=fan_in_fan_out
    )
    assert result.shape == W0.shape
    assert same_bits(result, tensor_of(expected))
    return result


def problem(seed: int, out: int, inputs: int, r: int, dtype: torch.dtype, size: float = 1.0) -> Any:
    """W0 (out, in), and one adapter."""
    generator = torch.Generator().manual_seed(seed)
    W0, A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float32)
        for shape in ((out, inputs), (r, inputs), (out, r))
    )
    return W0.to(dtype), DeviceLowRank(A, B * size, 1 / 3)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140), st.sampled_from([1, 2, 3, 5, 8, 33, 40])),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1.0, 1e-3, 3e-8, 300.0]),
    fan_in_fan_out=st.booleans(),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_random_weights(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    seed: int,
    size: float,
    fan_in_fan_out: bool,
) -> None:
    W0, adapter = problem(seed, *shape, dtype, size)
    merged(W0.t().contiguous() if fan_in_fan_out else W0, [adapter], device, fan_in_fan_out=fan_in_fan_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_cancellations_and_zeros(device: str, dtype: torch.dtype) -> None:
    # Half a spacing of 1 is added, and a little more or less than any working precision shows.
    half = torch.finfo(dtype).eps / 2
    B = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    A = torch.tensor([[half, -half, 3 * half, 1.0, -1.0, 0.0], [2.0**-80] * 6], dtype=torch.float64)
    W0 = torch.tensor([1.0, 1.0, 1.0, -1.0, -0.0, -0.0]).expand(5, 6).to(dtype)
    result = merged(W0, [DeviceLowRank(A, B, 1.0)], device)
    assert result[:, 0].tolist() == [1 + 2 * half, 1.0, 1.0, 1.0 - half, 1.0]
    # A sum of zero is +0, an update of zero keeps -0, a tiny one its sign where it underflows.
    assert result[3, 3].item() == -2.0
    assert not result[1, 3].signbit()
    assert result[1, 3].item() == 0
    assert result[4, 5].signbit()
    assert result[4, 4].signbit()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_cancel(device: str, dtype: torch.dtype) -> None:
    # What decides the rounding is lost beside the products, whatever they are evaluated in.
    above = torch.finfo(dtype).eps / 2 + 2.0**-40
    A = torch.tensor([[2.0**60], [above], [-(2.0**60)]], dtype=torch.float64)
    result = merged(
        torch.ones(2, 1, dtype=dtype), [DeviceLowRank(A, torch.ones(2, 3, dtype=torch.float64), 1.0)], device
    )
    assert result[0].item() == 1 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_updates_of_zeros_keep_their_signs(device: str, dtype: torch.dtype) -> None:
    A = torch.tensor([[1e-200, -1e-200, 1e-300, -1e-300, 1e-30]], dtype=torch.float64)
    B = torch.tensor([[1.0], [1e-160], [-1e-100]], dtype=torch.float64)
    W0 = torch.tensor([0.0, -0.0, 0.0, 0.0, torch.finfo(dtype).tiny / 4]).expand(3, 5).to(dtype)
    merged(W0, [DeviceLowRank(A, B, 2.0)], device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    W0, A, B = (
        torch.randint(-3, 4, shape, generator=generator).float() for shape in ((33, 65), (2, 65), (33, 2))
    )
    result = merged(W0.to(dtype), [DeviceLowRank(A, B, 0.5)], device)
    assert torch.equal(result.float(), W0 + 0.5 * B @ A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_on_their_rows(device: str, dtype: torch.dtype) -> None:
    W0, whole = problem(1, 40, 30, 3, dtype)
    _, upper = problem(2, 16, 30, 2, dtype)
    _, lower = problem(3, 20, 30, 70, dtype)
    parts = [DeviceLowRank(upper.A, upper.B, 2.0, (0, 16)), DeviceLowRank(lower.A, lower.B, -0.7, (10, 30))]
    result = merged(W0, [whole, *parts], device)
    assert not same_bits(result, merged(W0, [whole], device))
    some = merged(W0, parts, device)
    assert same_bits(some[30:], W0[30:])
    assert same_bits(merged(W0, [], device), W0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_with_a_zero_leaves_a_zeros_sign(device: str, dtype: torch.dtype) -> None:
    W0, adapter = problem(9, 40, 48, 2, dtype)
    W0[:, ::2] = -0.0
    adapter.A[:, ::3] = 0
    adapter.B[::5] = -0.0
    result = merged(W0, [adapter], device)
    assert result[:, ::6].signbit().all()
    assert result[::5, ::2].signbit().all()


def test_where_most_entries_are_left_all_are_evaluated_anew(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    anew: list[int] = []
    tiles = device_merge._tiles_in_float64
    monkeypatch.setattr(device_merge, "_tiles_in_float64", lambda part: anew.append(1) or tiles(part))
    monkeypatch.setattr(device_merge, "_TILE_ENTRIES", 30)
    monkeypatch.setattr(device_merge, "_PRODUCTS_AT_ONCE", 6)
    W0, adapter = problem(4, 12, 10, 3, torch.bfloat16)
    merged(torch.zeros_like(W0), [DeviceLowRank(adapter.A, torch.zeros_like(adapter.B), 1.0)], device)
    assert anew == [1]
    merged(torch.zeros_like(W0), [adapter], device)
    merged(W0, [adapter], device)
    assert anew == [1] if device_merge.has_triton(torch.device(device)) else [1, 1, 1]
    # All of these are found without.
    monkeypatch.setattr(device_merge, "_MARKED_SHARE", 1)
    merged(torch.zeros_like(W0), [DeviceLowRank(adapter.A, torch.zeros_like(adapter.B), 1.0)], device)
    assert len(anew) == (1 if device_merge.has_triton(torch.device(device)) else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (64, 65), (65, 64), (7, 9)])
def test_blocks_that_are_whole_and_those_that_are_not(
    device: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    W0, adapter = problem(6, *shape, 17, dtype)
    merged(W0, [adapter], device)
    # A part of a larger tensor: its rows lie further apart.
    wide = torch.zeros(shape[0], shape[1] + 3, dtype=dtype)
    wide[:, : shape[1]] = W0
    merged(wide[:, : shape[1]], [adapter], device)


def test_few_entries_are_left_by_each_stage(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    alone: list[int] = []
    settle, on_host = device_merge._settle, device_merge._merge_on_host
    monkeypatch.setattr(
        device_merge, "_settle", lambda part, flat: found.append(len(flat)) or settle(part, flat)
    )
    monkeypatch.setattr(
        device_merge, "_merge_on_host", lambda part, i, j: alone.append(len(i)) or on_host(part, i, j)
    )
    # float32 leaves bfloat16 some; float64 none of so few.
    for dtype, r, most in (
        (torch.bfloat16, 8, 200), (torch.bfloat16, 48, 3), (torch.float16, 8, 3), (torch.float32, 8, 20)
    ):  # fmt: skip
        W0, adapter = problem(6, 128, 256, r, dtype, 0.1)
        merged(W0, [adapter], device)
        assert sum(found) <= most
        assert not alone
        found.clear()
    # Where the rows have no update nothing is proven by a product, and nothing is left either.
    W0, adapter = problem(7, 64, 128, 2, torch.bfloat16)
    adapter.B[::2] = 0
    W0[::4] = -0.0
    merged(W0, [adapter], device)
    assert 16 * 128 <= sum(found) < 17 * 128
    assert not alone


@pytest.mark.parametrize(
    ("name", "row", "column", "value", "message"),
    [
        ("W0", 2, 1, torch.nan, r"layer: expected finite numbers, got nan at \[2, 1\]"),
        ("W0", 0, 3, torch.inf, r"layer: expected finite numbers, got inf at \[0, 3\]"),
        ("A", 1, 2, torch.nan, r"lora_A of layer: expected finite numbers, got nan at \[1, 2\]"),
        ("B", 4, 0, -torch.inf, r"lora_B of layer: expected finite numbers, got -inf at \[4, 0\]"),
    ],
)
@pytest.mark.parametrize("zero", [False, True], ids=["updated", "without an update"])
def test_what_is_not_finite_is_named(
    device: str, name: str, row: int, column: int, value: float, message: str, zero: bool
) -> None:
    W0, adapter = problem(8, 5, 4, 2, torch.bfloat16)
    if zero:
        adapter.B.zero_()
    {"W0": W0, "A": adapter.A, "B": adapter.B}[name][row, column] = value
    own = [DeviceLowRank(adapter.A.to(device), adapter.B.to(device), 1.0)]
    with pytest.raises(NonFiniteError, match=message):
        DeviceMerge(W0.to(device), own, name="layer").result()
    if name == "W0":
        with pytest.raises(NonFiniteError, match=message):
            DeviceMerge(W0.to(device), [], name="layer").result()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_overflow_is_named_and_the_largest_number_is_none(device: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    W0 = torch.full((3, 4), largest).to(dtype)
    A, B = torch.zeros(1, 4, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    A[0, 2] = largest * torch.finfo(dtype).eps / 8
    merged(W0, [DeviceLowRank(A, B, 1.0)], device)
    moved = DeviceLowRank(A.to(device), B.to(device), 4.0)
    with pytest.raises(
        NonFiniteError, match=r"layer: expected merged numbers .* got an overflow at \[0, 2\]"
    ):
        DeviceMerge(W0.to(device), [moved], name="layer").result()


def test_layers_that_are_merged_where_they_lie(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    torch.manual_seed(3)
    model = Chain(torch.bfloat16)
    inject(model, LoraConfig(r=2, lora_alpha=3))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.base_layer.weight)
        nn.init.normal_(layer.update().lora_B)
    expected = {
        path: layer.merged_arrays(layer.active, path)["weight"] for path, layer in lora_layers(model).items()
    }
    started: list[str] = []
    monkeypatch.setattr("loracle.torch_impl.linear.merges_on_device", lambda W0, updates: True)
    start = DeviceMerge.__init__

    def counted(self: DeviceMerge, *args: Any, name: str, **options: Any) -> None:
        started.append(name)
        start(self, *args, name=name, **options)

    monkeypatch.setattr(DeviceMerge, "__init__", counted)
    model.to(device)
    merge(model)
    assert started == ["q_proj.weight", "v_proj.weight"]
    for path, layer in lora_layers(model).items():
        assert layer.weight.device.type == device
        assert same_bits(layer.weight.cpu(), tensor_of(expected[path]))


def test_which_weights_are_merged_on_the_host() -> None:
    layer = next(iter(lora_layers(adapted()).values()))
    update = layer.update()
    assert not merges_on_device(layer.base_weight, [update])


@pytest.mark.gpu
def test_which_weights_are_merged_on_cuda() -> None:
    layer: LoraLayer = next(iter(lora_layers(adapted().cuda()).values()))
    update = layer.update()
    assert merges_on_device(layer.base_weight, [update])
    assert not merges_on_device(layer.base_weight.double(), [update])
    update.lora_bias = nn.Parameter(torch.zeros(4, device="cuda"))
    assert not merges_on_device(layer.base_weight, [update])
    update.lora_bias, update.lora_magnitude_vector = None, nn.Parameter(torch.ones(4, device="cuda"))
    assert not merges_on_device(layer.base_weight, [update])


def adapted() -> Chain:
    model = Chain()
    inject(model, LoraConfig(r=2))
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_on_cuda(dtype: torch.dtype, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    for r in (1, 16, 64):
        W0, adapter = problem(r, 2048, 1031, r, dtype, 0.02)
        merged(W0, [adapter], "cuda")


def test_host_and_device_have_the_same_scalings() -> None:
    own = DeviceLowRank(torch.ones(1, 2), torch.ones(3, 1), 1 / 3, (1, 4)).to_host()
    assert isinstance(own, LowRank)
    assert own.rows == slice(1, 4)
    assert own.scaling == 1 / 3
    assert isinstance(own.A, np.ndarray)
    assert own.B.shape == (3, 1)
