"""What the page needs of `loracle bench`'s result."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .machine import machine_line

KIND, VERSION, COMMAND = "loracle bench", 1, "loracle bench --out DIR"


@dataclass(frozen=True)
class Row:
    """A method in a setting and phase; see `loracle.export.bench.report.row_of`."""

    method: str
    label: str
    batch: int
    length: int
    phase: str
    ratio: float
    interval: tuple[float, float]
    seconds: float
    base_seconds: float
    parameters: int
    parameter_bytes: int
    model_bytes: int
    paper: float | None

    @property
    def place(self) -> tuple[int, int, str]:
        """Setting and phase."""
        return self.batch, self.length, self.phase


@dataclass(frozen=True)
class Claimed:
    """What the paper's claim comes to for a method; see `loracle.export.bench.report.findings`."""

    place: tuple[int, int, str]
    method: str
    control: tuple[float, float]
    holds: bool


@dataclass(frozen=True)
class Bench:
    """The document.

    Attributes:
        file: its name.
        machine: in a line.
        model: its name.
        layers, full_layers: measured, and of the model.
        full_parameters: of the model with all layers.
        random: whether its weights are random.
        provider, dtype: as asked for.
        rounds, blocks, threads, window: of `loracle.export.bench.settings.Effort`.
        rows, findings: in the document's order.
    """

    file: str
    machine: str
    model: str
    layers: int
    full_layers: int
    full_parameters: int
    random: bool
    provider: str
    dtype: str
    rounds: int
    blocks: int
    threads: int
    window: float
    rows: tuple[Row, ...]
    findings: tuple[Claimed, ...]


def read(document: Fields, file: str) -> Bench:
    """Return the document. Raises FileError: it is not as it is written."""
    model, effort = document.part("model"), document.part("effort")
    return Bench(
        file,
        machine_line(document),
        model.text("name"),
        model.least_one("layers"),
        model.least_one("full_layers"),
        model.least_one("full_parameters"),
        model.flag("random_weights"),
        document.text("provider"),
        document.text("dtype"),
        effort.least_one("rounds"),
        effort.least_one("blocks"),
        effort.least_one("threads"),
        effort.positive("window"),
        tuple(map(_row, document.some_parts("rows"))),
        tuple(map(_finding, document.parts("findings"))),
    )


def _row(row: Fields) -> Row:
    return Row(
        row.text("method"),
        row.text("label"),
        row.least_one("batch"),
        row.least_one("length"),
        row.text("phase"),
        row.positive("ratio"),
        row.interval("interval"),
        row.positive("seconds"),
        row.positive("base_seconds"),
        row.least_one("parameters"),
        row.least_one("parameter_bytes"),
        row.least_one("model_bytes"),
        row.maybe_positive("paper"),
    )


def _finding(own: Fields) -> Claimed:
    place = own.least_one("batch"), own.least_one("length"), own.text("phase")
    return Claimed(place, own.text("method"), own.interval("control"), own.flag("holds"))
