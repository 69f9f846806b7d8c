"""Does a small file for a task replace a whole model?"""

from __future__ import annotations

from . import numbers
from .certificate import COMMAND as VERIFY
from .certificate import Certified
from .charts import size_chart
from .extraction import COMMAND as EXTRACT
from .extraction import Extraction
from .finding import Chart, Finding, Verdict, table
from .folder import Results

_SMALL = 10.0
"""How many times smaller a file is that is called small."""


def findings(results: Results) -> tuple[Finding, ...]:
    """Return a finding for each certificate of an adapter, and each extraction."""
    certified = [own for own in results.certificates if own.adapter is not None]
    return *map(_of_certificate, certified), *map(_of_extraction, results.extractions)


def _of_certificate(own: Certified) -> Finding:
    assert own.adapter is not None
    small, whole = own.adapter.size, own.base.size
    ratio = numbers.times(whole / small)
    lines = [
        ("the adapter", small, numbers.size(small)),
        ("the base model", whole, numbers.size(whole)),
        ("the merged model", own.candidate.size, numbers.size(own.candidate.size)),
    ]
    if not own.passed:
        verdict = Verdict.DISAGREES
        sentence = (
            f"The adapter is {ratio} times smaller than the model, but base and adapter are not the model "
            "that was verified: see the last claim."
        )
    else:
        enough = whole >= _SMALL * small
        verdict = Verdict.AGREES if enough else Verdict.PARTLY
        sentence = (
            f"The adapter is {ratio} times smaller than the model that it and the base stand for"
            + ("" if enough else ", which is hardly small")
            + "; the wider the model, the larger the factor, so GPT-3’s is larger."
        )
    return Finding(
        own.file,
        f"{own.adapter.name} on {own.base.name}",
        f"{numbers.size(small)} for a task in the place of {numbers.size(whole)}, {ratio} times less",
        verdict,
        sentence,
        own.versions,
        VERIFY,
        (Chart("Bytes of all files", size_chart(lines, "bytes")),),
        (table("Bytes of all files", ("What", "Bytes"), ((name, said) for name, _, said in lines)),),
    )


def _of_extraction(own: Extraction) -> Finding:
    entries = sum(weight.entries for weight in own.weights)
    ratio = numbers.times(entries / own.parameters)
    lines = [
        ("the adapter", own.parameters, numbers.count(own.parameters)),
        ("its weights", entries, numbers.count(entries)),
    ]
    worst = max(own.weights, key=lambda weight: weight.relative_residual)
    small = entries >= _SMALL * own.parameters
    if own.exact:
        verdict = Verdict.AGREES if small else Verdict.PARTLY
        sentence = (
            f"The adapter’s merge is the fine-tuned checkpoint bit for bit, with {ratio} times fewer numbers "
            "than the weights that it changes."
        )
    else:
        verdict = Verdict.UNDECIDED
        left = "" if own.complete else " Something else differs, and is not in the adapter."
        sentence = (
            f"The adapter has {ratio} times fewer numbers than the weights that it changes, and leaves out "
            f"up to {numbers.share(worst.relative_residual, 1)} of a weight’s change; what that does to "
            f"answers was not measured by this.{left}"
        )
    return Finding(
        own.file,
        f"an adapter extracted from {own.tuned} and {own.base}",
        f"{numbers.size(own.nbytes)}; {numbers.count(own.parameters)} numbers for {numbers.count(entries)}",
        verdict,
        sentence,
        own.machine,
        EXTRACT,
        (Chart("Numbers", size_chart(lines, "parameters")),),
        (
            table(
                "What each weight’s update leaves out",
                ("Weight", "Rank", "Left out", "Entries not equal"),
                (
                    (
                        weight.name,
                        str(weight.r),
                        numbers.share(weight.relative_residual, 1),
                        f"{numbers.count(weight.unequal)} of {numbers.count(weight.entries)}",
                    )
                    for weight in own.weights
                ),
            ),
        ),
    )
