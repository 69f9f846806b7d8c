"""What was measured, as rows; and what it says of the paper's claim."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import paper
from .intervals import bootstrap_median
from .measure import Measured
from .methods import ABOVE, CONTROL, LABELS, MERGED
from .models import BenchModel
from .pairs import ratios
from .settings import PREFILL, Setting

Row = dict[str, Any]


def row_of(
    model: BenchModel, setting: Setting, method: str, phase: str, measured: Measured, itemsize: int = 4
) -> Row:
    """One method in one setting and phase.

    ``ratio`` is the median over all blocks of the method's seconds over full fine-tuning's beside it, and
    ``interval`` its 95% bootstrap interval over rounds; ``paper`` is the paper's ratio, where it has one.

    Args:
        itemsize: bytes of a number.
    """
    graph = measured.graph
    values = ratios(measured.rounds)
    ratio, low, high = bootstrap_median(values)
    in_paper = model.name == paper.MODEL and model.layers == model.full_layers and phase == PREFILL
    return {
        "method": method,
        "label": LABELS[method],
        "batch": setting.batch,
        "length": setting.length,
        "phase": phase,
        "ratio": ratio,
        "interval": [low, high],
        "seconds": statistics.median(block.method for own in measured.rounds for block in own),
        "base_seconds": statistics.median(block.base for own in measured.rounds for block in own),
        "size": graph.size,
        "parameters": graph.parameters,
        "parameter_bytes": itemsize * graph.parameters,
        "model_bytes": graph.model_bytes,
        "graph_is_the_base_s": graph.is_base,
        "row_by_row": graph.row_by_row and setting.batch > 1 and phase == PREFILL,
        "paper": paper.paper_ratio(setting.batch, setting.length, method) if in_paper else None,
        "ratios": values,
    }


def findings(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The paper's claim, in each setting and phase.

    The merged model costs what full fine-tuning does: its interval and the control's overlap. What stays
    unmerged, and adapters, cost more: their interval lies above the control's. The control compares what is
    the same, so 1 belongs to its interval whatever was measured.
    """
    found: list[Row] = []
    for place in dict.fromkeys(map(_place, rows)):
        own = {row["method"]: row for row in rows if _place(row) == place}
        low, high = own[CONTROL]["interval"]
        low, high = min(low, 1.0), max(high, 1.0)
        for method in (MERGED, *ABOVE):
            if method not in own:
                continue
            lowest, highest = own[method]["interval"]
            merged = method == MERGED
            found.append(
                {
                    "batch": place[0],
                    "length": place[1],
                    "phase": place[2],
                    "method": method,
                    "claim": "costs nothing" if merged else "costs time",
                    "ratio": own[method]["ratio"],
                    "interval": [lowest, highest],
                    "control": [low, high],
                    "holds": lowest <= high and low <= highest if merged else lowest > high,
                }
            )
    return found


def _place(row: Mapping[str, Any]) -> tuple[int, int, str]:
    return row["batch"], row["length"], row["phase"]
