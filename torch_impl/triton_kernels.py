"""Where Triton's kernels run."""

from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor


@cache
def has_triton(device: torch.device) -> bool:
    """Whether a tensor's device runs kernels of Triton: a GPU, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def launching_at(tensor: Tensor) -> AbstractContextManager[Any]:
    """While it lasts the current device, on which Triton launches, is the tensor's."""
    context: AbstractContextManager[Any] = cast(Any, torch.cuda.device_of)(tensor)
    return context
