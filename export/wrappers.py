"""What is traced: a model whose inputs and outputs stand in the order of the exported graph's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from loracle.reference import ConfigError

from .attention import FusedCache, rotate_next, tracing_with
from .names import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    PAST_SEQUENCE,
    PIXEL_VALUES,
    PRESENT_SEQUENCE,
    SEQUENCE,
    TOKEN_TYPE_IDS,
    TOTAL_SEQUENCE,
    past_names,
    present_names,
)
from .rotary import rotation_by, with_tables
from .tasks import Task
from .template import DecoderShape

Shape = list[int | str]

HELD = "model."
"""What names begin with in a trace: the traced module holds the model under this name."""

_HEAD_SIZES = 8


@dataclass(frozen=True)
class Traced:
    """A module to trace, with example arguments.

    Attributes:
        module: takes ``arguments`` by position and returns the outputs in order.
        dynamic: which dimensions vary, as `torch.export` takes it.
        inputs, outputs: names, with the shapes that are known already; a name stands for a size that varies.
        head: name of the output layer's weight, where only some positions may be asked for.
        past: name of the input whose length is that of a cache, where it may be told instead.
        shape: a decoder's sizes.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    head: str | None = None
    shape: DecoderShape | None = None
    past: str | None = None


class Decoder(nn.Module):
    """A causal language model beside the cache of `GroupQueryAttention`, which expects padding on the right.

    Rows that are padded on the left are moved: their tokens before the model, and what the output layer gets
    back to where it belongs. A row's tokens must follow one another.
    """

    def __init__(self, model: Any, rotary: bool, positions: int) -> None:
        super().__init__()
        self.model = model
        self._rotary = rotary
        self._positions = positions
        self._places: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._moved_back)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return logits, and key and value of each layer."""
        length = input_ids.shape[1]
        own = attention_mask[:, -length:]
        offsets = torch.arange(length)[None]
        first = own.argmax(1, keepdim=True)
        tokens = input_ids.gather(1, (first + offsets).clamp(max=length - 1))
        self._places = (own.cumsum(1) - 1).clamp(min=0)
        count = attention_mask.sum(1, dtype=torch.int64)
        before = count - own.sum(1, dtype=torch.int64)
        position_ids = (before[:, None] + offsets).clamp(max=self._positions - 1)
        total = torch.ops.aten.sym_size.int(attention_mask, 1)
        total_length = torch.full((1,), total, dtype=torch.int32)
        cache = FusedCache(past, (count - 1).to(torch.int32), total_length)
        rotation = rotation_by(self.model, rotate_next) if self._rotary else nullcontext()
        with tracing_with(cache), rotation:
            out = self.model(
                input_ids=tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        return [out.logits] + [t for layer in range(len(past) // 2) for t in cache.present[layer]]

    def _moved_back(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (hidden,) = inputs
        assert self._places is not None
        return (hidden.gather(1, self._places[:, :, None].expand(-1, -1, hidden.shape[-1])),)


class Encoder(nn.Module):
    """A model without a cache."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs that have been asked for."""
        with tracing_with(None):
            out = self.model(**dict(zip(self._inputs, tensors, strict=True)))
        return [getattr(out, name) for name in self._outputs]


def decoder(model: Any, config: Any, _: Task, dtype: torch.dtype) -> Traced:
    """Return a causal language model with its cache, ready to be traced."""
    layers = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if width % _HEAD_SIZES:
        raise ConfigError(
            f"head size: expected a multiple of {_HEAD_SIZES}, got {width}, "
            "which onnxruntime's attention does not take; this model cannot be exported"
        )
    positions = int(config.max_position_embeddings)
    rotary = with_tables(model, positions, dtype)
    batch, length, past_length = 2, 3, 8
    past = [torch.zeros(batch, kv_heads, past_length, width, dtype=dtype) for _ in range(2 * layers)]
    dynamic = torch.export.Dim.DYNAMIC
    ids = {0: dynamic, 1: dynamic}
    inputs: dict[str, Shape] = {INPUT_IDS: [BATCH, SEQUENCE], ATTENTION_MASK: [BATCH, TOTAL_SEQUENCE]}
    inputs |= {name: [BATCH, kv_heads, PAST_SEQUENCE, width] for name in past_names(layers)}
    outputs: dict[str, Shape] = {LOGITS: [BATCH, SEQUENCE, int(config.vocab_size)]}
    outputs |= {name: [BATCH, kv_heads, PRESENT_SEQUENCE, width] for name in present_names(layers)}
    return Traced(
        Decoder(model, rotary, positions),
        (
            torch.ones(batch, length, dtype=torch.int64),
            torch.ones(batch, past_length + length, dtype=torch.int64),
            past,
        ),
        (ids, ids, [{0: dynamic, 2: dynamic}] * (2 * layers)),
        inputs,
        outputs,
        _weight_name(model, model.get_output_embeddings()),
        DecoderShape(
            layers, heads, kv_heads, width, int(config.hidden_size), int(config.vocab_size), positions
        ),
    )


def _weight_name(model: nn.Module, layer: nn.Module) -> str:
    """Return the name of a layer's weight in the model."""
    return next(f"{path}.weight" for path, module in model.named_modules() if module is layer)


def encoder(model: Any, config: Any, task: Task, dtype: torch.dtype) -> Traced:
    """Return a model without a cache, ready to be traced.

    Its inputs are the tokenizer's, `token_type_ids` among them where there is more than one type, or the
    image processor's.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, Shape]
    if model.main_input_name == PIXEL_VALUES:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else map(int, size)
        shapes = {PIXEL_VALUES: [BATCH, int(config.num_channels), height, width]}
        pixels = torch.zeros(2, int(config.num_channels), height, width, dtype=dtype)
        arguments: tuple[torch.Tensor, ...] = (pixels,)
        varying = [{0: dynamic}]
    else:
        shapes = {INPUT_IDS: [BATCH, SEQUENCE], ATTENTION_MASK: [BATCH, SEQUENCE]}
        accepted = signature(model.forward).parameters
        if TOKEN_TYPE_IDS in accepted and int(getattr(config, "type_vocab_size", 0) or 0) > 1:
            shapes[TOKEN_TYPE_IDS] = [BATCH, SEQUENCE]
        arguments = tuple(torch.ones(2, 5, dtype=torch.int64) for _ in shapes)
        varying = [{0: dynamic, 1: dynamic} for _ in shapes]
    return Traced(
        Encoder(model, tuple(shapes), task.outputs),
        arguments,
        (tuple(varying),),
        shapes,
        {name: [] for name in task.outputs},
    )
