"""`loracle export`: a base model and an adapter to an ONNX folder."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..guard import one_line_errors
from ..options import Adapter, Debug, Json, Model, Out, TrustRemoteCode
from ..progress import bar

if TYPE_CHECKING:
    from loracle.export import ExportSummary


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
            "alone, swappable, merged weights that are inputs of one graph for all tasks, or adapter-inputs, "
            "an unmerged adapter, which costs two more products in every adapted layer.",
        ),
    ] = "baked",
    name: Annotated[
        str | None, typer.Option("--name", help="The task's name, unless the form is baked.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Exchange the task of this name.")] = False,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Let the base's graph refer to the model's own files, without a copy: --out is --model.",
        ),
    ] = False,
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
    """Write the merged model as ONNX, with no trace of the adapter in the graph.

    The form adapter-inputs alone leaves the adapter in it, and says what that costs.
    """
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
                in_place=in_place,
                quantization=quantization,
                portable=portable,
                trust_remote_code=trust_remote_code,
                progress=advance,
            )
        print_summary(summary, as_json=as_json)


def print_summary(summary: ExportSummary, *, as_json: bool) -> None:
    """Print what was written."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), default=str))
    else:
        kinds = " and ".join(kind for kind in (summary.quantization, summary.dtype) if kind)
        typer.echo(
            f"{summary.out_dir}: {summary.nodes} nodes, {summary.tensors} weights in {kinds}, "
            f"{len(summary.merged_names)} of them merged, {summary.bytes / 1e6:.0f} MB"
        )
        if summary.overhead is not None:
            cost = summary.overhead
            typer.echo(
                f"runs unmerged: two more products and a sum in each adapted layer; {cost.nodes} nodes "
                f"and {cost.multiply_adds} multiply-adds per token beside the base's {summary.nodes} and "
                f"{cost.base_multiply_adds} ({cost.share:.2%})"
            )
        if summary.underflow.zeros:
            typer.echo(
                f"{summary.underflow.zeros} entries of {summary.underflow.zeroed_tensors} weights became "
                f"0 in {summary.dtype}; --dtype fp32 keeps them"
            )
