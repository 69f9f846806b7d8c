"""A model's weightless graphs, from the cache or freshly traced."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loracle.files import Checkpoint
from loracle.files.sidecar import CONFIG_FILE, config_bytes

from .names import DECODER_FILE, DECODER_WITH_PAST_FILE, ENCODER_FILE, GRAPH_FILE
from .options import GraphOptions, note_options
from .tasks import Task
from .template import GraphTemplate, cached


def graph_files(task: Task) -> tuple[str, ...]:
    """The names of a model's graphs: one, or Optimum's three where an encoder comes before the decoder."""
    return (ENCODER_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE) if task.encoded else (GRAPH_FILE,)


def graph_templates(
    checkpoint: Checkpoint, config: Mapping[str, Any], task: Task, options: GraphOptions
) -> dict[str, GraphTemplate]:
    """The graphs of the model that `config` describes, by the names of their files.

    Args:
        checkpoint: whose folder tells what `config` leaves open; its weights are not read.
        config: the content of the model's `config.json`.
    """

    def make() -> dict[str, GraphTemplate]:
        with _described(checkpoint, config) as folder:
            return _traced(folder, task, options)

    return cached(config, options, graph_files(task), make)


def graph_template(
    checkpoint: Checkpoint, config: Mapping[str, Any], task: Task, options: GraphOptions
) -> GraphTemplate:
    """The graph of a model that has one; see `graph_templates`."""
    (template,) = graph_templates(checkpoint, config, task, options).values()
    return template


def _traced(folder: Path, task: Task, options: GraphOptions) -> dict[str, GraphTemplate]:
    # torch and transformers are needed only where the cache has nothing
    from .pack import pack_products
    from .replicate import trace_replicated, trace_seq2seq_replicated
    from .trace import trace, trace_seq2seq

    dtype = options.numpy_dtype
    if task.encoded:
        graphs = trace_seq2seq_replicated(folder, task, dtype) or trace_seq2seq(folder, task, dtype)
    else:
        graphs = {GRAPH_FILE: trace_replicated(folder, task, dtype) or trace(folder, task, dtype)}
    if options.packed:
        graphs = {file: pack_products(template) for file, template in graphs.items()}
    for template in graphs.values():
        note_options(template.model, options)
    return graphs


@contextmanager
def _described(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder whose `config.json` is `config`."""
    if config == checkpoint.config:
        yield checkpoint.dir
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_bytes(config_bytes({**config}))
        yield Path(folder)
