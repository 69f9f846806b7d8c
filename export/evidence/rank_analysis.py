"""What the page needs of `loracle rank analyse`'s result."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .machine import machine_line

KIND, VERSION, COMMAND = "loracle rank analyse", 1, "loracle rank analyse ADAPTER --json"


@dataclass(frozen=True)
class Layer:
    """An update; see `loracle.files.rank_analysis.LayerRanks`."""

    name: str
    r: int
    rank_for_energy: int
    effective_rank: float
    amplification: float | None


@dataclass(frozen=True)
class RankAnalysis:
    """The document.

    Attributes:
        file: its name.
        machine: in a line.
        energy: the share of each update that the proposal keeps.
        layers: in the adapter's order.
        parameters, proposed_parameters: of the factors as they are, and with the proposed ranks.
    """

    file: str
    machine: str
    energy: float
    layers: tuple[Layer, ...]
    parameters: int
    proposed_parameters: int


def read(document: Fields, file: str) -> RankAnalysis:
    """Return the document. Raises FileError: it is not as it is written."""
    return RankAnalysis(
        file,
        machine_line(document),
        document.positive("energy"),
        tuple(
            Layer(
                own.text("name"),
                own.least_one("r"),
                own.count("rank_for_energy"),
                own.number("effective_rank"),
                own.maybe_positive("amplification"),
            )
            for own in document.some_parts("layers")
        ),
        document.least_one("parameters"),
        document.least_one("proposed_parameters"),
    )
