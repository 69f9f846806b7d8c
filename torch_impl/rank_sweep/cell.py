"""One cell: an adapter of a rank on a target set, trained from a seed and measured on held-out data."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracle.reference import NonFiniteError

from ..curve import Evaluation
from ..trainer import Progress
from ..training import finetune
from .options import RankSweepOptions
from .sizes import TargetSet


@dataclass(frozen=True)
class Cell:
    """Which cell.

    Attributes:
        targets: the name of the set.
        r: the rank that is trained.
        seed: of its randomness.
    """

    targets: str
    r: int
    seed: int

    @property
    def name(self) -> str:
        """What its record is called: a digest, as long for every cell."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CellRecord:
    """What a cell came to; JSON values.

    Attributes:
        cell: which one.
        layers: adapted.
        parameters: of A and B.
        trainable: parameters that were trained, a classifier's head among them.
        total: parameters of the model with them.
        steps, seconds: of training; the seconds with both evaluations.
        loss: mean of the training loss over the last tenth of the steps, in nats a label.
        before, after: the held-out metrics by name; ``after`` is None where training diverged.
        diverged: why there are none.
    """

    cell: Cell
    layers: int
    parameters: int
    trainable: int | None
    total: int | None
    steps: int | None
    seconds: float
    loss: float | None
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None
    diverged: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        values = asdict(self)
        return {**values.pop("cell"), **values}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "CellRecord":
        """Return the record that `to_json` was of. Raises KeyError and TypeError where it is none."""
        rest = dict(values)
        cell = Cell(*(rest.pop(name) for name in ("targets", "r", "seed")))
        return CellRecord(cell, **rest)


def make_cell(
    cell: Cell,
    options: RankSweepOptions,
    target: TargetSet,
    files: tuple[Path, Path],
    scratch: Path,
    progress: Progress | None = None,
) -> CellRecord:
    """Train and measure; the adapter is thrown away.

    Args:
        cell: which one.
        options: of the sweep.
        target: its set, in the model.
        files: to learn from, and to measure on.
        scratch: a folder that is removed afterwards.
        progress: told of every step.
    """
    own = options.cell(*files, scratch / "adapter", target.modules, cell.r, cell.seed)
    layers, parameters = target.layers, cell.r * target.per_rank
    start = time.perf_counter()
    try:
        result = finetune(own, progress)
    except NonFiniteError as error:
        seconds = time.perf_counter() - start
        return CellRecord(
            cell, layers, parameters, None, None, None, seconds, None, None, None, str(error)
        )  # fmt: skip
    before, after = (_metrics(result.evaluations[at]) for at in (0, -1))
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    # A metric that is no number is no JSON.
    diverged = None if after is not None else "the held-out loss is not finite"
    return CellRecord(
        cell,
        layers,
        parameters,
        result.trainable,
        result.total,
        result.steps,
        result.seconds,
        math.fsum(tail) / len(tail),
        before,
        after,
        diverged,
    )


def _metrics(one: Evaluation) -> dict[str, float] | None:
    values = {"loss": one.loss, **one.metrics}
    return values if all(map(math.isfinite, values.values())) else None
