"""A model's weightless graphs, from the cache or freshly traced."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracle.files import Checkpoint
from loracle.files.architectures import architecture_of
from loracle.files.sidecar import CONFIG_FILE, config_bytes
from loracle.reference import ConfigError, TargetError

from .expert_weights import with_experts_apart
from .names import DECODER_FILE, DECODER_WITH_PAST_FILE, ENCODER_FILE, GRAPH_FILE
from .options import GraphOptions, note_options, noted_options
from .quantized import quantize_products
from .tasks import Task
from .template import GraphTemplate, cached


def graph_files(task: Task) -> tuple[str, ...]:
    """The names of a model's graphs: one, or Optimum's three where an encoder comes before the decoder."""
    return (ENCODER_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE) if task.encoded else (GRAPH_FILE,)


def graph_templates(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    task: Task,
    options: GraphOptions,
    *,
    trusted: bool = False,
) -> dict[str, GraphTemplate]:
    """The graphs of the model that `config` describes, by the names of their files.

    An architecture whose attention cannot be exchanged has a portable graph whatever `options` say; the graph
    notes it.

    Args:
        checkpoint: whose folder tells what `config` leaves open; its weights are not read.
        config: the content of the model's `config.json`.
        trusted: whether the folder's own modelling code may run.

    Raises:
        ConfigError, TargetError: the model cannot be exported so.
    """

    plain = replace(options, quantization=None)

    def make() -> dict[str, GraphTemplate]:
        architecture = architecture_of(config)
        experts = {} if architecture is None else architecture.experts
        with _described(checkpoint, config) as folder:
            graphs = _traced(folder, task, plain, trusted)
        return {file: with_experts_apart(template, experts) for file, template in graphs.items()}

    # The graph of a model with code of its own depends on that, too.
    described = {**config, "code": _digest(checkpoint.dir)} if trusted else config
    graphs = cached(described, plain, graph_files(task), make)
    return graphs if options.quantization is None else _quantized(graphs, options.quantization)


def graph_template(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    task: Task,
    options: GraphOptions,
    *,
    trusted: bool = False,
) -> GraphTemplate:
    """The graph of a model that has one; see `graph_templates`."""
    (template,) = graph_templates(checkpoint, config, task, options, trusted=trusted).values()
    return template


def _traced(folder: Path, task: Task, options: GraphOptions, trusted: bool) -> dict[str, GraphTemplate]:
    # torch and transformers are needed only where the cache has nothing
    from torch.onnx import OnnxExporterError

    from .lowering import lower
    from .pack import pack_products
    from .replicate import trace_replicated, trace_seq2seq_replicated
    from .skips import join_sums
    from .tidy import name_values
    from .trace import trace, trace_seq2seq
    from .weightless import has_attention_interface

    dtype = options.numpy_dtype
    if not options.portable and not has_attention_interface(folder, task, trusted=trusted):
        options = replace(options, portable=True)
    if task.encoded and options.portable:
        raise ConfigError(
            f"portable: expected a model of one graph, got one for {task.name}; export without --portable"
        )
    if task.encoded:
        graphs = trace_seq2seq_replicated(folder, task, dtype) or trace_seq2seq(folder, task, dtype)
    else:
        how = {"portable": options.portable, "trusted": trusted}
        try:
            graph = trace_replicated(folder, task, dtype, **how) or trace(folder, task, dtype, **how)
        except OnnxExporterError as error:
            raise TargetError(
                f"{folder}: torch cannot trace the modelling code: {_reason(error)}; "
                "this model cannot be exported"
            ) from error
        graphs = {GRAPH_FILE: graph}
    if options.portable:
        graphs = {file: lower(template) for file, template in graphs.items()}
    else:
        for template in graphs.values():
            join_sums(template.model.graph)
    if options.packed:
        graphs = {file: pack_products(template) for file, template in graphs.items()}
    for template in graphs.values():
        name_values(template.model, template.unbound)
        note_options(template.model, options)
    return graphs


def _quantized(graphs: Mapping[str, GraphTemplate], quantization: str) -> dict[str, GraphTemplate]:
    noted = {file: noted_options(template.model, file) for file, template in graphs.items()}
    if any(options.portable for options in noted.values()):
        raise ConfigError(
            f"quantization: expected none for a model whose code computes attention by itself, got "
            f"{quantization!r}; leave --quantization out"
        )
    quantized = quantize_products(graphs, quantization)
    for file, template in quantized.items():
        note_options(template.model, replace(noted[file], quantization=quantization))
    return quantized


def _reason(error: BaseException) -> str:
    """The first line of what an exception comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


def _digest(folder: Path) -> str:
    """SHA-256 of a folder's Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


@contextmanager
def _described(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder whose `config.json` is `config`."""
    if config == checkpoint.config:
        yield checkpoint.dir
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_bytes(config_bytes({**config}))
        for path in checkpoint.dir.glob("*.py"):
            shutil.copyfile(path, Path(folder) / path.name)
        yield Path(folder)
