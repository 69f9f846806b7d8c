"""Attention as onnxruntime's fused operators, given to transformers as an attention implementation.

* with a key-value cache -> `com.microsoft.GroupQueryAttention`, which rotates query and key, appends to the
  cache in place, and knows sliding windows and soft caps;
* without one -> `com.microsoft.MultiHeadAttention` with the padding mask as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from loracle.reference import TargetError

from .rotary import Tables

ATTENTION = "loracle_fused_attention"

_GROUP_QUERY_BIAS = 10
"""Where `GroupQueryAttention` has its bias among the inputs."""


class TracedCache(Cache):  # type: ignore[misc]
    """Stands for transformers' cache while tracing.

    Attributes:
        length: how many tokens the model is to take as cached.
    """

    length: Any

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        """Return `length`."""
        return self.length

    def get_query_offset(self, *_: Any, **__: Any) -> Any:
        """Return `length`."""
        return self.length


@dataclass
class FusedCache(TracedCache):
    """Stands for transformers' cache while tracing: hands keys and values through, since the attention
    operator appends to the past itself, and collects the `present` outputs layer by layer.

    Attributes:
        past: key and value of each layer, (batch, kv_heads, past length, head size), alternating; None
            where nothing is cached.
        last_position: (batch,) int32, how many tokens each row will have, less one.
        total_length: (1,) int32, the mask's length.
        length: how many tokens the model is to take as cached: none where it is given positions.
    """

    past: list[torch.Tensor] | None
    last_position: torch.Tensor
    total_length: torch.Tensor
    length: Any = 0
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand through."""
        return key_states, value_states

    def get_mask_sizes(self, query: Any, *_: Any, **__: Any) -> tuple[int, int]:
        """Tell that the keys are the query's own."""
        return (query.shape[0] if isinstance(query, torch.Tensor) else query), 0


@dataclass
class _Trace:
    cache: FusedCache | None
    tables: Tables | None = None


_being_traced: _Trace | None = None


@contextmanager
def tracing_with(cache: FusedCache | None) -> Iterator[None]:
    """Within the block attention is that of a model whose cache, or none, is given."""
    global _being_traced
    _being_traced = _Trace(cache)
    try:
        yield
    finally:
        _being_traced = None


def rotate_next(tables: Tables) -> None:
    """Let the next attention rotate its query and key by these tables."""
    assert _being_traced is not None
    _being_traced.tables = tables


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if _being_traced is None:
        raise RuntimeError("attention called outside `tracing_with`")
    batch, heads, length, width = query.shape
    scale = float(width**-0.5 if scaling is None else scaling)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    tables, _being_traced.tables = _being_traced.tables, None
    if _being_traced.cache is not None and causal:
        y = _group_query(
            _being_traced.cache,
            int(module.layer_idx),
            (query, key, value),
            tables,
            scale,
            sliding_window,
            softcap,
            position_bias,
        )
    else:
        if sliding_window is not None or softcap is not None:
            raise TargetError(
                f"{type(module).__name__}: expected neither a sliding window nor a soft cap without a cache, "
                "got one; this architecture cannot be exported with this head"
            )
        assert tables is None
        # T5's attention to the encoder's states has no relative positions: what it is given are zeros.
        bias = None if _being_traced.cache is not None else position_bias
        y = _multi_head((query, key, value), attention_mask, bias, scale, causal)
    return y.reshape(batch, length, heads, width), None


def _packed(t: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, width) as (batch, length, heads * width)."""
    batch, heads, length, width = t.shape
    return t.transpose(1, 2).reshape(batch, length, heads * width)


def _group_query(
    cache: FusedCache,
    layer: int,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tables: Tables | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:
    query, key, _ = states
    batch, heads, length, width = query.shape
    past: list[torch.Tensor | None] = [None, None]
    present_shape: Any = key.shape
    if cache.past is not None:
        past = list(cache.past[2 * layer : 2 * layer + 2])
        present_shape = cache.past[2 * layer].shape
    inputs = [*map(_packed, states), *past, cache.last_position, cache.total_length]
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": scale,
        "do_rotary": int(tables is not None),
    }
    if tables is not None:
        inputs += tables
    if position_bias is not None:
        inputs += [None] * (_GROUP_QUERY_BIAS - len(inputs)) + [position_bias]
    if sliding_window is not None:
        attributes["local_window_size"] = int(sliding_window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    y, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=(query.dtype, key.dtype, key.dtype),
        shapes=((batch, length, heads * width), present_shape, present_shape),
        version=1,
    )
    cache.present[layer] = (present_key, present_value)
    return y


def _multi_head(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    query, key, value = states
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    inputs = [*map(_packed, (query, key, value)), None, None if mask is None else mask.to(torch.int32)]
    if position_bias is not None:
        inputs.append(position_bias)
    while inputs[-1] is None:
        inputs.pop()
    y: torch.Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        {"num_heads": heads, "scale": scale, "unidirectional": int(causal)},
        dtype=query.dtype,
        shape=(batch, length, heads * width),
        version=1,
    )
    return y


def _padding_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """Return the padding mask (batch, length) as it is: whether attention is causal is said to the operator,
    and beside a cache the lengths are."""
    return attention_mask


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _padding_mask)
