"""Inputs of a cross-entropy, and the bounds that its definition gives for its loss and gradient."""

import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import Precision, gamma
from loracle.reference.balls import Ball
from loracle.reference.softmax_bounds import EXP_ULPS, softmax_ball
from loracle.torch_impl.arrays import array_of
from loracle.torch_impl.chunked_cross_entropy import chunked_cross_entropy
from loracle.torch_impl.encoding import IGNORED

PRECISIONS = {
    torch.float64: Precision(np.float64),
    torch.float32: Precision(np.float32),
    torch.bfloat16: Precision(ml_dtypes.bfloat16, np.float32),
    torch.float16: Precision(np.float16, np.float32),
}
LEAST_BLOCK = 16
"""Of how many logits each block of a softmax that is rescaled has, at least: that of `softmax_ball`."""
UNITS = {dtype: torch.finfo(dtype).smallest_normal for dtype in PRECISIONS} | {torch.float16: 2.0**-24}
"""The absolute error of an underflow; in float16, which nobody flushes to zero, that of a subnormal."""


Array = NDArray[np.float64]
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A head's inputs, of which every third row is ignored."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    @property
    def kept(self) -> Tensor:
        return self.targets != IGNORED

    @property
    def count(self) -> int:
        return int(self.kept.sum())


def problem_of(seed: int, dtype: torch.dtype, *, bias: bool = False, rows: int = 23) -> Problem:
    """Gaussian numbers of the dtype; a few rows are sure of their target."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(37, 12, generator=generator)
    hidden = torch.randn(rows, 12, generator=generator)
    targets = torch.randint(0, 37, (rows,), generator=generator)
    hidden[:5] += 3 * weight[targets[:5]]
    targets[1::3] = IGNORED
    return Problem(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype),
        torch.randn(37, generator=generator).to(dtype) if bias else None,
        targets,
    )


def cast_to(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with its tensors rounded to a dtype."""
    bias = None if problem.bias is None else problem.bias.to(dtype)
    hidden = problem.hidden.detach().to(dtype).requires_grad_()
    return Problem(hidden, problem.weight.to(dtype), bias, problem.targets)


def run(problem: Problem, **options: Any) -> Result:
    """The loss and the gradient of ``hidden``, every chunk of two rows."""
    options = {"chunk_bytes": 2 * 37 * 8, "bias": problem.bias, **options}
    loss = chunked_cross_entropy(problem.hidden, problem.weight, problem.targets, **options)
    return loss.detach(), torch.autograd.grad(loss, problem.hidden)[0]


def in_float64(problem: Problem, divisor: float | None = None) -> Result:
    """The same by torch's cross-entropy and autograd."""
    hidden = problem.hidden.detach().double().requires_grad_()
    bias = None if problem.bias is None else problem.bias.double()
    logits = nn.functional.linear(hidden, problem.weight.double(), bias)
    total = nn.functional.cross_entropy(logits, problem.targets, reduction="sum", ignore_index=IGNORED)
    loss = total / (problem.count if divisor is None else divisor)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@dataclass(frozen=True)
class Bounds:
    """How far an evaluation in a dtype may be from the exact loss and the exact gradient."""

    loss: float
    gradient: Array


def bounds_of(problem: Problem, dtype: torch.dtype, divisor: float | None = None) -> Bounds:
    """Follow the definition on balls: the logits, their softmax, and the gradient's product with the weight.

    Logits, the logits' gradient and the product are rounded to ``dtype``; softmax, and all that the loss is
    made of, is computed in float32 at least. The factors 1 / total, 1 / divisor and the incoming gradient
    may be applied to any of these: they are among the five roundings of `Ball.scaled`.

    A row's loss is ``log sum exp(z - top) - (z_t - top)``. What moves every score by at most ``moved`` moves
    each of the two terms by as much: the error of the logits, a rounded argument ``z - top``, that times
    log2(e), a relative error of an exponential, each rescaling of the sum so far. The sum of V terms adds
    gamma_V, the logarithm some ulps of itself, the difference another; the mean one for each row and one
    for the division.
    """
    narrow, wide = PRECISIONS[dtype], PRECISIONS[torch.promote_types(dtype, torch.float32)]
    kept, divisor = problem.kept, problem.count if divisor is None else divisor

    def of(tensor: Tensor) -> Ball:
        return Ball.of(array_of(tensor.detach()), narrow, UNITS[dtype])

    weight = of(problem.weight)
    logits = of(problem.hidden[kept]) @ weight.map(np.transpose)
    if problem.bias is not None:
        logits = logits + of(problem.bias.expand(logits.shape))
    logits = replace(logits, precision=wide, unit=UNITS[torch.promote_types(dtype, torch.float32)])
    u, vocabulary = wide.form.unit_roundoff, logits.shape[1]
    function = gamma(2 * int(EXP_ULPS) + 1, u)
    gap = 2 * logits.reach.max(1)
    rescalings = math.ceil(vocabulary / LEAST_BLOCK) - 1
    moved = logits.radius.max(1) + 4 * u * gap + function * (1 + rescalings)
    value = gap + np.log(vocabulary)
    each = 2 * moved + gamma(vocabulary + 1 + 2 * rescalings, u)
    each += function * (value + each)
    loss = each.sum() + gamma(problem.count + 1, u) * (value + each).sum()
    onehot = np.eye(vocabulary)[problem.targets[kept].numpy()]
    probabilities = softmax_ball(logits, np.full(logits.shape, True), EXP_ULPS)
    errors = probabilities - replace(logits, centre=onehot, radius=np.zeros_like(onehot))
    stored = narrow.form.unit_roundoff * errors.reach + UNITS[dtype]
    errors = replace(errors, radius=errors.radius + stored, precision=narrow, unit=UNITS[dtype])
    gradient = np.zeros(problem.hidden.shape)
    gradient[kept.numpy()] = (errors @ weight).scaled(1.0 / divisor).bound
    return Bounds(float(loss / divisor), gradient)


def inside(problem: Problem, got: Result, truth: Result, divisor: float | None = None) -> tuple[bool, bool]:
    """Whether the loss, and every entry of the gradient, is where its dtype and the truth's bounds allow."""
    own = bounds_of(problem, problem.weight.dtype, divisor)
    exact = bounds_of(problem, torch.float64, divisor)
    loss, gradient = ((a.double() - b).abs().numpy() for a, b in zip(got, truth, strict=True))
    return bool(loss <= own.loss + exact.loss), bool((gradient <= own.gradient + exact.gradient).all())


def squared_errors_of_16_bits(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The summed squares of the errors of a gradient of 16 bits: ours, and that of logits in float32.

    The same roundings make the same errors, but for float32's; one more of the result adds a third.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(999, 64, generator=generator).to(dtype)
    targets = torch.randint(0, 999, (300,), generator=generator)
    hidden = torch.randn(300, 64, generator=generator) * 0.3 + weight[targets].float() * 0.2
    weight, targets = weight.to(device), targets.to(device)
    problem = Problem(hidden.to(device, dtype).requires_grad_(), weight, None, targets)
    logits = nn.functional.linear(problem.hidden, weight)
    own = nn.functional.cross_entropy(logits.float(), targets)
    gradients = run(problem)[1], torch.autograd.grad(own, problem.hidden)[0]
    # Of the logits as they are rounded: their error is larger than all others.
    onehot = nn.functional.one_hot(targets, 999)
    truth = (logits.detach().double().softmax(1) - onehot) @ weight.double() / 300
    ours, theirs = (float((gradient.double() - truth).square().sum()) for gradient in gradients)
    return ours, theirs
