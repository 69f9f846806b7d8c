"""`loracle export`: a base model and an adapter to an ONNX folder."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ..guard import one_line_errors
from ..options import Adapter, Debug, Json, Model, Out
from ..progress import bar


def command(
    model: Model,
    out: Out,
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or fp16.")] = "fp32",
    form: Annotated[
        str,
        typer.Option(
            "--form", help="baked, or linked: the base beside a graph with the merged weights alone."
        ),
    ] = "baked",
    name: Annotated[str | None, typer.Option("--name", help="The task's name, in the form linked.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the merged model as ONNX, with no trace of the adapter in the graph."""
    with one_line_errors(debug):
        from loracle.export import export

        with bar("exporting") as advance:
            summary = export(model, out, adapter, dtype=dtype, form=form, name=name, progress=advance)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(summary), default=str))
        else:
            typer.echo(
                f"{out}: {summary.nodes} nodes, {summary.tensors} weights in {summary.dtype}, "
                f"{len(summary.merged_names)} of them merged, {summary.bytes / 1e6:.0f} MB"
            )
