"""`LoraReadLinear`: an adapted linear layer of an ``nn.TransformerEncoderLayer``, which may pass it by."""

from typing import Any, cast

from torch import Tensor, nn

from loracle.reference import ShapeError

from .linear import LoraLinear


class _Guarded(Tensor):
    """A tensor that torch's fast path, which multiplies by weights as they are, leaves to the modules."""


class LoraReadLinear(LoraLinear):
    """A `LoraLinear` that torch does not pass by.

    In evaluation an ``nn.TransformerEncoderLayer`` reads ``linear1.weight`` and ``linear2.weight`` and calls
    a kernel for the whole layer, unless one of the tensors is of a class of its own. While updates count,
    ``weight`` is, and the linear layers are called. (PEFT's are passed by: in evaluation such a model is its
    base.)
    """

    @property
    def base_weight(self) -> Tensor:
        """W0, merged or not."""
        return cast(Tensor, self._kept.get("weight", self.base_layer.weight))

    @property
    def matrix(self) -> Tensor:
        """See `LoraLinear.matrix`."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, guarded where it is not all that counts."""
        weight = self.matrix
        return weight if self.merged or not self.updates else weight.detach().as_subclass(_Guarded)

    def forward(self, x: Tensor) -> Tensor:
        """See `LoraLinear.forward`.

        Raises:
            ShapeError: a nested tensor, which torch makes where the first layer has no updates here.
        """
        if x.is_nested and not self.merged and self.updates:
            raise ShapeError(
                "x: expected a padded tensor, got a nested one; build nn.TransformerEncoder with "
                "enable_nested_tensor=False, or adapt its first layer too"
            )
        return super().forward(x)


def is_read(outer: Any) -> bool:
    """Whether a module may read the weights of its linear layers and not call them."""
    return isinstance(outer, nn.TransformerEncoderLayer)
