"""`first_difference` finds every kind of change to a graph, and none where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracle.export.verification.graph_diff import first_difference
from loracle.reference import FileError

WEIGHTS = frozenset({"w"})


def _graph() -> ir.Model:
    """y = relu(x w + 1) w, logits in a second output."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 3]))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 3]))
    one = ir.Value(
        name="one",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([1]),
        const_value=ir.tensor(np.ones(1, np.float32)),
    )
    first = ir.node("MatMul", [x, w])
    added = ir.node("Add", [first.outputs[0], one])
    second = ir.node("Softmax", [added.outputs[0]], {"axis": -1})
    third = ir.node("MatMul", [second.outputs[0], w])
    for i, node in enumerate((first, added, second, third)):
        node.outputs[0].name = f"v{i}"
        node.outputs[0].dtype = ir.DataType.FLOAT
    third.outputs[0].name = "logits"
    third.outputs[0].shape = ir.Shape(["n", 3])
    graph = ir.Graph([x], [third.outputs[0]], nodes=[first, added, second, third], initializers=[w, one])
    return ir.Model(graph, ir_version=10)


def _nodes(model: ir.Model) -> list[ir.Node]:
    return list(model.graph)


def _insert_identity(model: ir.Model) -> None:
    first = _nodes(model)[0]
    extra = ir.node("Identity", [first.outputs[0]])
    extra.outputs[0].name = "extra"
    first.outputs[0].replace_all_uses_with(extra.outputs[0])
    extra.replace_input_with(0, first.outputs[0])
    model.graph.insert_after(first, extra)


def _append_dead_node(model: ir.Model) -> None:
    extra = ir.node("Identity", [model.graph.inputs[0]])
    extra.outputs[0].name = "extra"
    model.graph.append(extra)


def _set(target: Callable[[ir.Model], object], attribute: str, value: object) -> Callable[[ir.Model], None]:
    return lambda model: setattr(target(model), attribute, value)


CHANGES: dict[str, tuple[Callable[[ir.Model], object], str]] = {
    "attribute value": (
        lambda m: _nodes(m)[2].attributes.__setitem__("axis", ir.AttrInt64("axis", 0)),
        "node 2 Softmax: attribute axis: expected -1, got 0",
    ),
    "attribute added": (
        lambda m: _nodes(m)[0].attributes.__setitem__("alpha", ir.AttrFloat32("alpha", 2.0)),
        "attribute alpha",
    ),
    "operator": (_set(lambda m: _nodes(m)[1], "op_type", "Sub"), "expected ::Add, got ::Sub"),
    "domain": (_set(lambda m: _nodes(m)[1], "domain", "com.microsoft"), "got com.microsoft::Add"),
    "node inserted": (_insert_identity, "node 1: expected ::Add, got ::Identity"),
    "node appended": (_append_dead_node, "node 4 Identity: added to the candidate"),
    "wiring": (
        lambda m: _nodes(m)[1].replace_input_with(0, m.graph.inputs[0]),
        "node 1 Add: input 0: expected v0, got x",
    ),
    "another value of the graph": (
        lambda m: _nodes(m)[3].replace_input_with(0, _nodes(m)[1].outputs[0]),
        "node 3 MatMul: input 0: expected v2, got v1",
    ),
    "constant": (
        lambda m: setattr(m.graph.initializers["one"], "const_value", ir.tensor(np.zeros(1, np.float32))),
        "initializer one: its values differ",
    ),
    "weight shape": (
        _set(lambda m: m.graph.initializers["w"], "shape", ir.Shape([3, 4])),
        "initializer w: expected",
    ),
    "weight type": (
        _set(lambda m: m.graph.initializers["w"], "dtype", ir.DataType.FLOAT16),
        "initializer w: expected",
    ),
    "weight missing": (lambda m: m.graph.initializers.pop("w"), "initializer w: missing from the candidate"),
    "initializer added": (
        lambda m: m.graph.register_initializer(
            ir.Value(name="A", shape=ir.Shape([1]), const_value=ir.tensor(np.ones(1, np.float32), name="A"))
        ),
        "initializer A: added to the candidate",
    ),
    "input shape": (
        _set(lambda m: m.graph.inputs[0], "shape", ir.Shape([1, 3])),
        "input x: expected",
    ),
    "output added": (lambda m: m.graph.outputs.append(_nodes(m)[0].outputs[0]), "output v0: added"),
    "operator set": (lambda m: m.graph.opset_imports.__setitem__("", 99), "operator sets"),
}


def test_a_graph_equals_itself_and_a_copy_with_other_inner_names() -> None:
    renamed = _graph()
    for i, node in enumerate(_nodes(renamed)[:-1]):
        node.outputs[0].name = f"another_{i}"
    renamed.graph.initializers["w"].const_value = ir.tensor(np.ones((3, 3), np.float32))
    assert first_difference(renamed, _graph(), WEIGHTS) is None


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found(change: str) -> None:
    apply, words = CHANGES[change]
    changed = _graph()
    apply(changed)
    difference = first_difference(changed, _graph(), WEIGHTS)
    assert difference is not None
    assert words in difference


def test_swapped_inner_values_are_found_though_names_may_differ() -> None:
    """Renaming is a bijection: two values of the candidate cannot stand for one."""

    def two_branches(swap: bool) -> ir.Model:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))
        left, right = ir.node("Exp", [x]), ir.node("Log", [x])
        left.outputs[0].name, right.outputs[0].name = "left", "right"
        pair = [left.outputs[0], right.outputs[0]]
        last = ir.node("Sub", pair[::-1] if swap else pair)
        last.outputs[0].name = "y"
        return ir.Model(ir.Graph([x], [last.outputs[0]], nodes=[left, right, last]), ir_version=10)

    assert first_difference(two_branches(False), two_branches(False), frozenset()) is None
    assert "Sub: input 0" in str(first_difference(two_branches(True), two_branches(False), frozenset()))


def _conditional(operator: str = "Exp", result: str = "inner", swap: bool = False) -> ir.Model:
    """y = op(x) or x, as x says; what the branches give can be exchanged."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))
    branches = []
    for name in ("then", "else"):
        inner = ir.node(operator if name == "then" else "Neg", [x])
        other = ir.node("Abs", [inner.outputs[0]])
        inner.outputs[0].name, other.outputs[0].name = f"{name} {result}", f"{name} other"
        last = inner if swap else other
        branches.append(ir.Graph([], [last.outputs[0]], nodes=[inner, other], name=name))
    node = ir.node("If", [x], {"then_branch": branches[0], "else_branch": branches[1]})
    node.outputs[0].name = "y"
    return ir.Model(ir.Graph([x], [node.outputs[0]], nodes=[node]), ir_version=10)


def test_graphs_in_nodes_are_compared_too() -> None:
    assert first_difference(_conditional(), _conditional(result="renamed"), frozenset()) is None
    assert first_difference(_conditional("Log"), _conditional(), frozenset()) == (
        "node 0 If: then_branch: node 0: expected ::Exp, got ::Log"
    )
    assert first_difference(_conditional(swap=True), _conditional(), frozenset()) == (
        "node 0 If: else_branch: output: expected else other, got else inner"
    )


def test_a_constant_whose_data_are_not_there_is_an_error(tmp_path: Path) -> None:
    def model() -> ir.Model:
        tensor = ir.ExternalTensor(
            "gone", 0, 8, ir.DataType.FLOAT, shape=ir.Shape([2]), name="far", base_dir=str(tmp_path)
        )
        value = ir.Value(name="far", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}, name="g")
        return ir.Model(graph, ir_version=10)

    with pytest.raises(FileError, match="far: expected a tensor of"):
        first_difference(model(), model(), frozenset())
