"""What is said of one weight of a candidate: one verdict, with the figures it stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What one weight of a candidate is, beside the base, the adapter, and their exact merge."""

    EXACT = "correctly rounded"
    UNTOUCHED = "untouched"
    ROUNDED_TWICE = "rounded twice"
    WITHIN_ULPS = "within k ulp"
    DRIFTED = "drifted"
    MISSING = "delta missing"
    TWICE = "delta twice"
    OTHER_SCALING = "delta with another scaling"
    OTHER_ADAPTER = "delta of another adapter"
    TRANSPOSED = "delta transposed"
    CHANGED = "changed, though the adapter leaves it alone"
    DAMAGED = "entries changed"
    UNEXPLAINED = "no update that explains it"
    TIE_BROKEN = "tied pair broken"
    NOT_FINITE = "not finite"
    WRONG_SHAPE = "wrong shape or dtype"
    ABSENT = "absent"
    ADDED = "added"
    QUANTIZED = "quantised, as the base's options say"


@dataclass(frozen=True)
class Witness:
    """One entry that is not the correctly rounded merge."""

    index: tuple[int, ...]
    expected: float
    got: float


@dataclass(frozen=True)
class WeightVerdict:
    """What one weight of a candidate is.

    Attributes:
        name: of the weight, as the base's checkpoint has it; of what is added, the candidate's name.
        passed: whether it may be so. A merge that rounds otherwise than once passes inside its derived bound.
        place: where in the candidate the weight was found, and how; "" where it has the same name there.
        merged: whether the adapter changes this weight.
        entries: of the tensor.
        unequal: how many of them are not the correctly rounded merge.
        ulps: (k, entries) in ascending order: so many entries are k or fewer, but more than the k before,
            representable numbers away from the correctly rounded merge; k is 0 and powers of two.
        detail: what was found, in words and figures.
        witness: the entry that is furthest away; None where none is.
    """

    name: str
    verdict: Verdict
    passed: bool
    place: str = ""
    merged: bool = False
    entries: int = 0
    unequal: int = 0
    ulps: tuple[tuple[int, int], ...] = ()
    detail: str = ""
    witness: Witness | None = None

    def __str__(self) -> str:
        said = f"{self.name}: {self.verdict}"
        if self.unequal:
            said += f"; {self.unequal} of {self.entries} entries differ from the correctly rounded merge"
        if self.witness is not None:
            where = ",".join(map(str, self.witness.index))
            said += f", [{where}]: expected {self.witness.expected!r}, got {self.witness.got!r}"
        return f"{said}; {self.detail}" if self.detail else said

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON has them: no NaN, no infinity."""
        witness = self.witness
        return {
            "name": self.name,
            "verdict": self.verdict.name.lower(),
            "passed": self.passed,
            "place": self.place,
            "merged": self.merged,
            "entries": self.entries,
            "unequal": self.unequal,
            "ulps": [{"at_most": most, "entries": entries} for most, entries in self.ulps],
            "detail": self.detail,
            "witness": None
            if witness is None
            else {
                "index": list(witness.index),
                "expected": _json_number(witness.expected),
                "got": _json_number(witness.got),
            },
        }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
