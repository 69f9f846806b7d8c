"""Training with a compiled body: the bits of eager execution, few compilations, none for an evaluation."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_torch_trainer import gradients, trainer_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from loracle.reference import ConfigError
from loracle.torch_impl import lora_layers, trainer
from loracle.torch_impl.compiled import compile_body
from loracle.torch_impl.trainer import AdapterTrainer, Measure


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """One thread, no compiled code of another test, and torch's generators as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]):
        yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Traces forward and backward and then runs torch's own kernels: the same bits; counts what it traces."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(trainer, "compile_body", partial(compile_body, backend=counter))
    return counter


def run_of(folder: Path, **options: Any) -> AdapterTrainer:
    """A run with plain attention, which tracing takes apart otherwise, and layers that share no input."""
    run = trainer_of(folder, max_steps=4, batch_size=1, **options)
    run.model.set_attn_implementation("eager")  # type: ignore[operator]
    for layer in lora_layers(run.model).values():
        layer.sharing = None  # type: ignore[assignment]
    return run


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 2}, {"gradient_checkpointing": True}])
def test_a_compiled_run_learns_the_same_bits(
    tmp_path: Path, counter: CompileCounterWithBackend, options: dict[str, Any]
) -> None:
    plain, compiled = run_of(tmp_path, **options), run_of(tmp_path, torch_compile=True, **options)
    first, again = gradients(plain), gradients(compiled)
    assert first.keys() == again.keys()
    for name, gradient in first.items():
        assert np.array_equal(gradient, again[name]), name
    assert [step.loss for step in plain.curve.steps] == [step.loss for step in compiled.curve.steps]
    assert len({step.loss for step in plain.curve.steps}) == 4
    # For the first length and for any other: the head and the loss, of as many tokens as are learned from,
    # are not in it. With checkpointing it is twice that, however deep the model is.
    assert 1 <= counter.frame_count <= (4 if options.get("gradient_checkpointing") else 2)


def test_an_evaluation_compiles_nothing(tmp_path: Path, counter: CompileCounterWithBackend) -> None:
    seen: list[int] = []

    def measure(model: nn.Module) -> dict[str, Any]:
        before = counter.frame_count
        with torch.no_grad():
            model(input_ids=torch.arange(3)[None])
        seen.append(counter.frame_count - before)
        return {"loss": 1.0}

    measured: Measure = measure
    run = run_of(tmp_path, torch_compile=True, measure=measured, eval_steps=2)
    run.train()
    assert seen == [0, 0, 0]
    assert counter.frame_count > 0


def test_a_model_that_cannot_be_compiled_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(trainer, "compile_body", partial(compile_body, backend=broken))
    with pytest.raises(
        ConfigError, match=r"^torch_compile: expected .*OSError: no compiler here; .*leave"
    ) as caught:
        run_of(tmp_path, torch_compile=True).train()
    assert "\n" not in str(caught.value)
