"""A model run wholly in float64, with the rounding noise of another precision on its products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from loracle.reference import TargetError

from .rounding_noise import RoundingNoise, product_of


class Float64Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every floating-point operator computes in float64, and products get noise.

    Casts to less than float64 and results asked for in less are float64 instead, so norms, softmax and
    routers that a model computes in float32 are computed in float64. The model's parameters must be float64,
    and torch's default dtype, which factories and quotients of integers take, too: see `in_float64`.

    Raises TargetError within it: an operator that returns less all the same, or writes to a narrower tensor,
    or, where there is noise, multiplies out of sight.

    Attributes:
        noise: what each product's result is changed by; None for nothing.
        silent: whether products have no noise for the time being.
    """

    def __init__(self, noise: RoundingNoise | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noise = noise
        self.silent = False
        self._suspended = False

    def suspend(self, suspended: bool) -> None:
        """Change nothing, and let torch's default dtype be float32, until this is called with False."""
        self._suspended = suspended
        torch.set_default_dtype(torch.float32 if suspended else torch.float64)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._suspended:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda tensor: _widened(tensor, func), (args, kwargs))
        if _is_narrow(kwargs.get("dtype")):
            kwargs = {**kwargs, "dtype": torch.float64}
        result = func(*args, **kwargs)
        tree_map_only(Tensor, lambda tensor: _check_wide(tensor, func), result)
        if self.noise is None or self.silent:
            return result
        product = product_of(func, args, kwargs)
        return result if product is None else result.add_(self.noise.draw(product, result))


def _is_narrow(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize < 8


def _widened(tensor: Tensor, func: Any) -> Tensor:
    """Return a constant that the model holds in less than float64 in float64; other tensors as they are."""
    if not _is_narrow(tensor.dtype):
        return tensor
    if func._schema.is_mutable:
        raise TargetError(
            f"{func}: expected to write to a float64 tensor, got {tensor.dtype}; such a model cannot be "
            "evaluated in float64"
        )
    return tensor.to(torch.float64)


def _check_wide(tensor: Tensor, func: Any) -> None:
    if _is_narrow(tensor.dtype):
        raise TargetError(
            f"{func}: expected a float64 result, got {tensor.dtype}; such a model cannot be evaluated in "
            "float64"
        )


def is_rotary(module: nn.Module) -> bool:
    """Whether a module computes the angles of rotary positions, which are defined in float32."""
    return type(module).__name__.endswith("RotaryEmbedding")


@contextmanager
def in_float64(model: nn.Module, noise: RoundingNoise | None) -> Iterator[Float64Mode]:
    """Within the block calls of the model compute in float64, without gradients; see `Float64Mode`.

    The angles of rotary positions are those that the model computes in float32, widened.

    Args:
        model: its parameters and buffers are float64.
        noise: what each product's result is changed by; None for nothing.
    """
    mode = Float64Mode(noise)
    hooks = []
    for module in model.modules():
        if is_rotary(module):
            hooks.append(module.register_forward_pre_hook(_suspending(mode)))
            hooks.append(module.register_forward_hook(_resuming(mode)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # In inference mode `linear` and its like would come here whole, products unseen.
        with torch.inference_mode(False), torch.no_grad(), mode:
            yield mode
    finally:
        torch.set_default_dtype(default)
        for hook in hooks:
            hook.remove()


def _suspending(mode: Float64Mode) -> Callable[..., None]:
    return lambda module, inputs: mode.suspend(True)


def _resuming(mode: Float64Mode) -> Callable[..., Any]:
    def widen(module: nn.Module, inputs: Any, output: Any) -> Any:
        mode.suspend(False)
        return tree_map_only(Tensor, lambda tensor: tensor.double(), output)

    return widen
