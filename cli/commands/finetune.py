"""`loracle finetune`: train A and B beside a frozen model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..guard import one_line_errors
from ..options import Debug, Json, Out
from ..progress import training_bar

if TYPE_CHECKING:
    from loracle.torch_impl import FinetuneResult
    from loracle.torch_impl.schedule import Schedule
    from loracle.torch_impl.tasks import TaskName

_DATA, _ADAPTER, _OPTIMIZER = "Data", "Adapter", "Optimizer"
_MEMORY, _HELD_OUT, _RUN = "Memory and speed", "Held-out data", "Run"


def command(
    model: Annotated[str, typer.Option("--model", help="Folder of the base model, or its name on a hub.")],
    data: Annotated[
        Path, typer.Option("--data", help="JSONL: for causal-lm prompt and completion, messages, or text.")
    ],
    out: Out,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="causal-lm, masked-lm, sequence-classification, token-classification or seq2seq-lm.",
            rich_help_panel=_DATA,
        ),
    ] = "causal-lm",
    max_length: Annotated[
        int, typer.Option("--max-length", help="Tokens an example.", rich_help_panel=_DATA)
    ] = 512,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing",
            help="Join short examples to sequences of --max-length; none sees another.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    mask_probability: Annotated[
        float,
        typer.Option(
            "--mask-probability", help="Share of tokens that masked-lm hides.", rich_help_panel=_DATA
        ),
    ] = 0.15,
    rank: Annotated[
        int, typer.Option("--rank", help="r, the inner width of B @ A.", rich_help_panel=_ADAPTER)
    ] = 8,
    alpha: Annotated[
        float, typer.Option("--alpha", help="lora_alpha; scaling is alpha / r.", rich_help_panel=_ADAPTER)
    ] = 16,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            help="attention, all-linear, or module names with commas between; query and value by default.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    dropout: Annotated[
        float, typer.Option("--dropout", help="Of the adapter's input.", rich_help_panel=_ADAPTER)
    ] = 0.0,
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=_OPTIMIZER)
    ] = 3.0,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", help="Stop after so many steps.", rich_help_panel=_OPTIMIZER),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", help="Examples in one pass, on one device.", rich_help_panel=_OPTIMIZER),
    ] = 16,
    gradient_accumulation: Annotated[
        int,
        typer.Option("--gradient-accumulation", help="Passes in a step.", rich_help_panel=_OPTIMIZER),
    ] = 1,
    lr: Annotated[
        float, typer.Option("--lr", help="Learning rate after warmup.", rich_help_panel=_OPTIMIZER)
    ] = 2e-3,
    loraplus_ratio: Annotated[
        float | None,
        typer.Option(
            "--loraplus-ratio",
            help="LoRA+: learning rate of B over that of A, such as 16.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = None,
    loraplus_lr_embedding: Annotated[
        float,
        typer.Option(
            "--loraplus-lr-embedding",
            help="LoRA+: learning rate of adapters on embeddings.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = 1e-6,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule", help="How it falls: linear, cosine or constant.", rich_help_panel=_OPTIMIZER
        ),
    ] = "linear",
    warmup: Annotated[
        float,
        typer.Option("--warmup", help="Share of the steps in which it rises.", rich_help_panel=_OPTIMIZER),
    ] = 0.05,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Of AdamW.", rich_help_panel=_OPTIMIZER)
    ] = 0.0,
    adam_beta1: Annotated[
        float, typer.Option("--adam-beta1", help="Of AdamW.", rich_help_panel=_OPTIMIZER)
    ] = 0.9,
    adam_beta2: Annotated[
        float, typer.Option("--adam-beta2", help="Of AdamW.", rich_help_panel=_OPTIMIZER)
    ] = 0.999,
    adam_epsilon: Annotated[
        float, typer.Option("--adam-epsilon", help="Of AdamW.", rich_help_panel=_OPTIMIZER)
    ] = 1e-8,
    max_grad_norm: Annotated[
        float,
        typer.Option(
            "--max-grad-norm",
            help="What the norm of all gradients is clipped to; 0: not at all.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", help="Of A's start, the order of the data, masks, dropout.", rich_help_panel=_OPTIMIZER
        ),
    ] = 0,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="bfloat16 autocast; left out, where it is fast.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice in place of keeping them.",
            rich_help_panel=_MEMORY,
        ),
    ] = False,
    chunked_loss: Annotated[
        bool,
        typer.Option("--chunked-loss", help="The loss without all logits at once.", rich_help_panel=_MEMORY),
    ] = False,
    torch_compile: Annotated[
        bool,
        typer.Option(
            "--torch-compile",
            help="Compile the model: a minute at first, then shorter steps where launching takes long.",
            rich_help_panel=_MEMORY,
        ),
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp",
            help="Under torchrun: divide the model over the devices; else each holds all of it.",
            rich_help_panel=_MEMORY,
        ),
    ] = False,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            "--eval-data",
            help="JSONL whose loss is measured before, during and after.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            "--eval-steps",
            help="Steps between evaluations; left out, each epoch.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = None,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            "--early-stopping-patience",
            help="Stop after so many evaluations without a lower loss, and write the adapter of the lowest.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = None,
    save_steps: Annotated[
        int, typer.Option("--save-steps", help="Steps between checkpoints; 0: none.", rich_help_panel=_RUN)
    ] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=_RUN)
    ] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option("--tensorboard", help="Folder for a TensorBoard log.", rich_help_panel=_RUN),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune MODEL on DATA: only the low-rank A and B are trained, the base folder is not touched.

    Under `torchrun --nproc-per-node N -m loracle.cli finetune ...` N devices train together.
    """
    with one_line_errors(debug):
        from loracle.torch_impl import FinetuneOptions, finetune, parse_targets
        from loracle.torch_impl.distributed import is_main

        options = FinetuneOptions(
            model=model,
            data=data,
            out=out,
            task=cast("TaskName", task),  # checked there, as the schedule is
            rank=rank,
            alpha=alpha,
            targets=None if targets is None else parse_targets(targets),
            dropout=dropout,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            loraplus_ratio=loraplus_ratio,
            loraplus_lr_embedding=loraplus_lr_embedding,
            weight_decay=weight_decay,
            adam_beta1=adam_beta1,
            adam_beta2=adam_beta2,
            adam_epsilon=adam_epsilon,
            max_grad_norm=max_grad_norm,
            schedule=cast("Schedule", schedule),
            warmup=warmup,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
            chunked_loss=chunked_loss,
            torch_compile=torch_compile,
            packing=packing,
            mask_probability=mask_probability,
            max_length=max_length,
            seed=seed,
            bf16=bf16,
            fsdp=fsdp,
            eval_data=eval_data,
            eval_steps=eval_steps,
            early_stopping_patience=early_stopping_patience,
            save_steps=save_steps,
            resume=resume,
            tensorboard=tensorboard,
        )
        with training_bar() as advance:
            result = finetune(options, progress=advance)
        if not is_main():
            return
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(result), default=str))
        else:
            _print(result, options.max_length)


def _print(result: FinetuneResult, max_length: int) -> None:
    tenth = max(1, len(result.losses) // 10)
    first, last = (sum(part) / tenth for part in (result.losses[:tenth], result.losses[-tenth:]))
    typer.echo(
        f"{result.adapter}: {result.steps} steps in {result.seconds:.0f} s, loss {first:.3f} to {last:.3f}, "
        f"{result.trainable:,} of {result.total:,} parameters trained"
    )
    if result.eval_before is not None and result.eval_after is not None:
        measures = [f"{name} {value:.3f}" for name, value in result.metrics.items()]
        typer.echo(
            f"held out: loss {result.eval_before:.3f} to {result.eval_after:.3f} at step {result.best_step}"
            + "".join(f", {measure}" for measure in measures)
        )
    if result.shortened or result.left_out:
        typer.echo(
            f"{result.shortened} examples shortened and {result.left_out} left out "
            f"to fit --max-length {max_length}"
        )
