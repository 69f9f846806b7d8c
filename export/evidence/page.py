"""The page: HTML with style and charts inside, no script, nothing fetched, every text escaped."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loracle.files import write_atomic

from ..verification.printable import printable
from .claims import claims
from .finding import Verdict
from .folder import Results

_TEMPLATE = "page.html"
_KINDS = {
    Verdict.AGREES: "good",
    Verdict.PARTLY: "mild",
    Verdict.DISAGREES: "bad",
    Verdict.UNDECIDED: "open",
    Verdict.MISSING: "open",
}
_SIGNS = {"good": "✓", "mild": "≈", "bad": "✗", "open": "–"}


def render(results: Results) -> str:
    """Return the page."""
    source = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.from_string(source).render(
        claims=claims(results), files=results.files, others=results.others, kind=_KINDS, signs=_SIGNS
    )


def write_page(path: str | Path, results: Results) -> None:
    """Write the page, whole or not at all. Raises FileError where it cannot be written."""
    write_atomic(path, render(results).encode("utf-8"))


def _shown(value: Any) -> Any:
    """What the template puts out: texts without what is not printed."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
