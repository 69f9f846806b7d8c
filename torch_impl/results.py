"""What a run gives back, and the files that it writes."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loracle.files import Adapter, write_adapter_files

from .curve import Curve, Evaluation
from .options import FinetuneOptions
from .plot import loss_plot


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        adapter: the folder written.
        task: what was learned.
        labels: the classes in the order of their numbers, where the task has some.
        steps: optimizer steps of the whole run, resumed ones included.
        best_step: the step whose adapter was written: that of the lowest held-out loss with early stopping,
            else the last.
        seconds: of training and evaluating in this call.
        losses: each step's loss, in nats a label.
        evaluations: on ``eval_data``, where it was given: step, loss and metrics of each.
        eval_before, eval_after: the first's loss, that of the model as it came, and the written adapter's.
        metrics: the written adapter's, by name.
        trainable, total: parameters.
        examples, tokens, learned: of one epoch; ``tokens`` counts no padding, ``learned`` those with a
            label.
        shortened, left_out: examples changed or dropped to respect ``max_length``.
        bf16: whether products were bfloat16.
        world_size: processes that trained together.
    """

    adapter: Path
    task: str
    labels: tuple[str, ...] | None
    steps: int
    best_step: int
    seconds: float
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    eval_before: float | None
    eval_after: float | None
    metrics: Mapping[str, Any]
    trainable: int
    total: int
    examples: int
    tokens: int
    learned: int
    shortened: int
    left_out: int
    bf16: bool
    world_size: int


def write_results(
    folder: Path, adapter: Adapter, options: FinetuneOptions, result: FinetuneResult, curve: Curve
) -> None:
    """Write a run's files into an existing folder; for use inside ``output_folder``.

    Raises:
        OSError: a file exists already or cannot be written.
    """
    write_adapter_files(folder, adapter)
    record = {
        "options": options.to_json(),
        "result": {name: value for name, value in asdict(result).items() if name != "adapter"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("loracle", "torch", "transformers", "numpy")},
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "loss.csv").write_text(curve.to_csv(), encoding="utf-8")
    loss_plot(
        result.losses,
        folder / "loss.png",
        held_out=[(one.step, one.loss) for one in result.evaluations],
        best=None if options.early_stopping_patience is None else result.best_step,
    )
