"""Fine-tune a causal language model with LoRA: data in, an adapter folder in PEFT's format out."""

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loracle.files import output_folder, write_adapter_files

from .adapter_io import adapter_of
from .checkpoints import Checkpoints
from .data import read_examples
from .encoding import Encoded, EncodedData, collate, encode_all
from .inject import inject
from .loading import check_model_source, load_model, native_bf16, quiet_transformers
from .loss import mean_loss
from .options import FinetuneOptions
from .plot import loss_plot
from .trainer import AdapterTrainer, Progress


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        adapter: the folder written.
        steps: optimizer steps of the whole run, resumed ones included.
        seconds: of training in this call.
        losses: each step's loss, in nats a labelled token.
        eval_before, eval_after: the loss on ``eval_data``, where it was given.
        trainable, total: parameters.
        examples, tokens, learned: of one epoch; ``tokens`` counts no padding, ``learned`` those with a
            label.
        shortened, left_out: examples changed or dropped to respect ``max_length``.
        bf16: whether products were bfloat16.
    """

    adapter: Path
    steps: int
    seconds: float
    losses: tuple[float, ...]
    eval_before: float | None
    eval_after: float | None
    trainable: int
    total: int
    examples: int
    tokens: int
    learned: int
    shortened: int
    left_out: int
    bf16: bool


def finetune(options: FinetuneOptions, progress: Progress | None = None) -> FinetuneResult:
    """Train A and B of the targeted layers beside frozen weights and write them to ``options.out``.

    The loss is the cross-entropy of completions; the optimizer AdamW without weight decay, gradients
    clipped to a norm of 1. Written, all or nothing: ``adapter_config.json``, ``adapter_model.safetensors``,
    ``training.json`` (options, versions, losses) and ``loss.png``. The model's folder is only read. On the
    CPU the same options on the same machine give the same adapter, bit for bit, also when the run was
    interrupted and resumed.

    Checkpoints lie in ``<out>.checkpoints`` while the run lasts, and after an interruption.

    Args:
        options: see `FinetuneOptions`.
        progress: called with (steps done, steps in all, last loss or None).

    Raises:
        DataError: a line of the data is malformed.
        FileError: the model or the data is missing, ``out`` is not empty, or a write failed.
        TargetError: no layer matches the targets.
        ConfigError: ``resume`` finds a run with other options.
        NonFiniteError: the loss diverged.
    """
    examples = read_examples(options.data)
    held_out = None if options.eval_data is None else read_examples(options.eval_data)
    check_model_source(options.model)
    checkpoints = Checkpoints(options.out)
    with output_folder(options.out) as folder:
        bf16 = native_bf16(_device()) if options.bf16 is None else options.bf16
        resume_from = checkpoints.open(_identity(options, bf16), resume=options.resume)
        success = False
        try:
            with quiet_transformers():
                model, tokenizer = load_model(options.model, bf16=bf16)
                data = encode_all(tokenizer, examples, options.max_length)
                held = None if held_out is None else encode_all(tokenizer, held_out, options.max_length)
                inject(model, options.lora_config(), generator=torch.Generator().manual_seed(options.seed))
                trainer = AdapterTrainer(
                    model,
                    options,
                    bf16=bf16,
                    examples=data.examples,
                    checkpoints=checkpoints,
                    progress=progress,
                )
                before = _held_out_loss(model, held, options.batch_size, bf16)
                start = time.perf_counter()
                trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
                seconds = time.perf_counter() - start
                after = _held_out_loss(model, held, options.batch_size, bf16)
            history = [entry for entry in trainer.state.log_history if "loss" in entry]
            result = FinetuneResult(
                adapter=options.out,
                steps=trainer.state.global_step,
                seconds=seconds,
                losses=tuple(float(entry["loss"]) for entry in history),
                eval_before=before,
                eval_after=after,
                trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
                total=sum(p.numel() for p in model.parameters()),
                examples=len(data.examples),
                tokens=sum(len(one.input_ids) for one in data.examples),
                learned=sum(one.learned for one in data.examples),
                shortened=data.shortened,
                left_out=data.left_out,
                bf16=bf16,
            )
            _write(folder, model, options, result)
            success = True
        finally:
            checkpoints.close(success=success)
    return result


def _write(folder: Path, model: nn.Module, options: FinetuneOptions, result: FinetuneResult) -> None:
    write_adapter_files(folder, adapter_of(model))
    record = {
        "options": options.to_json(),
        "result": {name: value for name, value in vars(result).items() if name != "adapter"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("loracle", "torch", "transformers", "numpy")},
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    loss_plot(result.losses, folder / "loss.png")


def _held_out_loss(model: nn.Module, data: EncodedData | None, batch_size: int, bf16: bool) -> float | None:
    if data is None:
        return None
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        return mean_loss(model, _batches(data.examples, batch_size), device)


def _batches(examples: Sequence[Encoded], size: int) -> Iterator[dict[str, torch.Tensor]]:
    by_length = sorted(examples, key=lambda one: len(one.input_ids))
    return (collate(by_length[at : at + size]) for at in range(0, len(by_length), size))


def _identity(options: FinetuneOptions, bf16: bool) -> dict[str, Any]:
    files = {"data_sha256": options.data, "eval_data_sha256": options.eval_data}
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path is not None
    }
    return {**options.identity(), **digests, "bf16": bf16}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
