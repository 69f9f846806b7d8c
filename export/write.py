"""Write a bound graph: tensors one at a time into the data file, then the graph that refers to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from loracle.files.safetensors_writer import write_array
from loracle.reference import ShapeError, TargetError

from .names import DATA_FILE, GRAPH_FILE
from .template import GraphTemplate

# A memory map starts at a page; onnxruntime maps external data whose offset is a multiple of this.
ALIGNMENT = 4096
_INLINE_BYTES = 1024

Progress = Callable[[int, int], None]


class WeightSource(Protocol):
    """What the graph's weights are read from, one tensor at a time (`loracle.files.MergedWeights`)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str, dtype: Any = None) -> np.ndarray[Any, Any]: ...

    def release(self, name: str) -> None: ...


def checkpoint_name(template: GraphTemplate, weight: str, source: WeightSource) -> str:
    """The name under which `source` holds `weight` or a weight tied to it.

    Raises:
        TargetError: none of its names is there. ShapeError: the shape differs from the graph's.
    """
    available = set(source.names)
    held = [alias for alias in template.aliases[weight] if alias in available]
    if not held:
        raise TargetError(
            f"{weight}: expected in the checkpoint, found none of {', '.join(template.aliases[weight])}; "
            "config.json and the weights belong to different models"
        )
    expected = template.model.graph.initializers[weight].shape
    assert expected is not None
    for name in held:
        if tuple(source.shape(name)) != tuple(expected.numpy()):
            raise ShapeError(
                f"{name}: expected shape {tuple(expected.numpy())} as config.json has it, "
                f"got {source.shape(name)}"
            )
    if len(held) > 1:
        first = source.tensor(held[0])
        for other in held[1:]:
            if not np.array_equal(first.view(np.uint8), source.tensor(other).view(np.uint8)):
                raise TargetError(
                    f"{other}: config.json ties it to {held[0]}, but the checkpoint holds different values; "
                    "set tie_word_embeddings to false if they are meant to differ"
                )
    return held[0]


def names_in_checkpoint(template: GraphTemplate, source: WeightSource) -> dict[str, str]:
    """For each weight of the graph its name in `source`; every tensor of `source` must be used.

    Raises TargetError or ShapeError, naming the tensor, before anything is written.
    """
    found = {weight: checkpoint_name(template, weight, source) for weight in template.aliases}
    known = {alias for group in template.aliases.values() for alias in group}
    unused = [name for name in source.names if name not in known]
    if unused:
        raise TargetError(
            f"{unused[0]}: in the checkpoint, but the graph has no such weight; "
            "config.json and the weights belong to different models"
        )
    return found


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
