"""From a model folder to a weightless ONNX graph: build, trace, tidy. The weights are never read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from loracle.reference import ConfigError, TargetError

from .names import ATTENTION_MASK, INPUT_IDS, LOGITS, past_names, present_names
from .operators import FusedCache, fuse_modules, rotary_inside_attention, tracing_with
from .template import GraphTemplate
from .tidy import name_dimensions, tidy
from .weightless import build_weightless

OPSET = 20
_TORCH_DTYPE = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}
_PREFIX = "model."


class _Decoder(nn.Module):
    """Inputs and outputs by position, as the exported graph has them."""

    def __init__(self, model: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("cos_cache", cos)
        self.register_buffer("sin_cache", sin)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        last_position = (attention_mask.sum(1, dtype=torch.int64) - 1).to(torch.int32)
        total = torch.ops.aten.sym_size.int(attention_mask, 1)
        total_length = torch.full((1,), total, dtype=torch.int32)
        cache = FusedCache(past, last_position, total_length, self.cos_cache, self.sin_cache)
        with tracing_with(cache):
            out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return [out.logits] + [t for layer in range(len(past) // 2) for t in cache.present[layer]]


@torch.no_grad()
def _rotary_tables(
    model: Any, positions: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (positions, width / 2) of the model's own rotary module: float32, rounded once."""
    rotary = model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1, 1, 1, dtype=torch.float32), torch.arange(positions)[None])
    if cos.shape[-1] != width:
        raise ConfigError(
            f"rotary embedding: expected to cover the head's {width} entries, got {cos.shape[-1]}; "
            "partial rotary embeddings cannot be exported yet"
        )
    half = width // 2
    return cos[0, :, :half].to(dtype).contiguous(), sin[0, :, :half].to(dtype).contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of packages that are not installed and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def trace(model_dir: Path, dtype: np.dtype[Any]) -> GraphTemplate:
    """Trace the decoder that `model_dir/config.json` describes.

    Args:
        model_dir: a transformers folder; only its `config.json` is read.
        dtype: float32 or float16, the graph's floating-point type.

    Raises:
        ConfigError: the architecture or the dtype cannot be exported.
    """
    if dtype not in _TORCH_DTYPE:
        raise ConfigError(f"dtype: expected float32 or float16, got {dtype}")
    torch_dtype = _TORCH_DTYPE[dtype]
    weightless = build_weightless(model_dir, torch_dtype)
    config = weightless.config
    model: Any = weightless.model
    layers = int(config.num_hidden_layers)
    kv_heads = int(config.num_key_value_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    cos, sin = _rotary_tables(model, int(config.max_position_embeddings), width, torch_dtype)
    attention = model.model.layers[0].self_attn
    fuse_modules(model)

    batch, length, past_length = 2, 3, 8
    past = [torch.zeros(batch, kv_heads, past_length, width, dtype=torch_dtype) for _ in range(2 * layers)]
    args = (
        torch.ones(batch, length, dtype=torch.int64),
        torch.ones(batch, past_length + length, dtype=torch.int64),
        past,
    )
    dynamic = torch.export.Dim.DYNAMIC
    ids = {0: dynamic, 1: dynamic}
    with _quiet(), rotary_inside_attention(attention) as rotations:
        program = torch.onnx.export(
            _Decoder(model, cos, sin).eval(),
            args,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(ids, ids, [{0: dynamic, 2: dynamic}] * (2 * layers)),
            input_names=[INPUT_IDS, ATTENTION_MASK, *past_names(layers)],
            output_names=[LOGITS, *present_names(layers)],
            optimize=False,
            verbose=False,
        )
    if len(rotations) < layers:
        raise TargetError(
            f"rotary embedding: expected {layers} applications, one a layer, traced {len(rotations)}"
        )
    if program is None:
        raise TargetError(f"{model_dir}: torch.onnx.export returned no program")
    graph_model = program.model
    aliases = _name_weights(graph_model, weightless.aliases)
    tidy(graph_model, frozenset(aliases))
    name_dimensions(graph_model, layers, kv_heads, width)
    return GraphTemplate(graph_model, aliases, dtype)


def _name_weights(model: ir.Model, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Give each weight initializer its checkpoint name and drop its stand-in values; constants keep theirs.

    Returns every name each weight goes by. Raises TargetError where a parameter did not reach the graph.
    """
    first = {alias: name for name, group in groups.items() for alias in group}
    initializers = model.graph.initializers
    found: dict[str, tuple[str, ...]] = {}
    for traced in list(initializers):
        name = first.get(traced.removeprefix(_PREFIX)) if traced.startswith(_PREFIX) else None
        if name is None:
            continue
        value = initializers.pop(traced)
        if name in found:
            raise TargetError(f"{name}: expected one initializer, traced two")
        value.name = name
        value.const_value = None
        initializers[name] = value
        found[name] = groups[name]
    missing = sorted(set(groups) - set(found))
    if missing:
        raise TargetError(f"{missing[0]}: expected an initializer in the traced graph, found none")
    return {name: found[name] for name in groups}
