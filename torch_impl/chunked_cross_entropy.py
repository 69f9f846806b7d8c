"""The cross-entropy of a linear output layer, a chunk of rows at a time: all logits never exist at once."""

from typing import Any

import torch
from torch import Tensor

from loracle.reference import ConfigError, DataError, DTypeError, ShapeError, TargetError

from .encoding import IGNORED
from .function_rules import compute_dtype
from .triton_kernels import has_triton

CPU_CHUNK_BYTES = 64 * 2**20
"""What a chunk takes on the CPU by default: some 340 rows of 50,000 logits in float32. With a quarter of that
both products run at half their speed; beyond it they gain nothing."""

CPU_BLOCK_BYTES = 2**20
"""What the exponentials of 16-bit logits take on the CPU: as many rows at a time stay in the cache."""

DEVICE_CHUNK_BYTES = 512 * 2**20
"""What a chunk takes elsewhere by default. Each chunk reads the weight twice, and a GPU does some 300
operations a byte it reads: this is 700 rows of 128,000 logits."""

OFF = "turn chunked_loss off"


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    divisor: Tensor | float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return ``sum_i (log sum_v exp(z[i, v]) - z[i, targets[i]]) / divisor``, in nats.

    z is ``hidden weight^T + bias``. The sum is over the rows whose target is not `IGNORED`; the others do not
    enter any product. Where ``hidden`` needs a gradient, that is computed along with the loss,
    ``(softmax(z) - onehot) weight / divisor``, and the backward pass only scales it. Differentiating twice is
    refused. No rows at all give NaN, 0 / 0, as torch's cross-entropy does.

    Memory beside the arguments, with N rows, V the vocabulary and s the bytes of the dtype of the products:
    ``rows * V * b`` for a chunk, N d s for the gradient, and V d s where autocast has to cast the weight.
    b is 4 in float32 and 8 in float64; in 16 bits 2 where a kernel is used, 2 on the CPU, and
    `CPU_BLOCK_BYTES` once, and 2 + 4 elsewhere; rows is ``chunk_bytes / (V b)``, but at least 1. The kernel,
    `softmax_kernel`, is for CUDA where Triton is, but not for float64.

    Args:
        hidden: (N, d).
        weight: (V, d), frozen.
        targets: (N,) int64, in [0, V) or `IGNORED`.
        bias: (V,), frozen, or None.
        divisor: a number above 0; the number of rows that are not ignored when None.
        chunk_bytes: see above; by default `CPU_CHUNK_BYTES` or `DEVICE_CHUNK_BYTES`.

    Products are computed in `compute_dtype(hidden)`, as ``F.linear`` does under autocast, and softmax in
    float32 at least. So is the loss. The gradient has the dtype of ``hidden``.

    Raises:
        ShapeError: the shapes do not fit.
        DTypeError: hidden and weight differ in dtype without autocast, or targets are not int64.
        TargetError: weight or bias requires a gradient, which it would not get.
        DataError: a target is no row of the weight.
        ConfigError: ``chunk_bytes`` is below 1; in the backward pass, ``create_graph=True``.
    """
    _check_shapes(hidden, weight, targets, bias)
    dtype = compute_dtype(hidden)
    if weight.dtype is not hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise DTypeError(
            f"hidden: expected the weight's {weight.dtype}, got {hidden.dtype}; "
            "cast one of them, or run under torch.autocast"
        )
    if targets.dtype is not torch.int64:
        raise DTypeError(f"targets: expected torch.int64, got {targets.dtype}; cast them")
    grad = torch.is_grad_enabled()
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise TargetError(
            f"weight: expected a frozen output head, got requires_grad=True; {OFF} to train the head"
        )
    size = checked_chunk_bytes(chunk_bytes, hidden.device)
    if divisor is None:
        divisor = (targets != IGNORED).sum()
    number = torch.as_tensor(divisor, device=hidden.device).to(_wide(dtype)).reshape(())
    needs_gradient = grad and hidden.requires_grad
    loss: Tensor = _operator(hidden, weight, bias, targets, number, dtype, size, needs_gradient)[0]
    return loss


def _loss_and_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor,
    dtype: torch.dtype,
    chunk_bytes: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient times the second factor of `_split`, (N, d) in ``dtype``."""
    wide, device, vocabulary = _wide(dtype), hidden.device, len(weight)
    at = (targets != IGNORED).nonzero().squeeze(1)
    wanted = targets[at]
    _check_targets(wanted, vocabulary)
    kernel = dtype is not torch.float64 and has_triton(device)
    # In 16 bits torch's exponentials need room of their own: for the whole chunk where every call is costly.
    in_place = dtype is wide or kernel
    in_blocks = not in_place and device.type == "cpu"
    entry = dtype.itemsize + (0 if in_place or in_blocks else wide.itemsize)
    rows = _rows(len(at), chunk_bytes // (vocabulary * entry))
    block = max(1, CPU_BLOCK_BYTES // (vocabulary * wide.itemsize)) if in_blocks else rows
    losses = torch.empty(len(at), 1, dtype=wide, device=device)
    shape = hidden.shape if needs_gradient else (0, hidden.shape[1])
    gradient = torch.zeros(shape, dtype=dtype, device=device)
    fraction, _ = _split(divisor, dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    # Made once: to map and zero new pages for every chunk takes as long as a pass over it.
    logits = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    exponents = logits if in_place else torch.empty_like(logits[:block], dtype=wide)
    for start in range(0, len(at), rows):
        part = slice(start, min(start + rows, len(at)))
        x, target = hidden[at[part]].to(dtype), wanted[part, None]
        z = logits[: len(x)]
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        total: Tensor | None = None
        if kernel:
            from .softmax_kernel import softmax_errors

            softmax_errors(z, wanted[part], fraction, losses[part], write=needs_gradient)
        elif dtype is wide:
            losses[part], total = _exponentiate(z, target, z)
            if needs_gradient:
                # softmax is z / total; to divide the product of d columns instead saves a pass over V.
                z.scatter_add_(1, target, -total)
        else:
            for first in range(0, len(x), block):
                own = slice(first, first + block)
                e = exponents[: len(z[own])]
                losses[part][own], sums = _exponentiate(z[own], target[own], e)
                if needs_gradient:
                    e.mul_((sums * fraction).reciprocal_())
                    e.scatter_add_(1, target[own], -fraction.reciprocal().expand_as(sums))
                    z[own] = e
        if needs_gradient:
            product = torch.mm(z, weight)
            gradient[at[part]] = product if total is None else product.div_(total)
    return losses.sum() / divisor, gradient


def _exponentiate(z: Tensor, target: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``exp(z - max z)`` to ``out``, which may be z; return each row's loss and the sum of these."""
    top = z.amax(1, keepdim=True)
    if out is not z:
        out.copy_(z)
    out.sub_(top)
    of_target = out.gather(1, target)
    total = out.exp_().sum(1, keepdim=True)
    return total.log() - of_target, total


def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor,
    dtype: torch.dtype,
    chunk_bytes: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    shape = hidden.shape if needs_gradient else (0, hidden.shape[1])
    return divisor.new_empty(()), hidden.new_empty(shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, _, _, _, divisor, dtype, _, _ = inputs
    ctx.dtype = hidden.dtype
    _, rest = _split(divisor, dtype)
    ctx.save_for_backward(output[1], rest)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise ConfigError(
            f"chunked loss: expected to be differentiated once, got create_graph=True; {OFF} for that"
        )
    gradient, rest = ctx.saved_tensors
    dhidden = (gradient.to(rest.dtype) * (dloss / rest)).to(ctx.dtype)
    return dhidden, *[None] * 7


# An operator, not an autograd function: torch.compile takes it whole, for any number of rows and chunks.
_operator = torch.library.custom_op(
    "loracle::chunked_cross_entropy",
    _loss_and_gradient,
    mutates_args=(),
    # What it allocates depends on how many targets are ignored.
    tags=(torch.Tag.cudagraph_unsafe,),
)
_operator.register_fake(_shapes)
_operator.register_autograd(_backward, setup_context=_keep)


def _split(divisor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two factors of ``divisor``: what the kept gradient is divided by, and what is left.

    A gradient of 16 bits is divided by all but a power of two before it is rounded, so that the backward
    pass does not round again; by no more, so that float16 keeps its small numbers for the loss scale.
    """
    if dtype is divisor.dtype:
        return torch.ones_like(divisor), divisor
    fraction, exponent = torch.frexp(divisor)
    return fraction, torch.ldexp(torch.ones_like(divisor), exponent)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return what softmax is computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _rows(count: int, most: int) -> int:
    """Return how many of ``count`` rows a chunk has: at most ``most``, but at least 1.

    All chunks are nearly equal: a short last one would read the whole weight for a few rows.
    """
    chunks = max(1, -(-count // max(1, most)))
    return max(1, -(-count // chunks))


def checked_chunk_bytes(given: int | None, device: torch.device) -> int:
    """Return ``given`` or the default of a device; see `chunked_cross_entropy`."""
    if given is None:
        return CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ConfigError(f"chunk_bytes: expected an integer of at least 1, got {given!r}; give the bytes")
    return given


def _check_targets(wanted: Tensor, vocabulary: int) -> None:
    if not len(wanted):
        return
    least, most = map(int, wanted.aminmax())
    if least < 0 or most >= vocabulary:
        raise DataError(
            f"targets: expected tokens below the vocabulary of {vocabulary}, or {IGNORED}, got "
            f"{least if least < 0 else most}; check that labels and model have one tokenizer"
        )


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ShapeError(f"weight: expected (V, d), got shape {tuple(weight.shape)}; give the head's weight")
    expected: list[tuple[str, tuple[int, ...], Tensor | None]] = [
        ("hidden", (*hidden.shape[:1], weight.shape[1]), hidden),
        ("targets", tuple(hidden.shape[:1]), targets),
        ("bias", (weight.shape[0],), bias),
    ]
    for name, shape, tensor in expected:
        if tensor is not None and (tensor.dim() == 0 or tuple(tensor.shape) != shape):
            raise ShapeError(
                f"{name}: expected shape {shape} beside a weight of shape {tuple(weight.shape)}, "
                f"got {tuple(tensor.shape)}; flatten batch and length into one axis"
            )
