"""`export`: a base model and an adapter in, an ONNX folder with no trace of the adapter out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracle.files import (
    Checkpoint,
    MergedWeights,
    copy_sidecars,
    output_folder,
    read_adapter,
    sidecar_bytes,
)
from loracle.files.json_file import read_json_object
from loracle.reference import ConfigError

from .architecture import check_supported
from .genai_config import genai_config
from .linked import check_name, linked_bytes, write_linked
from .names import GENAI_FILE, GRAPH_FILE
from .tasks import Task
from .template import DecoderShape, GraphTemplate, cached
from .write import Progress, write_model

DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
FORMS = ("baked", "linked")


@dataclass(frozen=True)
class ExportSummary:
    """What `export` wrote: the folder, its model's bytes, the tensors that were merged."""

    out_dir: Path
    dtype: str
    bytes: int
    nodes: int
    tensors: int
    merged_names: tuple[str, ...]


def graph_template(checkpoint: Checkpoint, task: Task, dtype: np.dtype[Any]) -> GraphTemplate:
    """The weightless graph of `checkpoint`'s architecture for a task, from the cache or freshly traced."""

    def make() -> GraphTemplate:
        # torch and transformers are needed only where the cache has nothing
        from .replicate import trace_replicated
        from .trace import trace

        replicated = trace_replicated(checkpoint.dir, task, dtype)
        return trace(checkpoint.dir, task, dtype) if replicated is None else replicated

    return cached(checkpoint.config, dtype, make)


def _write_genai_config(checkpoint: Checkpoint, shape: DecoderShape, folder: Path) -> None:
    path = checkpoint.dir / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    described = genai_config(shape, checkpoint.config, generation)
    (folder / GENAI_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _check_form(form: str, name: str | None, adapter_dir: str | Path | None) -> None:
    if form not in FORMS:
        raise ConfigError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if form == "baked":
        if name is not None:
            raise ConfigError(f"name: expected none in the form baked, got {name!r}; choose --form linked")
        return
    if name is None:
        raise ConfigError("name: expected the task's name in the form linked, got none")
    check_name(name)
    if adapter_dir is None:
        raise ConfigError("adapter: expected one in the form linked, got none; give the task's adapter")


def export(
    model_dir: str | Path,
    out_dir: str | Path,
    adapter_dir: str | Path | None = None,
    *,
    dtype: str = "fp32",
    form: str = "baked",
    name: str | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write `W0 + scaling * B @ A`, each entry rounded once to `dtype`, as an ONNX decoder with KV cache.

    Args:
        model_dir: transformers folder of the base model (safetensors).
        out_dir: folder to make; must not exist, or be empty. It appears whole or not at all. In the form
            "linked" it may be a deployment, to which the task is added.
        adapter_dir: PEFT adapter folder, or None for the base model itself.
        dtype: "fp32" or "fp16", the type of weights, cache and logits.
        form: "baked", one graph with its weights; or "linked", the base model and beside it a graph `name`
            with the merged weights alone (`linked.py`).
        name: of the task, in the form "linked".
        progress: called with (bytes written, bytes in all).

    Raises:
        LoracleError: what is wrong with the input, in one line; nothing is written then.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_form(form, name, adapter_dir)
    with Checkpoint(model_dir) as checkpoint:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        weights = MergedWeights(checkpoint, adapter)
        task = check_supported(checkpoint.config, str(Path(model_dir) / "config.json"))
        if name is not None and Path(out_dir, GRAPH_FILE).exists():
            template = graph_template(checkpoint, task, DTYPES[dtype])
            nodes = len(list(template.model.graph))
            size = write_linked(template, weights, Path(out_dir), name, progress)
        else:
            with output_folder(out_dir) as folder:
                template = graph_template(checkpoint, task, DTYPES[dtype])
                nodes = len(list(template.model.graph))
                beside = sidecar_bytes(checkpoint.dir)
                source = weights
                if name is not None:
                    beside += linked_bytes(template, weights)
                    source = MergedWeights(checkpoint, None)
                size = write_model(template, source, folder, progress, beside=beside)
                copy_sidecars(checkpoint.dir, folder)
                if template.decoder is not None:
                    _write_genai_config(checkpoint, template.decoder, folder)
                if name is not None:
                    template = graph_template(checkpoint, task, DTYPES[dtype])
                    size += write_linked(template, weights, folder, name, progress)
        return ExportSummary(
            Path(out_dir), dtype, size, nodes, len(template.aliases), tuple(weights.merged_names)
        )
