"""`loracle export`: a base model and an adapter to an ONNX folder."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ..guard import one_line_errors
from ..options import Adapter, Debug, Json, Model, Out, TrustRemoteCode
from ..progress import bar


def command(
    model: Model,
    out: Out,
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or fp16.")] = "fp32",
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="baked; or the base model and beside it a task: linked, a graph with the merged weights "
            "alone, or swappable, merged weights that are inputs of one graph for all tasks.",
        ),
    ] = "baked",
    name: Annotated[
        str | None, typer.Option("--name", help="The task's name, unless the form is baked.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Exchange the task of this name.")] = False,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="int8 or int4: codes of the merged weights of linear layers."),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="Operators of the ONNX standard alone, for any runtime."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the merged model as ONNX, with no trace of the adapter in the graph."""
    with one_line_errors(debug):
        from loracle.export import export

        with bar("exporting") as advance:
            summary = export(
                model,
                out,
                adapter,
                dtype=dtype,
                form=form,
                name=name,
                replace=replace,
                quantization=quantization,
                portable=portable,
                trust_remote_code=trust_remote_code,
                progress=advance,
            )
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(summary), default=str))
        else:
            kinds = " and ".join(kind for kind in (summary.quantization, summary.dtype) if kind)
            typer.echo(
                f"{out}: {summary.nodes} nodes, {summary.tensors} weights in {kinds}, "
                f"{len(summary.merged_names)} of them merged, {summary.bytes / 1e6:.0f} MB"
            )
            if summary.underflow.zeros:
                typer.echo(
                    f"{summary.underflow.zeros} entries of {summary.underflow.zeroed_tensors} weights became "
                    f"0 in {summary.dtype}; --dtype fp32 keeps them"
                )
