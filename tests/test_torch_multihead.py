"""`LoraMultiheadAttention`: every way in which torch calls its attention, where PEFT differs, and files."""

import copy
from collections.abc import Callable, Iterable
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
from torch_modes import DEVICES

from loracle.files import LoraConfig, read_adapter
from loracle.reference import ConfigError, NonFiniteError, ShapeError, TargetError, merge_adapters, merge_bias
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
from loracle.torch_impl.encoder_layer import LoraReadLinear
from loracle.torch_impl.multihead import LoraMultiheadAttention, LoraProjection

CONFIG = LoraConfig(r=2, lora_alpha=2, target_modules=("attention",), init_lora_weights=False, task_type=None)
PATHS = ("attention", "attention.out_proj")
WEIGHTS = "adapter_model.safetensors"


class Attended(nn.Module):
    """An attention layer of integers, called with whatever options are given."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.attention = nn.MultiheadAttention(8, 2, **options)
        fill_integers(self, seed)

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        """What the attention layer returns."""
        return self.attention(*args, **kwargs)


def quartered(parameters: Iterable[Tensor], seed: int = 0) -> None:
    """Set parameters to multiples of a quarter so small that W0 + delta is exact, merged and unmerged."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator) / 4)


def adapted(config: LoraConfig = CONFIG, device: str = "cpu", **options: Any) -> Any:
    """The model with an adapter, and its merged twin: both compute with the very same numbers."""
    model = Attended(**options).to(device)
    inject(model, config)
    quartered(model.parameters())
    return model, merged_twin(model)


def merged_twin(model: nn.Module) -> Any:
    """A copy of the model with its adapters merged for good."""
    twin = copy.deepcopy(model)
    merge_and_unload(twin)
    # torch's choice of kernels depends on it.
    twin.requires_grad_(torch.is_grad_enabled())
    for parameter in twin.parameters():
        # NumPy's memory may begin where torch's does not, and BLAS then adds up in another order.
        parameter.data = parameter.data.clone()
    return twin


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masked(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


X, KEYS = normal(5, 2, 8), normal(4, 2, 8, seed=4)
PADDING = masked("...xx", ".....")
CAUSAL = torch.triu(torch.ones(5, 5), 1).bool()
FLOATING = normal(5, 5, seed=6)

CALLS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "self-attention": ({}, (X, X, X), {}),
    "cross-attention": ({}, (X, KEYS, KEYS), {}),
    "three inputs": ({}, (X, KEYS, normal(4, 2, 8, seed=5)), {}),
    "batch first": ({"batch_first": True}, (X, X, X), {}),
    "unbatched": ({}, (X[:, 0], KEYS[:, 0], KEYS[:, 0]), {}),
    "padding": ({}, (X, X, X), {"key_padding_mask": PADDING}),
    "padding, batch first": (
        {"batch_first": True},
        (X.transpose(0, 1),) * 3,
        {"key_padding_mask": PADDING, "need_weights": False},
    ),
    "mask": ({}, (X, X, X), {"attn_mask": CAUSAL}),
    "additive mask": ({}, (X, X, X), {"attn_mask": FLOATING, "need_weights": False}),
    "mask and padding": ({}, (X, X, X), {"attn_mask": CAUSAL, "key_padding_mask": PADDING}),
    "a mask for each head": ({}, (X, X, X), {"attn_mask": normal(4, 5, 5)}),
    "causal": ({}, (X, X, X), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "no weights": ({}, (X, X, X), {"need_weights": False}),
    "weights of each head": ({}, (X, X, X), {"average_attn_weights": False}),
    "no bias": ({"bias": False}, (X, X, X), {}),
    "bias of key and value": ({"add_bias_kv": True}, (X, KEYS, KEYS), {}),
    "a zero attended to": ({"add_zero_attn": True}, (X, KEYS, KEYS), {}),
    "dropout": ({"dropout": 0.5}, (X, X, X), {"need_weights": False}),
}


def same(left: Tensor | None, right: Tensor | None) -> bool:
    """The same bits, or nothing twice."""
    return left is right if left is None or right is None else same_bits(left, right)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_every_option_computes_what_the_merged_layer_does(
    name: str, training: bool, gradients: bool, device: str
) -> None:
    options, inputs, keywords = CALLS[name]
    with torch.set_grad_enabled(gradients):
        model, twin = adapted(device=device, **options)
    plain = Attended(**options).to(device)
    model.train(training), twin.train(training)
    keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    first = inputs[0].to(device)
    inputs = tuple(first if tensor is inputs[0] else tensor.to(device) for tensor in inputs)
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(1)
        y, weights = model(*inputs, **keywords)
        torch.manual_seed(1)
        expected, their_weights = twin(*inputs, **keywords)
        torch.manual_seed(1)
        other, _ = plain.train(training)(*inputs, **keywords)
    assert y.requires_grad is gradients
    assert same(y, expected)
    assert same(weights, their_weights)
    assert not same(y, other)


class Encoder(nn.Module):
    """Two of torch's encoder layers, which in evaluation read the attention's weights themselves."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        quartered(self.parameters())

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map (N, T, 8) to (N, T, 8)."""
        result: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return result


def times_called(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], int]:
    """Count the calls of one of torch's fast paths."""
    calls, right = [], getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args: calls.append(name) or right(*args))
    return lambda: len(calls)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_does_not_pass_the_updates_by(
    monkeypatch: pytest.MonkeyPatch, training: bool, gradients: bool, padded: bool, device: str
) -> None:
    model = Encoder().to(device)
    config = LoraConfig(r=2, target_modules=("self_attn",), init_lora_weights=False, task_type=None)
    inject(model, config)
    quartered(p for layer in lora_layers(model).values() for p in layer.adapters.parameters())
    with torch.set_grad_enabled(gradients):
        twin, plain = merged_twin(model), Encoder().to(device)
    for each in (model, twin, plain):
        each.train(training)
    x = normal(2, 5, 8).to(device)
    padding = PADDING.to(device) if padded else None
    count = times_called(monkeypatch, "_transformer_encoder_layer_fwd")
    with torch.set_grad_enabled(gradients):
        y = model(x, padding)
        assert count() == (0 if training or gradients else 2)
        expected, other = twin(x, padding), plain(x, padding)
    counts = ~PADDING if padded else torch.ones(2, 5, dtype=torch.bool)
    assert same(y[counts.to(device)], expected[counts.to(device)])
    assert not same(y[counts.to(device)], other[counts.to(device)])
    if gradients:
        y.sum().backward()
        own = [p for layer in lora_layers(model).values() for p in layer.adapters.parameters()]
        assert len(own) == 8
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in own)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_does_not_pass_linear_layers_by(
    monkeypatch: pytest.MonkeyPatch, gradients: bool, padded: bool, device: str
) -> None:
    """In evaluation it computes what it does where a hook on each layer keeps torch from its fast path."""
    model, plain = Encoder().to(device).eval(), Encoder().to(device).eval()
    config = LoraConfig(r=2, target_modules=("linear1", "linear2"), init_lora_weights=False, task_type=None)
    assert len(inject(model, config)) == 4
    assert all(type(layer) is LoraReadLinear for layer in lora_layers(model).values())
    x, padding = normal(2, 5, 8).to(device), PADDING.to(device) if padded else None
    hooked = copy.deepcopy(model)
    hooked.encoder.use_nested_tensor = False
    for layer in hooked.encoder.layers:
        layer.register_forward_pre_hook(lambda *_: None)
        layer.linear1.__class__ = layer.linear2.__class__ = LoraLinear
    count = times_called(monkeypatch, "_transformer_encoder_layer_fwd")
    with torch.set_grad_enabled(gradients):
        y, expected = model(x, padding), hooked(x, padding)
        assert count() == 0
        assert same(y, expected)
        counts = (~PADDING if padded else torch.ones(2, 5, dtype=torch.bool)).to(device)
        assert not torch.allclose(y[counts], plain(x, padding)[counts], atol=0.1)
        calls = count()
        merge(model)
        model(x, padding)
        assert count() == calls + 2
        unmerge(model)
        assert same(model(x, padding), y)
    assert all(same_bits(layer.base_weight, layer.base_layer.weight) for layer in lora_layers(model).values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_where_a_linear_layer_is_adapted() -> None:
    model = Encoder().eval()
    inject(model, LoraConfig(r=2, target_modules=("layers.1.linear1",), task_type=None))
    with torch.no_grad():
        refused(
            lambda: model(X.transpose(0, 1), PADDING),
            ShapeError,
            "x: expected a padded tensor, got a nested one; build nn.TransformerEncoder with "
            "enable_nested_tensor=False, or adapt its first layer too",
        )


def test_torchs_attention_takes_its_fast_path_with_the_updated_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = times_called(monkeypatch, "_native_multi_head_attention")
    with torch.no_grad():
        model, twin = adapted(batch_first=True)
        model.eval(), twin.eval()
        y = model(X, X, X)[0]
    assert count() == 1
    assert same(y, twin(X, X, X)[0])


def test_the_modules_attributes_are_there() -> None:
    model, twin = adapted()
    wrapper = model.attention
    for name in ("embed_dim", "num_heads", "head_dim", "batch_first", "kdim", "vdim", "bias_k", "dropout"):
        assert getattr(wrapper, name) == getattr(twin.attention, name)
    assert same(wrapper.in_proj_weight, twin.attention.in_proj_weight)
    assert same(wrapper.out_proj.weight, twin.attention.out_proj.weight)
    assert wrapper.in_proj_bias is wrapper.base_layer.in_proj_bias
    with pytest.raises(AttributeError, match="nothing_such"):
        wrapper.nothing_such  # noqa: B018
    with pytest.raises(NotImplementedError, match="read by its module"):
        wrapper.out_proj(X)


def test_pefts_out_proj_gets_the_update_twice_and_ours_once() -> None:
    model = Attended()
    theirs: Any = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attention"]), Attended()
    )
    inject(model, CONFIG)
    for at, path in enumerate(PATHS):
        update = lora_layers(model)[path].update()
        fill_integers(update, at)
        layer = theirs.attention if path == "attention" else theirs.attention.base_layer.out_proj
        layer.lora_A["default"].weight.data = update.lora_A.data.clone()
        layer.lora_B["default"].weight.data = update.lora_B.data.clone()
    x = torch.randint(-2, 3, (1, 3, 8), generator=torch.Generator().manual_seed(1)).float()
    # One key: the output is out_proj of value, exactly.
    delta_in, delta_out = (
        layer.update().lora_B @ layer.update().lora_A for layer in lora_layers(model).values()
    )
    base = model.attention.base_layer
    value = x @ (base.in_proj_weight + delta_in)[16:].T + base.in_proj_bias[16:]
    once, twice = (
        value @ (base.out_proj.weight + times * delta_out).T + base.out_proj.bias for times in (1, 2)
    )
    assert torch.equal(model(x, x, x)[0], once)
    assert torch.equal(theirs(x, x, x)[0], twice)
    assert not torch.equal(once, twice)


@pytest.mark.parametrize(
    "targets", [("attention",), ("attention", "out_proj"), ("attention", "attention.out_proj")]
)
def test_one_target_or_two_adapt_both_projections_once(targets: tuple[str, ...]) -> None:
    model = Attended()
    assert inject(model, LoraConfig(r=2, target_modules=targets, task_type=None)) == PATHS
    assert tuple(lora_layers(model)) == PATHS
    assert all(isinstance(layer, LoraProjection) for layer in lora_layers(model).values())
    assert {layer.update().lora_A.shape for layer in lora_layers(model).values()} == {(2, 8)}
    assert [layer.update().lora_B.shape for layer in lora_layers(model).values()] == [(24, 2), (8, 2)]
    prefix = "attention.lora_weights"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{prefix}.{name}.adapters.default.lora_{part}"
        for name in ("in_proj_weight", "weight")
        for part in "AB"
    }
    names = [name for name in model.state_dict() if "adapters" not in name]
    base = "attention.base_layer"
    assert names == [
        f"{base}.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_an_error_in_the_call_leave_the_module_as_it_was(reentrant: bool) -> None:
    model, _ = adapted()
    base = model.attention.base_layer
    before = {name: id(parameter) for name, parameter in base.named_parameters()}
    x = X.clone().requires_grad_()
    results = []
    for wrapped in (False, True):
        model.zero_grad()
        y = (
            checkpoint(lambda t: model(t, t, t)[0], x, use_reentrant=reentrant)
            if wrapped
            else model(x, x, x)[0]
        )
        y.sum().backward()
        results.append((y, *[p.grad for p in model.parameters() if p.requires_grad]))
        assert {name: id(parameter) for name, parameter in base.named_parameters()} == before
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(AssertionError):
        model(X[..., :4], X[..., :4], X[..., :4])
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_is_the_references_and_unmerge_restores_the_bits_however_often(
    dtype: torch.dtype, bias: bool
) -> None:
    model = Attended(bias=bias).to(dtype)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=("attention",), lora_bias=True, task_type=None)
    inject(model, config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    names = {"attention": ("in_proj_weight", "in_proj_bias"), "attention.out_proj": ("weight", "bias")}
    own = {
        (path, name): getattr(layer.base_layer, name)
        for path, layer in lora_layers(model).items()
        for name in names[path]
    }
    bits = {key: None if tensor is None else tensor.clone() for key, tensor in own.items()}
    for _ in range(3):
        assert merge(model) == PATHS
        for path, layer in lora_layers(model).items():
            assert isinstance(layer, LoraProjection)
            adapters = [layer.low_rank("default")]
            weight, bias_name = names[path]
            expected = merge_adapters(array_of(bits[path, weight]), adapters)
            assert same_bits(getattr(layer.base_layer, weight), tensor_of(expected))
            start = bits[path, bias_name]
            zeros = torch.zeros(len(expected), dtype=dtype)
            expected = merge_bias(array_of(zeros if start is None else start), adapters)
            assert same_bits(getattr(layer.base_layer, bias_name), tensor_of(expected))
        assert unmerge(model) == PATHS
        for (path, name), tensor in own.items():
            now = getattr(lora_layers(model)[path].base_layer, name)
            assert now is tensor
            assert now is None or same_bits(now, bits[path, name])


def test_an_error_in_the_second_projection_leaves_both_as_they_were() -> None:
    model, _ = adapted()
    lora_layers(model)["attention.out_proj"].update().lora_A.data[0, 0] = float("nan")
    weight = model.attention.base_layer.in_proj_weight
    with pytest.raises(NonFiniteError, match=r"attention\.out_proj\.weight"):
        merge(model)
    assert model.attention.base_layer.in_proj_weight is weight
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_a_bias_of_lora_b_counts_with_and_without_one_of_the_base() -> None:
    config = LoraConfig(r=2, target_modules=("attention",), lora_bias=True, task_type=None)
    for bias in (True, False):
        model, twin = adapted(config, bias=bias)
        assert same(model(X, X, X)[0], twin(X, X, X)[0])
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.update().lora_bias.zero_()  # type: ignore[union-attr]
        assert not same(model(X, X, X)[0], twin(X, X, X)[0])
        assert (model.attention.base_layer.in_proj_bias is None) is not bias


def test_several_adapters_add_up_and_may_be_switched_off() -> None:
    model = Attended()
    quartered(model.parameters())
    plain = copy.deepcopy(model)
    inject(model, CONFIG, "one")
    inject(model, CONFIG, "two")
    x = X.round()
    two = model(x, x, x)[0]
    set_adapter(model, ("one", "two"))
    quartered(p for layer in lora_layers(model).values() for p in layer.adapters.parameters())
    twin = merged_twin(model)
    assert same(model(x, x, x)[0], twin(x, x, x)[0])
    assert not same(model(x, x, x)[0], two)
    with disable_adapter(model):
        assert same_bits(model(x, x, x)[0], plain(x, x, x)[0])
    assert eject(model, "two") == ()
    assert eject(model, "one") == PATHS
    assert type(model.attention) is nn.MultiheadAttention
    assert type(model.attention.out_proj) is type(plain.attention.out_proj)
    assert same_bits(model(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:.*has no bias", "ignore:.*have invalid shape")
def test_files_are_those_of_peft_both_ways(tmp_path: Path) -> None:
    model, _ = adapted(
        LoraConfig(r=2, target_modules=("attention",), lora_bias=True, bias="lora_only", task_type=None)
    )
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Attended(), str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    other = Attended()
    with torch.no_grad():
        for own, parameter in zip(other.parameters(), model.attention.base_layer.parameters(), strict=True):
            own.copy_(parameter)
    assert load_adapter(other, tmp_path / "theirs") == PATHS
    assert torch.equal(other.attention.in_proj_weight, model.attention.in_proj_weight)
    assert torch.equal(other.attention.out_proj.weight, model.attention.out_proj.weight)
    assert adapter_of(other).config == read_adapter(tmp_path / "theirs").config
    for path, pair in adapter_of(other).pairs.items():
        assert np.array_equal(pair.A, adapter_of(model).pairs[path].A)
    assert set(adapter_of(other).tensors) == {"attention.out_proj.bias"}


def test_a_file_without_one_of_the_two_is_refused() -> None:
    model, _ = adapted()
    adapter = adapter_of(model)
    half = replace(adapter, pairs={"attention": adapter.pairs["attention"]})
    with pytest.raises(TargetError, match=r"attention\.out_proj: expected lora_A and lora_B for this target"):
        load_adapter(Attended(), half)


def test_what_the_layer_cannot_do_is_refused_by_name() -> None:
    def call(**changes: Any) -> Callable[[], object]:
        options = {"r": 2, "target_modules": ("attention",), "task_type": None, **changes}
        return lambda: inject(Attended(), LoraConfig(**options))

    refused(
        call(lora_dropout=0.1),
        ConfigError,
        "lora_dropout: expected 0 for nn.MultiheadAttention, whose projections' inputs no layer sees, "
        "got 0.1; leave it out of the targets, or train without dropout",
    )
    refused(
        call(use_dora=True),
        ConfigError,
        "use_dora: expected False for nn.MultiheadAttention, got True; it has no magnitude",
    )
    refused(
        call(rank_pattern={"attention": 4}),
        ConfigError,
        "rank_pattern: expected one value for attention and attention.out_proj, which PEFT adapts together, "
        r"got 4 and 2; use a pattern for both, as in attention(\.out_proj)?",
    )
    assert call(rank_pattern={r"attention(\.out_proj)?": 4})() == PATHS
    apart = Attended(kdim=4)
    refused(
        lambda: inject(apart, CONFIG),
        TargetError,
        "attention: expected keys and values of the queries' 8 features, got kdim 4 and vdim 8; such "
        "projections are apart, and PEFT's format has no place for their updates: leave it out "
        "of the targets",
    )
    assert type(apart.attention) is nn.MultiheadAttention


class Other(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


def test_other_modules_and_shared_ones_are_refused() -> None:
    refused(
        lambda: LoraMultiheadAttention(Other(4, 2), "stem"),
        TargetError,
        "stem: expected nn.MultiheadAttention and its own forward, got Other; leave it out of the targets",
    )
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    refused(
        lambda: inject(model, LoraConfig(target_modules=("a",))),
        TargetError,
        "a.in_proj_weight: expected a parameter of its own, got one that b has too; an update of it would "
        "count in one of them: leave it out of the targets",
    )


def test_under_compile_it_is_the_same_layer() -> None:
    model, _ = adapted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert same_bits(compiled(X, X, X)[0], model(X, X, X)[0])
