"""`loracle rank truncate`: an adapter of smaller ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracle.reference import ConfigError

from ..columns import columns
from ..guard import one_line_errors
from ..options import Debug, Json, Out
from ..progress import bar

if TYPE_CHECKING:
    from loracle.files import Adapter
    from loracle.files.rank_truncation import Truncation


def command(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter folder.")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option("--rank", help="One rank for all layers that have more.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", help="Each layer's smallest rank that keeps this share of its update's squared norm."
        ),
    ] = None,
    pattern: Annotated[
        Path | None,
        typer.Option(
            "--pattern",
            help="JSON file of module patterns and ranks, or with the keys r and rank_pattern; what "
            "`loracle rank analyse --json` prints will do.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write ADAPTER with smaller ranks, the largest singular values of each update kept."""
    with one_line_errors(debug):
        from loracle.files import output_folder, read_adapter, write_adapter_files
        from loracle.files.rank_truncation import truncate

        if sum(option is not None for option in (rank, energy, pattern)) != 1:
            raise ConfigError("expected one of --rank, --energy and --pattern; give one")
        given = read_adapter(adapter)
        ranks = _ranks(given, rank, energy, pattern)
        with output_folder(out) as folder, bar("truncating", quiet=as_json) as advance:
            done = truncate(given, ranks, advance)
            write_adapter_files(folder, done.adapter)
        if as_json:
            typer.echo(json.dumps(_content(out, given, done)))
        else:
            _print(out, given, done)


def _ranks(adapter: Adapter, rank: int | None, energy: float | None, pattern: Path | None) -> dict[str, int]:
    from loracle.files.rank_choice import ranks_for_energy, ranks_for_pattern, ranks_for_rank, read_pattern

    if rank is not None:
        return ranks_for_rank(adapter, rank)
    if energy is not None:
        return ranks_for_energy(adapter, energy)
    assert pattern is not None
    return ranks_for_pattern(adapter, read_pattern(pattern))


def _content(out: Path, before: Adapter, done: Truncation) -> dict[str, Any]:
    """Return what is printed as JSON."""
    from loracle.files.machine import machine_document

    return {
        "kind": "loracle rank truncate",
        "version": 1,
        "machine": machine_document(("numpy",)),
        "out": str(out),
        "layers": [dataclasses.asdict(layer) for layer in done.layers],
        "parameters_before": before.parameters,
        "parameters": done.adapter.parameters,
    }


def _print(out: Path, before: Adapter, done: Truncation) -> None:
    rows = [
        [
            layer.name,
            str(layer.r_before),
            str(layer.r),
            f"{layer.frobenius:.3g}",
            f"{layer.relative_residual:.2%}",
            f"{layer.spectral_residual:.2g}",
        ]
        for layer in done.layers
    ]
    typer.echo(columns(["layer", "rank", "to", "norm", "left out", "spectral"], rows))
    typer.echo(f"{out}: {done.adapter.parameters} of {before.parameters} parameters")
