"""`LoraQuantizedLinear`: low-rank updates beside a frozen linear layer whose weight is quantised."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import ConfigError, ShapeError, TargetError

from .dropout import SeededDropout
from .function_rules import compute_dtype, refuse_twice, scaled
from .layer import LoraLayer
from .quantization import dequantized, is_quantized
from .starts import linear_update
from .update import TAKEN_FROM_W0, LoraUpdate, UpdateOptions

_linear = nn.functional.linear


class LoraQuantizedLinear(LoraLayer):
    """``y = base(x) + sum over adapters of scaling * (dropout(x) lora_A^T + lora_bias) lora_B^T``.

    The quantised layer is called as it is, and gives its own share of the gradient of x. The update is
    computed in `compute_dtype(x)` and added to its output in place; ``lora_A`` (r, in) and ``lora_B`` (out,
    r) are float32. Kept for the gradients: x, and x A^T for each adapter.

    A merge needs a weight of floating-point numbers to be rounded to, and quantising again what has been
    merged would lose more than the update may be. So it is refused: merge into the checkpoint that was
    quantised, or `loracle.torch_impl.dequantize` the model first.

    Args:
        base_layer: bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, or of a class that has been registered
            with `loracle.torch_impl.quantization.register_quantized`.

    Raises:
        TargetError: another kind of layer.

    Source: QLoRA, arXiv 2305.14314, equation 5.
    """

    kind = "linear"

    def __init__(self, base_layer: nn.Module) -> None:
        if not is_quantized(base_layer):
            raise TargetError(
                f"base_layer: expected a quantised linear layer, got {type(base_layer).__name__}; "
                "use LoraLinear for others, or register_quantized() its class"
            )
        super().__init__(base_layer)
        if hasattr(base_layer, "support_avx512bf16_for_cpu"):
            # On such a CPU bitsandbytes 0.50 packs the weight in its first evaluation, approximates the
            # scales on the way back, and can't be trained through in between.
            setattr(base_layer, "support_avx512bf16_for_cpu", False)  # noqa: B010

    @property
    def in_features(self) -> int:
        """Length of x's last dimension."""
        return cast(int, self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        """Length of y's last dimension."""
        return cast(int, self.base_layer.out_features)

    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter; see `loracle.torch_impl.starts.linear_update`.

        A start that is a part of W0 is one of the dequantised weight.

        Raises:
            ConfigError: DoRA, whose norm is that of a weight in floating point.
        """
        if options.use_dora:
            raise ConfigError("use_dora: expected False for this layer, got True; it has no magnitude")
        device = self.weight.device
        if options.init in TAKEN_FROM_W0:
            W0 = dequantized(self.base_layer).to(device)
        else:
            # Of which only the shape counts.
            W0 = torch.zeros((), device=device).expand(self.out_features, self.in_features)
        bias = torch.zeros(self.out_features, device=device) if options.lora_bias else None
        return linear_update(W0, options, generator, lora_bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"x: expected (..., {self.in_features}), got {tuple(x.shape)}; give the layer's own input"
            )
        # As a matrix: the gradient that bitsandbytes gives a bias is right for matrices only.
        rows = x.reshape(-1, self.in_features)
        y: Tensor = self.base_layer(rows)
        for update in self.updates:
            y = _with_update(y, rows, update, self._draw(update, rows))
        return y.view(*x.shape[:-1], self.out_features)

    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """Refuse.

        Raises:
            TargetError: always; it names the two ways to merge.
        """
        raise TargetError(
            f"{label}: expected a weight in floating point to merge into, got the quantised one of "
            f"{type(self.base_layer).__name__}; merge into the checkpoint it was quantised from, with "
            "`loracle merge`, or dequantize(model) first"
        )


def _with_update(y: Tensor, x: Tensor, update: LoraUpdate, dropout: SeededDropout | Tensor | None) -> Tensor:
    """Return y, (N, out), with the update of x, (N, in), added in place."""
    given = dropout if isinstance(dropout, Tensor) else None
    seeded = dropout if isinstance(dropout, SeededDropout) else None
    operands = (y, x, *update.matrices(), update.lora_bias, given)
    result: Tensor = _Added.apply(update.scaling, seeded, compute_dtype(x), *operands)  # type: ignore[no-untyped-call]
    return result


class _Added(torch.autograd.Function):
    """``y + scaling * ((x * dropout) A^T) B^T + scaling * lora_bias``, added to y in place.

    With dh = dy B, the gradients are those of `loracle.reference.adapted_linear_backward`:

        dx = scaling * (dh A) * dropout,   dA = scaling * dh^T (x * dropout),   dB = scaling * dy^T (x A^T)
    """

    @staticmethod
    def forward(
        ctx: Any,
        scaling: float,
        seeded: SeededDropout | None,
        dtype: torch.dtype,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        lora_bias: Tensor | None,
        given: Tensor | None,
    ) -> Tensor:
        _, need_x, need_A, need_B, _, _ = ctx.needs_input_grad[3:]
        bias_dtype = None if lora_bias is None else lora_bias.dtype
        ctx.dtypes = (dtype, x.dtype, A.dtype, B.dtype, bias_dtype)
        x, A, B = (tensor.to(dtype) for tensor in (x, A, B))
        mask = given if seeded is None else seeded.mask(x, x.shape)
        factor = 1.0 if seeded is None else seeded.factor
        H = _linear(x if mask is None else x * mask, A)  # (N, r)
        if y.dtype is dtype:
            y.addmm_(H, B.t(), alpha=scaling * factor)
        else:
            y.add_(_linear(H, B), alpha=scaling * factor)
        if lora_bias is not None:
            y.add_(lora_bias.to(y.dtype), alpha=scaling)
        ctx.mark_dirty(y)
        down = need_x or need_A
        ctx.save_for_backward(
            x if need_A else None,
            A if need_x else None,
            B if down else None,
            H if need_B else None,
            given if down else None,
        )
        ctx.scaling, ctx.seeded, ctx.factor, ctx.shape = scaling, seeded, factor, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice("the LoRA product")
        _, need_x, need_A, need_B, need_bias, _ = ctx.needs_input_grad[3:]
        dtype, x_dtype, A_dtype, B_dtype, bias_dtype = ctx.dtypes
        x, A, B, H, given = ctx.saved_tensors
        scaling = ctx.scaling * ctx.factor
        dx = dA = dB = None
        # All operands have one dtype; an autocast that forward did not see must not change it.
        with torch.autocast(dy.device.type, enabled=False):
            own = dy.to(dtype)
            if need_x or need_A:
                mask = given if ctx.seeded is None else ctx.seeded.mask(own, ctx.shape)
                dH = _linear(own, B.t().contiguous())
                if need_x:
                    dx = scaled(dH @ A, scaling, x_dtype)
                    if mask is not None:
                        dx.mul_(mask)
                if need_A:
                    dA = scaled(dH.t() @ (x if mask is None else x * mask), scaling, A_dtype)
            if need_B:
                dB = scaled((H.t() @ own).t(), scaling, B_dtype)
            dbias = scaled(own.sum(0), ctx.scaling, bias_dtype) if need_bias else None
        return None, None, None, dy, dx, dA, dB, dbias, None
