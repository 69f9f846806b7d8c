"""The shapes of a linear layer's tensors, checked in one place."""

from collections.abc import Sequence

from .errors import ConfigError, ShapeError
from .formats import Array
from .low_rank import LowRank


def check_linear_shapes(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    bias: Array | None = None,
    dy: Array | None = None,
) -> None:
    """Check x (..., in), W0 (out, in), A (r, in), B (rows, r), bias (out,), dropout (..., in), dy (..., out).

    Raises:
        ShapeError, ConfigError: naming the first tensor that does not fit, what was expected and what came.
    """
    if W0.ndim != 2:
        raise ShapeError(f"W0: expected (out, in), got {W0.shape}; pass the weight as a matrix")
    out_features, in_features = W0.shape
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ShapeError(
            f"x: expected (..., {in_features}) to fit W0 {W0.shape}, got {x.shape}; check its last axis"
        )
    for number, adapter in enumerate(adapters):
        check_adapter(adapter, (out_features, in_features), x.shape, adapter_suffix(number, adapters))
    expected = {"bias": (bias, (out_features,)), "dy": (dy, (*x.shape[:-1], out_features))}
    _check(expected, f"W0 {W0.shape} and x {x.shape}")


def check_adapter(
    adapter: LowRank, weight: tuple[int, int], dropout_shape: tuple[int, ...], suffix: str
) -> None:
    """Check one adapter against the shape (out, in) of the weight matrix that it updates.

    Raises:
        ShapeError, ConfigError: naming the tensor, what was expected and what came.
    """
    A, B = adapter.A, adapter.B
    out_features = rows_of(adapter, weight[0], suffix)
    if A.ndim != 2 or A.shape[1] != weight[1] or A.shape[0] < 1:
        raise ShapeError(
            f"A{suffix}: expected (r, {weight[1]}) to fit W0 {weight}, got {A.shape}; is it transposed?"
        )
    expected = {
        f"B{suffix}": (B, (out_features, A.shape[0])),
        f"bias of lora_B{suffix}": (adapter.bias, (out_features,)),
        f"dropout{suffix}": (adapter.dropout, dropout_shape),
    }
    _check(expected, f"W0 {weight} and A {A.shape}")


def rows_of(adapter: LowRank, out_features: int, suffix: str = "") -> int:
    """Return how many outputs the adapter updates.

    Raises:
        ConfigError: its rows are not a range of step 1 within the weight's.
    """
    if adapter.rows is None:
        return out_features
    start, stop = adapter.rows.start, adapter.rows.stop
    whole = isinstance(start, int) and isinstance(stop, int) and adapter.rows.step in (None, 1)
    if not whole or not 0 <= start <= stop <= out_features:
        raise ConfigError(
            f"rows{suffix}: expected a slice of step 1 within {out_features} outputs, got {adapter.rows}; "
            "name its start and stop"
        )
    return int(stop - start)


def adapter_suffix(number: int, adapters: Sequence[LowRank]) -> str:
    """Return what to add to a tensor's name so that it is plain which adapter's it is."""
    return f" of adapter {number}" if len(adapters) > 1 else ""


def _check(expected: dict[str, tuple[Array | None, tuple[int, ...]]], fit: str) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"{name}: expected {shape} to fit {fit}, got {tensor.shape}; check its axes")
