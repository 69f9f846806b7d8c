"""The noise that rounding in a lower precision puts on the result of a matrix product or a convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from loracle.reference import TargetError, product_noise

_aten = torch.ops.aten

# Where the two operands stand among the arguments: what comes before them is added to their product.
_OPERANDS = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.addmm.default: 1,
    _aten.addmm_.default: 1,
    _aten.baddbmm.default: 1,
    _aten.baddbmm_.default: 1,
}
# Operators that multiply in a way that is not to be seen from here.
_OPAQUE = frozenset(f"aten::{name}" for name in ("addbmm", "addmv", "addmv_", "addr", "dot", "mv", "vdot"))
_OPAQUE_FAMILIES = (
    "aten::_addmm_activation",
    "aten::_flash_attention",
    "aten::_grouped_mm",
    "aten::_native_multi_head_attention",
    "aten::_scaled",
    "aten::_transformer_encoder_layer",
)


class Product(NamedTuple):
    """What is known of a product's rounding errors before its precision is.

    Attributes:
        terms: how many are summed for each output.
        energy: for each output, the sum of the squares of its terms; float32.
        onto_stored: whether the product is added to a tensor in place, which was rounded when it was stored.
    """

    terms: int
    energy: torch.Tensor
    onto_stored: bool


def product_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    """Return what an ATen operator multiplies, None where it is no product.

    Raises:
        TargetError: it is one whose operands are not to be seen.
    """
    start = _OPERANDS.get(func)
    if start is not None:
        x, w = args[start : start + 2]
        energy = (_squared(x) @ _squared(w)).mul_(kwargs.get("alpha", 1) ** 2)
        return Product(x.shape[-1], energy, func._schema.is_mutable and kwargs.get("beta", 1) != 0)
    if func is _aten.convolution.default:
        x, w, _, *geometry = args
        *_, transposed, _, groups = geometry
        outputs = w.shape[1] * groups if transposed else w.shape[0]
        energy = _aten.convolution(_squared(x), _squared(w), None, *geometry)
        return Product(w.numel() // outputs, energy, False)
    name = func._schema.name
    if name in _OPAQUE or name.startswith(_OPAQUE_FAMILIES):
        raise TargetError(
            f"{name}: expected products by mm, bmm and convolution, got an operator that hides "
            "its operands; evaluate the model with eager attention and eager experts"
        )
    return None


def _squared(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.float32, copy=True).square_()


class RoundingNoise:
    """Normal noise of the size of a product's rounding errors.

    Args:
        stored: unit roundoff of the operands and results as they are stored.
        accumulated: unit roundoff in which terms are multiplied and summed.
        seed: of the draws.
    """

    def __init__(self, stored: float, accumulated: float, seed: int) -> None:
        # Each entry of w was rounded once, and so is the result: half an ulp at most, evenly spread.
        self._stored = stored**2 / 3
        self._accumulated = accumulated
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, product: Product, y: torch.Tensor) -> torch.Tensor:
        """Return noise for the product's result y, in its shape, float32.

        Its variance is ``product_noise(k, accumulated, ||x * w||)^2 + (||x * w||^2 + y^2) stored^2 / 3`` for
        each output, without y^2 where y had been stored before the product was added to it.
        """
        summed = float(product_noise(product.terms, self._accumulated, 1.0)) ** 2
        variance = product.energy * (summed + self._stored)
        if not product.onto_stored:
            variance.add_(_squared(y), alpha=self._stored)
        noise = torch.randn(y.shape, generator=self._generator, dtype=torch.float32)
        return noise.mul_(variance.sqrt_())
