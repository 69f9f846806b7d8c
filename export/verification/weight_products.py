"""Where anybody's graph multiplies by a weight, looks it up or scales by it; and in which dtype."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph_tensors import constant_behind
from .one_weight import coarser

#: What a weight passes through on its way to where it is used, unchanged but for layout and dtype.
_THROUGH = frozenset({"Transpose", "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"})
_PRODUCTS = {"MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "Conv": 1}
"""Operators whose first input is multiplied by a weight, and where the weight stands."""
_NORMS = {"LayerNormalization": 1, "SimplifiedLayerNormalization": 1, "RMSNormalization": 1}
_SKIP_NORMS = {"SkipLayerNormalization": 2, "SkipSimplifiedLayerNormalization": 2}
"""Norms of the sum of their first two inputs; their fourth output is that sum."""
_SKIP_SUM = 3
_STATISTICS = frozenset(
    {"Add", "Cast", "Div", "Identity", "Mul", "Pow", "Reciprocal", "ReduceMean", "Rsqrt", "Sqrt", "Sub"}
)
"""What a norm is made of where it is no operator of its own."""
_DEEPEST = 10
_QUANTIZED = frozenset(
    {
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulFpQ4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearMatMul",
    }
)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Terms = tuple[ir.Value, ...]
"""Values whose sum is meant."""


@dataclass(frozen=True)
class Use:
    """A node that uses a weight.

    Attributes:
        node: it.
        looked_up: whether rows of the weight are looked up.
        inputs: what may be the input of the weight's module; empty where it is no number that is computed.
        outputs: what may be its output.
        adds_bias: whether the last of `outputs` has something constant added.
    """

    node: ir.Node
    looked_up: bool
    inputs: tuple[Terms, ...]
    outputs: tuple[ir.Value, ...]
    adds_bias: bool


def uses_of(graph: ir.Graph, value: ir.Value) -> list[Use]:
    """The nodes of a graph that use a constant, where that is understood; none in the graphs of its nodes."""
    found = (_use(node, place) for node, place in _reached(value) if node.graph is graph)
    return [use for use in found if use is not None]


def multiplied_dtype(graph: ir.Graph, rounded_to: np.dtype[Any] | None = None) -> np.dtype[Any]:
    """The dtype of the products with most of the weights' entries: that in which the weight is stored or
    multiplied, whichever is narrower; float32 where no weight is found.

    A cast of a few weights does not change it.

    Args:
        rounded_to: the dtype in which weights were merged that the graph holds in a wider one; None for none.
    """
    entries: Counter[np.dtype[Any]] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        place = _PRODUCTS.get(node.op_type)
        weight = None if place is None or len(node.inputs) <= place else node.inputs[place]
        dtypes = []
        while weight is not None:
            if weight.dtype in _FLOATS:
                dtypes.append(weight.dtype.numpy())
            producer = weight.producer()
            if producer is None or producer.op_type not in _THROUGH:
                break
            weight = producer.inputs[0]
        if weight is not None and weight.is_initializer() and weight.shape is not None and dtypes:
            widths = [length for length in weight.shape if isinstance(length, int)]
            entries[reduce(coarser, dtypes)] += math.prod(widths)
    found = entries.most_common(1)[0][0] if entries else np.dtype(np.float32)
    return found if rounded_to is None else coarser(found, rounded_to)


def is_quantized(graph: ir.Graph) -> bool:
    """Whether a graph multiplies by the codes of weights."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type in _QUANTIZED:
            return True
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            codes = node.inputs[0]
            if codes.is_initializer() and codes.shape is not None and len(codes.shape) > 1:
                return True
    return False


def _reached(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that a weight reaches, itself or in another layout, with something constant added; and where
    it stands among their inputs."""
    for use in value.uses():
        node, place = use.node, use.idx
        through = node.op_type in _THROUGH and place == 0
        # Gemma's norms scale by 1 + weight.
        if not through and node.op_type == "Add" and len(node.inputs) == 2:
            other = node.inputs[1 - place]
            through = constant_behind(other) is not None
        if through:
            yield from _reached(node.outputs[0])
        else:
            yield node, place


def _use(node: ir.Node, place: int) -> Use | None:
    kind, inputs = node.op_type, node.inputs
    if _PRODUCTS.get(kind) == place or _NORMS.get(kind) == place:
        source = inputs[0]
        given: tuple[Terms, ...] = () if source is None else ((source,),)
        has_bias = kind in ("Gemm", "Conv") and len(inputs) > 2
        return _followed(node, given, adds_bias=has_bias or kind in _NORMS)
    if _SKIP_NORMS.get(kind) == place:
        return _followed(node, _skipped(node), adds_bias=True)
    if kind == "Gather" and place == 0:
        return _followed(node, (), looked_up=True, adds_bias=True)
    if kind == "Mul" and len(inputs) == 2:
        source = inputs[1 - place]
        return None if source is None else _followed(node, _statistics(source), adds_bias=True)
    return None


def _skipped(node: ir.Node) -> tuple[Terms, ...]:
    """What a norm is of that adds its inputs: that sum, where the graph has it; else its terms."""
    terms = tuple(value for value in node.inputs[:2] if value is not None)
    bias = node.inputs[_bias_of(node)] if len(node.inputs) > _bias_of(node) else None
    terms += () if bias is None else (bias,)
    if len(node.outputs) > _SKIP_SUM and node.outputs[_SKIP_SUM].name:
        return ((node.outputs[_SKIP_SUM],),)
    return (terms,)


def _bias_of(node: ir.Node) -> int:
    """Where a norm that adds its inputs has what it adds besides."""
    return 4 if node.op_type == "SkipLayerNormalization" else 3


def _statistics(value: ir.Value) -> tuple[Terms, ...]:
    """What a norm may be of that is made of single operators: a value, or one that it is computed from by
    such operators alone. First the one that is most likely: the last that two of them read."""
    depths = {value: 0}
    readers: dict[ir.Value, set[ir.Node]] = {value: set()}
    for own in (queue := [value]):
        node = own.producer()
        if node is None or node.op_type not in _STATISTICS or depths[own] == _DEEPEST:
            continue
        for other in node.inputs:
            if other is not None and other.producer() is not None:
                readers.setdefault(other, set()).add(node)
                if other not in depths:
                    depths[other] = depths[own] + 1
                    queue.append(other)
    twice = [own for own in queue if len(readers[own]) > 1]
    first = twice[-1] if twice else value
    return ((first,), *((own,) for own in queue if own is not first and own.producer() is not None))


def _followed(
    node: ir.Node, inputs: tuple[Terms, ...], *, looked_up: bool = False, adds_bias: bool = False
) -> Use:
    """A use whose output goes on: with a bias added, scaled, or in another layout."""
    outputs = [node.outputs[0]]
    while len(outputs[-1].uses()) == 1:
        (use,) = outputs[-1].uses()
        following = use.node
        if following.graph is not node.graph:
            break
        if following.op_type in ("Add", "Mul") and len(following.inputs) == 2:
            other = following.inputs[1 - use.idx]
            if constant_behind(other) is None:
                break
            adds_bias = adds_bias or following.op_type == "Add"
        elif following.op_type not in _THROUGH or use.idx != 0:
            break
        outputs.append(following.outputs[0])
    return Use(node, looked_up, inputs, tuple(outputs), adds_bias)
