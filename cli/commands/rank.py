"""`loracle rank`: which rank is enough."""

from __future__ import annotations

import typer

from . import rank_analyse, rank_truncate

app = typer.Typer(
    no_args_is_help=True,
    help="Which rank is enough: analyse an adapter, truncate it to smaller ranks.",
)
app.command("analyse")(rank_analyse.command)
app.command("truncate")(rank_truncate.command)
