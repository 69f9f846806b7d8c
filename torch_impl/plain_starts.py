"""Where an update starts whose weight is not one matrix: PEFT's ``init_lora_weights``, but for some."""

import torch
from torch import Tensor

from loracle.reference import ConfigError

from .starts import drawn_
from .update import LoraUpdate, UpdateOptions, adapter_dtype


def plain_update(
    W0: Tensor,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    options: UpdateOptions,
    generator: torch.Generator | None,
    kind: str,
    *,
    lora_bias: Tensor | None = None,
) -> LoraUpdate:
    """Return a new update with factors of the given shapes, on the weight's device.

    ``init_lora_weights`` True, False and "gaussian" draw from torch's generator what PEFT draws.

    Args:
        W0: read for its dtype and device alone.
        shapes: of lora_A and lora_B.
        options: rank and start.
        generator: where numbers are drawn from; torch's global one when None.
        kind: of layer, for error messages.
        lora_bias: as in `LoraUpdate`.

    Raises:
        ConfigError: another start.
    """
    # Drawn on the CPU so that a seed means the same on every device.
    A, B = (torch.zeros(shape, dtype=adapter_dtype(W0)) for shape in shapes)
    if not drawn_(A, B, options, generator):
        raise ConfigError(
            f"init_lora_weights: expected True, False or 'gaussian' for a {kind}, got {options.init!r}; "
            "choose one of them, or leave the layer out of the targets"
        )
    return LoraUpdate(options, A.to(W0.device), B.to(W0.device), lora_bias)
