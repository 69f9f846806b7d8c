"""LoRA convolutions for tests: hypothesis strategies, and the layer by its definition, window by window."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from exact_linear import rational
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from strategies import exact_limit

from loracle.reference import (
    Convolution,
    LayerGradients,
    LowRank,
    convolution_backward,
    convolution_backward_bound,
    convolution_forward,
    convolution_forward_bound,
)

TENSORS = ("A", "B", "bias", "dropout")
NUMPYS_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@dataclass(frozen=True, eq=False)
class ConvolutionProblem:
    """x (N, in, *spatial), dy as y, W0 (out, in / groups, *kernel), bias (out,), adapters and geometry."""

    x: Any
    dy: Any
    W0: Any
    bias: Any
    adapters: tuple[LowRank, ...]
    geometry: Convolution

    def each(self, change: Any) -> "ConvolutionProblem":
        """Return the same problem with every array changed."""
        adapters = tuple(
            replace(own, **{n: change(getattr(own, n)) for n in TENSORS if getattr(own, n) is not None})
            for own in self.adapters
        )
        arrays = (change(array) for array in (self.x, self.dy, self.W0, self.bias))
        return ConvolutionProblem(*arrays, adapters, self.geometry)

    def astype(self, dtype: DTypeLike) -> "ConvolutionProblem":
        return self.each(lambda array: array.astype(dtype))

    def rational(self) -> "ConvolutionProblem":
        return self.each(rational)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {getattr(self, name).shape}" for name in ("x", "dy", "W0"))
        own = "; ".join(
            ", ".join(f"{n} {getattr(a, n).shape}" for n in TENSORS if getattr(a, n) is not None)
            + f", scaling {a.scaling}"
            for a in self.adapters
        )
        return f"ConvolutionProblem({shapes}; {own}; {self.geometry})"


def forward(p: ConvolutionProblem) -> Any:
    return convolution_forward(p.x, p.W0, p.adapters, bias=p.bias, geometry=p.geometry)


def backward(p: ConvolutionProblem) -> LayerGradients:
    return convolution_backward(p.dy, p.x, p.W0, p.adapters, geometry=p.geometry)


def forward_bound(p: ConvolutionProblem, precision: Any) -> Any:
    return convolution_forward_bound(p.x, p.W0, p.adapters, precision, bias=p.bias, geometry=p.geometry)


def backward_bound(p: ConvolutionProblem, precision: Any) -> LayerGradients:
    return convolution_backward_bound(p.dy, p.x, p.W0, p.adapters, precision, geometry=p.geometry)


def named(gradients: LayerGradients) -> dict[str, Any]:
    """Return every gradient there is by a name of its own."""
    result = {"dx": gradients.dx, "dbias": gradients.dbias}
    for n, own in enumerate(gradients.adapters):
        result |= {f"dA{n}": own.dA, f"dB{n}": own.dB}
        if own.dbias is not None:
            result[f"dbias{n}"] = own.dbias
    return result


def delta(adapter: LowRank, weight: tuple[int, ...]) -> Any:
    """Return ``scaling * B @ A`` of the weight's shape, in the dtype of the adapter or as Fractions."""
    A, B = adapter.A, adapter.B
    r = len(A)
    scaling = rational(adapter.scaling)[()] if A.dtype == object else adapter.scaling
    return (scaling * (B.reshape(len(B), r) @ A.reshape(r, -1))).reshape(weight)


def by_definition(p: ConvolutionProblem) -> Any:
    """y, one window after the other on an input that is padded by NumPy; for object arrays."""
    y = convolve(p.x, p.W0, p.geometry)
    bias = p.bias
    for own in p.adapters:
        dropped = p.x if own.dropout is None else p.x * own.dropout
        y = y + convolve(dropped, delta(own, p.W0.shape), p.geometry)
        if own.bias is not None:
            bias = bias + rational(own.scaling)[()] * own.bias
    return y + bias.reshape(-1, *(1 for _ in p.x.shape[2:]))


def per_axis(value: Any, count: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * count


def convolve(x: Any, W: Any, geometry: Convolution) -> Any:
    kernel = W.shape[2:]
    stride, dilation = (per_axis(v, len(kernel)) for v in (geometry.stride, geometry.dilation))
    spans = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if geometry.padding == "same":
        ends = [(math.floor(s / 2), math.ceil(s / 2)) for s in spans]
    else:
        numbers = 0 if geometry.padding == "valid" else geometry.padding
        ends = [(n, n) for n in per_axis(numbers, len(kernel))]
    padded = np.pad(x, [(0, 0), (0, 0), *ends], mode=NUMPYS_MODES[geometry.padding_mode])
    starts = [range(0, n - s, t) for n, s, t in zip(padded.shape[2:], spans, stride, strict=True)]
    y = np.zeros((len(x), len(W), *map(len, starts)), dtype=object)
    inputs, outputs = W.shape[1], len(W) // geometry.groups
    for n, o in np.ndindex(y.shape[:2]):
        group = o // outputs
        own = padded[n, group * inputs : (group + 1) * inputs]
        for place, first in zip(np.ndindex(y.shape[2:]), itertools.product(*starts), strict=True):
            window = tuple(slice(f, f + s + 1, d) for f, s, d in zip(first, spans, dilation, strict=True))
            y[(n, o, *place)] = (own[(slice(None), *window)] * W[o]).sum()
    return y


@st.composite
def layouts(draw: st.DrawFn, axes: int = 3) -> tuple[Convolution, tuple[int, ...], tuple[int, ...]]:
    """A geometry with a spatial shape and a kernel that it fits; groups come later."""
    count = draw(st.integers(1, axes))

    def numbers(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(count))

    kernel, dilation = numbers(1, 3), numbers(1, 2)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    mode = draw(st.sampled_from(list(NUMPYS_MODES)))
    padding: Any = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    stride = (1,) * count if padding == "same" else numbers(1, 3)
    if padding == "numbers":
        padding = numbers(0, 2)
    ends = padding if isinstance(padding, tuple) else [(s + 1) // 2 * (padding == "same") for s in spans]
    added = [2 * end for end in ends] if padding != "same" else spans
    needed = {"reflect": 1, "circular": 0}
    least = [
        max(1, span + 1 - more, end + needed[mode] if mode in needed else 1)
        for span, more, end in zip(spans, added, ends, strict=True)
    ]
    spatial = tuple(draw(st.integers(n, n + 3 - count // 2)) for n in least)
    # A number for all axes means the same as that number for each.
    fields = {"stride": stride, "padding": padding, "dilation": dilation}
    fields = {k: v[0] if isinstance(v, tuple) and len(set(v)) == 1 else v for k, v in fields.items()}
    return Convolution(padding_mode=mode, **fields), spatial, kernel


@st.composite
def problems(
    draw: st.DrawFn, numbers: Any, scalings: list[float], keep: float, axes: int = 3, most: int = 2
) -> ConvolutionProblem:
    """A problem whose arrays ``numbers(rng, shape)`` makes, in float64."""
    geometry, spatial, kernel = draw(layouts(axes))
    N, inputs, outputs, groups = (draw(st.integers(1, most)) for _ in range(4))
    geometry = replace(geometry, groups=groups)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out, W0 = outputs * groups, numbers(rng, (outputs * groups, inputs, *kernel))
    x = numbers(rng, (N, inputs * groups, *spatial))
    adapters = []
    for _ in range(draw(st.integers(1, 2))):
        r = draw(st.integers(1, most + 1))
        tail = draw(st.sampled_from([(), (1,) * len(kernel)]))
        own = LowRank(
            numbers(rng, (r, *W0.shape[1:])), numbers(rng, (out, r, *tail)), draw(st.sampled_from(scalings))
        )
        if draw(st.booleans()):
            own = replace(own, bias=numbers(rng, (out,)))
        if draw(st.booleans()):
            own = replace(own, dropout=(rng.random(x.shape) < keep) / keep)
        adapters.append(own)
    bias = numbers(rng, (out,))
    y = convolution_forward(x, W0, (), geometry=geometry)
    return ConvolutionProblem(x, numbers(rng, y.shape), W0, bias, tuple(adapters), geometry)


# Axes, largest count of each kind, largest integer and share of nonzeros with which few partial sums are too
# large for the dtype's exact integers.
_EXACT = {
    np.dtype(ml_dtypes.bfloat16): (2, 1, 1, 0.6),
    np.dtype(np.float16): (2, 2, 1, 0.8),
    np.dtype(np.float32): (3, 2, 4, 1.0),
    np.dtype(np.float64): (3, 2, 40, 1.0),
}


@st.composite
def exact_convolutions(draw: st.DrawFn, dtype: DTypeLike) -> ConvolutionProblem:
    """Small integers and powers of two: every partial sum, in any order, is a number of the dtype."""
    axes, most, size, share = _EXACT[np.dtype(dtype)]

    def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        return (rng.integers(-size, size + 1, shape) * (rng.random(shape) < share)).astype(float)

    p = draw(problems(integers, [0.25, 0.5, 1.0, 2.0], 0.5, axes, most))
    assume(largest_sum(p) <= exact_limit(dtype))
    return p.astype(dtype)


def largest_sum(p: ConvolutionProblem) -> float:
    """Return what no partial sum of the layer and its gradients exceeds, scaled or not, in any order."""
    sizes = p.each(np.abs)
    sizes = replace(sizes, adapters=tuple(replace(a, scaling=max(1.0, a.scaling)) for a in sizes.adapters))
    return float(max(array.max() for array in (forward(sizes), *named(backward(sizes)).values())))


def gaussian_convolutions(dtype: DTypeLike = np.float64) -> st.SearchStrategy[ConvolutionProblem]:
    """Gaussians, any scaling; arrays of ``dtype``."""

    def gaussians(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        return rng.normal(0, 1, shape)

    scalings = [1.0, 2.0, 1 / 3, -1.7, 0.0, 16 / 8**0.5]
    return problems(gaussians, scalings, 0.9).map(lambda p: p.astype(dtype))
