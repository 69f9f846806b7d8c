"""The unmerged model in float64, and the noise that rounding in another precision puts on its logits.

Numeric contract, clause 7: noise of the size that `product_noise` gives each matrix product is added at the
products' outputs, several times with different seeds; the largest deviation of the logits, times a stated
factor, is the tolerance for a model evaluated in that precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.masking_utils import eager_mask

from loracle.files import Adapter
from loracle.reference import ConfigError, product_noise, unit_roundoff
from loracle.torch_impl.adapter_io import load_adapter
from loracle.torch_impl.linear import LoraLinear
from loracle.torch_impl.loading import quiet_transformers

#: The tolerance is this many times the largest deviation sampled: the maximum of a few draws lies below the
#: maximum over all draws, and roundings outside the matrix products are not sampled. It can be small, for
#: `product_noise` takes every rounding of a product at its largest size.
FACTOR = 2.0
SAMPLES = 4

_ATTENTION = "loracle_float64"


class RoundingNoise:
    """Noise at the outputs of a model's matrix products, in the order in which they are computed.

    While *measuring*, each product's standard deviation is recorded and nothing is added; while *drawing*,
    normal noise of the recorded deviations is added; otherwise products pass.
    """

    def __init__(self) -> None:
        self._stored = self._accumulated = 0.0
        self._deviations: list[torch.Tensor] | None = None
        self._next: int | None = None
        self._generator = torch.Generator()

    def measure(self, stored: float, accumulated: float) -> None:
        """Record from now on, for products whose operands and results are stored with unit roundoff `stored`
        and whose terms are summed with unit roundoff `accumulated`."""
        self._stored, self._accumulated = stored, accumulated
        self._deviations, self._next = [], None

    def draw(self, seed: int) -> None:
        """Add noise from now on, from the first product again."""
        self._generator.manual_seed(seed)
        self._next = 0

    def apply(self, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """`y`, the product `x @ w^T` of x (..., n, k) and w (..., m, k), with what is due added."""
        if self._deviations is None:
            return y
        if self._next is None:
            energy = torch.sqrt((x * x) @ (w * w).transpose(-1, -2))  # ||x * w||_2 of each output
            noise = product_noise(x.shape[-1], self._accumulated, energy.numpy())
            # Each entry of w was rounded once, and so is the result: half an ulp at most, evenly spread.
            rounded = (energy.square() + y.square()) * (self._stored**2 / 3)
            self._deviations.append(torch.sqrt(torch.from_numpy(np.square(noise)) + rounded))
            return y
        deviation = self._deviations[self._next]
        self._next += 1
        return y + deviation * torch.randn(y.shape, generator=self._generator, dtype=y.dtype)


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
    noise: RoundingNoise = module.rounding_noise  # type: ignore[assignment]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = noise.apply(query @ key.transpose(-1, -2), query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, -1)
    y = noise.apply(weights @ value, weights, value.transpose(-1, -2))
    return y.transpose(1, 2).contiguous(), None


class _RMSNorm(nn.Module):
    """RMS norm wholly in float64 (transformers' own computes in float32)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


@dataclass(frozen=True)
class Truth:
    """Float64 logits of the unmerged model (n, vocabulary), and how far rounding was seen to move them."""

    logits: np.ndarray[Any, Any]
    deviation: float

    @property
    def tolerance(self) -> float:
        return FACTOR * self.deviation


class Float64Model:
    """The transformers model of `model_dir` with `adapter` beside its weights, unmerged, in float64.

    Args:
        model_dir: transformers folder; its weights are widened, exactly.
        adapter: None for the base model alone.
    """

    def __init__(self, model_dir: str | Path, adapter: Adapter | None) -> None:
        transformers.AttentionInterface.register(_ATTENTION, _attention)
        transformers.AttentionMaskInterface.register(_ATTENTION, eager_mask)
        with quiet_transformers():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.float64, attn_implementation=_ATTENTION, local_files_only=True
            )
        if adapter is not None:
            load_adapter(model, adapter)
        model.double().eval()
        self._model: Any = model
        self._noise = RoundingNoise()
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, leaf = name.rpartition(".")
                norm = _RMSNorm(module.weight, module.variance_epsilon)
                setattr(model.get_submodule(parent), leaf, norm)
            elif type(module).__name__.endswith("Attention"):
                module.rounding_noise = self._noise
        adapted = {id(module.base_layer) for module in model.modules() if isinstance(module, LoraLinear)}
        for module in model.modules():
            # An adapted layer is one product, of the merged weight, in the model that is judged.
            if isinstance(module, (LoraLinear, nn.Linear)) and id(module) not in adapted:
                module.register_forward_hook(self._add_noise)

    def _add_noise(
        self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        for update in module.updates if isinstance(module, LoraLinear) else ():
            A, B = update.matrices()
            weight = weight + update.scaling * (B @ A)
        return self._noise.apply(output, inputs[0], weight)

    @torch.no_grad()
    def evaluate(
        self,
        sequences: Sequence[Sequence[int]],
        dtype: np.dtype[Any],
        *,
        samples: int = SAMPLES,
        seed: int = 0,
    ) -> list[Truth]:
        """The logits of each sequence, and the largest deviation that `samples` draws of rounding cause
        anywhere in them, for a model stored in `dtype`. Terms are summed in float32, as kernels for float16
        do too.

        Raises ConfigError for fewer than one sample.
        """
        if samples < 1:
            raise ConfigError(f"samples: expected at least 1, got {samples}")
        lengths = [len(sequence) for sequence in sequences]
        # Padding on the right changes nothing before it: attention is causal.
        tokens = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(list(sequence))
        noise = self._noise
        noise.measure(unit_roundoff(dtype), unit_roundoff(np.float32))
        exact = self._model(input_ids=tokens, use_cache=False).logits
        deviations = [0.0] * len(sequences)
        for sample in range(samples):
            noise.draw(seed + sample)
            gap = (self._model(input_ids=tokens, use_cache=False).logits - exact).abs()
            for row, length in enumerate(lengths):
                deviations[row] = max(deviations[row], float(gap[row, :length].max()))
        return [
            Truth(exact[row, :length].numpy(), deviation)
            for row, (length, deviation) in enumerate(zip(lengths, deviations, strict=True))
        ]
