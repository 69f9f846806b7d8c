"""Each weight is found in anyone's graph, and where it really is; what is not there is not found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from matching_fixtures import Chain, Weights, matrices, places, products, seen, written

from loracle.export.verification.weight_matching import Match, Matches, match_weights
from loracle.reference import FileError

Array = np.ndarray[Any, Any]

LAYERS = 4
NAMES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LAYERS)]


def layers(shape: tuple[int, ...] = (24, 16)) -> dict[str, Array]:
    """A weight of each layer."""
    return dict(zip(NAMES, matrices(LAYERS, shape), strict=True))


def only(matches: Matches, name: str) -> Match:
    (match,) = matches.found[name]
    return match


def nameless(arrays: list[Array], turned: bool = True) -> Chain:
    """A product with each array in turn, under a number."""
    return products({f"onnx::MatMul_{i}": array.T if turned else array for i, array in enumerate(arrays)})


def test_the_name_counts_where_the_content_agrees() -> None:
    weights = layers()
    matches = match_weights(products(weights, "Gemm", transB=1).graph, Weights(weights))
    assert places(matches) == {name: [(name, "by name")] for name in NAMES}
    assert (matches.missing, matches.quantized, matches.others) == ((), (), ())


def test_a_name_counts_though_an_update_has_changed_the_content() -> None:
    weights = layers((40, 40))
    held = {name: weights[name] + delta for name, delta in zip(NAMES, updates(2**-0.5), strict=True)}
    matches = match_weights(products(held, "Gemm", transB=1).graph, Weights(weights))
    assert places(matches) == {name: [(name, "by name")] for name in NAMES}


def test_a_name_is_refused_where_another_weight_is_much_nearer() -> None:
    """Norms are all alike; of two that are exchanged each is more like itself, though both were changed."""
    base = {name: 1 + array / 10 for name, array in zip(norms(4), matrices(4, (64,)), strict=True)}
    one, other = norms(4)[1:3]
    held = {name: array + np.float32(0.002) for name, array in base.items()}
    held[one], held[other] = held[other], held[one]
    matches = match_weights(products(held, "Mul").graph, Weights(base))
    assert places(matches)[one] == [(other, "by content, against its name")]
    assert places(matches)[other] == [(one, "by content, against its name")]
    assert places(matches)[norms(4)[0]] == [(norms(4)[0], "by name")]


def test_a_prefix_before_a_name_does_not_hide_it() -> None:
    weights = layers()
    matches = match_weights(products({f"model.{n}": w for n, w in weights.items()}).graph, Weights(weights))
    assert places(matches) == {name: [(f"model.{name}", "by name")] for name in NAMES}


@pytest.mark.parametrize("shape", [(24, 16), (16, 16)])
def test_transposes_without_names_are_found_by_content(shape: tuple[int, int], tmp_path: Path) -> None:
    """Ten layers, so that the order of the names is not that of the layers: 1, 10, 2."""
    names = [f"h.{layer}.attn.weight" for layer in range(12)]
    weights = dict(zip(sorted(names), matrices(12, shape), strict=True))
    model = written(nameless([weights[name] for name in names]).model(), tmp_path)
    matches = match_weights(model.graph, Weights(weights))
    assert places(matches) == {
        name: [(f"transpose of onnx::MatMul_{names.index(name)}", "by content")] for name in weights
    }
    for name, weight in weights.items():
        assert np.array_equal(seen(model.graph, only(matches, name)), weight)


def test_a_view_is_no_copy() -> None:
    weights = layers()
    match = only(match_weights(nameless(list(weights.values())).graph, Weights(weights)), NAMES[2])
    held = np.ascontiguousarray(weights[NAMES[2]].T)
    assert np.shares_memory(match.view(held), held)
    assert np.array_equal(match.view(held), weights[NAMES[2]])


def test_exchanged_layers_are_found_where_they_are_and_their_names_refused() -> None:
    weights = layers()
    held = {**weights, NAMES[0]: weights[NAMES[1]], NAMES[1]: weights[NAMES[0]]}
    matches = match_weights(products(held, "Gemm", transB=1).graph, Weights(weights))
    assert places(matches) == {
        NAMES[0]: [(NAMES[1], "by content, against its name")],
        NAMES[1]: [(NAMES[0], "by content, against its name")],
        NAMES[2]: [(NAMES[2], "by name")],
        NAMES[3]: [(NAMES[3], "by name")],
    }


def updates(size: float) -> list[Array]:
    """An update of rank 2 for each layer of 40 rows and columns."""
    pairs = zip(matrices(LAYERS, (40, 2), 2), matrices(LAYERS, (2, 40), 1), strict=True)
    return [np.float32(size) * (up @ down) for up, down in pairs]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("times", [0.0, 1.0, 2.0, -1.0])
def test_a_weight_is_found_with_any_multiple_of_its_update(merged: bool, times: float) -> None:
    """Updates as large as the weights, in a graph without names."""
    weights = layers((40, 40))
    deltas = updates(2**-0.5)
    changed = {name: w + d for (name, w), d in zip(weights.items(), deltas, strict=True)}
    held = [w + np.float32(times) * d for w, d in zip(weights.values(), deltas, strict=True)]
    order = [2, 0, 3, 1]
    matches = match_weights(
        nameless([held[i] for i in order]).graph, Weights(weights, changed if merged else None)
    )
    for place, layer in enumerate(order):
        assert str(only(matches, NAMES[layer])) == f"transpose of onnx::MatMul_{place}"


def test_an_update_transposed_or_of_another_adapter_does_not_hide_a_weight() -> None:
    weights = layers((40, 40))
    deltas = updates(2**-0.5)
    changed = {name: weights[name] + delta for name, delta in zip(NAMES, deltas, strict=True)}
    held = [weights[name] + delta.T for name, delta in zip(NAMES, deltas, strict=True)]
    matches = match_weights(nameless(held).graph, Weights(weights, changed))
    assert [str(only(matches, name)) for name in NAMES] == [
        f"transpose of onnx::MatMul_{i}" for i in range(LAYERS)
    ]


@pytest.mark.parametrize("transposed", [True, False])
def test_packed_weights_of_different_heights_are_found_as_rows(transposed: bool, tmp_path: Path) -> None:
    q, k, v = matrices(1, (24, 16))[0], *matrices(2, (8, 16), 1)
    names = [f"layers.0.{part}_proj.weight" for part in "kqv"]
    packed = np.concatenate([q, k, v])
    chain = nameless([packed], transposed)
    model = written(chain.model(), tmp_path)
    matches = match_weights(model.graph, Weights(dict(zip(names, (k, q, v), strict=True))))
    held = "the transpose of onnx::MatMul_0" if transposed else "onnx::MatMul_0"
    assert places(matches) == {
        names[0]: [(f"rows 24:32 of {held}", "by content")],
        names[1]: [(f"rows 0:24 of {held}", "by content")],
        names[2]: [(f"rows 32:40 of {held}", "by content")],
    }
    for name, weight in zip(names, (k, q, v), strict=True):
        assert np.array_equal(seen(model.graph, only(matches, name)), weight)
    assert matches.others == ()


def test_packed_weights_are_found_beside_rows_that_are_noise() -> None:
    """What is left of them is a lack: no other rows are taken for it."""
    q, k, noise = matrices(3, (24, 16))
    weights = Weights({"q.weight": q, "k.weight": k, "v.weight": matrices(1, (24, 16), 9)[0]})
    matches = match_weights(nameless([np.concatenate([noise, k, q])]).graph, weights)
    assert places(matches) == {
        "q.weight": [("rows 48:72 of the transpose of onnx::MatMul_0", "by content")],
        "k.weight": [("rows 24:48 of the transpose of onnx::MatMul_0", "by content")],
    }
    assert matches.missing == ("v.weight",)


def test_rows_that_begin_as_two_weights_do_are_of_the_one_that_is_more_like_them() -> None:
    big, other = matrices(2, (24, 16))
    small = big[:8] + matrices(1, (8, 16), 5)[0] * np.float32(0.02)
    for names in (("big.weight", "small.weight"), ("small.weight", "big.weight")):
        weights = dict(zip(names, (big, small) if names[0] == "big.weight" else (small, big), strict=True))
        graph = nameless([np.concatenate([big, small, other])]).graph
        matches = match_weights(graph, Weights({**weights, "other.weight": other}))
        assert only(matches, "big.weight").rows == (0, 24)
        assert only(matches, "small.weight").rows == (24, 32)
        assert only(matches, "other.weight").rows == (32, 56)


def test_experts_are_found_as_rows_of_a_stack() -> None:
    names = [f"experts.{i}.w1.weight" for i in range(4)]
    weights = dict(zip(names, matrices(4), strict=True))
    stack = np.stack([weights[names[i]] for i in (2, 0, 1, 3)])
    matches = match_weights(products({"experts": stack}).graph, Weights(weights))
    assert [only(matches, name).rows for name in names] == [(24, 48), (48, 72), (0, 24), (72, 96)]
    assert np.array_equal(only(matches, names[3]).view(stack), weights[names[3]])


@pytest.mark.parametrize(
    ("own", "held"),
    [
        ((24, 16, 1, 1), (24, 16)),
        ((24, 16), (24, 16, 1, 1)),
        ((24, 16, 3, 3), (24, 16, 3, 3)),
        ((1, 24, 16), (24, 16)),
    ],
)
def test_axes_of_one_entry_do_not_count(own: tuple[int, ...], held: tuple[int, ...]) -> None:
    weights = dict(zip(("a.weight", "b.weight"), matrices(2, own), strict=True))
    arrays = [weight.reshape(held) for weight in weights.values()]
    matches = match_weights(nameless(arrays, turned=False).graph, Weights(weights))
    assert [only(matches, name).view(array).shape for name, array in zip(weights, arrays, strict=True)] == [
        own,
        own,
    ]
    assert np.array_equal(only(matches, "b.weight").view(arrays[1]), weights["b.weight"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_another_dtype_does_not_hide_a_weight(dtype: Any) -> None:
    weights = layers()
    held = [weight.astype(dtype) for weight in weights.values()]
    matches = match_weights(nameless(held[::-1]).graph, Weights(weights))
    assert [str(only(matches, name)) for name in NAMES] == [
        f"transpose of onnx::MatMul_{LAYERS - 1 - i}" for i in range(LAYERS)
    ]
    stored = Weights({name: weight.astype(dtype) for name, weight in weights.items()})
    assert not match_weights(nameless(list(weights.values())).graph, stored).missing


@pytest.mark.parametrize(("change", "copy"), [(0.9, True), (1.6, False)])
def test_a_tied_pair_has_two_places_though_one_was_changed(change: float, copy: bool) -> None:
    (table,) = matrices(1, (40, 16))
    broken = table + matrices(1, (40, 16), 5)[0] * np.float32(change)
    chain = Chain().then("Gather", "table", table).then("MatMul", "head", np.ascontiguousarray(broken.T))
    matches = match_weights(chain.graph, Weights({"embed_tokens.weight": table}))
    second = [("transpose of head", "by content")] if copy else []
    assert places(matches) == {"embed_tokens.weight": [("table", "by content"), *second]}
    assert matches.others == (() if copy else ("head",))


def test_two_equal_weights_share_what_the_graph_holds_once() -> None:
    (table,) = matrices(1, (40, 16))
    weights = Weights({"embed_tokens.weight": table, "lm_head.weight": table})
    matches = match_weights(products({"lm_head.weight": table}).graph, weights)
    assert places(matches) == {
        "embed_tokens.weight": [("lm_head.weight", "by content, shared with an equal weight")],
        "lm_head.weight": [("lm_head.weight", "by name")],
    }


def norms(count: int) -> list[str]:
    return [f"layers.{i}.norm.weight" for i in range(count)]


def test_equal_norms_have_their_places_in_order() -> None:
    ones = np.ones(16, np.float32)
    chain = Chain()
    for i in range(11):
        chain.then("Mul", f"scale_{i}", ones)
    matches = match_weights(chain.graph, Weights(dict.fromkeys(sorted(norms(11)), ones)))
    assert places(matches) == {
        name: [(f"scale_{i}", "by content")] for i, name in sorted(enumerate(norms(11)), key=lambda x: x[1])
    }


def test_norms_that_are_much_alike_are_not_confused() -> None:
    base = {name: 1 + array / 10 for name, array in zip(norms(6), matrices(6, (64,)), strict=True)}
    chain = Chain()
    for name in reversed(base):
        chain.then("Mul", f"of {name}", base[name])
    matches = match_weights(chain.graph, Weights(base))
    assert places(matches) == {name: [(f"of {name}", "by content")] for name in base}


def test_norms_that_were_changed_are_those_that_they_are_most_like() -> None:
    base = dict(zip(norms(3), matrices(3, (64,)), strict=True))
    chain = Chain()
    for i, change in zip((2, 0, 1), matrices(3, (64,), 5), strict=True):
        chain.then("Mul", f"scale_{i}", base[norms(3)[i]] + change / 2)
    matches = match_weights(chain.graph, Weights(base))
    assert places(matches) == {name: [(f"scale_{i}", "by content")] for i, name in enumerate(norms(3))}


def test_a_norm_that_the_graph_holds_twice_has_two_places() -> None:
    (norm,) = matrices(1, (64,))
    chain = Chain().then("Mul", "one", norm).then("Mul", "other", norm).then("Mul", "third", norm * 2)
    matches = match_weights(chain.graph, Weights({"norm.weight": norm}))
    assert places(matches) == {"norm.weight": [("one", "by content"), ("other", "by content")]}


def test_a_norm_that_is_one_more_than_another_is_itself() -> None:
    (norm,) = matrices(1, (64,))
    base = {"a.weight": norm, "b.weight": norm + np.float32(1)}
    chain = Chain().then("Mul", "first", base["b.weight"]).then("Mul", "second", base["a.weight"])
    matches = match_weights(chain.graph, Weights(base))
    assert places(matches) == {"a.weight": [("second", "by content")], "b.weight": [("first", "by content")]}


def test_a_norm_that_was_replaced_is_what_is_left_over() -> None:
    base = {name: 1 + array / 10 for name, array in zip(norms(3), matrices(3, (64,)), strict=True)}
    held = {**base, norms(3)[1]: matrices(1, (64,), 7)[0]}
    chain = Chain()
    for i, array in enumerate(held.values()):
        chain.then("Mul", f"scale_{i}", array)
    matches = match_weights(chain.graph, Weights(base))
    assert places(matches)[norms(3)[1]] == [("scale_1", "by place")]
    named = match_weights(products(held, "Mul").graph, Weights(base))
    assert places(named)[norms(3)[1]] == [(norms(3)[1], "by name alone")]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("size", [0.1, 20.0])
def test_norms_with_one_added_are_found_and_undone(named: bool, size: float) -> None:
    """Of norms as large as the second, 1 more is almost the same."""
    base = {
        name: np.float32(size) * (1 + w / 4) for name, w in zip(norms(3), matrices(3, (64,)), strict=True)
    }
    held = {name: weight + np.float32(1) for name, weight in base.items()}
    chain = Chain()
    for i in (2, 0, 1):
        chain.then("Mul", norms(3)[i] if named else f"scale_{i}", held[norms(3)[i]])
    graph = chain.graph
    matches = match_weights(graph, Weights(base))
    for i, name in enumerate(norms(3)):
        assert places(matches)[name] == [(name if named else f"scale_{i}", "by content, plus 1")]
        assert np.array_equal(seen(graph, only(matches, name)), base[name])
        changed = held[name] + np.float32(0.25)
        assert np.array_equal(only(matches, name).view(changed), changed - np.float32(1))


def biased(changed: int | None = None) -> Chain:
    """Products with weights, each followed by a bias of zeros; one may be something else."""
    chain = Chain()
    for i, weight in enumerate(layers().values()):
        bias = np.zeros(24, np.float32)
        if i == changed:
            bias = matrices(1, (24,))[0]
        chain.then("MatMul", f"onnx::MatMul_{i}", np.ascontiguousarray(weight.T))
        chain.then("Add", f"bias_{LAYERS - i}", bias)
        chain.then("MatMul", f"back_{i}", matrices(1, (24, 16), 20 + i)[0])
    return chain


@pytest.mark.parametrize("changed", [None, 1])
def test_biases_of_zeros_stand_beside_the_weight_of_their_module(changed: int | None) -> None:
    weights = {}
    for name, weight in layers().items():
        weights |= {name.replace("weight", "bias"): np.zeros(24, np.float32), name: weight}
    matches = match_weights(biased(changed).graph, Weights(weights))
    for i, name in enumerate(NAMES):
        assert places(matches)[name.replace("weight", "bias")] == [(f"bias_{LAYERS - i}", "by place")]


def test_a_graph_that_holds_equal_biases_once_holds_all_of_them() -> None:
    weights: dict[str, Array] = {}
    for name, weight in layers().items():
        weights |= {name.replace("weight", "bias"): np.zeros(24, np.float32), name: weight}
    chain = Chain()
    zeros = chain.constant("zeros", np.zeros(24, np.float32))
    for i, weight in enumerate(layers().values()):
        product = chain.node("Gemm", chain.last, chain.constant(f"w{i}", weight), zeros, transB=1)
        chain.last = chain.node("MatMul", product, chain.constant(f"back_{i}", matrices(1, seed=30 + i)[0]))
    matches = match_weights(chain.graph, Weights(weights))
    assert not matches.missing
    assert {only(matches, name.replace("weight", "bias")).initializer for name in NAMES} == {"zeros"}


def test_packed_biases_go_with_packed_weights() -> None:
    q, k = matrices(1, (24, 16))[0], matrices(1, (8, 16), 1)[0]
    weights = {"q.bias": np.zeros(24, np.float32), "k.bias": np.zeros(8, np.float32)}
    weights |= {"q.weight": q, "k.weight": k}
    chain = nameless([np.concatenate([k, q])]).then("Add", "bias", np.zeros(32, np.float32))
    matches = match_weights(chain.graph, Weights(weights))
    assert places(matches)["q.bias"] == [("rows 8:32 of bias", "by place")]
    assert places(matches)["k.bias"] == [("rows 0:8 of bias", "by place")]


def test_weights_of_zeros_are_found_in_order() -> None:
    zeros = np.zeros((24, 16), np.float32)
    matches = match_weights(nameless([zeros] * LAYERS).graph, Weights(dict.fromkeys(NAMES, zeros)))
    assert [only(matches, name).initializer for name in NAMES] == [f"onnx::MatMul_{i}" for i in range(LAYERS)]


def test_what_is_not_there_is_missing_and_what_is_no_weight_is_another() -> None:
    weights = layers()
    held = [*list(weights.values())[:3], *matrices(2, (20, 20), 3)]
    matches = match_weights(nameless(held).graph, Weights(weights))
    assert matches.missing == (NAMES[3],)
    assert matches.others == ("onnx::MatMul_3", "onnx::MatMul_4")


@pytest.mark.parametrize("turned", [True, False])
def test_what_is_left_over_lies_as_the_others_do(turned: bool) -> None:
    weights = layers((24, 24))
    held = [*list(weights.values())[:3], matrices(1, (24, 24), 8)[0]]
    matches = match_weights(nameless(held, turned).graph, Weights(weights))
    match = only(matches, NAMES[3])
    assert (match.initializer, match.transposed, match.how) == ("onnx::MatMul_3", turned, "by place")


def test_a_weight_of_noise_is_told_by_its_name_alone() -> None:
    weights = layers()
    held = {**weights, NAMES[1]: matrices(1, seed=8)[0]}
    matches = match_weights(products(held).graph, Weights(weights))
    assert places(matches)[NAMES[1]] == [(NAMES[1], "by name alone")]


def test_one_entry_that_is_no_number_does_not_hide_a_weight() -> None:
    weights = layers()
    held = [np.array(weight) for weight in weights.values()]
    held[1][3, 5] = np.nan
    held[2][0, 0] = np.inf
    matches = match_weights(nameless(held).graph, Weights(weights))
    assert [only(matches, name).initializer for name in NAMES] == [f"onnx::MatMul_{i}" for i in range(LAYERS)]


def test_constants_of_nodes_and_of_graphs_in_nodes_are_found() -> None:
    weights = layers()
    first, second, third, fourth = weights.values()
    chain = Chain().then("MatMul", "first", first)
    constant = ir.node("Constant", [], {"value": ir.tensor(second)})
    constant.outputs[0].name = "second"
    chain.nodes.append(constant)
    chain.last = chain.node("MatMul", chain.last, constant.outputs[0])

    def branch(name: str, weight: Array) -> ir.Graph:
        inner = Chain()
        inner.last = inner.node("MatMul", chain.last, inner.constant(name, weight))
        return ir.Graph(
            [], [inner.last], nodes=inner.nodes, initializers=inner.initializers, name=f"of {name}"
        )

    then, otherwise = branch("weight", third), branch("weight", fourth)
    condition = chain.constant("condition", np.array(True))
    chain.last = chain.node("If", condition, then_branch=then, else_branch=otherwise)
    matches = match_weights(chain.graph, Weights(weights))
    assert not matches.missing
    assert only(matches, NAMES[1]).initializer == "second"
    found = {only(matches, name).initializer for name in NAMES[2:]}
    assert len(found) == 2
    assert "weight" in found


def test_weights_in_codes_are_quantised() -> None:
    weights = {
        **layers((32, 64)),
        "norm.weight": matrices(1, (64,))[0],
        "head.weight": matrices(1, (80, 64))[0],
    }
    chain = Chain().then("Mul", "norm", weights["norm.weight"])
    for i in range(LAYERS):
        codes = chain.constant(f"codes_{i}", np.zeros((32, 2, 16), np.uint8))
        scales = chain.constant(f"scales_{i}", np.ones((32, 2), np.float32))
        chain.last = chain.node("MatMulNBits", chain.last, codes, scales, N=32, K=64, bits=4, block_size=32)
    matches = match_weights(chain.graph, Weights(weights))
    assert matches.quantized == tuple(NAMES)
    assert matches.missing == ("head.weight",)
    assert list(matches.found) == ["norm.weight"]


@pytest.mark.parametrize(
    ("operator", "codes", "scales", "attributes", "quantized"),
    [
        ("DequantizeLinear", (32, 64), (32,), {"axis": 0}, True),
        ("DequantizeLinear", (64, 32), (32,), {"axis": 1}, True),
        ("DequantizeLinear", (32, 32), (32,), {"axis": 1}, False),
        ("DequantizeLinear", (64,), (1,), {"axis": 0}, False),
        ("GatherBlockQuantized", (32, 32), (32, 2), {"bits": 4}, True),
        ("GatherBlockQuantized", (64, 32), (64, 2), {"bits": 4}, False),
        ("QMoE", (4, 32, 32), (4, 32), {}, True),
        ("MatMulNBits", (96, 2, 16), (96, 2), {"N": 96, "K": 64}, True),
        ("MatMulNBits", (16, 2, 16), (16, 2), {"N": 16, "K": 64}, False),
        ("MatMulNBits", (96, 1, 16), (96, 1), {"N": 96, "K": 32}, False),
    ],
)
def test_codes_are_of_the_weights_whose_shapes_they_have(
    operator: str,
    codes: tuple[int, ...],
    scales: tuple[int, ...],
    attributes: dict[str, int],
    quantized: bool,
) -> None:
    chain = Chain()
    held = chain.constant("codes", np.zeros(codes, np.uint8))
    inputs = [held, chain.last] if operator == "GatherBlockQuantized" else [held]
    if operator in ("QMoE", "MatMulNBits"):
        inputs = [chain.last, held]
    chain.last = chain.node(
        operator, *inputs, chain.constant("scales", np.ones(scales, np.float32)), **attributes
    )
    matches = match_weights(chain.graph, Weights({"a.weight": matrices(1, (32, 64))[0]}))
    assert (matches.quantized, matches.missing) == ((("a.weight",), ()) if quantized else ((), ("a.weight",)))


def test_what_is_no_floating_point_number_is_passed_over() -> None:
    weights = {**layers(), "position_ids": np.arange(24)}
    matches = match_weights(products(layers()).graph, Weights(weights))
    assert list(matches.found) == NAMES
    assert not matches.missing


def test_little_is_read_of_a_large_tensor_and_given_back(tmp_path: Path, monkeypatch: Any) -> None:
    weights = {f"h.{i}.weight": array for i, array in enumerate(matrices(2, (3000, 1000)))}
    model = written(nameless(list(weights.values())).model(), tmp_path)
    source = Weights(weights)
    matches = match_weights(model.graph, source)
    assert len(matches.found) == 2
    assert source.released == set(weights)
    for value in model.graph.initializers.values():
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.raw is None


def test_data_that_do_not_fit_the_shape_are_an_error(tmp_path: Path) -> None:
    weights = layers()
    model = written(nameless(list(weights.values())).model(), tmp_path)
    (tmp_path / "model.onnx_data").write_bytes(b"short")
    with pytest.raises(FileError, match=r"^onnx::MatMul_0: expected a tensor of"):
        match_weights(model.graph, Weights(weights))
