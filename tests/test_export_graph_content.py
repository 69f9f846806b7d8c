"""What a graph holds beside the model's products is found and counted, and nothing where there is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from matching_fixtures import Chain, Weights, matrices

from loracle.export.verification.graph_content import GraphContent, describe_graph
from loracle.export.verification.weight_matching import match_weights
from loracle.files import Adapter, LoraConfig

Array = np.ndarray[Any, Any]

LAYERS = 3
PATHS = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]
WEIGHTS = dict(zip([f"{path}.weight" for path in PATHS], matrices(LAYERS, (16, 16)), strict=True))
DOWN, UP = matrices(LAYERS, (2, 16), 1), matrices(LAYERS, (16, 2), 2)
ADAPTER = Adapter.from_arrays(
    LoraConfig(r=2, lora_alpha=6, target_modules=("q_proj",)),
    dict(zip(PATHS, zip(DOWN, UP, strict=True), strict=True)),
)


def base(names: str = "onnx::MatMul_{}", order: tuple[int, ...] = (0, 1, 2)) -> Chain:
    """A product with each weight's transpose, a scale after it."""
    chain = Chain()
    for place, layer in enumerate(order):
        weight = WEIGHTS[f"{PATHS[layer]}.weight"]
        chain.then("MatMul", names.format(place), np.ascontiguousarray(weight.T))
        chain.then("Mul", f"scale_{place}", np.float32([1 + place]))
    return chain


def unmerged(named: bool, folded: bool, adapted: tuple[int, ...] = (0, 2)) -> Chain:
    """The base with an adapter beside some products: MatMul, MatMul, Mul, Add; or with the scaling in B."""
    chain = Chain()
    for i, weight in enumerate(WEIGHTS.values()):
        x = chain.last
        chain.then("MatMul", f"onnx::MatMul_{i}", np.ascontiguousarray(weight.T))
        if i in adapted:
            a, b = (f"layers.{i}.lora_A.weight", f"layers.{i}.lora_B.weight") if named else (f"p{i}", f"r{i}")
            down = chain.node("MatMul", x, chain.constant(a, DOWN[i].T))
            up = chain.node("MatMul", down, chain.constant(b, UP[i].T * np.float32(3 if folded else 1)))
            if not folded:
                up = chain.node("Mul", up, chain.constant(f"scaling_{i}", np.array(3, np.float32)))
            chain.last = chain.node("Add", chain.last, up)
    return chain


def described(chain: Chain, *, adapter: Adapter | None = ADAPTER, **options: Any) -> GraphContent:
    model = chain.model()
    return describe_graph(model, match_weights(model.graph, Weights(WEIGHTS)), adapter, **options)


def test_a_graph_of_the_models_products_passes() -> None:
    content = described(base())
    assert content == GraphContent(6, None, (), ())
    check = content.check()
    assert (check.name, check.passed, check.figure, check.failures) == (
        "graph holds the model's products and no adapter",
        True,
        "6 nodes",
        (),
    )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_an_adapter_that_is_left_is_counted(named: bool, folded: bool) -> None:
    content = described(unmerged(named, folded))
    assert content.adapter is not None
    names = {value for i in (0, 2) for value in (f"layers.{i}.lora_A.weight", f"layers.{i}.lora_B.weight")}
    assert set(content.adapter.names) == (names if named else {"p0", "r0", "p2", "r2"})
    assert content.adapter.pairs == 2
    assert content.adapter.operators == {"MatMul": 4, "Add": 2} | ({} if folded else {"Mul": 2})
    assert content.adapter.nodes == (6 if folded else 8)
    assert not content.strangers
    check = content.check()
    assert not check.passed
    nodes = "6 nodes (4 MatMul, 2 Add)" if folded else "8 nodes (4 MatMul, 2 Mul, 2 Add)"
    listed = ", ".join(content.adapter.names)
    assert check.failures == (f"an adapter is left in the graph: 2 pairs, {nodes}: {listed}",)


def test_without_an_adapter_to_look_for_names_tell() -> None:
    assert described(unmerged(True, True), adapter=None).adapter is not None
    content = described(unmerged(False, True), adapter=None)
    assert content.adapter is None
    assert [line.partition(": ")[2] for line in content.strangers] == [
        f"{name} is no weight of the model" for name in ("p0", "r0", "p2", "r2")
    ]


def test_an_adapter_among_the_inputs_is_found() -> None:
    chain = base()
    a, b = (
        ir.Value(name=f"{PATHS[2]}.lora_{side}.weight", type=ir.TensorType(ir.DataType.FLOAT))
        for side in "AB"
    )
    down = chain.node("FusedMatMul", chain.input, a, transB=1)
    chain.last = chain.node("Add", chain.last, chain.node("FusedMatMul", down, b, transB=1))
    model = chain.model(a, b)
    content = describe_graph(model, match_weights(model.graph, Weights(WEIGHTS)), ADAPTER)
    assert content.adapter is not None
    assert (content.adapter.pairs, content.adapter.nodes) == (1, 3)


def test_stacked_factors_of_several_layers_are_as_many_pairs() -> None:
    chain = base()
    down = chain.node("MatMul", chain.input, chain.constant("down", np.concatenate([DOWN[1], DOWN[0]]).T))
    chain.last = chain.node(
        "Add",
        chain.last,
        chain.node("MatMul", down, chain.constant("up", np.concatenate([UP[1], UP[0]], 1).T)),
    )
    content = described(chain)
    assert content.adapter is not None
    assert (content.adapter.pairs, content.adapter.names) == (2, ("down", "up"))


def test_a_stack_with_factors_of_others_between_is_as_many_pairs_as_are_known() -> None:
    chain = base()
    stack = np.concatenate([DOWN[1], matrices(1, (2, 16), 50)[0], DOWN[0]])
    chain.last = chain.node("MatMul", chain.last, chain.constant("down", np.ascontiguousarray(stack.T)))
    content = described(chain)
    assert content.adapter is not None
    assert (content.adapter.pairs, content.adapter.names) == (2, ("down",))


def test_a_factor_is_followed_through_its_transpose() -> None:
    chain = base()
    a = chain.node("Transpose", chain.constant("lora_A", DOWN[0]), perm=[1, 0])
    up = chain.node("MatMul", chain.node("MatMul", chain.input, a), chain.constant("up", UP[0].T))
    chain.last = chain.node("Add", chain.last, up)
    content = described(chain, adapter=None)
    assert content.adapter is not None
    assert content.adapter.operators == {"MatMul": 2, "Transpose": 1, "Add": 1}


def test_what_serves_the_adapter_alone_is_counted_and_nothing_else() -> None:
    """A cast of its input, a transpose of A; not what the base's products take too."""
    chain = base()
    bias = chain.constant("bias", np.ones(16, np.float32))
    x = chain.node("Relu", chain.node("Add", chain.last, bias))
    own = chain.node("Cast", x, to=1)
    a = chain.node("Transpose", chain.constant("lora_A", DOWN[0]), perm=[1, 0])
    branch = chain.node("MatMul", chain.node("MatMul", own, a), chain.constant("lora_B", UP[0].T))
    weight = chain.node("Transpose", chain.constant("again", WEIGHTS[f"{PATHS[0]}.weight"]), perm=[1, 0])
    chain.last = chain.node("Relu", chain.node("Add", chain.node("MatMul", x, weight), branch))
    content = described(chain)
    assert content.adapter is not None
    assert content.adapter.operators == {"MatMul": 2, "Transpose": 1, "Cast": 1, "Add": 1}


def test_products_with_other_weights_are_named() -> None:
    chain = base().then("MatMul", "extra", matrices(1, (16, 20), 9)[0])
    chain.then("Gemm", "more", matrices(1, (8, 20), 9)[0], transB=1)
    content = described(chain)
    assert content.strangers == (
        "MatMul MatMul_6: extra is no weight of the model",
        "Gemm Gemm_7: more is no weight of the model",
    )
    assert content.check().failures == content.strangers


@pytest.mark.parametrize(
    "operator",
    [
        "Conv",
        "ConvTranspose",
        "Einsum",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "Gather",
        "GatherND",
        "Gemm",
        "MatMul",
        "TransposeMatMul",
    ],
)
def test_every_operator_that_multiplies_or_looks_up_counts(operator: str) -> None:
    chain = base()
    extra = chain.constant("extra", matrices(1, (16, 20), 9)[0])
    inputs = [extra, chain.last] if operator.startswith("Gather") else [chain.last, extra]
    chain.last = chain.node(operator, *inputs)
    assert described(chain).strangers == (f"{operator} {operator}_6: extra is no weight of the model",)


def test_tables_of_positions_are_no_weights_but_other_lookups_are() -> None:
    angles = np.arange(12)[:, None] * 0.1 ** np.arange(1, 9)
    chain = base()
    both = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    tables = {
        "cos": 1.5 * np.cos(angles),
        "sin": np.sin(angles),
        "both": both,
        "table": matrices(1, (12, 8))[0],
    }
    for name, table in tables.items():
        looked_up = chain.node("Gather", chain.constant(name, table.astype(np.float32)), chain.input)
        chain.last = chain.node("Add", chain.last, looked_up)
    assert described(chain).strangers == ("Gather Gather_12: table is no weight of the model",)


def test_a_weight_in_another_layers_place_is_named() -> None:
    content = described(base(order=(1, 0, 2)))
    assert content.misplaced == (f"{PATHS[1]}.weight: stands before {PATHS[0]}.weight in the graph",)
    named = described(base("model.layers.{}.self_attn.q_proj.weight", order=(1, 0, 2)))
    assert named.misplaced[:2] == (
        f"{PATHS[1]}.weight: holds {PATHS[0]}.weight",
        f"{PATHS[0]}.weight: holds {PATHS[1]}.weight",
    )


def test_layers_are_compared_in_the_order_of_their_numbers() -> None:
    """Whatever the order of the checkpoint is."""
    model = base().model()
    matches = match_weights(model.graph, Weights(dict(reversed(WEIGHTS.items()))))
    assert describe_graph(model, matches, ADAPTER).misplaced == ()


def test_products_that_do_not_depend_on_one_another_may_stand_in_any_order() -> None:
    chain = Chain()
    results = [
        chain.node("MatMul", chain.input, chain.constant(f"w{layer}", WEIGHTS[f"{PATHS[layer]}.weight"].T))
        for layer in (2, 0, 1)
    ]
    chain.last = chain.node("Sum", *results)
    assert described(chain).misplaced == ()


def test_the_base_graph_passes_whatever_its_weights_are_called() -> None:
    for names in ("onnx::MatMul_{}", "another_{}"):
        content = described(base(), base_graph=base(names).model())
        assert content.check().passed
        assert content.check().name == "graph is the base graph, node for node"


def test_what_was_added_to_the_base_graph_is_listed() -> None:
    content = described(unmerged(False, True), base_graph=unmerged(False, True, ()).model())
    assert content.base is not None
    assert (content.base.added, content.base.removed) == ({"MatMul": 4, "Add": 2}, {})
    assert "added: 4 MatMul, 2 Add" in content.check().failures
    fewer = described(base(), base_graph=base().then("Add", "more", np.ones(16, np.float32)).model())
    assert fewer.base is not None
    assert (fewer.base.added, fewer.base.removed) == ({}, {"Add": 1})
    assert "missing: 1 Add" in fewer.check().failures


@pytest.mark.parametrize("names", ["onnx::MatMul_{}", "another_{}"])
@pytest.mark.parametrize("change", ["scale", "wiring", "attribute"])
def test_a_change_that_adds_nothing_is_found(names: str, change: str) -> None:
    def graph(changed: bool) -> Chain:
        chain = base(names if changed else "onnx::MatMul_{}")
        first = chain.nodes[0].outputs[0]
        chain.then("Mul", "constant", np.float32([2 if changed and change == "scale" else 3]))
        chain.last = chain.node("Add", chain.input if changed and change == "wiring" else first, chain.last)
        chain.last = chain.node("Softmax", chain.last, axis=0 if changed and change == "attribute" else -1)
        return chain

    content = described(graph(True), base_graph=graph(False).model())
    assert content.base is not None
    assert content.base.difference is not None
    assert not content.check().passed


@pytest.mark.parametrize(("extra", "lines", "last"), [(8, 8, ""), (11, 9, "and 3 more products")])
def test_lists_that_are_long_are_cut(extra: int, lines: int, last: str) -> None:
    chain = base()
    for i in range(extra):
        chain.then("MatMul", f"extra_{i}", matrices(1, (16, 16), 40 + i)[0])
    failures = described(chain).check().failures
    assert len(failures) == lines
    assert failures[-1] == (last or "MatMul MatMul_13: extra_7 is no weight of the model")
