"""Trained rows of tokens: as if they stood in the weight, by themselves, tied, merged and in PEFT's files."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from refusal import refused
from torch import Tensor, nn
from torch_fixtures import fill_integers, same_bits, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from loracle.files import Adapter, LoraConfig, read_adapter
from loracle.reference import ConfigError, NonFiniteError, ShapeError, TargetError, round_to
from loracle.torch_impl import (
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
from loracle.torch_impl.row_function import embedding_with_rows, linear_with_rows
from loracle.torch_impl.token_rows import TiedTokenRows, TokenRows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EMBED, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(14).reshape(2, 7)
TOKENS = (9, 3, 200)
QUERY: dict[str, Any] = {"r": 2, "target_modules": ("q_proj",)}


class Model(nn.Module):
    """An embedding of six tokens, a layer to adapt, and an output layer, tied or not."""

    def __init__(self, *, tied: bool = False, bias: bool = False, embedding: Any = None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4) if embedding is None else embedding
        self.proj = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 6, bias=bias)
        if tied:
            self.head.weight = self.embed_tokens.weight
        fill_integers(self, 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...) to (..., 6)."""
        y: Tensor = self.head(self.proj(self.embed_tokens(ids)))
        return y


SHORT = torch.tensor([[0, 5, 2, 2], [4, 1, 5, 0]])


def config(tokens: Any, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{
            "r": 1,
            "target_modules": ("proj",),
            "task_type": None,
            "trainable_token_indices": tokens,
            **options,
        }
    )


def adapted(tokens: Any = (5, 2), **options: Any) -> Any:
    """The model with rows of integers."""
    model = Model(**options)
    inject(model, config(tokens))
    fill_rows(model)
    return model


def fill_rows(model: nn.Module, seed: int = 1) -> None:
    for number, (_, layer) in enumerate(sorted(lora_layers(model).items())):
        if isinstance(layer, TokenRows) and not isinstance(layer, TiedTokenRows):
            fill_integers(layer.adapters, seed + number)


def as_weights(model: Any) -> tuple[Any, list[Tensor]]:
    """The model with the rows in its weights, which train whole, and these weights."""
    plain = copy.deepcopy(model)
    merge_and_unload(plain)
    plain.requires_grad_(False)
    weights = [plain.embed_tokens.weight, plain.head.weight]
    for weight in weights:
        weight.requires_grad_()
    return plain, weights


def test_rows_start_as_the_bases_and_change_nothing() -> None:
    model, base = Model(), Model()
    assert inject(model, config([5, 2])) == ("proj",)
    layer: Any = model.embed_tokens
    assert same_bits(model(SHORT), base(SHORT))
    assert same_bits(layer.trained("default").rows, base.embed_tokens.weight[[5, 2]])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "embed_tokens.adapters.default.rows",
        "proj.adapters.default.lora_A",
        "proj.adapters.default.lora_B",
    }


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "embedding": ((5, 2), {}),
    "one token": ((0,), {}),
    "every token": ((3, 5, 1, 0, 2, 4), {}),
    "head": ({"head": (5, 2)}, {}),
    "head with a bias": ({"head": (5, 2)}, {"bias": True}),
    "both, apart": ({"head": (1,), "embed_tokens": (5, 2)}, {"bias": True}),
    "both, tied": ((5, 2), {"tied": True, "bias": True}),
    "both named, tied": ({"head": (5, 2), "embed_tokens": (5, 2)}, {"tied": True}),
    "scaled": ((5, 2), {"embedding": "Gemma"}),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients_are_those_of_rows_in_the_weight(name: str, device: str) -> None:
    tokens, options = CASES[name]
    if options.get("embedding") == "Gemma":
        options = {"embedding": Gemma3TextScaledWordEmbedding(6, 4, 0, 2.0)}
    model = adapted(tokens, **options).to(device)
    ids = SHORT.to(device)
    y = model(ids)
    y.sum().backward()
    plain, weights = as_weights(model)
    expected = plain(ids)
    expected.sum().backward()
    assert same_bits(y, expected)
    assert not same_bits(y.cpu(), Model(**options)(SHORT))
    for path, weight in zip(("embed_tokens", "head"), weights, strict=True):
        layer: Any = getattr(model, path)
        if isinstance(layer, TokenRows):
            own = layer.trained("default")
            assert same_bits(own.rows.grad, weight.grad[list(own.tokens)])
            assert layer.base_layer.weight.grad is None


def test_a_token_that_pads_has_a_row_and_no_gradient_as_in_peft() -> None:
    model = adapted((5, 2), embedding=nn.Embedding(6, 4, padding_idx=5))
    wrapped: Any = peft.get_peft_model(
        Model(embedding=nn.Embedding(6, 4, padding_idx=5)),
        peft.LoraConfig(r=1, target_modules=["proj"], trainable_token_indices={"embed_tokens": [5, 2]}),
    )
    theirs = wrapped.base_model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    own = model.embed_tokens.trained("default").rows
    theirs.data = own.data.clone()
    y, expected = model(SHORT), wrapped(SHORT)
    assert same_bits(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert same_bits(own.grad, theirs.grad)
    assert not own.grad[0].any()
    assert own.grad[1].any()


@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_the_bits_of_eager_execution(name: str) -> None:
    tokens, options = CASES[name]
    if options.get("embedding") == "Gemma":
        options = {"embedding": Gemma3TextScaledWordEmbedding(6, 4, 0, 2.0)}
    model = adapted(tokens, **options)

    def step(call: Any) -> list[Tensor]:
        model.zero_grad()
        y = call(SHORT)
        y.sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = step(model)
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert len(found) == len(expected) > 2
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_computes_the_heads_columns_as_the_others() -> None:
    model = adapted({"head": (5, 2), "embed_tokens": (1,)})
    expected = model(SHORT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(SHORT)
        assert model.embed_tokens(SHORT).dtype is torch.float32
    assert y.dtype is torch.bfloat16
    assert same_bits(y.float(), expected)  # of small integers


def test_rows_are_rounded_to_the_weights_dtype_before_anything_else() -> None:
    """As a merge rounds them: 1 + 2^-9 is one in bfloat16, and a number of float16."""
    model: Any = Model().bfloat16()
    inject(model, config({"head": (5,), "embed_tokens": (2,)}))
    for layer in (model.embed_tokens, model.head):
        layer.trained("default").rows.data.fill_(1 + 2**-9)
    with torch.autocast("cpu", dtype=torch.float16):
        y = model(SHORT)
        merge(model)
        assert same_bits(model(SHORT), y)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_puts_the_rows_into_the_weight_and_is_undone_a_hundred_times(
    dtype: torch.dtype, tied: bool
) -> None:
    model: Any = Model(tied=tied).to(dtype)
    inject(model, config((5, 2)))
    layer = model.embed_tokens
    rows = layer.trained("default").rows
    assert rows.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    nn.init.normal_(rows)
    W0, bits = layer.weight, layer.weight.clone()
    expected = array_of(bits).copy()
    expected[[5, 2]] = round_to(array_of(rows), expected.dtype)
    y = model.embed_tokens(SHORT)
    for _ in range(100):
        merge(model)
        assert same_bits(layer.weight, tensor_of(expected))
        assert (model.head.weight is layer.weight) is tied
        unmerge(model)
        assert layer.weight is W0
        assert (model.head.weight is W0) is tied
    assert same_bits(W0, bits)
    merge(model)
    assert same_bits(model.embed_tokens(SHORT), y)
    eject(model)
    assert type(model.embed_tokens) is nn.Embedding
    assert type(model.head) is nn.Linear
    assert model.embed_tokens.weight is W0


def test_nan_and_overflow_are_refused_by_a_merge() -> None:
    model: Any = Model().half()
    inject(model, config((5, 2)))
    rows = model.embed_tokens.trained("default").rows
    for value in (float("nan"), 1e5):
        rows.data[1, 3] = value
        refused(
            lambda: merge(model),
            NonFiniteError,
            "embed_tokens: expected finite rows, in float16 too, got token 2's of adapter default with NaN, "
            "infinity or an overflow; train them again, or merge into a wider dtype",
        )
        assert not model.embed_tokens.merged


def test_several_adapters_of_different_tokens() -> None:
    model = adapted((5, 2), tied=True)
    one = model(SHORT)
    inject(model, config((0,)), "other")
    fill_integers(model.embed_tokens.adapters["other"], 4)
    other = model(SHORT)
    inject(model, config((2, 4)), "third")
    set_adapter(model, ("default", "other"))
    both = model(SHORT)
    rows = [model.embed_tokens.trained(name).rows for name in ("default", "other", "third")]
    assert [row.requires_grad for row in rows] == [True, True, False]
    merge(model)
    assert same_bits(model(SHORT), both)
    weight = model.head.weight
    assert same_bits(weight[[5, 2]], rows[0])
    assert same_bits(weight[[0]], rows[1])
    unmerge(model)
    refused(
        lambda: set_adapter(model, ("third", "default")),
        ConfigError,
        "trainable_token_indices: expected one active adapter for token 2 of embed_tokens, got third and "
        "default; activate one of them",
    )
    assert same_bits(model(SHORT), both)
    set_adapter(model, "default")
    assert same_bits(model(SHORT), one)
    with disable_adapter(model):
        assert same_bits(model(SHORT), Model(tied=True)(SHORT))
    eject(model, "default")
    set_adapter(model, "other")
    assert same_bits(model(SHORT), other)
    eject(model)
    assert type(model.head) is nn.Linear


def llama(tied: bool = False) -> Any:
    return tiny_llama(tie_word_embeddings=tied)


def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


FILES: dict[str, tuple[bool, Any, set[str]]] = {
    "a list": (False, list(TOKENS), {EMBED}),
    "a list, tied": (True, list(TOKENS), {EMBED}),
    "names": (False, {"lm_head": [7, 2], "embed_tokens": [11]}, {EMBED, HEAD}),
    "names, tied": (True, {"lm_head": [7, 2], "embed_tokens": [7, 2]}, {EMBED}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_go_to_peft_and_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    tied, tokens, paths = FILES[name]
    model = llama(tied)
    inject(model, LoraConfig(**QUERY, trainable_token_indices=tokens))
    fill_rows(model)
    y = logits(model)
    save_adapter(model, tmp_path / "ours")
    assert set(read_adapter(tmp_path / "ours").tokens) == paths
    theirs: Any = peft.PeftModel.from_pretrained(llama(tied), str(tmp_path / "ours"))
    expected = logits(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    again = llama(tied)
    load_adapter(again, tmp_path / "theirs")
    assert same_bits(logits(again), y)
    # PEFT multiplies by the weight with the rows in it: so does a merged model of ours.
    merge_and_unload(again)
    assert same_bits(logits(again), expected)
    assert not same_bits(logits(llama(tied)), expected)


def test_peft_trains_the_same_tokens() -> None:
    for name, (tied, tokens, _) in FILES.items():
        theirs: Any = peft.get_peft_model(
            llama(tied), peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
        )
        model = llama(tied)
        inject(model, LoraConfig(**QUERY, trainable_token_indices=tokens))
        found = {
            path: layer.tokens.tolist()
            for path, layer in lora_layers(model).items()
            if isinstance(layer, TokenRows)
        }
        expected = {
            path.removeprefix("base_model.model."): list(module.token_adapter.token_indices["default"])
            for path, module in theirs.named_modules()
            if hasattr(module, "token_adapter")
        }
        assert found == expected, name


def test_what_adapter_of_returns_is_a_copy_and_fill_takes_it() -> None:
    model = adapted({"head": (1,), "embed_tokens": (5, 2)})
    adapter = adapter_of(model)
    before = {path: rows.copy() for path, rows in adapter.tokens.items()}
    y = model(SHORT)
    with torch.no_grad():
        for layer in (model.embed_tokens, model.head):
            layer.trained("default").rows.add_(1)
    assert all(np.array_equal(adapter.tokens[path], rows) for path, rows in before.items())
    other = Model()
    load_adapter(other, adapter)
    assert same_bits(other(SHORT), y)
    assert before.keys() == {"embed_tokens", "head"}


def test_rows_that_do_not_fit_are_refused_and_the_model_left_alone() -> None:
    adapter = adapter_of(adapted((5, 2)))
    wide = {path: np.pad(rows, ((0, 0), (0, 1))) for path, rows in adapter.tokens.items()}
    model = Model()
    refused(
        lambda: load_adapter(model, Adapter(adapter.config, adapter.pairs, {}, wide)),
        TargetError,
        "embed_tokens: expected rows of shape (2, 4) for trainable_token_indices, got shape (2, 5); is this "
        "adapter for another model?",
    )
    elsewhere = {"head": adapter.tokens["embed_tokens"]}
    refused(
        lambda: load_adapter(model, Adapter(adapter.config, adapter.pairs, {}, elsewhere)),
        TargetError,
        "head: expected rows of embed_tokens by trainable_token_indices, got rows of another; is this "
        "adapter for another model?",
    )
    assert not lora_layers(model)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "an update too": (
        {},
        {"tokens": (1,), "target_modules": ("embed_tokens",)},
        TargetError,
        "embed_tokens: expected trained rows or an update, got trainable_token_indices and a target at "
        "embed_tokens; leave one of them out",
    ),
    "an update of what is tied": (
        {"tied": True},
        {"tokens": (1,), "target_modules": ("head",), "ensure_weight_tying": True},
        TargetError,
        "embed_tokens: expected trained rows or an update, got trainable_token_indices and a target at "
        "embed_tokens; leave one of them out",
    ),
    "trained whole too": (
        {},
        {"tokens": {"embed_tokens": (1,)}, "modules_to_save": ("tokens",)},
        TargetError,
        "embed_tokens: expected trained rows or a weight trained whole, got trainable_token_indices and "
        "embed_tokens.weight; leave one of them out",
    ),
    "beyond the vocabulary": (
        {},
        {"tokens": (1, 6)},
        ConfigError,
        "trainable_token_indices: expected tokens from 0 to 5, got 6; resize the embedding first, or correct "
        "them",
    ),
    "none": (
        {},
        {"tokens": {"embed_tokens": ()}},
        ConfigError,
        "trainable_token_indices: expected tokens for embed_tokens, got none; name some, or leave it out",
    ),
    "no such module": (
        {},
        {"tokens": {"wte": (1,)}},
        TargetError,
        "trainable_token_indices: expected ends of the paths of embeddings, got 'wte', which no module has; "
        "correct it or leave it out",
    ),
    "the head alone, tied": (
        {"tied": True},
        {"tokens": {"head": (1,)}},
        TargetError,
        "head: expected a weight of its own, got that of embed_tokens; name that in trainable_token_indices, "
        "then its rows count in both",
    ),
    "two for one weight": (
        {"tied": True},
        {"tokens": {"head": (1,), "embed_tokens": (2,)}},
        TargetError,
        "head: expected the tokens of embed_tokens, whose weight it has, in trainable_token_indices, got [1] "
        "beside [2]; one row can't be two: name the same",
    ),
    "an embedding with max_norm": (
        {"embedding": nn.Embedding(6, 4, max_norm=1.0)},
        {"tokens": (1,)},
        TargetError,
        "embed_tokens: expected an embedding without max_norm, got 1.0, which changes the frozen weight when "
        "it is called; set it to None, or leave it out of the targets",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_and_changes_nothing(name: str) -> None:
    model_options, options, kind, message = REFUSED[name]
    model = Model(**model_options)
    options = dict(options)
    tokens = options.pop("tokens")
    refused(lambda: inject(model, config(tokens, **options)), kind, message)
    assert not lora_layers(model)


def test_other_layers_have_no_rows() -> None:
    refused(
        lambda: TokenRows(nn.Conv1d(2, 2, 1), "conv"),
        TargetError,
        "conv: expected nn.Embedding or nn.Linear for trainable_token_indices, got Conv1d; name an embedding",
    )


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.proj = nn.Embedding(6, 4), nn.Linear(4, 4)


def test_a_model_without_a_known_embedding_needs_a_name() -> None:
    refused(
        lambda: inject(Elsewhere(), config((1,))),
        TargetError,
        "trainable_token_indices: expected a model with an input embedding, got Elsewhere without one; name "
        "the embedding, as in {'embed_tokens': [0, 1]}",
    )
    model: Any = Elsewhere()
    inject(model, config({"table": (1,)}))
    assert isinstance(model.table, TokenRows)


def test_another_adapters_update_and_rows_do_not_meet() -> None:
    model = adapted((5, 2))
    before = model(SHORT)
    refused(
        lambda: inject(model, config(None, target_modules=("embed_tokens",)), "other"),
        TargetError,
        "embed_tokens: expected a layer without trained rows, got one of another adapter's "
        "trainable_token_indices; eject() that adapter first",
    )
    assert same_bits(model(SHORT), before)
    eject(model)
    inject(model, config(None, target_modules=("embed_tokens", "proj")))
    refused(
        lambda: inject(model, config((1,)), "rows"),
        TargetError,
        "embed_tokens: expected a layer that no other adapter has changed in another way, got LoraEmbedding "
        "for trainable_token_indices; eject() that adapter first",
    )
    assert set(model.proj.adapters) == {"default"}


def test_an_adapter_that_trains_the_weight_whole_is_active_by_itself() -> None:
    model = adapted((5, 2))
    rows = model(SHORT)
    inject(model, config(None, modules_to_save=("embed_tokens",)), "whole")
    refused(
        lambda: set_adapter(model, ("default", "whole")),
        TargetError,
        "embed_tokens.weight: expected one active adapter that trains it, got whole, and default with "
        "trained rows of embed_tokens; activate one of them",
    )
    set_adapter(model, "default")
    assert same_bits(model(SHORT), rows)


def test_a_merged_layer_gets_no_more_rows() -> None:
    model = adapted((5, 2))
    merge(model)
    message = "expected an unmerged layer, got a merged one; unmerge() first"
    refused(
        lambda: inject(model, config((1,), target_modules=("head",)), "other"),
        TargetError,
        f"embed_tokens: {message}",
    )
    refused(
        lambda: model.embed_tokens.add_rows("other", (1,)),
        TargetError,
        "TokenRows: expected an unmerged layer, got a merged one; unmerge it first",
    )
    refused(
        lambda: model.embed_tokens.add_rows("default", (1,)),
        ConfigError,
        "adapter_name: expected a new one, got 'default'; choose another",
    )


def test_a_list_is_of_what_the_model_calls_its_input_embedding() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes))
    inject(model, LoraConfig(r=1, target_modules=("c_attn",), trainable_token_indices=(3, 4)))
    assert isinstance(model.transformer.wte, TokenRows)
    assert isinstance(model.lm_head, TiedTokenRows)
    # Also when it is a layer of ours already.
    inject(model, LoraConfig(r=1, target_modules=("c_attn",), trainable_token_indices=(5,)), "other")
    assert set(model.lm_head.adapters) == {"default", "other"}


def function_operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    W0, rows = torch.randn(6, 4), torch.randn(2, 4, requires_grad=True)
    tokens = torch.tensor([5, 2])
    places = torch.tensor([2, 2, 1, 2, 2, 0])
    return W0, rows, tokens, places


def test_only_what_a_wanted_gradient_needs_is_kept() -> None:
    W0, rows, tokens, places = function_operands()

    def kept(y: Tensor) -> list[Any]:
        node: Any = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        return [None if t is None else tuple(t.shape) for t in node.saved_tensors]

    assert kept(embedding_with_rows(SHORT, W0, rows, places)) == [(8,), None]
    x = torch.randn(2, 4, 4)
    # x, W0, rows, tokens
    assert kept(linear_with_rows(x, W0, None, rows, tokens)) == [(8, 4), None, None, (2,)]
    frozen, x = rows.detach(), x.requires_grad_()
    assert kept(linear_with_rows(x, W0, None, frozen, tokens)) == [None, (6, 4), (2, 4), (2,)]


def test_differentiating_twice_and_wrong_shapes_are_refused() -> None:
    W0, rows, tokens, places = function_operands()
    x = torch.randn(3, 4, requires_grad=True)
    for y in (embedding_with_rows(SHORT, W0, rows, places), linear_with_rows(x, W0, None, rows, tokens)):
        seed = torch.ones_like(y).requires_grad_()
        with pytest.raises(ConfigError, match=r"create_graph: expected False, got True; .* once only"):
            torch.autograd.grad(y, rows, seed, create_graph=True)
    with pytest.raises(ShapeError, match=r"rows: expected shape \(2, 4\)"):
        embedding_with_rows(SHORT, W0, rows[:, :3], places)
    with pytest.raises(ShapeError, match=r"places: expected shape \(6,\)"):
        embedding_with_rows(SHORT, W0, rows, places[1:])
    with pytest.raises(ShapeError, match=r"rows: expected shape \(2, 4\)"):
        linear_with_rows(x, W0, None, rows[:1], tokens)
    with pytest.raises(TargetError, match="W0: expected a frozen weight"):
        linear_with_rows(x, W0.requires_grad_(), None, rows, tokens)


def test_a_bias_that_trains_beside_rows_gets_its_gradient() -> None:
    W0, rows, tokens, _ = function_operands()
    bias = torch.zeros(6, requires_grad=True)
    y = linear_with_rows(torch.randn(3, 4), W0, bias, rows, tokens)
    y.backward(dy := torch.randn(3, 6))
    assert same_bits(bias.grad, dy.sum(0))
