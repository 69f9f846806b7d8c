"""Linear layers with adapters in torch against the reference: exact on small integers, else within bounds.

Masks of dropout are drawn again from the seeds that the layers draw.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_problems import Draws, LinearProblem, draws, linear_problems
from torch import Tensor, nn
from torch_fixtures import same_bits
from torch_modes import (
    LAYER_MODES,
    MODES,
    Mode,
    arithmetic,
    assert_bounded,
    assert_equal,
    autocast,
    cases,
    exactly,
    finite,
    placed,
    wide,
)
from transformers.pytorch_utils import Conv1D

from loracle.files import LoraConfig
from loracle.reference import LowRank, adapter_start, lora_scaling, merge_adapters, round_fraction
from loracle.torch_impl import (
    LoraLinear,
    adapter_of,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.dropout import SeededDropout, drawn_dropout
from loracle.torch_impl.function import Member, Term, lora_products
from loracle.torch_impl.plain_config import plain_config

Results = dict[Any, Tensor]


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def base_of(p: LinearProblem, mode: Mode, device: str) -> nn.Module:
    """The problem's frozen layer; a Conv1D always has a bias."""
    outputs, inputs = p.dy.shape[-1], p.x.shape[-1]
    base: Any
    base = Conv1D(outputs, inputs) if p.fan_in_fan_out else nn.Linear(inputs, outputs, p.bias is not None)
    base.weight.data = placed(p.W0, mode.base, device)
    if base.bias is not None:
        bias = np.zeros(outputs) if p.bias is None else p.bias
        base.bias.data = placed(bias, mode.base, device)
    layer: nn.Module = base
    return layer


@dataclass(frozen=True)
class Options:
    """What a model is made with beside its problem."""

    p: float
    use_rslora: bool
    bias: str


@dataclass(frozen=True)
class Run:
    """The model, its results by the keys of `LinearProblem`, and the problem in the tensors' numbers."""

    layer: LoraLinear
    results: Results
    stored: LinearProblem


def alpha_of(scaling: float, r: int, use_rslora: bool) -> float:
    return scaling * r / (lora_scaling(r, r, True) if use_rslora else 1)


def run_model(p: LinearProblem, mode: Mode, device: str, options: Options, seed: int = 3) -> Run:
    """Inject the problem's adapters, all of them active, and take the gradients of everything that trains."""
    model = One(base_of(p, mode, device))
    names = [f"adapter{number}" for number in range(len(p.adapters))]
    for number, (name, own) in enumerate(zip(names, p.adapters, strict=True)):
        r = len(own.A)
        config = LoraConfig(
            r=r,
            lora_alpha=alpha_of(own.scaling, r, options.use_rslora),
            use_rslora=options.use_rslora,
            lora_dropout=0.0 if own.dropout is None else options.p,
            lora_bias=own.bias is not None,
            # Only one of the active adapters can train the base's bias.
            bias=options.bias if number == 0 else "none",
            target_modules=("layer",),
        )
        assert inject(model, config, name) == ("layer",)
    layer = lora_layers(model)["layer"]
    assert isinstance(layer, LoraLinear)
    for name, own in zip(names, p.adapters, strict=True):
        update = layer.update(name)
        update.lora_A.data = placed(own.A, mode.adapter, device)
        update.lora_B.data = placed(own.B, mode.adapter, device)
        if update.lora_bias is not None:
            assert update.lora_bias.dtype is update.lora_B.dtype
            update.lora_bias.data = placed(own.bias, mode.adapter, device)
    set_adapter(model, names)
    assert layer.active == tuple(names)
    model.train()
    x = placed(p.x, mode.base, device).requires_grad_()
    dy = placed(p.dy, mode.computes, device)
    with arithmetic(device, mode):
        torch.manual_seed(seed)
        with autocast(device, mode):
            y = model(x)
        y.backward(dy)
    assert array_of(y.detach()).dtype == mode.computes
    torch.manual_seed(seed)
    adapters = []
    results: Results = {"y": y.detach(), "x": gradient(x)}
    for number, name in enumerate(names):
        update = layer.update(name)
        mask = None
        if update.options.dropout:
            drawn = drawn_dropout(update.options.dropout)
            ones = drawn.mask(dy, torch.Size([x[..., 0].numel(), x.shape[-1]])).reshape(x.shape)
            mask = ones.double() * drawn.factor
        adapters.append(low_rank(update.lora_A, update.lora_B, update.scaling, update.lora_bias, mask))
        for key in ("A", "B", "bias"):
            parameter = getattr(update, f"lora_{key}")
            if parameter is not None:
                results[number, key] = gradient(parameter)
    if layer.bias is not None and options.bias != "none":
        results["bias"] = gradient(layer.bias)
    else:
        assert layer.bias is None or not layer.bias.requires_grad
    assert layer.weight.grad is None
    stored = LinearProblem(
        exactly(dy),
        exactly(layer.weight),
        tuple(adapters),
        exactly(x),
        None if layer.bias is None else exactly(layer.bias),
        p.fan_in_fan_out,
    )
    return Run(layer, results, stored)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    assert tensor.grad.dtype is tensor.dtype
    assert tensor.grad.shape == tensor.shape
    return tensor.grad


def low_rank(A: Tensor, B: Tensor, scaling: float, bias: Any, mask: Any, rows: Any = None) -> LowRank:
    """The reference's adapter, in fractions."""
    return LowRank(
        exactly(A),
        exactly(B),
        scaling,
        bias=None if bias is None else exactly(bias),
        dropout=None if mask is None else exactly(mask),
        rows=rows,
    )


def assert_exact(results: Results, stored: LinearProblem) -> None:
    expected = {"y": stored.forward(), **stored.backward()}
    for key, got in results.items():
        assert_equal(got, expected[key], key)


def assert_within(results: Results, stored: LinearProblem, mode: Mode) -> None:
    assume(finite(*results.values()))
    expected = {"y": stored.forward(), **stored.backward()}
    floats = stored.map(lambda array: array.astype(np.float64))
    bounds = {"y": floats.forward_bound(mode.precision), **floats.backward_bound(mode.precision)}
    for key, got in results.items():
        assert_bounded(got, expected[key], bounds[key], mode, key)


def has_adapters(p: LinearProblem) -> bool:
    return bool(p.adapters)


BIASES = st.sampled_from(["none", "all", "lora_only"])


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=25)
@given(data=st.data(), bias=BIASES)
def test_small_integers_come_out_exactly(device: str, mode: Mode, data: st.DataObject, bias: str) -> None:
    p = data.draw(linear_problems(mode.computes, exact=True, rows=False).filter(has_adapters))
    # A root that is whole keeps rsLoRA's scaling a power of two.
    rslora = data.draw(st.booleans()) and all(len(own.A) in (1, 4) for own in p.adapters)
    own = run_model(p.astype(np.float64), mode, device, Options(0.5, rslora, bias))
    assert [a.scaling for a in own.stored.adapters] == [a.scaling for a in p.adapters]
    assert_exact(own.results, own.stored)


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=20)
@given(data=st.data(), bias=BIASES, rslora=st.booleans(), dropout=st.sampled_from([0.1, 0.5]))
def test_everything_else_stays_within_the_bounds(
    device: str, mode: Mode, data: st.DataObject, bias: str, rslora: bool, dropout: float
) -> None:
    p = data.draw(linear_problems(np.float64, rows=False, most=6).filter(has_adapters))
    own = run_model(p, mode, device, Options(dropout, rslora, bias))
    assert_within(own.results, own.stored, mode)


def two_adapters(fan_in_fan_out: bool = True) -> LinearProblem:
    rng = np.random.default_rng(8)
    adapters = tuple(
        LowRank(
            rng.normal(size=(r, 7)), rng.normal(size=(5, r)), scaling, rng.normal(size=5), np.ones((6, 7))
        )
        for r, scaling in ((3, 1 / 3), (9, 1.7))
    )
    dy, x, W0 = rng.normal(size=(6, 5)), rng.normal(size=(6, 7)), rng.normal(size=(7, 5))
    W0 = W0 if fan_in_fan_out else W0.T
    return LinearProblem(dy, W0, adapters, x, rng.normal(size=5), fan_in_fan_out)


@pytest.mark.parametrize("name", LAYER_MODES)
@pytest.mark.parametrize("wrong", ["scaling", "one less", "mask", "bias", "storage"])
def test_the_bounds_tell_a_wrong_layer(name: str, wrong: str) -> None:
    mode = MODES[name]
    own = run_model(two_adapters(), mode, "cpu", Options(0.25, True, "all"))
    assert_within(own.results, own.stored, mode)
    first, second = own.stored.adapters
    grown = Fraction(30)
    changed = {
        "scaling": own.stored.with_adapter(1, scaling=second.scaling * 1.5),
        "one less": replace(own.stored, adapters=(first, replace(second, B=second.B * 0))),
        "mask": own.stored.with_adapter(0, dropout=second.dropout),
        "bias": own.stored.with_adapter(0, bias=first.bias * grown),
        "storage": replace(own.stored, W0=own.stored.W0 * grown),
    }[wrong]
    with pytest.raises(AssertionError, match="above the bound"):
        assert_within(own.results, changed, mode)


def test_each_adapter_draws_a_mask_of_its_own_and_none_in_evaluation() -> None:
    own = run_model(two_adapters(), MODES["float32"], "cpu", Options(0.5, False, "none"))
    first, second = own.stored.adapters
    assert (first.dropout != second.dropout).any()
    layer = own.layer.eval()
    x = placed(two_adapters().x, np.float32, "cpu")
    state = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    kept = tuple(replace(a, dropout=None) for a in own.stored.adapters)
    assert_within({"y": y.detach()}, replace(own.stored, adapters=kept), MODES["float32"])


# Several layers of one input.


@dataclass(frozen=True)
class Shared:
    """A problem whose outputs belong to several layers, as slices of one fused projection."""

    problem: LinearProblem
    members: tuple[slice, ...]
    owners: tuple[int, ...]
    drops: tuple[SeededDropout | str | None, ...]


@st.composite
def shared_problems(draw: st.DrawFn, dtype: Any, *, exact: bool) -> Shared:
    d: Draws = draw(draws(dtype, exact, 6).filter(lambda d: d.ranks))
    cuts = sorted(int(d.rng.integers(0, d.outputs + 1)) for _ in range(draw(st.integers(0, 2))))
    ends = [0, *cuts, d.outputs]
    members = tuple(slice(a, b) for a, b in pairwise(ends) if b > a)
    adapters, owners, drops = [], [], []
    for r, scaling in zip(d.ranks, d.scalings, strict=True):
        owner = int(d.rng.integers(0, len(members)))
        own = members[owner]
        if d.rng.random() < 0.4:
            start, stop = sorted(map(int, d.rng.integers(own.start, own.stop + 1, 2)))
            own = slice(start, stop)
        width = own.stop - own.start
        drop = draw(st.sampled_from([None, "given", SeededDropout(0.5, 1), SeededDropout(0.5, 2)]))
        mask = d.rng.integers(0, 2, (d.batch, d.inputs)) * 2.0 if drop == "given" else None
        A, B, bias = d.numbers(r, d.inputs), d.numbers(width, r), d.some(width)
        adapters.append(LowRank(A, B, scaling, bias=bias, dropout=mask, rows=own))
        owners.append(owner)
        drops.append(drop)
    problem = LinearProblem(
        d.numbers(d.batch, d.outputs),
        d.numbers(d.outputs, d.inputs),
        tuple(adapters),
        d.numbers(d.batch, d.inputs),
        d.some(d.outputs),
    )
    return Shared(problem, members, tuple(owners), tuple(drops))


def run_shared(shared: Shared, mode: Mode, device: str, *, turned: bool) -> tuple[Results, LinearProblem]:
    """One `lora_products` for all members; the reference's problem is the fused projection."""
    p = shared.problem
    x = placed(p.x, mode.base, device).requires_grad_()
    W0 = placed(p.W0, mode.base, device)
    bias = None if p.bias is None else placed(p.bias, mode.base, device).requires_grad_()
    members = []
    for own in shared.members:
        weight = W0[own].t().contiguous().t() if turned else W0[own]
        members.append(Member(weight, None if bias is None else bias[own]))
    terms, adapters = [], []
    for owner, own, drop in zip(shared.owners, p.adapters, shared.drops, strict=True):
        assert own.rows is not None
        base = shared.members[owner].start
        A, B = (placed(matrix, mode.adapter, device).requires_grad_() for matrix in (own.A, own.B))
        lora_bias = None if own.bias is None else placed(own.bias, mode.adapter, device).requires_grad_()
        dropout: Any = drop
        mask = None
        if drop == "given":
            dropout = mask = placed(own.dropout, mode.base, device)
        elif isinstance(drop, SeededDropout):
            like = placed(np.zeros(0), mode.computes, device)
            mask = drop.mask(like, x.shape).double() * drop.factor
        rows = (own.rows.start - base, own.rows.stop - base)
        terms.append(Term(owner, A, B, own.scaling, lora_bias, rows, dropout))
        adapters.append(low_rank(A, B, own.scaling, lora_bias, mask, own.rows))
    dy = placed(p.dy, mode.computes, device)
    with arithmetic(device, mode):
        with autocast(device, mode):
            ys = lora_products(x, members, terms)
        torch.autograd.backward(ys, [dy[:, own] for own in shared.members])
    results: Results = {"y": torch.cat([y.detach() for y in ys], dim=1), "x": gradient(x)}
    if bias is not None:
        results["bias"] = gradient(bias)
    for number, term in enumerate(terms):
        results[number, "A"], results[number, "B"] = gradient(term.A), gradient(term.B)
        if term.lora_bias is not None:
            results[number, "bias"] = gradient(term.lora_bias)
    stored = LinearProblem(
        exactly(dy), exactly(W0), tuple(adapters), exactly(x), None if bias is None else exactly(bias)
    )
    return results, stored


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=25)
@given(data=st.data(), turned=st.booleans())
def test_small_integers_of_layers_with_one_input_come_out_exactly(
    device: str, mode: Mode, data: st.DataObject, turned: bool
) -> None:
    shared = data.draw(shared_problems(mode.computes, exact=True))
    assert_exact(*run_shared(shared, mode, device, turned=turned))


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=20)
@given(data=st.data(), turned=st.booleans())
def test_layers_with_one_input_stay_within_the_bounds_of_the_fused_projection(
    device: str, mode: Mode, data: st.DataObject, turned: bool
) -> None:
    shared = data.draw(shared_problems(np.float64, exact=False))
    assert_within(*run_shared(shared, mode, device, turned=turned), mode)


def test_a_mask_that_terms_share_is_drawn_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = SeededDropout.mask

    def counted(self: SeededDropout, *args: Any) -> Tensor:
        drawn.append(self.seed)
        return original(self, *args)

    monkeypatch.setattr(SeededDropout, "mask", counted)
    x = torch.randn(4, 3, requires_grad=True)
    one, other = SeededDropout(0.5, 1), SeededDropout(0.5, 2)
    A, B = torch.randn(2, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    terms = [Term(0, A, B, 1.0, dropout=dropout) for dropout in (one, SeededDropout(0.5, 1), other)]
    lora_products(x, (Member(torch.randn(5, 3), None),), terms)[0].sum().backward()
    assert sorted(drawn) == [1, 1, 2, 2]


# Where adapters start.

STARTS = [True, False, "gaussian", "orthogonal", "pissa", "olora"]
TAKEN = ["pissa", "olora"]


def started(init: Any, mode: Mode, *, conv1d: bool = False, **options: Any) -> tuple[One, LoraLinear]:
    torch.manual_seed(4)
    base: Any = Conv1D(9, 6) if conv1d else nn.Linear(6, 9)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    model = One(base.to(placed(np.zeros(0), mode.base, "cpu").dtype))
    values = {"r": 4, "lora_alpha": 3, "target_modules": ("layer",), "task_type": None, **options}
    inject(model, LoraConfig(init_lora_weights=init, **values))
    layer = lora_layers(model)["layer"]
    assert isinstance(layer, LoraLinear)
    return model, layer


def low_ranks(layer: LoraLinear) -> list[LowRank]:
    """The update as the reference's adapters; a start that is taken away is one of them."""
    update = layer.update()
    adapters = [low_rank(update.lora_A, update.lora_B, update.scaling, None, None)]
    if update.start is not None:
        A, minus_B = update.start
        adapters.append(low_rank(A, -minus_B, -update.scaling, None, None))
    return adapters


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("name", LAYER_MODES)
def test_a_fresh_layer_computes_what_its_base_does(name: str, init: Any, conv1d: bool) -> None:
    mode = MODES[name]
    model, layer = started(init, mode, conv1d=conv1d)
    x = torch.randn(5, 6).to(layer.weight.dtype)
    with autocast("cpu", mode):
        y, base = model(x), layer.base_layer(x)
    adapters = low_ranks(layer)
    if init in (True, "gaussian"):
        assert not layer.update().lora_B.any()
        assert same_bits(y, base)
        return
    exact = LinearProblem(
        exactly(y) * 0, exactly(layer.weight), tuple(adapters), exactly(x), exactly(layer.bias), conv1d
    )
    bound = exact.map(lambda array: array.astype(np.float64)).forward_bound(mode.precision)
    assert_bounded(y, exact.forward(), bound, mode)
    if init is False:
        assert (np.abs(wide(y) - wide(base)) > bound).any()
        return
    bare = replace(exact, adapters=()).forward()
    if init == "orthogonal":
        # Rounding A and B leaves (2 u + u^2) |B||A| of the update, and float64 64 u of its own.
        own, u = adapters[0], 2.0**-24 if mode.adapter is np.float32 else 2.0**-50
        A, B = (np.abs(matrix.astype(np.float64)) for matrix in (own.A, own.B))
        bound = bound + 3 * (u + 2.0**-46) * own.scaling * (np.abs(wide(x)) @ (B @ A).T)
    assert_bounded(y, bare, bound, mode)


@pytest.mark.parametrize("init", TAKEN)
@pytest.mark.parametrize("name", LAYER_MODES)
def test_what_is_taken_away_sees_the_adapters_own_mask(name: str, init: str) -> None:
    """So a fresh layer computes what its base does with dropout, too."""
    mode = MODES[name]
    model, layer = started(init, mode, lora_dropout=0.5)
    model.train()
    x = torch.randn(5, 6).to(layer.weight.dtype)
    torch.manual_seed(9)
    with autocast("cpu", mode):
        y = model(x)
    torch.manual_seed(9)
    drawn = drawn_dropout(0.5)
    mask = exactly(drawn.mask(y, x.shape) * 2)
    adapters = tuple(replace(own, dropout=mask) for own in low_ranks(layer))
    exact = LinearProblem(exactly(y) * 0, exactly(layer.weight), adapters, exactly(x), exactly(layer.bias))
    bound = exact.map(lambda array: array.astype(np.float64)).forward_bound(mode.precision)
    assert_bounded(y, replace(exact, adapters=()).forward(), bound, mode)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("init", ["orthogonal", *TAKEN])
def test_the_start_is_the_references(init: str, conv1d: bool) -> None:
    for name in ("float32", "bfloat16", "float64"):
        mode = MODES[name]
        model, layer = started(False, mode, conv1d=conv1d)
        weight, bits = layer.base_layer.weight, layer.weight.detach().clone()
        generator = torch.Generator().manual_seed(6)
        config = LoraConfig(r=4, lora_alpha=3, target_modules=("layer",), init_lora_weights=init)
        inject(model, config, "other", generator=generator)
        seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(6)))
        update = layer.update("other")
        drawn = adapter_start(
            init,
            array_of(layer.matrix),
            4,
            0.75,
            np.random.default_rng(seed),
            dtype=array_of(update.lora_A.detach()).dtype,
        )
        assert same_bits(update.lora_A.detach(), tensor_of(drawn.A))
        assert same_bits(update.lora_B.detach(), tensor_of(drawn.B))
        assert layer.base_layer.weight is weight
        assert same_bits(weight.detach(), bits)
        assert (update.start is not None) == (init in TAKEN)


def trained(init: Any, mode: Mode, **options: Any) -> tuple[One, LoraLinear]:
    """A model whose adapter has moved away from its start."""
    model, layer = started(init, mode, **options)
    torch.manual_seed(7)
    for parameter in layer.update().parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model, layer


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("init", TAKEN)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_the_merge_of_a_start_taken_from_the_weight_is_one_rounding(
    name: str, init: str, conv1d: bool, rslora: bool
) -> None:
    mode = MODES[name]
    model, layer = trained(init, mode, conv1d=conv1d, use_rslora=rslora)
    weight, bits = layer.base_layer.weight, layer.weight.detach().clone()
    own, taken = low_ranks(layer)
    exact = own.B @ own.A * Fraction(own.scaling) + taken.B @ taken.A * Fraction(taken.scaling)
    exact = exactly(bits) + (exact.T if conv1d else exact)
    rounded = np.array([round_fraction(value, mode.base) for value in exact.ravel()]).reshape(exact.shape)
    pair = adapter_of(model).pairs["layer"]
    assert pair.A.shape == (8, 6)
    assert pair.B.shape == (9, 8)
    merge(model)
    assert np.array_equal(wide(layer.base_layer.weight), rounded.astype(np.float64))
    update = layer.update()
    assert update.start is not None
    factors = ((update.lora_A, update.lora_B, own), (update.start[0], -update.start[1], taken))
    floats = [LowRank(array_of(A.detach()), array_of(B.detach()), a.scaling) for A, B, a in factors]
    reference = merge_adapters(array_of(bits), floats, fan_in_fan_out=conv1d)
    assert same_bits(layer.base_layer.weight.detach(), tensor_of(reference))
    unmerge(model)
    assert layer.base_layer.weight is weight
    assert same_bits(weight.detach(), bits)
    # The file's own pair says the same, where its configuration can state the scaling.
    if pair.scaling == layer.update().scaling:
        again = merge_adapters(array_of(bits), [LowRank(pair.A, pair.B, pair.scaling)], fan_in_fan_out=conv1d)
        assert same_bits(tensor_of(again), tensor_of(reference))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_what_is_saved_computes_the_same_here_and_in_peft(tmp_path: Path, init: Any, rslora: bool) -> None:
    mode = MODES["float32"]
    model, layer = trained(init, mode, use_rslora=rslora)
    save_adapter(model, tmp_path / "adapter")
    x = torch.randn(5, 6)
    ours, theirs = (One(nn.Linear(6, 9)) for _ in range(2))
    for other in (ours, theirs):
        other.layer.load_state_dict(layer.base_layer.state_dict())
    load_adapter(ours, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    exact = LinearProblem(
        exactly(x) * 0, exactly(layer.weight), tuple(low_ranks(layer)), exactly(x), exactly(layer.bias)
    )
    bound = exact.map(lambda array: array.astype(np.float64)).forward_bound(np.float32)
    # Stated as alpha / (2 r), rsLoRA's scaling is off by an ulp of float64 at most.
    bound = bound * (1 + 2.0**-20)
    for y in (model(x), ours(x), loaded(x)):
        assert_bounded(y, exact.forward(), bound, mode)
    if init not in TAKEN:
        assert same_bits(ours(x), model(x))
        assert adapter_of(model).config.use_rslora is rslora


@settings(max_examples=200)
@given(
    r=st.integers(1, 300), alpha=st.one_of(st.integers(1, 512), st.floats(0.01, 500)), rslora=st.booleans()
)
def test_the_scaling_of_a_start_taken_from_the_weight_is_kept(r: int, alpha: float, rslora: bool) -> None:
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, init_lora_weights="pissa")
    scaling = config.scaling_of("layer")
    plain = plain_config(config, {"layer": scaling})
    assert plain.rank_of("layer") == 2 * r
    assert not plain.use_rslora
    kept = plain.scaling_of("layer")
    if rslora:
        assert abs(kept - scaling) <= np.spacing(scaling)
    else:
        assert kept == scaling
