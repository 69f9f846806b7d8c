"""The table of a sweep: a row a target set, a column a rank, over the seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .cell import CellRecord


@dataclass(frozen=True)
class Entry:
    """A target set at a rank.

    Attributes:
        targets: the set's name.
        rank: of the column.
        r: the rank trained, another one where parameters are constant.
        parameters: of A and B.
        score: mean over the seeds that trained; None where none did.
        low, high: the lowest and the highest of them.
        seconds: of training and measuring one, mean.
        diverged: seeds that did not train.
    """

    targets: str
    rank: int
    r: int
    parameters: int
    score: float | None
    low: float | None
    high: float | None
    seconds: float
    diverged: int


@dataclass(frozen=True)
class Enough:
    """The smallest rank of a target set that is enough.

    Attributes:
        targets: the set's name.
        rank, r: of `Entry`; None where no rank is enough.
        parameters: of A and B at that rank.
    """

    targets: str
    rank: int | None
    r: int | None
    parameters: int | None


def entry_of(targets: str, rank: int, records: Sequence[CellRecord], metric: str) -> Entry:
    """Return what the records of all seeds come to."""
    scores = [record.after[metric] for record in records if record.after is not None]
    return Entry(
        targets,
        rank,
        records[0].cell.r,
        records[0].parameters,
        math.fsum(scores) / len(scores) if scores else None,
        min(scores, default=None),
        max(scores, default=None),
        math.fsum(record.seconds for record in records) / len(records),
        len(records) - len(scores),
    )


def untrained(records: Iterable[CellRecord], metric: str) -> float | None:
    """Return the score before training, mean over the seeds; None where nothing trained.

    It depends on the seed alone, by a classifier's head.
    """
    found: Mapping[int, float] = {
        record.cell.seed: record.before[metric] for record in records if record.before is not None
    }
    return math.fsum(found.values()) / len(found) if found else None


def best_of(entries: Iterable[Entry], lower_is_better: bool) -> Entry | None:
    """Return the first entry of the best score; None where there is no score."""
    best: Entry | None = None
    for entry in entries:
        if entry.score is None:
            continue
        if best is None or best.score is None or _gain(entry.score, best.score, lower_is_better) > 0:
            best = entry
    return best


def enough(
    entries: Sequence[Entry], before: float, share: float, lower_is_better: bool
) -> tuple[Enough, ...]:
    """Return for each target set the smallest rank that gains ``share`` of what the best entry gains over the
    untrained model; none where the best gains nothing."""
    best = best_of(entries, lower_is_better)
    most = 0.0
    if best is not None and best.score is not None:
        most = _gain(best.score, before, lower_is_better)
    found = []
    for targets in dict.fromkeys(entry.targets for entry in entries):
        first = next(
            (
                entry
                for entry in sorted(entries, key=lambda entry: entry.rank)
                if entry.targets == targets
                and entry.score is not None
                and most > 0.0
                and _gain(entry.score, before, lower_is_better) >= share * most
            ),
            None,
        )
        if first is None:
            found.append(Enough(targets, None, None, None))
        else:
            found.append(Enough(targets, first.rank, first.r, first.parameters))
    return tuple(found)


def _gain(score: float, before: float, lower_is_better: bool) -> float:
    return before - score if lower_is_better else score - before
