"""Where Triton's kernels run."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton(device: torch.device) -> bool:
    """Whether a tensor's device runs kernels of Triton: a GPU, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None
