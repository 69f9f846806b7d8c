"""Tensors that are trained whole beside an adapter: biases, and the modules of ``modules_to_save``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loracle.files import LoraConfig
from loracle.reference import TargetError

from .heads import HEADS
from .layer import LoraLayer


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor of the model is: an attribute of a module."""

    module: nn.Module
    attribute: str

    def get(self) -> Tensor:
        """Return the tensor that is there now."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Exchange the tensor that is there; parameters stay parameters and buffers buffers."""
        setattr(self.module, self.attribute, tensor)


@dataclass(frozen=True, eq=False)
class WholeTensor:
    """A tensor of the base model, and what one adapter has in its place.

    Attributes:
        places: where it is; several for a tied one.
        original: the base's own, kept for when the adapter is not active.
        trained: a copy that trains; a copy of a buffer follows the module's training instead.
    """

    places: tuple[Place, ...]
    original: Tensor
    trained: Tensor

    def put(self, *, trained: bool) -> None:
        """Put the adapter's tensor, or the base's own, in its places."""
        for place in self.places:
            place.put(self.trained if trained else self.original)


def whole_tensors(
    modules: Mapping[str, nn.Module], adapted: Iterable[str], config: LoraConfig
) -> dict[str, WholeTensor]:
    """Return copies of what ``bias`` and ``modules_to_save`` let train, by their names in the base model.

    Args:
        modules: the model's, by path, without anything injected.
        adapted: paths of the layers that have a low-rank update.
        config: ``bias`` "all" takes, as in PEFT, every parameter with "bias" in its name.

    Raises:
        TargetError: ``modules_to_save`` names no module, or one whose weight another module shares without
            ``ensure_weight_tying``.
    """
    adapted = set(adapted)
    places: dict[int, list[Place]] = {}
    names: dict[str, Place] = {}
    for path, module in modules.items():
        if isinstance(module, LoraLayer):
            continue
        for attribute, tensor in _own_tensors(module):
            name = f"{path}.{attribute}" if path else attribute
            place = Place(module, attribute)
            places.setdefault(id(tensor), []).append(place)
            if _trains(name, path, attribute, tensor, adapted, config):
                names[name] = place
    _check_saved(modules, config)
    found: dict[str, WholeTensor] = {}
    seen: set[int] = set()
    for name, place in names.items():
        original = place.get()
        own = places[id(original)]
        if id(original) in seen:
            continue
        seen.add(id(original))
        if len({id(place.module) for place in own}) > 1 and not config.ensure_weight_tying:
            raise TargetError(
                f"{name}: expected a tensor of its own to train, got one that another module shares; "
                "set ensure_weight_tying to train it for both"
            )
        copy = original.detach().clone()
        if isinstance(original, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=copy.is_floating_point())
        found[name] = WholeTensor(tuple(own), original, copy)
    return found


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [
        (name, buffer)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    return [*module.named_parameters(recurse=False), *buffers]


def _trains(
    name: str, path: str, attribute: str, tensor: Tensor, adapted: set[str], config: LoraConfig
) -> bool:
    if any(config.saves(outer) for outer in _outer(path)):
        return True
    if not isinstance(tensor, nn.Parameter):
        return False
    if config.bias == "all":
        return "bias" in name
    return config.bias == "lora_only" and path in adapted and attribute == "bias"


def _outer(path: str) -> list[str]:
    """Return the path and those of the modules it lies in."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)] if path else []


def _check_saved(modules: Mapping[str, nn.Module], config: LoraConfig) -> None:
    for name in config.modules_to_save or ():
        # PEFT names every head there may be.
        if name not in HEADS and not any(path.endswith(name) for path in modules):
            raise TargetError(
                f"modules_to_save: expected names of the model's modules, got {name!r}, which none has; "
                "correct it or leave it out"
            )


def trainable(tensors: Mapping[str, WholeTensor], on: bool) -> None:
    """Let the trained copies have gradients, or none."""
    for tensor in tensors.values():
        if isinstance(tensor.trained, nn.Parameter) and torch.is_floating_point(tensor.trained):
            tensor.trained.requires_grad_(on)
