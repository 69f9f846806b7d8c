"""Ways to run a layer in torch, on the CPU and on CUDA, and what each of them computes in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from loracle.reference import Precision, unit_roundoff
from loracle.torch_impl.arrays import array_of, tensor_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Mode:
    """A way to run the layer: dtypes of base and adapter, autocast or not, and what that computes in."""

    base: Any
    adapter: Any
    autocast: bool
    computes: Any
    accumulates: Any
    tf32: bool = False

    @property
    def precision(self) -> Precision:
        """What the bounds are asked for."""
        return Precision(
            self.computes, accumulator=self.accumulates, multiplicands="tf32" if self.tf32 else None
        )


MODES = {
    "float64": Mode(np.float64, np.float64, False, np.float64, np.float64),
    "float64, adapter float32": Mode(np.float64, np.float32, False, np.float64, np.float64),
    "float32": Mode(np.float32, np.float32, False, np.float32, np.float32),
    "float16": Mode(np.float16, np.float32, False, np.float16, np.float32),
    "bfloat16": Mode(BFLOAT16, np.float32, False, BFLOAT16, np.float32),
    "bfloat16 throughout": Mode(BFLOAT16, BFLOAT16, False, BFLOAT16, np.float32),
    "autocast": Mode(np.float32, np.float32, True, BFLOAT16, np.float32),
    "autocast, base bfloat16": Mode(BFLOAT16, np.float32, True, BFLOAT16, np.float32),
    "autocast, float64": Mode(np.float64, np.float64, True, np.float64, np.float64),
}
CUDA_MODES = {**MODES, "tf32": Mode(np.float32, np.float32, False, np.float32, np.float32, tf32=True)}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Values for a test's ``device``."""

LAYER_MODES = [name for name in MODES if name not in ("bfloat16 throughout", "float64, adapter float32")]
"""The modes of a `LoraLayer`, whose adapters are float32 or wider."""


def cases(names: list[str] | None = None) -> list[Any]:
    """Values for a test's ``device`` and ``mode``: on the CPU those named, on CUDA with TF32 beside them."""
    names = list(MODES) if names is None else names
    cpu = [pytest.param("cpu", MODES[name], id=name) for name in names]
    cuda = [
        pytest.param("cuda", CUDA_MODES[name], id=f"cuda, {name}", marks=pytest.mark.gpu)
        for name in (*names, "tf32")
    ]
    return cpu + cuda


@contextmanager
def arithmetic(device: str, mode: Mode) -> Iterator[None]:
    """Let CUDA's products round as the mode says: sums in float32, multiplicands whole unless TF32."""
    if device == "cpu":
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    precision = matmul.fp32_precision
    try:
        for name in names:
            setattr(matmul, name, False)
        matmul.fp32_precision = "tf32" if mode.tf32 else "ieee"
        yield
    finally:
        matmul.fp32_precision = precision
        for name, value in before.items():
            setattr(matmul, name, value)


def autocast(device: str, mode: Mode) -> torch.autocast:
    """The mode's autocast, or none."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=mode.autocast)


def placed(array: Any, dtype: Any, device: str) -> Tensor:
    """The array's values as a tensor."""
    return tensor_of(np.asarray(array).astype(dtype)).to(device)


def exactly(tensor: Tensor) -> Any:
    """The tensor's numbers as fractions."""
    return np.vectorize(Fraction, otypes=[object])(array_of(tensor.detach().double()))


def wide(tensor: Tensor) -> Any:
    """The tensor's numbers in float64, exactly."""
    return array_of(tensor.detach()).astype(np.float64)


def assert_equal(got: Tensor, wanted: Any, name: object = "") -> None:
    """The same numbers, whatever the dtypes; +0 and -0 are one number."""
    assert np.array_equal(wide(got), np.asarray(wanted).astype(np.float64)), name


def assert_bounded(got: Tensor, wanted: Any, bound: Any, mode: Mode, name: object = "") -> None:
    """Within the bound of the exact values ``wanted``, fractions.

    A gradient is rounded once more where its parameter is of a narrower dtype than the products.
    """
    dtype = array_of(got.detach()).dtype
    if dtype.itemsize < np.dtype(mode.computes).itemsize:
        bound = bound + unit_roundoff(dtype) * (np.abs(wanted).astype(np.float64) + bound)
    error = np.abs(exactly(got) - wanted)
    assert (error <= bound).all(), f"{name}: {float((error - bound).max())} above the bound"


def finite(*tensors: Tensor) -> bool:
    """Whether nothing overflowed; float16 ends at 65504."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
