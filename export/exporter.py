"""`export`: a base model and an adapter in, an ONNX folder with no trace of the adapter out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loracle.files import (
    Adapter,
    Checkpoint,
    MergedWeights,
    copy_sidecars,
    output_folder,
    read_adapter,
    sidecar_bytes,
)
from loracle.files.json_file import read_json_object
from loracle.files.sidecar import CONFIG_FILE, config_bytes, resized_tokenizer
from loracle.reference import ConfigError

from .adapter_inputs import ADAPTER_INPUTS, adapter_bytes, check_form, write_adapter_inputs
from .architecture import check_supported
from .external import load_graph
from .genai_config import genai_bytes
from .graphs import graph_template, graph_templates
from .in_place import check_in_place, write_base
from .linked import linked_bytes, write_linked
from .names import GENAI_FILE, GRAPH_FILE
from .options import GraphOptions, noted_options
from .overhead import Overhead, adapter_overhead
from .swappable import write_swappable
from .task_document import task_document
from .task_names import check_name, require_new
from .tasks import Task
from .template import GraphTemplate
from .underflow import CountedWeights, Underflow
from .write import Progress, write_models

FORMS = ("baked", "linked", "swappable", ADAPTER_INPUTS)
_WRITERS = {"linked": write_linked, "swappable": write_swappable}


@dataclass(frozen=True)
class ExportSummary:
    """What `export` wrote: the folder, its model's bytes, the tensors that were merged, in float16 the small
    entries of weights that lost something, and what an adapter costs that was not merged."""

    out_dir: Path
    dtype: str
    bytes: int
    nodes: int
    tensors: int
    merged_names: tuple[str, ...]
    quantization: str | None = None
    underflow: Underflow = field(default_factory=Underflow)
    overhead: Overhead | None = None


def _write_descriptions(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    template: GraphTemplate,
    folder: Path,
    adapter_dir: str | Path | None,
) -> None:
    """Write what lies beside the graph: configuration, tokenizer, and for a decoder `genai_config.json`."""
    changed = config != checkpoint.config
    copy_sidecars(
        checkpoint.dir,
        folder,
        exclude=(CONFIG_FILE,) if changed else (),
        tokenizer_dir=resized_tokenizer(adapter_dir, config, checkpoint.config),
    )
    if changed:
        (folder / CONFIG_FILE).write_bytes(config_bytes({**config}))
    repeated = _with_chat_template(folder)
    if repeated is not None:
        (folder / "tokenizer_config.json").write_bytes(repeated)
    if template.decoder is not None:
        grows = noted_options(template.model, CONFIG_FILE).portable
        (folder / GENAI_FILE).write_bytes(genai_bytes(checkpoint, template.decoder, grows=grows))


def _with_chat_template(folder: Path) -> bytes | None:
    """The content of `tokenizer_config.json` with the chat template, which transformers.js reads there alone;
    None where there are not both files."""
    template, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not (template.is_file() and path.is_file()):
        return None
    config = {**read_json_object(path), "chat_template": template.read_text(encoding="utf-8")}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _description_bytes(model_dir: Path) -> int:
    """Bytes of the files that come from the model's folder, as far as they can be read."""
    repeated = _with_chat_template(model_dir)
    more = 0 if repeated is None else len(repeated) - (model_dir / "tokenizer_config.json").stat().st_size
    return sidecar_bytes(model_dir) + more


def _check_form(form: str, name: str | None, adapter_dir: str | Path | None, *, replace: bool) -> None:
    """Raise ConfigError unless form, name and adapter go together."""
    if form not in FORMS:
        raise ConfigError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if form == "baked":
        if name is not None:
            raise ConfigError(f"name: expected none in the form baked, got {name!r}; choose another --form")
        if replace:
            raise ConfigError(
                "replace: expected a task to exchange, got the form baked; choose another --form"
            )
        return
    if name is None:
        raise ConfigError(f"name: expected the task's name in the form {form}, got none")
    check_name(name)
    if adapter_dir is None:
        raise ConfigError(f"adapter: expected one in the form {form}, got none; give the task's adapter")


def export(
    model_dir: str | Path,
    out_dir: str | Path,
    adapter_dir: str | Path | None = None,
    *,
    dtype: str = "fp32",
    form: str = "baked",
    name: str | None = None,
    replace: bool = False,
    in_place: bool = False,
    quantization: str | None = None,
    portable: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write `W0 + scaling * B @ A`, each entry rounded once to `dtype`, as an ONNX decoder with KV cache.

    Args:
        model_dir: transformers folder of the base model (safetensors).
        out_dir: folder to make; must not exist, or be empty. It appears whole or not at all. In another
            form than "baked" it may be a deployment, to which the task is added.
        adapter_dir: PEFT adapter folder, or None for the base model itself.
        dtype: "fp32" or "fp16", the type of weights, cache and logits.
        form: "baked", one graph with its weights; or the base model and beside it "linked", a graph `name`
            with the merged weights alone (`linked.py`), or "swappable", these weights as inputs of one graph
            for all tasks (`swappable.py`), or "adapter-inputs", lora_A and lora_B as inputs, which are not
            merged (`adapter_inputs.py`).
        name: of the task, unless the form is "baked".
        replace: whether a task of this name may be there; its graph is exchanged in one step.
        in_place: whether the base's graph refers to the checkpoint's own files, without a copy of what they
            hold as the graph has it (`in_place.py`); `out_dir` is `model_dir` then, and keeps the base where
            the task fails.
        quantization: None; or "int8" or "int4", for codes of the merged weights of linear layers
            (`quantized.py`).
        portable: whether all operators are of the ONNX standard, for runtimes other than onnxruntime, and
            the cache is one that grows. Otherwise onnxruntime's own are used where the model allows.
        trust_remote_code: whether modelling code of the model's own may run, from `model_dir` alone.
        progress: called with (bytes written, bytes in all).

    Raises:
        LoracleError: what is wrong with the input, in one line; nothing is written then.
    """
    _check_form(form, name, adapter_dir, replace=replace)
    # A task owns what its adapter changes: rows of other weights beside it would be its own too.
    options = GraphOptions(dtype, packed=form == "baked", quantization=quantization, portable=portable)
    with Checkpoint(model_dir) as checkpoint:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        weights = MergedWeights(checkpoint, adapter)
        config = weights.config
        task = check_supported(config, str(Path(model_dir) / CONFIG_FILE), trusted=trust_remote_code)
        trusted = bool(config.get("auto_map"))
        if name is not None:
            _check_task(weights, task, form, name)
        unmerged = adapter if form == ADAPTER_INPUTS else None
        if unmerged is not None:
            weights = MergedWeights(checkpoint, None)
        document = {}
        if adapter is not None and adapter_dir is not None and name is not None:
            document = task_document(form, adapter, adapter_dir)
        counted = CountedWeights(weights)
        merged = tuple(weights.merged_names)
        base = Path(out_dir, GRAPH_FILE)
        written = 0
        if in_place:
            check_in_place(checkpoint, Path(out_dir), form)
            if name is not None and not os.path.exists(base):
                require_new(Path(out_dir), name, form, replace=replace)
                template = graph_template(checkpoint, config, task, options, trusted=trusted)
                linked_bytes(template, weights)
                written = write_base(template, checkpoint, progress)
        if name is not None and os.path.exists(base):
            held = load_graph(base)
            check_form(held, form, Path(out_dir))
            options = dataclasses.replace(noted_options(held, str(base)), dtype=dtype)
            if options.quantization != quantization:
                raise ConfigError(
                    f"quantization: expected {options.quantization}, as the deployment's base has it, "
                    f"got {quantization}; choose another --out"
                )
            if portable and not options.portable:
                raise ConfigError(
                    "portable: expected a deployment with a portable base, got another; choose another --out"
                )
            template = graph_template(checkpoint, config, task, options, trusted=trusted)
            nodes, tensors = _counts([template])
            write = _writer(form, unmerged)
            size = write(template, counted, Path(out_dir), name, progress, document=document, replace=replace)
            size += written
            overhead = None if unmerged is None else adapter_overhead(template, unmerged, base)
            return ExportSummary(
                Path(out_dir),
                dtype,
                size,
                nodes,
                tensors,
                merged,
                quantization,
                counted.underflow(),
                overhead,
            )
        overhead = None
        with output_folder(out_dir) as folder:
            templates = graph_templates(checkpoint, config, task, options, trusted=trusted)
            nodes, tensors = _counts(templates.values())
            beside = _description_bytes(checkpoint.dir)
            first = next(iter(templates.values()))
            if name is None:
                size = write_models(templates, counted, folder, progress, beside=beside)
            else:
                beside += (
                    linked_bytes(templates[GRAPH_FILE], weights)
                    if unmerged is None
                    else adapter_bytes(templates[GRAPH_FILE], unmerged)
                )
                size = write_models(
                    templates, MergedWeights(checkpoint, None), folder, progress, beside=beside
                )
                template = graph_template(checkpoint, config, task, options, trusted=trusted)
                write = _writer(form, unmerged)
                size += write(template, counted, folder, name, progress, document=document)
                if unmerged is not None:
                    overhead = adapter_overhead(template, unmerged, folder / GRAPH_FILE)
            _write_descriptions(checkpoint, config, first, folder, adapter_dir)
        return ExportSummary(
            Path(out_dir), dtype, size, nodes, tensors, merged, quantization, counted.underflow(), overhead
        )


def _writer(form: str, unmerged: Adapter | None) -> Callable[..., int]:
    """What adds a task to a deployment; `unmerged` is an adapter that is not merged."""
    return _WRITERS[form] if unmerged is None else partial(write_adapter_inputs, adapter=unmerged)


def _check_task(weights: MergedWeights, task: Task, form: str, name: str) -> None:
    """Raise ConfigError where the base has not the task's graph."""
    if task.encoded:
        raise ConfigError(f"form: expected baked for a model with encoder and decoder, got {form} for {name}")
    if weights.config != weights.checkpoint.config:
        raise ConfigError(
            f"form: expected baked for an adapter that brings a head or a vocabulary of its own, got {form} "
            f"for {name}"
        )


def _counts(templates: Iterable[GraphTemplate]) -> tuple[int, int]:
    """Return how many nodes the graphs have, and how many weights."""
    every = list(templates)
    return (
        sum(len(list(template.model.graph)) for template in every),
        len({weight for template in every for weight in template.aliases}),
    )
