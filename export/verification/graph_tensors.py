"""The tensors that anyone's graph holds, wherever they stand, and reading a few of their entries.

Data files may be of any size: a tensor is mapped, what is asked for copied, and the map given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from loracle.files.mapped_view import MappedView
from loracle.reference import FileError

Array = np.ndarray[Any, Any]

T = TypeVar("T")

_FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
MOVING = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that move or convert the entries of their first input."""


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A constant of a graph.

    Attributes:
        name: of the initializer or the output of the `Constant`; where another graph in the graph has the
            name too, with the number of that graph before it.
        tensor: its values.
        value: what the nodes use.
        order: the number of the first node that uses it, in the order of the graph.
    """

    name: str
    tensor: ir.TensorProtocol
    value: ir.Value
    order: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape.numpy())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether the entries are floating-point numbers that are no codes."""
        return self.tensor.dtype in _FLOATING

    def mapped(self, take: Callable[[Array], Array]) -> MappedView | None:
        """See `mapped_view`."""
        return mapped_view(self.tensor, take)

    def read(self, take: Callable[[Array], T]) -> T:
        """Return what `take` makes of the whole tensor, whatever it is but a view of it.

        Raises FileError: the tensor's data are not there, or do not fit its shape.
        """
        tensor = self.tensor
        mapped_here = isinstance(tensor, ir.ExternalTensor) and tensor.raw is None
        taken = take(whole(self.name, tensor))
        if mapped_here and isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        return taken


def whole(name: str, tensor: ir.TensorProtocol) -> Array:
    """Return a tensor's array, mapped where its data lie in a file.

    Raises FileError: the data are not there, or do not fit the tensor's shape.
    """
    with readable(name, tensor):
        array: Array = tensor.numpy()
    return array


def mapped_view(tensor: ir.TensorProtocol, take: Callable[[Array], Array]) -> MappedView | None:
    """Return where a view of a tensor lies in its data file; None where it lies in none, or is no view.

    Args:
        take: makes the view of the tensor's array; it gets one whose entries are not to be read.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    array = np.empty(shape, tensor.dtype.numpy())
    return MappedView.within(take(array), array, Path(tensor.path), tensor.offset or 0)


@contextmanager
def readable(name: str, tensor: ir.TensorProtocol) -> Iterator[None]:
    """Turn what reading a tensor's data may raise into a FileError that names it."""
    try:
        yield
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise FileError(f"{name}: expected a tensor of {tensor.shape} {tensor.dtype}: {error}") from error


def held_tensors(graph: ir.Graph) -> dict[str, HeldTensor]:
    """Return the initializers of a graph and of the graphs in its nodes, and the values of `Constant` nodes,
    by their names, in the order of their first use.

    What no node uses comes last.
    """
    first: dict[ir.Value, int] = {}
    constants: list[tuple[ir.Value, ir.TensorProtocol]] = []
    last = 0
    for last, node in enumerate(graph.all_nodes(), 1):
        for value in node.inputs:
            if value is not None:
                first.setdefault(value, last)
        tensor = node.attributes.get("value")
        if not node.outputs or tensor is None or tensor.is_ref() or node.op_type != "Constant":
            continue
        if tensor.type == ir.AttributeType.TENSOR:
            constants.append((node.outputs[0], tensor.as_tensor()))
    found: dict[str, HeldTensor] = {}
    for number, own in enumerate([graph, *graph.subgraphs()]):
        for name, value in own.initializers.items():
            if value.const_value is not None:
                _add(found, name, number, value, value.const_value, first.get(value, last + 1))
    for value, tensor in constants:
        _add(found, str(value.name), len(found), value, tensor, first.get(value, last + 1))
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def _add(
    found: dict[str, HeldTensor],
    name: str,
    number: int,
    value: ir.Value,
    tensor: ir.TensorProtocol,
    order: int,
) -> None:
    own = f"{number}:{name}" if name in found else name
    found[own] = HeldTensor(own, tensor, value, order)


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that a value is, or that nodes make it of which move or convert its entries; None
    where it is computed."""
    for origin in _origins(value):
        if origin.const_value is not None:
            return origin
        node = origin.producer()
        if node is not None and node.op_type == "Constant":
            return origin
    return None


def _origins(value: ir.Value | None) -> Iterator[ir.Value]:
    seen: set[ir.Value] = set()
    while value is not None and value not in seen:
        seen.add(value)
        yield value
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in MOVING and node.inputs else None
