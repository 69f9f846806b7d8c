"""A certificate as one HTML page for a person: nothing is fetched, no script runs, every text is escaped."""

from __future__ import annotations

import importlib.resources
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loracle.files import write_atomic

from . import certificate_charts as charts
from .advice import ADVICE
from .certificate import Certificate
from .printable import printable
from .verdict import Verdict, WeightVerdict
from .weights_check import counted, worst_first

_TEMPLATE = "certificate.html"
_WORST = 20
_UNITS = ("B", "kB", "MB", "GB", "TB")
_RIGHT = (Verdict.EXACT, Verdict.UNTOUCHED)


def render(certificate: Certificate) -> str:
    """Return the page."""
    source = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    report = certificate.report
    worst = worst_first(report.weights)
    return environment.from_string(source).render(
        certificate=certificate,
        report=report,
        inputs=[(role, certificate.inputs.get(role)) for role in ("candidate", "base", "adapter")],
        counts=[
            (verdict, number, _kind(verdict, report.weights)) for verdict, number in _counts(certificate)
        ],
        shares=_shares(report.weights),
        worst=worst[:_WORST],
        more=len(worst) - _WORST,
        advice=ADVICE,
        charts=charts,
        kind=_kind_of,
        size=_size,
        furthest=_furthest,
        number=_number,
        ratio=_ratio,
        finite=lambda value: value is not None and math.isfinite(value),
    )


def write_page(path: str | Path, certificate: Certificate) -> None:
    """Write the page, whole or not at all. Raises FileError where it cannot be written."""
    write_atomic(path, render(certificate).encode("utf-8"))


def _shown(value: Any) -> Any:
    """What the template puts out: texts without what is not printed."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _counts(certificate: Certificate) -> list[tuple[Verdict, int]]:
    """Verdicts and their numbers, those that fail first."""
    weights = certificate.report.weights
    return sorted(
        counted(weights).items(), key=lambda item: ("bad", "soft", "good").index(_kind(item[0], weights))
    )


def _kind(verdict: Verdict, weights: tuple[WeightVerdict, ...]) -> str:
    return "bad" if any(own.verdict is verdict and not own.passed for own in weights) else _passing(verdict)


def _kind_of(own: WeightVerdict) -> str:
    return _passing(own.verdict) if own.passed else "bad"


def _passing(verdict: Verdict) -> str:
    return "good" if verdict in _RIGHT else "soft"


def _shares(weights: tuple[WeightVerdict, ...]) -> list[tuple[str, int]]:
    kinds = [_kind_of(own) for own in weights]
    return [(kind, kinds.count(kind)) for kind in ("bad", "soft", "good") if kind in kinds]


def _size(number: int) -> str:
    """Bytes in decimal units with three significant digits."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{number} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def _furthest(own: WeightVerdict) -> str:
    """By how many representable numbers an entry is off at most."""
    most = max((k for k, _ in own.ulps), default=0)
    return f"{most:,}" if most < 10**6 else f"2^{most.bit_length() - 1}"


def _number(value: float) -> str:
    """A float as it is read back."""
    return repr(float(value)).replace("-", "−")


def _ratio(value: float) -> str:
    """A share of something, or how many times it."""
    if value <= 1:
        return f"{value:.2g} of"
    return f"{value:,.0f} times" if value >= 10 else f"{value:.2g} times"
