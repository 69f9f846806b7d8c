"""AdamW, LoRA+, clipping and k training steps: the reference and PyTorch, step by step.

Exact tier: every operation is exact, and torch's plain, foreach and fused steps give the reference's bits.
Derived tier: each step of torch's own trajectory stays within the bound around the exact step from the state
before it.
"""

from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from exact_linear import error
from exact_optimizer import exact_clip, exact_step
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_loraplus_optimizer
from strategies import exact_problems

from loracle.reference import (
    AdamWOptions,
    AdamWState,
    Precision,
    adamw_start,
    adamw_step,
    adamw_step_bound,
    clip_bound,
    clip_by_global_norm,
    gamma,
    linear_backward,
    linear_backward_bound,
    linear_forward,
    linear_forward_bound,
    loraplus_rates,
    squared_error_gradient,
    train_linear,
    training_start,
    unit_roundoff,
)

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BY_DTYPE = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
KINDS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def tensor(array):
    return torch.from_numpy(np.array(array))


def adamw(parameters, options, kind, **groups):
    return torch.optim.AdamW(
        parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        **KINDS[kind],
        **groups,
    )


def torch_step(p, g, state, options, kind):
    """One step of torch's from the state given."""
    parameter = torch.nn.Parameter(tensor(p))
    parameter.grad = tensor(g)
    optimizer = adamw([parameter], options, kind)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(state.step)),
        "exp_avg": tensor(state.m),
        "exp_avg_sq": tensor(state.v),
    }
    optimizer.step()
    return parameter.detach().numpy(), state_of(optimizer, parameter)


def state_of(optimizer, parameter):
    state = optimizer.state[parameter]
    if not state:
        return adamw_start(parameter.detach().numpy())
    m, v = (state[name].numpy().copy() for name in ("exp_avg", "exp_avg_sq"))
    return AdamWState(int(state["step"]), m, v)


def same(left, right):
    """Equal numbers and dtypes of a parameter and its state."""
    (p, state), (q, other) = left, right
    assert state.step == other.step
    for a, b in ((p, q), (state.m, other.m), (state.v, other.v)):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def within(computed, p, g, state, options):
    """Check a step against the exact one."""
    moved, after = computed
    exact = exact_step(p, g, state, options)
    bound = adamw_step_bound(p, g, state, options, p.dtype)
    bounds = (bound.parameter, bound.m, bound.v)
    for value, expected, allowed in zip((moved, after.m, after.v), exact, bounds, strict=True):
        assert (error(value, expected) <= allowed).all()


PERFECT = [(0, 0), (1, 5), (2, 4), (4, 0), (3, 45), (6, 36), (9, 21), (12, 0)]


@BY_KIND
@BY_DTYPE
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 40), decay=st.sampled_from([0.0, 0.5]))
def test_exact_tier_a_step_agrees_bit_for_bit(dtype, kind, seed, width, decay):
    """3 v / 4 + g^2 / 4 is a square, its root over that of 1/4 plus 4 a power of two."""
    rng = np.random.default_rng(seed)
    chosen = np.array(PERFECT)[rng.integers(0, len(PERFECT), width)]
    g = chosen[:, 0] * rng.choice([-1, 1], width)
    m, p = g + 2 * rng.integers(-9, 10, width), rng.integers(-99, 100, width)
    p, g, m, v = (a.astype(dtype) for a in (p, g, m, chosen[:, 1]))
    state, options = AdamWState(0, m, v), AdamWOptions(0.5, (0.5, 0.75), 4.0, decay)
    same(torch_step(p, g, state, options, kind), adamw_step(p, g, state, options))


@BY_KIND
@BY_DTYPE
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_exact_tier_three_steps_agree_bit_for_bit(dtype, kind, seed):
    """b = (1/2, 0): rates lr / (1 - 2^-t) are 21/32, 7/16, 3/8, and |g| + 1 is a power of two."""
    rng = np.random.default_rng(seed)
    options = AdamWOptions(21 / 64, (0.5, 0.0), 1.0, 0.0)
    p = rng.integers(-9, 10, 7).astype(dtype)
    parameter = torch.nn.Parameter(tensor(p))
    optimizer, state = adamw([parameter], options, kind), adamw_start(p)
    for _ in range(3):
        g = rng.choice([-7.0, -3.0, -1.0, 0.0, 1.0, 3.0, 7.0], 7).astype(dtype)
        p, state = adamw_step(p, g, state, options)
        parameter.grad = tensor(g)
        optimizer.step()
        same((parameter.detach().numpy(), state_of(optimizer, parameter)), (p, state))


@BY_KIND
@BY_DTYPE
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    betas=st.sampled_from([(0.9, 0.999), (0.3, 0.5), (0.0, 0.95)]),
    size=st.sampled_from([1.0, 1e-4, 30.0]),
)
def test_derived_tier_five_steps_stay_within_the_bound_of_each(dtype, kind, seed, betas, size):
    rng = np.random.default_rng(seed)
    options = AdamWOptions(0.01, betas, 1e-8, 0.1)
    parameter = torch.nn.Parameter(tensor(rng.normal(0, size, 6).astype(dtype)))
    optimizer = adamw([parameter], options, kind)
    for k in range(5):
        before, state = parameter.detach().numpy().copy(), state_of(optimizer, parameter)
        assert state.step == k
        g = rng.normal(0, size, 6).astype(dtype)
        parameter.grad = tensor(g)
        optimizer.step()
        within((parameter.detach().numpy(), state_of(optimizer, parameter)), before, g, state, options)
        within(adamw_step(before, g, state, options), before, g, state, options)


@BY_KIND
def test_derived_tier_bfloat16_steps_stay_within_the_bound(kind):
    rng = np.random.default_rng(1)
    options = AdamWOptions(0.01, weight_decay=0.1)
    parameter = torch.nn.Parameter(torch.tensor(rng.normal(size=64), dtype=torch.bfloat16))
    optimizer = adamw([parameter], options, kind)

    def numbers(value):
        return value.detach().float().numpy().astype(ml_dtypes.bfloat16)

    def state_now():
        if not optimizer.state[parameter]:
            return adamw_start(numbers(parameter))
        state = optimizer.state[parameter]
        return AdamWState(int(state["step"]), numbers(state["exp_avg"]), numbers(state["exp_avg_sq"]))

    for _ in range(5):
        before, state = numbers(parameter), state_now()
        parameter.grad = torch.tensor(rng.normal(size=64), dtype=torch.bfloat16)
        optimizer.step()
        within((numbers(parameter), state_now()), before, numbers(parameter.grad), state, options)


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


def toy(dtype, **config):
    torch.manual_seed(0)
    config = {"target_modules": ["linear"], "r": 2, "init_lora_weights": False} | config
    return peft.get_peft_model(Toy(), peft.LoraConfig(**config)).to(dtype)


def rates_in(optimizer, model):
    """Return learning rate and weight decay of each trainable parameter, by name."""
    names = {
        parameter: name.removeprefix("base_model.model.") for name, parameter in model.named_parameters()
    }
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("more", [{}, {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 0.5}], ids=str)
def test_peft_groups_parameters_as_the_rates_say(more):
    model = toy(torch.float32, target_modules=["linear", "embedding"])
    biased = toy(torch.float32, lora_bias=True)
    doubled = toy(torch.float32, use_dora=True)
    rates = loraplus_rates(2e-4, 16.0, *([0.5] if more else []))
    decay = more.get("loraplus_weight_decay", 0.0)
    found = {}
    for each in (model, biased, doubled):
        kwargs = {"lr": 2e-4, "loraplus_lr_ratio": 16.0} | more
        optimizer = create_loraplus_optimizer(each, torch.optim.AdamW, **kwargs)
        found |= rates_in(optimizer, each)
    assert found == {
        "linear.lora_A.default.weight": (rates.A, decay),
        "linear.lora_B.default.weight": (rates.B, decay),
        "linear.lora_B.default.bias": (rates.B, 0.0),
        "linear.lora_magnitude_vector.default.weight": (rates.B, decay),
        "embedding.lora_embedding_A.default": (rates.embedding, decay),
        "embedding.lora_embedding_B.default": (rates.embedding, decay),
    }


@BY_DTYPE
@pytest.mark.parametrize("scheme", ["loraplus", "plain"])
def test_derived_tier_peft_trains_as_the_reference_does(dtype, scheme):
    """Five steps; each gradient and each step within its bound around the exact one from where torch was."""
    model = toy(torch.float32 if dtype == F32 else torch.float64, lora_alpha=3, use_rslora=True)
    layer = model.base_model.model.linear
    scaling = layer.scaling["default"]
    options = AdamWOptions(0.01, weight_decay=0.1)
    ratio = 8.0 if scheme == "loraplus" else 1.0
    rates = loraplus_rates(options.lr, ratio)
    if scheme == "loraplus":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=options.lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1
        )
    else:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=options.lr, weight_decay=0.1)
    matrices = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    W0, bias = (value.detach().numpy() for value in (layer.base_layer.weight, layer.base_layer.bias))
    rng = np.random.default_rng(2)
    for _ in range(5):
        x, target = rng.normal(size=(7, 6)).astype(dtype), rng.normal(size=(7, 5)).astype(dtype)
        before = {name: value.detach().numpy().copy() for name, value in matrices.items()}
        states = {name: state_of(optimizer, value) for name, value in matrices.items()}
        optimizer.zero_grad()
        y = layer(tensor(x))
        y.retain_grad()
        torch.nn.functional.mse_loss(y, tensor(target)).backward()
        optimizer.step()
        layer_tensors = (x, W0, before["A"], before["B"])
        wide = [array.astype(F64) for array in layer_tensors]
        allowed = sum(linear_forward_bound(*layer_tensors, scaling, kind, bias=bias) for kind in (dtype, F64))
        exact = linear_forward(*wide, scaling, bias=bias.astype(F64))
        assert (np.abs(y.detach().numpy() - exact) <= allowed).all()
        # A difference, a scalar and a product: three roundings, and as many in the other evaluation.
        dy = squared_error_gradient(y.detach().numpy(), target)
        assert (np.abs(dy - y.grad.numpy()) <= 2 * gamma(3, unit_roundoff(dtype)) * np.abs(dy)).all()
        gradients = linear_backward(y.grad.numpy().astype(F64), *wide, scaling)
        bounds = [
            linear_backward_bound(y.grad.numpy(), *layer_tensors, scaling, kind) for kind in (dtype, F64)
        ]
        for name, value in matrices.items():
            g = value.grad.numpy()
            allowed = sum(getattr(bound, f"d{name}") for bound in bounds)
            assert (np.abs(g - getattr(gradients, f"d{name}")) <= allowed).all()
            own = replace(options, lr=getattr(rates, name))
            after = (value.detach().numpy(), state_of(optimizer, value))
            within(after, before[name], g, states[name], own)
            if scheme == "loraplus" and name == "B":
                with pytest.raises(AssertionError):
                    within(after, before[name], g, states[name], options)


@BY_KIND
@BY_DTYPE
@settings(max_examples=15)
@given(data=st.data())
def test_exact_tier_k_training_steps_agree_bit_for_bit(dtype, kind, data):
    """b = (0, 0) and an eps that no |g| sees: each entry moves by lr, or not at all; all else is exact."""
    problem = data.draw(exact_problems(dtype))
    steps, ratio = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1.0, 4.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    options = AdamWOptions(0.25, (0.0, 0.0), 2.0**-60, 0.0)
    batches = rng.integers(-1, 2, (steps, *problem.x.shape)).astype(dtype)
    targets = rng.integers(-3, 4, (steps, *problem.dy.shape)).astype(dtype)
    A, B = np.sign(problem.A), np.zeros_like(problem.B)
    trained = train_linear(
        training_start(A, B),
        batches,
        lambda y, k: np.sign(y - targets[k]),
        problem.W0,
        problem.scaling,
        options,
        loraplus_ratio=ratio,
        bias=problem.bias,
    )
    lora_A, lora_B = (torch.nn.Parameter(tensor(value)) for value in (A, B))
    groups = [{"params": [lora_A]}, {"params": [lora_B], "lr": options.lr * ratio}]
    optimizer = adamw(groups, options, kind)
    W0, bias = tensor(problem.W0), tensor(problem.bias)
    for x, target in zip(batches, targets, strict=True):
        optimizer.zero_grad()
        y = tensor(x) @ W0.T + bias + problem.scaling * (tensor(x) @ lora_A.T @ lora_B.T)
        (y - tensor(target)).abs().sum().backward()
        optimizer.step()
    for name, parameter in (("A", lora_A), ("B", lora_B)):
        pair = getattr(trained, name), getattr(trained, f"state_{name}")
        same((parameter.detach().numpy(), state_of(optimizer, parameter)), pair)


@BY_DTYPE
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), most=st.sampled_from([0.1, 3.0, 100.0]), foreach=st.booleans())
def test_derived_tier_clipping_stays_within_the_bound(dtype, seed, most, foreach):
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=shape).astype(dtype) for shape in ((3, 4), (5,), (2, 2, 2))]
    parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=tensor(g).dtype)) for g in gradients]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(parameters, most, foreach=foreach)
    exact, exact_norm = exact_clip(gradients, most)
    bounds, norm_bound = clip_bound(gradients, most, dtype)
    clipped, own_norm = clip_by_global_norm(gradients, most)
    for value in (norm.item(), own_norm):
        assert abs(Fraction(value) - exact_norm) <= Fraction(norm_bound)
    for parameter, own, expected, bound in zip(parameters, clipped, exact, bounds, strict=True):
        assert (error(parameter.grad.numpy(), expected) <= bound).all()
        assert (error(own, expected) <= bound).all()


@BY_DTYPE
def test_exact_tier_clipping_agrees_bit_for_bit(dtype):
    """Norms 3, 4 and 12 make 13; nothing is clipped at 14, everything at 0."""
    gradients = [np.array([3.0], dtype), np.array([[4.0]], dtype), np.array([0.0, -12.0], dtype)]
    for most in (14.0, float("inf"), 0.0):
        parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=tensor(g).dtype)) for g in gradients]
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter.grad = tensor(g)
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        clipped, own_norm = clip_by_global_norm(gradients, most)
        assert norm.item() == own_norm == 13
        for parameter, own in zip(parameters, clipped, strict=True):
            assert own.dtype == dtype
            assert np.array_equal(parameter.grad.numpy(), own)


def test_float16_gradients_of_a_large_norm_are_clipped_as_torch_clips_them():
    """Their squares overflow float16, and both add them up in a wider format."""
    gradients = [np.full((4, 4), 1000.0, np.float16)]
    parameter = torch.nn.Parameter(torch.zeros((4, 4), dtype=torch.float16))
    parameter.grad = tensor(gradients[0])
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    exact, exact_norm = exact_clip(gradients, 1.0)
    bounds, norm_bound = clip_bound(gradients, 1.0, Precision(np.float16, accumulator=F32))
    clipped, own_norm = clip_by_global_norm(gradients, 1.0)
    for value in (norm.item(), own_norm):
        assert abs(Fraction(value) - exact_norm) <= Fraction(norm_bound)
    for value in (parameter.grad.numpy(), clipped[0]):
        assert (error(value, exact[0]) <= bounds[0]).all()
