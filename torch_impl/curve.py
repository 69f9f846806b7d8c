"""What a run measured, step by step: the record that logs, plots, early stopping and resuming read."""

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss")
"""Of ``loss.csv``."""


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        epoch: passes over the data when it was done.
        loss: mean over the step's labels before the update, in nats.
        learning_rate: of A.
        grad_norm: of all gradients before clipping.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out data.

    Attributes:
        step: optimizer steps done before it; 0 is the model as it came.
        loss: mean over the labels, in nats.
        metrics: the task's measures, by name; JSON values.
    """

    step: int
    loss: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Curve:
    """All steps and evaluations of a run so far, in order; the training loop appends to both."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return len(self.steps)

    def evaluated(self, step: int) -> bool:
        """Whether there was an evaluation after ``step`` steps."""
        return bool(self.evaluations) and self.evaluations[-1].step == step

    @property
    def best(self) -> Evaluation | None:
        """The first evaluation of the lowest loss; that of the untrained model does not count."""
        trained = [one for one in self.evaluations if one.step > 0 and not math.isnan(one.loss)]
        return min(trained, key=lambda one: one.loss, default=None)

    def stale(self) -> int:
        """Return the evaluations since `best`."""
        best = self.best
        return sum(one.step > (0 if best is None else best.step) for one in self.evaluations)

    def to_json(self) -> dict[str, Any]:
        """Return the curve as JSON values, no digit lost."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Curve":
        """Return the curve that `to_json` was of."""
        return Curve(
            [Step(**one) for one in values["steps"]],
            [Evaluation(**one) for one in values["evaluations"]],
        )

    def to_csv(self) -> str:
        """Return the table of `COLUMNS`, a row a step; numbers in the fewest digits that give them back.

        ``eval_loss`` is empty where there was no evaluation, and the row of step 0 has nothing else.
        """
        held_out = {one.step: one.loss for one in self.evaluations}
        text = StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        if 0 in held_out:
            table.writerow((0, 0.0, "", "", "", repr(held_out[0])))
        for one in self.steps:
            numbers = (one.epoch, one.loss, one.learning_rate, one.grad_norm)
            last = repr(held_out[one.step]) if one.step in held_out else ""
            table.writerow((one.step, *map(repr, numbers), last))
        return text.getvalue()
