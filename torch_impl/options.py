"""What a fine-tuning run is told."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from loracle.files import LoraConfig
from loracle.reference import ConfigError


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of `loracle.torch_impl.finetune`; every value is checked when the object is made.

    Attributes:
        model: a model folder, or a name on a hub that can be reached.
        data: JSON Lines to learn from; see `loracle.torch_impl.read_examples`.
        out: the adapter folder to make; it must not exist, or be empty.
        rank: r.
        alpha: ``lora_alpha``; the scaling is alpha / r.
        targets: names of linear layers, ``"attention"`` or ``"all-linear"``; see
            `loracle.torch_impl.inject`.
        epochs: passes over the data; may be a fraction.
        max_steps: optimizer steps, in the place of ``epochs``.
        lr: learning rate after warmup.
        schedule: how the learning rate falls from there to zero.
        warmup: the share of the steps in which it rises from zero, in [0, 1).
        batch_size: examples a step.
        max_length: tokens an example may have.
        seed: of lora_A's start, the order of the data, and dropout.
        dropout: probability in [0, 1) of dropping an entry of an adapter's input.
        bf16: autocast to bfloat16; None where the hardware multiplies bfloat16.
        resume: go on from an interrupted run's last checkpoint, where there is one.
        eval_data: JSON Lines whose loss is measured before and after.
        save_steps: steps from one checkpoint to the next; 0 for none.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    model: str
    data: Path
    out: Path
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 2e-3
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: float = 0.05
    batch_size: int = 16
    max_length: int = 512
    seed: int = 0
    dropout: float = 0.0
    bf16: bool | None = None
    resume: bool = False
    eval_data: Path | None = None
    save_steps: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        for name in ("data", "out", "eval_data"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name, least in (("batch_size", 1), ("max_length", 2), ("seed", 0), ("save_steps", 0)):
            _at_least(name, getattr(self, name), least)
        if self.max_steps is not None:
            _at_least("max_steps", self.max_steps, 1)
        for name in ("epochs", "lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup!r}")
        if self.schedule not in ("linear", "cosine"):
            raise ConfigError(f"schedule: expected linear or cosine, got {self.schedule!r}")
        self.lora_config()

    def lora_config(self) -> LoraConfig:
        """Return the adapter's configuration."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            base_model_name_or_path=self.model,
        )

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
        apart = ("out", "resume", "save_steps")
        assert set(apart) <= {entry.name for entry in fields(self)}
        return {name: value for name, value in self.to_json().items() if name not in apart}


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")
