"""onnxruntime's fused operators, emitted at trace time in place of a transformers decoder's modules.

The traced model computes what the original does; only the spelling differs, so that no pattern matching
over the finished graph is needed:

* `nn.Linear`   -> `com.microsoft.FusedMatMul(x, W, transB=1)`: W stays (out, in), as the checkpoint stores it
* RMS norm      -> `SimplifiedLayerNormalization(x, weight)`
* attention     -> `com.microsoft.GroupQueryAttention` with rotary embedding and cache append inside
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from loracle.reference import TargetError

ATTENTION = "loracle_group_query_attention"


class FusedLinear(nn.Module):
    """`x W^T + b`, x (..., in), W (out, in), b (out,) or None."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.onnx.ops.symbolic(
            "com.microsoft::FusedMatMul",
            (x, self.weight),
            {"transB": 1},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.weight.shape[0]),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class FusedRMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in float32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",
            (x, self.weight),
            {"axis": -1, "epsilon": self.eps, "stash_type": 1},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


@dataclass
class FusedCache(Cache):  # type: ignore[misc]
    """Stands for transformers' cache while tracing: hands keys and values through, since the attention
    operator appends to the past itself, and collects the `present` outputs layer by layer."""

    past: list[torch.Tensor]
    last_position: torch.Tensor
    total_length: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, query: Any, *_: Any, **__: Any) -> tuple[int, int]:
        return (query.shape[0] if isinstance(query, torch.Tensor) else query), 0


_cache_being_traced: FusedCache | None = None


def _group_query_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    cache = _cache_being_traced
    if cache is None:
        raise RuntimeError("attention called outside `tracing_with`")
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    past_key, past_value = cache.past[2 * layer], cache.past[2 * layer + 1]

    def packed(t: torch.Tensor, n: int) -> torch.Tensor:
        return t.transpose(1, 2).reshape(batch, length, n * width)

    y, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (
            packed(query, heads),
            packed(key, kv_heads),
            packed(value, kv_heads),
            past_key,
            past_value,
            cache.last_position,
            cache.total_length,
            cache.cos,
            cache.sin,
        ),
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": float(width**-0.5 if scaling is None else scaling),
            "do_rotary": 1,
        },
        dtypes=(query.dtype, past_key.dtype, past_value.dtype),
        shapes=((batch, length, heads * width), past_key.shape, past_value.shape),
        version=1,
    )
    cache.present[layer] = (present_key, present_value)
    return y.reshape(batch, length, heads, width), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers."""
    AttentionInterface.register(ATTENTION, _group_query_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


@contextmanager
def tracing_with(cache: FusedCache) -> Iterator[None]:
    """The cache whose buffers the attention operators of the model now being traced read."""
    global _cache_being_traced
    _cache_being_traced = cache
    try:
        yield
    finally:
        _cache_being_traced = None


@contextmanager
def rotary_inside_attention(attention: nn.Module) -> Iterator[list[int]]:
    """Within the block the modelling file's `apply_rotary_pos_emb` hands query and key through unrotated,
    for the attention operator rotates them. Yields a list that gets one entry per call."""
    modeling = sys.modules[type(attention).__module__]
    if not hasattr(modeling, "apply_rotary_pos_emb"):
        raise TargetError(
            f"{type(attention).__name__}: expected a module-level apply_rotary_pos_emb, found none; "
            "this architecture cannot be exported with fused attention"
        )
    calls: list[int] = []
    original = modeling.apply_rotary_pos_emb

    def unrotated(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return q, k

    modeling.apply_rotary_pos_emb = unrotated  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        modeling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]


def fuse_modules(model: nn.Module) -> None:
    """Replace every `nn.Linear` and every RMS norm of `model`, in place, by the fused forms above."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            fused: nn.Module = FusedLinear(module)
        elif type(module).__name__.endswith("RMSNorm"):
            fused = FusedRMSNorm(module.weight, float(module.variance_epsilon))
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fused)
