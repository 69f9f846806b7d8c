"""Where a convolution looks: output sizes, and the map that makes it a linear layer on gathered windows."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from .arguments import is_integer
from .errors import ConfigError, ShapeError
from .formats import Array

PerAxis: TypeAlias = int | tuple[int, ...]
PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]

_ZERO = -1  # The source of a padding zero.


@dataclass(frozen=True)
class Convolution:
    """How the windows of a convolution lie on its input; torch's words and defaults.

    Args:
        stride: from one window to the next; a number for all spatial axes or one for each, as the next two.
        padding: numbers added at both ends; or "valid", none; or "same", ``dilation * (kernel - 1)`` in all,
            the odd one at the far end, so that the output is as large as the input.
        padding_mode: what is added, as ``torch.nn.functional.pad`` has it: zeros, the input mirrored at its
            end without the end itself, the end repeated, or the input continued from its other end.
        dilation: from one tap of the kernel to the next.
        groups: so many equal parts of the channels, each convolved to its own part of the outputs.

    Raises:
        ConfigError: naming the argument, what was expected and what came.

    Source: ``torch.nn.Conv1d``, ``Conv2d``, ``Conv3d``.
    """

    stride: PerAxis = 1
    padding: PerAxis | Literal["valid", "same"] = 0
    padding_mode: PaddingMode = "zeros"
    dilation: PerAxis = 1
    groups: int = 1

    def __post_init__(self) -> None:
        _check_numbers("stride", self.stride, 1)
        _check_numbers("dilation", self.dilation, 1)
        if not is_integer(self.groups) or self.groups < 1:
            raise ConfigError(f"groups: expected a number of at least 1, got {self.groups!r}; 1 is no groups")
        if self.padding_mode not in get_args(PaddingMode):
            known = ", ".join(get_args(PaddingMode))
            raise ConfigError(f"padding_mode: expected one of {known}, got {self.padding_mode!r}; name one")
        if not isinstance(self.padding, str):
            _check_numbers("padding", self.padding, 0)
        elif self.padding not in ("valid", "same"):
            raise ConfigError(
                f"padding: expected numbers, 'valid' or 'same', got {self.padding!r}; name one of them"
            )
        elif self.padding == "same" and set(_numbers(self.stride)) != {1}:
            raise ConfigError(
                f"padding: expected numbers with stride {self.stride}, got 'same'; it needs a stride of 1"
            )


class Axis(NamedTuple):
    """One spatial axis: the input's size on it and how the windows lie."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    padding_mode: PaddingMode

    @property
    def windows(self) -> int:
        """How many windows there are, that is the output's size; 0 or less where the kernel is too large."""
        return (self.before + self.size + self.after - self.span) // self.stride + 1

    @property
    def span(self) -> int:
        """From a window's first tap to its last, both included."""
        return self.dilation * (self.kernel - 1) + 1

    def sources(self) -> NDArray[np.intp]:
        """Return (windows, kernel): which of the input's numbers each tap sees, -1 for a zero."""
        first = self.stride * np.arange(self.windows)[:, None] - self.before
        position = first + self.dilation * np.arange(self.kernel)
        last = self.size - 1
        source: NDArray[np.intp]
        match self.padding_mode:
            case "zeros":
                source = np.where((position >= 0) & (position <= last), position, _ZERO)
            case "reflect":
                source = last - np.abs(last - np.abs(position))
            case "replicate":
                source = np.clip(position, 0, last)
            case "circular":
                source = position % self.size
        return source


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows on an input of shape (N, *input_shape).

    ``index`` (groups, L, K), K = in / groups * taps, says which number of the flattened input each column of
    each of the L windows is: an index into ``prod(input_shape) + 1`` numbers, the last of them a zero.
    """

    index: NDArray[np.intp]
    input_shape: tuple[int, ...]
    output_sizes: tuple[int, ...]

    def gather(self, values: Array) -> Array:
        """Return the windows on (N, *input_shape): (groups, N * L, K)."""
        groups, L, K = self.index.shape
        N = len(values)
        size = math.prod(self.input_shape)
        extended = np.zeros((N, size + 1), values.dtype)
        extended[:, :-1] = values.reshape(N, size)
        return extended[:, self.index].swapaxes(0, 1).reshape(groups, N * L, K)

    def scatter(self, columns: Array) -> Array:
        """Return (N, *input_shape), each number the sum of the columns that `gather` copies it to."""
        groups, L, K = self.index.shape
        N = columns.shape[1] // L
        summed = np.zeros((math.prod(self.input_shape) + 1, N), columns.dtype)
        # One addition at a time: a number that is in several windows is named several times.
        np.add.at(summed, self.index, columns.reshape(groups, N, L, K).transpose(0, 2, 3, 1))
        return summed[:-1].T.reshape(N, *self.input_shape)

    @property
    def most(self) -> int:
        """How many columns `scatter` sums into one number at most, but at least 1."""
        return max(1, int(np.bincount(self.index.ravel())[: math.prod(self.input_shape)].max()))

    def outputs(self, rows: Array) -> Array:
        """Return (groups, N * L, out / groups) as (N, out, *output_sizes)."""
        groups, L, _ = self.index.shape
        N, width = rows.shape[1] // L, rows.shape[2]
        return (
            rows.reshape(groups, N, L, width)
            .transpose(1, 0, 3, 2)
            .reshape(N, groups * width, *self.output_sizes)
        )

    def output_rows(self, values: Array) -> Array:
        """Return (N, out, *output_sizes) as (groups, N * L, out / groups): the inverse of `outputs`."""
        groups, L, _ = self.index.shape
        N, width = len(values), values.shape[1] // groups
        return values.reshape(N, groups, width, L).transpose(1, 0, 3, 2).reshape(groups, N * L, width)


def windows_on(input_shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Convolution) -> Windows:
    """Return the windows of a convolution on an input of shape (N, *input_shape), (in, *spatial).

    Raises:
        ConfigError, ShapeError: as `spatial_axes`.
    """
    channels, *spatial = input_shape
    axes = spatial_axes(tuple(spatial), kernel, geometry)
    count = len(axes)
    flat, inside = np.zeros((), np.intp), np.ones((), np.bool_)
    for n, axis in enumerate(axes):
        # Windows on the first `count` axes, taps on the rest.
        around = [1 for _ in (*axes, *axes)]
        around[n], around[count + n] = axis.windows, axis.kernel
        source = axis.sources().reshape(around)
        flat = flat * axis.size + source
        inside = inside & (source != _ZERO)
    sizes, size = tuple(axis.windows for axis in axes), math.prod(spatial)
    per_group = channels // geometry.groups
    first = size * np.arange(channels).reshape(geometry.groups, 1, per_group, 1)
    L, taps = math.prod(sizes), math.prod(kernel)
    around = [1, L, 1, taps]
    index = np.where(inside.reshape(around), first + flat.reshape(around), channels * size)
    return Windows(index.reshape(geometry.groups, L, per_group * taps), input_shape, sizes)


def spatial_axes(
    spatial: tuple[int, ...], kernel: tuple[int, ...], geometry: Convolution
) -> tuple[Axis, ...]:
    """Return the spatial axes of a convolution, checked.

    Raises:
        ConfigError: an argument of the geometry does not have a number for each axis.
        ShapeError: the padded input is smaller than the kernel, or the input too small for the padding.
    """
    count = len(spatial)
    strides, dilations = (_per_axis(name, getattr(geometry, name), count) for name in ("stride", "dilation"))
    if geometry.padding == "same":
        whole = [step * (taps - 1) for step, taps in zip(dilations, kernel, strict=True)]
        ends = [(n // 2, n - n // 2) for n in whole]
    else:
        padding = 0 if isinstance(geometry.padding, str) else geometry.padding
        ends = [(n, n) for n in _per_axis("padding", padding, count)]
    mode = geometry.padding_mode
    axes = tuple(
        Axis(size, taps, stride, dilation, before, after, mode)
        for size, taps, stride, dilation, (before, after) in zip(
            spatial, kernel, strides, dilations, ends, strict=True
        )
    )
    for n, axis in enumerate(axes):
        _check_axis(n, axis)
    return axes


def _check_axis(n: int, axis: Axis) -> None:
    """Check that spatial axis n holds its padding, by torch's rules, and at least one window."""
    padding, mode = max(axis.before, axis.after), axis.padding_mode
    least = max(1, {"reflect": padding + 1, "circular": padding}.get(mode, 1))
    if axis.size < least:
        why = f" for {mode} padding of {padding}" if padding else ""
        raise ShapeError(
            f"x: expected at least {least} on spatial axis {n}{why}, got {axis.size}; give it more"
        )
    if axis.windows < 1:
        both = axis.before + axis.after
        raise ShapeError(
            f"x: expected at least {axis.span - both} on spatial axis {n} for a kernel that spans "
            f"{axis.span} with {both} of padding, got {axis.size}; pad more"
        )


def _numbers(value: PerAxis) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_numbers(name: str, value: PerAxis, least: int) -> None:
    if not all(is_integer(number) and number >= least for number in _numbers(value)):
        raise ConfigError(
            f"{name}: expected a number of at least {least} or a tuple of them, got {value!r}; "
            "give one for each axis"
        )


def _per_axis(name: str, value: PerAxis, count: int) -> tuple[int, ...]:
    numbers = value if isinstance(value, tuple) else (value,) * count
    if len(numbers) != count:
        raise ConfigError(
            f"{name}: expected a number or {count} of them, one for each spatial axis, got {value}; "
            "W0 has the axes (out, in/groups, *spatial)"
        )
    return numbers
