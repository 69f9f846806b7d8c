"""What a sweep over ranks and target sets is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.reference import ConfigError

from ..options import FinetuneOptions
from ..options_json import options_to_json
from ..schedule import Schedule
from ..tasks import TaskName, task_named

METRICS: Mapping[str, tuple[str, ...]] = {
    "causal-lm": ("loss", "perplexity"),
    "masked-lm": ("loss", "perplexity"),
    "sequence-classification": ("accuracy", "macro_f1", "loss"),
    "token-classification": ("accuracy", "loss"),
    "seq2seq-lm": ("loss", "perplexity"),
}
"""Of each task those that can be computed, its default first."""

LOWER_IS_BETTER = ("loss", "perplexity")

_NO_EVALUATION_BETWEEN = 2**31


@dataclass(frozen=True)
class RankSweepOptions:
    """Options of `sweep_ranks`; every value is checked when the object is made.

    Attributes:
        model: a model folder, or a name on a hub that can be reached.
        data: JSON Lines to learn from, in a form of the task; see `loracle.torch_impl.read_examples`.
        out: the folder to make; it must not exist, or be empty.
        eval_data: JSON Lines to measure the metric on; None to keep ``eval_share`` of ``data`` for that.
        eval_share: of ``data`` that is held out, without ``eval_data``.
        task: what is learned.
        metric: what cells are compared by, one of the task's `METRICS`; None for the first of them.
        ranks: columns of the table.
        targets: its rows; see `loracle.torch_impl.rank_sweep.target_sets.target_modules`.
        seeds: a cell is trained for each: of lora_A's start, a head's, the order of the data, dropout.
        constant_parameters: give each set, in place of a column's rank, the largest rank whose adapter has no
            more numbers than that of the first set at the column's rank: r = 8 of q beside r = 4 of qv.
        alpha: ``lora_alpha`` at every rank, as in the paper; the scaling is alpha / r.
        scaling: the same scaling at every rank, in the place of ``alpha``; None for alpha.
        share: of what the best of all cells gains over the untrained model, a rank that gains as much is
            called enough, in (0, 1].
        epochs: passes over the data in each cell; may be a fraction.
        max_steps: optimizer steps of each cell, in the place of ``epochs``.
        lr: learning rate of every cell after warmup.
        schedule: how it falls after warmup.
        warmup: the share of the steps in which it rises from zero, in [0, 1).
        batch_size: examples in a step.
        max_length: tokens an example may have.
        dropout: probability in [0, 1) of dropping an entry of an adapter's input.
        bf16: autocast to bfloat16; None where the hardware multiplies bfloat16.
        resume: go on from an interrupted sweep's finished cells, where there are some.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    model: str
    data: Path
    out: Path
    eval_data: Path | None = None
    eval_share: float = 0.2
    task: TaskName = "causal-lm"
    metric: str | None = None
    ranks: tuple[int, ...] = (1, 2, 4, 8, 64)
    targets: tuple[str, ...] = ("q", "qv", "qkvo")
    seeds: tuple[int, ...] = (0,)
    constant_parameters: bool = False
    alpha: float = 16.0
    scaling: float | None = None
    share: float = 0.95
    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 2e-3
    schedule: Schedule = "linear"
    warmup: float = 0.05
    batch_size: int = 16
    max_length: int = 512
    dropout: float = 0.0
    bf16: bool | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        for name in ("data", "out", "eval_data"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        known = METRICS[task_named(self.task).name]
        if self.metric is None:
            object.__setattr__(self, "metric", known[0])
        if self.metric not in known:
            raise ConfigError(
                f"metric: expected {' or '.join(known)}, which {self.task} has, got {self.metric!r}"
            )
        for name in ("ranks", "seeds"):
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int) or value < (name == "ranks"):
                    least = int(name == "ranks")
                    raise ConfigError(f"{name}: expected integers of at least {least}, got {value!r}")
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))
        for name in ("ranks", "seeds", "targets"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one value, got none")
        if not 0.0 < self.eval_share < 1.0:
            raise ConfigError(f"eval_share: expected a share in (0, 1), got {self.eval_share!r}")
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"share: expected a share in (0, 1], got {self.share!r}")
        if self.scaling is not None and not 0.0 < self.scaling < float("inf"):
            raise ConfigError(f"scaling: expected a number above 0, got {self.scaling!r}")
        # What is left is checked there.
        self.cell(self.data, self.data, self.out, (), self.ranks[0], self.seeds[0])

    @property
    def shown_metric(self) -> str:
        """The name of the metric that counts."""
        return self.metric or METRICS[self.task][0]

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is one of loss."""
        return self.shown_metric in LOWER_IS_BETTER

    def cell(
        self,
        train: Path,
        held_out: Path,
        out: Path,
        targets: tuple[str, ...] | str,
        rank: int,
        seed: int,
    ) -> FinetuneOptions:
        """Return the options of one cell's run: measured before and after, without checkpoints."""
        return FinetuneOptions(
            model=self.model,
            data=train,
            out=out,
            task=self.task,
            rank=rank,
            alpha=self.alpha if self.scaling is None else self.scaling * rank,
            targets=targets or None,
            epochs=self.epochs,
            max_steps=self.max_steps,
            lr=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=seed,
            dropout=self.dropout,
            bf16=self.bf16,
            eval_data=held_out,
            eval_steps=_NO_EVALUATION_BETWEEN,
            save_steps=0,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; of files and folders the names alone."""
        return options_to_json(self, self.model)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what each cell computes, as JSON values.

        Not which cells there are: further ones may be asked for when a sweep goes on.
        """
        apart = ("ranks", "targets", "seeds", "metric", "share", "constant_parameters")
        own = {name: value for name, value in self.to_json().items() if name not in apart}
        return {**own, "model": self.model}
