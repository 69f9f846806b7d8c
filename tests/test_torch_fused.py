"""`LoraFusedLinear`: slices of one projection, against the reference, loralib and a plain layer."""

import copy
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import loralib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import LinearProblem
from torch import Tensor, nn
from torch_fixtures import fill_integers, same_bits
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

from loracle.reference import (
    ConfigError,
    LowRank,
    ShapeError,
    TargetError,
    fused_adapters,
    merge_adapters,
    merge_bias,
)
from loracle.torch_impl import LoraLinear
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.dropout import drawn_dropout
from loracle.torch_impl.fused import LoraFusedLinear
from loracle.torch_impl.shared_input import SharedInput, watch_siblings
from loracle.torch_impl.update import UpdateOptions


def fused_layer(
    base: nn.Module, widths: Any, enabled: Any, *, r: int = 2, alpha: float = 2.0, **options: Any
) -> LoraFusedLinear:
    layer = LoraFusedLinear(base, widths=widths, enabled=enabled)
    layer.add_adapter("default", UpdateOptions(r, alpha, **options))
    layer.activate(("default",))
    return layer


@st.composite
def shapes(draw: st.DrawFn, narrow: bool) -> tuple[tuple[int, ...], tuple[bool, ...], int, int, int]:
    """Widths, flags, inputs, rank and batch."""
    most = 2 if narrow else 4
    widths = draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    enabled = draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
    inputs, batch = draw(st.integers(1, 3 if narrow else 6)), draw(st.integers(1, 2 if narrow else 4))
    return tuple(widths), tuple(enabled), inputs, draw(st.integers(1, 1 if narrow else 3)), batch


def run(
    shape: Any, mode: Mode, device: str, *, exact: bool, seed: int, dropout: float, turned: bool, bias: bool
) -> tuple[dict[Any, Tensor], LinearProblem]:
    """y and the gradients, those of lora_A and lora_B by slice, and the reference's problem in fractions."""
    widths, enabled, inputs, r, batch = shape
    rng = np.random.default_rng(seed)

    def numbers(*size: int) -> Any:
        return rng.integers(-1, 2, size).astype(float) if exact else rng.normal(size=size)

    out = sum(widths)
    base: Any = Conv1D(out, inputs) if turned else nn.Linear(inputs, out)
    base.weight.data = placed(numbers(*base.weight.shape), mode.base, device)
    base.bias.data = placed(numbers(out), mode.base, device)
    layer = fused_layer(base, widths, enabled, r=r, alpha=0.5 * r, dropout=dropout, lora_bias=bias)
    update = layer.update()
    count, on = sum(enabled), sum(width for width, flag in zip(widths, enabled, strict=True) if flag)
    assert update.lora_A.shape == (r * count, inputs)
    assert update.lora_B.shape == (on, r)
    for parameter in update.parameters():
        assert array_of(parameter.detach()).dtype == mode.adapter
        parameter.data = placed(numbers(*parameter.shape), mode.adapter, device)
    x = placed(numbers(batch, inputs), mode.base, device).requires_grad_()
    dy = placed(numbers(batch, out), mode.computes, device)
    with arithmetic(device, mode):
        torch.manual_seed(seed)
        with autocast(device, mode):
            y = layer(x)
        y.backward(dy) if count else y.backward(dy.to(y.dtype))
    torch.manual_seed(seed)
    mask = None
    if dropout and count:
        drawn = drawn_dropout(dropout)
        mask = exactly(drawn.mask(dy, x.shape).double() * drawn.factor)
    A, B = exactly(update.lora_A), exactly(update.lora_B)
    adapters = [replace(own, dropout=mask) for own in fused_adapters(A, B, 0.5, widths, enabled)]
    cuts = list(pairwise(accumulate((w for w, e in zip(widths, enabled, strict=True) if e), initial=0)))
    results: dict[Any, Tensor] = {"y": y.detach(), "x": gradient(x)}
    for number, (start, stop) in enumerate(cuts):
        results[number, "A"] = gradient(update.lora_A)[number * r : (number + 1) * r]
        results[number, "B"] = gradient(update.lora_B)[start:stop]
        if update.lora_bias is not None:
            own_bias = exactly(update.lora_bias)[start:stop]
            adapters[number] = replace(adapters[number], bias=own_bias)
            results[number, "bias"] = gradient(update.lora_bias)[start:stop]
    problem = LinearProblem(
        exactly(dy), exactly(base.weight), tuple(adapters), exactly(x), exactly(base.bias), turned
    )
    return results, problem


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    assert tensor.grad.shape == tensor.shape
    return tensor.grad


CASES = st.fixed_dictionaries({"seed": st.integers(0, 2**31), "turned": st.booleans(), "bias": st.booleans()})


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=25)
@given(shape=shapes(narrow=True), options=CASES, dropout=st.sampled_from([0.0, 0.5]))
def test_small_integers_come_out_exactly(
    device: str, mode: Mode, shape: Any, options: Any, dropout: float
) -> None:
    results, problem = run(shape, mode, device, exact=True, dropout=dropout, **options)
    expected = {"y": problem.forward(), **problem.backward()}
    for key, got in results.items():
        assert_equal(got, expected[key], key)


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=20)
@given(shape=shapes(narrow=False), options=CASES, dropout=st.sampled_from([0.0, 0.1]))
def test_everything_else_stays_within_the_bounds(
    device: str, mode: Mode, shape: Any, options: Any, dropout: float
) -> None:
    results, problem = run(shape, mode, device, exact=False, dropout=dropout, **options)
    assert finite(*results.values())
    expected = {"y": problem.forward(), **problem.backward()}
    floats = problem.map(lambda array: array.astype(np.float64))
    bounds = {"y": floats.forward_bound(mode.precision), **floats.backward_bound(mode.precision)}
    for key, got in results.items():
        assert_bounded(got, expected[key], bounds[key], mode, key)


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True), (True, True, True)])
@pytest.mark.parametrize("turned", [False, True])
def test_equal_slices_are_loralibs(enabled: tuple[bool, ...], turned: bool) -> None:
    """Its tensors, copied over, give its numbers on integers, and its gradients."""
    out = 2 * len(enabled)
    theirs = loralib.MergedLinear(3, out, r=2, lora_alpha=4, enable_lora=list(enabled), fan_in_fan_out=turned)
    fill_integers(theirs, 1)
    base: Any = Conv1D(out, 3) if turned else nn.Linear(3, out)
    base.weight.data, base.bias.data = theirs.weight.detach().clone(), theirs.bias.detach().clone()
    layer = fused_layer(base, (2,) * len(enabled), enabled, alpha=4.0)
    update = layer.update()
    assert update.lora_A.shape == theirs.lora_A.shape
    assert update.lora_B.shape == theirs.lora_B.shape
    update.lora_A.data, update.lora_B.data = (
        theirs.lora_A.detach().clone(),
        theirs.lora_B.detach().clone(),
    )
    inputs = [torch.randint(-2, 3, (4, 3)).float().requires_grad_() for _ in range(1)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    ys = [layer(inputs[0]), theirs(inputs[1])]
    assert torch.equal(*ys)
    for y in ys:
        y.pow(2).sum().backward()
    assert torch.equal(gradient(inputs[0]), gradient(inputs[1]))
    assert torch.equal(gradient(update.lora_A), gradient(theirs.lora_A))
    assert torch.equal(gradient(update.lora_B), gradient(theirs.lora_B))


def test_no_slice_enabled_is_the_base_alone() -> None:
    layer = fused_layer(nn.Linear(3, 4), (2, 2), (False, False), dropout=0.5)
    x = torch.randn(5, 3)
    assert same_bits(layer(x), layer.base_layer(x))
    assert not layer.is_low_rank
    assert layer.terms(0, x) == []
    merged = layer.merged_arrays(("default",), "layer")
    assert same_bits(tensor_of(merged["weight"]), layer.weight.detach())
    assert layer.pair("default").B.shape == (4, 0)


def filled(init: Any = True, *, turned: bool = False, dtype: Any = torch.float32, **options: Any) -> Any:
    """A layer of unequal slices, the second without an update, away from its start."""
    torch.manual_seed(3)
    base: Any = Conv1D(9, 6) if turned else nn.Linear(6, 9)
    nn.init.normal_(base.weight)
    layer = fused_layer(base.to(dtype), (4, 2, 3), (True, False, True), init=init, **options)
    for parameter in layer.update().parameters():
        parameter.data += torch.randn(parameter.shape)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_the_merge_is_the_references_slice_by_slice(init: Any, turned: bool, dtype: torch.dtype) -> None:
    layer = filled(init, turned=turned, dtype=dtype, lora_bias=True)
    update = layer.update()
    factors = [(update.lora_A, update.lora_B, update.scaling)]
    if init is not True:
        A, minus_B = update.start
        factors.append((A, -minus_B, -update.scaling))
    adapters = [
        own
        for A, B, scaling in factors
        for own in fused_adapters(
            array_of(A.detach()), array_of(B.detach()), scaling, layer.widths, layer.enabled
        )
    ]
    assert len(adapters) == 2 * len(factors)
    merged = layer.merged_arrays(("default",), "layer")
    wanted = merge_adapters(array_of(layer.weight), adapters, fan_in_fan_out=turned)
    assert same_bits(tensor_of(merged["weight"]), tensor_of(wanted))
    spread = np.zeros(9, array_of(update.lora_bias).dtype)
    spread[:4], spread[6:] = np.split(array_of(update.lora_bias.detach()), [4])
    columns = [LowRank(np.zeros((1, 6)), np.zeros((9, 1)), update.scaling, bias=spread)]
    assert np.array_equal(merged["bias"], merge_bias(array_of(layer.bias), columns))
    # And that of the equal dense pair, which is the same real number.
    pair = layer.pair("default")
    dense = [LowRank(pair.A, pair.B, pair.scaling)]
    assert same_bits(
        tensor_of(merge_adapters(array_of(layer.weight), dense, fan_in_fan_out=turned)), tensor_of(wanted)
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_merge_where_the_weight_lies_is_the_one_on_the_host(
    init: Any, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracle.torch_impl.linear.merges_on_device", lambda W0, updates: True)
    layer = filled(init, turned=turned, dtype=torch.bfloat16)
    expected = layer.merged_arrays(("default",), "layer")["weight"]
    result = layer.start_merge(("default",), "layer")()
    assert list(result) == ["weight"]
    assert same_bits(result["weight"], tensor_of(expected))
    assert not same_bits(result["weight"], layer.weight)
    none = fused_layer(nn.Linear(3, 4), (2, 2), (False, False))
    assert same_bits(none.start_merge(("default",), "layer")()["weight"], none.weight.detach())


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal", "pissa", "olora"])
def test_each_slice_starts_as_a_layer_of_its_own(init: Any) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 9)
    layer = LoraFusedLinear(base, widths=(4, 2, 3), enabled=(True, False, True))
    update = layer.start(UpdateOptions(2, 3.0, init=init), torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for number, (start, stop) in enumerate(((0, 4), (6, 9))):
        alone = nn.Linear(6, stop - start)
        alone.weight.data = base.weight.detach()[start:stop].clone()
        own = LoraLinear(alone).start(UpdateOptions(2, 3.0, init=init), generator)
        row = 0 if number == 0 else 4
        assert same_bits(update.lora_A[2 * number : 2 * number + 2].detach(), own.lora_A.detach())
        assert same_bits(update.lora_B[row : row + stop - start].detach(), own.lora_B.detach())
        assert (update.start is None) == (own.start is None)
        if own.start is not None:
            assert update.start is not None
            assert same_bits(update.start[0][2 * number : 2 * number + 2], own.start[0])
            assert same_bits(update.start[1][row : row + stop - start], own.start[1])


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_pair_is_a_plain_layer_that_computes_the_same_and_comes_back(init: Any, lora_bias: bool) -> None:
    layer = filled(init, lora_bias=lora_bias and init is True)
    pair = layer.pair("default")
    ranks = 4 if init is True else 8
    assert pair.A.shape == (ranks, 6)
    assert pair.B.shape == (9, ranks)
    assert not pair.B[4:6].any()
    plain = LoraLinear(copy.deepcopy(layer.base_layer))
    options = UpdateOptions(ranks, pair.scaling * ranks, lora_bias=pair.bias is not None)
    plain.add_adapter("default", options)
    plain.activate(("default",))
    plain.fill("default", pair)
    x = torch.randn(5, 6)
    for computed in (layer(x), plain(x)):
        assert_computes(computed, layer, x, MODES["float32"])
    again = LoraFusedLinear(copy.deepcopy(layer.base_layer), widths=(4, 2, 3), enabled=(True, False, True))
    again.add_adapter("default", layer.update().options)
    again.activate(("default",))
    again.fill("default", pair)
    assert same_bits(again(x), layer(x))
    for name, parameter in layer.update().named_parameters():
        assert same_bits(dict(again.update().named_parameters())[name], parameter)


def test_a_pair_of_other_slices_is_refused() -> None:
    layer = filled()
    pair = layer.pair("default")
    with pytest.raises(ShapeError, match=r"default: expected lora_A \(4, 6\) and lora_B \(9, 4\)"):
        layer.fill("default", replace(pair, A=pair.A[:2], B=pair.B[:, :2]))
    full = pair.B.copy()
    full[4, 0] = 1
    before = layer.update().lora_B.detach().clone()
    with pytest.raises(TargetError, match=r"default\.lora_B: expected zeros but for each slice's ranks"):
        layer.fill("default", replace(pair, B=full))
    assert same_bits(layer.update().lora_B.detach(), before)


WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "flags": ((4, 5), (True,), ConfigError, "enabled: expected a flag for each of the 2 slices, got 1"),
    "sum": ((4, 4), (True, True), ShapeError, "widths: expected positive ones that add up to 9 outputs"),
    "zero": ((9, 0), (True, True), ShapeError, "widths: expected positive ones"),
}


@pytest.mark.parametrize("name", WRONG)
def test_slices_that_do_not_fit_are_refused(name: str) -> None:
    widths, enabled, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        LoraFusedLinear(nn.Linear(6, 9), widths=widths, enabled=enabled)


def test_other_layers_and_a_magnitude_are_refused() -> None:
    with pytest.raises(TargetError, match=r"expected nn\.Linear or Conv1D, got Embedding"):
        LoraFusedLinear(nn.Embedding(3, 4), widths=(4,), enabled=(True,))
    with pytest.raises(ConfigError, match="use_dora: expected False for this layer, got True"):
        fused_layer(nn.Linear(3, 4), (4,), (True,), use_dora=True)


class Block(nn.Module):
    """A fused projection and a plain one with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv: Any = LoraFusedLinear(nn.Linear(3, 9), widths=(4, 2, 3), enabled=(True, False, True))
        self.gate: Any = LoraLinear(nn.Linear(3, 9))
        for layer in (self.qkv, self.gate):
            layer.add_adapter("default", UpdateOptions(2, 1.0, dropout=0.5))
            layer.activate(("default",))
        fill_integers(self, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.qkv(x) * self.gate(x)
        return y


def test_a_fused_layer_shares_its_input_with_others() -> None:
    block = Block()
    x = torch.randint(-2, 3, (4, 3)).float()

    def step(module: Block) -> list[Tensor]:
        torch.manual_seed(0)
        module.zero_grad()
        y = module(x)
        y.sum().backward()
        return [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]

    expected = step(block)
    watch_siblings([("block.qkv", block.qkv), ("block.gate", block.gate)])
    for _ in range(3):
        assert all(same_bits(a, b) for a, b in zip(step(block), expected, strict=True))
    assert isinstance(block.qkv.sharing, SharedInput)


def test_one_graph_gives_the_bits_of_eager_execution() -> None:
    block = Block().eval()
    x = torch.randint(-2, 3, (4, 3)).float()
    expected = block(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert same_bits(y, expected)
    found = [p.grad for p in block.parameters() if p.grad is not None]
    assert all(same_bits(a, b) for a, b in zip(found, gradients, strict=True))
    assert len(found) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_taken_away_has_no_bias_and_sees_the_same_mask(dropout: float) -> None:
    """A fresh layer computes what its base does, but for the bias of lora_B, which counts once."""
    torch.manual_seed(3)
    layer = fused_layer(nn.Linear(6, 9), (4, 2, 3), (True, False, True), init="pissa", dropout=dropout)
    plain = fused_layer(layer.base_layer, (4, 2, 3), (True, False, True), lora_bias=True)
    biased = fused_layer(
        layer.base_layer, (4, 2, 3), (True, False, True), init="pissa", dropout=dropout, lora_bias=True
    )
    x = torch.randn(5, 6)
    problem = LinearProblem(
        exactly(layer.base_layer(x)), exactly(layer.weight), (), exactly(x), exactly(layer.bias)
    )
    adapters = tuple(
        replace(
            own, A=exactly(torch.tensor(own.A)), B=exactly(torch.tensor(own.B)), dropout=exactly(x) * 0 + 2
        )
        for own in layer.low_ranks("default")
    )
    assert len(adapters) == 4
    floats = replace(problem, adapters=adapters).map(lambda array: array.astype(np.float64))
    bound = floats.forward_bound(np.float32)
    assert_bounded(layer(x), problem.forward(), bound, MODES["float32"])
    for own in (plain, biased):
        own.update().lora_bias.data += 3  # type: ignore[union-attr]
    added = exactly(torch.tensor([3.0] * 4 + [0.0] * 2 + [3.0] * 3))
    more = bound + 2.0**-22 * (np.abs(wide(layer.base_layer(x))) + 3)
    assert_bounded(plain(x), problem.forward() + added, more, MODES["float32"])
    assert_bounded(biased(x), problem.forward() + added, more, MODES["float32"])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_two_adapters_add_up(name: str) -> None:
    mode = MODES[name]
    layer = filled(dtype=torch.float32 if name == "float32" else torch.bfloat16)
    layer.add_adapter("other", UpdateOptions(1, 1.0, init=False))
    layer.activate(("default", "other"))
    x = torch.randn(5, 6).to(layer.weight.dtype)
    assert sum(len(layer.low_ranks(each)) for each in layer.active) == 4
    assert_computes(layer(x), layer, x, mode)


def assert_computes(y: Tensor, layer: LoraFusedLinear, x: Tensor, mode: Mode) -> None:
    """Within the bound around what the reference makes of the layer's active adapters."""
    adapters = tuple(own for each in layer.active for own in layer.low_ranks(each))
    arrays = (array_of(tensor) for tensor in (y, layer.weight, x, layer.bias))
    dy, W0, inputs, bias = arrays
    problem = LinearProblem(dy, W0, adapters, inputs, bias).rational()
    bound = problem.map(lambda array: array.astype(np.float64)).forward_bound(mode.precision)
    assert_bounded(y, problem.forward(), bound, mode)
