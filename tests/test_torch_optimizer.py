"""AdamW with LoRA+ over an injected model: who learns at which rate, each step beside the reference's."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from exact_linear import error
from exact_optimizer import exact_clip, exact_step
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch_fixtures import Chain, same_bits

from loracle.files import LoraConfig
from loracle.reference import (
    AdamWOptions,
    AdamWState,
    adamw_start,
    adamw_step_bound,
    clip_bound,
    loraplus_rates,
)
from loracle.torch_impl import inject
from loracle.torch_impl.arrays import array_of
from loracle.torch_impl.optimizer import (
    AdapterOptimizer,
    LoraPlus,
    clip,
    parameter_groups,
    trained_parameters,
)

OPTIONS = AdamWOptions(0.01, weight_decay=0.1)


def chain(dtype: torch.dtype = torch.float32) -> Chain:
    model = Chain(dtype)
    inject(
        model,
        LoraConfig(r=2, target_modules=("q_proj", "v_proj")),
        generator=torch.Generator().manual_seed(0),
    )
    return model


class Everything(nn.Module):
    """A module with each kind of parameter that may train; it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "lora_A": (2, 3),
            "lora_B": (4, 2),
            "lora_B_bias": (4,),
            "lora_magnitude_vector": (4,),
            "lora_embedding_A": (2, 5),
            "lora_embedding_B": (3, 2),
            "score": (3, 3),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def test_the_groups_are_the_references() -> None:
    groups = {name: set(group) for name, group in parameter_groups(Everything()).items()}
    assert groups == {
        "A": {"lora_A", "score"},
        "embedding": {"lora_embedding_A", "lora_embedding_B"},
        "B": {"lora_B", "lora_magnitude_vector"},
        "B_no_decay": {"lora_B_bias", "norm.weight", "norm.bias"},
    }


def test_rates_and_decay_are_those_that_peft_gives() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.linear = nn.Linear(6, 5)

    config = {"target_modules": ["linear", "embedding"], "r": 2}
    theirs = peft.get_peft_model(Toy(), peft.LoraConfig(**config))
    plus = {"lr": 2e-4, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 0.5}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **plus)
    ours = AdapterOptimizer(theirs, AdamWOptions(2e-4, weight_decay=0.1), LoraPlus(16.0, 0.5))
    assert _rates(ours.adamw, theirs) == _rates(optimizer, theirs)
    assert len(set(_rates(ours.adamw, theirs).values())) == 3


def _rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_without_loraplus_all_learn_at_one_rate() -> None:
    model = Everything()
    optimizer = AdapterOptimizer(model, OPTIONS)
    rates = _rates(optimizer.adamw, model)
    assert {rate for rate, _ in rates.values()} == {0.01}
    assert {name for name, (_, decay) in rates.items() if decay == 0.0} == {
        "lora_B_bias",
        "norm.weight",
        "norm.bias",
    }
    assert len(rates) == len(trained_parameters(model)) == 9


def _state(optimizer: AdapterOptimizer, parameter: nn.Parameter) -> AdamWState:
    state = optimizer.adamw.state[parameter]
    if not state:
        return adamw_start(parameter.detach().numpy())
    m, v = (state[name].numpy().copy() for name in ("exp_avg", "exp_avg_sq"))
    return AdamWState(int(state["step"]), m, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    ratio=st.sampled_from([None, 0.5, 4.0, 16.0]),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_every_step_is_the_references(
    dtype: torch.dtype, seed: int, ratio: float | None, decay: float
) -> None:
    """Five steps of a model's optimizer, each within its bound around the exact step from where it was."""
    model = chain(dtype)
    options = AdamWOptions(0.01, (0.9, 0.99), 1e-8, decay)
    optimizer = AdapterOptimizer(model, options, None if ratio is None else LoraPlus(ratio))
    rates = loraplus_rates(options.lr, ratio or 1.0)
    rng = np.random.default_rng(seed)
    trained = trained_parameters(model)
    assert len(trained) == 4
    for step in range(5):
        factor = (step + 1) / 4
        before = {name: parameter.detach().numpy().copy() for name, parameter in trained.items()}
        states = {name: _state(optimizer, parameter) for name, parameter in trained.items()}
        gradients = {name: rng.normal(size=value.shape).astype(value.dtype) for name, value in before.items()}
        for name, parameter in trained.items():
            parameter.grad = torch.from_numpy(gradients[name])
        optimizer.step(factor)
        for name, parameter in trained.items():
            rate = rates.A if "lora_A" in name else rates.B
            other = rates.B if "lora_A" in name else rates.A
            problem = (before[name], gradients[name], states[name])
            after = parameter.detach().numpy(), _state(optimizer, parameter)
            own = replace(options, lr=rate * factor)
            assert _inside(after, *problem, own)
            # The groups exchanged are far outside.
            assert rate == other or not _inside(after, *problem, replace(options, lr=other * factor))
            assert parameter.grad is None


def _inside(
    after: tuple[np.ndarray, AdamWState],
    p: np.ndarray,
    g: np.ndarray,
    state: AdamWState,
    options: AdamWOptions,
) -> bool:
    moved, moments = after
    bound = adamw_step_bound(p, g, state, options, p.dtype)
    return all(
        (error(value, exact) <= allowed).all()
        for value, exact, allowed in zip(
            (moved, moments.m, moments.v),
            exact_step(p, g, state, options),
            (bound.parameter, bound.m, bound.v),
            strict=True,
        )
    )


def test_a_state_that_is_put_back_goes_on_alike() -> None:
    def gradients(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in trained_parameters(model).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    one, two = chain(), chain()
    first = AdapterOptimizer(one, OPTIONS, LoraPlus(4.0))
    assert first.state() == {}
    for seed in range(3):
        gradients(one, seed)
        first.step(1.0)
    second = AdapterOptimizer(two, OPTIONS, LoraPlus(4.0))
    state = first.state()
    assert len(state) == 3 * 4
    second.load_state(state)
    for name, parameter in trained_parameters(two).items():
        parameter.data.copy_(trained_parameters(one)[name])
    for model, optimizer in ((one, first), (two, second)):
        gradients(model, 9)
        optimizer.step(0.5)
    for name, parameter in trained_parameters(one).items():
        assert same_bits(parameter, trained_parameters(two)[name])
    for name, value in first.state().items():
        assert same_bits(value, second.state()[name])
    # Copies: the state that was taken has not moved.
    assert float(state[next(name for name in state if name.endswith("/step"))]) == 3.0


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1.0, 1e6])
def test_clipping_is_the_references(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = [array_of(_gradient(parameter)).copy() for parameter in parameters[:2]]
    norm = clip(parameters, limit)
    effective = limit or 1e30  # no clipping
    bounds, allowed = clip_bound(gradients, effective, np.float32)
    exact, exact_norm = exact_clip(gradients, effective)
    assert abs(norm - float(exact_norm)) <= allowed
    for parameter, expected, bound in zip(parameters[:2], exact, bounds, strict=True):
        assert (error(_gradient(parameter).numpy(), expected) <= bound).all()
    assert parameters[2].grad is None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
