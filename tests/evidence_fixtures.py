"""Result files as the commands write them, of made-up measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from certificate_fixtures import report, weight

from loracle.export.bench.document import document_of
from loracle.export.bench.graphs import MethodGraph
from loracle.export.bench.measure import Measured
from loracle.export.bench.methods import ADAPTER_H, ADAPTER_L, CONTROL, MERGED
from loracle.export.bench.models import BenchModel
from loracle.export.bench.pairs import Block
from loracle.export.bench.report import row_of
from loracle.export.bench.settings import PREFILL, Effort, Setting
from loracle.export.tasks import TASKS
from loracle.export.verification.certificate import certificate_of
from loracle.export.verification.verdict import Verdict
from loracle.files.machine import machine_document
from loracle.torch_impl.extraction.summary import ExtractedTensor, ExtractionSummary
from loracle.torch_impl.intrinsic import IntrinsicResult
from loracle.torch_impl.intrinsic.dimension import Point, intrinsic_dimension
from loracle.torch_impl.intrinsic.run import Run, RunRecord
from loracle.torch_impl.rank_sweep import RankSweepResult
from loracle.torch_impl.rank_sweep.cell import Cell, CellRecord
from loracle.torch_impl.rank_sweep.sizes import TargetSet
from loracle.torch_impl.rank_sweep.table import best_of, enough, entry_of

Document = dict[str, Any]

RATIOS = {CONTROL: (0.99, 1.01), MERGED: (0.995, 1.02), ADAPTER_L: (1.19, 1.22), ADAPTER_H: (1.28, 1.33)}
"""Of one forward pass over that of full fine-tuning: the ends of an interval."""

SCORES = {("q", 1): 0.6, ("q", 4): 0.79, ("qv", 1): 0.8, ("qv", 4): 0.79}
"""Accuracies by target set and rank, where 0.2 is the untrained model's."""

CURVE = {100: 0.4, 1000: 0.65, 10_000: 0.78}
"""Accuracies by d, where 0.2 is the untrained model's and 0.8 the whole model's."""


def bench(ratios: Mapping[str, tuple[float, float]] = RATIOS, name: str = "gpt2-medium") -> Document:
    """A latency table at 1 x 128."""
    model = BenchModel(name, Path("x"), TASKS[0], 24, 24, 354_823_168, True)
    rows = []
    for method, ends in ratios.items():
        graph = MethodGraph(method, Path("x"), 112, 354_823_168 if method == CONTROL else 11_000_000, 10**9)
        blocks = [tuple(Block(1.0, ratio) for ratio in ends)] * 2
        row = row_of(model, Setting(1, 128, 11e6), method, PREFILL, Measured(graph, blocks))
        rows.append({**row, "ratio": sum(ends) / 2, "interval": list(ends)})
    return document_of(model, "cpu", "fp32", Effort(threads=2), rows, {})


def sweep(scores: Mapping[tuple[str, int], float] = SCORES, **options: Any) -> Document:
    """A sweep over ranks and target sets, one seed."""
    records = [
        CellRecord(
            Cell(name, rank, 0),
            4,
            rank * 1000 * len(name),
            rank * 1000 * len(name),
            10**6 + rank * 1000 * len(name),
            10,
            1.0,
            0.5,
            {"accuracy": 0.2},
            {"accuracy": value},
        )
        for (name, rank), value in scores.items()
    ]
    table = tuple(entry_of(own.cell.targets, own.cell.r, [own], "accuracy") for own in records)
    best = best_of(table, False)
    assert best is not None
    sets = tuple(
        TargetSet(name, ("query",), 4, 1000 * len(name), 16, "x")
        for name in dict.fromkeys(own.targets for own in table)
    )
    given = {"model": "tiny", "data": "words.jsonl", "task": "sequence-classification", "share": 0.95}
    return RankSweepResult(
        Path("x"),
        {**given, **options},
        {"train": 10, "held_out": 5},
        "cpu",
        False,
        "accuracy",
        False,
        sets,
        0.2,
        table,
        best,
        enough(table, 0.2, 0.95, False),
        4.0,
        records,
    ).to_json()


def intrinsic(curve: Mapping[int, float] = CURVE, majority: float = 0.2, full: float = 0.8) -> Document:
    """A sweep over d of a model of a million parameters, one seed."""
    points = tuple(Point(d, 0.003, value, value, value, value) for d, value in curve.items())
    return IntrinsicResult(
        Path("x"),
        {"model": "tiny", "data": "words.jsonl", "projection": "auto"},
        {"train": 10, "validation": 5, "test": 5},
        10**6,
        (),
        "accuracy",
        0.2,
        majority,
        Point(None, 0.0001, full, full, full, full),
        points,
        intrinsic_dimension(points, full, 0.2),
        (),
        60.0,
        [RunRecord(Run("start", None, None, 0), 0, 0.0, None, {"accuracy": 0.2}, {"accuracy": 0.2})],
    ).to_json()


def extract(residual: float = 0.0, unequal: int = 0, name: str = "layer.0.weight") -> Document:
    """An extraction of one weight at rank 2, as `loracle extract --json` puts it out."""
    tensor = ExtractedTensor(name, (64, 64), 2, "float32", 1.0, residual, residual, residual, unequal, 4096)
    summary = ExtractionSummary(Path("out"), (tensor,), (), 3, 256, 1500)
    return {
        "kind": "loracle extract",
        "version": 1,
        "machine": machine_document(("numpy",)),
        "options": {"rank": 2, "base": "some/base", "tuned": "some/tuned"},
        **asdict(summary),
        "out": "out",
        "complete": summary.complete,
        "exact": summary.exact,
    }


def certificate(*, passed: bool = True, adapter_bytes: int = 1000, base_bytes: int = 10**6) -> Document:
    """A certificate of two weights, one of them merged."""
    weights = [
        weight(Verdict.EXACT, "merged.weight")
        if passed
        else weight(Verdict.MISSING, passed=False, unequal=9),
        replace(weight(Verdict.UNTOUCHED, "same.weight"), merged=False),
    ]
    sizes = {"base": base_bytes, "adapter": adapter_bytes, "candidate": base_bytes}
    found = report(*weights, error=1e-6, tolerance=1e-5)
    inputs = tuple(
        replace(own, files=tuple(replace(file, size=sizes[own.role]) for file in own.files))
        for own in found.inputs
    )
    made: Document = certificate_of(replace(found, inputs=inputs)).to_json()
    return made


def write(folder: Path, documents: Mapping[str, Document]) -> Path:
    """Write documents by the names of their files, and return the folder."""
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


def everything() -> dict[str, Document]:
    """A document of each command that is quick to make; that of `rank analyse` is the command's own."""
    return {
        "bench/bench.json": bench(),
        "sweep/rank.json": sweep(),
        "intrinsic.json": intrinsic(),
        "extract.json": extract(),
        "certificate.json": certificate(),
    }


def with_text(value: Any, text: str, kept: Sequence[str] = ("kind", "format", "metric")) -> Any:
    """Return JSON with a text in the place of every other, but those of the fields that say what it is."""
    if isinstance(value, dict):
        return {key: own if key in kept else with_text(own, text) for key, own in value.items()}
    if isinstance(value, list):
        return [with_text(own, text) for own in value]
    return text if isinstance(value, str) else value
