"""The TensorBoard log, with a stand-in for its writer; without TensorBoard it is refused by name."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusal import refused

from loracle.reference import ConfigError
from loracle.torch_impl.curve import Evaluation, Step
from loracle.torch_impl.event_log import EventLog, check_tensorboard


class Writer:
    """What is used of ``SummaryWriter``."""

    made: list["Writer"] = []  # noqa: RUF012

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self.log_dir, self.purge_step, self.closed = log_dir, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    Writer.made = []
    module: Any = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer


def test_steps_and_evaluations_arrive_under_their_names(writer: type[Writer], tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", 0)
    log.step(Step(3, 0.5, 2.0, 0.1, 7.0))
    log.evaluation(Evaluation(3, 1.5, {"accuracy": 0.25, "per_class": [1.0]}))
    log.close()
    (made,) = writer.made
    assert (made.log_dir, made.purge_step, made.closed) == (str(tmp_path / "log"), None, True)
    assert made.scalars == [
        ("train/loss", 2.0, 3),
        ("train/learning_rate", 0.1, 3),
        ("train/grad_norm", 7.0, 3),
        ("train/epoch", 0.5, 3),
        ("eval/loss", 1.5, 3),
        ("eval/accuracy", 0.25, 3),
    ]


def test_a_resumed_run_drops_what_it_does_again(writer: type[Writer], tmp_path: Path) -> None:
    EventLog(tmp_path, 4)
    assert writer.made[0].purge_step == 5


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(
        check_tensorboard,
        ConfigError,
        "tensorboard: expected the package tensorboard, got none; pip install tensorboard, or leave the "
        "option out",
    )
