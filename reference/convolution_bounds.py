"""How far a LoRA convolution's result and gradients may be from their exact values: see `bounds`.

The counts hold for any order of summation, over channels, taps, windows, groups and batch at once or one
after the other, and for the unmerged layer as for one that forms delta. Not covered: kernels that compute
something else than sums of products of x and W0, as Winograd's and those by Fourier transforms do.
"""

from collections.abc import Sequence

from numpy.typing import DTypeLike

from . import convolution
from .bounds import gradient_bounds, sized, sizing, slack
from .convolution_shapes import check_convolution_shapes
from .formats import Array
from .low_rank import LayerGradients, LowRank
from .magnitudes import Bound, Magnitude
from .precision import Precision
from .windows import Convolution

_PLAIN = Convolution()


def convolution_forward_bound(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    geometry: Convolution = _PLAIN,
) -> Bound:
    """Return a bound, of y's shape, on ``|computed - exact|`` of `convolution_forward` in ``precision``.

    Arguments as in `convolution_forward`, of any float dtypes, and as in `linear_forward_bound`. The bound is
    `linear_forward_bound`'s for the windows as rows, with K + r terms on the longest path, K = in / groups *
    taps.

    Raises:
        ShapeError, DTypeError, ConfigError: as `convolution_forward` and `linear_forward_bound`.
    """
    windows = check_convolution_shapes(x, W0, adapters, geometry, bias=bias)
    size = sizing(precision, adapters)
    y: Magnitude = convolution.forward(size(x), size(W0), sized(adapters, size), size(bias), windows)
    return y.bound(slack(adapters))


def convolution_backward_bound(
    dy: Array,
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    geometry: Convolution = _PLAIN,
) -> LayerGradients:
    """Return bounds on ``|computed - exact|`` of each gradient of `convolution_backward` in ``precision``.

    As `linear_backward_bound` for the windows as rows: with m = out / groups outputs a group, N * L windows,
    and most of them w on one number of x, the longest path has m + r + (w - 1) max(m, r) terms for dx, m + N
    L + (groups - 1) max(m, N L) for dA, K + N L for dB and N L for dbias.

    Arguments and errors as in `convolution_forward_bound`.
    """
    windows = check_convolution_shapes(x, W0, adapters, geometry, dy=dy)
    size = sizing(precision, adapters)
    terms = convolution.backward(size(dy), size(x), size(W0), sized(adapters, size), windows)
    return gradient_bounds(terms.dx, terms.dbias, terms.adapters, slack(adapters))
