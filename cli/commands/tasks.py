"""`loracle tasks`: what is deployed in a folder, and the removal of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from loracle.reference import FileError

from ..guard import one_line_errors
from ..options import Debug, Json


def command(
    deployment: Annotated[Path, typer.Argument(help="Folder that `loracle export --form linked` wrote.")],
    remove: Annotated[
        str | None, typer.Option("--remove", help="Remove this task and its data; the others stay.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the linked tasks of DEPLOYMENT with their bytes, or remove one."""
    with one_line_errors(debug):
        from loracle.export.linked import remove_task, task_names, task_size
        from loracle.export.names import GRAPH_FILE

        if not (deployment / GRAPH_FILE).is_file():
            raise FileError(
                f"{deployment / GRAPH_FILE}: expected a deployment's base, found none; make one with "
                "`loracle export --form linked`"
            )
        if remove is not None:
            remove_task(deployment, remove)
        sizes = {name: task_size(deployment, name) for name in task_names(deployment)}
        if as_json:
            typer.echo(json.dumps({"tasks": [{"name": name, "bytes": size} for name, size in sizes.items()]}))
            return
        for name, size in sizes.items():
            typer.echo(f"{name}  {size / 1e6:.1f} MB")
        if not sizes:
            typer.echo("no tasks")
