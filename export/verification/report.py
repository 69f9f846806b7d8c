"""What `verify` found: a check a row, each with the figure it stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .quality import Quality
from .verdict import WeightVerdict


@dataclass(frozen=True)
class Check:
    """One question and its answer: `figure` is what was measured, `failures` name what is wrong."""

    name: str
    passed: bool
    figure: str
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one candidate against one base model and adapter.

    Attributes:
        error: the largest of an output, where it is held to `tolerance`.
        quality: what was measured instead, where the candidate is quantised.
        weights: the verdict on each.
        sha256: of the data of the task, where the candidate is one, see `TaskDocument.sha256`.
    """

    candidate: str
    model: str
    adapter: str | None
    checks: tuple[Check, ...]
    error: float | None = None
    tolerance: float | None = None
    quality: Quality | None = None
    sha256: str | None = None
    weights: tuple[WeightVerdict, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """A plain object for `--json`: format version, inputs, checks, verdict."""
        return {
            "format": 1,
            "candidate": self.candidate,
            "model": self.model,
            "adapter": self.adapter,
            "passed": self.passed,
            "logits": {"largest_error": _number(self.error), "tolerance": _number(self.tolerance)},
            "quality": None if self.quality is None else self.quality.to_json(),
            "checks": [
                {"name": c.name, "passed": c.passed, "figure": c.figure, "failures": list(c.failures)}
                for c in self.checks
            ],
        }


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
