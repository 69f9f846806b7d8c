"""Are a few numbers for each matrix enough, and how few?"""

from __future__ import annotations

from . import numbers
from .bench import Bench
from .charts import size_chart
from .finding import Chart, Finding, Verdict, table
from .folder import Results
from .latency import command_of as bench_command
from .latency import subject_of as bench_subject
from .rank_analysis import COMMAND, RankAnalysis
from .rank_sweep import RankSweep
from .ranks import command_of as sweep_command
from .ranks import subject_of as sweep_subject

_FEW = 0.01
"""Of a model's parameters. The paper's are 0.003%, of a model of 175 billion."""
_MOST_LINES = 40


def findings(results: Results) -> tuple[Finding, ...]:
    """Return a finding for each sweep, analysis and latency table."""
    return (
        *map(_of_sweep, results.sweeps),
        *map(_of_analysis, results.analyses),
        *map(_of_bench, results.bench),
    )


def _of_sweep(own: RankSweep) -> Finding:
    known = [one for one in own.enough if one.parameters is not None]
    least = min(known, key=lambda one: one.parameters or 0, default=None)
    if least is None or least.parameters is None or own.total is None:
        verdict, figure = Verdict.DISAGREES, "no adapter of the sweep was enough"
        sentence = "No adapter gained enough, or none gained anything, so few numbers were not enough here."
    else:
        part = numbers.share(least.parameters, own.total)
        figure = (
            f"{numbers.count(least.parameters)} numbers ({least.targets}, rank {least.rank}), {part} of the "
            f"model’s {numbers.count(own.total)}"
        )
        few = least.parameters <= _FEW * own.total
        verdict = Verdict.AGREES if few else Verdict.PARTLY
        sentence = (
            f"{part} of the parameters gained {100 * own.share:g}% of what the best of all cells gains"
            + (", so few numbers are enough here too" if few else ", which is less than all, but not few")
            + "; the share falls as models grow. Full fine-tuning is not in the sweep."
        )
    lines = [
        (f"{entry.targets}, rank {entry.rank}", entry.parameters, numbers.count(entry.parameters))
        for entry in own.table
    ][:_MOST_LINES]
    if own.total is not None:
        lines.append(("the model", own.total, numbers.count(own.total)))
    return Finding(
        own.file,
        sweep_subject(own),
        figure,
        verdict,
        sentence,
        own.machine,
        sweep_command(own),
        (Chart("Numbers that are trained", size_chart(lines, "parameters")),),
        (table("Numbers that are trained", ("Adapter", "Parameters"), (own[::2] for own in lines)),),
    )


def _of_analysis(own: RankAnalysis) -> Finding:
    part = numbers.share(own.proposed_parameters, own.parameters)
    kept = f"{100 * own.energy:g}%"
    lines = [
        ("as trained", own.parameters, numbers.count(own.parameters)),
        (f"for {kept}", own.proposed_parameters, numbers.count(own.proposed_parameters)),
    ]
    return Finding(
        own.file,
        f"a trained adapter of {len(own.layers)} updates",
        f"{numbers.count(own.proposed_parameters)} of {numbers.count(own.parameters)} numbers ({part}) keep "
        f"{kept} of every update’s squared norm",
        Verdict.UNDECIDED,
        f"This adapter could do with {part} of its numbers and keep {kept} of each update; what that does to "
        "its answers was not measured by this.",
        own.machine,
        COMMAND,
        (Chart("Numbers of the adapter", size_chart(lines, "parameters")),),
        (
            table(
                f"The rank that keeps {kept} of each update",
                ("Update", "Rank", "Enough", "Effective rank", "Amplification"),
                (
                    (
                        layer.name,
                        str(layer.r),
                        str(layer.rank_for_energy),
                        f"{layer.effective_rank:.2f}",
                        "–" if layer.amplification is None else f"{layer.amplification:.3g}",
                    )
                    for layer in own.layers
                ),
            ),
        ),
    )


def _of_bench(own: Bench) -> Finding:
    rows = list({(row.label, row.parameters): row for row in own.rows if row.method != "control"}.values())
    lines = [(row.label, row.parameters, numbers.count(row.parameters)) for row in rows][:_MOST_LINES]
    whole = [row for row in own.rows if row.method == "control"]
    if whole:
        lines.append(("full fine-tune", whole[0].parameters, numbers.count(whole[0].parameters)))
    cells = [(row.label, numbers.count(row.parameters), numbers.size(row.parameter_bytes)) for row in rows]
    cells += [
        ("full fine-tune", numbers.count(row.parameters), numbers.size(row.parameter_bytes))
        for row in whole[:1]
    ]
    smallest = min(rows, key=lambda row: row.parameters, default=own.rows[0])
    return Finding(
        own.file,
        bench_subject(own),
        f"the fewest: {smallest.label}, {numbers.count(smallest.parameters)} numbers, "
        f"{numbers.size(smallest.parameter_bytes)}",
        Verdict.UNDECIDED,
        "These are the numbers and bytes of each method as its latency was measured; whether they are enough "
        "was not measured by this, for nothing was trained.",
        own.machine,
        bench_command(own),
        (Chart("Numbers of each method", size_chart(lines or [("control", 1, "1")], "parameters")),),
        (table("Numbers and bytes of each method", ("Method", "Parameters", "Bytes"), cells),),
    )
