"""The shapes of a linear layer's tensors, checked in one place."""

from .errors import ShapeError
from .formats import Array


def check_linear_shapes(
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    *,
    bias: Array | None = None,
    dropout: Array | None = None,
    dy: Array | None = None,
) -> None:
    """Check x (..., in), W0 (out, in), A (r, in), B (out, r), bias (out,), dropout (..., in), dy (..., out).

    Raises:
        ShapeError: naming the first tensor that does not fit, what was expected and what came.
    """
    if W0.ndim != 2:
        raise ShapeError(f"W0: expected (out, in), got {W0.shape}; pass the weight as a matrix")
    out_features, in_features = W0.shape
    if A.ndim != 2 or A.shape[1] != in_features or A.shape[0] < 1:
        raise ShapeError(
            f"A: expected (r, {in_features}) to fit W0 {W0.shape}, got {A.shape}; is it transposed?"
        )
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ShapeError(
            f"x: expected (..., {in_features}) to fit W0 {W0.shape}, got {x.shape}; check its last axis"
        )
    expected = {
        "B": (B, (out_features, A.shape[0])),
        "bias": (bias, (out_features,)),
        "dropout": (dropout, x.shape),
        "dy": (dy, (*x.shape[:-1], out_features)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            fit = f"W0 {W0.shape}, A {A.shape} and x {x.shape}"
            raise ShapeError(f"{name}: expected {shape} to fit {fit}, got {tensor.shape}; check its axes")
