"""The weights of a deployed model, one at a time: a checkpoint's tensors, some with an adapter merged in."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .adapter import Adapter
from .base_tensors import BaseTensors
from .checkpoint import Tensors
from .experts import named_experts
from .heads import plan_head, weights_dtype, with_changes
from .plan import plan_replacements, plan_updates
from .targets import check_targets
from .updates import Update, convert
from .vocabulary import Vocabulary, plan_vocabulary


class MergedWeights:
    """The model that an adapter makes of a checkpoint, tensor by tensor: each entry is rounded once.

    A weight with a pair is ``W0 + scaling * B @ A``, with DoRA its rows rescaled to their magnitudes; a bias
    gets ``scaling`` times lora_B's. A whole tensor of the adapter, a trained bias or a module saved whole,
    takes the place of the checkpoint's, and trained tokens' rows those of the embedding. Other tensors stay
    as they are. Embeddings that the adapter brings with another number of tokens take the place of the
    checkpoint's before all this; an output layer that it has trained apart from the embedding that it was
    tied to comes last.

    The adapter's names may have or lack the prefix of the model's body, whatever the checkpoint has; the
    checkpoint's names are kept. But where the adapter brings a classifier's head, trained whole, the model is
    of the class with that head: its names are that class's, the head's tensors come last, and what only
    another head needs is left out.

    A mixture's experts may be stacked in the checkpoint and apart in the adapter, or the other way round.

    Nothing is computed before it is asked for, and nothing is kept: each call reads the mapped checkpoint.

    Args:
        checkpoint: the base model, open for as long as weights are read.
        adapter: None leaves every tensor as it is.
        threads: for each merge; one per CPU by default.

    Attributes:
        names: of all tensors, in the order of the checkpoint's.
        merged_names: of those that the adapter changes or brings, in the same order.
        shards: the checkpoint's file names to the names of the tensors that belong into each.
        threads: as given.
        config: the content of the model's ``config.json``.

    Raises:
        TargetError, ShapeError: a tensor of the adapter finds none of its shape, or one that is tied to
            another, so that a merge would change both. The message names the tensor and both shapes.
        TargetError: a layer is targeted as others are, and has no update.
        TargetError: the files do not say how a weight is stored, or it cannot be merged a few rows at a time
            (DoRA on an embedding); or a part of the head is neither in the checkpoint nor in the adapter.
        ConfigError: a stacked parameter has no name yet; see `name_parameters`.
        DTypeError: a pair's weight is not a floating-point tensor, as in a quantised checkpoint.
    """

    def __init__(
        self, checkpoint: Tensors, adapter: Adapter | None = None, *, threads: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.threads = threads
        head = None if adapter is None else plan_head(checkpoint, adapter)
        self._base = BaseTensors(checkpoint, None if head is None else head.sources)
        self._new: Mapping[str, NDArray[Any]] = {} if head is None else head.new
        self._new_dtype = weights_dtype(checkpoint)
        vocabulary = Vocabulary()
        if adapter is not None:
            adapter = named_experts(adapter, self._base.experts)
            vocabulary = plan_vocabulary(self._base, checkpoint.config, adapter)
            self._base.replace(vocabulary.tensors)
            self._new = {**self._new, **vocabulary.new}
        self._updates: dict[str, Update] = {} if adapter is None else plan_updates(self._base, adapter)
        if adapter is not None:
            check_targets(self._base, adapter, frozenset(self._updates))
        self._replaced: Mapping[str, NDArray[Any]] = (
            {} if adapter is None else {**plan_replacements(self._base, adapter, self._new), **self._new}
        )
        self.names: tuple[str, ...] = (
            *self._base.names,
            *(name for name in self._new if name not in self._base),
        )
        changed = self._updates.keys() | self._replaced.keys() | vocabulary.tensors.keys()
        self.merged_names: tuple[str, ...] = tuple(name for name in self.names if name in changed)
        self.shards: Mapping[str, tuple[str, ...]] = self._by_shard()
        changes = {**({} if head is None else head.config), **vocabulary.config}
        self.config: Mapping[str, Any] = with_changes(checkpoint.config, changes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape; merging keeps it, but a new head may have other outputs."""
        new = self._new.get(name)
        return self._base.shape(name) if new is None else new.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the tensor's dtype in the checkpoint, which its merge has unless another is asked for.

        What the checkpoint lacks has the dtype of most of its floating-point entries.
        """
        return self._base.dtype(name) if name in self._base or name not in self._new else self._new_dtype

    def tensor(self, name: str, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return the whole tensor, each entry rounded once from its exact value.

        Args:
            name: one of ``names``.
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

    def base_tensor(self, name: str, dtype: DTypeLike | None = None) -> NDArray[Any] | None:
        """Return what `tensor` would be without the adapter; None where the checkpoint has no such tensor.

        Raises what `tensor` does.
        """
        if name not in self._base and name in self._new:
            return None
        whole = self._base.tensor(name)
        return convert(whole, whole.dtype if dtype is None else np.dtype(dtype), name)

    def start(self, name: str) -> NDArray[Any]:
        """Return what `tensor` starts from, in its own dtype: the adapter's tensor where that takes the
        checkpoint's place, else the checkpoint's, mapped."""
        replaced = self._replaced.get(name)
        return self._base.tensor(name) if replaced is None else replaced

    def release(self, name: str) -> None:
        """Let go of the memory that the mapped tensor takes; reading it again brings it back."""
        if name in self._base or name not in self._new:
            self._base.release(name)

    def rows(self, name: str, start: int, stop: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return ``tensor(name, dtype)[start:stop]`` without computing the rest; the same bits."""
        return self._compute(name, start, stop, dtype)

    def update(self, name: str) -> Update | None:
        """Return what the adapter does to `start(name)`; None where that stays as it is."""
        return self._updates.get(name)

    def _compute(self, name: str, start: int, stop: int | None, dtype: DTypeLike | None) -> NDArray[Any]:
        target = self.dtype(name) if dtype is None else np.dtype(dtype)
        whole = self.start(name)
        base = whole if stop is None else whole[start:stop]
        label = name if base.shape == whole.shape else f"{name}[{start}:{stop}]"
        update = self._updates.get(name)
        if update is None:
            return convert(base, target, label)
        return update.rows(base, start, target, self.threads, label)

    def _by_shard(self) -> dict[str, tuple[str, ...]]:
        """Return the tensors of each file; what the checkpoint lacks belongs into the last."""
        home = {name: shard for shard, names in self.checkpoint.shards.items() for name in names}
        shards: dict[str, list[str]] = {shard: [] for shard in self.checkpoint.shards}
        last = next(reversed(shards))
        for name in self.names:
            shards[home[self._base.source(name)] if name in self._base else last].append(name)
        return {shard: tuple(names) for shard, names in shards.items() if names}
