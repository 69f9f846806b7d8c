"""`loracle finetune`: train A and B beside a frozen model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..guard import one_line_errors
from ..options import Debug, Json, Out
from ..progress import training_bar


def command(
    model: Annotated[str, typer.Option("--model", help="Folder of the base model, or its name on a hub.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL: prompt and completion, messages, or text.")],
    out: Out,
    rank: Annotated[int, typer.Option("--rank", help="r, the inner width of B @ A.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", help="lora_alpha; scaling is alpha / r.")] = 16,
    targets: Annotated[
        str, typer.Option("--targets", help="attention, all-linear, or module names with commas between.")
    ] = "q_proj,v_proj",
    dropout: Annotated[float, typer.Option("--dropout", help="Of the adapter's input.")] = 0.0,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Stop after so many steps.")] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a step.")] = 16,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens an example.")] = 512,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 autocast; left out, where it is fast.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune MODEL on DATA: only the low-rank A and B are trained, the base folder is not touched."""
    with one_line_errors(debug):
        from loracle.torch_impl import FinetuneOptions, finetune

        options = FinetuneOptions(
            model=model,
            data=data,
            out=out,
            rank=rank,
            alpha=alpha,
            targets=targets,
            dropout=dropout,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            bf16=bf16,
            resume=resume,
        )
        with training_bar() as advance:
            result = finetune(options, progress=advance)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(result), default=str))
        else:
            typer.echo(str(result))
