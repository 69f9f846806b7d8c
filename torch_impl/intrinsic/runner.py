"""The runs of a measurement: made where they are not there yet, and kept as soon as they have ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loracle.files.run_folder import Kept, read_record, write_record

from ..loading import LoadedModel, load_model
from ..tasks import Task
from ..trainer import Progress
from .options import IntrinsicOptions
from .run import Encoded, Run, RunRecord, make_run
from .splits import Splits

KEPT = Kept("runs", r"run-[0-9a-f]{16}\.json", "measurement")
"""What is beside the output for as long as a measurement lasts."""


@dataclass(frozen=True)
class Prepared:
    """What all runs have in common.

    Attributes:
        task: of the model.
        splits: the data.
        data: as rows of tokens.
        dims: values of d, all of which suit the model.
        parameters: D.
        layers: the layers with a scale of their own.
        device: to compute on.
        bf16: whether products are bfloat16.
    """

    task: Task
    splits: Splits
    data: Encoded
    dims: tuple[int, ...]
    parameters: int
    layers: tuple[str, ...]
    device: torch.device
    bf16: bool


class Runner:
    """Makes runs, one after the other.

    Args:
        options: of the measurement.
        prepared: for it.
        folder: where records go.
        progress: told of the steps of all runs.
    """

    def __init__(
        self, options: IntrinsicOptions, prepared: Prepared, folder: Path, progress: Progress | None
    ) -> None:
        self._options = options
        self._prepared = prepared
        self._folder = folder
        self._progress = progress
        self._steps = options.steps(len(prepared.data.train.examples))
        rates = len(options.full_lr) + len(prepared.dims) * len(options.lr)
        self._total = len(options.seeds) * rates * self._steps
        self._done = 0

    def records(self, runs: Sequence[Run]) -> list[RunRecord]:
        """Return the record of each run, in order.

        Raises:
            FileError: one cannot be written, or one that is there cannot be read.
        """
        return [self._record(run) for run in runs]

    def _record(self, run: Run) -> RunRecord:
        path = self._folder / f"run-{run.name}.json"
        if path.exists():
            record = read_record(path, "a run", RunRecord.from_json)
        else:
            own = self._prepared
            loaded = load(self._options, own.task, own.splits, run.seed)
            record = make_run(
                run, self._options, own.task, loaded, own.data, own.device, own.bf16, self._step
            )
            write_record(path, record.to_json())
        if run.lr is not None:
            self._done += self._steps
            self._step(0, 0, None)
        return record

    def _step(self, step: int, _: int, loss: float | None) -> None:
        if self._progress is not None:
            self._progress(self._done + step, self._total, loss)


def load(options: IntrinsicOptions, task: Task, splits: Splits, seed: int) -> LoadedModel:
    """Return the model as it came, float32, with the head that ``seed`` draws."""
    return load_model(options.model, bf16=False, task=task, labels=splits.labels, seed=seed)
