"""Do the ways of training compute the same thing? Their loss and gradients against float64.

Two layers of the seeded model are adapted with the same seeded factors, lora_B not zero, and differentiated
without dropout. The truth has no adapter layers: float64 weights ``W0 + scaling * B A``, differentiated by A
and B. (transformers' norms, softmax and loss compute in float32 there too: an error that all share.) No
a-priori bound is of use through whole layers, so the ways judge each other: an error may be at most `FACTOR`
times the largest of the others'. In float32 that catches a scaling that is off by 1 %; in bfloat16 the
rounding of whole layers is larger than that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .train_step_subjects import (
    ADAPTED,
    ALPHA_OVER_R,
    DTYPES,
    OUR_WAYS,
    Case,
    Subject,
    Workload,
    base_model,
    shared_copy,
)
from .train_step_subjects import subject as make

FACTOR = 4.0
Key = tuple[str, str]
Errors = dict[str, float]
"""Relative errors: of the loss, and the largest 2-norm among the gradients of lora_A and of lora_B."""


def fill_factors(subject: Subject) -> dict[Key, Tensor]:
    """Give the factors seeded values that bfloat16 holds, the same in every way; return them in float64."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for (path, kind), parameter in subject.factors().items():
        size = 0.05 if kind == "lora_B" else parameter.shape[1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator).mul_(size).bfloat16()
        parameter.data.copy_(drawn)
        values[path, kind] = drawn.double().to(parameter.device)
    return values


def true_gradients(
    base: Any, factors: Mapping[Key, Tensor], scaling: float, tokens: Tensor
) -> tuple[float, dict[Key, Tensor]]:
    """Loss and gradients by A and B of `base` with merged weights, in float64."""
    model = copy.deepcopy(base).double()
    leaves = {key: value.clone().requires_grad_(True) for key, value in factors.items()}
    weights = {
        f"{path}.weight": model.get_submodule(path).weight
        + scaling * (leaves[path, "lora_B"] @ leaves[path, "lora_A"])
        for path in dict.fromkeys(path for path, _ in leaves)
    }
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    loss = functional_call(model, weights, (), inputs).loss
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, gradients, strict=True))


def errors_of(subject: Subject, tokens: Tensor, truth: tuple[float, Mapping[Key, Tensor]]) -> Errors:
    """How far the subject's loss and gradients are from the truth; infinite where a factor has none.

    Raises SystemExit where the subject has other factors than the truth.
    """
    loss, gradients = truth
    own_loss = float(subject.differentiate(tokens))
    factors = subject.factors()
    if factors.keys() != gradients.keys():
        odd = sorted(factors.keys() ^ gradients.keys())
        raise SystemExit(f"{subject.name}: other factors than the rest, such as {'.'.join(odd[0])}")
    errors = {"loss": abs(own_loss - loss) / abs(loss), "lora_A": 0.0, "lora_B": 0.0}
    for key, true in gradients.items():
        own = factors[key].grad
        off = float("inf") if own is None else float((own.double() - true).norm() / true.norm())
        errors[key[1]] = max(errors[key[1]], off)
    return errors


def disagreements(errors: Mapping[str, Errors], dtype: torch.dtype) -> list[str]:
    """One line for each error above `FACTOR` times the largest of the other implementations'.

    One rounding counts as an error of theirs. Our ways do not excuse each other.
    """
    rounding = torch.finfo(dtype).eps / 2
    lines = []
    for name, own in errors.items():
        same = OUR_WAYS if name in OUR_WAYS else (name,)
        for what, error in own.items():
            others = max(other[what] for peer, other in errors.items() if peer not in same)
            limit = FACTOR * max(others, rounding)
            if not error <= limit:
                lines.append(f"{name}: {what} is off by {error:.1e}, the others allow {limit:.1e}")
    return lines


def parity(work: Workload, case: Case, names: Sequence[str] = ADAPTED) -> dict[str, Errors]:
    """The named ways' errors for the case, its dropout left out.

    Raises SystemExit where they do not compute the same.
    """
    small = replace(work, model=None, layers=2, batch=2, length=min(work.length, 32))
    base, case = base_model(small), replace(case, dropout=0.0)
    tokens = small.tokens(base.config.vocab_size)
    subjects = [make(name, shared_copy(base), case) for name in names]
    values = [fill_factors(subject) for subject in subjects]
    truth = true_gradients(base, values[0], float(ALPHA_OVER_R), tokens)
    errors = {subject.name: errors_of(subject, tokens, truth) for subject in subjects}
    if wrong := disagreements(errors, DTYPES[work.dtype]):
        raise SystemExit("\n".join([f"{work.dtype}, {case}: nothing to compare", *wrong]))
    return errors
