"""The softmax of rows of logits, their loss, and the error in place, in Triton: one program a row.

torch's operations pass some ten times over the logits, in float32; here they are read twice and written
once, in their own dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import launching_at

BLOCK = 8192
"""Logits at a time; a row of fewer is one block."""


def softmax_errors(
    z: Tensor, targets: Tensor, fraction: Tensor, losses: Tensor, *, write: bool, block: int = BLOCK
) -> None:
    """Write ``losses = log sum exp(z) - z[target]`` and, with ``write``, over z its error.

    That is ``(softmax(z) - onehot(target)) / fraction``, rounded once, to z's dtype. All is computed in
    float32; the sum of a row's exponentials is kept beside the largest logit so far, and rescaled with it.
    Nothing waits for the device.

    Args:
        z: (rows, V), contiguous, of at least one row; float32, bfloat16 or float16.
        targets: (rows,) int64, in [0, V).
        fraction: one float32 number, on the device.
        losses: (rows, 1) float32.
        write: whether the errors are wanted; z is left as it is otherwise.
        block: logits at a time, a power of 2.
    """
    rows, vocabulary = z.shape
    size = min(block, triton.next_power_of_2(vocabulary))
    with launching_at(z):
        _softmax_errors[(rows,)](
            z,
            targets,
            fraction,
            losses,
            vocabulary,
            WRITE=write,
            BLOCK=size,
            num_warps=16 if size > 2048 else 4,
            enable_fp_fusion=True,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_errors(  # type: ignore[no-untyped-def]
    z, targets, fraction, losses, vocabulary, WRITE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    row = z + i * vocabulary
    target = tl.load(targets + i)
    # The lowest number, not -inf: a block of -inf is subtracted from it.
    top = -3.4028234663852886e38
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        j = start + tl.arange(0, BLOCK)
        own = tl.load(row + j, mask=j < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(own, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(own - higher), axis=0)
        top = higher
    of_target = tl.load(row + target).to(tl.float32) - top
    tl.store(losses + i, tl.log(total) - of_target)
    if WRITE:
        part = tl.load(fraction)
        scale = 1.0 / (total * part)
        one = 1.0 / part
        for start in range(0, vocabulary, BLOCK):
            j = start + tl.arange(0, BLOCK)
            own = tl.load(row + j, mask=j < vocabulary, other=float("-inf")).to(tl.float32)
            error = tl.exp(own - top) * scale - tl.where(j == target, one, 0.0)
            tl.store(row + j, error.to(z.dtype.element_ty), mask=j < vocabulary)
