"""`loracle rank`: which rank is enough."""

from __future__ import annotations

import typer

from . import rank_analyse, rank_sweep, rank_truncate

app = typer.Typer(
    no_args_is_help=True,
    help="Which rank is enough: analyse an adapter, truncate it to smaller ranks, sweep ranks and weights.",
)
app.command("analyse")(rank_analyse.command)
app.command("truncate")(rank_truncate.command)
app.command("sweep")(rank_sweep.command)
