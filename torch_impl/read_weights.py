"""Updates of weights that a module reads by itself, where no layer of its own multiplies by them.

An ``nn.MultiheadAttention`` multiplies by its two matrices, a mixture of experts by its stacks of them, in a
way that only the module knows. So the module is called as it is, with ``W0 + scaling * B A`` in W0's place.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .layer import LoraLayer
from .update import LoraUpdate


class Place(NamedTuple):
    """Where a parameter is read from, and the tensor to be read there."""

    module: nn.Module
    name: str
    tensor: Tensor


class LoraWeight(LoraLayer):
    """The updates of one weight of a module that reads it by itself.

    It is never called: a `LoraModule`, which has the module, calls that one with `places`.

    Args:
        base_layer: the module that holds the weight.
        name: of the weight in it.
        bias_name: of the bias of the same outputs, which the bias of lora_B adds to; "" where there is none.
    """

    def __init__(self, base_layer: nn.Module, name: str, bias_name: str = "") -> None:
        super().__init__(base_layer)
        # The LoraModule has it registered: it is in the state, and among the modules, once.
        del self.base_layer
        self.__dict__["base_layer"] = base_layer
        self.name = name
        self.bias_name = bias_name

    @abstractmethod
    def added(self, weight: Tensor, update: LoraUpdate, *, in_place: bool) -> Tensor:
        """Return the weight with an update added, computed in the weight's dtype."""

    @property
    def base_weight(self) -> Tensor:
        """W0, merged or not."""
        return cast(Tensor, self._kept.get(self.name, getattr(self.base_layer, self.name)))

    @property
    def weight(self) -> Tensor:
        """What the module computes with: the weight it holds, with the active updates unless they are merged.

        A new tensor for each reading, differentiable in lora_A and lora_B.
        """
        weight: Tensor = getattr(self.base_layer, self.name)
        if self.merged:
            return weight
        # What is read keeps its dtype, whatever products are cast to later.
        with torch.autocast(weight.device.type, enabled=False):
            for number, update in enumerate(self.updates):
                weight = self.added(weight, update, in_place=number > 0)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """What the module computes with in the bias's place; see `weight`."""
        bias: Tensor | None = getattr(self.base_layer, self.bias_name) if self.bias_name else None
        if self.merged:
            return bias
        for update in self.updates:
            if update.lora_bias is not None:
                own = update.lora_bias.to(self.base_weight.dtype)
                bias = own * update.scaling if bias is None else torch.add(bias, own, alpha=update.scaling)
        return bias

    def places(self) -> list[Place]:
        """Return what the module is to read in its parameters' places; nothing where it has all it needs."""
        if self.merged or not self.updates:
            return []
        places = [Place(self.base_layer, self.name, self.weight)]
        if any(update.lora_bias is not None for update in self.updates):
            bias = self.bias
            assert bias is not None
            places.append(Place(self.base_layer, self.bias_name, bias))
        return places

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: the module that reads the weight is what is called."""
        raise NotImplementedError(f"{self.name} is read by its module; call that")


class LoraModule(nn.Module):
    """A frozen module that is called with updated weights in its own ones' places.

    For the duration of a call, and of no other thing, the module's parameters are exchanged for the tensors
    that its `LoraWeight` layers compute; whatever happens in the call, they come back. So a module serves one
    call at a time. Whoever reads an updated parameter of this module from outside, as torch's fast path of a
    transformer layer does, gets the updated tensor; other public attributes are the module's own.

    Args:
        base_layer: the module; it is kept as ``base_layer``, the same object.
        weights: its layers.
    """

    def __init__(self, base_layer: nn.Module, weights: Sequence[LoraWeight] = ()) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_weights = nn.ModuleDict({weight.name: weight for weight in weights})
        self.training = base_layer.training

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Return the layers by their paths from this module on."""
        return dict(self._weights())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; arguments and result are its own."""
        with _read([place for _, weight in self._weights() for place in weight.places()]):
            return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, with the updates in its parameters; see the class."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        for _, weight in self._weights():
            if weight.base_layer is self.base_layer and name in (weight.name, weight.bias_name):
                return weight.weight if name == weight.name else weight.bias
        return getattr(self.base_layer, name)

    def _weights(self) -> list[tuple[str, LoraWeight]]:
        return cast(list[tuple[str, LoraWeight]], list(self.lora_weights.items()))


def add_product(weight: Tensor, B: Tensor, A: Tensor, scaling: float, *, in_place: bool) -> Tensor:
    """Return ``weight + scaling * B A``, (out, in)."""
    return weight.addmm_(B, A, alpha=scaling) if in_place else weight.addmm(B, A, alpha=scaling)


@contextmanager
def _read(places: Sequence[Place]) -> Iterator[None]:
    """Let modules read tensors in their parameters' places, within a ``with`` block.

    torch.func.functional_call does that too, but not where a model is traced.
    """
    kept = [(module, name, module._parameters[name]) for module, name, _ in places]
    try:
        for module, name, tensor in places:
            module._parameters[name] = cast(nn.Parameter, tensor)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
