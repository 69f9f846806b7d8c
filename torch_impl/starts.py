"""Where a linear update starts: PEFT's ``init_lora_weights``."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from loracle.reference import adapter_start

from .arrays import array_of, tensor_of
from .update import TAKEN_FROM_W0, LoraUpdate, UpdateOptions, adapter_dtype


def linear_update(
    W0: Tensor,
    options: UpdateOptions,
    generator: torch.Generator | None,
    *,
    lora_bias: Tensor | None = None,
    lora_magnitude_vector: Tensor | None = None,
) -> LoraUpdate:
    """Return a new update of a weight (out, in), A (r, in) and B (out, r), on the weight's device.

    ``init_lora_weights`` True, False and "gaussian" draw from torch's generator what PEFT draws;
    "orthogonal", "pissa" and "olora" are `loracle.reference.adapter_start`'s. The last two start as a part
    of W0, which is left as it is: the update takes that part away instead, see `LoraUpdate`.

    Args:
        W0: (out, in), read for "pissa" and "olora" alone.
        options: rank, scaling and start.
        generator: where numbers are drawn from; torch's global one when None.
        lora_bias, lora_magnitude_vector: as in `LoraUpdate`.

    Raises:
        ConfigError: an unknown start, or a rank that it can't have.
        NonFiniteError: W0 holds NaN or infinity, where it is read.
    """
    out_features, in_features = W0.shape
    dtype, r, init = adapter_dtype(W0), options.r, options.init
    # Drawn on the CPU so that a seed means the same on every device.
    A, B = torch.empty(r, in_features, dtype=dtype), torch.zeros(out_features, r, dtype=dtype)
    start = None
    if not drawn_(A, B, options, generator):
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        array = array_of(W0)
        # Only the starts that are taken from W0 look at more than its shape.
        weight = array if init in TAKEN_FROM_W0 else np.broadcast_to(array.dtype.type(0), array.shape)
        drawn = adapter_start(
            init, weight, r, options.scaling, np.random.default_rng(seed), dtype=array_of(A).dtype
        )
        A, B = tensor_of(drawn.A), tensor_of(drawn.B)
        if init in TAKEN_FROM_W0:
            start = A.clone().to(W0.device), B.clone().to(W0.device)
    return LoraUpdate(
        options, A.to(W0.device), B.to(W0.device), lora_bias, lora_magnitude_vector, start=start
    )


def drawn_(A: Tensor, B: Tensor, options: UpdateOptions, generator: torch.Generator | None) -> bool:
    """Draw A, and B, which is of zeros, as PEFT does; return False, and draw nothing, for another start.

    True: A as `kaiming_` has it; False: B too; "gaussian": A normal of deviation 1 / r.
    """
    if isinstance(options.init, bool):
        kaiming_(A, generator)
        if not options.init:
            kaiming_(B, generator)
        return True
    if options.init == "gaussian":
        A.normal_(std=1 / options.r, generator=generator)
        return True
    return False


def kaiming_(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fill with PEFT's and loralib's start of lora_A, uniform in ``(-1, 1) / sqrt(fan_in)``."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
