"""The parts of matching that a whole match seldom decides by: ties, what is left over, exchanged vectors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from matching_fixtures import Chain, Weights, matrices, places, products

from loracle.export.verification.content_signature import as_signature, sampled, similarity
from loracle.export.verification.quantized_tensors import code_holders, quantized_shapes
from loracle.export.verification.weight_matching import match_weights
from loracle.export.verification.weight_signatures import array_groups, natural_order, weight_groups

Array = np.ndarray[Any, Any]

NAMES = [f"h.{layer}.weight" for layer in range(4)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What is sampled is kept: it is computed again here."""
    sampled.cache_clear()


def weights_of(shape: tuple[int, ...] = (24, 16)) -> dict[str, Array]:
    return dict(zip(NAMES, matrices(len(NAMES), shape), strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (25, 23), (4096, 150_001), (1, 5000)])
def test_sampled_entries_are_runs_of_four_from_end_to_end(rows: int, columns: int) -> None:
    for indices, size in zip(sampled(rows, columns), (rows, columns), strict=True):
        if len(indices) == size:
            assert indices.tolist() == list(range(size))
        else:
            runs = len(indices) // 4
            starts = [run * (size - 4) // (runs - 1) for run in range(runs)]
            assert indices.tolist() == [start + at for start in starts for at in range(4)]
            assert (indices[0], indices[-1]) == (0, size - 1)


def test_entries_of_any_size_can_be_compared() -> None:
    assert as_signature(np.array([1e30, -1e30, np.inf, 5e14])).tolist() == [
        np.float32(1e15),
        -np.float32(1e15),
        0,
        np.float32(5e14),
    ]
    halves = np.array([[300.0, 200.0]], np.float16)  # their squares are none of float16's numbers
    assert similarity(halves, halves).tolist() == [[1.0]]
    assert similarity(np.array([[0.25]]), np.array([[0.5]])).tolist() == [[0.8]]


def test_natural_order_has_a_number_before_a_letter() -> None:
    assert sorted(["h.a", "h.3", "h.20", "0", "a"], key=natural_order) == ["0", "a", "h.3", "h.20", "h.a"]
    one, other = matrices(2, (6, 5))
    groups = array_groups({"h.10": one, "h.9": other}, lambda signatures: signatures)
    assert groups[6, 5].names == ("h.9", "h.10")
    assert groups[6, 5].shape == (6, 5)
    assert len(groups[6, 5].variants) == 1


@pytest.mark.parametrize(
    ("stored", "wide"),
    [(np.float16, np.float32), (ml_dtypes.bfloat16, np.float32), (np.float32, np.float32), (np.float64,) * 2],
)
@pytest.mark.parametrize("shape", [(40, 30), (1, 40, 30), (40, 5, 6)])
def test_merged_rows_are_read_wide(shape: tuple[int, ...], stored: Any, wide: Any) -> None:
    asked: list[Any] = []

    class Asked(Weights):
        def tensor(self, name: str, dtype: Any = None) -> Array:
            asked.append(dtype)
            return super().tensor(name, dtype)

    base = matrices(1, shape)[0].astype(stored)
    (group,) = weight_groups(Asked({"w": base}, {"w": base + base})).values()
    assert {np.dtype(dtype) for dtype in asked} == {np.dtype(wide)}
    assert np.array_equal(group.variants[1], as_signature(2 * group.variants[0])[None])


def test_only_what_is_merged_is_asked_for() -> None:
    class Base(Weights):
        def tensor(self, name: str, dtype: Any = None) -> Array:
            raise AssertionError(name)

    (group,) = weight_groups(Base(weights_of())).values()
    assert len(group.variants) == 1


def test_a_changed_weight_keeps_its_name_beside_others_that_are_right() -> None:
    weights = weights_of((40, 40))
    held = {**weights, NAMES[0]: weights[NAMES[0]] + matrices(1, (40, 40), 9)[0] / 2}
    matches = match_weights(products(held).graph, Weights(weights))
    assert places(matches) == {name: [(name, "by name")] for name in NAMES}


def test_a_symmetric_matrix_and_a_name_of_no_weight_do_no_harm() -> None:
    weights = {name: weight + weight.T for name, weight in weights_of((24, 24)).items()}
    source = Weights({"position_ids": np.arange(24), **weights})
    held = {"position_ids": np.arange(24, dtype=np.float32), **weights}
    matches = match_weights(products(held).graph, source)
    assert {name: found for name, found in places(matches).items() if name in weights} == {
        name: [(name, "by name")] for name in NAMES
    }


def test_a_name_does_not_count_for_another_shape() -> None:
    weights = weights_of()
    held = {"first": weights[NAMES[0]], NAMES[0]: matrices(1, (7, 5), 9)[0]}
    held |= {name: weights[name] for name in NAMES[1:]}
    matches = match_weights(products(held).graph, Weights(weights))
    assert places(matches)[NAMES[0]] == [("first", "by content")]
    assert matches.others == (NAMES[0],)


@pytest.mark.parametrize("shape", [(24, 16), (24, 24)])
def test_noise_goes_to_its_name_and_not_to_the_first_place(shape: tuple[int, int]) -> None:
    weights = weights_of(shape)
    noise, other = matrices(2, shape, 8)
    held = {"other": other, **weights, NAMES[2]: noise}
    matches = match_weights(products(held).graph, Weights(weights))
    assert places(matches)[NAMES[2]] == [(NAMES[2], "by name alone")]
    assert matches.others == ("other",)


@pytest.mark.parametrize("packed", [True, False])
def test_equal_weights_share_a_place_of_their_own_alone(packed: bool) -> None:
    """Rows of a packed tensor are no place that a second weight is known to have."""
    one, other = matrices(2)
    weights = {"a.weight": one, "b.weight": one, "c.weight": other}
    held = {"qk": np.concatenate([one, other])} if packed else {"q": one, "k": other}
    matches = match_weights(products(held).graph, Weights(weights))
    if packed:
        assert matches.missing == ("b.weight",)
    else:
        assert places(matches)["b.weight"] == [("q", "by content, shared with an equal weight")]


def test_several_groups_share_their_equal_weights() -> None:
    one, small = matrices(1)[0], matrices(1, (8, 6), 1)[0]
    weights = {"a.weight": one, "s.weight": small, "t.weight": small}
    matches = match_weights(products({"q": one, "r": small}).graph, Weights(weights))
    assert places(matches)["t.weight"] == [("r", "by content, shared with an equal weight")]


def test_an_exchanged_bias_is_found_where_it_is() -> None:
    q, k = matrices(2)
    one, other = matrices(2, (16,), 5)
    weights = {"q.weight": q, "q.bias": one, "k.weight": k, "k.bias": other}
    chain = Chain().then("MatMul", "wq", q).then("Add", "first", other)
    chain.then("MatMul", "back", matrices(1, (16, 24), 6)[0]).then("MatMul", "wk", k).then(
        "Add", "second", one
    )
    matches = match_weights(chain.graph, Weights(weights))
    assert places(matches)["k.bias"] == [("first", "by content")]
    assert places(matches)["q.bias"] == [("second", "by content")]


def test_a_changed_bias_is_the_one_beside_its_weight() -> None:
    q, k = matrices(2)
    one, other, noise = matrices(3, (24,), 5)
    weights = {"k.weight": k, "k.bias": other, "norm.weight": matrices(1, (16,), 4)[0], "q.weight": q}
    weights |= {"q.bias": one}
    chain = (
        Chain().then("Mul", "scale", weights["norm.weight"]).then("MatMul", "wq", q.T).then("Add", "b", noise)
    )
    chain.then("MatMul", "back", matrices(1, (24, 16), 6)[0]).then("MatMul", "wk", k.T).then(
        "Add", "c", other
    )
    matches = match_weights(chain.graph, Weights(weights))
    assert places(matches)["q.bias"] == [("b", "by place")]
    assert places(matches)["k.bias"] == [("c", "by place")]
    assert places(matches)["norm.weight"] == [("scale", "by content")]


def test_packed_biases_of_random_numbers_without_their_weights() -> None:
    q, k = matrices(2, (24,), 3)[0], matrices(1, (8,), 4)[0]
    chain = Chain().then("Add", "bias", np.concatenate([k, q]))
    matches = match_weights(chain.graph, Weights({"q.bias": q, "k.bias": k}))
    assert places(matches) == {
        "q.bias": [("rows 8:32 of bias", "by content")],
        "k.bias": [("rows 0:8 of bias", "by content")],
    }
    assert matches.others == ()


def test_the_constants_of_nodes_that_compute_with_codes() -> None:
    chain = Chain().then("MatMul", "plain", matrices(1)[0])
    codes = chain.constant("codes", np.zeros((32, 2, 16), np.uint8))
    scales = chain.constant("scales", np.ones((32, 2), np.float32))
    chain.last = chain.node("MatMulNBits", chain.last, codes, scales, N=32, K=64, bits=4, block_size=32)
    chain.last = chain.node("Add", chain.last, chain.constant("indices", np.zeros(3, np.int8)))
    assert code_holders(chain.graph) == {"codes", "scales"}
    assert code_holders(products(weights_of()).graph) == frozenset()


def test_codes_of_experts_tell_their_outputs() -> None:
    from loracle.export.verification.graph_tensors import held_tensors

    chain = Chain()
    codes = chain.constant("codes", np.zeros((4, 32, 20), np.uint8))
    chain.last = chain.node("QMoE", chain.last, codes, N=5)
    graph = chain.graph
    assert quantized_shapes(graph, held_tensors(graph).values()) == {(32, None)}
