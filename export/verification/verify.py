"""`verify`: is this ONNX folder, or this checkpoint, exactly that base model with that adapter merged?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracle.files import Checkpoint, MergedWeights, read_adapter
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import FileError

from ..architecture import check_supported
from ..deployed_base import split
from ..graphs import graph_files, graph_templates
from ..matching import WeightSource
from ..names import GRAPH_FILE
from ..template import GraphTemplate
from ..write import BoundTensors, Progress
from .candidate import Candidate, is_exported, open_candidate
from .graph_diff import first_difference
from .outputs import check_outputs
from .quality import Quality
from .report import Check, VerifyReport
from .task_verification import OpenedTask, check_document, constants_again, open_task, task_in_path
from .weight_check import TensorDifference, compare_computed, compare_tensors

_NAMED = 8
_INPUTS_NAMED = 2


def verify(
    candidate_dir: str | Path,
    model_dir: str | Path,
    adapter_dir: str | Path | None = None,
    *,
    name: str | None = None,
    prompts: Sequence[str] | None = None,
    new_tokens: int = 16,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a candidate against the base model and adapter it is said to be.

    For an ONNX folder: (a) the graph is node for node the base model's; (b) every initializer is bit for bit
    the correctly rounded merge; (c) onnxruntime's logits, at the prompt and at every generated token, lie
    inside the sampled bound around the unmerged model in float64; (d) its greedy tokens, or most likely
    classes, are that model's, or the first difference is smaller than the bound explains. For a checkpoint
    folder: (b) alone.

    For a quantised ONNX folder (b) is of every code, scale and zero point, and no bound says what (c) and (d)
    may be: the outputs must be finite numbers, and their distance from the truth is measured
    (`VerifyReport.quality`).

    Of a deployment's task with an adapter also: (e) its document names the bytes that it holds and the
    adapter. A swappable task is its file's tensors in the place of the base's, which must be those that the
    adapter changes and no others, in the graph that has them among its inputs.

    Args:
        candidate_dir: a folder, or the file of one task of a deployment.
        name: of a task in the folder; None for its base, or where `candidate_dir` is a task's file.
        prompts: what outputs are compared on; None for our own, or without a tokenizer seeded tokens.
        new_tokens: how many tokens a model with a cache writes after each.
        trust_remote_code: whether modelling code of the model's own may run, from `model_dir` alone.
        progress: called with (tensors compared, tensors in all).

    Raises:
        LoracleError: an input is missing or malformed. A failed check is in the report, not an error.
    """
    folder, name = task_in_path(Path(candidate_dir), name)
    opened = None if name is None else open_task(folder, name)
    with Checkpoint(model_dir) as checkpoint:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        weights = MergedWeights(checkpoint, adapter)
        error: float | None = None
        tolerance: float | None = None
        quality: Quality | None = None
        sha256: str | None = None
        if opened is not None or is_exported(folder):
            config = weights.config
            task = check_supported(config, str(Path(model_dir) / CONFIG_FILE), trusted=trust_remote_code)
            trusted = bool(config.get("auto_map"))
            candidate = _candidate(folder, opened, graph_files(task))
            templates = graph_templates(checkpoint, config, task, candidate.options, trusted=trusted)
            checks = [
                _check_graphs(candidate, templates),
                _check_initializers(
                    candidate, templates, weights, progress, None if opened is None else opened.brought
                ),
            ]
            if opened is not None and adapter is not None and adapter_dir is not None:
                checks.append(check_document(opened.task, adapter, adapter_dir))
                sha256 = None if opened.task.document is None else opened.task.document.sha256
            outputs = check_outputs(
                task,
                candidate,
                model_dir,
                adapter,
                config,
                prompts,
                new_tokens=new_tokens,
                trusted=trusted,
            )
            checks += outputs.checks
            error, tolerance, quality = outputs.error, outputs.tolerance, outputs.quality
        elif any(folder.glob("*.safetensors")):
            checks = _check_checkpoint(folder, weights, progress)
        else:
            raise FileError(f"{folder}: expected {GRAPH_FILE} or a checkpoint in safetensors, found neither")
    return VerifyReport(
        str(candidate_dir if opened is None else opened.task.files[0]),
        str(model_dir),
        None if adapter_dir is None else str(adapter_dir),
        tuple(checks),
        error,
        tolerance,
        quality,
        sha256,
    )


def _candidate(folder: Path, opened: OpenedTask | None, files: Sequence[str]) -> Candidate:
    if opened is None:
        return open_candidate(folder, files)
    if tuple(files) != (GRAPH_FILE,):
        raise FileError(
            f"{opened.task.files[0]}: expected the folder of a model with several graphs, got one of them"
        )
    return opened.candidate


def _check_graphs(candidate: Candidate, templates: Mapping[str, GraphTemplate]) -> Check:
    failures = []
    inputs: list[str] = []
    for file, template in templates.items():
        if candidate.weights:
            inputs += constants_again(candidate.models[file].graph, template.unbound)
        difference = first_difference(candidate.models[file], template.model, template.unbound)
        if difference is not None:
            failures.append(difference if len(templates) == 1 else f"{file}: {difference}")
    nodes = sum(len(list(model.graph)) for model in candidate.models.values())
    figure = f"{nodes} nodes"
    if inputs:
        more = f" and {len(inputs) - _INPUTS_NAMED} more" if len(inputs) > _INPUTS_NAMED else ""
        figure += f"; {len(inputs)} weights are inputs too: {', '.join(inputs[:_INPUTS_NAMED])}{more}"
    return Check("graph is the base model's, node for node", not failures, figure, tuple(failures))


def _check_initializers(
    candidate: Candidate,
    templates: Mapping[str, GraphTemplate],
    weights: MergedWeights,
    progress: Progress | None,
    brought: frozenset[str] | None,
) -> Check:
    """`brought`: the tensors in a swappable task's file, which must be those that the adapter changes."""
    tensors = BoundTensors(list(templates.values()), weights)
    failures: list[str] = []
    if brought is not None:
        own = {str(value.name) for value in split(templates[GRAPH_FILE], tensors)[0]}
        failures += [f"{name}: expected in the task's file, found none" for name in sorted(own - brought)]
        failures += [f"{name}: the adapter leaves it alone" for name in sorted(brought - own)]
    held: dict[str, np.ndarray[Any, Any]] = {}
    for file, template in templates.items():
        for name in sorted(template.unbound):
            if not candidate.is_shared(file, name):
                failures.append(f"{file}: {name}: expected the tensor of the other graphs, got another")
            tensor = candidate.tensor(name)
            expected = template.shape(name)
            value = template.model.graph.initializers[name]
            dtype = template.dtype if value.dtype is None else value.dtype.numpy()
            if tensor is None:
                failures.append(f"{name}: expected among the initializers, found none")
            elif tensor.shape != expected or tensor.dtype != dtype:
                failures.append(f"{name}: expected {expected} {dtype}, got {tensor.shape} {tensor.dtype}")
            else:
                held.update(tensors.parts(name, tensor))
    computed = [name for name in held if name not in tensors.found]
    differences = compare_computed(tensors, {name: held[name] for name in computed}, progress)
    differences += compare_tensors(
        held.__getitem__,
        [(weight, tensors.found[weight]) for weight in tensors.found if weight in held],
        tensors.source,
        frozenset(tensors.source.merged_names),
        candidate.options.numpy_dtype,
        tensors.source.base_tensor,
        progress,
    )
    name = "initializers are the correctly rounded merge"
    if candidate.options.quantization is not None:
        name += f", quantised to {candidate.options.quantization}"
    return _bits_check(name, tensors.found, tensors.source, failures, differences)


def _check_checkpoint(folder: Path, weights: MergedWeights, progress: Progress | None) -> list[Check]:
    with Checkpoint(folder) as candidate:
        want, got = set(weights.names), set(candidate.names)
        failures = [f"{name}: expected in the checkpoint, found none" for name in sorted(want - got)]
        failures += [f"{name}: not in the merged model" for name in sorted(got - want)]
        common = []
        for name in sorted(want & got):
            if candidate.shape(name) != weights.shape(name) or candidate.dtype(name) != weights.dtype(name):
                failures.append(
                    f"{name}: expected {weights.shape(name)} {weights.dtype(name)}, "
                    f"got {candidate.shape(name)} {candidate.dtype(name)}"
                )
            else:
                common.append((name, name))
        differences = compare_tensors(
            candidate.tensor,
            common,
            weights,
            frozenset(weights.merged_names),
            None,
            weights.base_tensor,
            progress,
        )
        return [
            _bits_check(
                "checkpoint's tensors are the correctly rounded merge", want, weights, failures, differences
            )
        ]


def _bits_check(
    name: str,
    tensors: Collection[str],
    weights: WeightSource,
    failures: list[str],
    differences: Sequence[TensorDifference],
) -> Check:
    lines = failures + [str(difference) for difference in differences]
    if len(lines) > _NAMED:
        lines = [*lines[:_NAMED], f"and {len(lines) - _NAMED} more tensors"]
    return Check(
        name,
        not lines,
        f"{len(tensors)} tensors, {len(weights.merged_names)} merged, bit for bit",
        tuple(lines),
    )
