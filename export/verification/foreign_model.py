"""A candidate that somebody else has made: its weights wherever they lie, its graph, its answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import MergedWeights
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import FileError

from ..architecture import check_supported
from ..external import load_graph, parse_graph
from ..names import GRAPH_FILE, GRAPH_SUFFIX, OPTIONS_KEY
from .asked import Asked, Found
from .comparisons import Comparisons, comparable
from .foreign_candidate import judge_foreign, mapped_weights, needless
from .foreign_outputs import check_foreign_outputs
from .graph_content import describe_graph
from .graph_summary import foreign_graph_summary
from .input_files import onnx_files
from .judge import Judge
from .located import located, texts_for
from .one_weight import coarser
from .verdict import Verdict, WeightVerdict
from .weight_matching import match_weights
from .weight_products import multiplied_dtype
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
    with Comparisons(weights, comparable(weights, mapped_weights(model.graph, matches))) as ahead:
        judge = Judge(weights, exact=exact, ahead=ahead)
        verdicts = judge_foreign(model.graph, matches, weights, judge, asked.progress)
    content = describe_graph(model, matches, adapter, base)
    checks = (content.check(), weights_check(verdicts, exact=exact))
    summary = foreign_graph_summary(content, matches)
    left_out = asked.outputs_left_out()
    if left_out is not None:
        return Found((*checks, left_out), verdicts, graph=summary, file=graph, model=model)
    texts = texts_for(model, graph, asked)
    dtypes = (None, _rounded_to(verdicts, weights, model.graph))
    for rounded_to in dict.fromkeys(dtypes):
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
            rounded_to=rounded_to,
        )
        if all(check.passed for check in outputs.checks):
            verdicts = needless(verdicts)
            checks = (checks[0], weights_check(verdicts, exact=exact))
            break
    outputs = located(outputs, graph, model, matches, task, texts, asked, rounded_to=rounded_to)
    return Found(
        (*checks, *outputs.checks),
        verdicts,
        outputs,
        graph=summary,
        file=graph,
        model=model,
        rounded_to=rounded_to,
    )


def _rounded_to(
    verdicts: Sequence[WeightVerdict], weights: MergedWeights, graph: ir.Graph
) -> np.dtype[Any] | None:
    """The base's coarsest dtype among weights that are the merge only within its rounding, where the graph
    has a finer one: what was merged in bfloat16 may answer as bfloat16 does, in float32 too."""
    within = (Verdict.ROUNDED_TWICE, Verdict.WITHIN_ULPS)
    kinds = [weights.dtype(said.name) for said in verdicts if said.passed and said.verdict in within]
    coarsest, own = reduce(coarser, kinds, np.dtype(np.float64)), multiplied_dtype(graph)
    return None if coarser(own, coarsest) == own else coarsest
