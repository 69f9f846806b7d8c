"""Linear layers that read one input, such as query, key and value: their products are computed at once."""

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .function import lora_products

if TYPE_CHECKING:
    from .linear import LoraLinear


class Sharing(Protocol):
    """Whoever may know a layer's output before the layer has computed it."""

    def take(self, layer: "LoraLinear", x: Tensor) -> Tensor | None:
        """Return the layer's output for x, or None for it to compute that by itself."""


class _Pending(NamedTuple):
    """What the first layer's call has computed for all, and the input that it is for."""

    x: Tensor
    version: int
    outputs: dict[int, Tensor]


class SharedInput:
    """Layers that have been seen to get the very same tensor, one after the other.

    Called apart, each of them reads x for its down-projection, and forms a gradient of x of its own for
    autograd to add up. Computed by one `lora_products` x is read once and its gradients are added in place.
    When the first layer is called the outputs of all are computed; the others take theirs if their input is
    the same object, unmodified. As soon as it is not, sharing ends for good.

    Not used under ``torch.compile``, which sees the whole graph, nor without gradients, nor where a layer
    has hooks, or weights that are sharded or elsewhere.
    """

    def __init__(self, layers: Sequence["LoraLinear"]) -> None:
        self._layers = tuple(layers)
        self._pending: _Pending | None = None
        self._ended = False

    def take(self, layer: "LoraLinear", x: Tensor) -> Tensor | None:
        """See `Sharing.take`."""
        if self._ended or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        at = next(at for at, own in enumerate(self._layers) if own is layer)
        if at == 0:
            # What an earlier round has left over, as when a recomputation stops early, is of no use any more.
            self._pending = self._computed(x)
        pending = self._pending
        if pending is None or at not in pending.outputs:
            return None
        if pending.x is not x or pending.version != x._version:
            self._ended, self._pending = True, None
            return None
        output = pending.outputs.pop(at)
        if not pending.outputs:
            self._pending = None
        return output

    def _computed(self, x: Tensor) -> _Pending | None:
        if not all(_is_plain(layer, x) for layer in self._layers):
            return None
        members = [layer.member() for layer in self._layers]
        terms = [term for at, layer in enumerate(self._layers) for term in layer.terms(at, x)]
        return _Pending(x, x._version, dict(enumerate(lora_products(x, members, terms))))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed in between: a graph can't be copied."""
        return {**self.__dict__, "_pending": None}


class SiblingWatch:
    """Sees which of a module's layers get the same tensor, and lets those share it from then on.

    Nothing is assumed of names or order: for one round of calls each layer's input is compared with the one
    before, and runs of at least two layers with the very same input become a `SharedInput`.
    """

    def __init__(self) -> None:
        self._runs: list[list[LoraLinear]] = []
        self._last: weakref.ref[Tensor] | None = None

    def take(self, layer: "LoraLinear", x: Tensor) -> Tensor | None:
        """Note the call; see `Sharing.take`."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _in_backward():
            return None
        if any(layer is known for run in self._runs for known in run):
            self._decide()
            return None if layer.sharing is None else layer.sharing.take(layer, x)
        if self._last is not None and self._last() is x:
            self._runs[-1].append(layer)
        else:
            self._runs.append([layer])
            self._last = weakref.ref(x)
        return None

    def _decide(self) -> None:
        for run in self._runs:
            shared = SharedInput(run) if len(run) > 1 else None
            for layer in run:
                layer.sharing = shared
        self._runs, self._last = [], None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what has been seen: a weak reference can't be copied."""
        return {"_runs": [], "_last": None}


def watch_siblings(layers: Iterable[tuple[str, "LoraLinear"]]) -> None:
    """Let layers, given with their paths, share inputs with those in the same module, once seen to."""
    watches: dict[str, SiblingWatch] = {}
    for path, layer in layers:
        layer.sharing = watches.setdefault(path.rpartition(".")[0], SiblingWatch())


def _in_backward() -> bool:
    """Whether a backward pass is running: then calls recompute a forward pass, and must do what that did."""
    return torch._C._current_graph_task_id() != -1


def _is_plain(layer: "LoraLinear", x: Tensor) -> bool:
    """Whether calling the layer comes to its products and nothing else."""
    weight = layer.weight
    return (
        not layer.merged
        and layer.is_low_rank
        and weight.device == x.device
        and not isinstance(weight, DTensor)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer.base_layer._forward_hooks or layer.base_layer._forward_pre_hooks)
    )
