"""Where a difference arises: each fault that is put into a right graph is found where it was put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from architectures import CASES, make
from export_fixtures import make_adapter, make_model
from foreign_graphs import genai_export, torch_export

from loracle.export import export
from loracle.export.external import load_graph
from loracle.export.tasks import TASKS
from loracle.export.texts import Texts
from loracle.export.verification.first_difference_node import (
    FirstDifference,
    compared_with,
    first_difference,
    first_difference_node,
)
from loracle.export.verification.foreign_outputs import one_input, open_foreign
from loracle.export.verification.graph_paths import behind, between, described
from loracle.export.verification.graph_tensors import held_tensors
from loracle.export.verification.module_places import INPUT, OUTPUT, Gap, Place, _gap, module_places
from loracle.export.verification.module_values import Call, Expected, ModuleValues, module_values
from loracle.export.verification.truth import Float64Model
from loracle.export.verification.weight_matching import Match, Matches, match_weights
from loracle.export.verification.weight_products import uses_of
from loracle.files import Checkpoint, MergedWeights, read_adapter, write_merged_checkpoint
from loracle.files.json_file import read_json_object

TASK = {task.name: task for task in TASKS}
TEXTS = Texts(((3, 40, 41), (5, 9, 77, 30, 12, 201, 8)), ((0,) * 3, (0,) * 7))
LAYER = "model.layers.1"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
EXPORTERS = (
    "loracle",
    pytest.param("genai", marks=pytest.mark.slow),
    pytest.param("torch", marks=pytest.mark.slow),
)


class Bench:
    """A merged decoder, its right graphs, and what the unmerged model makes of one text."""

    def __init__(self, root: Path) -> None:
        self.root = root
        base = make_model(root / "base")
        make_adapter(root / "adapter", base, ALL)
        self.config = read_json_object(base / "config.json")
        self.adapter = read_adapter(root / "adapter")
        truth = Float64Model(base, self.adapter)
        self.feeds = {"input_ids": np.array([TEXTS.tokens[1]]), "attention_mask": np.ones((1, 7), np.int64)}
        self.modules = module_values(truth, self.feeds, np.dtype(np.float32))

    def graph(self, exporter: str) -> Path:
        """The file of a right graph, made once."""
        out = self.root / exporter
        if not out.exists():
            merged = self.root / "merged"
            if exporter == "loracle":
                export(self.root / "base", out, self.root / "adapter")
                return out / "model.onnx"
            if not merged.exists():
                write_merged_checkpoint(self.root / "base", self.root / "adapter", merged)
            (genai_export if exporter == "genai" else torch_export)(merged, out)
        return out / "model.onnx"

    def matches(self, model: ir.Model) -> Matches:
        with Checkpoint(self.root / "base") as checkpoint:
            return match_weights(model.graph, MergedWeights(checkpoint, self.adapter))

    def located(self, exporter: str, fault: Callable[[ir.Model, Matches], object]) -> FirstDifference | None:
        """What is found in a graph with a fault."""
        path = self.graph(exporter)
        model = load_graph(path)
        matches = self.matches(model)
        fault(model, matches)
        interface = open_foreign(path, TASK["text-generation"], self.config).interface
        return compared_with(self.modules, interface, model, matches, self.feeds, self.config)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("first"))


def nodes(model: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


def user(model: ir.Model, matches: Matches, module: str) -> ir.Node:
    """The node that uses a module's weight."""
    (match,) = matches.found[f"{module}.weight"]
    (use,) = uses_of(model.graph, held_tensors(model.graph)[match.initializer].value)
    return use.node


def constant(model: ir.Model, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def held(model: ir.Model, name: str) -> np.ndarray[Any, Any]:
    value = model.graph.initializers[name].const_value
    assert value is not None
    array: np.ndarray[Any, Any] = value.numpy().copy()
    return array


def without_delta(bench: Bench) -> Callable[[ir.Model, Matches], None]:
    def fault(model: ir.Model, matches: Matches) -> None:
        name = f"{LAYER}.self_attn.v_proj.weight"
        (match,) = matches.found[name]
        array = held(model, match.initializer)
        with Checkpoint(bench.root / "base") as checkpoint:
            match.view(array)[:] = checkpoint.tensor(name)
        model.graph.initializers[match.initializer].const_value = ir.tensor(array, name=match.initializer)

    return fault


def wrong_epsilon(model: ir.Model, matches: Matches) -> None:
    node = user(model, matches, f"{LAYER}.post_attention_layernorm")
    if "epsilon" in node.attributes:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
        return
    for kind in ("Mul", "Reciprocal", "Sqrt", "Add"):
        value = next(own for own in node.inputs if own.producer() and own.producer().op_type == kind)
        node = value.producer()
    node.replace_input_with(1, constant(model, "epsilon", np.float32(1e-3)))


def wrong_theta(model: ir.Model, matches: Matches) -> None:
    found = nodes(model, "GroupQueryAttention")
    if not found:
        name = next(name for name in model.graph.initializers if name.endswith("inv_freq"))
        model.graph.initializers[name].const_value = ir.tensor(held(model, name) * np.float32(0.9), name=name)
        return
    for place in (7, 8):
        name = str(found[0].inputs[place].name)
        model.graph.initializers[name].const_value = ir.tensor(held(model, name)[::-1].copy(), name=name)


def wrong_scale(model: ir.Model, matches: Matches) -> None:
    found = nodes(model, "GroupQueryAttention")
    if found:
        found[1].attributes["scale"] = ir.AttrFloat32("scale", 0.26)
        return
    node = nodes(model, "Softmax")[1]
    while node.op_type != "Mul":
        node = node.inputs[0].producer()
    node.replace_input_with(1, constant(model, "scale", np.float32(0.51)))


def narrow_cast(model: ir.Model, matches: Matches) -> None:
    node = user(model, matches, f"{LAYER}.mlp.down_proj")
    down = ir.node("Cast", [node.inputs[0]], {"to": int(ir.DataType.BFLOAT16)}, name="narrow")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="wide")
    down.outputs[0].name, up.outputs[0].name = "narrowed", "widened"
    model.graph.insert_before(node, [down, up])
    node.replace_input_with(0, up.outputs[0])


def dropped_residual(model: ir.Model, matches: Matches) -> None:
    node, o = (
        user(model, matches, f"{LAYER}.{own}") for own in ("post_attention_layernorm", "self_attn.o_proj")
    )
    if node.op_type == "Mul":
        (total,) = o.outputs[0].uses()
        total.node.outputs[0].replace_all_uses_with(o.outputs[0])
        return
    norm = ir.node("SimplifiedLayerNormalization", [o.outputs[0], node.inputs[2]], {"epsilon": 1e-6})
    norm.outputs[0].name = "normed"
    model.graph.insert_before(node, [norm])
    node.outputs[0].replace_all_uses_with(norm.outputs[0])
    node.outputs[3].replace_all_uses_with(o.outputs[0])
    model.graph.remove(node, safe=True)


def wrong_skip(model: ir.Model, matches: Matches) -> None:
    """The residual of another layer."""
    found = nodes(model, "SkipSimplifiedLayerNormalization")
    found[2].replace_input_with(0, found[1].inputs[0])


FAULTS: Mapping[str, tuple[Callable[[ir.Model, Matches], None], str, str]] = {
    "epsilon": (wrong_epsilon, "post_attention_layernorm", OUTPUT),
    "scale": (wrong_scale, "self_attn.o_proj", INPUT),
    "cast": (narrow_cast, "mlp.down_proj", INPUT),
    "residual": (dropped_residual, "post_attention_layernorm", INPUT),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_right_graph_has_no_difference_and_every_module_is_compared(bench: Bench, exporter: str) -> None:
    assert bench.located(exporter, lambda model, matches: None) is None
    model = load_graph(bench.graph(exporter))
    places = module_places(model.graph, bench.matches(model), bench.modules, bench.config)
    inputs = {place.module for place in places if place.side == INPUT}
    outputs = {place.module for place in places if place.side == OUTPUT}
    assert outputs == bench.modules.keys()
    assert inputs == bench.modules.keys() - {"model.embed_tokens"}
    assert len(places) == len(inputs) + len(outputs)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_weight_without_its_delta_is_found_beside_right_ones(bench: Bench, exporter: str) -> None:
    found = bench.located(exporter, without_delta(bench))
    assert found is not None
    assert (found.module, found.side) == (f"{LAYER}.self_attn.v_proj", OUTPUT)
    assert found.sources == (f"the output of {LAYER}.input_layernorm",)
    assert len(found.nodes) == 1
    assert "MatMul" in found.nodes[0]
    assert found.also == ()


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is(bench: Bench, exporter: str, fault: str) -> None:
    change, module, side = FAULTS[fault]
    found = bench.located(exporter, change)
    assert found is not None
    assert (found.module, found.side) == (f"{LAYER}.{module}", side)
    assert found.error > found.tolerance
    assert found.also == ()
    fused = exporter != "torch"
    named = " ".join(found.nodes)
    if fault == "residual":
        assert found.nodes == ()
        assert found.sources == (f"the output of {LAYER}.self_attn.o_proj",)
    elif fault == "cast":
        assert "Cast to bfloat16 narrow" in found.nodes
        assert {source.split(".")[-1] for source in found.sources} == {"gate_proj", "up_proj"}
    elif fault == "scale":
        assert all(f"{name}_proj" in "".join(found.sources) for name in "qkv")
        assert named.startswith("GroupQueryAttention") if fused else "Softmax" in named
    else:
        assert named.startswith("SkipSimplifiedLayerNormalization") if fused else "Sqrt" in named
        assert f"the output of {LAYER}.self_attn.o_proj" in found.sources or not fused


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_wrong_angles_are_found_in_the_first_attention(bench: Bench, exporter: str) -> None:
    found = bench.located(exporter, wrong_theta)
    assert found is not None
    assert (found.module, found.side) == ("model.layers.0.self_attn.o_proj", INPUT)
    assert found.nodes
    assert not any("MatMul_0" in node for node in found.nodes)


def test_a_wrong_residual_is_found_in_the_node_that_adds_it(bench: Bench) -> None:
    found = bench.located("loracle", wrong_skip)
    assert found is not None
    assert (found.module, found.side) == (f"{LAYER}.post_attention_layernorm", INPUT)
    assert found.nodes == ("SkipSimplifiedLayerNormalization SkipSimplifiedLayerNormalization_2",)


def test_it_is_said_in_one_line(bench: Bench) -> None:
    found = bench.located("loracle", wrong_scale)
    text = str(found)
    assert text.startswith(f"{LAYER}.self_attn.o_proj: its input is off by ")
    q, k, v = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
    assert text.endswith(
        f"though it is computed from what is right, the output of {q}, {k} and {v}: "
        "the fault is in GroupQueryAttention GroupQueryAttention_1"
    )


def test_the_words_for_each_kind_of_fault() -> None:
    def said(side: str, sources: tuple[str, ...], own: tuple[str, ...], also: tuple[str, ...] = ()) -> str:
        return str(FirstDifference("m", side, 0.25, 1e-5, sources, own, also, 9))

    off = "m: its output is off by 0.25 (tolerance 1e-05)"
    assert said(OUTPUT, (), ("Gather g",)) == f"{off}: the fault is in its weight or in Gather g"
    assert said(OUTPUT, ("a",), ("MatMul x", "Add y"), ("n", "k")) == (
        f"{off}, though it is computed from what is right, a: the fault is in its weight or in MatMul x and "
        "Add y; n and k alike"
    )
    assert said(INPUT, ("a", "b"), ()) == (
        "m: its input is off by 0.25 (tolerance 1e-05), though it is computed from what is right, a and b, "
        "and from nothing else: what should come between is missing"
    )
    many = (*(f"Mul {number}" for number in range(6)), "Add 6", "Cast to float16 7")
    assert said(INPUT, ("a",), many).endswith(
        "the fault is in one of 8 nodes from Mul 0 to Cast to float16 7: 6 Mul, Add, Cast to float16"
    )


def test_the_whole_way_from_files_and_texts(bench: Bench, tmp_path: Path) -> None:
    path = bench.graph("loracle")
    model = load_graph(path)
    arguments = (TASK["text-generation"], bench.root / "base", bench.adapter, bench.config, TEXTS)
    matches = bench.matches(model)
    assert first_difference_node(path, model, matches, *arguments) is None
    # The base alone is another model, from its first adapted layer on.
    other = (*arguments[:2], None, *arguments[3:])
    found = first_difference_node(path, model, matches, *other)
    assert found is not None
    assert (found.module, found.side) == ("model.layers.0.self_attn.q_proj", OUTPUT)
    interface = open_foreign(path, arguments[0], bench.config)
    assert one_input(interface, TEXTS, bench.config)["input_ids"].tolist() == [[5, 9, 77, 30, 12, 201, 8]]


EXPECTED = Expected(np.arange(12, dtype=np.float64).reshape(1, 3, 4), 0.5)


def test_values_are_compared_in_whatever_shape() -> None:
    exact = EXPECTED.exact
    assert _gap(exact + 0.25, exact) == 0.25
    assert _gap(exact.reshape(3, 4), exact) == 0.0
    assert _gap(exact[:, 2:] - 1, exact) == 1.0
    assert _gap(exact[:, 1:], exact) is None
    assert _gap(exact.reshape(1, 4, 3), exact) is None
    assert _gap(np.full((1, 3, 4), np.nan), exact) == np.inf
    heads = np.arange(24, dtype=np.float64).reshape(1, 2, 3, 4)
    assert _gap(heads.swapaxes(1, 2), heads) == 0.0
    assert _gap(np.float64(3), exact) is None
    assert Gap(0.0, 0.0).is_inside
    assert not Gap(1e-9, 0.0).is_inside
    assert Gap(2.0, 2.0).is_inside


def test_a_sum_columns_and_either_of_two_expected_values_are_compared() -> None:
    a, b = (ir.Value(name=name) for name in "ab")
    exact = EXPECTED.exact
    node = ir.node("MatMul", [a, b])
    got = {"a": (exact - 1).astype(np.float32), "b": np.ones((1, 3, 4), np.float32)}
    summed = Place("m", INPUT, node, ((a, b), (a,)), (EXPECTED,))
    assert summed.gaps(got) == {(a, b): Gap(0.0, 0.5), (a,): Gap(1.0, 0.5)}
    assert summed.gaps({"a": got["a"]}) == {(a,): Gap(1.0, 0.5)}
    either = Place("m", OUTPUT, node, ((a,),), (EXPECTED, Expected(exact - 1, 0.5)))
    assert either.gaps(got) == {(a,): Gap(0.0, 0.5)}
    packed = {"a": np.concatenate([exact + 9, exact, exact + 9], -1)}
    assert Place("m", OUTPUT, node, ((a,),), (EXPECTED,), (4, 8)).gaps(packed) == {(a,): Gap(0.0, 0.5)}


def chain() -> tuple[ir.Graph, dict[str, ir.Value]]:
    """x -> Relu r -> Mul m (with Cos c of y) -> Add n (with r) -> Neg z."""
    x, y = ir.Value(name="x"), ir.Value(name="y")
    r = ir.node("Relu", [x], name="r")
    c = ir.node("Cos", [y], name="c")
    m = ir.node("Mul", [r.outputs[0], c.outputs[0]], name="m")
    n = ir.node("Add", [m.outputs[0], r.outputs[0]], name="n")
    z = ir.node("Neg", [n.outputs[0]], name="z")
    own = [r, c, m, n, z]
    for node, name in zip(own, "rcmnz", strict=True):
        node.outputs[0].name = f"{name}_out"
    graph = ir.Graph([x, y], [z.outputs[0]], nodes=own, opset_imports={"": 20})
    return graph, {name: node.outputs[0] for node, name in zip(own, "rcmnz", strict=True)}


def test_the_nodes_between_right_values_and_a_wrong_one_leave_out_what_comes_from_inputs_alone() -> None:
    graph, values = chain()
    path = between(graph, [values["z"]], {values["r"]})
    assert [described(node) for node in path.nodes] == ["Mul m", "Add n", "Neg z"]
    assert path.sources == (values["r"],)
    assert between(graph, [values["m"]], {values["m"]}).nodes == ()
    everything = between(graph, [values["n"]], set())
    assert [node.name for node in everything.nodes] == ["r", "c", "m", "n"]
    assert everything.sources == ()


def test_only_the_first_place_outside_counts_and_others_that_do_not_follow_it_are_named() -> None:
    graph, values = chain()
    one = np.ones((1, 4))
    expected = (Expected(one, 0.1),)

    def place(module: str, side: str, name: str) -> Place:
        return Place(module, side, values[name].producer(), ((values[name],),), expected)

    places = [
        place("a", OUTPUT, "r"),
        place("b", INPUT, "r"),
        place("b", OUTPUT, "m"),
        place("d", INPUT, "r"),
        place("d", OUTPUT, "n"),
        place("e", INPUT, "n"),
        place("e", OUTPUT, "z"),
    ]
    got = {"r_out": one, "m_out": one + 1, "n_out": one + 2, "z_out": one + 3}
    found = first_difference(graph, places, got)
    # What is computed from the first is no news.
    assert found == FirstDifference("b", OUTPUT, 1.0, 0.1, ("the output of a",), ("Mul m",), (), 7)
    apart = [*places, place("f", INPUT, "r"), place("f", OUTPUT, "c")]
    found = first_difference(graph, apart, {**got, "c_out": one + 1})
    assert found is not None
    assert (found.module, found.also) == ("b", ("f",))
    assert behind(graph, [values["m"]]) == {values["n"].producer(), values["z"].producer()}
    assert first_difference(graph, places, dict.fromkeys(got, one)) is None
    assert first_difference(graph, places, {}) is None


def test_a_sum_that_is_wrong_is_laid_to_the_node_that_adds_and_the_nearest_output_is_told() -> None:
    graph, values = chain()
    one = np.ones((1, 4))
    r, c, m, n = (values[name] for name in "rcmn")
    node = n.producer()
    places = [
        Place("a", OUTPUT, r.producer(), ((r,),), (Expected(one, 0.1),)),
        Place("b", OUTPUT, c.producer(), ((c,),), (Expected(one, 0.1),)),
        Place("d", INPUT, node, ((r, c),), (Expected(one, 0.1),)),
    ]
    found = first_difference(graph, places, {"r_out": one, "c_out": one})
    assert found == FirstDifference(
        "d", INPUT, 1.0, 0.1, ("the output of a", "the output of b"), ("Add n",), (), 3
    )
    two = Place("e", OUTPUT, node, ((m,), (n,)), (Expected(one, 0.1),))
    found = first_difference(graph, [two], {"m_out": one + 3, "n_out": one + 2})
    assert found is not None
    assert (found.error, found.nodes[-1]) == (2.0, "Add n")


def test_a_norm_of_single_operators_is_of_the_last_value_that_two_of_them_read() -> None:
    a, b = (ir.node("Relu", [ir.Value(name=name)]) for name in "ab")
    x = ir.node("Add", [a.outputs[0], b.outputs[0]])
    square = ir.node("Mul", [x.outputs[0], x.outputs[0]])
    root = ir.node("Sqrt", [square.outputs[0]])
    centred = ir.node("Sub", [x.outputs[0], root.outputs[0]])
    divided = ir.node("Div", [centred.outputs[0], ir.node("Sqrt", [centred.outputs[0]]).outputs[0]])
    tensor = ir.tensor(np.ones(4, np.float32), name="w")
    weight = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    scaled = ir.node("Mul", [weight, divided.outputs[0]])
    graph = ir.Graph([], [scaled.outputs[0]], nodes=[scaled], initializers=[weight], opset_imports={"": 20})
    (use,) = uses_of(graph, weight)
    assert use.inputs[0] == (x.outputs[0],)
    assert {terms[0] for terms in use.inputs} >= {divided.outputs[0], centred.outputs[0], a.outputs[0]}
    assert use.adds_bias


class _Drawn:
    """A model of an embedding and a layer that share their weight; each evaluation is as many layers' calls
    as `calls` says, of an input shifted by `shifts`."""

    def __init__(self, shifts: list[float], calls: list[int]) -> None:
        self.module = torch.nn.Module()
        self.module.embed = torch.nn.Embedding(5, 4, dtype=torch.float64)
        self.module.head = torch.nn.Linear(4, 5, bias=False, dtype=torch.float64)
        self.module.head.weight = self.module.embed.weight
        self.steps = list(zip(shifts, calls, strict=True))

    def draws(self, feeds: Any, dtype: Any, *, watching: Any, **_: Any) -> Iterator[None]:
        for shift, calls in self.steps:
            with watching(), torch.no_grad():
                for _ in range(calls):
                    self.module.head(self.module.embed(torch.tensor([[1, 2]])) + shift)
            yield


def test_tolerances_are_the_largest_deviations_either_way_and_at_least_a_values_own_rounding() -> None:
    drawn: Any = _Drawn([0.0, 0.5, -2.0], [1, 1, 1])
    found = module_values(drawn, {}, np.dtype(np.float32))
    assert found["embed"].weights == found["head"].weights == ("embed.weight", "head.weight")
    assert (found["embed"].looks_up, found["head"].looks_up) == (True, False)
    (call,) = found["head"].calls
    assert call.given is not None
    assert call.given.tolerance == pytest.approx(4.0)
    (call,) = found["embed"].calls
    assert call.given is None
    largest = np.abs(call.returned.exact).max()
    # Rounded when it is stored, and a sum of four.
    assert call.returned.tolerance == 2 * 3 * 2.0**-24 * largest


def test_a_module_that_is_called_otherwise_under_noise_does_not_count() -> None:
    drawn: Any = _Drawn([0.0, 0.0], [1, 2])
    assert module_values(drawn, {}, np.dtype(np.float32)) == {}


def test_each_module_of_a_tied_weight_has_its_own_place() -> None:
    tensor = ir.tensor(np.ones((5, 4), np.float32), name="w")
    weight = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    ids = ir.Value(name="ids")
    rows = ir.node("Gather", [weight, ids])
    product = ir.node("FusedMatMul", [rows.outputs[0], weight], {"transB": 1}, domain="com.microsoft")
    nodes = [rows, product]
    graph = ir.Graph([ids], [product.outputs[0]], nodes=nodes, initializers=[weight], opset_imports={"": 20})
    names = ("embed.weight", "head.weight")
    modules = {
        "embed": ModuleValues("embed", names, True, None, (Call(None, EXPECTED),)),
        "head": ModuleValues("head", names, False, None, (Call(EXPECTED, EXPECTED),)),
    }
    for held_as in names:
        matches = Matches({held_as: (Match(held_as, "w", "by name", False, None),)}, (), (), ())
        found = module_places(graph, matches, modules, {})
        assert [(place.module, place.side, place.node) for place in found] == [
            ("embed", OUTPUT, rows),
            ("head", INPUT, product),
            ("head", OUTPUT, product),
        ]


def test_a_module_counts_where_its_weight_is_used_as_often_as_it_is_called() -> None:
    x = ir.Value(name="x")
    tensor = ir.tensor(np.ones((4, 4), np.float32), name="w")
    weight = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    first = ir.node("MatMul", [x, weight])
    second = ir.node("MatMul", [first.outputs[0], weight])
    graph = ir.Graph(
        [x], [second.outputs[0]], nodes=[first, second], initializers=[weight], opset_imports={"": 20}
    )
    matches = Matches({"m.weight": (Match("m.weight", "w", "by name", False, None),)}, (), (), ())
    calls = tuple(Call(EXPECTED, Expected(EXPECTED.exact + number, 0.5)) for number in range(2))

    def places(count: int) -> list[Place]:
        module = ModuleValues("m", ("m.weight",), False, None, calls[:count])
        return module_places(graph, matches, {"m": module}, {"model_type": "llama"})

    assert [(place.node, place.side) for place in places(2)] == [
        (first, INPUT),
        (first, OUTPUT),
        (second, INPUT),
        (second, OUTPUT),
    ]
    assert places(2)[3].expected == (calls[1].returned,)
    assert places(1) == []


def test_a_bias_may_be_added_later() -> None:
    """Where the product's graph adds none, the module's output without it is right too."""
    module = ModuleValues("m", ("m.weight",), False, np.ones(4), (Call(EXPECTED, EXPECTED),))
    matches = Matches({"m.weight": (Match("m.weight", "w", "by name", False, None),)}, (), (), ())
    for adds, count in ((False, 2), (True, 1)):
        x = ir.Value(name="x")
        tensors = [
            ir.tensor(np.ones(shape, np.float32), name=name) for name, shape in (("w", (4, 4)), ("b", (4,)))
        ]
        w, b = (
            ir.Value(name=own.name, type=ir.TensorType(own.dtype), shape=own.shape, const_value=own)
            for own in tensors
        )
        own = [ir.node("MatMul", [x, w])]
        if adds:
            own.append(ir.node("Add", [b, own[0].outputs[0]]))
        last = own[-1].outputs
        graph = ir.Graph([x], last, nodes=own, initializers=[w, b], opset_imports={"": 20})
        place = module_places(graph, matches, {"m": module}, {})[1]
        assert len(place.expected) == count
        assert np.array_equal(place.expected[-1].exact, EXPECTED.exact - (0 if adds else 1))
        assert [terms[0] for terms in place.values] == [node.outputs[0] for node in own]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "qwen2",
        "qwen3",
        "gemma2",
        "phi3",
        "gpt_neox",
        "opt",
        "bloom",
        "bert_sequence",
        "vit",
        "mixtral",
    ],
)
def test_right_graphs_of_other_architectures_have_no_difference(tmp_path: Path, name: str) -> None:
    from architecture_runs import make_adapter as make_any

    base = make(tmp_path / "base", name)
    make_any(base, name, tmp_path / "adapter")
    export(base, tmp_path / "onnx", tmp_path / "adapter")
    path, adapter = tmp_path / "onnx/model.onnx", read_adapter(tmp_path / "adapter")
    model = load_graph(path)
    with Checkpoint(base) as checkpoint:
        weights = MergedWeights(checkpoint, adapter)
        matches, config = match_weights(model.graph, weights), weights.config
    task = TASK[CASES[name].task]
    arguments = (path, model, matches, task, base)
    assert first_difference_node(*arguments, adapter, config, TEXTS) is None
    found = first_difference_node(*arguments, None, config, TEXTS)
    assert found is not None
    assert found.side == OUTPUT
