"""Write a bound graph: tensors one at a time into the data file, then the graph that refers to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import require_space
from loracle.files.safetensors_writer import Sink, write_array

from .matching import WeightSource, names_in_checkpoint
from .names import DATA_FILE, GRAPH_FILE
from .template import GraphTemplate

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
    """The values of a template's stored initializers, one at a time: weights from `source`, and constants.

    Raises TargetError or ShapeError where `source` is not of the template's model (`names_in_checkpoint`).
    """

    def __init__(self, template: GraphTemplate, source: WeightSource) -> None:
        self.found = names_in_checkpoint(template, source)
        self._source = source
        self._dtype = template.dtype
        initializers = template.model.graph.initializers
        self._constants = {
            name: value.const_value for name, value in initializers.items() if name not in self.found
        }

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor of an initializer, rounded once to the template's dtype where it is a weight."""
        if name in self.found:
            return self._source.tensor(self.found[name], self._dtype)
        constant = self._constants[name]
        assert constant is not None
        array: np.ndarray[Any, Any] = constant.numpy()
        return array

    def release(self, name: str) -> None:
        """Let go of the memory that the weight takes in the mapped checkpoint."""
        if name in self.found:
            self._source.release(self.found[name])


def stored(template: GraphTemplate) -> list[ir.Value]:
    """The initializers that go into a data file: all weights, and constants too large for the graph."""
    return [
        value
        for name, value in template.model.graph.initializers.items()
        if name in template.aliases or nbytes(value) > _INLINE_BYTES
    ]


def nbytes(value: ir.Value) -> int:
    """Bytes of an initializer, from its shape and dtype alone."""
    assert value.shape is not None
    assert value.dtype is not None
    return math.prod(int(size) for size in value.shape.numpy()) * int(value.dtype.itemsize)


def lay_out(values: Iterable[ir.Value]) -> Layout:
    """The places of `values` in a data file, one after the other, each at a multiple of `ALIGNMENT`."""
    offsets, end = {}, 0
    for value in values:
        start = end + -end % ALIGNMENT
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
    """Write a data file: each tensor is read, merged and written before the next is touched."""
    end = 0
    for name, offset in layout.offsets.items():
        sink.write(b"\0" * (offset - end))
        tensor = tensors.tensor(name)
        write_array(sink, tensor)
        end = offset + tensor.nbytes
        tensors.release(name)
        if progress is not None:
            progress(end, layout.nbytes)


def graph_bytes(template: GraphTemplate) -> bytes:
    """The template's graph as an ONNX file."""
    return bytes(ir.to_proto(template.model).SerializeToString())


def write_model(
    template: GraphTemplate,
    source: WeightSource,
    folder: Path,
    progress: Progress | None = None,
    *,
    beside: int = 0,
) -> int:
    """Write `model.onnx_data`, then `model.onnx`, into `folder`; return the bytes of both.

    The template is used up: its initializers refer to the file afterwards.

    Args:
        beside: bytes of what else will be written into the folder, which must be free too.

    Raises:
        TargetError, ShapeError: `source` is not of the template's model.
        FileError: the disk has too little room. Nothing is written then.
    """
    tensors = BoundTensors(template, source)
    values = stored(template)
    layout = lay_out(values)
    for value in values:
        refer(value, DATA_FILE, layout.offsets[str(value.name)], folder)
    graph = graph_bytes(template)
    require_space(folder.parent, layout.nbytes + len(graph) + beside)
    with open(folder / DATA_FILE, "wb") as data:
        write_data(data, layout, tensors, progress)
    (folder / GRAPH_FILE).write_bytes(graph)
    return layout.nbytes + len(graph)
