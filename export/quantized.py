"""Weight-only quantisation of a model's graphs: products of integer codes in place of products of weights.

`MatMulNBits` multiplies by the codes of `block_codes.py` as they are. An embedding that is tied to a
quantised output layer is looked up in the same codes by `GatherBlockQuantized`. Other embeddings, norms,
biases, and a mixture's experts and router keep their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .block_codes import BLOCK, code_bits
from .recipes import QUANTITIES, RECIPES, ROWS, code_recipe
from .template import GraphTemplate, Made

_DOMAIN = "com.microsoft"
# A router chooses experts: a small error there is another answer.
_MIXTURE = "MoE"
# Activations are rounded to int8, 32 at a time, and summed as integers, on processors that have kernels for
# it: what onnxruntime-genai's builder asks for on a CPU. It is the fastest, and its error is measured.
_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class _Codes:
    """The codes, scales and zero points of a weight with `outputs` rows of `inputs` entries."""

    values: Sequence[ir.Value]
    bits: int
    outputs: int
    inputs: int

    @property
    def padded(self) -> int:
        """Entries of a row whose last block is full."""
        return -(-self.inputs // BLOCK) * BLOCK


def quantize_products(templates: Mapping[str, GraphTemplate], quantization: str) -> dict[str, GraphTemplate]:
    """Quantise every weight that is used by products, and by nothing else but lookups, in any of the graphs.

    Args:
        templates: the graphs of one model, by the names of their files; they are used up.
        quantization: "int8" or "int4".
    """
    bits = code_bits(quantization)
    chosen = _quantizable(templates)
    return {file: _quantized(template, chosen, bits) for file, template in templates.items()}


def _quantizable(templates: Mapping[str, GraphTemplate]) -> dict[str, bool]:
    """The names of the initializers to quantise, and whether their columns are what products sum over."""
    found: dict[str, set[str]] = {}
    for template in templates.values():
        for name in sorted(template.unbound):
            made = template.made.get(name)
            value = template.model.graph.initializers[name]
            whole = made is None or made.recipe == ROWS
            uses = found.setdefault(name, set())
            uses.update(_use(use.node, use.idx, value) if whole else "" for use in value.uses())
    return {
        name: "MatMul" in uses
        for name, uses in found.items()
        if uses in ({"FusedMatMul"}, {"FusedMatMul", "Gather"}, {"MatMul"})
    }


def _use(node: ir.Node, place: int, value: ir.Value) -> str:
    """The operator, where it multiplies by a matrix or looks its rows up; nothing for other uses."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if value.shape is None or len(value.shape) != 2 or any(u.node.op_type == _MIXTURE for u in _uses(node)):
        return ""
    known = {
        "FusedMatMul": (1, {"transB": 1}),
        "MatMul": (1, {}),
        "Gather": (0, {"axis": 0} if "axis" in attributes else {}),
    }
    return node.op_type if known.get(node.op_type) == (place, attributes) else ""


def _uses(node: ir.Node) -> list[ir.Usage]:
    return [use for result in node.outputs for use in result.uses()]


def _quantized(template: GraphTemplate, chosen: Mapping[str, bool], bits: int) -> GraphTemplate:
    graph = template.model.graph
    made = dict(template.made)
    shapes = dict(template.shapes)
    for name, columns in chosen.items():
        value = graph.initializers.get(name)
        if value is None:
            continue
        codes = _codes(graph, value, bits, columns, made, shapes)
        for use in list(value.uses()):
            if use.node.op_type == "Gather":
                _look_up(graph, use.node, codes)
            else:
                _multiply(graph, use.node, codes)
        del graph.initializers[name]
    template.model.opset_imports.setdefault(_DOMAIN, 1)
    return replace(template, made=made, shapes=shapes)


def _codes(
    graph: ir.Graph,
    value: ir.Value,
    bits: int,
    columns: bool,
    made: dict[str, Made],
    shapes: dict[str, tuple[int, ...]],
) -> _Codes:
    """Make three initializers of a weight, or of the rows of several; it stays in the graph."""
    name = str(value.name)
    assert value.shape is not None
    shape = tuple(int(size) for size in value.shape.numpy())
    sources = made.pop(name).sources if name in made else (name,)
    if sources == (name,):
        shapes[name] = shape
    held = []
    for quantity, suffix in zip(QUANTITIES, (f"Q{bits}", "scales", "zero_points"), strict=True):
        recipe = code_recipe(quantity, bits, columns=columns)
        scale = suffix == "scales"
        held.append(
            ir.Value(
                name=f"{name}_{suffix}",
                type=value.type if scale else ir.TensorType(ir.DataType.UINT8),
                shape=ir.Shape(RECIPES[recipe].shape([shapes[source] for source in sources])),
            )
        )
        graph.initializers.add(held[-1])
        made[f"{name}_{suffix}"] = Made(recipe, sources)
    outputs, inputs = shape[::-1] if columns else shape
    return _Codes(held, bits, outputs, inputs)


def _multiply(graph: ir.Graph, product: ir.Node, codes: _Codes) -> None:
    """Put `MatMulNBits` in the place of a product with a weight."""
    node = ir.node(
        "MatMulNBits",
        [product.inputs[0], *codes.values],
        {
            "K": codes.inputs,
            "N": codes.outputs,
            "bits": codes.bits,
            "block_size": BLOCK,
            "accuracy_level": _ACCURACY_LEVEL,
        },
        domain=_DOMAIN,
    )
    _exchange(graph, product, [node], codes.bits)


def _look_up(graph: ir.Graph, lookup: ir.Node, codes: _Codes) -> None:
    """Put `GatherBlockQuantized` in the place of a lookup of rows.

    It takes codes (outputs, bytes of a row), and answers with rows whose last block is full.
    """
    held, scales, zero_points = codes.values
    row = _constant(graph, f"{held.name}.shape", [codes.outputs, codes.padded * codes.bits // 8])
    rows = ir.node("Reshape", [held, row])
    rows.outputs[0].dtype = held.dtype
    gather = ir.node(
        "GatherBlockQuantized",
        [rows.outputs[0], lookup.inputs[1], scales, zero_points],
        {"bits": codes.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1},
        domain=_DOMAIN,
    )
    nodes = [rows, gather]
    if codes.padded != codes.inputs:
        ends = [
            _constant(graph, f"{held.name}.{end}", [at]) for end, at in (("start", 0), ("end", codes.inputs))
        ]
        axis = _constant(graph, f"{held.name}.axis", [-1])
        nodes.append(ir.node("Slice", [gather.outputs[0], *ends, axis]))
        gather.outputs[0].dtype = scales.dtype
    _exchange(graph, lookup, nodes, codes.bits)


def _exchange(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node], bits: int) -> None:
    """Put nodes in the place of one; the last has its result, and its name with `_Q` and the bits."""
    result, new = old.outputs[0], nodes[-1].outputs[0]
    for turn, node in enumerate(nodes):
        node.name = f"{old.name}_Q{bits}" + (f".{turn}" if node is not nodes[-1] else "")
        node.outputs[0].name = node.name
    new.type, new.shape, new.name = result.type, result.shape, result.name
    graph.insert_before(old, nodes)
    result.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.array(values, np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
