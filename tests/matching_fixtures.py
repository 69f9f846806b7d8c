"""Graphs by hand, and weights from arrays, for the tests of matching the ones to the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.export.external import load_graph
from loracle.export.verification.graph_tensors import held_tensors
from loracle.export.verification.weight_matching import Match, Matches

Array = np.ndarray[Any, Any]


class Weights:
    """A `WeightSource` of arrays: what is in `changed` is merged.

    Attributes:
        released: the names whose memory has been given back.
    """

    def __init__(self, base: Mapping[str, Array], changed: Mapping[str, Array] | None = None) -> None:
        self.base = base
        self.changed = changed or {}
        self.released: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.base)

    @property
    def merged_names(self) -> Collection[str]:
        return tuple(self.changed)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base[name].shape

    def tensor(self, name: str, dtype: Any = None) -> Array:
        own = self.changed.get(name, self.base[name])
        return own if dtype is None else own.astype(dtype)

    def rows(self, name: str, start: int, stop: int, dtype: Any = None) -> Array:
        return self.tensor(name, dtype)[start:stop]

    def base_tensor(self, name: str, dtype: Any = None) -> Array | None:
        return self.base[name] if dtype is None else self.base[name].astype(dtype)

    def release(self, name: str) -> None:
        self.released.add(name)


class Chain:
    """A graph in which each node takes the result of the one before, and a constant."""

    def __init__(self) -> None:
        self.input = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
        self.last = self.input
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add an initializer."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.initializers.append(value)
        return value

    def node(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node; return its result."""
        node = ir.node(operator, list(inputs), attributes, name=f"{operator}_{len(self.nodes)}")
        node.outputs[0].name = f"value_{len(self.nodes)}"
        node.outputs[0].dtype = ir.DataType.FLOAT
        self.nodes.append(node)
        return node.outputs[0]

    def then(self, operator: str, name: str, array: Array, **attributes: Any) -> Chain:
        """Add a node of the last result and an initializer."""
        self.last = self.node(operator, self.last, self.constant(name, array), **attributes)
        return self

    def model(self, *inputs: ir.Value) -> ir.Model:
        """The model, whose output is the last result."""
        graph = ir.Graph(
            [self.input, *inputs],
            [self.last],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": 20},
            name="chain",
        )
        return ir.Model(graph, ir_version=10)

    @property
    def graph(self) -> ir.Graph:
        return self.model().graph


def products(arrays: Mapping[str, Array], operator: str = "MatMul", **attributes: Any) -> Chain:
    """A product with each array in turn, under its name."""
    chain = Chain()
    for name, array in arrays.items():
        chain.then(operator, name, array, **attributes)
    return chain


def places(matches: Matches) -> dict[str, list[tuple[str, str]]]:
    """Weight -> (initializer in words, how)."""
    return {name: [(str(match), match.how) for match in found] for name, found in matches.found.items()}


def written(model: ir.Model, folder: Path) -> ir.Model:
    """A model as it is read again, its tensors in a data file."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=0)
    return load_graph(folder / "model.onnx")


def seen(graph: ir.Graph, match: Match) -> Array:
    """A copy of the weight that a graph holds in a place."""
    return held_tensors(graph)[match.initializer].read(lambda array: np.array(match.view(array)))


def matrices(count: int, shape: tuple[int, ...] = (24, 16), seed: int = 0) -> list[Array]:
    """Random arrays in float32."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
