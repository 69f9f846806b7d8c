"""Layers whose base layers hold one weight: one of them has the update, and the merged weight, for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.files import LoraPair
from loracle.reference import TargetError

from .layer import LoraLayer
from .update import LoraUpdate, UpdateOptions


class WeightOwner(LoraLayer):
    """A layer whose base layer's weight others may hold too; their adapters are those of this one.

    A merged weight is computed once, here, and is the one parameter of all of them, as W0 is.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # In a plain list, so that nn.Module does not register them within this layer.
        self._followers: list[WeightFollower] = []

    def lead(self, follower: "WeightFollower") -> None:
        """Let a layer have this one's merged weight.

        Raises:
            TargetError: its base layer holds another weight.
        """
        if follower.base_weight is not self.base_weight:
            raise TargetError(
                "base_layer: expected the weight of the layer that has the update, got another one; tie them"
            )
        if all(other is not follower for other in self._followers):
            self._followers.append(follower)

    def set_merged(self, parameters: Mapping[str, Tensor]) -> None:
        """See `LoraLayer.set_merged`; the layers that hold the weight too get the same parameter."""
        super().set_merged(parameters)
        merged = self.base_layer.weight
        assert isinstance(merged, nn.Parameter)
        for follower in self._followers:
            follower.take_merged(merged)


class WeightFollower(LoraLayer):
    """A layer that holds the weight of a `WeightOwner`: it has that one's adapters and merged weight."""

    def share(self, name: str, owner: WeightOwner) -> None:
        """Let this layer have the adapter that the owner has under ``name``; it is not active yet."""
        owner.lead(self)
        self.adapters[name] = self.shared(owner.adapters[name])

    def shared(self, update: nn.Module) -> nn.Module:
        """Return the owner's update as this kind of layer reads it, with the same parameters."""
        return update

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Raise TargetError: an update of its own would be a second one of the same weight."""
        raise TargetError(
            "base_layer: expected a weight of its own, got one whose update another layer has; share that one"
        )

    def fill(self, name: str, pair: LoraPair) -> None:
        """Do nothing: the owner is filled."""

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """Return nothing: the owner's merged weight is this layer's."""
        return {}

    def set_merged(self, parameters: Mapping[str, Tensor]) -> None:
        """See `LoraLayer.set_merged`; without parameters of its own the layer waits for the owner's."""
        if parameters:
            super().set_merged(parameters)

    def take_merged(self, merged: nn.Parameter) -> None:
        """Put the owner's merged weight in the base layer's place for its own, the same object."""
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        self._kept["weight"] = weight
        self.base_layer.weight = merged
