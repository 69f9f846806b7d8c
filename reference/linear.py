"""The LoRA linear layer, forward and backward: what every implementation of it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .formats import Array
from .linear_shapes import adapter_suffix, check_linear_shapes
from .low_rank import LayerGradients, LowRank, LowRankGradients
from .operands import Operand, as_rows, check_dtypes, masked, place_rows, product, scale, total


@dataclass(frozen=True, eq=False)
class LinearGradients:
    """Gradients of the layer: dx (..., in), dA (r, in), dB (out, r), dbias (out,). W0 is frozen."""

    dx: Array
    dA: Array  # noqa: N815
    dB: Array  # noqa: N815
    dbias: Array


def linear_forward(
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    *,
    bias: Array | None = None,
    dropout: Array | None = None,
) -> Array:
    """Return ``y = x W0^T + bias + scaling * ((x * dropout) A^T) B^T``, of shape (..., out).

    Args:
        x: (..., in).
        W0: (out, in), frozen.
        A: (r, in), the tensor ``lora_A``. B: (out, r), the tensor ``lora_B``.
        scaling: see `lora_scaling`.
        bias: (out,), or None.
        dropout: of x's shape, what to multiply the adapter's input by: 0 where dropped, 1 / (1 - p) where
            kept. The base product always sees x itself.

    All arrays have one dtype and the work is done in it: float16, bfloat16, float32, float64; or object,
    for exact arithmetic with `fractions.Fraction` or int elements, where ``scaling`` is taken as an exact
    rational. In floating point this is one evaluation among many: `linear_forward_bound` says how far any
    may be off.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.

    Source: LoRA, arXiv 2106.09685, equation 3, with dropout on the adapter's input as in the authors'
    loralib.
    """
    return adapted_linear_forward(x, W0, [LowRank(A, B, scaling, dropout=dropout)], bias=bias)


def linear_backward(
    dy: Array,
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    *,
    dropout: Array | None = None,
) -> LinearGradients:
    """Return the gradients of a scalar whose gradient with respect to y is ``dy``, (..., out).

    With h = (x * dropout) A^T and dh = scaling * dy B, both (..., r), and sums over all leading axes:

        dx = dy W0 + (dh A) * dropout,   dA = dh^T (x * dropout),   dB = scaling * dy^T h,   dbias = sum dy

    Arguments, dtypes and errors as in `linear_forward`.
    """
    gradients = adapted_linear_backward(dy, x, W0, [LowRank(A, B, scaling, dropout=dropout)])
    own = gradients.adapters[0]
    return LinearGradients(dx=gradients.dx, dA=own.dA, dB=own.dB, dbias=gradients.dbias)


def adapted_linear_forward(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    bias: Array | None = None,
    fan_in_fan_out: bool = False,
) -> Array:
    """Return ``x W0^T + bias`` plus, for each adapter, ``scaling * (((x * dropout) A^T) B^T + its bias)``.

    Args:
        x: (..., in).
        W0: (out, in), or (in, out) with ``fan_in_fan_out`` (GPT-2's Conv1D).
        adapters: any number, see `LowRank`; each is added to its own rows of the output, so that adapters
            that are active at once and the slices of a fused projection are the same thing.
        bias: (out,).

    Dtypes, errors and source as in `linear_forward`.
    """
    check_linear(x, W0.T if fan_in_fan_out else W0, adapters, bias=bias)
    y: Array = forward(x, W0.T if fan_in_fan_out else W0, adapters, bias)
    return y


def adapted_linear_backward(
    dy: Array, x: Array, W0: Array, adapters: Sequence[LowRank], *, fan_in_fan_out: bool = False
) -> LayerGradients:
    """Return the gradients of `adapted_linear_forward` for ``dy``, (..., out), the gradient of y.

    As in `linear_backward`, where dy is cut to the adapter's rows, the adapters' shares of dx are added up,
    and the gradient of a bias of ``lora_B`` is ``scaling * sum dy``. dbias is the gradient of the layer's own
    bias.

    Arguments, dtypes and errors as in `adapted_linear_forward`.
    """
    check_linear(x, W0.T if fan_in_fan_out else W0, adapters, dy=dy)
    return layer_gradients(*backward(dy, x, W0.T if fan_in_fan_out else W0, adapters))


def check_linear(
    x: Array, W0: Array, adapters: Sequence[LowRank], *, bias: Array | None = None, dy: Array | None = None
) -> None:
    """Check shapes and dtypes of a linear layer's tensors, W0 as (out, in)."""
    check_linear_shapes(x, W0, adapters, bias=bias, dy=dy)
    check_dtypes(x=x, W0=W0, **adapter_tensors(adapters), bias=bias, dy=dy)


def adapter_tensors(adapters: Sequence[LowRank]) -> dict[str, Array | None]:
    """Return the adapters' tensors under the names that errors call them."""
    tensors: dict[str, Array | None] = {}
    for number, adapter in enumerate(adapters):
        suffix = adapter_suffix(number, adapters)
        own = {"A": adapter.A, "B": adapter.B, "dropout": adapter.dropout, "bias of lora_B": adapter.bias}
        tensors |= {f"{name}{suffix}": tensor for name, tensor in own.items()}
    return tensors


class AdapterTerms(NamedTuple):
    """Gradients of one adapter, and its share of the gradient of the layer's input."""

    dx: Operand
    dA: Operand  # noqa: N815
    dB: Operand  # noqa: N815
    dbias: Operand


class LinearTerms(NamedTuple):
    """Gradients of a linear layer, as arrays or as magnitudes."""

    dx: Operand
    dbias: Operand
    adapters: list[AdapterTerms]


def forward(x: Operand, W0: Operand, adapters: Sequence[LowRank], bias: Operand) -> Operand:
    """Evaluate `adapted_linear_forward` on operands of any kind, W0 as (out, in); nothing is checked."""
    y = product(x, W0.T)
    if bias is not None:
        y = y + bias
    for adapter in adapters:
        y = y + update(x, adapter, W0.shape[0])
    return y


def update(x: Operand, adapter: LowRank, out_features: int) -> Operand:
    """Return what the adapter adds to the output, (..., out_features)."""
    low = product(product(masked(x, adapter.dropout), adapter.A.T), adapter.B.T)
    if adapter.bias is not None:
        low = low + adapter.bias
    return place_rows(scale(low, adapter.scaling), adapter.rows, out_features)


def weight_update(adapter: LowRank, out_features: int) -> Operand:
    """Return ``scaling * B A``, (out_features, in), with zeros outside the adapter's rows."""
    delta = scale(product(adapter.B, adapter.A), adapter.scaling)
    return place_rows(delta.T, adapter.rows, out_features).T


def backward(dy: Operand, x: Operand, W0: Operand, adapters: Sequence[LowRank]) -> LinearTerms:
    """Evaluate `adapted_linear_backward` on operands of any kind, W0 as (out, in); nothing is checked."""
    terms = [update_backward(dy, x, adapter) for adapter in adapters]
    dx = product(dy, W0)
    for own in terms:
        dx = dx + own.dx
    return LinearTerms(dx, total(as_rows(dy)), terms)


def update_backward(dy: Operand, x: Operand, adapter: LowRank) -> AdapterTerms:
    """Return the gradients of `update`; dx is the adapter's share of the layer's."""
    if adapter.rows is not None:
        dy = dy[..., adapter.rows]
    dropped = masked(x, adapter.dropout)
    h = product(dropped, adapter.A.T)
    dh = scale(product(dy, adapter.B), adapter.scaling)
    rows_dy = as_rows(dy)
    return AdapterTerms(
        dx=masked(product(dh, adapter.A), adapter.dropout),
        dA=product(as_rows(dh).T, as_rows(dropped)),
        dB=scale(product(rows_dy.T, as_rows(h)), adapter.scaling),
        dbias=None if adapter.bias is None else scale(total(rows_dy), adapter.scaling),
    )


def layer_gradients(dx: Array, dbias: Array, adapters: Sequence[AdapterTerms]) -> LayerGradients:
    """Return the gradients as the public dataclass."""
    return LayerGradients(dx, dbias, tuple(LowRankGradients(own.dA, own.dB, own.dbias) for own in adapters))
