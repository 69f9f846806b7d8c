"""The weights of a deployed model, one at a time: a checkpoint's tensors, some with an adapter merged in."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .adapter import Adapter
from .checkpoint import Checkpoint
from .plan import plan_replacements, plan_updates
from .updates import Update, convert


class MergedWeights:
    """The model that an adapter makes of a checkpoint, tensor by tensor: each entry is rounded once.

    A weight with a pair is ``W0 + scaling * B @ A``, with DoRA its rows rescaled to their magnitudes; a bias
    gets ``scaling`` times lora_B's. A whole tensor of the adapter, a trained bias or a module saved whole,
    takes the place of the checkpoint's, and trained tokens' rows those of the embedding. Other tensors stay
    as they are.

    Nothing is computed before it is asked for, and nothing is kept: each call reads the mapped checkpoint.

    Args:
        checkpoint: the base model, open for as long as weights are read.
        adapter: None leaves every tensor as it is.
        threads: for each merge; one per CPU by default.

    Raises:
        TargetError, ShapeError: a tensor of the adapter finds none of its shape, or one that is tied to
            another, so that a merge would change both. The message names the tensor and both shapes.
        TargetError: the files do not say how a weight is stored, or it cannot be merged a few rows at a time
            (DoRA on an embedding).
        ConfigError: a stacked parameter has no name yet; see `name_parameters`.
        DTypeError: a pair's weight is not a floating-point tensor, as in a quantised checkpoint.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter | None = None, *, threads: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.adapter = adapter
        self._threads = threads
        self._updates: dict[str, Update] = {} if adapter is None else plan_updates(checkpoint, adapter)
        self._replaced = {} if adapter is None else plan_replacements(checkpoint, adapter)
        self.names: tuple[str, ...] = checkpoint.names
        changed = self._updates.keys() | self._replaced.keys()
        self.merged_names: tuple[str, ...] = tuple(name for name in self.names if name in changed)

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
            A read-only view of the mapped file where neither merge nor conversion is due; else a new array,
            or the adapter's own where that takes the tensor's place in its dtype.

        Raises:
            FileError: there is no such tensor.
            DTypeError: a conversion from or to a dtype that is none of the four.
            NonFiniteError: NaN or infinity among the inputs of a merge, or a finite value becomes
                infinite. An infinity or NaN of a tensor that stays as it is stays what it is.
        """
        return self._compute(name, 0, self.shape(name)[0] if self.shape(name) else None, dtype)

    def release(self, name: str) -> None:
        """Let go of the memory that the mapped tensor takes; reading it again brings it back."""
        self.checkpoint.release(name)

    def rows(self, name: str, start: int, stop: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return ``tensor(name, dtype)[start:stop]`` without computing the rest; the same bits."""
        return self._compute(name, start, stop, dtype)

    def _compute(self, name: str, start: int, stop: int | None, dtype: DTypeLike | None) -> NDArray[Any]:
        whole = self.checkpoint.tensor(name)
        target = whole.dtype if dtype is None else np.dtype(dtype)
        whole = self._replaced.get(name, whole)
        base = whole if stop is None else whole[start:stop]
        label = name if base.shape == whole.shape else f"{name}[{start}:{stop}]"
        update = self._updates.get(name)
        if update is None:
            return convert(base, target, label)
        return update.rows(base, start, target, self._threads, label)
