"""`loracle tasks`: what is deployed in a folder; adding, removing and renaming tasks."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..guard import one_line_errors
from ..options import Debug, Json, Model, TrustRemoteCode
from ..progress import bar
from .export import print_summary

if TYPE_CHECKING:
    from loracle.export.deployed_tasks import DeployedTask

_LIST = "list"
_DIGITS = 12

Deployment = Annotated[Path, typer.Argument(help="Folder with a base model and tasks.")]
Name = Annotated[str, typer.Argument(help="The task's name.")]


class _ListingGroup(TyperGroup):
    """A group that takes a first word that is none of its commands as the folder of `list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [_LIST, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ListingGroup,
    no_args_is_help=True,
    subcommand_metavar="FOLDER | COMMAND ...",
    help="List the tasks of a deployment, `loracle tasks FOLDER`; add, remove and rename them.",
)


@app.command(_LIST)
def list_tasks(deployment: Deployment, as_json: Json = False, debug: Debug = False) -> None:
    """List the tasks of DEPLOYMENT: what they were made of, their bytes, and whether they were verified.

    The JSON object is the one that `loracle tasks schema` describes.
    """
    with one_line_errors(debug):
        from loracle.export.deployed_tasks import deployed_tasks, manifest

        if as_json:
            typer.echo(json.dumps(manifest(deployment)))
            return
        tasks = deployed_tasks(deployment)
        if tasks:
            Console().print(_table(tasks))
        else:
            typer.echo("no tasks")


@app.command("add")
def add(
    deployment: Deployment,
    name: Name,
    model: Model,
    adapter: Annotated[Path, typer.Option("--adapter", help="PEFT adapter folder.")],
    form: Annotated[
        str, typer.Option("--form", help="linked, swappable or adapter-inputs, see `loracle export`.")
    ] = "linked",
    replace: Annotated[bool, typer.Option("--replace", help="Exchange the task of this name.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add the task NAME to DEPLOYMENT, whole or not at all; no other task is touched."""
    with one_line_errors(debug):
        from loracle.export.task_changes import add_task

        with bar("adding") as advance:
            summary = add_task(
                deployment,
                name,
                model,
                adapter,
                form=form,
                replace=replace,
                trust_remote_code=trust_remote_code,
                progress=advance,
            )
        print_summary(summary, as_json=as_json)


@app.command("remove")
def remove(deployment: Deployment, name: Name, debug: Debug = False) -> None:
    """Remove the task NAME and its data; the others stay."""
    with one_line_errors(debug):
        from loracle.export.task_changes import remove_task

        remove_task(deployment, name)


@app.command("rename")
def rename(
    deployment: Deployment,
    name: Name,
    new: Annotated[str, typer.Argument(help="The name that it gets.")],
    debug: Debug = False,
) -> None:
    """Rename the task NAME, in one step."""
    with one_line_errors(debug):
        from loracle.export.task_changes import rename_task

        rename_task(deployment, name, new)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of what `loracle tasks FOLDER --json` prints."""
    folder = importlib.resources.files("loracle.export") / "schemas"
    typer.echo((folder / "deployment.schema.json").read_text("utf-8"), nl=False)


def _table(tasks: tuple[DeployedTask, ...]) -> Table:
    table = Table()
    for title in ("task", "form", "rank", "targets", "MB", "SHA-256", "verified"):
        table.add_column(title, no_wrap=title in ("form", "MB", "SHA-256", "verified"))
    for task in tasks:
        document = task.document
        if document is None:
            described = ["?", "?", f"{task.nbytes / 1e6:.1f}", "?"]
        else:
            described = [
                ", ".join(map(str, document.r)),
                ", ".join(document.target_modules),
                f"{task.nbytes / 1e6:.1f}",
                document.sha256[:_DIGITS],
            ]
        verified = "no" if task.verified is None else task.verified.time.partition("T")[0]
        table.add_row(task.name, task.form, *described, verified)
    return table
