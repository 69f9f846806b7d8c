"""The weights that a graph holds as codes: their shapes, which is all that is said of them here."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from .content_signature import matrix_shape
from .graph_tensors import HeldTensor, constant_behind, held_tensors

_NUMBERS = (
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT2,
    ir.DataType.UINT2,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
    ir.DataType.FLOAT4E2M1,
)
_AXES = 2

Quantized = frozenset[tuple[int, int | None]]
"""(outputs, inputs) of weights that are held as codes; None where only the outputs are known."""


def quantized_shapes(graph: ir.Graph, held: Collection[HeldTensor]) -> Quantized:
    """Return the shapes of the weights in a graph's products and lookups of codes."""
    codes = {own.value: own for own in held if _are_codes(own)}
    found: set[tuple[int, int | None]] = set()
    for node in graph.all_nodes():
        outputs, inputs = (_integer(node, name) for name in ("N", "K"))
        for value in node.inputs:
            origin = constant_behind(value)
            if origin is None or origin not in codes:
                continue
            shape = codes[origin].shape
            if outputs and inputs:
                found.add((outputs, inputs))
            elif node.op_type == "QMoE":
                found.add((shape[1], None))
            elif node.op_type == "GatherBlockQuantized":
                found.add((shape[0], None))
            else:
                found.add(matrix_shape(shape))
    return frozenset(found)


def may_be_quantized(shape: tuple[int, ...], quantized: Quantized) -> bool:
    """Whether codes of one of the shapes may hold a weight: whole, or as some rows of several weights."""
    rows, columns = matrix_shape(shape)
    return any(
        (inputs is None and outputs == rows)
        or (inputs == columns and outputs >= rows)
        or (outputs, inputs) == (columns, rows)
        for outputs, inputs in quantized
    )  # fmt: skip


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else 0


def code_holders(graph: ir.Graph) -> frozenset[str]:
    """Return the names of all constants of the nodes that compute with codes."""
    held = {own.value: own for own in held_tensors(graph).values()}
    names: set[str] = set()
    for node in graph.all_nodes():
        constants = [held[origin] for origin in map(constant_behind, node.inputs) if origin in held]
        if any(_are_codes(own) for own in constants):
            names.update(own.name for own in constants)
    return frozenset(names)


def _are_codes(held: HeldTensor) -> bool:
    return held.tensor.dtype in _NUMBERS and len(held.shape) >= _AXES
