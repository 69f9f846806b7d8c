"""The weights of a deployed model, one at a time: a checkpoint's tensors, some with an adapter merged in."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loracle.reference import DTypeError, NonFiniteError, TargetError, merge, round_to

from .adapter import FLOATS, Adapter, LoraPair
from .checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Checkpoint, is_module

BLOCK_BYTES = 16 * 2**20
"""Bytes of float64 that the conversion of one tensor works on at a time."""


class MergedWeights:
    """``W0 + scaling * B @ A`` for each weight that the adapter has a pair for, other tensors as they are.

    Nothing is computed before it is asked for, and nothing is kept: each call reads the mapped checkpoint.

    Args:
        checkpoint: the base model, open for as long as weights are read.
        adapter: None leaves every tensor as it is.
        threads: for each merge; one per CPU by default.

    Raises:
        TargetError: a pair finds no weight of its shape, or the weight is tied to another one, so that a
            merge would change both. The message names the tensor and both shapes.
        DTypeError: a pair's weight is not a floating-point tensor, as in a quantised checkpoint.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter | None = None, *, threads: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.adapter = adapter
        self._threads = threads
        self._pairs: dict[str, LoraPair] = {}
        for path, pair in adapter.pairs.items() if adapter is not None else ():
            _check_target(checkpoint, path, pair)
            self._pairs[f"{path}.weight"] = pair
        self.names: tuple[str, ...] = checkpoint.names
        self.merged_names: tuple[str, ...] = tuple(name for name in self.names if name in self._pairs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape; merging keeps it."""
        return self.checkpoint.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the tensor's dtype in the checkpoint, which its merge has unless another is asked for."""
        return self.checkpoint.dtype(name)

    def tensor(self, name: str, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return the whole tensor, each entry rounded once from its exact value.

        Args:
            name: of a tensor in the checkpoint.
            dtype: float16, bfloat16, float32 or float64, for a floating-point tensor; its own by default.

        Returns:
            A read-only view of the mapped file where neither merge nor conversion is due; else a new array.

        Raises:
            FileError: there is no such tensor.
            DTypeError: a conversion from or to a dtype that is none of the four.
            NonFiniteError: NaN or infinity among the inputs of a merge, or a finite value becomes
                infinite. An infinity or NaN of a tensor without a pair stays what it is.
        """
        return self._compute(name, self.checkpoint.tensor(name), self._pairs.get(name), dtype, name)

    def release(self, name: str) -> None:
        """Let go of the memory that the mapped tensor takes; reading it again brings it back."""
        self.checkpoint.release(name)

    def rows(self, name: str, start: int, stop: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return ``tensor(name, dtype)[start:stop]`` without computing the rest; the same bits."""
        pair = self._pairs.get(name)
        if pair is not None:
            pair = LoraPair(pair.A, pair.B[start:stop], pair.scaling)
        base = self.checkpoint.tensor(name)[start:stop]
        whole = base.shape[0] == self.shape(name)[0]
        return self._compute(name, base, pair, dtype, name if whole else f"{name}[{start}:{stop}]")

    def _compute(
        self, name: str, base: NDArray[Any], pair: LoraPair | None, dtype: DTypeLike | None, label: str
    ) -> NDArray[Any]:
        target = base.dtype if dtype is None else np.dtype(dtype)
        if pair is not None:
            return merge(base, pair.A, pair.B, pair.scaling, dtype=target, threads=self._threads, name=label)
        return base if target == base.dtype else _convert(base, target, label)


def _convert(base: NDArray[Any], target: np.dtype[Any], label: str) -> NDArray[Any]:
    if base.dtype not in FLOATS or target not in FLOATS:
        raise DTypeError(
            f"{label}: cannot be converted from {base.dtype} to {target}; leave its dtype as it is"
        )
    result = np.empty(base.shape, target)
    source, sink = base.reshape(-1), result.reshape(-1)
    step = BLOCK_BYTES // 8
    for start in range(0, source.size, step):
        block = source[start : start + step]
        rounded = round_to(block, target)
        overflown = np.isinf(rounded) & np.isfinite(block)
        if overflown.any():
            index = np.unravel_index(start + int(overflown.argmax()), base.shape)
            value = float(block[int(overflown.argmax())])
            raise NonFiniteError(
                f"{label}: {value} at {tuple(map(int, index))} overflows {target}; choose a wider dtype"
            )
        sink[start : start + step] = rounded
    return result


def _check_target(checkpoint: Checkpoint, path: str, pair: LoraPair) -> None:
    name = f"{path}.weight"
    tied = checkpoint.tied and is_module(name, INPUT_EMBEDDINGS + OUTPUT_EMBEDDINGS)
    if tied:
        raise TargetError(
            f"{name}: input and output embeddings of this model are one tensor, so merging into {path} would "
            f"change both; train the adapter without {path}"
        )
    if name not in checkpoint:
        raise TargetError(
            f"{name}: the model has no such tensor, the adapter has a pair for shape {pair.shape}; "
            f"is this adapter for another model?"
        )
    if checkpoint.shape(name) != pair.shape:
        raise TargetError(
            f"{name}: the model's shape is {checkpoint.shape(name)}, the adapter's {pair.shape}; "
            f"is this adapter for another model?"
        )
    if checkpoint.dtype(name) not in FLOATS:
        raise DTypeError(
            f"{name}: expected a floating-point weight to merge into, got {checkpoint.dtype(name)}; "
            f"use the checkpoint before quantisation"
        )
