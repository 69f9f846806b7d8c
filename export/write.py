"""Write a bound graph: tensors one at a time into the data file, then the graph that refers to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import require_space
from loracle.files.merged_checkpoint import BLOCK_BYTES
from loracle.files.safetensors_writer import Sink, write_array
from loracle.files.write_behind import WriteBehind

from .expert_weights import unstacked
from .matching import WeightSource, names_in_checkpoint
from .names import DATA_FILE, GRAPH_SUFFIX
from .recipes import RECIPES
from .template import GraphTemplate, Made

# A memory map starts at a page; onnxruntime maps external data whose offset is a multiple of this.
ALIGNMENT = 4096
_INLINE_BYTES = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Layout:
    """Where tensors lie in a data file: their offsets, in the order of the bytes, and the bytes in all."""

    offsets: Mapping[str, int]
    nbytes: int


class BoundTensors:
    """The values of the stored initializers of a model's graphs, one at a time: weights from `source`, and
    constants.

    Attributes:
        source: with each expert's weights apart, as the graphs have them.
        found: weight -> its name in `source`.

    Raises TargetError or ShapeError where `source` is not of the templates' model (`names_in_checkpoint`).
    """

    def __init__(self, templates: Sequence[GraphTemplate], source: WeightSource) -> None:
        self._made = {name: made for template in templates for name, made in template.made.items()}
        self.source = unstacked(templates, source)
        self.found = names_in_checkpoint(templates, self.source)
        self._dtype = templates[0].dtype
        self._computed: tuple[object, Sequence[np.ndarray[Any, Any]]] | None = None
        self._constants = {
            name: value.const_value
            for template in templates
            for name, value in template.model.graph.initializers.items()
            if name not in template.unbound
        }

    def weights(self, name: str) -> tuple[str, ...]:
        """The weights that an initializer holds: itself, several, or none where it is a constant."""
        if name in self._made:
            return self._made[name].sources
        return (name,) if name in self.found else ()

    def pieces(self, name: str) -> Iterable[np.ndarray[Any, Any]]:
        """The tensor of an initializer, rounded once to the template's dtype where it is a weight, as arrays
        that follow one another, each made when it is due."""
        if name in self._made:
            made = self._made[name]
            recipe = RECIPES[made.recipe]
            if recipe.in_order:
                return chain.from_iterable(map(self._blocks, made.sources))
            return recipe.pieces(self._ingredients(made))
        if name in self.found:
            return self._blocks(name)
        constant = self._constants[name]
        assert constant is not None
        return [constant.numpy()]

    def parts(self, name: str, tensor: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The weights in somebody's tensor of an initializer's shape; the tensor itself under its own name
        where it is no more than one, or something computed of them."""
        made = self._made.get(name)
        parts = None if made is None else RECIPES[made.recipe].parts
        if made is None or parts is None:
            return {name: tensor}
        shapes = [tuple(self.source.shape(self.found[weight])) for weight in made.sources]
        return dict(zip(made.sources, parts(tensor, shapes), strict=True))

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """A weight, rounded once to the template's dtype, something computed of weights, or a constant."""
        if name in self.found:
            return self._weight(name)
        (tensor,) = self.pieces(name)
        return tensor

    def base_tensor(self, name: str) -> np.ndarray[Any, Any] | None:
        """What `tensor` would be without the adapter, of an initializer that is computed of weights; None
        where the base has not all of them."""
        made = self._made[name]
        weights = []
        for weight in made.sources:
            base = self.source.base_tensor(self.found[weight], self._dtype)
            if base is None:
                return None
            weights.append(base)
        recipe = RECIPES[made.recipe]
        assert recipe.compute is not None
        (tensor,) = recipe.pieces(recipe.compute(weights, made.sources))
        return tensor

    def release(self, name: str) -> None:
        """Let go of the memory that an initializer's weights take in the mapped checkpoint."""
        for weight in self.weights(name):
            self.source.release(self.found[weight])

    def _ingredients(self, made: Made) -> Iterable[np.ndarray[Any, Any]]:
        """The weights, or what is computed of them: that is kept until something else is computed."""
        weights = map(self._weight, made.sources)
        compute = RECIPES[made.recipe].compute
        if compute is None:
            return weights
        key = (compute, made.sources)
        if self._computed is None or self._computed[0] != key:
            self._computed = None
            self._computed = (key, compute(list(weights), made.sources))
        return self._computed[1]

    def _blocks(self, name: str) -> Iterator[np.ndarray[Any, Any]]:
        """A weight, a few rows at a time."""
        held, shape = self.found[name], self.source.shape(self.found[name])
        rows = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * self._dtype.itemsize))
        if not shape or rows >= shape[0]:
            yield self._weight(name)
            return
        for start in range(0, shape[0], rows):
            yield self.source.rows(held, start, min(start + rows, shape[0]), self._dtype)
            self.source.release(held)

    def _weight(self, name: str) -> np.ndarray[Any, Any]:
        return self.source.tensor(self.found[name], self._dtype)


def stored(template: GraphTemplate) -> list[ir.Value]:
    """The initializers that go into a data file: all weights, and constants too large for the graph."""
    return [
        value
        for name, value in template.model.graph.initializers.items()
        if name in template.unbound or nbytes(value) > _INLINE_BYTES
    ]


def nbytes(value: ir.Value) -> int:
    """Bytes of an initializer, from its shape and dtype alone."""
    assert value.shape is not None
    assert value.dtype is not None
    return math.prod(int(size) for size in value.shape.numpy()) * int(value.dtype.itemsize)


def lay_out(values: Iterable[ir.Value], alignment: int = ALIGNMENT) -> Layout:
    """The places of `values` in a data file, one after the other, each at a multiple of `alignment`."""
    offsets, end = {}, 0
    for value in values:
        start = end + -end % alignment
        offsets[str(value.name)] = start
        end = start + nbytes(value)
    return Layout(offsets, end)


def refer(value: ir.Value, location: str, offset: int, folder: Path) -> None:
    """Let an initializer be what lies in `folder/location` from `offset` on."""
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.ExternalTensor(
        location,
        offset,
        nbytes(value),
        value.dtype,
        shape=value.shape,
        name=str(value.name),
        base_dir=folder,
    )


def write_data(sink: Sink, layout: Layout, tensors: BoundTensors, progress: Progress | None = None) -> None:
    """Write a data file, piece by piece: while one is written, the next is read and merged."""
    end = 0
    with WriteBehind(sink) as behind:
        for name, offset in layout.offsets.items():
            behind.write(b"\0" * (offset - end))
            end = offset
            for piece in tensors.pieces(name):
                write_array(behind, piece)
                end += piece.nbytes
            tensors.release(name)
            if progress is not None:
                progress(end, layout.nbytes)


def graph_bytes(template: GraphTemplate) -> bytes:
    """The template's graph as an ONNX file."""
    return bytes(ir.to_proto(template.model).SerializeToString())


def write_models(
    templates: Mapping[str, GraphTemplate],
    source: WeightSource,
    folder: Path,
    progress: Progress | None = None,
    *,
    beside: int = 0,
) -> int:
    """Write `model.onnx_data`, then the graphs, into `folder`; return the bytes of all.

    Graphs of one model share the data file, and each tensor in it. The templates are used up: their
    initializers refer to the file afterwards.

    Args:
        templates: the graphs of one model, by the names of their files.
        beside: bytes of what else will be written into the folder, which must be free too.

    Raises:
        TargetError, ShapeError: `source` is not of the templates' model.
        FileError: the disk has too little room. Nothing is written then.
    """
    _part_constants(templates)
    tensors = BoundTensors(list(templates.values()), source)
    values = [value for template in templates.values() for value in stored(template)]
    layout = lay_out({str(value.name): value for value in values}.values())
    for value in values:
        refer(value, DATA_FILE, layout.offsets[str(value.name)], folder)
    graphs = {file: graph_bytes(template) for file, template in templates.items()}
    size = layout.nbytes + sum(map(len, graphs.values()))
    require_space(folder.parent, size + beside)
    with open(folder / DATA_FILE, "wb") as data:
        write_data(data, layout, tensors, progress)
    for file, graph in graphs.items():
        (folder / file).write_bytes(graph)
    return size


def _part_constants(templates: Mapping[str, GraphTemplate]) -> None:
    """Give stored constants of one name that differ from graph to graph names of their own, in place."""
    held: dict[str, bytes] = {}
    for file, template in templates.items():
        for value in stored(template):
            name = str(value.name)
            if name in template.unbound:
                continue
            assert value.const_value is not None
            content = value.const_value.tobytes()
            if held.setdefault(name, content) != content:
                value.name = f"{file.removesuffix(GRAPH_SUFFIX)}.{name}"
