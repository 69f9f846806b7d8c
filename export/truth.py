"""The unmerged model in float64, and the noise that rounding in another precision puts on its logits.

Numeric contract, clause 7: noise of the size that `product_noise` gives each matrix product is added at the
products' outputs, several times with different seeds; the largest deviation of the logits, times a stated
factor, is the tolerance for a model evaluated in that precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from loracle.files import Adapter
from loracle.reference import ConfigError, product_noise
from loracle.torch_impl import LoraLinear, load_adapter

_ATTENTION = "loracle_float64"

#: The tolerance is this many times the largest deviation sampled: the sampled maximum of a few draws lies
#: below the maximum over all draws, and roundings outside the matrix products are not sampled.
FACTOR = 4.0
SAMPLES = 4


@dataclass
class _Noise:
    """What the attention function and the hooks below add to the products' outputs; None adds nothing."""

    roundoff: float | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def add(self, y: torch.Tensor, length: int, energy: torch.Tensor) -> torch.Tensor:
        if self.roundoff is None:
            return y
        scale = torch.from_numpy(np.asarray(product_noise(length, self.roundoff, energy.numpy())))
        # The result is stored in the precision under test: half an ulp, evenly spread.
        stored = y.abs() * (self.roundoff / 3**0.5)
        deviation = torch.sqrt(scale**2 + stored**2)
        return y + deviation * torch.randn(y.shape, generator=self.generator, dtype=y.dtype)


_noise = _Noise()


def _energy(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`||x * w||_2` for each output of `x @ w^T`: x (..., n, k), w (..., m, k)."""
    return torch.sqrt((x * x) @ (w * w).transpose(-1, -2))


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention wholly in float64 (transformers' own computes the softmax in float32)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    width, length = query.shape[-1], key.shape[-2]
    scores = query @ key.transpose(-1, -2)
    scores = _noise.add(scores, width, _energy(query, key) if _noise.roundoff else scores)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, -1)
    columns = value.transpose(-1, -2)
    y = weights @ value
    y = _noise.add(y, length, _energy(weights, columns) if _noise.roundoff else y)
    return y.transpose(1, 2).contiguous(), None


class _RMSNorm(nn.Module):
    """RMS norm wholly in float64 (transformers' own computes in float32)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


def float64_model(model_dir: str | Path, adapter: Adapter | None) -> Any:
    """The transformers model of `model_dir` with `adapter` beside its weights, unmerged, in float64."""
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float64, attn_implementation=_ATTENTION, local_files_only=True
    )
    if adapter is not None:
        load_adapter(model, adapter)
    model.double().eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _RMSNorm(module.weight, module.variance_epsilon))
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, LoraLinear)}
    for module in model.modules():
        # An adapted layer is one product, of the merged weight, in the model that is judged.
        if isinstance(module, (LoraLinear, nn.Linear)) and id(module) not in inside:
            module.register_forward_hook(_add_noise)
    return model


def _add_noise(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    if _noise.roundoff is None:
        return output
    x = inputs[0]
    if isinstance(module, LoraLinear):
        weight = module.base_layer.weight + module.scaling * (module.lora_B @ module.lora_A)
    else:
        weight = module.weight  # type: ignore[assignment]
    return _noise.add(output, x.shape[-1], _energy(x, weight))


@dataclass(frozen=True)
class Truth:
    """Float64 logits of the unmerged model (n, vocabulary), and how far rounding may move them."""

    logits: np.ndarray[Any, Any]
    deviation: float

    @property
    def tolerance(self) -> float:
        return FACTOR * self.deviation


@torch.no_grad()
def evaluate(
    model: Any, ids: Sequence[int], roundoff: float, *, samples: int = SAMPLES, seed: int = 0
) -> Truth:
    """Logits of `float64_model` for one sequence, and the largest deviation that sampled rounding of unit
    roundoff `roundoff` causes anywhere in them.

    Raises ConfigError for fewer than one sample.
    """
    if samples < 1:
        raise ConfigError(f"samples: expected at least 1, got {samples}")
    tokens = torch.tensor([list(ids)])
    exact = model(input_ids=tokens, use_cache=False).logits[0]
    deviation = 0.0
    try:
        _noise.roundoff = roundoff
        for sample in range(samples):
            _noise.generator.manual_seed(seed + sample)
            noisy = model(input_ids=tokens, use_cache=False).logits[0]
            deviation = max(deviation, float((noisy - exact).abs().max()))
    finally:
        _noise.roundoff = None
    return Truth(exact.numpy(), deviation)
