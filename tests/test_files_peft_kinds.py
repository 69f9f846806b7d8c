"""Whatever PEFT writes for LoRA is read, and written back with the same bytes: a folder for each kind."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_fixtures import tiny_llama
from torch import nn

from loracle.files import LoraConfig, name_parameters, read_adapter, write_adapter
from loracle.reference import ConfigError, FileError, ShapeError, TargetError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"


class Layers(nn.Module):
    """A layer of each other type that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (3, 2))
        self.three = nn.Conv3d(4, 6, 2, bias=False)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm1d(4)


class Stack(nn.Module):
    """Three stacked parameters in one module, not in the order of their names, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 7, 5))
        self.gate = nn.Parameter(torch.zeros(3, 6, 5))
        self.down = nn.Parameter(torch.zeros(4, 9))
        self.inner = nn.Linear(5, 5)


class WithStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Stack()


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def tied() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def biased() -> Any:
    return tiny_llama(attention_bias=True)


@dataclass(frozen=True)
class Case:
    """A model, PEFT's options, and where the adapter's parts belong."""

    model: Callable[[], Any]
    options: dict[str, Any]
    kinds: dict[str, str] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)


EMBED, HEAD = "model.embed_tokens", "lm_head"
Q = {f"model.layers.{layer}.self_attn.q_proj": "linear" for layer in (0, 1)}
QUERY = {"r": 4, "target_modules": ["q_proj"]}
BIASES = tuple(f"{path}.bias" for path in Q)
ALL_BIASES = tuple(f"model.layers.{n}.self_attn.{x}_proj.bias" for n in (0, 1) for x in "kovq")
STACK = {"r": 2, "target_modules": [], "target_parameters": ["experts.up", "experts.gate", "down"]}

CASES = {
    "linear": Case(tiny_llama, QUERY, Q),
    "DoRA": Case(tiny_llama, {**QUERY, "use_dora": True}, Q),
    "bias of lora_B": Case(biased, {**QUERY, "lora_bias": True}, Q),
    "biases of adapted layers": Case(biased, {**QUERY, "bias": "lora_only"}, Q, BIASES),
    "all biases": Case(biased, {**QUERY, "bias": "all"}, Q, ALL_BIASES),
    "embedding": Case(
        tiny_llama, {"r": 4, "target_modules": ["embed_tokens"]}, {EMBED: "embedding"}, (f"{EMBED}.weight",)
    ),
    "embedding, DoRA": Case(
        tiny_llama,
        {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True},
        {EMBED: "embedding"},
        (f"{EMBED}.weight",),
    ),
    "tied embeddings, both adapted as one": Case(
        tied,
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {EMBED: "embedding", HEAD: "linear", **Q},
        (f"{HEAD}.weight", f"{EMBED}.weight"),
    ),
    "saved modules": Case(
        tiny_llama,
        {**QUERY, "modules_to_save": ["lm_head", "model.norm"]},
        Q,
        ("lm_head.weight", "model.norm.weight"),
    ),
    "tied embeddings, both saved as one": Case(
        tied,
        {**QUERY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        Q,
        (f"{HEAD}.weight", f"{EMBED}.weight"),
    ),
    "tokens": Case(tiny_llama, {**QUERY, "trainable_token_indices": [5, 1, 3]}, Q, (), {EMBED: 3}),
    "tokens of tied embeddings": Case(
        tied, {**QUERY, "trainable_token_indices": {"embed_tokens": [2], "lm_head": [2]}}, Q, (), {EMBED: 1}
    ),
    "tokens of each embedding": Case(
        tiny_llama,
        {**QUERY, "trainable_token_indices": {"lm_head": [1, 3], "embed_tokens": [2]}},
        Q,
        (),
        {EMBED: 1, HEAD: 2},
    ),
    "weights stored (in, out)": Case(
        gpt2,
        {"r": 4, "target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
        {"transformer.h.0.attn.c_attn": "linear"},
        ("transformer.h.0.attn.c_attn.bias",),
    ),
    "experts": Case(
        mixtral,
        {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "down_proj"]},
        {Q0: "linear", EXPERTS: "parameter", f"{EXPERTS}.base_layer": "parameter"},
    ),
    "three parameters": Case(
        WithStack,
        {**STACK, "rank_pattern": {"gate": 3}, "alpha_pattern": {"experts.up": 5}, "bias": "all"},
        {f"experts{'.base_layer' * depth}": "parameter" for depth in range(3)},
        ("experts.inner.bias",),
    ),
    "MultiheadAttention": Case(
        Layers,
        {"r": 4, "target_modules": ["attention"], "bias": "lora_only", "lora_bias": True},
        {"attention": "linear", "attention.out_proj": "linear"},
        ("attention.out_proj.bias",),
    ),
    "convolutions": Case(
        Layers,
        {"r": 4, "target_modules": ["one", "two", "three", "pointwise"]},
        dict.fromkeys(("one", "two", "three", "pointwise"), "convolution"),
    ),
    "convolutions, DoRA": Case(
        Layers,
        {"r": 4, "target_modules": ["one", "two"], "use_dora": True},
        {"one": "convolution", "two": "convolution"},
    ),
    "a saved module's counters": Case(
        Layers,
        {"r": 4, "target_modules": ["pointwise"], "modules_to_save": ["norm"]},
        {"pointwise": "convolution"},
        tuple(f"norm.{x}" for x in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")),
    ),
}


def saved_by_peft(case: Case, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Write the adapter that PEFT makes, its trained numbers random, and return PEFT's model."""
    import peft

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(
            case.model().to(dtype), peft.LoraConfig(**case.options), autocast_adapter_dtype=False
        )
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        tuned.save_pretrained(str(folder), **options)
    return tuned


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in CASES for dtype in (torch.float32, torch.bfloat16)),
        ("experts", torch.float16),
        ("embedding, DoRA", torch.float64),
    ],
)
def test_what_peft_writes_is_written_back_to_the_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    import peft

    case = CASES[name]
    saved_by_peft(case, tmp_path / "theirs", dtype)
    adapter = read_adapter(tmp_path / "theirs")
    assert {path: pair.kind for path, pair in adapter.pairs.items()} == case.kinds
    assert set(adapter.tensors) == set(case.tensors)
    assert {path: len(rows) for path, rows in adapter.tokens.items()} == case.tokens
    write_adapter(tmp_path / "ours", adapter)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    ours, theirs = (peft.LoraConfig.from_pretrained(str(tmp_path / who)) for who in ("ours", "theirs"))
    theirs.auto_mapping = None  # names the class of PEFT's model
    assert ours == theirs
    assert read_adapter(tmp_path / "ours").config == adapter.config


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_we_write(tmp_path: Path, name: str) -> None:
    import peft

    case = CASES[name]
    tuned = saved_by_peft(case, tmp_path / "theirs")
    write_adapter(tmp_path / "ours", read_adapter(tmp_path / "theirs"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        loaded = peft.PeftModel.from_pretrained(case.model(), str(tmp_path / "ours"))
    expected = {key: tensor for key, tensor in tuned.named_parameters() if tensor.requires_grad}
    got = dict(loaded.named_parameters())
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("experts", {EXPERTS: ("gate_up_proj", "down_proj")}),
        ("three parameters", {"experts": ("up", "gate", "down")}),
    ],
)
def test_parameters_get_the_names_that_peft_wrapped(tmp_path: Path, name: str, order: Any) -> None:
    tuned = saved_by_peft(CASES[name], tmp_path / "theirs")
    adapter = name_parameters(read_adapter(tmp_path / "theirs"), order)
    wrappers = [module for module in tuned.modules() if hasattr(module, "parameter_name")]
    (module, names), (*_, last) = next(iter(order.items())), wrappers
    assert [path for path in adapter.pairs if path.startswith(module)] == [f"{module}.{x}" for x in names]
    assert last.parameter_name == names[0]
    for wrapper in wrappers:
        pair = adapter.pairs[f"{module}.{wrapper.parameter_name}"]
        np.testing.assert_array_equal(pair.A, wrapper.lora_A["default"].weight.detach().numpy())
        np.testing.assert_array_equal(pair.B, wrapper.lora_B["default"].weight.detach().numpy())
        assert pair.scaling == wrapper.scaling["default"]
    write_adapter(tmp_path / "ours", adapter)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    assert name_parameters(adapter, order).pairs.keys() == adapter.pairs.keys()


@pytest.mark.parametrize("save_embeddings", [False, True])
def test_copies_of_embeddings_lie_where_the_embedding_is(tmp_path: Path, save_embeddings: bool) -> None:
    case = CASES["tokens of each embedding"]
    tuned = saved_by_peft(case, tmp_path / "theirs", save_embedding_layers=save_embeddings)
    adapter = read_adapter(tmp_path / "theirs")
    assert set(adapter.tensors) == ({f"{EMBED}.weight", f"{HEAD}.weight"} if save_embeddings else set())
    if save_embeddings:
        own = tuned.base_model.model.model.embed_tokens.original_module.weight.detach().numpy()
        np.testing.assert_array_equal(adapter.tensors[f"{EMBED}.weight"], own)
    write_adapter(tmp_path / "ours", adapter)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


def test_what_a_saved_module_s_wrapper_repeats_is_read_once(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    options = {**QUERY, "modules_to_save": ["o_proj"], "bias": "all"}
    tuned = saved_by_peft(Case(biased, options), tmp_path / "theirs")
    path = "model.layers.0.self_attn.o_proj"
    raw = load_file(tmp_path / "theirs" / WEIGHTS)
    assert f"base_model.model.{path}.original_module.bias" in raw
    adapter = read_adapter(tmp_path / "theirs")
    trained = tuned.get_submodule(f"base_model.model.{path}").modules_to_save["default"]
    for leaf in ("weight", "bias"):
        own = getattr(trained, leaf).detach().numpy()
        np.testing.assert_array_equal(adapter.tensors[f"{path}.{leaf}"], own)
    assert not any("original_module" in name or "modules_to_save" in name for name in adapter.tensors)
    write_adapter(tmp_path / "ours", adapter)
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    assert ours.keys() == {
        key for key in raw if "original_module" not in key and "modules_to_save" not in key
    }
    raw[f"base_model.model.{path}.modules_to_save.bias"][0] += 1
    save_file(raw, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(FileError, match=r"o_proj\.modules_to_save\.bias .*same numbers as .*o_proj\.bias"):
        read_adapter(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_an_adapter_of_a_residual_base_is_read_only_by_who_has_it(tmp_path: Path, name: str) -> None:
    case = Case(tiny_llama, {**QUERY, "init_lora_weights": name})
    saved_by_peft(case, tmp_path / "theirs")
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path / "theirs")
    assert str(caught.value) == (
        f"{tmp_path / 'theirs' / CONFIG}: init_lora_weights: {name!r} took the adapter's start away from the "
        f"base; it belongs to that residual base, which is not in the file; convert the adapter with PEFT's "
        f"path_initial_model_for_weight_conversion"
    )
    adapter = read_adapter(tmp_path / "theirs", residual_base=True)
    write_adapter(tmp_path / "ours", adapter)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


def test_a_converted_adapter_needs_no_residual_base(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    base = tiny_llama()
    before = base.get_submodule(Q0).weight.detach().clone()
    tuned = peft.get_peft_model(base, peft.LoraConfig(**QUERY, init_lora_weights="olora"))
    tuned.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.125)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(
            str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    pair = read_adapter(tmp_path / "end").pairs[Q0]
    assert pair.r == 8
    layer = tuned.get_submodule(f"base_model.model.{Q0}")
    after = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    delta = pair.scaling * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
    np.testing.assert_allclose(before.numpy() + delta, after.numpy(), atol=1e-5)


def test_a_grouped_convolution_is_refused_with_the_reason(tmp_path: Path) -> None:
    saved_by_peft(Case(Layers, {"r": 4, "target_modules": ["grouped"]}), tmp_path / "theirs")
    with pytest.raises(ShapeError, match=r"grouped\.lora_B\.weight: \(6, 2, 1, 1\) is of .* in 2 groups"):
        read_adapter(tmp_path / "theirs")


def test_a_layer_that_peft_adapts_twice_is_refused_with_both_names(tmp_path: Path) -> None:
    saved_by_peft(
        Case(Layers, {"r": 4, "target_modules": ["attention", "attention.out_proj"]}), tmp_path / "theirs"
    )
    one, other = "attention.base_layer.out_proj", "attention.out_proj"
    with pytest.raises(FileError, match=rf"{one} and base_model\.model\.{other} are both of {other}"):
        read_adapter(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["linear", "DoRA", "embedding", "tokens", "saved modules", "experts"])
def test_a_model_s_own_state_dict_is_refused_by_the_adapter_s_name(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    tuned = saved_by_peft(CASES[name], tmp_path / "theirs")
    trained = {key: tensor.clone() for key, tensor in tuned.named_parameters() if tensor.requires_grad}
    save_file(trained, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(FileError, match=r"not understood: 'default' is an adapter's name"):
        read_adapter(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", {"trainable_token_indices": [5, 1]}, r"trainable_tokens_delta: expected shape \(2, d\)"),
        ("tokens", {"trainable_token_indices": None}, r"embed_tokens is not among trainable_token_indices"),
        ("linear", {"trainable_token_indices": [1]}, r"expected a row for each .* got no such tensor"),
        ("saved modules", {"modules_to_save": ["lm_head"]}, r"model\.norm\.weight: lies in no module"),
        ("all biases", {"bias": "lora_only"}, r"k_proj\.bias: lies in no module of modules_to_save None"),
        ("biases of adapted layers", {"bias": "none"}, r"q_proj\.base_layer\.bias: .*bias 'none'"),
        ("DoRA", {"use_dora": False}, r"q_proj\.lora_magnitude_vector: expected none .*got shape \(16,\)"),
        ("linear", {"use_dora": True}, r"q_proj\.lora_magnitude_vector: expected one .*got none"),
        ("bias of lora_B", {"lora_bias": False}, r"q_proj\.lora_B\.bias: expected none .*got shape"),
        ("linear", {"lora_bias": True}, r"q_proj\.lora_B\.bias: expected one .*got none"),
        ("embedding", {"lora_bias": True}, r"embed_tokens\.lora_embedding_A: an embedding has no lora_bias"),
        ("experts", {"target_parameters": None}, r"of a parameter of .*experts, which .* None do not name"),
        ("experts", {"target_parameters": ["other.up"]}, r"of a parameter of .*experts, which .* do not"),
        ("experts", {"r": 5}, r"\(5 \* weights, in\).*\(12, 24\)"),
        ("embedding", {"r": 3}, r"lora_embedding_A: expected shape \(3, V\)"),
        ("convolutions", {"r": 3}, r"one\.lora_A\.weight: expected shape \(3, in, \*kernel\)"),
        ("tied embeddings, both adapted as one", {"ensure_weight_tying": False}, r"lm_head is not targeted"),
        ("MultiheadAttention", {"target_modules": ["two"]}, r"attention is not targeted"),
    ],
)  # fmt: skip
def test_a_config_of_another_adapter_is_refused_by_the_tensor(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    saved_by_peft(CASES[name], tmp_path / "theirs")
    path = tmp_path / "theirs" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((TargetError, ShapeError, FileError), match=message) as caught:
        read_adapter(tmp_path / "theirs")
    assert str(caught.value).startswith(str(tmp_path / "theirs" / WEIGHTS))
    assert "\n" not in str(caught.value)


def test_a_config_is_what_peft_means_by_it() -> None:
    """Fields that name modules mean in a model what PEFT wraps there."""
    import peft

    options: dict[str, Any] = {
        **QUERY,
        "modules_to_save": ["head", "input_layernorm"],
        "trainable_token_indices": {"tokens": [1]},
    }
    tuned = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options))
    config = LoraConfig(**{**options, "trainable_token_indices": {"tokens": (1,)}})
    wrapped = {
        name.removeprefix("base_model.model."): type(module).__name__
        for name, module in tuned.named_modules()
        if type(module).__name__ in ("ModulesToSaveWrapper", "TrainableTokensWrapper")
    }
    paths = [path for path, _ in tiny_llama().named_modules() if path]
    assert [p for p in paths if config.saves(p)] == [
        p for p in paths if wrapped.get(p) == "ModulesToSaveWrapper"
    ]
    assert [p for p in paths if config.token_indices_of(p)] == [
        p for p in paths if wrapped.get(p) == "TrainableTokensWrapper"
    ]
