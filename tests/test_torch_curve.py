"""The record of a run: its best evaluation, how long ago that was, and the table that it is written as."""

import csv
import json
import math

from loracle.torch_impl.curve import COLUMNS, Curve, Evaluation, Step


def curve(*losses: float, before: float | None = None) -> Curve:
    """A step for each held-out loss, and an evaluation after each."""
    steps = [Step(n, n / 2, 1.0 / n, 0.1, 3.0) for n in range(1, len(losses) + 1)]
    first = [] if before is None else [Evaluation(0, before)]
    return Curve(steps, [*first, *(Evaluation(n, loss) for n, loss in enumerate(losses, start=1))])


def test_the_best_is_the_first_of_the_lowest() -> None:
    found = curve(3.0, 2.0, 4.0, 2.0).best
    assert found is not None
    assert found.step == 2


def test_the_untrained_model_and_nan_are_never_best() -> None:
    found = curve(math.nan, 2.0, math.nan, before=1.0).best
    assert found is not None
    assert found.step == 2
    assert curve(before=1.0).best is None
    assert curve(math.nan).best is None


def test_staleness_counts_evaluations_since_the_best() -> None:
    assert [curve(*losses).stale() for losses in ((3, 2), (3, 2, 2), (3, 2, 4, 5), (2, 3, 1))] == [0, 1, 2, 0]
    assert curve(before=1.0).stale() == 0
    assert curve(math.nan, math.nan).stale() == 2


def test_nothing_is_lost_on_the_way_through_json() -> None:
    whole = curve(0.1, 1 / 3, before=math.pi)
    whole.evaluations.append(Evaluation(2, 0.7, {"accuracy": 0.1 + 0.2}))
    assert Curve.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_the_table_has_a_row_for_each_step_and_all_digits() -> None:
    whole = curve(0.5, 1 / 3, before=0.1 + 0.2)
    del whole.evaluations[1]
    lines = whole.to_csv().splitlines()
    assert lines[0] == ",".join(COLUMNS) == "step,epoch,loss,learning_rate,grad_norm,eval_loss"
    rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert [row["eval_loss"] for row in rows] == [repr(0.1 + 0.2), "", repr(1 / 3)]
    assert [row["loss"] for row in rows] == ["", "1.0", "0.5"]
    assert rows[2]["epoch"] == "1.0"
    assert rows[1]["learning_rate"] == "0.1"
    assert rows[1]["grad_norm"] == "3.0"
    assert curve(2.0).to_csv().splitlines()[1].startswith("1,")
