"""What the verdicts on all weights come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .report import Check, named_first
from .verdict import Verdict, WeightVerdict


def counted(verdicts: Sequence[WeightVerdict]) -> dict[Verdict, int]:
    """How many weights have each verdict, in the order of `Verdict`."""
    found = Counter(verdict.verdict for verdict in verdicts)
    return {verdict: found[verdict] for verdict in Verdict if found[verdict]}


def worst_first(verdicts: Sequence[WeightVerdict]) -> list[WeightVerdict]:
    """Those that do not pass, then those that are not correctly rounded; the more entries the earlier."""
    wrong = [verdict for verdict in verdicts if not verdict.passed or verdict.unequal]
    return sorted(wrong, key=lambda own: (own.passed, -own.unequal))


def weights_check(verdicts: Sequence[WeightVerdict], *, exact: bool) -> Check:
    """Whether all weights pass: as the correctly rounded merge where that is demanded, else as a merge
    whose roundings are inside their bound."""
    name = "weights are the correctly rounded merge" if exact else "weights are the merge, within rounding"
    counts = [f"{number} {verdict}" for verdict, number in counted(verdicts).items()]
    merged = sum(verdict.merged for verdict in verdicts)
    lines = [str(verdict) for verdict in verdicts if not verdict.passed]
    figure = f"{len(verdicts)} weights, {merged} merged: {', '.join(counts)}"
    return Check(name, not lines, figure, named_first(lines, "weights"))
