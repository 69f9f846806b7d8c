"""The LoRA convolution in one, two and three dimensions, forward and backward.

A convolution is a linear layer on gathered windows: each group's windows are the rows (N * L, K) of an input
to `linear.forward` with the weight (out / groups, K), K = in / groups * taps, and the gradient of the input
is that layer's, scattered back to where the windows came from. Padding is part of where they come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

from . import linear
from .convolution_shapes import check_convolution_adapter, check_convolution_shapes, columns_of
from .formats import Array
from .linear import AdapterTerms, LinearTerms, adapter_tensors, layer_gradients
from .low_rank import LayerGradients, LowRank
from .operands import Operand, add_up, check_dtypes, restructure, stack
from .windows import Convolution, Windows

_PLAIN = Convolution()


def convolution_forward(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    bias: Array | None = None,
    geometry: Convolution = _PLAIN,
) -> Array:
    """Return ``y = conv(x, W0) + bias + sum scaling * (conv(x * dropout, A) -> B + its bias)``.

    Args:
        x: (N, in, *spatial) with one, two or three spatial axes.
        W0: (out, in / groups, *kernel), frozen.
        adapters: any number, see `LowRank`, all over all outputs: A (r, in / groups, *kernel), B (out, r) or,
            as PEFT stores it, (out, r, 1, ...), dropout of x's shape. ``conv(., A) -> B`` is a convolution by
            A followed by the matrix B on its r outputs, so that delta, of W0's shape, is ``scaling * B @
            A.reshape(r, -1)``. With groups, A sees each group's channels in turn and B has rows of its own
            for each group. (PEFT's A sees the channels of all groups at once: no grouped weight can hold that
            update.)
        bias: (out,), or None.
        geometry: stride, padding and so on; A has the same as W0. (PEFT's A leaves out dilation and padding
            mode, and its unmerged layer then differs from its merged one.)

    Returns:
        (N, out, *out_spatial). conv is the cross-correlation that torch calls a convolution.

    Dtypes as in `linear_forward`.

    Raises:
        ShapeError, DTypeError, ConfigError: naming the tensor or argument, what was expected and what came.

    Source: LoRA, arXiv 2106.09685, equation 3, for a weight seen as a matrix (out, in / groups * taps), as in
    the authors' loralib.
    """
    windows = _check(x, W0, adapters, geometry, bias=bias)
    y: Array = forward(x, W0, adapters, bias, windows)
    return y


def convolution_backward(
    dy: Array,
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    geometry: Convolution = _PLAIN,
) -> LayerGradients:
    """Return the gradients of `convolution_forward` for ``dy``, of y's shape, the gradient of y.

    In a window's terms they are `adapted_linear_backward`'s: with rows of windows X, of x, and Z, of x *
    dropout, h = Z A^T and dh = scaling * dy B, summed over windows, batch and, for dA, groups:

        dX = dy W0,   dZ = dh A,   dA = dh^T Z,   dB = scaling * dy^T h,   dbias = sum dy

    and dx sums dX + dZ * dropout over the windows that a number of x is in, a padding copy of it included.
    Each gradient has the shape of its tensor, B's as it was given.

    Arguments, dtypes and errors as in `convolution_forward`.
    """
    windows = _check(x, W0, adapters, geometry, dy=dy)
    return layer_gradients(*backward(dy, x, W0, adapters, windows))


def convolution_delta_factors(adapter: LowRank, weight_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return A as (r, K) and B as (out, r), K = in / groups * taps.

    With W0 of ``weight_shape``, (out, in / groups, *kernel), seen as the matrix ``W0.reshape(out, K)``, the
    adapter is an ordinary low-rank update of it, whatever the geometry: `merge` takes the three as they are,
    and the merged matrix reshaped to ``weight_shape`` is the merged weight.

    Raises:
        ShapeError, ConfigError: the adapter does not fit the weight.
    """
    check_convolution_adapter(adapter, weight_shape)
    r = len(adapter.A)
    return adapter.A.reshape(r, columns_of(weight_shape)), adapter.B.reshape(weight_shape[0], r)


def _check(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    geometry: Convolution,
    *,
    bias: Array | None = None,
    dy: Array | None = None,
) -> Windows:
    windows = check_convolution_shapes(x, W0, adapters, geometry, bias=bias, dy=dy)
    check_dtypes(x=x, W0=W0, **adapter_tensors(adapters), bias=bias, dy=dy)
    return windows


class _Group(NamedTuple):
    """The linear layer of one group: rows (N * L, K), a weight (out / groups, K) and its adapters."""

    rows: Operand
    W0: Operand
    adapters: list[LowRank]


def forward(x: Operand, W0: Operand, adapters: Sequence[LowRank], bias: Operand, windows: Windows) -> Operand:
    """Evaluate `convolution_forward` on operands of any kind; nothing is checked."""
    groups = _groups(x, W0, adapters, windows)
    biases = _parts(bias, len(groups))
    outputs = [linear.forward(*group, biases[g]) for g, group in enumerate(groups)]
    return restructure(stack(outputs), windows.outputs)


def backward(
    dy: Operand, x: Operand, W0: Operand, adapters: Sequence[LowRank], windows: Windows
) -> LinearTerms:
    """Evaluate `convolution_backward` on operands of any kind; nothing is checked."""
    groups = _groups(x, W0, adapters, windows)
    rows = restructure(dy, windows.output_rows)
    parts = [linear.backward(rows[g], *group) for g, group in enumerate(groups)]
    _, count, width = rows.shape
    # Others add up outputs (or ranks) and windows in one sum, where the groups' layers count one of them.
    longest = max([width, *(adapter.A.shape[0] for adapter in adapters)])
    dx = add_up(stack([part.dx for part in parts]), windows.scatter, (windows.most - 1) * longest)
    own = [
        _joined([part.adapters[n] for part in parts], adapter, max(count, width))
        for n, adapter in enumerate(adapters)
    ]
    return LinearTerms(dx, _whole([part.dbias for part in parts], (W0.shape[0],)), own)


def _groups(x: Operand, W0: Operand, adapters: Sequence[LowRank], windows: Windows) -> list[_Group]:
    """Return each group's linear layer."""
    count, _, K = windows.index.shape
    rows = restructure(x, windows.gather)
    weights = _parts(W0, count, K)
    own = [_adapters(adapter, windows) for adapter in adapters]
    return [_Group(rows[g], weights[g], [each[g] for each in own]) for g in range(count)]


def _adapters(adapter: LowRank, windows: Windows) -> list[LowRank]:
    """Return the adapter of each group's linear layer: one A for all, and each group's rows of B."""
    count, _, K = windows.index.shape
    r = adapter.A.shape[0]
    A = restructure(adapter.A, lambda a: a.reshape(r, K))
    B, biases = _parts(adapter.B, count, r), _parts(adapter.bias, count)
    dropout = [None] * count if adapter.dropout is None else restructure(adapter.dropout, windows.gather)
    return [LowRank(A, B[g], adapter.scaling, bias=biases[g], dropout=dropout[g]) for g in range(count)]


def _joined(parts: Sequence[AdapterTerms], adapter: LowRank, longest: int) -> AdapterTerms:
    """Return the adapter's gradients from the groups': dA is their sum, the rest lie one after the other."""
    # Others add up the groups' windows in one sum, or the outputs of all groups.
    most = (len(parts) - 1) * longest
    dA = add_up(stack([part.dA for part in parts]), lambda a: a.sum(axis=0), most)
    outputs = adapter.B.shape[:1]
    return AdapterTerms(
        dx=None,
        dA=restructure(dA, lambda a: a.reshape(adapter.A.shape)),
        dB=_whole([part.dB for part in parts], adapter.B.shape),
        dbias=None if adapter.bias is None else _whole([part.dbias for part in parts], outputs),
    )


def _parts(values: Operand, groups: int, *tail: int) -> Operand:
    """Return (out, ...) as (groups, out / groups, *tail); a None for each group where there is nothing."""
    if values is None:
        return [None] * groups
    return restructure(values, lambda a: a.reshape(groups, len(a) // groups, *tail))


def _whole(parts: Sequence[Operand], shape: tuple[int, ...]) -> Operand:
    """Return the groups' parts, one after the other, in the given shape."""
    return restructure(stack(parts), lambda a: a.reshape(shape))
