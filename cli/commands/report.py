"""`loracle report`: the paper's claims beside what was measured, as a page for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..columns import columns
from ..guard import one_line_errors
from ..new_file import check_new_file
from ..options import Debug, Json

if TYPE_CHECKING:
    from loracle.export.evidence.finding import Claim

_PAGE = "report.html"


def command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with JSON of bench, rank, extract, intrinsic and verify, in it or one level below.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help=f"The page; by default {_PAGE} in DIR, replaced if need be.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page: what the papers claim, what was measured here, and whether they agree.

    A claim without a measurement says which command makes one.
    """
    with one_line_errors(debug):
        from loracle.export.evidence.claims import claims
        from loracle.export.evidence.folder import read_results
        from loracle.export.evidence.page import write_page

        results = read_results(folder)
        page = folder / _PAGE if out is None else out
        check_new_file("--out", page, (folder / name for name in (*results.files, *results.others)))
        write_page(page, results)
        found = claims(results)
        if as_json:
            typer.echo(json.dumps(_content(found, results.files, results.others)))
        else:
            rows = [
                [f"{place}. {own.statement.title}", own.verdict.value] for place, own in enumerate(found, 1)
            ]
            typer.echo(columns(["claim", "here"], rows))
            typer.echo(f"{page}: from {len(results.files)} result file{'s' * (len(results.files) != 1)}")


def _content(found: tuple[Claim, ...], files: tuple[str, ...], others: tuple[str, ...]) -> dict[str, Any]:
    """Return what is printed as JSON."""
    return {
        "kind": "loracle report",
        "version": 1,
        "files": list(files),
        "others": list(others),
        "claims": [
            {
                "title": own.statement.title,
                "verdict": own.verdict.name.lower(),
                "findings": [
                    {
                        "file": one.file,
                        "subject": one.subject,
                        "figure": one.figure,
                        "verdict": one.verdict.name.lower(),
                        "sentence": one.sentence,
                    }
                    for one in own.findings
                ],
            }
            for own in found
        ],
    }
