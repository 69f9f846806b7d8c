"""The training loop on a tiny model: what a step is, when it evaluates, stops and saves, whom it tells."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_fixtures import byte_tokenizer, tiny_llama, upper_pairs

from loracle.files import LoraConfig
from loracle.reference import NonFiniteError, gamma, unit_roundoff
from loracle.torch_impl import FinetuneOptions, inject, trainer
from loracle.torch_impl.checkpoints import Checkpoints
from loracle.torch_impl.data import Completion
from loracle.torch_impl.distributed import World
from loracle.torch_impl.encoding import encode_all
from loracle.torch_impl.optimizer import trained_parameters
from loracle.torch_impl.tasks import CAUSAL_LM
from loracle.torch_impl.trainer import AdapterTrainer, Measure, Observers
from loracle.torch_impl.training_set import training_set

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other; what is drawn is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def trainer_of(
    folder: Path,
    *,
    measure: Measure | None = None,
    observers: Observers | None = None,
    state: Any = None,
    **options: Any,
) -> AdapterTrainer:
    """A trainer of eight examples in batches of two, without checkpoints."""
    model = tiny_llama()
    inject(model, LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
    examples = [Completion(1, None, pair["prompt"], pair["completion"]) for pair in upper_pairs(8)]
    settings = {"model": "m", "data": "d", "out": folder / "out", "save_steps": 0, "batch_size": 2}
    checkpoints = Checkpoints(folder / "out")
    checkpoints.folder.mkdir(exist_ok=True)
    tokenizer = byte_tokenizer()
    data = training_set(CAUSAL_LM, encode_all(tokenizer, examples, 100), model, tokenizer, seed=0)
    return AdapterTrainer(
        model,
        FinetuneOptions(**{**settings, "eval_data": "e" if measure else None, **options}),
        data,
        bf16=False,
        world=ALONE,
        checkpoints=checkpoints,
        measure=measure,
        observers=observers,
        state=state,
    )


def gradients(run: AdapterTrainer) -> dict[str, np.ndarray]:
    """The gradients of the run's first step, before they are clipped."""
    found: dict[str, np.ndarray] = {}
    step = run.optimizer.step

    def keep(factor: float) -> None:
        for name, parameter in trained_parameters(run.model).items():
            assert parameter.grad is not None
            found.setdefault(name, parameter.grad.numpy().copy())
        step(factor)

    run.optimizer.step = keep  # type: ignore[method-assign]
    run.train()
    return found


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # eighths of the learning rate in eight steps: a rise from zero, then the fall to zero
        ("linear", 0.5, [0, 2, 4, 6, 8, 6, 4, 2]),
        ("linear", 0.0, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("constant", 0.5, [0, 2, 4, 6, 8, 8, 8, 8]),
        ("cosine", 0.0, [8, None, None, None, 4, None, None, None]),
    ],
)
def test_the_learning_rate_rises_and_falls(
    tmp_path: Path, schedule: Any, warmup: float, expected: list[int | None]
) -> None:
    run = trainer_of(tmp_path, lr=0.125, epochs=2, schedule=schedule, warmup=warmup)
    run.train()
    assert [step.epoch for step in run.curve.steps] == [number / 4 for number in range(1, 9)]
    for step, eighths in zip(run.curve.steps, expected, strict=True):
        if eighths is not None:
            assert round(step.learning_rate * 64, 9) == eighths


def test_a_step_with_a_rate_of_zero_moves_nothing(tmp_path: Path) -> None:
    run = trainer_of(tmp_path, max_steps=1, warmup=0.5)
    before = {name: value.detach().clone() for name, value in trained_parameters(run.model).items()}
    run.train()
    for name, value in trained_parameters(run.model).items():
        assert torch.equal(value, before[name])


def test_accumulated_passes_are_one_batch(tmp_path: Path) -> None:
    """Unequal numbers of labels a pass: a mean of means would be far outside the roundings of the sums."""
    whole = gradients(trainer_of(tmp_path, max_steps=1, batch_size=8, max_grad_norm=0.0))
    parts = trainer_of(tmp_path, max_steps=1, batch_size=2, gradient_accumulation=4, max_grad_norm=0.0)
    counts: list[int] = []
    divisors: list[int] = []
    loss = parts._data.loss

    def counted(model: nn.Module, inputs: Any, items: Any) -> Any:
        counts.append(int((inputs["labels"][:, 1:] != -100).sum()))
        divisors.append(items)
        return loss(model, inputs, items)

    object.__setattr__(parts._data, "loss", counted)
    pieces = gradients(parts)
    # After two passes of a row each, for nothing.
    assert len(counts) == 6
    assert len(set(counts[2:])) > 1
    assert divisors[2:] == [sum(counts[2:])] * 4
    for name, gradient in whole.items():
        # Sums over tokens and along two layers, some 1000 roundings, of terms as large as the largest.
        allowed = gamma(1000, unit_roundoff("float32")) * max(float(np.abs(gradient).max()), 1e-3)
        assert np.abs(gradient - pieces[name]).max() <= allowed


@pytest.mark.parametrize("limit", [1.0, 0.5, 0.0])
def test_gradients_are_clipped_and_their_norm_is_told(tmp_path: Path, limit: float) -> None:
    run = trainer_of(tmp_path, max_steps=1, max_grad_norm=limit)
    found = gradients(run)
    norm = math.sqrt(sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in found.values()))
    told = run.curve.steps[0].grad_norm
    assert told > 1.5
    assert abs(norm - (limit or told)) < 1e-4 * told


def test_the_optimizer_has_the_options_numbers(tmp_path: Path) -> None:
    run = trainer_of(
        tmp_path, lr=0.5, loraplus_ratio=4.0, weight_decay=0.25, adam_beta1=0.5, adam_epsilon=0.1
    )
    assert isinstance(run.optimizer.adamw, torch.optim.AdamW)
    groups = run.optimizer.adamw.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.25), (2.0, 0.25)]
    assert all((group["betas"], group["eps"]) == ((0.5, 0.999), 0.1) for group in groups)
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in run.model.named_parameters() if "lora_" in name}


def falling(*losses: float) -> tuple[Measure, list[int]]:
    """A measure that answers with ``losses`` in turn, and counts how often it was asked."""
    asked: list[int] = []

    def measure(model: nn.Module) -> dict[str, Any]:
        asked.append(1)
        return {"loss": losses[len(asked) - 1], "accuracy": 0.5}

    return measure, asked


@pytest.mark.parametrize(
    ("eval_steps", "expected"), [(None, [0, 4, 6]), (1, [0, 1, 2, 3, 4, 5, 6]), (4, [0, 4, 6])]
)
def test_when_it_evaluates(tmp_path: Path, eval_steps: int | None, expected: list[int]) -> None:
    measure, _ = falling(*[1.0] * 9)
    run = trainer_of(tmp_path, measure=measure, max_steps=6, eval_steps=eval_steps)
    run.train()
    assert [one.step for one in run.curve.evaluations] == expected
    assert dict(run.curve.evaluations[-1].metrics) == {"accuracy": 0.5}
    assert run.kept == 6


def test_it_stops_when_the_loss_has_not_fallen_and_keeps_the_best(tmp_path: Path) -> None:
    measure, asked = falling(9.0, 5.0, 4.0, 4.5, 4.0, 1.0)
    run = trainer_of(tmp_path, measure=measure, max_steps=8, eval_steps=1, early_stopping_patience=2, lr=0.1)
    at_best = trainer_of(tmp_path, max_steps=8, lr=0.1)
    at_best.steps = 8
    for _ in range(2):
        at_best.curve.steps.append(at_best._step())
    run.train()
    assert run.curve.done == 4
    assert len(asked) == 5
    assert run.kept == 2
    kept, last = run.adapter().pairs, trainer.adapter_of(run.model).pairs
    for path, pair in trainer.adapter_of(at_best.model).pairs.items():
        assert np.allclose(kept[path].A, pair.A, rtol=1e-4, atol=1e-6)
        assert not np.allclose(last[path].A, pair.A, rtol=1e-4, atol=1e-6)


def test_without_patience_it_goes_on_and_keeps_the_last(tmp_path: Path) -> None:
    measure, _ = falling(9.0, *range(1, 9))
    run = trainer_of(tmp_path, measure=measure, max_steps=8, eval_steps=1)
    run.train()
    assert (run.curve.done, run.kept) == (8, 8)
    last = trainer.adapter_of(run.model).pairs
    for path, pair in run.adapter().pairs.items():
        assert np.array_equal(pair.B, last[path].B)


def test_checkpoints_come_in_time_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", lambda _, state: saved.append(state.curve.done))
    trainer_of(tmp_path, max_steps=5, save_steps=2).train()
    assert saved == [2, 4, 5]
    trainer_of(tmp_path, max_steps=5, save_steps=0).train()
    assert saved == [2, 4, 5]


def test_observers_are_told_in_order(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    class Log:
        def step(self, step: Any) -> None:
            told.append(("step", step.step))

        def evaluation(self, evaluation: Any) -> None:
            told.append(("evaluation", evaluation.step))

    def progress(done: int, steps: int, loss: float | None) -> None:
        assert steps == 2
        assert (loss is None) == (done == 0)
        told.append(("progress", done))

    measure, _ = falling(3.0, 2.0, 1.0)
    log: Any = Log()
    trainer_of(
        tmp_path, measure=measure, max_steps=2, eval_steps=1, observers=Observers(progress, log)
    ).train()
    assert told == [
        ("evaluation", 0),
        ("progress", 0),
        *(("step", 1), ("progress", 1), ("evaluation", 1)),
        *(("step", 2), ("progress", 2), ("evaluation", 2)),
    ]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_stops_before_it_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = trainer_of(tmp_path, max_steps=3)
    if name == "loss":
        loss = run._data.loss
        object.__setattr__(run._data, "loss", lambda *arguments: loss(*arguments) * math.nan)
    else:
        monkeypatch.setattr(trainer, "clip", lambda *_: math.inf)
    before = {name: value.detach().clone() for name, value in trained_parameters(run.model).items()}
    with pytest.raises(NonFiniteError, match=f"^{name}: .* at step 1; lower the learning rate$"):
        run.train()
    for key, value in trained_parameters(run.model).items():
        assert torch.equal(value, before[key])
    assert run.curve.done == 0


def test_each_pass_has_a_seed_of_its_own_that_others_do_not_move(tmp_path: Path) -> None:
    drawn: list[float] = []

    def record(run: AdapterTrainer) -> None:
        loss = run._data.loss

        def drawing(*arguments: Any) -> Any:
            drawn.append(float(torch.rand(())))
            return loss(*arguments)

        object.__setattr__(run._data, "loss", drawing)
        run.train()

    record(trainer_of(tmp_path, max_steps=3, gradient_accumulation=2, batch_size=1))
    first, drawn[:] = drawn[2:], []
    torch.rand(7)
    record(trainer_of(tmp_path, max_steps=3, gradient_accumulation=2, batch_size=1))
    assert first == drawn[2:]
    assert len(set(first)) == 6
    drawn.clear()
    record(trainer_of(tmp_path, max_steps=3, gradient_accumulation=2, batch_size=1, seed=1))
    assert not set(first) & set(drawn)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    """With dropout: the activations that are computed again are of the same masks."""
    plain = gradients(trainer_of(tmp_path, max_steps=1, dropout=0.5))
    run = trainer_of(tmp_path, max_steps=1, dropout=0.5, gradient_checkpointing=True)
    calls: list[int] = []
    run.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,operator,index]
    again = gradients(run)
    assert len(calls) == 2 + 2
    for name, gradient in plain.items():
        assert np.array_equal(gradient, again[name])


def test_a_model_that_trains_keeps_no_cache(tmp_path: Path) -> None:
    assert trainer_of(tmp_path).model.config.use_cache is False  # type: ignore[union-attr]


def rows_of(run: AdapterTrainer, steps: Sequence[int], epoch: int = 0) -> list[Any]:
    return [draw for step in steps for draws in run._draws(epoch, step) for draw in draws]


def test_an_epoch_draws_every_row_once_and_a_step_the_same_rows_however_divided(tmp_path: Path) -> None:
    divided = [
        trainer_of(tmp_path, batch_size=6),
        trainer_of(tmp_path, batch_size=3, gradient_accumulation=2),
        trainer_of(tmp_path, batch_size=2, gradient_accumulation=3),
    ]
    for run in divided:
        assert run.steps_per_epoch == 2
        assert sorted(rows_of(run, range(2))) == list(range(8))
        assert rows_of(run, [0]) == rows_of(divided[0], [0])
    single = trainer_of(tmp_path, batch_size=1)
    assert rows_of(single, range(8)) != rows_of(single, range(8), epoch=1)
    assert [len(draws) for draws in divided[1]._draws(0, 0)] == [3, 3]
    assert [len(draws) for draws in divided[1]._draws(0, 1)] == [2]
