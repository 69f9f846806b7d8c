"""The commands, put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .commands import (
    bench,
    export,
    extract,
    finetune,
    intrinsic,
    merge,
    rank,
    report,
    run,
    serve,
    tasks,
    verify,
)

app = typer.Typer(
    name="loracle",
    help="Fine-tune with LoRA, merge exactly, ship plain ONNX, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("finetune")(finetune.command)
app.command("merge")(merge.command)
app.command("export")(export.command)
app.command("verify")(verify.command)
app.command("run")(run.command)
app.command("serve")(serve.command)
app.add_typer(tasks.app, name="tasks")
app.command("bench")(bench.command)
app.command("extract")(extract.command)
app.command("intrinsic")(intrinsic.command)
app.add_typer(rank.app, name="rank")
app.command("report")(report.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loracle {version('loracle')}")
        raise typer.Exit


@app.callback()
def _options(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `loracle` command. Exit code 0 done, 1 a check failed, 2 the input is wrong."""
    app()
