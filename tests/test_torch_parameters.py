"""Stacked parameters: in transformers' mixtures, whatever multiplies by them, and in files."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from refusal import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_fixtures import same_bits
from torch_modes import DEVICES
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loracle.files import LoraConfig
from loracle.reference import (
    ConfigError,
    ShapeError,
    TargetError,
    expert_factors_from_peft,
    gamma,
    merge_experts,
    unit_roundoff,
)
from loracle.reference import merge as merge_matrix
from loracle.torch_impl import (
    LoraLinear,
    adapter_of,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    lora_layers,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unmerge,
)
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.parameters import LoraParameter, LoraParameters
from loracle.torch_impl.update import UpdateOptions

WEIGHTS = "adapter_model.safetensors"
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


def qwen() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, mlp_only_layers=[0])
    )


def gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, pad_token_id=0))


MODELS: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "qwen": qwen, "gpt-oss": gpt_oss}
EXPERTS = ("experts.gate_up_proj", "down_proj")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
IDS = torch.arange(12).view(2, 6)
INPUTS = torch.tensor([[1.0, -2.0, 0.0, 1.0], [2.0, 0.0, -1.0, 1.0], [0.0, 1.0, 1.0, -1.0]])


def config(*parameters: str, **options: Any) -> LoraConfig:
    names = parameters or EXPERTS
    return LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_parameters": names, "target_modules": (), **options}
    )


def model_of(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def coarse(parameters: Iterable[Tensor]) -> None:
    """Set parameters to small multiples of a quarter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator) / 4)


def adapted(name: str, settings: LoraConfig | None = None) -> Any:
    """The model with an adapter, its numbers and those it adds to so coarse that W0 + delta is exact."""
    model = model_of(name)
    inject(model, config() if settings is None else settings)
    for layer in lora_layers(model).values():
        coarse([layer.base_weight, *layer.adapters.parameters()])
    return model


def merged_twin(model: nn.Module) -> Any:
    """A copy of the model with its adapters merged for good; its weights train."""
    twin = copy.deepcopy(model)
    merge_and_unload(twin)
    for parameter in twin.parameters():
        # NumPy's memory may begin where torch's does not, and BLAS then adds up in another order.
        parameter.data = parameter.data.clone()
    return twin


class Stack(nn.Module):
    """Stacked parameters, one more matrix, and a layer among them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.ones(5))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        """Map (N, 4) to (N, 4)."""
        if fail:
            raise ZeroDivisionError
        result: Tensor = torch.einsum("eoi,ni->no", self.up, self.inner(x)) * self.scale @ self.down.T
        return result


class WithStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Stack()
        coarse(self.experts.parameters())
        self.list = nn.ParameterList([torch.ones(2, 2)])
        self.top = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.experts(x)
        return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_implementation_sees_the_updated_weights(name: str, implementation: str, device: str) -> None:
    """The same logits to the bit, and the gradients that follow from those of the merged weights."""
    model = adapted(name).to(device)
    twin = merged_twin(model)
    for full in lora_layers(model):
        twin.get_parameter(full).requires_grad_()
    for each in (model, twin):
        each.set_experts_implementation(implementation)
    ids = IDS.to(device)
    logits, expected = model(ids).logits, twin(ids).logits
    assert same_bits(logits, expected)
    with disable_adapter(model):
        assert not torch.equal(model(ids).logits, expected)
    for each in (logits, expected):
        each.square().sum().backward()
    for full, layer in lora_layers(model).items():
        assert isinstance(layer, LoraParameter)
        own, experts = layer.update(), layer.shape.experts
        dW = array_of(twin.get_parameter(full).grad).astype(np.float64)
        dW = dW.swapaxes(1, 2) if layer.shape.turned else dW
        A, B = (array_of(tensor).astype(np.float64) for tensor in (own.lora_A, own.lora_B))
        A, B = (factor.swapaxes(1, 2) for factor in expert_factors_from_peft(A, B, experts))
        assert own.lora_A.grad is not None
        assert own.lora_B.grad is not None
        dA, dB = expert_factors_from_peft(array_of(own.lora_A.grad), array_of(own.lora_B.grad), experts)
        # dA = scaling B^T dW and dB = scaling dW A^T; a sum of as many products, and three roundings more.
        for got, left, right in ((dA, B, dW), (dB, dW, A)):
            bound = (
                gamma(left.shape[2] + 3, unit_roundoff(np.float32))
                * own.scaling
                * (np.abs(left) @ np.abs(right))
            )
            assert (np.abs(got - own.scaling * (left @ right)) <= bound).all(), full
    assert all(p.grad is None for n, p in model.named_parameters() if "base_layer" in n)


def test_the_paths_are_the_parameters_names_and_each_is_there_once() -> None:
    model = adapted("mixtral", config("down_proj", "experts.gate_up_proj", "gate.weight"))
    paths = tuple(
        f"model.layers.{n}.mlp.{name}"
        for n in (0, 1)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    )
    assert tuple(lora_layers(model)) == paths
    assert tuple(adapter_of(model).pairs) == paths
    shapes = [
        (layer.update().lora_A.shape, layer.update().lora_B.shape) for layer in lora_layers(model).values()
    ]
    assert shapes[:3] == [((2, 16), (3, 2)), ((6, 16), (48, 6)), ((6, 24), (16, 6))]
    base = model_of("mixtral")
    names = {name.replace(".base_layer", "") for name in model.state_dict() if "lora_weights" not in name}
    assert names == set(base.state_dict())
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 12
    assert isinstance(model.model.layers[0].mlp.experts, LoraParameters)


def test_a_stack_stored_in_out_has_pefts_axes() -> None:
    model = adapted("gpt-oss", config("experts.gate_up_proj"))
    layer = lora_layers(model)["model.layers.0.mlp.experts.gate_up_proj"]
    theirs = peft.get_peft_model(
        model_of("gpt-oss"),
        peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]),
    )
    own: Any = theirs.base_model.model.model.layers[0].mlp.experts
    assert layer.update().lora_A.shape == own.lora_A["default"].weight.shape == (6, 16)
    assert layer.update().lora_B.shape == own.lora_B["default"].weight.shape == (48, 6)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_start_is_that_of_peft(init: bool | str) -> None:
    options = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.up"], init_lora_weights=init
    )
    if init is False:
        model = WithStack()
        torch.manual_seed(7)
        layer: Any = peft.inject_adapter_in_model(options, model).experts
    else:
        layer = peft.inject_adapter_in_model(options, WithStack()).experts
        torch.manual_seed(7)
        layer.reset_lora_parameters("default", init)
    ours = LoraParameter(Stack(), "up").start(
        UpdateOptions(2, 2, init=init), torch.Generator().manual_seed(7)
    )
    assert same_bits(ours.lora_A, layer.lora_A["default"].weight)
    assert same_bits(ours.lora_B, layer.lora_B["default"].weight)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    model, base = model_of(name), model_of(name)
    inject(model, config())
    assert torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_merge_is_the_references_and_unmerge_restores_the_bits_however_often(
    name: str, dtype: torch.dtype
) -> None:
    model = adapted(name).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    own = {path: layer.base_weight for path, layer in lora_layers(model).items()}
    bits = {path: weight.clone() for path, weight in own.items()}
    for _ in range(3):
        assert merge(model) == tuple(own)
        for path, layer in lora_layers(model).items():
            assert isinstance(layer, LoraParameter)
            expected = merge_experts(
                array_of(bits[path]), [layer.low_rank("default")], fan_in_fan_out=name == "gpt-oss"
            )
            assert same_bits(layer.weight, tensor_of(expected))
            assert not same_bits(layer.weight, bits[path])
        assert unmerge(model) == tuple(own)
        for path, layer in lora_layers(model).items():
            assert layer.base_weight is own[path]
            assert same_bits(own[path], bits[path])


def test_a_routers_matrix_is_an_ordinary_case() -> None:
    model = adapted("mixtral", config("gate.weight"))
    layer = lora_layers(model)["model.layers.1.mlp.gate.weight"]
    assert isinstance(layer, LoraParameter)
    own = layer.update()
    W0 = layer.base_weight
    delta = own.scaling * own.lora_B @ own.lora_A
    assert torch.equal(layer.weight, W0.addmm(own.lora_B, own.lora_A, alpha=own.scaling))
    assert model.model.layers[1].mlp.gate.weight.shape == delta.shape
    assert torch.equal(model.model.layers[1].mlp.gate.weight, layer.weight)
    merge(model)
    arrays = map(array_of, (W0, own.lora_A, own.lora_B))
    assert same_bits(layer.weight, tensor_of(merge_matrix(*arrays, own.scaling)))


def test_several_adapters_add_up_each_on_parameters_of_its_own() -> None:
    model, base = WithStack(), WithStack()
    inject(model, config("up", init_lora_weights=False), "one")
    inject(model, config("experts.up", "down", init_lora_weights=False), "two")
    set_adapter(model, ("one", "two"))
    coarse(p for layer in lora_layers(model).values() for p in layer.adapters.parameters())
    x = INPUTS
    assert tuple(lora_layers(model)) == ("experts.up", "experts.down")
    wanted = {}
    for path, layer in lora_layers(model).items():
        assert isinstance(layer, LoraParameter)
        delta = torch.zeros_like(layer.base_weight)
        for update in layer.updates:
            experts = layer.shape.experts
            A = update.lora_A.view(experts, -1, layer.shape.inputs)
            B = update.lora_B.view(layer.shape.outputs, -1, experts).permute(2, 0, 1)
            delta += (update.scaling * B @ A).view_as(delta)
        wanted[path] = layer.base_weight + delta
    with torch.no_grad():
        base.experts.up.copy_(wanted["experts.up"])
        base.experts.down.copy_(wanted["experts.down"])
    assert torch.equal(model(x), base(x))
    with disable_adapter(model):
        assert same_bits(model(x), WithStack()(x))
    assert eject(model, "two") == ("experts.down",)
    set_adapter(model, "one")
    assert not torch.equal(model(x), WithStack()(x))
    assert eject(model) == ("experts.up", "experts.down")
    assert type(model.experts) is Stack
    assert same_bits(model(x), WithStack()(x))


def test_a_layer_inside_may_be_adapted_too() -> None:
    both = config("up", "down", target_modules=("inner",), init_lora_weights=False, task_type=None)
    model = WithStack()
    paths = ("experts.inner", "experts.up", "experts.down")
    assert inject(model, both) == paths
    coarse(p for layer in lora_layers(model).values() for p in layer.adapters.parameters())
    assert set(lora_layers(model)) == set(paths)
    twin = merged_twin(model)
    assert type(twin.experts) is Stack
    assert type(twin.experts.inner) is nn.Linear
    x = INPUTS
    assert torch.equal(model(x), twin(x))
    assert not torch.equal(model(x), WithStack()(x))
    again = WithStack()
    assert load_adapter(again, adapter_of(model)) == paths
    assert same_bits(again(x), model(x))
    inject(model, both, "second")
    assert set(eject(model)) == set(paths)
    assert type(model.experts) is Stack
    assert type(model.experts.inner) is nn.Linear
    assert same_bits(model(x), WithStack()(x))


def test_a_later_adapter_finds_its_places_behind_an_earlier_ones_wrapper() -> None:
    model = WithStack()
    inject(model, config("down"), "one")
    inject(model, config("up", target_modules=("inner",), init_lora_weights=False, task_type=None), "two")
    assert set(lora_layers(model)) == {"experts.inner", "experts.up", "experts.down"}
    assert list(model.experts.lora_weights) == ["up", "down"]
    assert type(model.experts.base_layer.inner) is LoraLinear
    assert "inner" not in dict(model.experts.named_children())
    coarse(p for layer in lora_layers(model).values() for p in layer.adapters.parameters())
    assert torch.equal(model(INPUTS), merged_twin(model)(INPUTS))
    assert not torch.equal(model(INPUTS), WithStack()(INPUTS))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_leaves_the_weights_dtype_as_it_is(name: str) -> None:
    model = adapted(name)
    twin = merged_twin(model)
    for full, layer in lora_layers(model).items():
        twin.get_parameter(full).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same_bits(layer.weight, twin.get_parameter(full))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(model(IDS).logits, twin(IDS).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_an_error_in_the_call_leave_the_module_as_it_was(reentrant: bool) -> None:
    model = WithStack()
    inject(model, config("up", "down", init_lora_weights=False))
    base = model.experts.base_layer
    before = {name: id(parameter) for name, parameter in base.named_parameters()}
    x = torch.randn(3, 4, requires_grad=True)
    results = []
    for wrapped in (False, True):
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.sum().backward()
        results.append((y, *[p.grad for p in model.parameters() if p.requires_grad]))
        assert {name: id(parameter) for name, parameter in base.named_parameters()} == before
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ZeroDivisionError):
        model.experts(x, fail=True)
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == before


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for on in (False, True):
        model = adapted(name).train()
        if on:
            model.gradient_checkpointing_enable()
        model(IDS).logits.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_peft_both_ways(tmp_path: Path, name: str) -> None:
    model = adapted(name, config(target_modules=("q_proj",)))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of(name), str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    other = model_of(name)
    for path, layer in lora_layers(model).items():
        full = path if isinstance(layer, LoraParameter) else f"{path}.weight"
        other.get_parameter(full).data.copy_(layer.base_weight)
    paths = load_adapter(other, tmp_path / "theirs")
    assert set(paths) == set(lora_layers(model))
    assert same_bits(other(IDS).logits, model(IDS).logits)
    own = adapter_of(other)
    assert set(own.pairs) == set(lora_layers(model))
    save_adapter(other, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same_from_our_files(tmp_path: Path, name: str) -> None:
    model, theirs = adapted(name), model_of(name)
    for full, layer in lora_layers(model).items():
        theirs.get_parameter(full).data.copy_(layer.base_weight)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "ours"), is_trainable=True)
    assert same_bits(theirs(IDS).logits, model(IDS).logits)


def test_an_adapter_of_another_mixture_is_refused() -> None:
    adapter = adapter_of(adapted("mixtral"))
    torch.manual_seed(0)
    other = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    with pytest.raises(
        TargetError,
        match=r"gate_up_proj\.lora_A: expected shape \(8, 16\) for this MixtralExperts, got \(6, 16\)",
    ):
        load_adapter(other, adapter)
    assert not lora_layers(other)


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Stack(), Stack()
        self.two.up = self.one.up


REFUSED: dict[str, tuple[Callable[[], nn.Module], LoraConfig, type[Exception], str]] = {
    "no such": (
        WithStack,
        config("sideways"),
        TargetError,
        "target_parameters: expected names of a model's parameters, got 'sideways', which none matches; name "
        "the module and the parameter, as in mlp.experts.down_proj",
    ),
    "a vector": (
        WithStack,
        config("scale"),
        ShapeError,
        "scale: expected a parameter (out, in), or a stack of such, got shape (5,); leave it out of "
        "target_parameters",
    ),
    "the model's own": (
        WithStack,
        config("top"),
        TargetError,
        "top: expected a parameter of a module that the model calls, got one of WithStack; leave it out of "
        "target_parameters",
    ),
    "in a list": (
        WithStack,
        config("list.0"),
        TargetError,
        "list.0: expected a parameter of a module that the model calls, got one of ParameterList; leave it "
        "out of target_parameters",
    ),
    "bytes": (
        lambda: nn.Sequential(Bytes()),
        config("0.weight"),
        TargetError,
        "0.weight: expected float16, bfloat16, float32 or float64, got torch.int8; leave it out of "
        "target_parameters",
    ),
    "in two modules": (
        Twice,
        config("one.up"),
        TargetError,
        "one.up: expected a parameter of its own, got one that two has too; an update of it would count in "
        "one of them: leave it out of the targets",
    ),
    "twice": (
        WithStack,
        config("inner.weight", target_modules=("inner",)),
        TargetError,
        "experts.inner.weight: expected one target for it, got target_modules for experts.inner too; leave "
        "one of them out",
    ),
    "another start": (
        WithStack,
        config("up", init_lora_weights="pissa"),
        ConfigError,
        "init_lora_weights: expected True, False or 'gaussian' for a parameter, got 'pissa'; choose one of "
        "them, or leave the layer out of the targets",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_left_alone(name: str) -> None:
    make, settings, kind, message = REFUSED[name]
    model = make()
    before = {path: id(module) for path, module in model.named_modules()}
    refused(lambda: inject(model, settings), kind, message)
    assert {path: id(module) for path, module in model.named_modules()} == before


def test_a_module_is_adapted_in_one_way_by_all_adapters() -> None:
    model = WithStack()
    inject(model, config("inner.weight"), "one")
    message = (
        "experts.inner: expected the targets that other adapters have in this module, experts.inner.weight, "
        "got another; name the same, or eject() those"
    )
    refused(lambda: inject(model, LoraConfig(target_modules=("inner",)), "two"), TargetError, message)
    other = WithStack()
    inject(other, LoraConfig(target_modules=("inner",)), "one")
    message = (
        "experts.inner.weight: expected the targets that other adapters have in this module, experts.inner, "
        "got another; name the same, or eject() those"
    )
    refused(lambda: inject(other, config("inner.weight"), "two"), TargetError, message)
    assert tuple(lora_layers(other)) == ("experts.inner",)


def test_a_failed_second_adapter_leaves_the_first_alone() -> None:
    model = WithStack()
    inject(model, config("up"), "one")
    with pytest.raises(ConfigError, match="init_lora_weights"):
        inject(model, config("up", "down", init_lora_weights="pissa"), "two")
    assert tuple(lora_layers(model)) == ("experts.up",)
    assert list(lora_layers(model)["experts.up"].adapters) == ["one"]


def test_under_compile_it_is_the_same_module() -> None:
    model = WithStack()
    inject(model, config("up", "down", init_lora_weights=False))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    assert same_bits(compiled(x), model(x))
