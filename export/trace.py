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

from loracle.reference import ConfigError, TargetError

from .experts import fuse_experts
from .growing_decoder import growing_decoder
from .last_logits import keep_last
from .lowering import read_sizes_of_first
from .operators import fuse_modules
from .past_length import let_length_be_told
from .seq2seq import seq2seq
from .tasks import Task
from .template import GraphTemplate
from .tidy import name_dimensions, name_values, tidy
from .weightless import WeightlessModel, build_weightless
from .wrappers import HELD, Traced, decoder, encoder

OPSET = 20
# Buffers that older checkpoints hold among the weights, by how their names end, and patterns of these names.
_FORMER_BUFFERS = {"position_ids": r"(^|\.)position_ids$", "rotary_emb.inv_freq": r"rotary_emb\.inv_freq$"}
_TORCH_DTYPE = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}


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


def trace(
    model_dir: Path, task: Task, dtype: np.dtype[Any], *, portable: bool = False, trusted: bool = False
) -> GraphTemplate:
    """Trace the model that `model_dir/config.json` describes.

    Args:
        model_dir: a transformers folder; only its `config.json` is read.
        task: which of the architecture's models, and with which outputs.
        dtype: float32 or float16, the graph's floating-point type.
        portable: whether attention is in standard operators, and the cache one that grows.
        trusted: whether the folder's own modelling code may run.

    Raises:
        ConfigError: the architecture or the dtype cannot be exported.
    """
    weightless = build_weightless(model_dir, task, torch_dtype(dtype), portable=portable, trusted=trusted)
    return trace_model(weightless, task, dtype)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The graph's floating-point type as torch has it. Raises ConfigError for one that cannot be exported."""
    if dtype not in _TORCH_DTYPE:
        raise ConfigError(f"dtype: expected float32 or float16, got {dtype}")
    return _TORCH_DTYPE[dtype]


def trace_model(weightless: WeightlessModel, task: Task, dtype: np.dtype[Any]) -> GraphTemplate:
    """Trace a model that has been built already; it is used up. See `trace`."""
    model: Any = weightless.model
    fuse_experts(model)
    fuse_modules(model)
    if task.cached and weightless.portable:
        traced = growing_decoder(model, weightless.config, torch_dtype(dtype))
    else:
        traced = (decoder if task.cached else encoder)(model, weightless.config, task, torch_dtype(dtype))
    return _graph(traced, weightless, dtype)


def trace_seq2seq(model_dir: Path, task: Task, dtype: np.dtype[Any]) -> dict[str, GraphTemplate]:
    """Trace the encoder, and both graphs of the decoder, by the names of their files; see `trace`."""
    return trace_seq2seq_model(build_weightless(model_dir, task, torch_dtype(dtype)), dtype)


def trace_seq2seq_model(weightless: WeightlessModel, dtype: np.dtype[Any]) -> dict[str, GraphTemplate]:
    """Trace a model that has been built already; it is used up. See `trace_seq2seq`."""
    fuse_modules(weightless.model)
    graphs = seq2seq(weightless.model, weightless.config, torch_dtype(dtype))
    return {file: _graph(traced, weightless, dtype) for file, traced in graphs.items()}


def _graph(traced: Traced, weightless: WeightlessModel, dtype: np.dtype[Any]) -> GraphTemplate:
    model: Any = weightless.model
    with _quiet():
        program = torch.onnx.export(
            traced.module.eval(),
            traced.arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=traced.dynamic,
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise TargetError(f"{type(model).__name__}: torch.onnx.export returned no program")
    graph_model = program.model
    aliases, unused = _name_weights(graph_model, weightless.aliases)
    if weightless.portable and traced.shape is not None:
        read_sizes_of_first(graph_model.graph)
    tidy(graph_model, frozenset(aliases), standard=weightless.portable)
    name_dimensions(graph_model, traced.inputs, traced.outputs)
    if traced.head is not None:
        keep_last(graph_model, traced.head, aliases)
    if traced.past is not None:
        let_length_be_told(graph_model, traced.past)
    name_values(graph_model, frozenset(aliases))
    return GraphTemplate(
        graph_model,
        aliases,
        dtype,
        unused,
        _ignored_names(model),
        weightless.renames,
        model.base_model_prefix,
        traced.shape,
    )


def _ignored_names(model: Any) -> tuple[str, ...]:
    """Patterns of the names that transformers passes over when it loads a checkpoint of this model."""
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = [name for name, _ in model.named_buffers()]
    former = [
        pattern for end, pattern in _FORMER_BUFFERS.items() if any(name.endswith(end) for name in buffers)
    ]
    return (*own, *former)


def _name_weights(
    model: ir.Model, groups: dict[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Give each weight initializer its checkpoint name and drop its stand-in values; constants keep theirs.

    Returns every name each weight goes by, and the names of the weights that the outputs do not depend on.
    """
    first = {alias: name for name, group in groups.items() for alias in group}
    initializers = model.graph.initializers
    found: dict[str, tuple[str, ...]] = {}
    for traced in list(initializers):
        name = first.get(traced.removeprefix(HELD)) if traced.startswith(HELD) else None
        if name is None:
            continue
        value = initializers.pop(traced)
        if name in found:
            raise TargetError(f"{name}: expected one initializer, traced two")
        value.name = name
        value.const_value = None
        initializers[name] = value
        found[name] = groups[name]
    unused = tuple(alias for name in groups if name not in found for alias in groups[name])
    return {name: found[name] for name in groups if name in found}, unused
