"""Products packed into one, and sums joined to the norms of them: the same answers from fewer nodes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from architectures import make

from loracle.export.architecture import check_supported
from loracle.export.graphs import graph_template
from loracle.export.names import GRAPH_FILE
from loracle.export.options import GraphOptions
from loracle.export.pack import packed_name
from loracle.export.skips import join_sums, mark_sums
from loracle.export.write import write_models
from loracle.files import Checkpoint, MergedWeights

FLOAT = ir.DataType.FLOAT
WIDTH, ROWS = 8, 3
BIAS = np.arange(WIDTH) - 2


def written(folder: Path, out: Path, **options: Any) -> Path:
    """A model exported with these options of its graph."""
    out.mkdir()
    with Checkpoint(folder) as checkpoint:
        weights = MergedWeights(checkpoint)
        task = check_supported(weights.config, "config.json")
        template = graph_template(checkpoint, weights.config, task, GraphOptions(**options))
        write_models({GRAPH_FILE: template}, weights, out)
    return out / GRAPH_FILE


def answers(graph: Path) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options)
    feeds: dict[str, np.ndarray[Any, Any]] = {
        entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    feeds["input_ids"] = np.arange(3, 17).reshape(2, 7)
    feeds["attention_mask"] = np.ones((2, 7), np.int64)
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


def operators(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)


@pytest.mark.parametrize(("name", "biases"), [("llama", 0), ("qwen2", 6)])
def test_packed_products_give_the_bits_of_the_separate_ones(tmp_path: Path, name: str, biases: int) -> None:
    """Catches rows in a wrong order, and a bias that is lost or added twice."""
    model = make(tmp_path / "model", name)
    packed = written(model, tmp_path / "packed")
    separate = written(model, tmp_path / "separate", packed=False)
    for one, other in zip(answers(packed), answers(separate), strict=True):
        assert one.tobytes() == other.tobytes()
    fewer, more = operators(packed), operators(separate)
    assert more["FusedMatMul"] - fewer["FusedMatMul"] == 4, "two products less in each of two layers"
    assert more["Add"] - fewer["Add"] == biases * 2 // 3


def test_products_with_a_norm_after_them_stay_separate(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "qwen3")
    packed = written(model, tmp_path / "packed")
    separate = written(model, tmp_path / "separate", packed=False)
    assert operators(packed) == operators(separate)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.0.q.weight", "a.0.k.weight"), "a.0.q+k.weight"),
        (("q.weight", "b.v.weight"), "q+b.v.weight"),
        (("a.q", "a.v"), "a.q+v"),
    ],
)
def test_what_names_share_is_said_once(names: tuple[str, ...], expected: str) -> None:
    assert packed_name(names) == expected


def residual(
    *,
    other: tuple[int, ...] = (ROWS, WIDTH),
    early: bool = False,
    bias: bool = False,
    layer_norm: bool = False,
    twice: bool = False,
) -> ir.Model:
    """`total = x + 2 y [+ b]`, its norm, and `total * norm`; `early` reads the total before the norm, and
    `twice` has a second norm of it."""

    def value(name: str, shape: tuple[int, ...]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))

    def weight(name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        made = value(name, array.shape)
        made.const_value = ir.tensor(array.astype(np.float32), name=name)
        return made

    x, y = value("x", (ROWS, WIDTH)), value("y", other)
    one = np.eye(WIDTH)
    weights = [weight("first", one), weight("second", 2 * one), weight("scale", np.arange(WIDTH) - 3)]
    nodes = [ir.node("MatMul", [x, weights[0]]), ir.node("MatMul", [y, weights[1]])]
    left, right = nodes[0].outputs[0], nodes[1].outputs[0]
    left.shape, right.shape = ir.Shape((ROWS, WIDTH)), ir.Shape(other)
    if bias:
        weights.append(weight("bias", BIAS))
        nodes.append(ir.node("Add", [left, weights[-1]]))
        left = nodes[-1].outputs[0]
        left.shape = ir.Shape((ROWS, WIDTH))
    nodes.append(ir.node("Add", [left, right]))
    total = nodes[-1].outputs[0]
    total.shape = ir.Shape((ROWS, WIDTH))
    if early:
        nodes.append(ir.node("Neg", [total]))
    inputs = [total, weights[2]]
    if layer_norm:
        weights.append(weight("shift", np.arange(WIDTH) % 5 + 1))
        inputs.append(weights[-1])
    kind = "LayerNormalization" if layer_norm else "SimplifiedLayerNormalization"
    nodes.append(ir.node(kind, inputs, {"axis": -1, "epsilon": 7.0}))
    norm, other_factor = nodes[-1].outputs[0], nodes[-2].outputs[0] if early else total
    if twice:
        nodes.append(ir.node(kind, inputs, {"axis": -1, "epsilon": 7.0}))
        other_factor = nodes[-1].outputs[0]
    nodes.append(ir.node("Mul", [norm, other_factor]))
    result = nodes[-1].outputs[0]
    result.name, result.type, result.shape = "result", ir.TensorType(FLOAT), ir.Shape((ROWS, WIDTH))
    norm.name, norm.type, norm.shape = "norm", ir.TensorType(FLOAT), ir.Shape((ROWS, WIDTH))
    graph = ir.Graph(
        [x, y],
        [result, norm],
        nodes=nodes,
        initializers=weights,
        opset_imports={"": 20, "com.microsoft": 1},
        name="residual",
    )
    return ir.Model(graph, ir_version=10)


def outputs(model: ir.Model, *, bias: bool = False) -> list[np.ndarray[Any, Any]]:
    """What a model answers where its total is 3 or -3, as often: the root of 9 + 7 and all else is exact."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    rng = np.random.default_rng(0)
    total = np.stack([rng.permutation([3.0, -3.0] * (WIDTH // 2)) for _ in range(ROWS)])
    x = rng.integers(-3, 4, (ROWS, WIDTH))
    y = (total - x - (BIAS if bias else 0)) / 2
    feeds = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    result: list[np.ndarray[Any, Any]] = session.run(["result", "norm"], feeds)
    return result


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_sum_and_its_norm_become_one_operator(bias: bool, layer_norm: bool) -> None:
    """Catches a lost epsilon, shift or bias, and the sum taken for the norm."""
    plain = outputs(residual(bias=bias, layer_norm=layer_norm), bias=bias)
    model = residual(bias=bias, layer_norm=layer_norm)
    mark_sums(model.graph)
    join_sums(model.graph)
    joined = "SkipLayerNormalization" if layer_norm else "SkipSimplifiedLayerNormalization"
    expected = Counter({"MatMul": 2, joined: 1, "Mul": 1})
    if bias and not layer_norm:
        expected["Add"] = 1
    assert kinds(model) == expected
    for one, other in zip(outputs(model, bias=bias), plain, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_sum_of_unequal_shapes_stays_a_sum() -> None:
    model = residual(other=(1, WIDTH))
    mark_sums(model.graph)
    assert kinds(model) == kinds(residual(other=(1, WIDTH)))


def test_a_sum_that_is_read_before_its_norm_stays_a_sum() -> None:
    model = residual(early=True)
    mark_sums(model.graph)
    join_sums(model.graph)
    assert kinds(model) == kinds(residual(early=True))
    for one, other in zip(outputs(model), outputs(residual(early=True)), strict=True):
        assert one.tobytes() == other.tobytes()


def test_of_two_norms_of_a_sum_the_first_is_joined_and_the_other_reads_the_sum() -> None:
    """As in GPT-NeoX, whose last layer's sum has one norm and the others' two: all are marked alike."""
    model = residual(twice=True)
    mark_sums(model.graph)
    join_sums(model.graph)
    norms = {"SkipSimplifiedLayerNormalization": 1, "SimplifiedLayerNormalization": 1}
    assert kinds(model) == Counter({"MatMul": 2, "Mul": 1, **norms})
    for one, other in zip(outputs(model), outputs(residual(twice=True)), strict=True):
        assert one.tobytes() == other.tobytes()
