"""Where outputs are outside their bound: the node of the graph in which the difference arises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..names import PIXEL_VALUES, TOKEN_TYPE_IDS
from ..tasks import Task
from ..texts import Texts, texts_of
from .asked import Asked
from .outputs_check import OutputsResult
from .weight_matching import Matches


def texts_for(model: ir.Model, graph: Path, asked: Asked) -> Texts | None:
    """What a graph reads, by the tokenizer beside it or the base's; None where it takes images."""
    inputs = {str(value.name) for value in model.graph.inputs}
    if PIXEL_VALUES in inputs:
        return None
    folder = graph.parent if (graph.parent / "tokenizer.json").is_file() else asked.model_dir
    return texts_of(folder, asked.weights.config, asked.prompts, pairs=TOKEN_TYPE_IDS in inputs)


def located(
    outputs: OutputsResult,
    graph: Path,
    model: ir.Model,
    matches: Matches,
    task: Task,
    texts: Texts | None,
    asked: Asked,
    *,
    rounded_to: np.dtype[Any] | None = None,
) -> OutputsResult:
    """The outputs with, in the first check that fails, the node in which the difference arises."""
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
        rounded_to=rounded_to,
    )
    line = "the graph's values are right as far as they can be compared" if first is None else str(first)
    told = replace(failed, failures=(*failed.failures, line))
    return replace(outputs, checks=tuple(told if check is failed else check for check in outputs.checks))
