"""Is rank 1 enough for query and value together, and does query alone want more?"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from . import numbers, paper
from .charts import heat_map
from .finding import Chart, Finding, Table, Verdict, table
from .rank_sweep import RankSweep

QUERY, QUERY_AND_VALUE = "q", "qv"
_MOST_RANKS, _MOST_SETS = 12, 16


def findings(documents: Sequence[RankSweep]) -> tuple[Finding, ...]:
    """Return a finding for each sweep."""
    return tuple(map(_finding, documents))


def command_of(own: RankSweep) -> str:
    """Return the command, but for the options of training."""
    ranks = ",".join(str(rank) for rank in dict.fromkeys(entry.rank for entry in own.table))
    sets = ";".join(dict.fromkeys(entry.targets for entry in own.table))
    words = ["loracle", "rank", "sweep", "--model", own.model, "--data", own.data, "--task", own.task]
    return shlex.join([*words, "--ranks", ranks, "--targets", sets, "--metric", own.metric, "--out", "DIR"])


def subject_of(own: RankSweep) -> str:
    """Return the model, the data and what counts."""
    seeds = "one seed" if own.seeds == 1 else f"{own.seeds} seeds"
    return f"{own.model} on {own.data}; held-out {own.metric.replace('_', ' ')}, {seeds}"


def sweep_charts(own: RankSweep) -> tuple[Chart, ...]:
    """Return the heat map; none where there are too many cells for one."""
    ranks = list(dict.fromkeys(entry.rank for entry in own.table))
    sets = list(dict.fromkeys(entry.targets for entry in own.table))
    if len(ranks) > _MOST_RANKS or len(sets) > _MOST_SETS:
        return ()
    scores = {(entry.targets, entry.rank): entry.score for entry in own.table}
    rows = [(name, [scores.get((name, rank)) for rank in ranks]) for name in sets]
    chosen = frozenset((one.targets, one.rank) for one in own.enough if one.rank is not None)
    better = "lower is better" if own.lower_is_better else "higher is better"
    title = f"Here: {own.metric.replace('_', ' ')}, {better}; framed: the smallest rank that is enough"
    drawn = heat_map(ranks, rows, lower_is_better=own.lower_is_better, chosen=chosen, title=title)
    return (Chart(title, drawn),)


def _finding(own: RankSweep) -> Finding:
    enough = {one.targets: one.rank for one in own.enough}
    verdict, sentence = _judged(own, enough)
    if own.seeds == 1 and verdict is not Verdict.UNDECIDED:
        sentence += " It is one seed, whose luck may be larger than the differences."
    return Finding(
        own.file,
        subject_of(own),
        _figure(own),
        verdict,
        sentence,
        own.machine,
        command_of(own),
        (*sweep_charts(own), *_paper_charts()),
        (_table(own), *_paper_tables()),
    )


def _figure(own: RankSweep) -> str:
    """Each set's score at its smallest rank, and at its best."""
    sets = dict.fromkeys(entry.targets for entry in own.table)
    said = []
    for name in [name for name in (QUERY, QUERY_AND_VALUE) if name in sets] or list(sets)[:3]:
        entries = [entry for entry in own.table if entry.targets == name]
        scores = {rank: score for rank, score in _scores(own, name).items() if score is not None}
        first = min(entries, key=lambda entry: entry.rank)
        words = f"{name} {numbers.seeds(first.score, first.low, first.high)} at rank {first.rank}"
        if scores:
            best = (min if own.lower_is_better else max)(scores, key=lambda rank: scores[rank])
            words += f", at best {numbers.score(scores[best])} at rank {best}"
        said.append(words)
    return f"{'; '.join(said)}; untrained {numbers.score(own.before)}"


def _judged(own: RankSweep, enough: dict[str, int | None]) -> tuple[Verdict, str]:
    """Return the verdict on the smallest ranks that are enough, by target set."""
    kept = f"{100 * own.share:g}% of what the best of all cells gains"
    if 1 not in _scores(own, QUERY_AND_VALUE) or QUERY not in enough or QUERY_AND_VALUE not in enough:
        return Verdict.UNDECIDED, (
            "The claim compares q with qv from rank 1 on, which were not all measured, so it is not decided "
            "by this."
        )
    both, alone = enough[QUERY_AND_VALUE], enough[QUERY]
    of_both = "at no rank measured" if both is None else f"at rank {both}"
    of_one = "at no rank measured" if alone is None else f"at rank {alone}"
    found = f"Query and value together reach {kept} {of_both}, query alone {of_one}"
    if both != 1:
        found += ": rank 1 was not enough for both together"
        if _always_better(own):
            return Verdict.PARTLY, f"{found}, but at every rank both together were better than query alone."
        return Verdict.DISAGREES, f"{found}, and they were not better than query alone at every rank."
    if alone == 1:
        return Verdict.PARTLY, f"{found}: rank 1 was enough for both together, but for query alone as well."
    return Verdict.AGREES, f"{found}, as in the paper."


def _scores(own: RankSweep, targets: str) -> dict[int, float | None]:
    """Return a target set's scores by rank."""
    return {entry.rank: entry.score for entry in own.table if entry.targets == targets}


def _always_better(own: RankSweep) -> bool:
    """Whether query and value together have the better score at each rank that both were measured at."""
    together, alone = _scores(own, QUERY_AND_VALUE), _scores(own, QUERY)
    pairs = [(together[rank], alone[rank]) for rank in together.keys() & alone.keys()]
    sign = -1 if own.lower_is_better else 1
    return all(both is not None and (one is None or sign * (both - one) > 0) for both, one in pairs)


def _table(own: RankSweep) -> Table:
    return table(
        "Held-out score by target set and rank; in brackets the lowest and the highest seed",
        ("Targets", "Rank", own.metric.replace("_", " "), "Parameters"),
        (
            (
                entry.targets,
                str(entry.rank),
                numbers.seeds(entry.score, entry.low, entry.high),
                numbers.count(entry.parameters),
            )
            for entry in own.table
        ),
    )


def _paper_charts() -> tuple[Chart, ...]:
    charts = []
    for name, rows in paper.TABLE_6.items():
        title = f"The paper’s: GPT-3 on {name}, accuracy in percent"
        drawn = heat_map(paper.TABLE_6_RANKS, list(rows.items()), lower_is_better=False, title=title)
        charts.append(Chart(title, drawn))
    return tuple(charts)


def _paper_tables() -> tuple[Table, ...]:
    columns = ("Targets", *(f"Rank {rank}" for rank in paper.TABLE_6_RANKS))
    return tuple(
        table(f"The paper’s table 6: {name}", columns, ((own, *map(str, row)) for own, row in rows.items()))
        for name, rows in paper.TABLE_6.items()
    )
