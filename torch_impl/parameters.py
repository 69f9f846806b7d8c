"""`LoraParameters`: a module with low-rank updates of parameters that it reads, as stacked experts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import (
    LowRank,
    ShapeError,
    expert_factors_from_peft,
    merge_adapters,
    merge_experts,
)

from .arrays import array_of
from .plain_starts import plain_update
from .read_weights import LoraModule, LoraWeight, add_product
from .update import LoraUpdate, UpdateOptions


class StackShape(NamedTuple):
    """What a parameter's axes are.

    Attributes:
        experts: how many matrices there are; 1 for a parameter that is one.
        inputs, outputs: of each.
        turned: whether they are stored (in, out).
    """

    experts: int
    inputs: int
    outputs: int
    turned: bool

    @staticmethod
    def of(module: nn.Module, name: str) -> "StackShape":
        """Return the shape of a module's parameter.

        Raises:
            ShapeError: it has neither two nor three axes.
        """
        shape = tuple(getattr(module, name).shape)
        if len(shape) == 2:
            return StackShape(1, shape[1], shape[0], False)
        if len(shape) != 3:
            raise ShapeError(
                f"{name}: expected a parameter (out, in), or a stack of such, got shape {shape}; leave it "
                "out of target_parameters"
            )
        turned = bool(getattr(module, "is_transposed", False))
        experts, first, last = shape
        return StackShape(experts, *((first, last) if turned else (last, first)), turned)

    def factors(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of lora_A and lora_B, as PEFT has them."""
        return (self.experts * r, self.inputs), (self.outputs, self.experts * r)


class LoraParameter(LoraWeight):
    """The updates of a parameter: ``W0[e] + scaling * lora_B[e] lora_A[e]`` for each of E stacked matrices.

    lora_A is (E * r, in), the r rows of a matrix next to one another; lora_B (out, E * r), the E columns of a
    rank next to one another: PEFT's layout. A matrix (out, in) is a stack of one. Whether a stack is (E, out,
    in) or (E, in, out) is what its module's attribute ``is_transposed`` says, as transformers has it.

    Args:
        base_layer: the module that holds the parameter.
        name: of the parameter.

    Source: PEFT 0.21.2, ``lora.ParamWrapper``.
    """

    kind = "parameter"

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.shape = StackShape.of(base_layer, name)

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter; see `loracle.torch_impl.plain_starts.plain_update`."""
        return plain_update(self.base_weight, self.shape.factors(options.r), options, generator, self.kind)

    def added(self, weight: Tensor, update: LoraUpdate, *, in_place: bool) -> Tensor:
        """See `LoraWeight.added`."""
        A, B = (factor.to(weight.dtype) for factor in (update.lora_A, update.lora_B))
        if weight.dim() == 2:
            return add_product(weight, B, A, update.scaling, in_place=in_place)
        experts = self.shape.experts
        A = A.view(experts, -1, self.shape.inputs)
        B = B.view(self.shape.outputs, -1, experts).permute(2, 0, 1)
        left, right = (A.mT, B.mT) if self.shape.turned else (B, A)
        if in_place:
            return weight.baddbmm_(left, right, alpha=update.scaling)
        return weight.baddbmm(left, right, alpha=update.scaling)

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """See `LoraLayer.merged_arrays`."""
        W0 = array_of(self.base_weight)
        adapters = [self.low_rank(name) for name in names]
        if W0.ndim == 2:
            return {self.name: merge_adapters(W0, adapters, name=label)}
        return {self.name: merge_experts(W0, adapters, fan_in_fan_out=self.shape.turned, name=label)}

    def low_rank(self, name: str) -> LowRank:
        """Return the named adapter's update, of a stack A (E, r, in) and B (E, out, r)."""
        update = self.update(name)
        A, B = array_of(update.lora_A), array_of(update.lora_B)
        if self.base_weight.dim() == 3:
            A, B = expert_factors_from_peft(A, B, self.shape.experts)
        return LowRank(A, B, update.scaling)


class LoraParameters(LoraModule):
    """A module with updates of parameters that it reads: one wrapper, where PEFT nests one for each."""

    def attach(self, layer: LoraParameter) -> None:
        """Take up the layer of one more parameter, in the order of the module's own."""
        layers = {**dict(self._weights()), layer.name: layer}
        self.lora_weights.clear()
        for name, _ in self.base_layer.named_parameters(recurse=False):
            if name in layers:
                self.lora_weights[name] = layers[name]


def parameter_shapes(module: nn.Module, name: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of lora_A and lora_B for a module's parameter."""
    return StackShape.of(module, name).factors(r)
