"""Tensors as NumPy arrays and back, bit for bit; NumPy's bfloat16 is ml_dtypes'."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def array_of(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's values as an array of the same dtype; on the CPU it shares the tensor's memory.

    A sharded tensor is gathered, which all its processes have to do at once.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    tensor = tensor.cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def tensor_of(array: NDArray[Any]) -> Tensor:
    """Return the array's values as a tensor of the same dtype; it shares a writable array's memory."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # NumPy makes an axis for a single number
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def assign(tensor: Tensor, array: NDArray[Any], *, keep_dtype: bool = False) -> None:
    """Give a tensor of a model the array's values, on its device and sharded as it is.

    Args:
        tensor: changed in place.
        array: of its shape.
        keep_dtype: copy into the tensor; else it takes the dtype of the array, but no less than float32:
            adapters in half precision widen exactly, and float64 keeps its values.
    """
    values = array if keep_dtype else array.astype(np.promote_types(array.dtype, np.float32), copy=False)
    if isinstance(tensor, DTensor):
        full = tensor_of(values).to(dtype=tensor.dtype, device=tensor.device)
        tensor.data.copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements))
    elif keep_dtype:
        tensor.data.copy_(tensor_of(values))
    else:
        tensor.data = tensor_of(values.copy()).to(tensor.device)
