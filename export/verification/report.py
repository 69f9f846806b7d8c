"""What `verify` found: a check a row, each with the figure it stands on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .digests import InputDigest
from .quality import Quality
from .verdict import WeightVerdict

if TYPE_CHECKING:
    from .adapter_summary import AdapterSummary
    from .graph_summary import GraphSummary
    from .task_metric import TaskMetric


_NAMED = 8


def named_first(lines: Sequence[str], what: str) -> tuple[str, ...]:
    """The first lines, and how many more there are of what they are about."""
    more = (f"and {len(lines) - _NAMED} more {what}",) if len(lines) > _NAMED else ()
    return (*lines[:_NAMED], *more)


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        passed: whether nothing is wrong, as far as it was asked.
        figure: what was measured; why not, where it was not asked.
        failures: what is wrong.
        asked: whether the question was asked.
    """

    name: str
    passed: bool
    figure: str
    failures: tuple[str, ...] = ()
    asked: bool = True


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one candidate against one base model and adapter.

    Attributes:
        error: the largest of an output, where it is held to `tolerance`.
        quality: what was measured instead, where the candidate is quantised.
        weights: the verdict on each.
        sha256: of the data of the task, where the candidate is one, see `TaskDocument.sha256`.
        lora: what the adapter is, where there is one.
        graph: what was found in the graph, where there is one.
        metric: what the models are worth on the user's data, where there are any.
        inputs: the digests of the files, where they were asked for.
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
    lora: AdapterSummary | None = None
    graph: GraphSummary | None = None
    metric: TaskMetric | None = None
    inputs: tuple[InputDigest, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What a certificate holds of it, but for the verdicts on the weights and the digests."""
        return {
            "candidate": self.candidate,
            "model": self.model,
            "adapter": self.adapter,
            "passed": self.passed,
            "lora": None if self.lora is None else self.lora.to_json(),
            "logits": {"largest_error": _number(self.error), "tolerance": _number(self.tolerance)},
            "quality": None if self.quality is None else self.quality.to_json(),
            "metric": None if self.metric is None else self.metric.to_json(),
            "graph": None if self.graph is None else self.graph.to_json(),
            "checks": [
                {
                    "name": c.name,
                    "passed": c.passed,
                    "asked": c.asked,
                    "figure": c.figure,
                    "failures": list(c.failures),
                }
                for c in self.checks
            ],
        }


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
