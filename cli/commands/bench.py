"""`loracle bench`: the paper's latency table, on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..bench_text import print_bench
from ..guard import one_line_errors
from ..options import Debug, Json
from ..progress import bar


def command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Folder of a model that `loracle export` takes; or gpt2, gpt2-medium, gpt2-large, whose "
            "shapes are measured with random weights, without a download. By default gpt2-medium.",
        ),
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            "--settings",
            help="BATCHxLENGTH, with a comma between; BATCHxLENGTH:11M says how many parameters adapters "
            "have, else the paper's share of the model's, 3.1%. The word paper stands for the paper's three: "
            "32x512, 16x256, 1x128. By default 1x128, with CUDA the paper's.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Of lora-merged, lora-unmerged, lora-inputs, adapter-h, adapter-l, prefix, prompt, with a "
            "comma between; all that the model has a place for by default.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", help="Fewer layers than the model has, with random weights.", min=1),
    ] = None,
    provider: Annotated[str, typer.Option("--provider", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="fp32 or fp16; by default fp32, with CUDA fp16, which its attention takes."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", help="How often sessions are opened anew and measured; 8 by default.", min=2
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            "--blocks",
            help="Of A B B A for each pair of sessions; 2 by default. More help where others disturb.",
            min=1,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="onnxruntime's; one a core by default.", min=1)
    ] = None,
    prefix: Annotated[int, typer.Option("--prefix", help="Positions of prefix tuning.", min=1)] = 10,
    prompt: Annotated[int, typer.Option("--prompt", help="Positions of prompt tuning.", min=1)] = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two layers of gpt2 and three rounds, unless others are given.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for bench.json and bench.png; made if need be.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what LoRA, adapters, prefix and prompt tuning cost in latency over full fine-tuning.

    Prefill is one forward pass, decode one token a row behind a full cache. Each method is timed in turn with
    full fine-tuning, in blocks A B B A, and so is full fine-tuning itself: the control.
    """
    with one_line_errors(debug):
        from loracle.export.bench.bench import Wanted, bench
        from loracle.export.bench.document import document_bytes
        from loracle.export.bench.graphs import Positions
        from loracle.export.bench.output import check_folder, write_results
        from loracle.export.bench.settings import Effort, parse_methods

        if out is not None:
            check_folder(out)
        small = quick and model is None
        usual = Effort(threads=threads or len(os.sched_getaffinity(0)))
        effort = Effort(
            rounds or (3 if quick else usual.rounds),
            blocks or (1 if quick else usual.blocks),
            0.01 if quick else usual.window,
            usual.threads,
        )
        default_settings = "1x16,2x8" if quick else ("paper" if provider == "cuda" else "1x128")
        wanted = Wanted(
            model or ("gpt2" if quick else "gpt2-medium"),
            settings or default_settings,
            None if methods is None else parse_methods(methods),
            2 if small and layers is None else layers,
            provider,
            dtype or ("fp16" if provider == "cuda" else "fp32"),
            effort,
            Positions(prefix, prompt),
        )
        document = bench(wanted, lambda title: bar(title, quiet=as_json))
        if out is not None:
            write_results(out, document)
        if as_json:
            typer.echo(document_bytes(document).decode(), nl=False)
        else:
            print_bench(document)
