"""What a measurement gives back, and the files that it writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracle.files.machine import machine_document

from .dimension import Dimension, Point
from .plot import dimension_plot
from .projection import is_dense
from .run import RunRecord

KIND, VERSION = "loracle intrinsic", 1
"""Of the JSON file; the version is another one when a reader has to know."""

_PACKAGES = ("loracle", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class IntrinsicResult:
    """What was measured.

    Attributes:
        out: the folder written.
        options: see `IntrinsicOptions.to_json`.
        data: examples of each split, classes, and SHA-256 of the files.
        parameters: D.
        layers: the layers with a scale of their own, where the projection has them.
        metric: the score's name.
        start: the untrained model's score, mean over the seeds.
        majority: the score of always naming the class that is most frequent in training.
        full: all parameters trained.
        points: subspaces, by d.
        dimension: d90 and its like.
        diverged: the d with which training diverged at every learning rate.
        seconds: of all runs, those before a resumption included.
        records: of the runs.
    """

    out: Path
    options: Mapping[str, Any]
    data: Mapping[str, Any]
    parameters: int
    layers: tuple[str, ...]
    metric: str
    start: float
    majority: float
    full: Point
    points: tuple[Point, ...]
    dimension: Dimension
    diverged: tuple[int, ...]
    seconds: float
    records: Sequence[RunRecord]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values; no path."""
        return {
            "kind": KIND,
            "version": VERSION,
            "machine": machine_document(_PACKAGES),
            "options": dict(self.options),
            "data": dict(self.data),
            "parameters": self.parameters,
            "layers": list(self.layers),
            "metric": self.metric,
            "start": self.start,
            "majority": self.majority,
            "full": asdict(self.full),
            "points": [self._point(point) for point in self.points],
            **asdict(self.dimension),
            "diverged": list(self.diverged),
            "seconds": self.seconds,
            "runs": [record.to_json() for record in self.records],
        }

    def _point(self, point: Point) -> dict[str, Any]:
        assert point.d is not None
        inner = point.d - len(self.layers)
        dense = is_dense(self.options["projection"], self.parameters, inner)
        return {
            **asdict(point),
            "of_full": point.score / self.full.score,
            "projection": "dense" if dense else "fastfood",
        }


def write_result(folder: Path, result: IntrinsicResult) -> None:
    """Write ``intrinsic.png`` and ``intrinsic.json`` into an existing folder; for use inside `output_folder`.

    Raises:
        OSError: a file cannot be written.
    """
    model, task = result.options["model"], result.options["data"]
    dimension_plot(
        result.points,
        result.full,
        result.start,
        result.dimension,
        folder / "intrinsic.png",
        metric=result.metric,
        title=f"{model}, {result.parameters:,} parameters, on {task}",
    )
    text = json.dumps(result.to_json(), indent=2) + "\n"
    (folder / "intrinsic.json").write_text(text, encoding="utf-8")
