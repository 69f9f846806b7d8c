"""`loracle intrinsic`: how few numbers are enough to fine-tune a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..columns import columns
from ..guard import one_line_errors
from ..numbers import numbers
from ..options import Debug, Json, Out
from ..progress import bar

if TYPE_CHECKING:
    from loracle.torch_impl.intrinsic import IntrinsicResult
    from loracle.torch_impl.intrinsic.options import Metric
    from loracle.torch_impl.intrinsic.projection import ProjectionName
    from loracle.torch_impl.schedule import Schedule

_DATA, _SWEEP, _TRAINING = "Data", "Sweep", "Each run"


def command(
    model: Annotated[str, typer.Option("--model", help="Folder of the base model, or its name on a hub.")],
    data: Annotated[
        Path, typer.Option("--data", help="JSONL as of finetune: text and label, or tokens and tags.")
    ],
    out: Out,
    test_data: Annotated[
        Path | None,
        typer.Option(
            "--test-data", help="JSONL to score on; left out, a share of --data.", rich_help_panel=_DATA
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            "--task", help="sequence-classification or token-classification.", rich_help_panel=_DATA
        ),
    ] = "sequence-classification",
    metric: Annotated[
        str, typer.Option("--metric", help="The score: accuracy or macro_f1.", rich_help_panel=_DATA)
    ] = "accuracy",
    validation_share: Annotated[
        float,
        typer.Option(
            "--validation-share", help="Of --data, to choose learning rates on.", rich_help_panel=_DATA
        ),
    ] = 0.15,
    test_share: Annotated[
        float, typer.Option("--test-share", help="Of --data, to score on.", rich_help_panel=_DATA)
    ] = 0.25,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Tokens an example.", rich_help_panel=_DATA)
    ] = 128,
    dims: Annotated[
        str | None,
        typer.Option(
            "--dims",
            help="Values of d, such as 10,100,1000; left out, 10 to 10,000 in steps of about 3.",
            rich_help_panel=_SWEEP,
        ),
    ] = None,
    projection: Annotated[
        str,
        typer.Option(
            "--projection",
            help="auto, dense, fastfood, or said: a learned scale for each layer.",
            rich_help_panel=_SWEEP,
        ),
    ] = "auto",
    lr: Annotated[
        str,
        typer.Option(
            "--lr",
            help="Learning rates tried for each d: about how far a step moves each parameter.",
            rich_help_panel=_SWEEP,
        ),
    ] = "1e-3,3e-3",
    full_lr: Annotated[
        str,
        typer.Option("--full-lr", help="Learning rates tried for the whole model.", rich_help_panel=_SWEEP),
    ] = "1e-4,3e-4",
    seeds: Annotated[
        str,
        typer.Option("--seeds", help="Seeds, commas between; the spread is shown.", rich_help_panel=_SWEEP),
    ] = "0",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the runs of a measurement that ended early.", rich_help_panel=_SWEEP
        ),
    ] = False,
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=_TRAINING)
    ] = 3.0,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after so many steps.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Examples in a step.", rich_help_panel=_TRAINING)
    ] = 16,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule", help="How the rate falls: linear, cosine or constant.", rich_help_panel=_TRAINING
        ),
    ] = "linear",
    warmup: Annotated[
        float,
        typer.Option("--warmup", help="Share of the steps in which it rises.", rich_help_panel=_TRAINING),
    ] = 0.05,
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
    """Measure the intrinsic dimension of MODEL on DATA: d90, the smallest d with which training d numbers,
    projected at random to all parameters, reaches 90% of the score of training them all.

    OUT gets intrinsic.json and intrinsic.png.
    """
    with one_line_errors(debug):
        from loracle.torch_impl.intrinsic import IntrinsicOptions, measure_intrinsic_dimension

        options = IntrinsicOptions(
            model=model,
            data=data,
            out=out,
            test_data=test_data,
            task=cast("Any", task),  # checked there, as the other words are
            metric=cast("Metric", metric),
            dims=None if dims is None else numbers("--dims", dims, int),
            projection=cast("ProjectionName", projection),
            lr=numbers("--lr", lr, float),
            full_lr=numbers("--full-lr", full_lr, float),
            seeds=numbers("--seeds", seeds, int),
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            max_length=max_length,
            validation_share=validation_share,
            test_share=test_share,
            schedule=cast("Schedule", schedule),
            warmup=warmup,
            bf16=bf16,
            resume=resume,
        )
        with bar("subspaces") as advance:
            result = measure_intrinsic_dimension(options, lambda done, total, _: advance(done, total))
        if as_json:
            typer.echo(json.dumps(result.to_json()))
        else:
            _print(result)


def _print(result: IntrinsicResult) -> None:
    rows = [
        (
            f"{result.parameters if point.d is None else point.d:,}",
            f"{point.lr:g}",
            f"{point.score:.3f}",
            f"{point.score / result.full.score:.0%}",
            f"{point.low:.3f} to {point.high:.3f}",
        )
        for point in (*result.points, result.full)
    ]
    typer.echo(columns(("d", "learning rate", result.metric, "of full", "seeds"), rows))
    found, most = result.dimension, max((point.d or 0 for point in result.points), default=0)

    def shown(d: int | None) -> str:
        return f"above {most:,}" if d is None else f"{d:,}"

    typer.echo(f"before training {result.start:.3f}, the most frequent class always {result.majority:.3f}")
    typer.echo(f"d90 {shown(found.d90)}: reaches {found.threshold:.3f}, 90% of the full score")
    typer.echo(
        f"d90 above the start {shown(found.d90_above_start)}: reaches {found.threshold_above_start:.3f}, the "
        "start and 90% of what training all adds"
    )
    if result.diverged:
        typer.echo(f"no learning rate trains d = {', '.join(map(str, result.diverged))}; give lower ones")
    typer.echo(f"{result.out}: intrinsic.json, intrinsic.png")
