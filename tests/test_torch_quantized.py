"""Updates beside quantised weights: the reference on the numbers they stand for; merges only where asked.

A layer of our own stands for any library's; those of bitsandbytes are tested where it is installed.
"""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_problems import LinearProblem, linear_problems
from refusal import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
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

from loracle.files import LoraConfig
from loracle.reference import ConfigError, LowRank, ShapeError, TargetError, adapter_start, merge_adapters
from loracle.torch_impl import (
    LoraLinear,
    adapter_of,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
)
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.dequantize import dequantize
from loracle.torch_impl.dropout import SeededDropout
from loracle.torch_impl.quantization import dequantized, is_quantized, register_quantized
from loracle.torch_impl.quantized import LoraQuantizedLinear
from loracle.torch_impl.update import UpdateOptions


class Int8Linear(nn.Module):
    """A weight of 8-bit integers with one scale, as a library of quantised layers may have it."""

    def __init__(self, integers: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.weight = nn.Parameter(integers.to(torch.int8), requires_grad=False)
        self.scale, self.dtype = scale, dtype
        self.bias = None if bias is None else nn.Parameter(bias)

    def numbers(self) -> Tensor:
        return self.weight.to(self.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.linear(x, self.numbers(), self.bias)
        return y


class Single(Int8Linear):
    """Computes in float32, also under autocast, and returns its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            y: Tensor = nn.functional.linear(x.float(), self.numbers().float(), bias)
            return y.to(x.dtype)


register_quantized(Int8Linear, Int8Linear.numbers)  # type: ignore[arg-type]


def quantized_base(
    p: LinearProblem, mode: Mode, device: str, kind: type[Int8Linear] = Int8Linear
) -> Int8Linear:
    """Of the problem's weight, rounded to whole numbers of an eighth."""
    integers = placed(np.clip(np.round(p.W0 * 8), -127, 127), np.float32, device)
    bias = None if p.bias is None else placed(p.bias, mode.base, device)
    return kind(integers, 0.125, bias, placed(np.zeros(0), mode.base, device).dtype)


def run(
    p: LinearProblem,
    mode: Mode,
    device: str,
    dropout: float,
    train_bias: bool,
    kind: type[Int8Linear] = Int8Linear,
) -> tuple[dict[Any, Tensor], LinearProblem]:
    """y and the gradients by the keys of `LinearProblem`, and the problem in the tensors' numbers."""
    base = quantized_base(p, mode, device, kind)
    layer = LoraQuantizedLinear(base)
    names = [f"adapter{number}" for number in range(len(p.adapters))]
    for name, own in zip(names, p.adapters, strict=True):
        r = len(own.A)
        options = UpdateOptions(
            r,
            own.scaling * r,
            dropout=0.0 if own.dropout is None else dropout,
            lora_bias=own.bias is not None,
        )
        layer.add_adapter(name, options)
        update = layer.update(name)
        update.lora_A.data = placed(own.A, mode.adapter, device)
        update.lora_B.data = placed(own.B, mode.adapter, device)
        if update.lora_bias is not None:
            update.lora_bias.data = placed(own.bias, mode.adapter, device)
    layer.activate(names)
    if base.bias is not None:
        base.bias.requires_grad_(train_bias)
    x = placed(p.x, mode.base, device).requires_grad_()
    with arithmetic(device, mode):
        torch.manual_seed(5)
        with autocast(device, mode):
            y = layer(x)
        dy = placed(p.dy, array_of(y.detach()).dtype, device)
        y.backward(dy)
    assert y.shape == dy.shape
    torch.manual_seed(5)
    adapters = []
    results: dict[Any, Tensor] = {"y": y.detach(), "x": gradient(x)}
    for number, name in enumerate(names):
        update = layer.update(name)
        mask = None
        if update.options.dropout:
            drawn = SeededDropout(update.options.dropout, int(torch.randint(2**63 - 1, ())))
            like = placed(np.zeros(0), mode.computes, device)
            ones = drawn.mask(like, torch.Size([x[..., 0].numel(), x.shape[-1]])).reshape(x.shape)
            mask = exactly(ones.double() * drawn.factor)
        bias = None if update.lora_bias is None else exactly(update.lora_bias)
        matrices = exactly(update.lora_A), exactly(update.lora_B)
        adapters.append(LowRank(*matrices, update.scaling, bias=bias, dropout=mask))
        for key in ("A", "B", "bias"):
            parameter = getattr(update, f"lora_{key}")
            if parameter is not None:
                results[number, key] = gradient(parameter)
    if base.bias is not None and train_bias:
        results["bias"] = gradient(base.bias)
    bias = None if base.bias is None else exactly(base.bias)
    stored = LinearProblem(exactly(dy), exactly(base.numbers()), tuple(adapters), exactly(x), bias)
    return results, stored


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    assert tensor.grad.dtype is tensor.dtype
    assert tensor.grad.shape == tensor.shape
    return tensor.grad


def suits(p: LinearProblem) -> bool:
    return bool(p.adapters) and not p.fan_in_fan_out


NAMES = [name for name in LAYER_MODES if "float64" not in name]


@pytest.mark.parametrize(("device", "mode"), cases(NAMES))
@settings(max_examples=25)
@given(data=st.data(), train_bias=st.booleans(), kind=st.sampled_from([Int8Linear, Single]))
def test_small_integers_come_out_exactly(
    device: str, mode: Mode, data: st.DataObject, train_bias: bool, kind: type[Int8Linear]
) -> None:
    p = data.draw(linear_problems(mode.computes, exact=True, rows=False).filter(suits)).astype(np.float64)
    results, stored = run(p, mode, device, 0.5, train_bias, kind)
    assert (stored.W0 == p.W0).all()
    expected = {"y": stored.forward(), **stored.backward()}
    for key, got in results.items():
        assert_equal(got, expected[key], key)


@pytest.mark.parametrize(("device", "mode"), cases(NAMES))
@settings(max_examples=20)
@given(data=st.data(), train_bias=st.booleans(), kind=st.sampled_from([Int8Linear, Single]))
def test_everything_else_stays_within_the_bounds(
    device: str, mode: Mode, data: st.DataObject, train_bias: bool, kind: type[Int8Linear]
) -> None:
    p = data.draw(linear_problems(np.float64, rows=False, most=6).filter(suits))
    results, stored = run(p, mode, device, 0.25, train_bias, kind)
    assume(finite(*results.values()))
    assert_within(results, stored, mode)


def assert_within(results: dict[Any, Tensor], stored: LinearProblem, mode: Mode) -> None:
    expected = {"y": stored.forward(), **stored.backward()}
    floats = stored.map(lambda array: array.astype(np.float64))
    bounds = {"y": floats.forward_bound(mode.precision), **floats.backward_bound(mode.precision)}
    for key, got in results.items():
        assert_bounded(got, expected[key], bounds[key], mode, key)


def test_the_bounds_tell_a_wrong_layer() -> None:
    rng = np.random.default_rng(2)
    own = LowRank(rng.normal(size=(3, 7)), rng.normal(size=(5, 3)), 0.5, rng.normal(size=5), np.ones((6, 7)))
    p = LinearProblem(rng.normal(size=(6, 5)), rng.normal(size=(5, 7)), (own,), rng.normal(size=(6, 7)))
    for name in NAMES:
        mode = MODES[name]
        results, stored = run(p, mode, "cpu", 0.25, False)
        assert_within(results, stored, mode)
        for wrong in (
            stored.with_adapter(0, scaling=1.5),
            stored.with_adapter(0, dropout=None),
            stored.with_adapter(0, bias=stored.adapters[0].bias * 30),
            replace(stored, W0=stored.W0 * 2),
        ):
            with pytest.raises(AssertionError, match="above the bound"):
                assert_within(results, wrong, mode)


# In a model.


class Model(nn.Module):
    """Two quantised layers with a plain one between, as transformers marks such a model; of small integers,
    so that the order of a sum does not matter.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def layer(inputs: int, outputs: int) -> Int8Linear:
            integers = torch.randint(-2, 3, (outputs, inputs), generator=generator)
            bias = torch.randint(-2, 3, (outputs,), generator=generator).to(dtype)
            return Int8Linear(integers, 0.5, bias, dtype)

        self.first: Any = layer(6, 8)
        self.middle: Any = nn.Linear(8, 8, dtype=dtype)
        fill_integers(self.middle, 2, bound=1)
        self.last: Any = layer(8, 4)
        self.config = SimpleNamespace(quantization_config={"bits": 8}, model_type="own")
        self.hf_quantizer = object()
        self.is_quantized = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)).relu())
        return y


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """The model with an adapter away from its start on every linear layer."""
    torch.manual_seed(0)
    model = Model(dtype)
    values: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "task_type": None}
    inject(model, LoraConfig(**{**values, **options}))
    for seed, layer in enumerate(lora_layers(model).values()):
        fill_integers(layer.update(), seed, bound=1)
    return model


X = torch.randint(-1, 2, (3, 5, 6), generator=torch.Generator().manual_seed(2)).float()


def test_every_linear_layer_is_found_and_only_the_adapters_train() -> None:
    model = adapted()
    assert {path: type(layer) for path, layer in lora_layers(model).items()} == {
        "first": LoraQuantizedLinear,
        "middle": LoraLinear,
        "last": LoraQuantizedLinear,
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"{path}.adapters.default.lora_{part}" for path in ("first", "middle", "last") for part in "AB"
    }
    loss = model(X).pow(2).mean()
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(gradient(p).any() for p in parameters)
    # A step down the slope that takes about a thousandth off.
    square = sum(float(gradient(p).pow(2).sum()) for p in parameters)
    torch.optim.SGD(parameters, lr=1e-3 * loss.item() / square).step()
    assert model(X).pow(2).mean().item() < loss.item()
    with disable_adapter(model):
        assert same_bits(model(X), without_adapters(model)(X))


def without_adapters(model: Model) -> Model:
    other = copy.deepcopy(model)
    eject(other)
    assert isinstance(other.first, Int8Linear)
    return other


def test_a_fresh_layer_computes_what_its_base_does() -> None:
    torch.manual_seed(0)
    model = Model()
    y = model(X)
    inject(model, LoraConfig(r=2, target_modules=("first", "last")))
    assert same_bits(model(X), y)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_is_a_part_of_the_numbers_that_the_weight_stands_for(init: str) -> None:
    torch.manual_seed(0)
    model = Model()
    y = model(X)
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=("last",), init_lora_weights=init))
    layer = lora_layers(model)["last"]
    update = layer.update()
    numbers = array_of(dequantized(model.last.base_layer))
    drawn = adapter_start(init, numbers, 2, 1.5, np.random.default_rng(0))
    assert same_bits(update.lora_A.detach(), tensor_of(drawn.A))
    assert same_bits(update.lora_B.detach(), tensor_of(drawn.B))
    assert update.start is not None
    A, minus_B = update.start
    hidden = torch.randn(5, 8)
    adapters = (
        LowRank(exactly(update.lora_A), exactly(update.lora_B), 1.5),
        LowRank(exactly(A), exactly(-minus_B), -1.5),
    )
    W0, bias = exactly(torch.tensor(numbers)), exactly(model.last.base_layer.bias)
    problem = LinearProblem(exactly(hidden @ A.t()), W0, adapters, exactly(hidden), bias)
    bound = problem.map(lambda array: array.astype(np.float64)).forward_bound(np.float32)
    bare = replace(problem, adapters=()).forward()
    assert_bounded(layer(hidden), bare, bound, MODES["float32"])
    assert y.shape == model(X).shape


def test_files_come_and_go_as_those_of_a_plain_layer(tmp_path: Path) -> None:
    model = adapted(lora_bias=True)
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    other = Model()
    assert load_adapter(other, tmp_path / "adapter") == ("first", "middle", "last")
    assert same_bits(other(X), model(X))
    adapter = adapter_of(model)
    bad = replace(adapter.pairs["last"], A=adapter.pairs["last"].A[:, :3])
    wrong = replace(adapter, pairs={**adapter.pairs, "last": bad})
    with pytest.raises(TargetError, match=r"last\.lora_A: expected shape \(2, 8\) for this Int8Linear"):
        load_adapter(Model(), wrong)


def test_a_merge_is_refused_by_name_and_changes_nothing() -> None:
    model = adapted()
    y = model(X)
    refused(
        lambda: merge(model),
        TargetError,
        "first: expected a weight in floating point to merge into, got the quantised one of Int8Linear; "
        "merge into the checkpoint it was quantised from, with `loracle merge`, or dequantize(model) first",
    )
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert same_bits(model(X), y)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_dequantised_model_keeps_its_adapters_and_merges(dtype: torch.dtype | None) -> None:
    model = adapted(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32, bias="all")
    inject(model, LoraConfig(r=1, target_modules=("first",)), "other")
    set_adapter(model, "default")
    y = model(X.to(model.middle.weight.dtype))
    numbers = {path: dequantized(getattr(model, path).base_layer) for path in ("first", "last")}
    updates = {path: layer.update() for path, layer in lora_layers(model).items()}
    biases = {path: layer.bias for path, layer in lora_layers(model).items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.first.eval()
    assert dequantize(model, dtype=dtype) == ("first", "last")
    assert (model.first.training, model.last.training) == (False, True)
    layers = lora_layers(model)
    assert all(type(layer) is LoraLinear for layer in layers.values())
    assert all(layer.update() is updates[path] for path, layer in layers.items())
    assert all(layer.bias is biases[path] for path, layer in layers.items())
    assert layers["first"].active == ("default",)
    assert set(layers["first"].adapters) == {"default", "other"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    for path, own in numbers.items():
        assert biases[path].dtype is layers[path].weight.dtype  # type: ignore[union-attr]
        with disable_adapter(model):
            assert layers[path].bias is not biases[path]
            assert layers[path].bias.dtype is layers[path].weight.dtype  # type: ignore[union-attr]
        assert same_bits(layers[path].weight, own.to(own.dtype if dtype is None else dtype))
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert model.is_quantized is False
    if dtype is None:
        assert torch.equal(model(X), y)
    for layer in layers.values():
        for parameter in layer.update("default").parameters():
            parameter.data += torch.randn(parameter.shape)
    before = {path: array_of(layer.weight).copy() for path, layer in layers.items()}
    pairs = adapter_of(model, "default").pairs
    merge(model)
    for path, layer in layers.items():
        wanted = merge_adapters(before[path], [LowRank(pairs[path].A, pairs[path].B, 1.5)])
        assert same_bits(layer.weight.detach(), tensor_of(wanted))
    eject(model)
    assert type(model.first) is nn.Linear
    with pytest.raises(TargetError, match="Model: expected quantised linear layers, got none"):
        dequantize(model)


def test_biases_that_train_go_back_and_forth_after_dequantising() -> None:
    model = adapted(bias="lora_only")
    with torch.no_grad():
        model.first.bias.add_(1)
    y = model(X)
    with disable_adapter(model):
        base = model(X)
    dequantize(model, dtype=torch.float32)
    assert same_bits(model(X), y)
    with disable_adapter(model):
        assert same_bits(model(X), base)
    assert adapter_of(model).tensors.keys() == {"first.bias", "middle.bias", "last.bias"}


def test_a_model_without_adapters_is_dequantised_too() -> None:
    model = Model()
    y = model(X)
    assert dequantize(model) == ("first", "last")
    assert type(model.first) is nn.Linear
    assert not model.first.weight.requires_grad
    assert same_bits(model(X), y)
    wider = Model()
    dequantize(wider, dtype=torch.float64)
    assert torch.equal(wider.first(X.double()), Model().first(X).double())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant: bool) -> None:
    model = adapted(lora_dropout=0.5).train()
    results = []
    for wrapped in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.sum().backward()
        results.append([y.detach(), gradient(x), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 8
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("bias",)])
def test_only_the_gradients_asked_for_are_computed_and_only_their_operands_kept(wanted: Any) -> None:
    layer = lora_layers(adapted(lora_bias=True))["first"]
    update = layer.update()
    x = X.clone().requires_grad_("x" in wanted)
    for name in ("A", "B", "bias"):
        getattr(update, f"lora_{name}").requires_grad_(name in wanted)
    y = layer(x)
    node = y.grad_fn.next_functions[0][0]
    kept = [tensor is not None for tensor in node.saved_tensors]
    needs_x, A, B = "x" in wanted, "A" in wanted, "B" in wanted
    # x, A, B, x A, dropout
    assert kept == [A, needs_x, needs_x or A, B, False]
    y.sum().backward()
    leaves = {"x": x, **{name: getattr(update, f"lora_{name}") for name in ("A", "B", "bias")}}
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)


def test_backward_ignores_an_autocast_that_forward_did_not_see() -> None:
    layer = lora_layers(adapted(lora_bias=True))["first"]
    x = torch.randn(3, 5, 6)
    gradients = []
    for enabled in (False, True):
        y = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(y.sum(), list(layer.update().parameters())))
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(TargetError, match="expected a quantised linear layer, got Linear"):
        LoraQuantizedLinear(nn.Linear(3, 4))
    assert not is_quantized(nn.Linear(3, 4))
    model = Model()
    with pytest.raises(ConfigError, match="use_dora: expected False for this layer, got True"):
        inject(model, LoraConfig(r=2, target_modules=("first",), use_dora=True))
    model = adapted()
    with pytest.raises(ShapeError, match=r"x: expected \(\.\.\., 6\), got \(3, 5\)"):
        model.first(torch.ones(3, 5))
    y = model.first(X.clone().requires_grad_())
    with pytest.raises(ConfigError, match="create_graph: expected False, got True"):
        torch.autograd.grad(y.sum(), model.first.update().lora_A, create_graph=True)


# With bitsandbytes.


def bitsandbytes_layer(kind: str, inputs: int = 64, outputs: int = 32) -> Any:
    """A quantised layer of gaussians on the CPU, in float32."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    weight, bias = torch.randn(outputs, inputs) / 8, torch.randn(outputs)
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        quant, nested = kind.split("-")
        layer = bnb.nn.Linear4bit(
            inputs,
            outputs,
            compute_dtype=torch.float32,
            quant_type=quant,
            compress_statistics=nested == "nested",
        )
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=quant,
            compress_statistics=nested == "nested",
            module=layer,
        )
    layer.bias = nn.Parameter(bias)
    return layer.to("cpu")


KINDS = ["nf4-plain", "nf4-nested", "fp4-plain", "8bit"]


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_layers_train_beside_what_they_stand_for(kind: str, tmp_path: Path) -> None:
    model = One(bitsandbytes_layer(kind))
    packed = copy.deepcopy(model.layer.weight.data)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", bias="all", task_type=None)
    assert inject(model, config) == ("layer",)
    layer = lora_layers(model)["layer"]
    assert isinstance(layer, LoraQuantizedLinear)
    update = layer.update()
    nn.init.normal_(update.lora_B)
    numbers = dequantized(layer.base_layer)
    assert numbers.shape == (32, 64)
    for train in (True, False, True):
        model.train(train)
        model.zero_grad()
        x = torch.randn(2, 3, 64, requires_grad=train)
        y = model(x)
        problem = LinearProblem(
            exactly(torch.randn_like(y)),
            exactly(numbers),
            (LowRank(exactly(update.lora_A), exactly(update.lora_B), update.scaling),),
            exactly(x),
            exactly(layer.bias),  # type: ignore[arg-type]
        )
        results: dict[Any, Tensor] = {"y": y.detach()}
        if train:
            y.backward(placed(problem.dy.astype(np.float64), np.float32, "cpu"))
            results |= {"x": gradient(x), "bias": gradient(layer.bias)}  # type: ignore[arg-type]
            results |= {(0, "A"): gradient(update.lora_A), (0, "B"): gradient(update.lora_B)}
        if kind == "8bit" and not train:
            # Evaluated, its inputs are rounded to 8 bits, too; the update is of the inputs as they are.
            base = model.layer.base_layer(x.reshape(6, 64)).reshape(2, 3, 32)
            alone = replace(problem, W0=problem.W0 * 0, bias=None)
            added = alone.forward()
            bound = alone.map(lambda array: array.astype(np.float64)).forward_bound(np.float32)
            bound = bound + 2.0**-23 * (np.abs(wide(base)) + np.abs(added).astype(np.float64) + bound)
            assert_bounded(y, exactly(base) + added, bound, MODES["float32"])
            continue
        # Its 8 bits are scaled in another order than dequantised: three roundings of each number at most.
        own = 4 * 2.0**-24 * np.abs(wide(numbers)) if kind == "8bit" else np.zeros((32, 64))
        extra = {"y": np.abs(wide(x)) @ own.T, "x": np.abs(problem.dy.astype(np.float64)) @ own}
        expected = {"y": problem.forward(), **problem.backward()}
        floats = problem.map(lambda array: array.astype(np.float64))
        bounds = {"y": floats.forward_bound(np.float32), **floats.backward_bound(np.float32)}
        for key, got in results.items():
            assert_bounded(got, expected[key], bounds[key] + extra.get(key, 0.0), MODES["float32"], key)
    assert torch.equal(layer.base_layer.weight.data, packed)  # type: ignore[arg-type, union-attr]
    assert layer.base_layer.weight.grad is None  # type: ignore[union-attr]
    save_adapter(model, tmp_path / "adapter")
    other = One(bitsandbytes_layer(kind))
    load_adapter(other, tmp_path / "adapter")
    x = torch.randn(3, 64)
    assert same_bits(other(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_layers_merge_after_dequantising(kind: str) -> None:
    model = One(bitsandbytes_layer(kind))
    inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=("layer",)))
    update = lora_layers(model)["layer"].update()
    nn.init.normal_(update.lora_B)
    with pytest.raises(TargetError, match=r"layer: .* got the quantised one of Linear"):
        merge(model)
    numbers = dequantized(model.layer.base_layer)
    assert dequantize(model) == ("layer",)
    assert same_bits(model.layer.weight.detach(), numbers)
    merge(model)
    own = LowRank(array_of(update.lora_A), array_of(update.lora_B), 1.5)
    assert same_bits(model.layer.weight.detach(), tensor_of(merge_adapters(array_of(numbers), [own])))


def test_a_plain_layer_is_not_made_around_a_quantised_one() -> None:
    for kind in KINDS:
        with pytest.raises(TargetError, match=r"base_layer: expected nn\.Linear or Conv1D, got Linear"):
            LoraLinear(bitsandbytes_layer(kind))
