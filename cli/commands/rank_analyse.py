"""`loracle rank analyse`: singular spectra of an adapter's updates, and the ranks that they need."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..columns import columns
from ..guard import one_line_errors
from ..options import Debug, Json
from ..progress import bar

if TYPE_CHECKING:
    from loracle.files.rank_analysis import LayerRanks, RankAnalysis

_DIGITS = 6

AdapterFolder = Annotated[Path, typer.Argument(help="PEFT adapter folder.")]
Energy = Annotated[
    float,
    typer.Option("--energy", help="The share of each update's squared norm that a rank is to keep."),
]


def command(
    adapter: AdapterFolder,
    energy: Energy = 0.99,
    base: Annotated[
        Path | None, typer.Option("--base", help="Folder of the base model: for the amplification factor.")
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option("--with", help="Another adapter of the same layers: for the subspace similarity."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say of each update of ADAPTER which rank it needs, and propose a `rank_pattern`."""
    with one_line_errors(debug), ExitStack() as stack:
        from loracle.files import Checkpoint, read_adapter
        from loracle.files.rank_analysis import analyse
        from loracle.files.update_weights import UpdateWeights

        given = read_adapter(adapter)
        weights = None if base is None else UpdateWeights(stack.enter_context(Checkpoint(base)), given)
        advance = stack.enter_context(bar("analysing", quiet=as_json))
        found = analyse(
            given,
            energy=energy,
            weights=weights,
            other=None if other is None else read_adapter(other),
            progress=advance,
        )
        if as_json:
            typer.echo(json.dumps(_content(found)))
        else:
            stack.close()
            _print(found)


def _content(found: RankAnalysis) -> dict[str, Any]:
    """Return what is printed as JSON."""
    from loracle.files.machine import machine_document

    return {
        "kind": "loracle rank analyse",
        "version": 1,
        "machine": machine_document(("numpy",)),
        "energy": found.energy,
        "layers": [_layer(layer) for layer in found.layers],
        "proposal": {"r": found.proposal.r, "rank_pattern": dict(found.proposal.keys)},
        "parameters": found.parameters,
        "proposed_parameters": found.proposed_parameters,
    }


def _layer(layer: LayerRanks) -> dict[str, Any]:
    grids = {"similarity_A": layer.similarity_A, "similarity_B": layer.similarity_B}
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "r": layer.r,
        "scaling": layer.scaling,
        "singular_values": layer.singular_values.tolist(),
        "frobenius": layer.frobenius,
        "effective_rank": layer.effective_rank,
        "stable_rank": layer.stable_rank,
        "rank_for_energy": layer.rank_for_energy,
        "amplification": layer.amplification,
        **{key: None if grid is None else grid.round(_DIGITS).tolist() for key, grid in grids.items()},
    }


def _print(found: RankAnalysis) -> None:
    compared = any(layer.similarity_A is not None for layer in found.layers)
    amplified = any(layer.amplification is not None for layer in found.layers)
    titles = ["layer", "rank", f"{found.energy:.4g}", "effective", "stable", "norm"]
    titles += ["amplified"] if amplified else []
    titles += ["phi(1, 1)", "phi(all)"] if compared else []
    rows = []
    for layer in found.layers:
        cells = [layer.name, str(layer.r), str(layer.rank_for_energy)]
        cells += [f"{value:.2f}" for value in (layer.effective_rank, layer.stable_rank)]
        cells.append(f"{layer.frobenius:.3g}")
        if amplified:
            cells.append("-" if layer.amplification is None else f"{layer.amplification:.3g}")
        if compared:
            grid = layer.similarity_A
            cells += (
                ["-", "-"] if grid is None or not grid.size else [f"{grid[at, at]:.2f}" for at in (0, -1)]
            )
        rows.append(cells)
    typer.echo(columns(titles, rows))
    typer.echo(
        f"{found.energy:.4g} of every update's squared norm: {found.proposed_parameters} of "
        f"{found.parameters} parameters ({found.proposed_parameters / found.parameters:.0%}), with"
    )
    typer.echo(json.dumps({"r": found.proposal.r, "rank_pattern": dict(found.proposal.keys)}))
