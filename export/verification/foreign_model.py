"""A candidate that somebody else has made: its weights wherever they lie, its graph, its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import FileError

from ..architecture import check_supported
from ..external import load_graph, parse_graph
from ..names import GRAPH_FILE, GRAPH_SUFFIX, PIXEL_VALUES, TOKEN_TYPE_IDS
from ..options import OPTIONS_KEY
from ..tasks import Task
from ..texts import Texts, texts_of
from .asked import Asked, Found
from .foreign_candidate import judge_foreign
from .foreign_outputs import check_foreign_outputs
from .graph_content import describe_graph
from .graph_summary import foreign_graph_summary
from .input_files import onnx_files
from .judge import Judge
from .outputs_check import OutputsResult
from .weight_matching import Matches, match_weights
from .weights_check import weights_check


def foreign_graph(path: Path) -> Path | None:
    """The graph of a folder, or the graph `path` itself, where `loracle export` has not made it.

    Raises FileError where there are several, none of which has the name of one that is the model.
    """
    graphs = [path] if path.suffix == GRAPH_SUFFIX else sorted(path.glob(f"*{GRAPH_SUFFIX}"))
    if any(OPTIONS_KEY in parse_graph(graph).metadata_props for graph in graphs):
        return None
    named = [graph for graph in graphs if graph.name == GRAPH_FILE] or graphs
    if len(named) != 1:
        raise FileError(
            f"{path}: expected one graph, or {GRAPH_FILE}, got {', '.join(graph.name for graph in graphs)}; "
            "give the file of one"
        )
    return named[0]


def verify_foreign(graph: Path, asked: Asked) -> Found:
    """Verify one graph. Arguments and errors as of `verify`."""
    weights, adapter = asked.weights, asked.adapter
    task = check_supported(weights.config, str(asked.model_dir / CONFIG_FILE), trusted=asked.trusted)
    model = load_graph(graph)
    asked.digest(onnx_files({graph: model}, graph))
    base = None if asked.base_graph is None else load_graph(asked.base_graph)
    matches = match_weights(model.graph, weights)
    exact = bool(asked.exact)
    verdicts = judge_foreign(model.graph, matches, weights, Judge(weights, exact=exact), asked.progress)
    content = describe_graph(model, matches, adapter, base)
    checks = (content.check(), weights_check(verdicts, exact=exact))
    summary = foreign_graph_summary(content, matches)
    left_out = asked.outputs_left_out()
    if left_out is not None:
        return Found((*checks, left_out), verdicts, graph=summary, file=graph, model=model)
    inputs = {str(value.name) for value in model.graph.inputs}
    texts = None
    if PIXEL_VALUES not in inputs:
        folder = graph.parent if (graph.parent / "tokenizer.json").is_file() else asked.model_dir
        texts = texts_of(folder, weights.config, asked.prompts, pairs=TOKEN_TYPE_IDS in inputs)
    outputs = check_foreign_outputs(
        graph,
        model,
        task,
        asked.model_dir,
        adapter,
        weights.config,
        texts,
        asked.new_tokens,
        asked.trusted,
    )
    outputs = _located(outputs, graph, model, matches, task, texts, asked)
    return Found((*checks, *outputs.checks), verdicts, outputs, graph=summary, file=graph, model=model)


def _located(
    outputs: OutputsResult,
    graph: Path,
    model: ir.Model,
    matches: Matches,
    task: Task,
    texts: Texts | None,
    asked: Asked,
) -> OutputsResult:
    """The outputs' checks; the first that fails says in which node the difference arises."""
    failed = next((check for check in outputs.checks if not check.passed), None)
    if failed is None:
        return outputs
    from .first_difference_node import first_difference_node

    first = first_difference_node(
        graph,
        model,
        matches,
        task,
        asked.model_dir,
        asked.adapter,
        asked.weights.config,
        texts,
        trusted=asked.trusted,
    )
    line = "the graph's values are right as far as they can be compared" if first is None else str(first)
    told = replace(failed, failures=(*failed.failures, line))
    return replace(outputs, checks=tuple(told if check is failed else check for check in outputs.checks))
