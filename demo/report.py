"""The demo's result as one HTML page that needs nothing beside it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from . import charts, figures
from .settings import Task

if TYPE_CHECKING:
    from loracle.export.verification.report import Check

    from .scores import Comparison
    from .speed import DecodeSpeed

EXAMPLES = 8
BASE = "base"


@dataclass(frozen=True)
class Example:
    """One held-out text with both models' answers; the scores are those of the single text, percent."""

    source: str
    base: str
    base_score: float
    tuned: str
    tuned_score: float
    reference: str


@dataclass(frozen=True)
class TaskReport:
    """What the demo found out about one task.

    Attributes:
        task: its settings.
        origin: where its text comes from.
        train_rows, heldout_rows: number of examples.
        quality: held-out score before and after, with the bootstrap's interval and p-value.
        before, after: the score of each held-out text, percent.
        losses: each step's, in nats per token.
        training_seconds: wall time of the fine-tune.
        trainable_parameters, total_parameters: of the model with its adapter.
        adapter_bytes, model_bytes: of the weight files.
        task_bytes: of the merged tensors beside the base: what the task costs on disk.
        switch_seconds: from asking for the task, once in memory, to being able to run it.
        checks: what ``verify`` answered.
        speeds: decode speed by the name of the graph; the first is the base model's.
        examples: the first of the held-out file, see :func:`first_examples`.
    """

    task: Task
    origin: str
    train_rows: int
    heldout_rows: int
    quality: Comparison
    before: tuple[float, ...]
    after: tuple[float, ...]
    losses: tuple[float, ...]
    training_seconds: float
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    model_bytes: int
    task_bytes: int
    switch_seconds: float
    checks: tuple[Check, ...]
    speeds: Mapping[str, DecodeSpeed]
    examples: tuple[Example, ...]

    @property
    def verified(self) -> bool:
        """Whether there were checks and all passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class DemoReport:
    """The whole run.

    Attributes:
        model: the base model's name.
        seconds: wall time of the run.
        tasks: in the order they ran.
        machine: (label, value) lines: processor, cores, memory, system.
        versions: (package, version) lines.
    """

    model: str
    seconds: float
    tasks: tuple[TaskReport, ...]
    machine: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]


def first_examples(
    sources: Sequence[str],
    base: tuple[Sequence[str], Sequence[float]],
    tuned: tuple[Sequence[str], Sequence[float]],
    references: Sequence[str],
) -> tuple[Example, ...]:
    """Return the first eight texts of the held-out file with both answers.

    The file is in the order of its sources' hashes, which nobody chose; so these are a sample, not a choice.

    Args:
        sources, references: of the held-out file, in its order.
        base, tuned: (answers, score of each) in the same order.
    """
    rows = list(zip(sources, *base, *tuned, references, strict=True))
    return tuple(Example(*row) for row in rows[:EXAMPLES])


def render(report: DemoReport) -> str:
    """Return the page: HTML with style and charts inside, no script, nothing fetched, every text escaped."""
    source = importlib.resources.files(__package__).joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    template = environment.from_string(source)
    return template.render(report=report, figures=figures, charts=charts, ratio_rows=_ratio_rows)


def _ratio_rows(task: TaskReport) -> list[tuple[str, float, float, float]]:
    return [(name, s.low, s.ratio, s.high) for name, s in list(task.speeds.items())[1:]]
