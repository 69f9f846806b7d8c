"""A checkpoint's tensors under the names that they have in the merged model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import FileError

from .architectures import Experts, architecture_of
from .checkpoint import Tensors
from .tensor_names import TensorNames


class BaseTensors:
    """What a merge starts from.

    Args:
        checkpoint: open for as long as tensors are read.
        sources: the merged model's names to the checkpoint's; the checkpoint's own for None.

    Attributes:
        names: in the order of ``sources``, or of the checkpoint.
        tied: whether input and output embeddings are one tensor; never so where ``sources`` are those of a
            class with a head of its own.
        experts: how the weights of a mixture's experts are named; empty for other models.
    """

    def __init__(self, checkpoint: Tensors, sources: Mapping[str, str] | None = None) -> None:
        self._checkpoint = checkpoint
        self._sources = (
            dict(zip(checkpoint.names, checkpoint.names, strict=True)) if sources is None else sources
        )
        self.names: tuple[str, ...] = tuple(self._sources)
        self.tied: bool = sources is None and checkpoint.tied
        architecture = architecture_of(checkpoint.config)
        self.experts: Experts = {} if architecture is None else architecture.experts
        self._found = TensorNames(self.names, architecture)
        self._others: Mapping[str, NDArray[Any]] = {}

    def replace(self, others: Mapping[str, NDArray[Any]]) -> None:
        """Start from other values, of any shape, for some tensors; their dtypes stay the checkpoint's."""
        self._others = dict(others)

    def find(self, name: str) -> str:
        """Return the name here of the tensor that an adapter calls ``name``; ``name`` where there is none."""
        return self._found.find(name) or name

    def source(self, name: str) -> str:
        """Return the checkpoint's name of a tensor. Raises: FileError, if there is none."""
        if name not in self._sources:
            raise FileError(f"{self._checkpoint.dir}: has no tensor {name}; is this the right model?")
        return self._sources[name]

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape."""
        if name in self._others:
            return self._others[name].shape
        return self._checkpoint.shape(self.source(name))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the tensor's dtype as stored."""
        return self._checkpoint.dtype(self.source(name))

    def tensor(self, name: str) -> NDArray[Any]:
        """Return the tensor: a read-only array over the mapped file, no copy; or what takes its place."""
        if name in self._others:
            return self._others[name]
        return self._checkpoint.tensor(self.source(name))

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process's memory; arrays handed out stay valid."""
        self._checkpoint.release(self.source(name))
