"""Faults of graphs, made in place in somebody's exported folder: each takes the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from loracle.export.names import GRAPH_FILE

NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")


def _edit(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    path = folder / GRAPH_FILE
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def other_epsilon(folder: Path) -> None:
    """1e-5 in the place of 1e-6, in one norm."""

    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type in NORMS)
        epsilon = next(attribute for attribute in node.attribute if attribute.name == "epsilon")
        assert np.float32(epsilon.f) == np.float32(1e-6)
        epsilon.f = 1e-5

    _edit(folder, change)


def residual_dropped(folder: Path) -> None:
    """The first sum that a norm follows is only its second term."""

    def change(graph: onnx.GraphProto) -> None:
        place, node = next(
            (place, node)
            for place, node in enumerate(graph.node)
            if node.op_type == "SkipSimplifiedLayerNormalization"
        )
        _, branch, weight = node.input[:3]
        epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        norm = helper.make_node(
            "SimplifiedLayerNormalization",
            [branch, weight],
            [node.output[0]],
            name=node.name,
            axis=-1,
            stash_type=1,
            epsilon=epsilon,
        )
        total = node.output[3]
        del graph.node[place]
        graph.node.insert(place, norm)
        _use_instead(graph, total, branch)

    _edit(folder, change)


def _use_instead(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def one_product_in_float16(folder: Path) -> None:
    """The input of a product in the second half of the graph goes through float16."""

    def change(graph: onnx.GraphProto) -> None:
        products = [node for node in graph.node if node.op_type in PRODUCTS]
        product = products[len(products) // 2]
        place = list(graph.node).index(product)
        given = product.input[0]
        casts = [_cast(given, "narrow", TensorProto.FLOAT16), _cast("narrow", "wide", TensorProto.FLOAT)]
        product.input[0] = "wide"
        for cast in reversed(casts):
            graph.node.insert(place, cast)

    _edit(folder, change)


def _cast(given: str, made: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [given], [made], name=f"to_{made}", to=to)


def _last_entry(folder: Path, part: str, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    """Change the last entry of the first initializer of two axes, of float32, whose name has a part."""
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if part in t.name and len(t.dims) == 2)
    assert tensor.data_type == TensorProto.FLOAT
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset = int(place.get("offset", 0)) + int(place["length"]) - 4
    data = np.memmap(folder / place["location"], np.float32, "r+", offset, (1,))
    data[:] = change(data.copy())
    data.flush()


def last_bit_flipped(folder: Path, part: str) -> None:
    """The lowest bit of the last entry."""
    _last_entry(folder, part, lambda entry: (entry.view(np.int32) ^ 1).view(np.float32))


def not_a_number(folder: Path, part: str) -> None:
    """The last entry is NaN."""
    _last_entry(folder, part, lambda entry: np.full_like(entry, np.nan))
