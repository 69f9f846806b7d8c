"""Whether two graphs are the same, node for node; where not, the first difference in words."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph_tensors import readable


def _signature(value: ir.Value) -> str:
    shape = None if value.shape is None else [str(d) for d in value.shape]
    return f"{value.name}: {value.dtype} {shape}"


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _same_attribute(left: Any, right: Any) -> bool:
    if isinstance(left, ir.TensorProtocol) and isinstance(right, ir.TensorProtocol):
        return left.dtype == right.dtype and np.array_equal(left.numpy(), right.numpy())
    return type(left) is type(right) and bool(left == right)


def first_difference(candidate: ir.Model, expected: ir.Model, weights: frozenset[str]) -> str | None:
    """None where `candidate` is `expected` node for node, else one line that says where they part.

    Compared: operator sets, inputs and outputs with types and shapes, the initializers' names, types and
    shapes, the values of all initializers but `weights`, and every node in order: operator, domain,
    attributes and wiring. Names of values between nodes may differ; what they connect may not.
    """
    if dict(candidate.opset_imports) != dict(expected.opset_imports):
        return f"operator sets: expected {dict(expected.opset_imports)}, got {dict(candidate.opset_imports)}"
    if candidate.functions:
        return f"functions: expected none, got {next(iter(candidate.functions))}"
    return (
        _interface_difference(candidate.graph, expected.graph)
        or _initializer_difference(candidate.graph, expected.graph, weights)
        or node_difference(candidate.graph, expected.graph, _ends(expected.graph))
    )


def _interface_difference(candidate: ir.Graph, expected: ir.Graph) -> str | None:
    for kind, got, want in (
        ("input", candidate.inputs, expected.inputs),
        ("output", candidate.outputs, expected.outputs),
    ):
        for left, right in zip_longest(got, want):
            if left is None or right is None:
                return (
                    f"{kind} {(left or right).name}: "
                    f"{'added to' if right is None else 'missing from'} the candidate"
                )
            if _signature(left) != _signature(right):
                return f"{kind} {right.name}: expected {_signature(right)}, got {_signature(left)}"
    return None


def _initializer_difference(candidate: ir.Graph, expected: ir.Graph, weights: frozenset[str]) -> str | None:
    got, want = candidate.initializers, expected.initializers
    for name in [*want, *(name for name in got if name not in want)]:
        if name not in got or name not in want:
            return f"initializer {name}: {'added to' if name in got else 'missing from'} the candidate"
        left, right = got[name], want[name]
        if _signature(left) != _signature(right):
            return f"initializer {name}: expected {_signature(right)}, got {_signature(left)}"
        if name in weights:
            continue
        if left.const_value is None or right.const_value is None:
            return f"initializer {name}: expected a constant, got no value"
        if _bytes(name, left.const_value) != _bytes(name, right.const_value):
            return f"initializer {name}: its values differ"
    return None


def _bytes(name: str, tensor: ir.TensorProtocol) -> bytes:
    with readable(name, tensor):
        return bytes(tensor.tobytes())


def _ends(graph: ir.Graph) -> frozenset[str]:
    values = (*graph.inputs, *graph.initializers.values(), *graph.outputs)
    return frozenset(str(value.name) for value in values)


def node_difference(
    candidate: ir.Graph | ir.Function, expected: ir.Graph | ir.Function, outside: frozenset[str]
) -> str | None:
    """None where the nodes are the same in order: operators, attributes and wiring; else where they part.

    Names of values may differ, but for those of `outside`.
    """
    return _walk(candidate, expected, outside, {})


def _walk(
    candidate: ir.Graph | ir.Function,
    expected: ir.Graph | ir.Function,
    outside: frozenset[str],
    renamed: dict[str, str],
) -> str | None:
    """`renamed`: the candidate's name of a value -> the expected graph's."""

    def pair(left: ir.Value | None, right: ir.Value | None) -> bool:
        if left is None or right is None:
            return left is right
        name, want = str(left.name), str(right.name)
        if want in outside or name in outside:
            return name == want
        return renamed.setdefault(name, want) == want

    for index, (left, right) in enumerate(zip_longest(candidate, expected)):
        if left is None or right is None:
            node = left or right
            where = "added to" if right is None else "missing from"
            return f"node {index} {node.op_type}: {where} the candidate"
        here = f"node {index}"
        if (left.domain, left.op_type, left.overload) != (right.domain, right.op_type, right.overload):
            return f"{here}: expected {right.domain}::{right.op_type}, got {left.domain}::{left.op_type}"
        ours, theirs = _attributes(left), _attributes(right)
        for name in sorted(ours.keys() | theirs.keys()):
            graphs = ours.get(name), theirs.get(name)
            if all(isinstance(graph, ir.Graph) for graph in graphs):
                inside = _walk(*graphs, outside, dict(renamed))
                if inside is not None:
                    return f"{here} {right.op_type}: {name}: {inside}"
            elif name not in ours or name not in theirs or not _same_attribute(ours[name], theirs[name]):
                return (
                    f"{here} {right.op_type}: attribute {name}: "
                    f"expected {theirs.get(name)}, got {ours.get(name)}"
                )
        for kind, got, want in (
            ("input", left.inputs, right.inputs),
            ("output", left.outputs, right.outputs),
        ):
            if len(got) != len(want):
                return f"{here} {right.op_type}: expected {len(want)} {kind}s, got {len(got)}"
            for position, (one, other) in enumerate(zip(got, want, strict=True)):
                if not pair(one, other):
                    return (
                        f"{here} {right.op_type}: {kind} {position}: expected "
                        f"{other.name if other else 'none'}, got {one.name if one else 'none'}"
                    )
    for one, other in zip_longest(candidate.outputs, expected.outputs):
        if not pair(one, other):
            return f"output: expected {other.name if other else 'none'}, got {one.name if one else 'none'}"
    return None
