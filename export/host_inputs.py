"""Inputs that are written on the host anew for every step of a session."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from .providers import CPU

Array = np.ndarray[Any, Any]


class HostInputs:
    """Arrays of the host that are bound once and read in every run.

    On the CPU onnxruntime reads the arrays themselves. Elsewhere binding an array takes new memory of the
    device and copies; so memory is bound that stays, and `send` copies into it.

    Args:
        device: onnxruntime's name of where the session runs.
        copied: whether the session reads copies; None where it does not run on the CPU.
    """

    def __init__(self, device: str, *, copied: bool | None = None) -> None:
        self._device = device
        self._copied = device != CPU if copied is None else copied
        self._bound: dict[str, tuple[Array, onnxruntime.OrtValue]] = {}

    def bind(self, binding: onnxruntime.IOBinding, name: str, array: Array) -> None:
        """Let runs of a binding read a C-contiguous array, as it is then or after the next `send`.

        The caller keeps the array, and changes what is in it.
        """
        if not self._copied:
            binding.bind_cpu_input(name, array)
            return
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, self._device, 0)
        self._bound[name] = (array, value)
        binding.bind_ortvalue_input(name, value)

    def send(self) -> None:
        """Copy what the arrays hold now to where runs read it."""
        for array, value in self._bound.values():
            value.update_inplace(array)
