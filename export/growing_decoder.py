"""A causal language model beside a cache that grows: `present = [past, new]`, in standard operators."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loracle.reference import ConfigError, TargetError

from .names import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    PAST_SEQUENCE,
    PRESENT_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
    past_names,
    present_names,
)
from .plain_attention import GrowingCache, plain_masks, positions_of
from .template import DecoderShape
from .wrappers import Shape, Traced

_POSITIONS = "position_ids"
_CACHE = "past_key_values"
# Configurations name the longest text differently; where biases are linear there need not be one.
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_CONTEXT = 2048
# Their modelling code reads positions from the mask instead of taking them.
_FROM_MASK = ("BloomForCausalLM",)


class GrowingDecoder(nn.Module):
    """A causal language model that is given positions, and keys and values of the tokens before.

    Padding may lie on either side, of the first tokens and of later ones.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._positioned = _POSITIONS in signature(model.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """Return logits, and key and value of each layer, the past's and the new tokens'.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, past length + length), column by column that of the cache.
            past: key and value of each layer; None for an empty cache.
        """
        length = input_ids.shape[1]
        before = 0 if past is None else past[0].shape[2]
        cache = GrowingCache(past, before)
        given = (
            {_POSITIONS: positions_of(attention_mask).narrow(1, before, length)} if self._positioned else {}
        )
        with plain_masks():
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **given,
            )
        return [out.logits] + [t for layer in range(len(cache.present)) for t in cache.present[layer]]


def growing_decoder(model: Any, config: Any, dtype: torch.dtype) -> Traced:
    """Return a causal language model with a cache that grows, ready to be traced.

    Raises:
        ConfigError: the modelling code has no such cache, or does not place padded texts by positions.
        TargetError: the layers' keys and values differ in their sizes.
    """
    _check_placed(model)
    layers, kv_heads, width = _cache_sizes(model)
    heads = int(_first(config, ("num_attention_heads", "n_head", "n_heads")) or kv_heads)
    hidden = int(model.get_input_embeddings().weight.shape[1])
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    batch, length, before = 2, 3, 8
    past = [torch.zeros(batch, kv_heads, before, width, dtype=dtype) for _ in range(2 * layers)]
    dynamic = torch.export.Dim.DYNAMIC
    ids = {0: dynamic, 1: dynamic}
    inputs: dict[str, Shape] = {INPUT_IDS: [BATCH, SEQUENCE], ATTENTION_MASK: [BATCH, TOTAL_SEQUENCE]}
    inputs |= {name: [BATCH, kv_heads, PAST_SEQUENCE, width] for name in past_names(layers)}
    outputs: dict[str, Shape] = {LOGITS: [BATCH, SEQUENCE, vocabulary]}
    outputs |= {name: [BATCH, kv_heads, PRESENT_SEQUENCE, width] for name in present_names(layers)}
    return Traced(
        GrowingDecoder(model),
        (
            torch.ones(batch, length, dtype=torch.int64),
            torch.ones(batch, before + length, dtype=torch.int64),
            past,
        ),
        (ids, ids, [{0: dynamic, 2: dynamic}] * (2 * layers)),
        inputs,
        outputs,
        shape=DecoderShape(
            layers,
            heads,
            kv_heads,
            width,
            hidden,
            vocabulary,
            int(_first(config, _CONTEXTS) or _CONTEXT),
        ),
    )


def _first(config: Any, names: tuple[str, ...]) -> Any:
    """Return the first attribute that a configuration has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _check_placed(model: Any) -> None:
    """Raise ConfigError unless the modelling code has a cache, and counts places by positions."""
    kind = type(model).__name__
    accepted = signature(model.forward).parameters
    if _CACHE not in accepted:
        raise ConfigError(
            f"{kind}: expected a key-value cache in its forward, found none; this model cannot be exported"
        )
    if _POSITIONS not in accepted and kind not in _FROM_MASK:
        raise ConfigError(
            f"{kind}: expected position_ids in its forward, found none: it cannot be told where the tokens "
            "of padded texts are; this model cannot be exported"
        )
    for name, buffer in model.named_buffers():
        # Modelling code that slices a mask of its own counts places in the cache.
        own_mask = buffer.dtype == torch.bool and buffer.dim() == 4 and buffer.shape[2] == buffer.shape[3]
        if own_mask and not torch.equal(buffer, torch.ones_like(buffer).tril()):
            raise ConfigError(
                f"{kind}: {name}: expected causal attention, got a window counted by places in the cache; "
                "this model cannot be exported"
            )


def _cache_sizes(model: Any) -> tuple[int, int, int]:
    """Return the numbers of layers and of key heads, and the head size, of what the model caches."""
    decoder = GrowingDecoder(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(1, 2, dtype=torch.int64)
        _, *present = decoder(ids, torch.ones(1, 2, dtype=torch.int64), None)
    sizes = {(int(tensor.shape[1]), int(tensor.shape[3])) for tensor in present}
    if len(sizes) != 1:
        raise TargetError(
            f"{type(model).__name__}: expected keys and values of one size in all layers, "
            f"got (heads, size) {sorted(sizes)}; this model cannot be exported with --portable"
        )
    ((kv_heads, width),) = sizes
    return len(present) // 2, kv_heads, width
