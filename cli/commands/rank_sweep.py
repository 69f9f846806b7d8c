"""`loracle rank sweep`: which rank and which weights are enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..columns import columns
from ..guard import one_line_errors
from ..numbers import numbers
from ..options import Debug, Json, Out
from ..progress import bar

if TYPE_CHECKING:
    from loracle.torch_impl.rank_sweep import RankSweepResult
    from loracle.torch_impl.schedule import Schedule
    from loracle.torch_impl.tasks import TaskName

_DATA, _TABLE, _TRAINING = "Data", "Table", "Each cell"


def command(
    model: Annotated[str, typer.Option("--model", help="Folder of the base model, or its name on a hub.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL as of finetune, in a form of the task.")],
    out: Out,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            "--eval-data", help="JSONL to measure on; left out, a share of --data.", rich_help_panel=_DATA
        ),
    ] = None,
    eval_share: Annotated[
        float,
        typer.Option("--eval-share", help="Of --data, without --eval-data.", rich_help_panel=_DATA),
    ] = 0.2,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="causal-lm, masked-lm, sequence-classification, token-classification or seq2seq-lm.",
            rich_help_panel=_DATA,
        ),
    ] = "causal-lm",
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="loss or perplexity; accuracy, macro_f1 or loss for classifiers. Left out, the first.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Tokens an example.", rich_help_panel=_DATA)
    ] = 512,
    ranks: Annotated[
        str, typer.Option("--ranks", help="Columns, commas between.", rich_help_panel=_TABLE)
    ] = "1,2,4,8,64",
    targets: Annotated[
        str,
        typer.Option(
            "--targets",
            help="Rows, semicolons between: letters of q, k, v, o; attention; all-linear; NAME,NAME.",
            rich_help_panel=_TABLE,
        ),
    ] = "q;qv;qkvo",
    seeds: Annotated[
        str,
        typer.Option("--seeds", help="Seeds, commas between; the spread is shown.", rich_help_panel=_TABLE),
    ] = "0",
    constant_parameters: Annotated[
        bool,
        typer.Option(
            "--constant-parameters",
            help="In each column the ranks that give every row at most the parameters of the first.",
            rich_help_panel=_TABLE,
        ),
    ] = False,
    share: Annotated[
        float,
        typer.Option(
            "--share",
            help="A rank is enough that gains this share of what the best cell gains.",
            rich_help_panel=_TABLE,
        ),
    ] = 0.95,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the cells of a sweep that ended early.", rich_help_panel=_TABLE
        ),
    ] = False,
    alpha: Annotated[
        float,
        typer.Option(
            "--alpha", help="lora_alpha at every rank; scaling is alpha / r.", rich_help_panel=_TRAINING
        ),
    ] = 16.0,
    scaling: Annotated[
        float | None,
        typer.Option(
            "--scaling", help="One scaling at every rank, in place of --alpha.", rich_help_panel=_TRAINING
        ),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=_TRAINING)
    ] = 3.0,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after so many steps.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Examples in a step.", rich_help_panel=_TRAINING)
    ] = 16,
    lr: Annotated[
        float, typer.Option("--lr", help="Learning rate after warmup.", rich_help_panel=_TRAINING)
    ] = 2e-3,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule", help="How it falls: linear, cosine or constant.", rich_help_panel=_TRAINING
        ),
    ] = "linear",
    warmup: Annotated[
        float,
        typer.Option("--warmup", help="Share of the steps in which it rises.", rich_help_panel=_TRAINING),
    ] = 0.05,
    dropout: Annotated[
        float, typer.Option("--dropout", help="Of an adapter's input.", rich_help_panel=_TRAINING)
    ] = 0.0,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="bfloat16 autocast; left out, where it is fast.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter of MODEL on DATA for each rank and target set, with the same seeds and steps, and show
    which is enough on held-out data.

    OUT gets rank.json and rank.png.
    """
    with one_line_errors(debug):
        from loracle.torch_impl.rank_sweep import RankSweepOptions, sweep_ranks
        from loracle.torch_impl.rank_sweep.target_sets import parse_target_sets

        options = RankSweepOptions(
            model=model,
            data=data,
            out=out,
            eval_data=eval_data,
            eval_share=eval_share,
            task=cast("TaskName", task),  # checked there, as the schedule is
            metric=metric,
            ranks=numbers("--ranks", ranks, int),
            targets=parse_target_sets(targets),
            seeds=numbers("--seeds", seeds, int),
            constant_parameters=constant_parameters,
            alpha=alpha,
            scaling=scaling,
            share=share,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            schedule=cast("Schedule", schedule),
            warmup=warmup,
            batch_size=batch_size,
            max_length=max_length,
            dropout=dropout,
            bf16=bf16,
            resume=resume,
        )
        with bar("cells") as advance:
            result = sweep_ranks(options, lambda done, total, _: advance(done, total))
        if as_json:
            typer.echo(json.dumps(result.to_json()))
        else:
            _print(result)


def _print(result: RankSweepResult) -> None:
    rows = [
        (
            entry.targets,
            str(entry.rank),
            str(entry.r),
            f"{entry.parameters:,}",
            "diverged" if entry.score is None else f"{entry.score:.4f}",
            "" if entry.low is None else f"{entry.low:.4f} to {entry.high:.4f}",
            f"{entry.seconds:.1f}",
        )
        for entry in result.table
    ]
    typer.echo(columns(("targets", "rank", "r", "parameters", result.metric, "seeds", "seconds"), rows))
    typer.echo(f"before training {result.before:.4f}")
    share = result.options["share"]
    for one in result.enough:
        found = "no rank is" if one.rank is None else f"r = {one.r} is, {one.parameters:,} parameters,"
        typer.echo(f"{one.targets}: {found} enough for {share:g} of the best cell's gain")
    typer.echo(f"{result.out}: rank.json, rank.png")
