"""A candidate that `loracle export` has made: its graph, its bits, its document, its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import FileError

from ..architecture import check_supported
from ..graphs import graph_files, graph_templates
from ..names import GRAPH_FILE
from .asked import NO_OUTPUTS, Asked, Found
from .candidate import Candidate, open_candidate
from .digests import InputFiles
from .exported_candidate import check_graphs, judge_initializers
from .graph_summary import exported_graph
from .input_files import onnx_files
from .located import located, texts_for
from .outputs import check_outputs
from .task_verification import OpenedTask, check_document
from .weight_matching import match_weights


def verify_exported(folder: Path, opened: OpenedTask | None, asked: Asked) -> Found:
    """Verify a folder, or the task of one that is opened. Arguments and errors as of `verify`."""
    weights, adapter = asked.weights, asked.adapter
    task = check_supported(weights.config, str(asked.model_dir / CONFIG_FILE), trusted=asked.trusted)
    trusted = bool(weights.config.get("auto_map"))
    candidate = _candidate(folder, opened, graph_files(task))
    asked.digest(_files(folder, opened, candidate))
    templates = graph_templates(asked.checkpoint, weights.config, task, candidate.options, trusted=trusted)
    own = judge_initializers(
        candidate,
        templates,
        weights,
        exact=asked.exact is not False,
        brought=None if opened is None else opened.brought,
        progress=asked.progress,
    )
    checks = [check_graphs(candidate, templates), own.check]
    graph = exported_graph(candidate, checks[0])
    sha256 = None
    if opened is not None and adapter is not None and asked.adapter_dir is not None:
        checks.append(check_document(opened.task, adapter, asked.adapter_dir))
        sha256 = None if opened.task.document is None else opened.task.document.sha256
    # A swappable task's graph answers for the base until it is given the task's weights.
    single = len(candidate.models) == 1 and not candidate.weights
    file = candidate.graph if single else None
    model = next(iter(candidate.models.values())) if single else None
    left_out = asked.outputs_left_out()
    if left_out is not None:
        return Found((*checks, left_out), own.weights, NO_OUTPUTS, sha256, graph, file, model)
    outputs = check_outputs(
        task,
        candidate,
        asked.model_dir,
        adapter,
        weights.config,
        asked.prompts,
        new_tokens=asked.new_tokens,
        trusted=trusted,
    )
    wrong = outputs.tolerance is not None and not all(check.passed for check in outputs.checks)
    if wrong and file is not None and model is not None:
        matches = match_weights(model.graph, weights)
        texts = texts_for(model, file, asked)
        outputs = located(outputs, file, model, matches, task, texts, asked)
    return Found((*checks, *outputs.checks), own.weights, outputs, sha256, graph, file, model)


def _files(folder: Path, opened: OpenedTask | None, candidate: Candidate) -> InputFiles:
    models = candidate.models
    paths = [candidate.graph] if len(models) == 1 else [candidate.folder / file for file in models]
    graphs = dict(zip(paths, models.values(), strict=True))
    if opened is None:
        return onnx_files(graphs, folder)
    return onnx_files(graphs, opened.task.files[0], opened.task.files, "task")


def _candidate(folder: Path, opened: OpenedTask | None, files: Sequence[str]) -> Candidate:
    if opened is None:
        return open_candidate(folder, files)
    if tuple(files) != (GRAPH_FILE,):
        raise FileError(
            f"{opened.task.files[0]}: expected the folder of a model with several graphs, got one of them"
        )
    return opened.candidate
