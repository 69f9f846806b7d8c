"""Write a bound graph: tensors one at a time into the data file, then the graph that refers to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from loracle.files.safetensors_writer import write_array

from .matching import WeightSource, names_in_checkpoint
from .names import DATA_FILE, GRAPH_FILE
from .template import GraphTemplate

# A memory map starts at a page; onnxruntime maps external data whose offset is a multiple of this.
ALIGNMENT = 4096
_INLINE_BYTES = 1024

Progress = Callable[[int, int], None]


def _written(template: GraphTemplate) -> list[ir.Value]:
    """The initializers that go into the data file: all weights, and constants too large for the graph."""
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


def write_model(
    template: GraphTemplate, source: WeightSource, folder: Path, progress: Progress | None = None
) -> int:
    """Write `model.onnx_data`, then `model.onnx`, into `folder`; return the bytes of both.

    Each tensor is read, merged and written before the next is touched. The template is used up: its
    initializers refer to the file afterwards.
    """
    found = names_in_checkpoint(template, source)
    values = _written(template)
    total = sum(nbytes(value) for value in values)
    placed: list[tuple[ir.Value, int]] = []
    done = 0
    with open(folder / DATA_FILE, "wb") as data:
        for value in values:
            name = str(value.name)
            if name in found:
                tensor = source.tensor(found[name], template.dtype)
            else:
                assert value.const_value is not None
                tensor = value.const_value.numpy()
            data.write(b"\0" * (-data.tell() % ALIGNMENT))
            placed.append((value, data.tell()))
            write_array(data, tensor)
            done += tensor.nbytes
            if name in found:
                source.release(found[name])
            if progress is not None:
                progress(done, total)
    for value, offset in placed:
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            DATA_FILE,
            offset,
            nbytes(value),
            value.dtype,
            shape=value.shape,
            name=str(value.name),
            base_dir=folder,
        )
    ir.save(template.model, folder / GRAPH_FILE)
    return (folder / DATA_FILE).stat().st_size + (folder / GRAPH_FILE).stat().st_size
