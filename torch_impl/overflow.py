"""Whether a merge can go wrong, found without merging: by the largest numbers in it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .device_factors import DeviceLowRank

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MARGIN = 1 + 2.0**-10
"""For the roundings of the bound, and that of the merged number, which may be up to the dtype's largest."""


def cannot_overflow(W0: Tensor, adapters: Sequence[DeviceLowRank]) -> bool:
    """Whether all numbers of a merge are finite, and no merged one can leave the range of W0's dtype.

    By Cauchy and Schwarz an entry of ``W0 + sum_g scaling_g B_g A_g`` is at most

        max |W0| + sum_g |scaling_g| max_i ||B_g[i]||_2 max_j ||A_g[:, j]||_2

    which one pass over W0 gives. False where that is too large proves nothing.

    Args:
        W0: (out, in) or (in, out); the answer is False for other dtypes than floats of 16 to 64 bits, for
            sharded tensors and for empty ones.
        adapters: their factors, of any device.
    """
    if W0.dtype not in _DTYPES or isinstance(W0, DTensor) or not W0.numel():
        return False
    bound = max(abs(float(end)) for end in W0.detach().aminmax())
    for adapter in adapters:
        rows = torch.linalg.vector_norm(adapter.B.detach().double(), dim=1)
        columns = torch.linalg.vector_norm(adapter.A.detach().double(), dim=0)
        bound += abs(adapter.scaling) * float(rows.amax()) * float(columns.amax())
    return bound * _MARGIN < torch.finfo(W0.dtype).max
