"""What the options mean to transformers' Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch_fixtures import byte_tokenizer, tiny_llama, upper_pairs

from loracle.files import LoraConfig
from loracle.torch_impl import FinetuneOptions, inject
from loracle.torch_impl.checkpoints import Checkpoints
from loracle.torch_impl.data import Completion
from loracle.torch_impl.encoding import encode_all
from loracle.torch_impl.trainer import AdapterTrainer

Schedule = Literal["linear", "cosine"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer_of(folder: Path, **options: Any) -> AdapterTrainer:
    """A trainer of eight examples in batches of two, without checkpoints."""
    model = tiny_llama()
    inject(model, LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
    examples = [Completion(1, None, pair["prompt"], pair["completion"]) for pair in upper_pairs(8)]
    settings = {"model": "m", "data": "d", "out": folder / "out", "save_steps": 0, "batch_size": 2, **options}
    return AdapterTrainer(
        model,
        FinetuneOptions(**settings),
        bf16=False,
        examples=encode_all(byte_tokenizer(), examples, 100).examples,
        checkpoints=Checkpoints(folder / "out"),
    )


def logged(trainer: AdapterTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # eighths of the learning rate in eight steps: a rise from zero, then the fall to zero
        ("linear", 0.5, [0, 2, 4, 6, 8, 6, 4, 2]),
        ("linear", 0.0, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("cosine", 0.0, [8, None, None, None, 4, None, None, None]),
    ],
)
def test_the_learning_rate_rises_and_falls(
    tmp_path: Path, schedule: Schedule, warmup: float, expected: list[int | None]
) -> None:
    trainer = trainer_of(tmp_path, lr=0.125, epochs=2, schedule=schedule, warmup=warmup)
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert len(rates) == 8
    for rate, eighths in zip(rates, expected, strict=True):
        if eighths is not None:
            assert round(rate * 64, 9) == eighths


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    trainer = trainer_of(tmp_path, max_steps=1)
    clip = trainer.accelerator.clip_grad_norm_

    def record(parameters: Any, max_norm: float) -> Any:
        limits.append(max_norm)
        return clip(parameters, max_norm)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", record)
    trainer.train()
    assert limits == [1.0]


def test_weights_do_not_decay_and_the_seed_reaches_dropout(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, seed=7)
    assert trainer.args.seed == 7
    assert trainer.args.weight_decay == 0.0


def test_the_optimizer_has_the_adapters_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    optimizer = trainer.create_optimizer()
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for name, parameter in trainer.model.named_parameters() if ".lora_" in name]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in trained}
    assert isinstance(optimizer, torch.optim.AdamW)
