"""What the autograd functions of all kinds of layers have in common: their dtypes, and what they refuse."""

import torch
from torch import Tensor

from loracle.reference import ConfigError, DTypeError, ShapeError, TargetError


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that the products of a layer with input ``x`` are computed in.

    Under ``torch.autocast`` for x's device it is autocast's dtype (float64 stays, as autocast leaves it
    alone); elsewhere it is x's own.
    """
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def scaled(product: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``scaling * product`` in ``dtype``, multiplied in the wider dtype; ``product`` may be reused."""
    return product.to(torch.promote_types(product.dtype, dtype)).mul_(scaling).to(dtype)


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], W0: Tensor) -> None:
    """Check a tensor that is there for a layer's shape. Raises: ShapeError."""
    if tensor is not None and (tensor.dim() == 0 or tuple(tensor.shape) != shape):
        raise ShapeError(
            f"{name}: expected shape {shape} beside W0 of shape {tuple(W0.shape)}, "
            f"got {tuple(tensor.shape)}; give tensors of one layer"
        )


def check_dtype(x: Tensor, W0: Tensor) -> None:
    """Check that x has W0's dtype, where autocast does not give both one. Raises: DTypeError."""
    if W0.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise DTypeError(
            f"x: expected W0's {W0.dtype}, got {x.dtype}; cast one of them, or run under torch.autocast"
        )


def check_frozen(W0: Tensor) -> None:
    """Check that W0 wants no gradient, for it would get none. Raises: TargetError."""
    if W0.requires_grad:
        raise TargetError(
            "W0: expected a frozen weight, got requires_grad=True; "
            "LoRA gives it no gradient: call requires_grad_(False) on the base layer"
        )


def refuse_twice(what: str) -> None:
    """Refuse to be differentiated again, from within a backward pass: that has gradients on for it alone.

    Raises:
        ConfigError: it is called with ``create_graph``.
    """
    if torch.is_grad_enabled():
        raise ConfigError(f"create_graph: expected False, got True; {what} can be differentiated once only")
