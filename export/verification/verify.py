"""`verify`: is this ONNX model, or this checkpoint, that base model with that adapter merged?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loracle.files import Checkpoint, MergedWeights
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import ConfigError, FileError

from ..architecture import check_supported
from ..names import GRAPH_FILE
from ..write import Progress
from .adapter_summary import adapter_summary
from .asked import DATA_ROWS, Asked, Found
from .base_folder import base_folder
from .candidate import is_exported
from .checkpoint_candidate import verify_checkpoint
from .digests import Digests
from .exported_model import verify_exported
from .foreign_model import foreign_graph, verify_foreign
from .input_files import adapter_files, checkpoint_files
from .report import VerifyReport
from .task_verification import OpenedTask, open_task, task_in_path
from .trained import LoralibLayers, read_trained

if TYPE_CHECKING:
    from .task_metric import TaskMetric


def verify(
    candidate_dir: str | Path,
    model_dir: str | Path,
    adapter_dir: str | Path | None = None,
    *,
    name: str | None = None,
    loralib: LoralibLayers | None = None,
    prompts: Sequence[str] | None = None,
    new_tokens: int = 16,
    exact: bool | None = None,
    outputs: bool | None = None,
    base_graph: str | Path | None = None,
    data: str | Path | None = None,
    rows: int | None = None,
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
        candidate_dir: a folder, a graph, or the file of one task of a deployment.
        model_dir: the base model's folder, or its name on a hub.
        name: of a task in the folder; None for its base, or where `candidate_dir` is a task's file.
        loralib: where `adapter_dir` is the file of a loralib state dict, what that does not hold.
        prompts: what outputs are compared on; None for our own, or without a tokenizer seeded tokens.
        new_tokens: how many tokens a model with a cache writes after each.
        exact: whether only the correctly rounded merge passes, or every merge whose roundings are inside
            their bound. None: what `loracle export` has made must be correctly rounded.
        outputs: whether an ONNX model's outputs are compared, for which the unmerged model is held in memory
            in float64. None: where that fits into the memory that is free.
        base_graph: the base model's graph by the exporter that has made the candidate, if not loracle: the
            candidate's must be the same, node for node.
        data: examples in the form that `loracle finetune` reads, on which base, unmerged model and candidate
            are measured: perplexity, or a classifier's accuracy; their losses must agree within the bound.
        rows: how many of them, the first of the file; None for 16.
        digests: whether the inputs' files are digested, for a certificate.
        trust_remote_code: whether modelling code of the model's own may run, from `model_dir` alone.
        progress: called with (tensors compared, tensors in all).

    Raises:
        LoracleError: an input is missing or malformed. A failed check is in the report, not an error.
    """
    given, model_dir = model_dir, base_folder(model_dir)
    folder, name = task_in_path(Path(candidate_dir), name)
    opened = None if name is None else open_task(folder, name)
    with Checkpoint(model_dir) as checkpoint, Digests() as running:
        adapter = None if adapter_dir is None else read_trained(Path(adapter_dir), loralib)
        asked = Asked(
            Path(model_dir),
            None if adapter_dir is None else Path(adapter_dir),
            adapter,
            checkpoint,
            MergedWeights(checkpoint, adapter),
            prompts,
            new_tokens,
            exact,
            outputs,
            None if base_graph is None else Path(base_graph),
            trust_remote_code,
            running if digests else None,
            progress,
        )
        if digests:
            running.add(checkpoint_files(checkpoint, "base", given))
        if digests and adapter_dir is not None:
            running.add(adapter_files(adapter_dir))
        found = _found(folder, opened, asked)
        metric = (
            None if data is None else _metric(Path(data), DATA_ROWS if rows is None else rows, found, asked)
        )
        candidate = str(candidate_dir if opened is None else opened.task.files[0])
        inputs = tuple(
            replace(own, path=candidate) if own.role == "candidate" else own for own in running.wait()
        )
    return VerifyReport(
        candidate,
        str(given),
        None if adapter_dir is None else str(adapter_dir),
        found.checks if metric is None else (*found.checks, metric.check),
        found.outputs.error,
        found.outputs.tolerance,
        found.outputs.quality,
        found.sha256,
        found.weights,
        None if adapter is None else adapter_summary(adapter),
        found.graph,
        metric,
        inputs,
    )


def _found(folder: Path, opened: OpenedTask | None, asked: Asked) -> Found:
    if opened is None and is_exported(folder):
        graph = foreign_graph(folder)
        if graph is not None:
            return verify_foreign(graph, asked)
    if asked.base_graph is not None:
        raise ConfigError(
            f"{asked.base_graph}: expected none beside a candidate whose graph is made again here; "
            "leave it out"
        )
    if opened is not None or is_exported(folder):
        return verify_exported(folder, opened, asked)
    if any(folder.glob("*.safetensors")):
        return verify_checkpoint(folder, asked)
    raise FileError(f"{folder}: expected {GRAPH_FILE} or a checkpoint in safetensors, found neither")


def _metric(data: Path, rows: int, found: Found, asked: Asked) -> TaskMetric:
    if found.file is None:
        raise ConfigError(
            f"{data}: expected a candidate of one graph whose weights are in it, or a checkpoint, for data; "
            "leave the data out"
        )
    from .task_metric import measure_task

    config = asked.weights.config
    task = check_supported(config, str(asked.model_dir / CONFIG_FILE), trusted=asked.trusted)
    return measure_task(
        data,
        found.file,
        None if found.model is None else found.model.graph,
        task,
        asked.model_dir,
        asked.adapter,
        config,
        rows=rows,
        trusted=asked.trusted,
        rounded_to=found.rounded_to,
    )
