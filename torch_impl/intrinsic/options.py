"""What a measurement of an intrinsic dimension is told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loracle.reference import ConfigError

from ..options import FinetuneOptions
from ..options_json import options_to_json
from ..schedule import Schedule
from .projection import PROJECTIONS, ProjectionName

Metric = Literal["accuracy", "macro_f1"]

METRICS: Mapping[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "macro_f1"),
    "token-classification": ("accuracy",),
}
"""Of each task those that can be computed."""

DIMS = (10, 30, 100, 300, 1_000, 3_000, 10_000)
"""What is tried where no dimensions are given, as far as it suits the model."""


@dataclass(frozen=True)
class IntrinsicOptions:
    """Options of `measure_intrinsic_dimension`; every value is checked when the object is made.

    Attributes:
        model: a model folder, or a name on a hub that can be reached.
        data: JSON Lines to learn from, in the form of the task; see `loracle.torch_impl.read_examples`.
        out: the folder to make; it must not exist, or be empty.
        test_data: JSON Lines that the score is measured on; None to keep ``test_share`` of ``data`` for that.
        task: one of `METRICS`.
        metric: what the score is, one of the task's.
        dims: values of d; None for those of `DIMS` that suit the model.
        projection: see `loracle.torch_impl.intrinsic.projection.ProjectionName`.
        lr: learning rates that are tried for each d; the best on the validation split counts. They are those
            of a parameter, as ``full_lr`` is: theta_d learns at ``sqrt(D / d)`` times the rate, so that a
            step of AdamW moves the parameters by about ``lr``, whatever d.
        full_lr: those that are tried for the model as a whole.
        seeds: a run is made for each: of the head's start, P, the order of the data, and dropout.
        epochs: passes over the training split in each run; may be a fraction.
        max_steps: optimizer steps of each run, in the place of ``epochs``.
        batch_size: examples in a step.
        max_length: tokens an example may have.
        validation_share: of ``data`` that learning rates are chosen on.
        test_share: of ``data`` that the score is measured on, without ``test_data``.
        schedule: how the learning rate falls after warmup.
        warmup: the share of the steps in which it rises from zero, in [0, 1).
        bf16: autocast to bfloat16; None where the hardware multiplies bfloat16.
        resume: go on from an interrupted measurement's finished runs, where there are some.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    model: str
    data: Path
    out: Path
    test_data: Path | None = None
    task: Literal["sequence-classification", "token-classification"] = "sequence-classification"
    metric: Metric = "accuracy"
    dims: tuple[int, ...] | None = None
    projection: ProjectionName = "auto"
    lr: tuple[float, ...] = (1e-3, 3e-3)
    full_lr: tuple[float, ...] = (1e-4, 3e-4)
    seeds: tuple[int, ...] = (0,)
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    max_length: int = 128
    validation_share: float = 0.15
    test_share: float = 0.25
    schedule: Schedule = "linear"
    warmup: float = 0.05
    bf16: bool | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        for name in ("data", "out", "test_data"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        if self.task not in METRICS:
            raise ConfigError(f"task: expected one of {', '.join(METRICS)}, got {self.task!r}")
        if self.metric not in METRICS[self.task]:
            known = " or ".join(METRICS[self.task])
            raise ConfigError(f"metric: expected {known}, which {self.task} has, got {self.metric!r}")
        if self.projection not in PROJECTIONS:
            raise ConfigError(
                f"projection: expected one of {', '.join(PROJECTIONS)}, got {self.projection!r}"
            )
        for name in ("lr", "full_lr", "seeds", "dims"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _each_once(name, tuple(values)))
        for d in self.dims or ():
            if isinstance(d, bool) or not isinstance(d, int) or d < 1:
                raise ConfigError(f"dims: expected integers of at least 1, got {d!r}")
        for name in ("validation_share", "test_share"):
            share = getattr(self, name)
            if not 0.0 < share < 1.0:
                raise ConfigError(f"{name}: expected a share in (0, 1), got {share!r}")
        if self.test_data is None and self.validation_share + self.test_share >= 1.0:
            raise ConfigError(
                f"test_share: expected less than {1.0 - self.validation_share:g}, which validation_share "
                f"leaves, got {self.test_share!r}; keep something to learn from"
            )
        # What is left is checked there.
        for lr in (*self.lr, *self.full_lr):
            for seed in self.seeds:
                self.run(lr, seed)

    def run(self, lr: float, seed: int) -> FinetuneOptions:
        """Return the options of one run; its adapter's are not used."""
        return FinetuneOptions(
            model=self.model,
            data=self.data,
            out=self.out,
            task=self.task,
            epochs=self.epochs,
            max_steps=self.max_steps,
            lr=lr,
            schedule=self.schedule,
            warmup=self.warmup,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=seed,
            bf16=self.bf16,
            save_steps=0,
        )

    def steps(self, examples: int) -> int:
        """Return the optimizer steps of a run that learns from so many examples."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(examples / self.batch_size))

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; of files and folders the names alone."""
        return options_to_json(self, self.model)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what each run computes, as JSON values.

        Not which runs there are: further ones may be asked for when a measurement goes on.
        """
        apart = ("dims", "lr", "full_lr", "seeds", "metric")
        own = {name: value for name, value in self.to_json().items() if name not in apart}
        return {**own, "model": self.model}


def _each_once(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ConfigError(f"{name}: expected at least one value, got none")
    return tuple(sorted(set(values)))
