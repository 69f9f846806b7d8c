"""`loracle verify`: is this the base model with that adapter merged?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from loracle.reference import CheckError, ConfigError, FileError

from ..guard import one_line_errors
from ..options import Adapter, Debug, Json, Model, TrustRemoteCode
from ..progress import bar


def command(
    candidate: Annotated[
        Path, typer.Argument(help="ONNX folder, file of a task, or folder of a merged checkpoint.")
    ],
    model: Model,
    adapter: Adapter = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The task in the folder; left out, the base model.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Where all passes, let `loracle tasks` say so of the task; else no longer."
        ),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with a prompt a line, instead of our own.")
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--rounded",
            help="Whether only the correctly rounded merge passes, or every merge whose roundings are inside "
            "their bound. By default what loracle has exported must be correctly rounded.",
        ),
    ] = None,
    outputs: Annotated[
        bool | None,
        typer.Option(
            "--outputs/--no-outputs",
            help="Whether an ONNX model's answers are compared with the unmerged model's in float64. By "
            "default where that fits into memory.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove that CANDIDATE is the base model with the adapter merged: its graph, its bits, its answers."""
    with one_line_errors(debug):
        from loracle.export.verification.task_verification import task_in_path
        from loracle.export.verification.verify import verify

        folder, task = task_in_path(candidate, name)
        if record and task is None:
            raise ConfigError("--record: expected a task of a deployment, got none; give its --name")
        lines = None if prompts is None else _lines(prompts)
        with bar("comparing tensors", quiet=as_json) as advance:
            report = verify(
                candidate,
                model,
                adapter,
                name=name,
                prompts=lines,
                exact=exact,
                outputs=outputs,
                trust_remote_code=trust_remote_code,
                progress=advance,
            )
        if record and task is not None:
            from loracle.export.task_changes import record_verification

            record_verification(folder, task, report)
        if as_json:
            typer.echo(json.dumps(report.to_json()))
        else:
            table = Table("check", "", "figure", title=report.candidate, title_justify="left")
            for check in report.checks:
                mark = "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"
                if not check.asked:
                    mark = "[yellow]skip[/yellow]"
                table.add_row(check.name, mark, check.figure)
            Console().print(table)
            if report.quality is not None:
                typer.echo(f"quality: {report.quality}")
            for check in report.checks:
                for failure in check.failures:
                    typer.echo(f"FAIL {check.name}: {failure}")
        if not report.passed:
            raise typer.Exit(CheckError.exit_code)


def _lines(path: Path) -> tuple[str, ...]:
    lines = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise FileError(f"{path}: expected a prompt a line, found none")
    return lines
