"""One run: the start, the whole model, or a subspace; trained with `AdapterTrainer`, and measured."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from loracle.reference import NonFiniteError

from ..distributed import World
from ..encoded import EncodedData
from ..loading import LoadedModel
from ..tasks import Task
from ..trainer import AdapterTrainer, Observers, Progress
from ..training_set import held_out_batches, training_set
from .options import IntrinsicOptions
from .subspace import SubspaceModel

Kind = Literal["start", "full", "subspace"]


@dataclass(frozen=True)
class Run:
    """Which run.

    Attributes:
        kind: ``start``: nothing is trained; ``full``: everything; ``subspace``: d numbers.
        d: numbers that are trained in a subspace; else None.
        lr: the learning rate, of a subspace that of a parameter, see `IntrinsicOptions.lr`; None at the
            start.
        seed: of its randomness.
    """

    kind: Kind
    d: int | None
    lr: float | None
    seed: int

    @property
    def name(self) -> str:
        """What its record is called: a digest, as long for every run."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunRecord:
    """What a run came to; JSON values.

    Attributes:
        run: which one.
        steps, seconds: of training.
        loss: mean of the training loss over the last tenth of the steps, in nats a label.
        validation, test: the metrics by name; None where training diverged.
        diverged: why there are none.
        rate: the optimizer's learning rate, in a subspace theta_d's.
    """

    run: Run
    steps: int
    seconds: float
    loss: float | None
    validation: Mapping[str, float] | None
    test: Mapping[str, float] | None
    diverged: str | None = None
    rate: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        values = asdict(self)
        return {**values.pop("run"), **values}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "RunRecord":
        """Return the record that `to_json` was of. Raises KeyError and TypeError where it is none."""
        rest = dict(values)
        run = Run(*(rest.pop(name) for name in ("kind", "d", "lr", "seed")))
        return RunRecord(run, **rest)


@dataclass(frozen=True)
class Encoded:
    """The three splits as rows of tokens."""

    train: EncodedData
    validation: EncodedData
    test: EncodedData


def make_run(
    run: Run,
    options: IntrinsicOptions,
    task: Task,
    loaded: LoadedModel,
    data: Encoded,
    device: torch.device,
    bf16: bool,
    progress: Progress | None = None,
) -> RunRecord:
    """Train and measure.

    Args:
        run: which one.
        options: of the measurement.
        task: of the model.
        loaded: a model that was loaded for this run, from its seed; it is changed.
        data: encoded.
        device: to compute on.
        bf16: autocast to bfloat16.
        progress: told of every step.
    """
    model: nn.Module = loaded.model.to(device)
    rate = _rate(run, count_parameters(model))
    if run.kind == "subspace":
        assert run.d is not None
        model = SubspaceModel(model, options.projection, run.d, run.seed)
    start = time.perf_counter()
    losses: list[float] = []
    if rate is not None:
        if run.kind == "full":
            model.requires_grad_(True)
        own = options.run(rate, run.seed)
        rows = training_set(task, data.train, model, loaded.tokenizer, seed=run.seed)
        world = World(0, 1, device)
        trainer = AdapterTrainer(model, own, rows, bf16=bf16, world=world, observers=Observers(progress))
        try:
            trainer.train()
        except NonFiniteError as error:
            seconds = time.perf_counter() - start
            return RunRecord(run, trainer.curve.done, seconds, None, None, None, str(error), rate)
        losses = [step.loss for step in trainer.curve.steps]
    seconds = time.perf_counter() - start

    def measured(part: EncodedData) -> dict[str, float]:
        batches = held_out_batches(task, part, loaded.tokenizer, options.batch_size, seed=run.seed)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return task.measure(model, batches, device)

    validation, test = measured(data.validation), measured(data.test)
    tail = losses[-max(1, len(losses) // 10) :]
    loss = math.fsum(tail) / len(tail) if tail else None
    # A loss that is no number is no JSON; the scores beside it are those of a guess.
    if not all(map(math.isfinite, (*validation.values(), *test.values()))):
        why = "the held-out loss is not finite"
        return RunRecord(run, len(losses), seconds, loss, None, None, why, rate)
    return RunRecord(run, len(losses), seconds, loss, validation, test, None, rate)


def _rate(run: Run, parameters: int) -> float | None:
    """Return the optimizer's learning rate.

    P has columns of length one: where d numbers move by r, a parameter moves by about ``r sqrt(d / D)``.
    """
    if run.d is None or run.lr is None:
        return run.lr
    return run.lr * math.sqrt(parameters / run.d)


def count_parameters(model: nn.Module) -> int:
    """Return D; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
