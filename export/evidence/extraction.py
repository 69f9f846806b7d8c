"""What the page needs of `loracle extract`'s result."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .machine import machine_line

KIND, VERSION = "loracle extract", 1
COMMAND = "loracle extract --base DIR --tuned DIR --rank R --out DIR --json"


@dataclass(frozen=True)
class Weight:
    """A weight with an update; see `loracle.torch_impl.extraction.summary.ExtractedTensor`."""

    name: str
    r: int
    relative_residual: float
    unequal: int
    entries: int


@dataclass(frozen=True)
class Extraction:
    """The document.

    Attributes:
        file: its name.
        machine: in a line.
        base, tuned: names of the folders.
        weights: in the base's order.
        parameters, nbytes: of the adapter.
        complete: whether all that differs is in the adapter.
        exact: whether its merge is the tuned checkpoint, bit for bit.
    """

    file: str
    machine: str
    base: str
    tuned: str
    weights: tuple[Weight, ...]
    parameters: int
    nbytes: int
    complete: bool
    exact: bool


def read(document: Fields, file: str) -> Extraction:
    """Return the document. Raises FileError: it is not as it is written."""
    options = document.part("options")
    return Extraction(
        file,
        machine_line(document),
        _last(options.text("base")),
        _last(options.text("tuned")),
        tuple(
            Weight(
                own.text("name"),
                own.count("r"),
                own.number("relative_residual"),
                own.count("unequal"),
                own.least_one("entries"),
            )
            for own in document.some_parts("tensors")
        ),
        document.least_one("parameters"),
        document.least_one("nbytes"),
        document.flag("complete"),
        document.flag("exact"),
    )


def _last(path: str) -> str:
    """Return the last component: a page that is passed on tells no paths."""
    return path.rstrip("/").rpartition("/")[2] or path
