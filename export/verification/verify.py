"""`verify`: is this ONNX folder, or this checkpoint, exactly that base model with that adapter merged?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracle.files import Adapter, Checkpoint, MergedWeights, read_adapter
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import FileError

from ..architecture import check_supported
from ..graphs import graph_files, graph_templates
from ..names import GRAPH_FILE
from ..write import Progress
from .candidate import Candidate, is_exported, open_candidate
from .checkpoint_candidate import judge_checkpoint
from .digests import Digests, InputFiles
from .exported_candidate import check_graphs, judge_initializers
from .graph_summary import GraphSummary, exported_graph
from .input_files import adapter_files, checkpoint_files, onnx_files
from .judge import Judge
from .memory import available_memory
from .outputs import check_outputs
from .outputs_check import OutputsResult
from .report import Check, VerifyReport
from .task_verification import OpenedTask, check_document, open_task, task_in_path
from .verdict import WeightVerdict
from .weights_check import weights_check

_FLOAT64_BYTES = 9
"""Of a parameter of the model in float64, with what loading takes besides."""


@dataclass(frozen=True)
class _Asked:
    """What a candidate is held against, and how."""

    model_dir: Path
    adapter_dir: Path | None
    adapter: Adapter | None
    weights: MergedWeights
    prompts: Sequence[str] | None
    new_tokens: int
    exact: bool | None
    outputs: bool | None
    trusted: bool
    digests: Digests | None
    progress: Progress | None


_NO_OUTPUTS = OutputsResult((), None, None)


@dataclass(frozen=True)
class _Found:
    """What was found."""

    checks: tuple[Check, ...]
    weights: tuple[WeightVerdict, ...]
    outputs: OutputsResult = _NO_OUTPUTS
    sha256: str | None = None
    graph: GraphSummary | None = None


def verify(
    candidate_dir: str | Path,
    model_dir: str | Path,
    adapter_dir: str | Path | None = None,
    *,
    name: str | None = None,
    prompts: Sequence[str] | None = None,
    new_tokens: int = 16,
    exact: bool | None = None,
    outputs: bool | None = None,
    digests: bool = False,
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
        exact: whether only the correctly rounded merge passes, or every merge whose roundings are inside
            their bound. None: what `loracle export` has made must be correctly rounded.
        outputs: whether an ONNX model's outputs are compared, for which the unmerged model is held in memory
            in float64. None: where that fits into the memory that is free.
        digests: whether the inputs' files are digested, for a certificate.
        trust_remote_code: whether modelling code of the model's own may run, from `model_dir` alone.
        progress: called with (tensors compared, tensors in all).

    Raises:
        LoracleError: an input is missing or malformed. A failed check is in the report, not an error.
    """
    folder, name = task_in_path(Path(candidate_dir), name)
    opened = None if name is None else open_task(folder, name)
    with Checkpoint(model_dir) as checkpoint, Digests() as running:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        asked = _Asked(
            Path(model_dir),
            None if adapter_dir is None else Path(adapter_dir),
            adapter,
            MergedWeights(checkpoint, adapter),
            prompts,
            new_tokens,
            exact,
            outputs,
            trust_remote_code,
            running if digests else None,
            progress,
        )
        if digests:
            running.add(checkpoint_files(checkpoint, "base", model_dir))
        if digests and adapter_dir is not None:
            running.add(adapter_files(adapter_dir))
        if opened is not None or is_exported(folder):
            found = _exported(folder, opened, checkpoint, asked)
        elif any(folder.glob("*.safetensors")):
            found = _checkpoint(folder, asked)
        else:
            raise FileError(f"{folder}: expected {GRAPH_FILE} or a checkpoint in safetensors, found neither")
        inputs = running.wait()
    return VerifyReport(
        str(candidate_dir if opened is None else opened.task.files[0]),
        str(model_dir),
        None if adapter_dir is None else str(adapter_dir),
        found.checks,
        found.outputs.error,
        found.outputs.tolerance,
        found.outputs.quality,
        found.sha256,
        found.weights,
        found.graph,
        inputs=inputs,
    )


def _exported(folder: Path, opened: OpenedTask | None, checkpoint: Checkpoint, asked: _Asked) -> _Found:
    weights, adapter = asked.weights, asked.adapter
    task = check_supported(weights.config, str(asked.model_dir / CONFIG_FILE), trusted=asked.trusted)
    trusted = bool(weights.config.get("auto_map"))
    candidate = _candidate(folder, opened, graph_files(task))
    if asked.digests is not None:
        asked.digests.add(_exported_files(folder, opened, candidate))
    templates = graph_templates(checkpoint, weights.config, task, candidate.options, trusted=trusted)
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
    unasked = _left_out(checkpoint, asked.outputs)
    if unasked is not None:
        return _Found((*checks, unasked), own.weights, sha256=sha256, graph=graph)
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
    return _Found((*checks, *outputs.checks), own.weights, outputs, sha256, graph)


def _exported_files(folder: Path, opened: OpenedTask | None, candidate: Candidate) -> InputFiles:
    models = candidate.models
    paths = [candidate.graph] if len(models) == 1 else [candidate.folder / file for file in models]
    graphs = dict(zip(paths, models.values(), strict=True))
    if opened is None:
        return onnx_files(graphs, folder)
    return onnx_files(graphs, opened.task.files[0], opened.task.files, "task")


def _left_out(checkpoint: Checkpoint, wanted: bool | None) -> Check | None:
    """Why outputs are not compared; None where they are."""
    if wanted:
        return None
    name = "outputs are the unmerged model's"
    if wanted is False:
        return Check(name, True, "not compared: left out by choice", asked=False)
    needed, available = checkpoint.total_parameters * _FLOAT64_BYTES, available_memory()
    if available is None or needed <= available:
        return None
    figure = (
        f"not compared: the model takes {needed / 2**30:.1f} GiB in float64, {available / 2**30:.1f} GiB "
        "are free"
    )
    return Check(name, True, figure, asked=False)


def _checkpoint(folder: Path, asked: _Asked) -> _Found:
    exact = bool(asked.exact)
    with Checkpoint(folder) as candidate:
        if asked.digests is not None:
            asked.digests.add(checkpoint_files(candidate, "candidate", folder))
        judge = Judge(asked.weights, exact=exact)
        verdicts = judge_checkpoint(candidate, asked.weights, judge, asked.progress)
    return _Found((weights_check(verdicts, exact=exact),), verdicts)


def _candidate(folder: Path, opened: OpenedTask | None, files: Sequence[str]) -> Candidate:
    if opened is None:
        return open_candidate(folder, files)
    if tuple(files) != (GRAPH_FILE,):
        raise FileError(
            f"{opened.task.files[0]}: expected the folder of a model with several graphs, got one of them"
        )
    return opened.candidate
