"""What the page needs of `loracle intrinsic`'s result."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .machine import machine_line

KIND, VERSION = "loracle intrinsic", 1
COMMAND = "loracle intrinsic --model DIR --data FILE --out DIR"


@dataclass(frozen=True)
class Point:
    """A subspace; see `loracle.torch_impl.intrinsic.dimension.Point`."""

    d: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Intrinsic:
    """The document; see `loracle.torch_impl.intrinsic.results.IntrinsicResult`."""

    file: str
    machine: str
    model: str
    data: str
    projection: str
    parameters: int
    metric: str
    start: float
    majority: float
    full: float
    points: tuple[Point, ...]
    threshold: float
    d90: int | None
    threshold_above_start: float
    d90_above_start: int | None
    seeds: int


def read(document: Fields, file: str) -> Intrinsic:
    """Return the document. Raises FileError: it is not as it is written."""
    options = document.part("options")
    return Intrinsic(
        file,
        machine_line(document),
        options.text("model"),
        options.text("data"),
        options.text("projection"),
        document.least_one("parameters"),
        document.text("metric"),
        document.number("start"),
        document.number("majority"),
        document.part("full").number("score"),
        tuple(
            Point(own.least_one("d"), own.number("score"), own.number("low"), own.number("high"))
            for own in document.parts("points")
        ),
        document.number("threshold"),
        document.maybe_least_one("d90"),
        document.number("threshold_above_start"),
        document.maybe_least_one("d90_above_start"),
        len({own.count("seed") for own in document.some_parts("runs")}),
    )
