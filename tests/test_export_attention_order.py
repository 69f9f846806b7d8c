"""Query, key and value in each other's places are told by what is done with them; in their own nothing is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from matching_fixtures import Chain, Weights, matrices

from loracle.export.verification.attention_order import exchanged_projections
from loracle.export.verification.graph_tensors import held_tensors
from loracle.export.verification.weight_matching import match_weights

LAYERS = 2
ROLES = ("q_proj", "k_proj", "v_proj")
NAMES = [[f"layers.{layer}.attn.{role}.weight" for role in ROLES] for layer in range(LAYERS)]
WEIGHTS = dict(zip([name for layer in NAMES for name in layer], matrices(3 * LAYERS, (16, 16)), strict=True))


def said(graph: ir.Graph) -> list[str]:
    matches = match_weights(graph, Weights(WEIGHTS))
    assert not matches.missing
    return list(exchanged_projections(graph, matches, held_tensors(graph)))


def line(layer: int, *roles: int) -> str:
    return f"{' and '.join(NAMES[layer][role] for role in roles)}: stand in one another's place"


def held(layer: int, exchanged: tuple[int, int] | None) -> list[np.ndarray]:  # type: ignore[type-arg]
    """The transposes of a layer's weights; two are exchanged."""
    weights = [np.ascontiguousarray(WEIGHTS[name].T) for name in NAMES[layer]]
    if exchanged is not None:
        one, other = exchanged
        weights[one], weights[other] = weights[other], weights[one]
    return weights


def products(chain: Chain, layer: int, exchanged: tuple[int, int] | None) -> list[ir.Value]:
    return [
        chain.node("MatMul", chain.last, chain.constant(f"w{layer}{role}", weight))
        for role, weight in enumerate(held(layer, exchanged))
    ]


def decomposed(wrong: int | None) -> ir.Graph:
    """Products, transposes and a softmax; in a layer key and value are exchanged."""
    chain = Chain()
    for layer in range(LAYERS):
        q, k, v = products(chain, layer, (1, 2) if layer == wrong else None)
        scores = chain.node("MatMul", q, chain.node("Transpose", k, perm=[0, 2, 1]))
        chain.last = chain.node("MatMul", chain.node("Softmax", scores, axis=-1), v)
    return chain.graph


def fused(wrong: int | None, exchanged: tuple[int, int], operator: str = "GroupQueryAttention") -> ir.Graph:
    chain = Chain()
    for layer in range(LAYERS):
        q, k, v = products(chain, layer, exchanged if layer == wrong else None)
        chain.last = chain.node(operator, chain.node("RotaryEmbedding", q), k, v)
    return chain.graph


def packed(wrong: int | None, exchanged: tuple[int, int], *, split: bool = False) -> ir.Graph:
    chain = Chain()
    for layer in range(LAYERS):
        weights = held(layer, exchanged if layer == wrong else None)
        chain.then("MatMul", f"w{layer}", np.concatenate(weights, 1))
        others = (chain.last, chain.last) if split else (None, None)
        chain.last = chain.node("GroupQueryAttention", chain.last, *others)
    return chain.graph


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_value_that_goes_into_the_softmax_is_a_keys_place(layer: int) -> None:
    assert said(decomposed(layer)) == [line(layer, 1, 2)]


@pytest.mark.parametrize("operator", ["Attention", "GroupQueryAttention", "MultiHeadAttention"])
@pytest.mark.parametrize("exchanged", [(0, 1), (1, 2), (0, 2)])
def test_operands_of_an_attention_operator_have_their_turn(operator: str, exchanged: tuple[int, int]) -> None:
    assert said(fused(1, exchanged, operator)) == [line(1, *exchanged)]


@pytest.mark.parametrize("exchanged", [(0, 1), (1, 2), (0, 2)])
def test_so_have_the_rows_of_a_packed_one(exchanged: tuple[int, int]) -> None:
    assert said(packed(0, exchanged)) == [line(0, *exchanged)]


def test_nothing_is_said_of_weights_in_their_own_places() -> None:
    for graph in (decomposed(None), fused(None, (0, 1)), packed(None, (0, 1))):
        assert said(graph) == []


def test_nothing_is_said_where_the_rows_are_taken_apart_before() -> None:
    assert said(packed(0, (1, 2), split=True)) == []
