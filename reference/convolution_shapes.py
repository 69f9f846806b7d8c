"""The shapes of a convolution's tensors, checked in one place."""

import math
from collections.abc import Sequence

from .errors import ConfigError, ShapeError
from .formats import Array
from .linear_shapes import adapter_suffix
from .low_rank import LowRank
from .windows import Convolution, Windows, windows_on

Shape = tuple[int, ...]


def check_convolution_shapes(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    geometry: Convolution,
    *,
    bias: Array | None = None,
    dy: Array | None = None,
) -> Windows:
    """Return the windows, once x (N, in, *spatial), W0, the adapters, bias (out,) and dy fit.

    Raises:
        ShapeError, ConfigError: naming the first tensor or argument that does not fit, what was expected and
            what came.
    """
    if not 3 <= W0.ndim <= 5 or min(W0.shape) < 1:
        raise ShapeError(
            f"W0: expected (out, in/groups, *kernel) with 1, 2 or 3 kernel sizes and none of them 0, "
            f"got {W0.shape}; pass the convolution's weight"
        )
    out_channels, per_group, *kernel = W0.shape
    if out_channels % geometry.groups:
        raise ConfigError(
            f"groups: expected a divisor of W0's {out_channels} outputs, got {geometry.groups}; check W0"
        )
    channels = per_group * geometry.groups
    if x.ndim != W0.ndim or x.shape[1] != channels:
        spatial = ", ".join("size" for _ in kernel)
        raise ShapeError(
            f"x: expected (N, {channels}, {spatial}) to fit W0 {W0.shape} with groups {geometry.groups}, "
            f"got {x.shape}; check its axes"
        )
    windows = windows_on(x.shape[1:], tuple(kernel), geometry)
    fit = f"W0 {W0.shape} and x {x.shape}"
    for number, adapter in enumerate(adapters):
        suffix = adapter_suffix(number, adapters)
        check_convolution_adapter(adapter, W0.shape, suffix)
        _check(f"dropout{suffix}", adapter.dropout, x.shape, fit)
    _check("bias", bias, (out_channels,), fit)
    _check("dy", dy, (len(x), out_channels, *windows.output_sizes), fit)
    return windows


def check_convolution_adapter(adapter: LowRank, weight: Shape, suffix: str = "") -> None:
    """Check the adapter's A, B, bias and rows against the shape (out, in/groups, *kernel) of the weight.

    Raises:
        ShapeError, ConfigError: naming the tensor, what was expected and what came.
    """
    A, B, out_channels = adapter.A, adapter.B, weight[0]
    if adapter.rows is not None:
        raise ConfigError(
            f"rows{suffix}: expected None, got {adapter.rows}; a convolution's adapter updates every output"
        )
    if A.shape[1:] != weight[1:] or A.shape[0] < 1:
        sizes = ", ".join(map(str, weight[1:]))
        raise ShapeError(
            f"A{suffix}: expected (r, {sizes}) to fit W0 {weight}, got {A.shape}; {_remedy(A, weight)}"
        )
    matrix = (out_channels, A.shape[0])
    kernel_of_ones = (*matrix, *(1 for _ in weight[2:]))
    if B.shape not in (matrix, kernel_of_ones):
        raise ShapeError(
            f"B{suffix}: expected {matrix} or {kernel_of_ones} to fit W0 {weight} and A {A.shape}, "
            f"got {B.shape}; check its axes"
        )
    _check(f"bias of lora_B{suffix}", adapter.bias, (out_channels,), f"W0 {weight} and A {A.shape}")


def columns_of(weight: Shape) -> int:
    """Return K: how many numbers of a window an output sees, (in / groups) * taps."""
    return math.prod(weight[1:])


def _remedy(A: Array, weight: Shape) -> str:
    """Say what is wrong with A: PEFT's, over the channels of all groups, has the kernel's shape too."""
    over_groups = A.ndim == len(weight) and A.shape[2:] == weight[2:] and A.shape[1] > weight[1]
    if over_groups and A.shape[1] % weight[1] == 0:
        return (
            "an A over the channels of all groups, as PEFT trains it, is no update of a grouped weight: "
            "it cannot be merged"
        )
    return "check its axes"


def _check(name: str, tensor: Array | None, shape: Shape, fit: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ShapeError(f"{name}: expected {shape} to fit {fit}, got {tensor.shape}; check its axes")
