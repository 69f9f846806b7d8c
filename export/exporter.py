"""`export`: a base model and an adapter in, an ONNX folder with no trace of the adapter out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracle.files import (
    Checkpoint,
    MergedWeights,
    copy_sidecars,
    output_folder,
    read_adapter,
    sidecar_bytes,
)
from loracle.files.json_file import read_json_object
from loracle.files.sidecar import CONFIG_FILE, config_bytes
from loracle.reference import ConfigError

from .architecture import check_supported
from .external import load_graph
from .genai_config import genai_config
from .graphs import graph_template, graph_templates
from .linked import check_name, linked_bytes, write_linked
from .names import GENAI_FILE, GRAPH_FILE
from .options import GraphOptions, noted_options
from .tasks import Task
from .template import DecoderShape, GraphTemplate
from .write import Progress, write_models

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


def _write_descriptions(
    checkpoint: Checkpoint, config: Mapping[str, Any], shape: DecoderShape | None, folder: Path
) -> None:
    """Write what lies beside the graph: configuration, tokenizer, and for a decoder `genai_config.json`."""
    changed = config != checkpoint.config
    copy_sidecars(checkpoint.dir, folder, exclude=(CONFIG_FILE,) if changed else ())
    if changed:
        (folder / CONFIG_FILE).write_bytes(config_bytes({**config}))
    if shape is not None:
        _write_genai_config(checkpoint, shape, folder)


def _write_genai_config(checkpoint: Checkpoint, shape: DecoderShape, folder: Path) -> None:
    path = checkpoint.dir / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    described = genai_config(shape, checkpoint.config, generation)
    (folder / GENAI_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _check_form(form: str, name: str | None, adapter_dir: str | Path | None) -> None:
    """Raise ConfigError unless form, name and adapter go together."""
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
    _check_form(form, name, adapter_dir)
    # A linked task owns what its adapter changes: rows of other weights beside it would be its own too.
    options = GraphOptions(dtype, packed=form == "baked")
    with Checkpoint(model_dir) as checkpoint:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        weights = MergedWeights(checkpoint, adapter)
        config = weights.config
        task = check_supported(config, str(Path(model_dir) / CONFIG_FILE))
        if name is not None:
            _check_linked(weights, task, name)
        merged = tuple(weights.merged_names)
        base = Path(out_dir, GRAPH_FILE)
        if name is not None and base.exists():
            options = replace(noted_options(load_graph(base), str(base)), dtype=dtype)
            template = graph_template(checkpoint, config, task, options)
            nodes, tensors = _counts([template])
            size = write_linked(template, weights, Path(out_dir), name, progress)
            return ExportSummary(Path(out_dir), dtype, size, nodes, tensors, merged)
        with output_folder(out_dir) as folder:
            templates = graph_templates(checkpoint, config, task, options)
            nodes, tensors = _counts(templates.values())
            beside = sidecar_bytes(checkpoint.dir)
            shape = next(iter(templates.values())).decoder
            if name is None:
                size = write_models(templates, weights, folder, progress, beside=beside)
            else:
                beside += linked_bytes(templates[GRAPH_FILE], weights)
                size = write_models(
                    templates, MergedWeights(checkpoint, None), folder, progress, beside=beside
                )
                template = graph_template(checkpoint, config, task, options)
                size += write_linked(template, weights, folder, name, progress)
            _write_descriptions(checkpoint, config, shape, folder)
        return ExportSummary(Path(out_dir), dtype, size, nodes, tensors, merged)


def _check_linked(weights: MergedWeights, task: Task, name: str) -> None:
    """Raise ConfigError where the base has not the task's graph."""
    if task.encoded:
        raise ConfigError(f"form: expected baked for a model with encoder and decoder, got linked for {name}")
    if weights.config != weights.checkpoint.config:
        raise ConfigError(
            f"form: expected baked for an adapter that brings the model's head, got linked for {name}"
        )


def _counts(templates: Iterable[GraphTemplate]) -> tuple[int, int]:
    """Return how many nodes the graphs have, and how many weights."""
    every = list(templates)
    return (
        sum(len(list(template.model.graph)) for template in every),
        len({weight for template in every for weight in template.aliases}),
    )
