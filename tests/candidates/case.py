"""What a candidate of the table is, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loracle.export.verification.verdict import Verdict

from .subjects import Subject

Verdicts = Collection[Verdict]
Maker = Callable[[Subject, Path], Path]


@dataclass(frozen=True)
class Case:
    """A candidate, made for each of some subjects, and the only right answers.

    Attributes:
        name: what it is, `tool` what made it.
        make: (subject, folder to make) -> the folder.
        merged: what is allowed to be said of each weight that the adapter changes.
        others: the same of each other weight.
        named: the same of weights by name, in the place of `merged` and `others`; a weight that the base has
            not must be named here to be allowed.
        passes: whether the candidate may pass.
        failing: a part of the name of each check that must fail; no other check may.
        advice: what to do about it.
        quick: whether `make test` has it, for the first subject.
    """

    name: str
    tool: str
    subjects: tuple[str, ...]
    make: Maker
    merged: Verdicts
    passes: bool
    advice: str = ""
    others: Verdicts = (Verdict.UNTOUCHED,)
    named: Mapping[str, Verdicts] = field(default_factory=dict)
    failing: tuple[str, ...] = ()
    quick: bool = False
