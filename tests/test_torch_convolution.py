"""`LoraConvolution`: what it wraps, how it starts, where PEFT differs, and its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from refusal import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_fixtures import fill_integers, same_bits
from torch_layers import give
from torch_modes import DEVICES

from loracle.files import LoraConfig, read_adapter
from loracle.reference import (
    ConfigError,
    Convolution,
    DTypeError,
    LowRank,
    ShapeError,
    TargetError,
    convolution_backward,
    convolution_forward,
    merge_convolution,
)
from loracle.torch_impl import (
    adapter_of,
    eject,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    unmerge,
)
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.convolution import LoraConvolution
from loracle.torch_impl.convolution_function import ConvolutionTerm, Geometry, lora_convolution
from loracle.torch_impl.dropout import drawn_dropout
from loracle.torch_impl.update import UpdateOptions

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
WEIGHTS = "adapter_model.safetensors"


class Convolutions(nn.Module):
    """Convolutions in one, two and three dimensions of one input each."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 3, 3, padding="same")
        self.two = nn.Conv2d(2, 3, (3, 2), stride=2, padding=1)
        self.three = nn.Conv3d(2, 2, 2, bias=False)
        fill_integers(self, seed=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (2, n, n, n) to a number for each of the three."""
        return torch.stack([self.one(x[:, 0, 0]).sum(), self.two(x[:, 0]).sum(), self.three(x).sum()])


CONFIG = LoraConfig(r=2, lora_alpha=1, target_modules=("one", "two", "three"), task_type=None)


def layer_of(base: nn.Module | None = None, *, alpha: float = 3.0, **options: Any) -> LoraConvolution:
    """A layer with one active adapter of random numbers."""
    torch.manual_seed(0)
    layer = LoraConvolution(base or nn.Conv2d(2, 3, 3))
    layer.add_adapter("default", UpdateOptions(2, alpha, init=False, **options))
    layer.activate(("default",))
    return layer


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def filled(model: nn.Module) -> Any:
    """The model, its trained parameters integers."""
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data = integers(*parameter.shape, seed=seed).to(parameter)
    return model


@pytest.mark.parametrize("device", DEVICES)
def test_a_fresh_layer_computes_what_its_base_does(device: str) -> None:
    base = nn.Conv2d(2, 3, 3, device=device)
    layer = LoraConvolution(base)
    layer.add_adapter("default", UpdateOptions(2, 3.0))
    layer.activate(("default",))
    x = torch.randn(5, 2, 4, 4, device=device)
    assert same_bits(layer(x), base(x))
    assert layer.base_layer is base
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert layer.update().lora_A.shape == (2, 2, 3, 3)
    assert layer.update().lora_B.shape == (3, 2, 1, 1)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_the_start_is_that_of_peft(init: bool | str, kind: Any) -> None:
    options = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    model = nn.Sequential(kind(3, 4, 2))
    if init is False:
        torch.manual_seed(7)
    layer: Any = peft.inject_adapter_in_model(options, model)[0]
    if init is not False:
        torch.manual_seed(7)
        layer.reset_lora_parameters("default", init)
    ours = LoraConvolution(kind(3, 4, 2)).start(
        UpdateOptions(2, 2, init=init), torch.Generator().manual_seed(7)
    )
    assert same_bits(ours.lora_A, layer.lora_A["default"].weight)
    assert same_bits(ours.lora_B, layer.lora_B["default"].weight)


@pytest.mark.parametrize(("dtype", "adapter"), [(torch.bfloat16, torch.float32), (torch.float64,) * 2])
def test_adapters_are_float32_or_wider(dtype: torch.dtype, adapter: torch.dtype) -> None:
    layer = layer_of(nn.Conv1d(2, 3, 3, dtype=dtype), lora_bias=True)
    assert {parameter.dtype for parameter in layer.adapters.parameters()} == {adapter}
    assert layer(torch.ones(1, 2, 3, dtype=dtype)).dtype is dtype


DILATED = {"dilation": 2}
CIRCULAR = {"padding": 1, "padding_mode": "circular"}


@pytest.mark.parametrize("options", [DILATED, CIRCULAR])
def test_pefts_layer_is_not_what_it_merges_to_and_ours_is(options: dict[str, Any]) -> None:
    base = nn.Conv1d(2, 3, 3, **options)
    fill_integers(base, 0)
    own = LowRank(array_of(integers(2, 2, 3, seed=1)), array_of(integers(3, 2, 1, seed=2)), 1.0)
    x = integers(4, 2, 9, seed=3)
    merged = nn.Conv1d(2, 3, 3, **options)
    merged.load_state_dict(base.state_dict())
    merged.weight.data = tensor_of(merge_convolution(array_of(base.weight), [own]))
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.Sequential(base))[0]
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = map(
        tensor_of, (own.A, own.B)
    )
    if options is DILATED:
        with pytest.raises(RuntimeError, match="size of tensor"):
            theirs(x)
    else:
        assert not torch.equal(theirs(x), merged(x))
    layer = LoraConvolution(theirs.base_layer)
    give(layer, [own], np.float32, "cpu")
    assert same_bits(layer(x), merged(x))
    theirs.merge()
    assert same_bits(theirs(x), merged(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_dropout_is_the_seeds_mask_on_every_copy_of_a_number(device: str, mode: str) -> None:
    base = nn.Conv1d(2, 4, 3, padding=2, padding_mode=mode, groups=2, dtype=torch.float64, device=device)
    fill_integers(base, 0)
    layer = filled(layer_of(base, alpha=1.0, dropout=0.5))
    x = integers(3, 2, 6, seed=5).double().to(device).requires_grad_()
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    dropout = drawn_dropout(0.5)
    assert dropout is not None
    mask = array_of(dropout.mask(x, x.shape) * dropout.factor)
    assert set(np.unique(mask)) == {0.0, 2.0}
    update = layer.update()
    own = LowRank(array_of(update.lora_A), array_of(update.lora_B), update.scaling, dropout=mask)
    geometry = Convolution(padding=2, padding_mode=mode, groups=2)  # type: ignore[arg-type]
    arrays = array_of(x), array_of(base.weight), [own]
    assert np.array_equal(
        array_of(y), convolution_forward(*arrays, bias=array_of(base.bias), geometry=geometry)
    )
    dy = integers(*y.shape, seed=6).double().to(device)
    dx, dA, dB = torch.autograd.grad(y, (x, update.lora_A, update.lora_B), dy)
    expected = convolution_backward(array_of(dy), *arrays, geometry=geometry)
    assert np.array_equal(array_of(dx), expected.dx)
    assert np.array_equal(array_of(dA), expected.adapters[0].dA)
    assert np.array_equal(array_of(dB), expected.adapters[0].dB)
    layer.eval()
    assert same_bits(layer(x), layer(x))
    assert not same_bits(layer(x), y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_dropout(reentrant: bool) -> None:
    layer = layer_of(dropout=0.5)
    results = []
    for wrapped in (False, True):
        x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        y.sum().backward()
        results.append((y, x.grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_neither_masks_nor_masked_inputs_are_kept() -> None:
    layer = layer_of(nn.Conv2d(4, 3, 3, padding=1), dropout=0.5)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    of_input_size = [tensor for tensor in kept if tensor.shape == x.shape]
    assert [tensor.data_ptr() for tensor in of_input_size] == [x.data_ptr()]


@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("A", "B"), ("x", "B")])
def test_only_the_gradients_asked_for_are_computed_and_only_their_operands_kept(
    wanted: tuple[str, ...],
) -> None:
    base = nn.Conv2d(2, 3, 3).requires_grad_(False)
    inputs = {"x": torch.randn(2, 2, 5, 5), "A": torch.randn(2, 2, 3, 3), "B": torch.randn(3, 2, 1, 1)}

    def outcome(names: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor]:
        own = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
        term = ConvolutionTerm(own["A"], own["B"], 0.7)
        y = lora_convolution(own["x"], base.weight, base.bias, [term], Geometry.of(base))
        y.sum().backward(retain_graph=True)
        return own, y

    everything, _ = outcome(("x", "A", "B"))
    own, y = outcome(wanted)
    # x, W0, mask, A, B, h
    kept = [tensor is not None for tensor in y.grad_fn.saved_tensors]  # type: ignore[union-attr]
    need_x, need_A, need_B = (name in wanted for name in ("x", "A", "B"))
    assert kept == [need_A, need_x, False, need_x or need_A, True, need_B]
    for name, tensor in own.items():
        if name in wanted:
            assert same_bits(tensor.grad, everything[name].grad)
        else:
            assert tensor.grad is None


def test_layouts_and_a_missing_batch_do_not_matter() -> None:
    layer = filled(layer_of(nn.Conv2d(4, 6, 3, groups=2, bias=False), alpha=1.0))
    fill_integers(layer.base_layer, 1)
    x = integers(3, 4, 5, 6, seed=4)
    y = layer(x)
    assert same_bits(layer(x.to(memory_format=torch.channels_last)).contiguous(), y)
    assert same_bits(layer(x[1]), y[1])
    dy = integers(*y.shape, seed=5)
    own = layer.update().lora_A, layer.update().lora_B
    expected = torch.autograd.grad(y, own, dy)
    last = layer(x.to(memory_format=torch.channels_last))
    got = torch.autograd.grad(last, own, dy.to(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    each = [torch.autograd.grad(layer(row), own, d) for row, d in zip(x, dy, strict=True)]
    assert all(torch.equal(sum(parts), b) for parts, b in zip(zip(*each, strict=True), expected, strict=True))
    assert layer(x[:0]).shape == (0, *y.shape[1:])


def test_a_bias_beside_the_update_needs_no_bias_of_the_base() -> None:
    layer = filled(layer_of(nn.Conv1d(2, 3, 2, bias=False), alpha=1.0, lora_bias=True))
    fill_integers(layer.base_layer, 2)
    x = integers(2, 2, 4, seed=4)
    y = layer(x)
    arrays = layer.merged_arrays(("default",), "layer")
    assert np.array_equal(arrays["bias"], 0.5 * array_of(layer.update().lora_bias))
    layer.set_merged({name: tensor_of(array) for name, array in arrays.items()})
    assert same_bits(layer(x), y)
    layer.restore_base()
    assert layer.base_layer.bias is None


def test_wrong_operands_are_refused() -> None:
    layer = layer_of()
    with pytest.raises(ShapeError, match=r"x: expected shape \(N, 2, size, size\) .*, got \(1, 3, 5, 5\)"):
        layer(torch.ones(1, 3, 5, 5))
    with pytest.raises(ShapeError, match=r"got \(5, 5\)"):
        layer(torch.ones(5, 5))
    with pytest.raises(DTypeError, match=r"x: expected W0's torch\.float32, got torch\.bfloat16"):
        layer(torch.ones(1, 2, 5, 5, dtype=torch.bfloat16))
    layer.base_layer.weight.requires_grad_()
    with pytest.raises(TargetError, match="W0: expected a frozen weight"):
        layer(torch.ones(1, 2, 5, 5))


def test_differentiating_twice_is_refused() -> None:
    layer = layer_of()
    y = layer(torch.ones(1, 2, 5, 5))
    with pytest.raises(ConfigError, match=r"create_graph: expected False, got True; .* once only"):
        torch.autograd.grad(y.sum(), layer.update().lora_A, create_graph=True)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())


def test_other_layers_and_starts_are_refused() -> None:
    message = "; leave it out of the targets"
    bases = {"ConvTranspose1d": nn.ConvTranspose1d(2, 3, 2), "Standardized": Standardized(2, 3, 3)}
    for name, base in bases.items():
        refused(
            lambda base=base: LoraConvolution(base, "stem"),
            TargetError,
            f"stem: expected nn.Conv1d, Conv2d or Conv3d and its own forward, got {name}{message}",
        )
    layer = LoraConvolution(nn.Conv1d(2, 3, 2))
    refused(
        lambda: layer.add_adapter("default", UpdateOptions(2, 2, init="pissa")),
        ConfigError,
        "init_lora_weights: expected True, False or 'gaussian' for a convolution, got 'pissa'; choose one of "
        "them, or leave the layer out of the targets",
    )
    assert not layer.adapters


def test_under_compile_it_is_the_same_layer() -> None:
    layer = layer_of(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 2, 5, 5)
    assert same_bits(compiled(x), layer(x))


def test_merge_is_the_references_and_unmerge_restores_the_bits_however_often() -> None:
    model = Convolutions()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    paths = inject(model, replace(CONFIG, lora_bias=True))
    assert paths == ("one", "two", "three")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    weights = {path: layer.weight for path, layer in lora_layers(model).items()}
    bits = {path: weight.clone() for path, weight in weights.items()}
    for _ in range(3):
        assert merge(model) == paths
        for path, layer in lora_layers(model).items():
            expected = merge_convolution(array_of(bits[path]), [layer.low_rank("default")])  # type: ignore[attr-defined]
            assert same_bits(layer.weight, tensor_of(expected))
            assert not same_bits(layer.weight, bits[path])
        assert unmerge(model) == paths
        for path, layer in lora_layers(model).items():
            assert layer.weight is weights[path]
            assert same_bits(layer.weight, bits[path])
    assert model.three.base_layer.bias is None  # type: ignore[union-attr]


def test_the_state_holds_each_parameter_once() -> None:
    layer = layer_of()
    names = {"base_layer.weight", "base_layer.bias", "adapters.default.lora_A", "adapters.default.lora_B"}
    assert set(layer.state_dict()) == names


def test_files_are_those_of_peft_both_ways(tmp_path: Path) -> None:
    model = Convolutions()
    inject(model, CONFIG)
    filled(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Convolutions(), str(tmp_path / "ours"))
    x = integers(2, 4, 4, 4, seed=8)
    assert same_bits(theirs(x), model(x))
    assert not same_bits(theirs(x), Convolutions()(x))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    other = Convolutions()
    assert load_adapter(other, tmp_path / "theirs") == ("one", "two", "three")
    assert same_bits(other(x), model(x))
    assert adapter_of(other).config == read_adapter(tmp_path / "theirs").config
    assert eject(other) == ("one", "two", "three")
    assert same_bits(other(x), Convolutions()(x))


def test_pefts_adapter_of_a_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    def grouped() -> Any:
        return nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))

    config = peft.LoraConfig(r=2, target_modules=["0"])
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = peft.get_peft_model(grouped(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ShapeError, match=r"0\.lora_B\.weight: \(6, 1, 1\) is of a convolution in 2 groups"):
        load_adapter(grouped(), tmp_path / "theirs")
    model = grouped()
    inject(model, LoraConfig(r=2, target_modules=("0",), task_type=None))
    filled(model)
    save_adapter(model, tmp_path / "ours")
    other = grouped()
    other[0].load_state_dict(model[0].base_layer.state_dict())
    load_adapter(other, tmp_path / "ours")
    x = torch.randn(2, 4, 5)
    assert same_bits(other(x), model(x))


def test_an_adapter_of_another_shape_is_refused() -> None:
    model = Convolutions()
    inject(model, CONFIG)
    adapter = adapter_of(model)
    other = Convolutions()
    other.two = nn.Conv2d(2, 3, 3)
    with pytest.raises(
        TargetError, match=r"two\.lora_A: expected shape \(2, 2, 3, 3\) for this Conv2d, got \(2, 2, 3, 2\)"
    ):
        load_adapter(other, adapter)
    assert not lora_layers(other)
