"""Linear layers whose weights are quantised: which they are, and the numbers that they stand for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Dequantize = Callable[[nn.Module], Tensor]
"""Returns the weight (out, in) that a module of a kind multiplies by, in a floating-point dtype."""


def _of_4bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    # On the CPU an evaluation may have packed it for that processor; a state dict has it in the plain form.
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        module.state_dict()
    dequantized: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return dequantized


def _of_8bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: Any = module.weight
    state = module.state
    if weight.dtype is not torch.int8:
        whole: Tensor = weight.detach()
        return whole
    scales = getattr(weight, "SCB", None)
    scales = getattr(state, "SCB", None) if scales is None else scales
    dequantized: Tensor = int8_vectorwise_dequant(weight.data, scales)
    return dequantized


_BITSANDBYTES: dict[str, Dequantize] = {"Linear4bit": _of_4bit, "Linear8bitLt": _of_8bit}
_REGISTERED: dict[type[nn.Module], Dequantize] = {}


def register_quantized(kind: type[nn.Module], dequantize: Dequantize) -> None:
    """Let modules of a class count as quantised linear layers; those of bitsandbytes do already.

    Args:
        kind: with ``in_features``, ``out_features`` and a forward that is differentiable in its input.
        dequantize: see `Dequantize`; called with such a module.
    """
    _REGISTERED[kind] = dequantize


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose weight is quantised."""
    return _dequantize_of(module) is not None


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight (out, in) that a quantised module multiplies by, as its library dequantises it."""
    dequantize = _dequantize_of(module)
    assert dequantize is not None
    return dequantize(module).detach()


def _dequantize_of(module: nn.Module) -> Dequantize | None:
    for kind in type(module).__mro__:
        if kind in _REGISTERED:
            return _REGISTERED[kind]
        # Known by name, so that the library is imported by those alone who have such a module.
        if kind.__module__.startswith("bitsandbytes.") and kind.__name__ in _BITSANDBYTES:
            return _BITSANDBYTES[kind.__name__]
    return None
