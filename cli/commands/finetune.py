"""`loracle finetune`: train A and B beside a frozen model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from loracle.reference import ConfigError

from ..guard import one_line_errors
from ..options import Debug, Json, Out
from ..progress import training_bar


def _schedule(name: str) -> Literal["linear", "cosine"]:
    if name == "linear":
        return "linear"
    if name == "cosine":
        return "cosine"
    raise ConfigError(f"--schedule: expected linear or cosine, got {name!r}")


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
    lr: Annotated[float, typer.Option("--lr", help="Learning rate after warmup.")] = 2e-3,
    schedule: Annotated[str, typer.Option("--schedule", help="How it falls: linear or cosine.")] = "linear",
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps in which it rises.")] = 0.05,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a step.")] = 16,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens an example.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of A's start, the order of the data, dropout.")] = 0,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 autocast; left out, where it is fast.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="JSONL whose loss is measured before and after.")
    ] = None,
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints; 0: none.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune MODEL on DATA: only the low-rank A and B are trained, the base folder is not touched."""
    with one_line_errors(debug):
        from loracle.torch_impl import FinetuneOptions, finetune, parse_targets

        options = FinetuneOptions(
            model=model,
            data=data,
            out=out,
            rank=rank,
            alpha=alpha,
            targets=parse_targets(targets),
            dropout=dropout,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            schedule=_schedule(schedule),
            warmup=warmup,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            bf16=bf16,
            eval_data=eval_data,
            save_steps=save_steps,
            resume=resume,
        )
        with training_bar() as advance:
            result = finetune(options, progress=advance)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(result), default=str))
        else:
            tenth = max(1, len(result.losses) // 10)
            first, last = (sum(part) / tenth for part in (result.losses[:tenth], result.losses[-tenth:]))
            typer.echo(
                f"{out}: {result.steps} steps in {result.seconds:.0f} s, loss {first:.3f} to {last:.3f}, "
                f"{result.trainable:,} of {result.total:,} parameters trained"
            )
            if result.shortened or result.left_out:
                typer.echo(
                    f"{result.shortened} examples shortened and {result.left_out} left out "
                    f"to fit --max-length {max_length}"
                )
