"""`loracle merge`: a merged safetensors checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..guard import one_line_errors
from ..options import Debug, Json, Model, Out
from ..progress import bar


def command(
    model: Model,
    adapter: Annotated[Path, typer.Option("--adapter", help="PEFT adapter folder.")],
    out: Out,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write W0 + scaling * B @ A, each entry rounded once, as a checkpoint that transformers loads."""
    with one_line_errors(debug):
        from loracle.files import write_merged_checkpoint

        with bar("merging") as advance:
            summary = write_merged_checkpoint(model, adapter, out, progress=advance)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(summary), default=str))
        else:
            typer.echo(f"{out}: {len(summary.merged_names)} of {summary.tensors} tensors merged")
