"""Attention in operators of the ONNX standard, given to transformers as an attention implementation.

The cache grows by concatenation. Whom a token sees is counted by positions, which `attention_mask` tells,
and not by places in the cache: padding may lie on either side of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function

from loracle.reference import TargetError

from .attention import TracedCache

PLAIN_ATTENTION = "loracle_plain_attention"
MODELS_OWN = "eager"
"""The implementation of modelling code that computes attention by itself."""


@dataclass
class GrowingCache(TracedCache):
    """Keys and values of the tokens before, and of those and the new ones together.

    Attributes:
        past: key and value of each layer, (batch, kv_heads, past length, head size), alternating; None
            where nothing is cached.
        length: the past's.
        present: key and value of each layer, the new tokens' after the past ones.
    """

    past: list[torch.Tensor] | None
    length: Any
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer's past."""
        layer = int(layer_idx)
        if self.past is not None:
            key_states = torch.cat([self.past[2 * layer], key_states], 2)
            value_states = torch.cat([self.past[2 * layer + 1], value_states], 2)
        self.present[layer] = (key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query: Any, *_: Any, **__: Any) -> tuple[Any, int]:
        """Return the number of keys, and where they begin."""
        length = query.shape[0] if isinstance(query, torch.Tensor) else query
        return self.length + length, 0


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """How many tokens of the text come before each place of a mask (batch, length) of zeros and ones."""
    return (mask.to(torch.int64).cumsum(1) - 1).clamp(min=0)


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`softmax(cap(scale Q K^T) + mask) V`, (batch, length, heads, head size).

    Queries that share a key head are rows of one product, so keys and values are not repeated.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, kv_heads, total, head size).
        attention_mask: `plain_mask`'s; None where every token sees every other.

    Raises TargetError for what is not in the formula.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if s_aux is not None or (causal and attention_mask is None):
        missing = "attention sinks" if s_aux is not None else "causal attention without a mask"
        raise TargetError(
            f"{type(module).__name__}: expected plain attention, got {missing}; "
            "this architecture cannot be exported with --portable"
        )
    heads, width = query.shape[1], query.shape[3]
    query = query * float(width**-0.5 if scaling is None else scaling)
    scores = torch.matmul(_shared(query, key), key.transpose(2, 3))
    scores = _each(scores, heads)
    if softcap is not None:
        scores = torch.tanh(scores / float(softcap)) * float(softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    p = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    y = _each(torch.matmul(_shared(p, value), value), heads)
    return y.transpose(1, 2), None


def _shared(rows: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(batch, heads, n, m) as (batch, kv_heads, heads / kv_heads * n, m)."""
    batch, heads, length, width = rows.shape
    kv_heads = key.shape[1]
    if kv_heads == heads:
        return rows
    return rows.reshape(batch, kv_heads, heads // kv_heads * length, width)


def _each(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_shared`."""
    batch, kv_heads, length, width = rows.shape
    if kv_heads == heads:
        return rows
    return rows.reshape(batch, heads, length // (heads // kv_heads), width)


def plain_mask(
    batch_size: int,
    q_length: Any,
    kv_length: Any,
    *_: Any,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **__: Any,
) -> torch.Tensor | None:
    """What is added to the scores, (batch, 1, length, total): 0 where a token sees another, and half of the
    lowest number elsewhere, which a score cannot make infinite.

    Args:
        q_length, kv_length: of the new tokens, which are the last, and of all.
        mask_function: whether the token at a position sees that at another, by transformers' signature.
        attention_mask: (batch, total), whether there is a token; None where there is one everywhere.
        dtype: of the scores.
    """
    if attention_mask is None and mask_function is bidirectional_mask_function:
        return None
    at = torch.arange(kv_length)[None] if attention_mask is None else positions_of(attention_mask)
    allowed: torch.Tensor | None = None
    if mask_function is not bidirectional_mask_function:
        own = at.narrow(1, kv_length - q_length, q_length)
        # The row of the batch and the head: no mask of a text depends on them.
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
        allowed = mask_function(zero, zero, own[:, None, :, None], at[:, None, None, :])
    if attention_mask is not None:
        there = attention_mask[:, None, None, :].to(torch.bool)
        allowed = there if allowed is None else allowed & there
    assert allowed is not None
    low = torch.finfo(dtype).min / 2
    return torch.where(allowed, torch.zeros((), dtype=dtype), torch.full((), low, dtype=dtype))


@contextmanager
def plain_masks() -> Iterator[None]:
    """Within the block modelling code that computes attention by itself gets masks of `plain_mask`, too."""
    ALL_MASK_ATTENTION_FUNCTIONS[MODELS_OWN] = plain_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[MODELS_OWN]


def register_plain_attention() -> None:
    """Make `attn_implementation=PLAIN_ATTENTION` known to transformers."""
    AttentionInterface.register(PLAIN_ATTENTION, plain_attention)
    AttentionMaskInterface.register(PLAIN_ATTENTION, plain_mask)
