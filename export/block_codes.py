"""Weights as integers of 8 or 4 bits, with a scale and a zero point for each block of 32 entries of a row:

    W[n, k] = (codes[n, k] - zero_points[n, k // 32]) * scales[n, k // 32] + at most about half a scale

The numbers are onnxruntime's own: the functions behind `onnxruntime.quantization`'s `MatMulNBitsQuantizer`,
asymmetric, in the layout of `MatMulNBits`. A last block that is not full is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loracle.reference import ConfigError, NonFiniteError

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
# The transposed copy of a part of a weight that is worked on at a time.
_CHUNK_BYTES = 16 << 20


def code_bits(quantization: str) -> int:
    """Bits of a code. Raises ConfigError for a quantisation that there is not."""
    if quantization not in BITS:
        raise ConfigError(f"quantization: expected one of {', '.join(BITS)}, got {quantization!r}")
    return BITS[quantization]


def code_shapes(outputs: int, inputs: int, bits: int) -> tuple[Shape, Shape, Shape]:
    """The shapes of codes, scales and zero points of a weight with that many outputs and inputs."""
    blocks = -(-inputs // BLOCK)
    return (outputs, blocks, BLOCK * bits // 8), (outputs, blocks), (outputs, -(-blocks * bits // 8))


def block_codes(weights: Sequence[Array], names: Sequence[str], bits: int, *, columns: bool) -> list[Array]:
    """Quantise the rows of all weights, one after the other.

    Args:
        weights: each (out, in), or (in, out) where `columns`; float32 or float16, all of one `in`.
        names: of the weights, for errors.
        bits: 8 or 4.

    Returns:
        codes (out, blocks, 4 * bits) uint8, two codes of 4 bits a byte, the first in the lower half; scales
        (out, blocks) in the weights' dtype; zero points (out, blocks * bits / 8, rounded up) uint8.

    Raises:
        NonFiniteError: a weight holds NaN or an infinity, for which there is no code.
    """
    rows = [weight.T if columns else weight for weight in weights]
    inputs = rows[0].shape[1]
    shapes = code_shapes(sum(len(own) for own in rows), inputs, bits)
    codes, scales, zero_points = (
        np.zeros(shape, dtype)
        for shape, dtype in zip(shapes, (np.uint8, rows[0].dtype, np.uint8), strict=True)
    )
    start = 0
    for own, name in zip(rows, names, strict=True):
        out = slice(start, start + len(own))
        _quantize(own, name, bits, codes[out], scales[out], zero_points[out])
        start += len(own)
    return [codes, scales, zero_points]


def _quantize(rows: Array, name: str, bits: int, codes: Array, scales: Array, zero_points: Array) -> None:
    """Write the codes of rows (out, in) into arrays of theirs."""
    # Importing onnxruntime takes longer than exporting a small model without it.
    from onnxruntime.capi import _pybind_state

    quantize = {8: _pybind_state.quantize_matmul_8bits, 4: _pybind_state.quantize_matmul_4bits}[bits]
    outputs, inputs = rows.shape
    padded = codes.shape[1] * BLOCK
    step = max(1, _CHUNK_BYTES // (padded * rows.dtype.itemsize))
    for start in range(0, outputs, step):
        own = slice(start, min(start + step, outputs))
        chunk = np.zeros((padded, own.stop - start), rows.dtype)
        chunk[:inputs] = rows[own].T
        if not np.isfinite(chunk).all():
            column, row = np.argwhere(~np.isfinite(chunk))[0]
            raise NonFiniteError(
                f"{name}: expected finite numbers to quantise, got {chunk[column, row]} for output "
                f"{start + row} and input {column}; correct the weight, or export without quantization"
            )
        quantize(codes[own], chunk, scales[own], zero_points[own], BLOCK, own.stop - start, inputs, False)
