"""How far from their exact values stacked LoRA experts in floating point may be; see `bounds`."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import DTypeLike, NDArray

from . import experts
from .bounds import gradient_bounds, sized, sizing, slack
from .formats import Array
from .low_rank import LayerGradients, LowRank
from .magnitudes import Bound, Magnitude
from .precision import Precision


def experts_forward_bound(
    x: Array,
    expert: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    fan_in_fan_out: bool = False,
) -> Bound:
    """Return a bound, (N, out), on ``|computed - exact|`` of `experts_forward` evaluated in ``precision``.

    Arguments as in `experts_forward`, the exact values, in any float dtypes; ``precision``, form, number of
    terms and errors as in `linear_forward_bound`.
    """
    W0 = experts.as_out_in(W0, fan_in_fan_out)
    rows = experts.check_experts(x, expert, W0, adapters, bias=bias)
    size = sizing(precision, adapters)
    places = experts.Places.of(rows, len(W0))
    y: Magnitude = experts.forward(size(x), places, size(W0), sized(adapters, size), size(bias))
    return y.bound(slack(adapters))


def experts_backward_bound(
    dy: Array,
    x: Array,
    expert: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    fan_in_fan_out: bool = False,
) -> LayerGradients:
    """Return bounds on ``|computed - exact|`` of each gradient of `experts_backward` in ``precision``.

    As in `linear_backward_bound`, with the rows of the busiest expert for N. Zero for an expert without rows,
    but for what underflows can do.
    """
    W0 = experts.as_out_in(W0, fan_in_fan_out)
    rows = experts.check_experts(x, expert, W0, adapters, dy=dy)
    size = sizing(precision, adapters)
    places = experts.Places.of(rows, len(W0))
    terms = experts.backward(size(dy), size(x), places, size(W0), sized(adapters, size))
    return gradient_bounds(terms.dx, terms.dbias, terms.adapters, slack(adapters))
