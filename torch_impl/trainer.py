"""transformers' Trainer, with the adapter alone in its checkpoints and the lean loss."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loracle.files import read_adapter, write_adapter_files
from loracle.reference import NonFiniteError

from .adapter_io import adapter_of, fill
from .attention import AttentionChoice
from .checkpoints import Checkpoints
from .encoding import Encoded, collate
from .loss import completion_loss
from .options import FinetuneOptions
from .sampling import LengthGroupedSampler

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, the last step's loss, which is None before the first)."""


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains the injected adapters of a causal language model on encoded examples.

    Args:
        model: with adapters injected.
        options: of the run.
        bf16: autocast to bfloat16.
        examples: to learn from.
        checkpoints: where the run's checkpoints go.
        progress: told of every step.
    """

    def __init__(
        self,
        model: nn.Module,
        options: FinetuneOptions,
        *,
        bf16: bool,
        examples: tuple[Encoded, ...],
        checkpoints: Checkpoints,
        progress: Progress | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._lengths = tuple(len(example.input_ids) for example in examples)
        self._seed = options.seed
        arguments = _arguments(options, bf16=bf16, folder=checkpoints.folder)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=examples,
            callbacks=[_Reporter(progress)],
        )
        self.remove_callback(PrinterCallback)
        self._attention = AttentionChoice(model, bf16=bf16)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss over completions; see `completion_loss`."""
        assert not return_outputs
        self._attention.choose(inputs["input_ids"].shape[1])
        return completion_loss(model, inputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return LengthGroupedSampler(self._lengths, self._train_batch_size, self._seed)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._checkpoints.commit(f"checkpoint-{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        os.makedirs(output_dir)
        write_adapter_files(Path(output_dir), adapter_of(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        fill(self.model, read_adapter(resume_from_checkpoint))


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Passes each step's loss on, and stops a run that has diverged before it is saved."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise NonFiniteError(
                    f"{name}: expected a finite number, got {logs[name]} at step {state.global_step}; "
                    "lower the learning rate"
                )
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, logs["loss"])


def _arguments(options: FinetuneOptions, *, bf16: bool, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        learning_rate=options.lr,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        logging_steps=1,
        # A loss of NaN must be seen, not replaced by the mean of the others.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        push_to_hub=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # One device: several would wrap the model in DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
