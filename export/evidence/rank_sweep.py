"""What the page needs of `loracle rank sweep`'s result."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .machine import machine_line

KIND, VERSION, COMMAND = "loracle rank sweep", 1, "loracle rank sweep --model DIR --data FILE --out DIR"


@dataclass(frozen=True)
class Entry:
    """A target set at a rank; see `loracle.torch_impl.rank_sweep.table.Entry`."""

    targets: str
    rank: int
    parameters: int
    score: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Enough:
    """The smallest rank of a target set that is enough; None where none is."""

    targets: str
    rank: int | None
    parameters: int | None


@dataclass(frozen=True)
class RankSweep:
    """The document.

    Attributes:
        file: its name.
        machine: in a line.
        model, data, task: names.
        metric: what cells are compared by.
        lower_is_better: whether it is one of loss.
        share: of the best gain that is called enough.
        seeds: how many.
        before: the untrained model's score.
        table: an entry for each set and rank.
        enough: for each set.
        total: parameters of the model with an adapter; None where nothing trained.
    """

    file: str
    machine: str
    model: str
    data: str
    task: str
    metric: str
    lower_is_better: bool
    share: float
    seeds: int
    before: float
    table: tuple[Entry, ...]
    enough: tuple[Enough, ...]
    total: int | None


def read(document: Fields, file: str) -> RankSweep:
    """Return the document. Raises FileError: it is not as it is written."""
    options = document.part("options")
    cells = document.some_parts("cells")
    totals = [total for own in cells if (total := own.maybe_least_one("total")) is not None]
    return RankSweep(
        file,
        machine_line(document),
        options.text("model"),
        options.text("data"),
        options.text("task"),
        document.text("metric"),
        document.flag("lower_is_better"),
        options.positive("share"),
        len({own.count("seed") for own in cells}),
        document.number("before"),
        tuple(map(_entry, document.some_parts("table"))),
        tuple(
            Enough(own.text("targets"), own.maybe_least_one("rank"), own.maybe_least_one("parameters"))
            for own in document.some_parts("enough")
        ),
        max(totals, default=None),
    )


def _entry(own: Fields) -> Entry:
    return Entry(
        own.text("targets"),
        own.least_one("rank"),
        own.least_one("parameters"),
        own.maybe_number("score"),
        own.maybe_number("low"),
        own.maybe_number("high"),
    )
