"""Sequence-to-sequence models as the three graphs that Optimum makes of them: the encoder, the decoder's
first step, which computes the keys and values of the encoder's states once, and its later steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from .attention import FusedCache, tracing_with
from .names import (
    ATTENTION_MASK,
    BATCH,
    DECODER_FILE,
    DECODER_WITH_PAST_FILE,
    ENCODER_FILE,
    ENCODER_MASK,
    ENCODER_SEQUENCE,
    ENCODER_STATES,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LOGITS,
    PAST_SEQUENCE,
    PRESENT_SEQUENCE,
    SEQUENCE,
    cross_names,
)
from .wrappers import Shape, Traced

States = tuple[torch.Tensor, torch.Tensor]


class _CrossCache:
    """Keys and values of the encoder's states, layer by layer: given, or noted when they are computed."""

    def __init__(self, given: list[States] | None) -> None:
        self.given = given
        self.noted: dict[int, States] = {}
        self.layers = [SimpleNamespace(keys=key, values=value) for key, value in given or []]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> States:
        """Note what has been computed, and hand it through."""
        self.noted[layer] = (key, value)
        return key, value


class _Cache(EncoderDecoderCache):  # type: ignore[misc]
    """Both caches while tracing."""

    def __init__(self, own: FusedCache, cross: _CrossCache, length: Any, layers: int) -> None:
        self.self_attention_cache = own
        self.cross_attention_cache = cross
        self.is_updated = dict.fromkeys(range(layers), cross.given is not None)
        self._length = length

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        """Return how many tokens are cached."""
        return self._length


class _Finite:
    """What `torch.isfinite` is to answer: a plain truth, on which a trace need not branch."""

    def all(self) -> bool:
        """Return that they all are."""
        return True


@contextmanager
def _taken_as_finite() -> Iterator[None]:
    """Within the block all numbers are: BART clamps float16 states once any of a batch is infinite, which
    would let rows depend on one another."""
    original = torch.isfinite
    torch.isfinite = lambda _: _Finite()  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        torch.isfinite = original


class Encoder(nn.Module):
    """The encoder's states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return them, (batch, length, width)."""
        with tracing_with(None), _taken_as_finite():
            out = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        states: torch.Tensor = out.last_hidden_state
        return states


class Decoder(nn.Module):
    """One step of the decoder; its first where `first`."""

    def __init__(self, model: nn.Module, layers: int, width: int, *, first: bool) -> None:
        super().__init__()
        self.model: Any = model
        self._layers, self._width, self._first = layers, width, first

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, given: Any) -> list[torch.Tensor]:
        """Return logits, and the cache as far as it changes.

        Args:
            input_ids: (batch, n), the next tokens.
            mask: (batch, encoder's length), of the encoder's input.
            given: the encoder's states in the first step; else key and value of the tokens before, and key
                and value of the encoder's states, layer by layer.
        """
        batch, length = input_ids.shape
        if self._first:
            states, past, cross = given, None, _CrossCache(None)
            before: Any = 0
        else:
            own = [tensor for layer in range(self._layers) for tensor in given[4 * layer : 4 * layer + 2]]
            pairs = [(given[4 * layer + 2], given[4 * layer + 3]) for layer in range(self._layers)]
            past, cross, before = own, _CrossCache(pairs), own[0].shape[2]
            # Nothing reads it: the keys and values have been computed from it.
            states = torch.zeros(batch, pairs[0][0].shape[2], self._width, dtype=pairs[0][0].dtype)
        total = before + length
        last = torch.full((batch,), total - 1, dtype=torch.int32)
        cache = FusedCache(past, last, torch.full((1,), total, dtype=torch.int32), length=before)
        with tracing_with(cache):
            out = self.model(
                decoder_input_ids=input_ids,
                attention_mask=mask,
                encoder_outputs=(states,),
                past_key_values=_Cache(cache, cross, before, self._layers),
                use_cache=True,
            )
        present: list[torch.Tensor] = []
        for layer in range(self._layers):
            present += cache.present[layer]
            present += cross.noted[layer] if self._first else ()
        return [out.logits, *present]


def seq2seq(model: Any, config: Any, dtype: torch.dtype) -> dict[str, Traced]:
    """Return what is traced, by the names of the files."""
    layers = int(getattr(config, "num_decoder_layers", None) or config.num_hidden_layers)
    heads = int(getattr(config, "decoder_attention_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "d_kv", None) or config.hidden_size // heads)
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    _count_cached_tokens(model)
    dynamic = torch.export.Dim.DYNAMIC
    both = {0: dynamic, 1: dynamic}
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    states = torch.zeros(2, 5, hidden, dtype=dtype)
    own = [torch.zeros(2, heads, 7, width, dtype=dtype) for _ in range(2 * layers)]
    other = [torch.zeros(2, heads, 5, width, dtype=dtype) for _ in range(2 * layers)]
    past = [t for n in range(layers) for t in (*own[2 * n : 2 * n + 2], *other[2 * n : 2 * n + 2])]
    logits: dict[str, Shape] = {LOGITS: [BATCH, SEQUENCE, vocabulary]}

    def cached(prefix: str, length: str, *, cross: bool) -> dict[str, Shape]:
        lengths = {"decoder": length, "encoder": ENCODER_SEQUENCE}
        return {
            name: [BATCH, heads, lengths[side], width]
            for side, name in cross_names(prefix, layers)
            if cross or side == "decoder"
        }

    step: dict[str, Shape] = {INPUT_IDS: [BATCH, SEQUENCE], ENCODER_MASK: [BATCH, ENCODER_SEQUENCE]}
    return {
        ENCODER_FILE: Traced(
            Encoder(model),
            (mask.clone(), mask),
            (both, both),
            {INPUT_IDS: [BATCH, ENCODER_SEQUENCE], ATTENTION_MASK: [BATCH, ENCODER_SEQUENCE]},
            {LAST_HIDDEN_STATE: [BATCH, ENCODER_SEQUENCE, hidden]},
        ),
        DECODER_FILE: Traced(
            Decoder(model, layers, hidden, first=True),
            (ids, mask, states),
            (both, both, both),
            {**step, ENCODER_STATES: [BATCH, ENCODER_SEQUENCE, hidden]},
            logits | cached("present", SEQUENCE, cross=True),
        ),
        DECODER_WITH_PAST_FILE: Traced(
            Decoder(model, layers, hidden, first=False),
            (ids, mask, past),
            (both, both, [{0: dynamic, 2: dynamic}] * len(past)),
            step | cached("past_key_values", PAST_SEQUENCE, cross=True),
            logits | cached("present", PRESENT_SEQUENCE, cross=False),
            past=cross_names("past_key_values", 1)[0][1],
        ),
    }


def _count_cached_tokens(model: nn.Module) -> None:
    """Let relative positions be those to all keys: what the cache hands through are the new ones alone."""
    for module in model.modules():
        if not hasattr(module, "compute_bias") or not module.is_decoder:
            continue
        original: Any = module.compute_bias

        def whole(
            length: Any, _: Any, original: Any = original, past_seen_tokens: Any = 0, **more: Any
        ) -> Any:
            return original(length, past_seen_tokens + length, past_seen_tokens=past_seen_tokens, **more)

        module.compute_bias = whole  # type: ignore[assignment]
