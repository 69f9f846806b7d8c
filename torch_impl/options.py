"""What a fine-tuning run is told."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loracle.files import LoraConfig
from loracle.reference import AdamWOptions, ConfigError

from .optimizer import LoraPlus
from .schedule import SCHEDULES, Schedule
from .tasks import TASKS, TaskName, task_named


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of `loracle.torch_impl.finetune`; every value is checked when the object is made.

    Attributes:
        model: a model folder, or a name on a hub that can be reached.
        data: JSON Lines to learn from; see `loracle.torch_impl.read_examples`.
        out: the adapter folder to make; it must not exist, or be empty.
        task: what is learned, one of `TASKS`.
        rank: r.
        alpha: ``lora_alpha``; the scaling is alpha / r.
        targets: names of layers, ``"attention"`` or ``"all-linear"``; None for query and value, see
            `loracle.torch_impl.inject`.
        epochs: passes over the data; may be a fraction.
        max_steps: optimizer steps, in the place of ``epochs``.
        lr: learning rate after warmup.
        loraplus_ratio: LoRA+: learning rate of B over that of A; None for one rate.
        loraplus_lr_embedding: with LoRA+, the learning rate of adapters on embeddings.
        weight_decay: of AdamW; biases and layer norms have none.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's other numbers.
        max_grad_norm: what the norm of all gradients is clipped to; 0 for no clipping.
        schedule: how the learning rate falls after warmup: to zero, or not at all.
        warmup: the share of the steps in which it rises from zero, in [0, 1).
        batch_size: examples in one pass through the model, on one device.
        gradient_accumulation: passes in a step. With several devices a step takes ``batch_size *
            gradient_accumulation * devices`` examples; its loss is the mean over all their labels.
        gradient_checkpointing: compute activations a second time in place of keeping them.
        chunked_loss: compute the loss in chunks of tokens, without all logits at once.
        torch_compile: compile the model's body. The first steps take a minute longer, each of the others
            less where launching operations takes long; roundings and dropout's masks are others, and a run
            that goes on may not repeat them bit for bit.
        packing: join short examples to sequences of ``max_length``, none seeing another.
        mask_probability: share of tokens that ``masked-lm`` hides, in (0, 1).
        max_length: tokens an example may have.
        seed: of lora_A's start, the order of the data, masks, and dropout.
        dropout: probability in [0, 1) of dropping an entry of an adapter's input.
        bf16: autocast to bfloat16; None where the hardware multiplies bfloat16.
        fsdp: with several devices, divide the model's weights over them; else each holds all.
        eval_data: JSON Lines that are held out. Their loss is measured before, during and after.
        eval_steps: steps from one evaluation to the next; None for the end of each epoch.
        early_stopping_patience: stop after so many evaluations in a row that did not lower the held-out
            loss, and write the adapter of the lowest; None to train to the end and write the last.
        save_steps: steps from one checkpoint to the next; 0 for none.
        resume: go on from an interrupted run's last checkpoint, where there is one.
        tensorboard: folder for a TensorBoard log; None for none.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    model: str
    data: Path
    out: Path
    task: TaskName = "causal-lm"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 2e-3
    loraplus_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: Schedule = "linear"
    warmup: float = 0.05
    batch_size: int = 16
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    chunked_loss: bool = False
    torch_compile: bool = False
    packing: bool = False
    mask_probability: float = 0.15
    max_length: int = 512
    seed: int = 0
    dropout: float = 0.0
    bf16: bool | None = None
    fsdp: bool = False
    eval_data: Path | None = None
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    save_steps: int = 50
    resume: bool = False
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        for name in ("data", "out", "eval_data", "tensorboard"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name, least in (
            ("batch_size", 1),
            ("gradient_accumulation", 1),
            ("max_length", 2),
            ("seed", 0),
            ("save_steps", 0),
        ):
            _at_least(name, getattr(self, name), least)
        for name in ("max_steps", "eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("epochs", "lr", "loraplus_ratio"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value!r}")
        for name in ("weight_decay", "adam_epsilon", "max_grad_norm", "loraplus_lr_embedding"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected a number of at least 0, got {value!r}")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name}: expected a number in [0, 1), got {value!r}")
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup!r}")
        if not 0.0 < self.mask_probability < 1.0:
            raise ConfigError(f"mask_probability: expected a share in (0, 1), got {self.mask_probability!r}")
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("task", self.task, TASKS)
        for name in ("packing", "chunked_loss"):
            if getattr(self, name) and self.task != "causal-lm":
                raise ConfigError(f"{name}: expected task causal-lm, got {self.task}; leave {name} out")
        if self.torch_compile and self.fsdp:
            raise ConfigError("torch_compile: expected fsdp False beside it, got True; leave one of them out")
        for name in ("eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None and self.eval_data is None:
                raise ConfigError(f"{name}: expected eval_data to evaluate on, got none; give a file")
        self.lora_config()

    def lora_config(self) -> LoraConfig:
        """Return the adapter's configuration."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            base_model_name_or_path=self.model,
            task_type=task_named(self.task).peft_type,
        )

    def adamw(self) -> AdamWOptions:
        """Return the numbers that the optimizer is steered by."""
        return AdamWOptions(self.lr, (self.adam_beta1, self.adam_beta2), self.adam_epsilon, self.weight_decay)

    def loraplus(self) -> LoraPlus | None:
        """Return LoRA+'s numbers, where it is asked for."""
        if self.loraplus_ratio is None:
            return None
        return LoraPlus(self.loraplus_ratio, self.loraplus_lr_embedding)

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {
            name: str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
            for name, value in asdict(self).items()
        }

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what the run computes, as JSON values."""
        apart = ("out", "resume", "save_steps", "tensorboard")
        assert set(apart) <= {entry.name for entry in fields(self)}
        return {name: value for name, value in self.to_json().items() if name not in apart}


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
