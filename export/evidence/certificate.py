"""What the page needs of a certificate, which `loracle verify` writes."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .machine import versions_line

KIND, VERSION = "loracle-certificate", 1
COMMAND = "loracle verify CANDIDATE --model DIR --adapter DIR --certificate FILE"


@dataclass(frozen=True)
class Check:
    """A check; see `loracle.export.verification.report.Check`."""

    name: str
    passed: bool
    asked: bool
    figure: str


@dataclass(frozen=True)
class Input:
    """A base, adapter or candidate: its name, and the bytes of its files."""

    name: str
    size: int


@dataclass(frozen=True)
class Certified:
    """The document.

    Attributes:
        file: its name.
        versions: in a line, the platform first.
        time: of the verification.
        passed: whether all checks were.
        statement: the verdict in a sentence.
        base, candidate, adapter: what was read; `adapter` is None where there was none.
        parameters: of the adapter; None without one.
        weights, merged, entries, unequal: how many, and of these.
        checks: in order.
        error, tolerance: of the outputs; None where they were not compared.
    """

    file: str
    versions: str
    time: str
    passed: bool
    statement: str
    base: Input
    candidate: Input
    adapter: Input | None
    parameters: int | None
    weights: int
    merged: int
    entries: int
    unequal: int
    checks: tuple[Check, ...]
    error: float | None
    tolerance: float | None


def read(document: Fields, file: str) -> Certified:
    """Return the document. Raises FileError: it is not as it is written."""
    inputs, summary, logits = document.part("inputs"), document.part("summary"), document.part("logits")
    adapter, lora = inputs.maybe_part("adapter"), document.maybe_part("lora")
    return Certified(
        file,
        _versions(document),
        document.text("time"),
        document.flag("passed"),
        document.text("statement"),
        _input(inputs.part("base")),
        _input(inputs.part("candidate")),
        None if adapter is None else _input(adapter),
        None if lora is None else lora.least_one("parameters"),
        summary.count("weights"),
        summary.count("merged"),
        summary.count("entries"),
        summary.count("unequal"),
        tuple(
            Check(own.text("name"), own.flag("passed"), own.flag("asked"), own.text("figure"))
            for own in document.some_parts("checks")
        ),
        logits.maybe_number("largest_error"),
        logits.maybe_number("tolerance"),
    )


def _versions(document: Fields) -> str:
    """The platform first: a certificate names no processor."""
    platform, packages = document.part("versions").text("platform"), versions_line(document)
    return f"{platform}; {packages.replace(f'platform {platform}, ', '')}"


def _input(own: Fields) -> Input:
    return Input(own.text("name"), own.least_one("bytes"))
