"""Tensors as NumPy arrays and back, bit for bit; NumPy's bfloat16 is ml_dtypes'."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def array_of(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's values as an array of the same dtype; on the CPU it shares the tensor's memory."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def tensor_of(array: NDArray[Any]) -> Tensor:
    """Return the array's values as a tensor of the same dtype; it shares a writable array's memory."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
