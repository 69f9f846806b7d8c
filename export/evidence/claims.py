"""The six claims, each with what was found of it."""

from __future__ import annotations

from . import dimension, latency, merge, paper, parameters, ranks, task_files
from .finding import Claim
from .folder import Results


def claims(results: Results) -> tuple[Claim, ...]:
    """Return the claims in the order in which they are told."""
    return (
        Claim(paper.LATENCY, latency.findings(results.bench)),
        Claim(paper.NUMBERS, parameters.findings(results)),
        Claim(paper.RANK, ranks.findings(results.sweeps)),
        Claim(paper.FILES, task_files.findings(results)),
        Claim(paper.DIMENSION, dimension.findings(results.intrinsic)),
        Claim(paper.MERGE, merge.findings(results.certificates)),
    )
