"""A run's numbers as a TensorBoard log, where TensorBoard is installed."""

from pathlib import Path
from typing import Any

from loracle.reference import ConfigError

from .curve import Evaluation, Step


class EventLog:
    """Writes each step and each evaluation to a folder, as they come.

    Args:
        folder: of the log; made where it is not there.
        resumed: steps done before, which the log may have more than.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        writer = _writer_class()
        # Events of steps that a resumed run makes again are dropped.
        self._writer = writer(log_dir=str(folder), purge_step=resumed + 1 if resumed else None)

    def step(self, step: Step) -> None:
        """Write an optimizer step."""
        for name in ("loss", "learning_rate", "grad_norm", "epoch"):
            self._writer.add_scalar(f"train/{name}", getattr(step, name), step.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write an evaluation; of the metrics those that are single numbers."""
        for name, value in {"loss": evaluation.loss, **evaluation.metrics}.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"eval/{name}", value, evaluation.step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def check_tensorboard() -> None:
    """Refuse a log that could not be written, before anything slow is done.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    _writer_class()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard: expected the package tensorboard, got none; pip install tensorboard, or leave the "
            "option out"
        ) from error
    return SummaryWriter
