"""What a sweep gives back, and the files that it writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracle.files.machine import machine_document

from .cell import CellRecord
from .plot import rank_plot
from .sizes import TargetSet
from .table import Enough, Entry

KIND, VERSION = "loracle rank sweep", 1
"""Of the JSON file; the version is another one when a reader has to know."""

_PACKAGES = ("loracle", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class RankSweepResult:
    """What was measured.

    Attributes:
        out: the folder written.
        options: see `RankSweepOptions.to_json`.
        data: examples to learn from and to measure on, and SHA-256 of the files.
        device: what it was computed on.
        bf16: whether products were bfloat16.
        metric: what cells are compared by.
        lower_is_better: whether it is one of loss.
        sets: the target sets in the model.
        before: the untrained model's score, mean over the seeds.
        table: an entry for each set and rank, in order.
        best: the best entry.
        enough: for each set the smallest rank that is enough.
        seconds: of all cells, those before a resumption included.
        records: of the cells.
    """

    out: Path
    options: Mapping[str, Any]
    data: Mapping[str, Any]
    device: str
    bf16: bool
    metric: str
    lower_is_better: bool
    sets: tuple[TargetSet, ...]
    before: float
    table: tuple[Entry, ...]
    best: Entry
    enough: tuple[Enough, ...]
    seconds: float
    records: Sequence[CellRecord]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values; no path."""
        return {
            "kind": KIND,
            "version": VERSION,
            "machine": machine_document(_PACKAGES),
            "options": dict(self.options),
            "data": dict(self.data),
            "device": self.device,
            "bf16": self.bf16,
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "targets": [_set(one) for one in self.sets],
            "before": self.before,
            "table": [asdict(entry) for entry in self.table],
            "best": asdict(self.best),
            "enough": [asdict(one) for one in self.enough],
            "seconds": self.seconds,
            "cells": [record.to_json() for record in self.records],
        }


def _set(one: TargetSet) -> dict[str, Any]:
    modules = one.modules if isinstance(one.modules, str) else list(one.modules)
    return {**asdict(one), "modules": modules}


def write_result(folder: Path, result: RankSweepResult) -> None:
    """Write ``rank.png`` and ``rank.json`` into an existing folder; for use inside `output_folder`.

    Raises:
        OSError: a file cannot be written.
    """
    rank_plot(
        result.table,
        folder / "rank.png",
        metric=result.metric,
        lower_is_better=result.lower_is_better,
        title=f"{result.options['model']} on {result.options['data']}",
    )
    text = json.dumps(result.to_json(), indent=2) + "\n"
    (folder / "rank.json").write_text(text, encoding="utf-8")
