"""`loracle extract`: a low-rank adapter from a base and a full fine-tune of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracle.reference import CheckError

from ..columns import columns
from ..guard import one_line_errors
from ..options import Debug, Json, Out
from ..progress import bar

if TYPE_CHECKING:
    from loracle.torch_impl.extraction import ExtractionSummary


def command(
    base: Annotated[Path, typer.Option("--base", help="Folder of the base model.")],
    tuned: Annotated[Path, typer.Option("--tuned", help="Folder of the fully fine-tuned model.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", help="The rank of every weight's update.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", help="Each weight's smallest rank that keeps this share of its squared difference."
        ),
    ] = None,
    nbytes: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            help="The most bytes of the adapter, as 10MB; ranks go where a byte keeps most of what differs.",
        ),
    ] = None,
    scaling: Annotated[float, typer.Option("--scaling", help="alpha / r of every weight.")] = 1.0,
    rest: Annotated[
        bool,
        typer.Option(
            "--rest",
            help="Save embeddings, norms and biases that differ whole (modules_to_save). Without it they are "
            "named, and the exit code is 1.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the random projections for large weights.", min=0)
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the low-rank adapter that comes nearest to TUNED - BASE, and say by how much it misses it.

    Exit code 1: the adapter is written, but something that differs is not in it; see --rest.
    """
    with one_line_errors(debug):
        from loracle.torch_impl.extraction import ExtractOptions, extract
        from loracle.torch_impl.extraction.options import parse_bytes

        options = ExtractOptions(
            rank=rank,
            energy=energy,
            nbytes=None if nbytes is None else parse_bytes(nbytes),
            scaling=scaling,
            rest=rest,
            seed=seed,
        )
        with bar("extracting", quiet=as_json) as advance:
            summary = extract(base, tuned, out, options, progress=advance)
        if as_json:
            given = {**dataclasses.asdict(options), "base": str(base), "tuned": str(tuned)}
            typer.echo(json.dumps(_content(summary, given)))
        else:
            _print(summary)
        if not summary.complete:
            raise typer.Exit(CheckError.exit_code)


def _content(summary: ExtractionSummary, options: dict[str, Any]) -> dict[str, Any]:
    """Return what is printed as JSON."""
    from loracle.files.machine import machine_document

    content = dataclasses.asdict(summary)
    return {
        "kind": "loracle extract",
        "version": 1,
        "machine": machine_document(("numpy", "torch")),
        "options": options,
        **content,
        "out": str(summary.out),
        "complete": summary.complete,
        "exact": summary.exact,
    }


def _print(summary: ExtractionSummary) -> None:
    rows = [
        [
            tensor.name,
            str(tensor.r),
            f"{tensor.frobenius:.3g}",
            f"{tensor.relative_residual:.2%}",
            f"{tensor.spectral_residual:.2g}",
            f"{tensor.unequal} of {tensor.entries}",
        ]
        for tensor in summary.tensors
    ]
    typer.echo(columns(["weight", "rank", "norm", "left out", "spectral", "unequal"], rows))
    for other in summary.others:
        state = "saved whole" if other.saved else "not in the adapter"
        typer.echo(f"{other.name}: {state} ({other.why})")
    typer.echo(
        f"{summary.out}: {len(summary.tensors)} weights, {summary.parameters} parameters, "
        f"{summary.nbytes} bytes"
        + ("; its merge is the tuned checkpoint, bit for bit" if summary.exact else "")
    )
