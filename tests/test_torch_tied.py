"""One update of a weight that several modules hold: it counts in all, is merged once, written as by PEFT."""

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
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loracle.files import Adapter, LoraConfig, LoraPair, read_adapter
from loracle.reference import ConfigError, TargetError, merge_embedding
from loracle.torch_impl import (
    adapter_of,
    disable_adapter,
    eject,
    inject,
    injected_config,
    load_adapter,
    lora_layers,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unmerge,
)
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.embedding import LoraEmbedding
from loracle.torch_impl.tied import LoraTiedEmbedding, LoraTiedLinear
from loracle.torch_impl.update import UpdateOptions

EMBED, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(14).reshape(2, 7)
ANNOUNCED = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
TIED: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 4,
    "target_modules": ("embed_tokens",),
    "ensure_weight_tying": True,
}


def llama(**options: Any) -> Any:
    return tiny_llama(tie_word_embeddings=True, **options)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(input_ids=ids).logits
    return result


def adapted(**options: Any) -> Any:
    """The model with a trained update of its embedding, as large as the weight."""
    model = llama()
    inject(model, LoraConfig(**{**TIED, **options}))
    randomise(model)
    return model


class Both(nn.Module):
    """An embedding and an output layer of one weight, and nothing between them: integers stay exact."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...) to (..., 6)."""
        y: Tensor = self.head(self.embed(ids))
        return y


SHORT = torch.tensor([[0, 5, 2, 2]])


def both_uses() -> Any:
    """`Both` with an update of integers."""
    model = Both()
    inject(model, LoraConfig(**{**TIED, "r": 2, "target_modules": ("embed",), "task_type": None}))
    fill_integers(model, 1)
    return model


def reference_weight(model: nn.Module, path: str) -> Tensor:
    """The reference's merged weight of an embedding, with all that is active."""
    layer: Any = lora_layers(model)[path]
    own = [layer.low_rank(name) for name in layer.active]
    return tensor_of(merge_embedding(array_of(layer.base_weight), own))


def randomise(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize(
    "targets",
    [("embed_tokens",), ("lm_head",), ("lm_head", "embed_tokens"), r".*lm_head", r"model\.embed_tokens"],
)
def test_the_embedding_has_the_update_whichever_is_targeted(targets: Any) -> None:
    model = llama()
    before = model.lm_head.weight
    assert inject(model, LoraConfig(**{**TIED, "target_modules": targets})) == (EMBED, HEAD)
    assert isinstance(model.lm_head, LoraTiedLinear)
    assert injected_config(model).targets(EMBED)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{EMBED}.adapters.default.lora_{part}" for part in "AB"}
    randomise(model)
    reference = adapted()
    assert same_bits(logits(model), logits(reference))
    eject(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is before
    assert model.model.embed_tokens.weight is before
    assert same_bits(logits(model), logits(llama()))


@ANNOUNCED
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_both_uses_are_pefts_and_so_are_the_files(tmp_path: Path, targets: list[str]) -> None:
    model, base = llama(), llama()
    fill_integers(base, 1)
    fill_integers(model, 1)
    inject(model, LoraConfig(**{**TIED, "target_modules": tuple(targets)}))
    fill_integers(nn.ModuleList(layer.adapters for layer in lora_layers(model).values()), 2)
    save_adapter(model, tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    # Of integers each layer is exact, whatever the order.
    x = torch.randint(-2, 3, (5, 16), generator=torch.Generator().manual_seed(0)).float()
    plain = llama()
    fill_integers(plain, 1)
    for path, argument in ((EMBED, IDS), (HEAD, x)):
        y = model.get_submodule(path)(argument)
        assert same_bits(theirs.base_model.model.get_submodule(path)(argument), y)
        assert not same_bits(plain.get_submodule(path)(argument), y)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, both = (read_adapter(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.pairs.keys() == both.pairs.keys()
    for path, pair in ours.pairs.items():
        assert pair.A.tobytes() == both.pairs[path].A.tobytes()
        assert pair.B.tobytes() == both.pairs[path].B.tobytes()
    again = llama()
    fill_integers(again, 1)
    load_adapter(again, tmp_path / "theirs")
    assert same_bits(logits(again), logits(model))


def test_gradients_of_both_uses_add_up_in_one_pair() -> None:
    """Bit for bit those of one leaf W0 + scaling (B A)^T that is both weights: integers."""
    model = both_uses()
    update = model.embed.update()
    y = model(SHORT)
    y.sum().backward()
    A, B = (t.detach().clone().requires_grad_() for t in (update.lora_A, update.lora_B))
    W = model.embed.base_weight + update.scaling * (B @ A).t()
    expected = nn.functional.embedding(SHORT, W) @ W.t()
    expected.sum().backward()
    assert same_bits(y, expected)
    assert same_bits(update.lora_A.grad, A.grad)
    assert same_bits(update.lora_B.grad, B.grad)


def test_a_merge_is_one_weight_and_undone_a_hundred_times() -> None:
    model = adapted()
    W0, bits, expected = model.lm_head.weight, model.lm_head.weight.clone(), logits(model)
    for _ in range(100):
        assert merge(model) == (EMBED, HEAD)
        merged = model.model.embed_tokens.weight
        assert model.lm_head.weight is merged
        assert not same_bits(merged, bits)
        assert unmerge(model) == (EMBED, HEAD)
        assert model.lm_head.weight is W0
        assert model.model.embed_tokens.weight is W0
    assert same_bits(W0, bits)
    assert same_bits(logits(model), expected)
    merge(model)
    with pytest.raises(TargetError, match="expected an unmerged adapter"):
        merge(model)
    merge_and_unload(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same_bits(model.lm_head.weight, merged)


@ANNOUNCED
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_peft_merges_the_delta_twice_and_we_do_once(tmp_path: Path) -> None:
    model = llama()
    inject(model, LoraConfig(**TIED))
    fill_integers(model, 2, bound=1)  # whatever is added here is exact
    W0 = model.lm_head.weight.clone()
    save_adapter(model, tmp_path / "adapter")
    own = model.model.embed_tokens.update()
    delta = own.scaling * (own.lora_B @ own.lora_A).t()
    merge(model)
    assert same_bits(model.lm_head.weight, W0 + delta)
    base = llama()
    base.load_state_dict(dict.fromkeys([f"{EMBED}.weight", f"{HEAD}.weight"], W0), strict=False)
    theirs: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    theirs.merge_adapter()
    assert same_bits(theirs.base_model.model.lm_head.base_layer.weight, W0 + 2 * delta)
    assert delta.any()


def test_several_adapters_add_up_in_both_places() -> None:
    model = adapted()
    one = logits(model)
    inject(model, LoraConfig(**{**TIED, "r": 2, "target_modules": ("lm_head", "q_proj")}), "other")
    randomise(model, 5)
    other = logits(model)
    set_adapter(model, ("default", "other"))
    merged = reference_weight(model, EMBED)
    both = logits(model)
    merge(model)
    assert same_bits(model.lm_head.weight, merged)
    unmerge(model)
    assert same_bits(logits(model), both)
    assert not same_bits(both, one)
    set_adapter(model, "default")
    assert same_bits(logits(model), one)
    with disable_adapter(model):
        assert same_bits(logits(model), logits(llama()))
    eject(model, "default")
    assert isinstance(model.lm_head, LoraTiedLinear)
    set_adapter(model, "other")
    assert same_bits(logits(model), other)
    assert not same_bits(one, other)


def test_a_copy_is_tied_in_itself() -> None:
    model = adapted()
    expected = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.embed_tokens.update().lora_A.zero_()
    assert same_bits(logits(other), expected)
    merge(other)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert not model.lm_head.merged
    assert other.lm_head.update().update is other.model.embed_tokens.update()


def test_a_layer_of_another_weight_does_not_follow() -> None:
    owner, follower = LoraEmbedding(nn.Embedding(5, 3)), LoraTiedLinear(nn.Linear(3, 5, bias=False))
    owner.add_adapter("default", UpdateOptions(2, 2))
    refused(
        lambda: follower.share("default", owner),
        TargetError,
        "base_layer: expected the weight of the layer that has the update, got another one; tie them",
    )
    refused(
        lambda: follower.add_adapter("default", UpdateOptions(2, 2)),
        TargetError,
        "base_layer: expected a weight of its own, got one whose update another layer has; share that one",
    )


def test_dropout_is_the_heads_alone() -> None:
    model = adapted(lora_dropout=0.5).train()
    model.lm_head.eval()
    assert same_bits(logits(model), logits(adapted()))
    model.lm_head.train()
    assert not same_bits(logits(model), logits(adapted()))


def seq2seq(kind: str) -> Any:
    torch.manual_seed(0)
    heads = {"decoder_attention_heads": 2, "encoder_attention_heads": 2}
    if kind == "T5":
        config = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        return T5ForConditionalGeneration(config).eval()
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    special = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "scale_embedding": True}
    widths = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=20, **heads, **sizes, **special, **widths)
    ).eval()


@ANNOUNCED
@pytest.mark.filterwarnings("ignore:Could not identify embedding:UserWarning")
@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_several_embeddings_and_the_head_share_one_update(kind: str, tmp_path: Path) -> None:
    model, prefix = seq2seq(kind), "" if kind == "T5" else "model."
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    base = copy.deepcopy(model)
    options = {**TIED, "target_modules": (f"{prefix}shared",), "task_type": None}
    paths = inject(model, LoraConfig(**options))
    assert paths == (
        f"{prefix}shared",
        f"{prefix}encoder.embed_tokens",
        f"{prefix}decoder.embed_tokens",
        "lm_head",
    )
    randomise(model)
    layers = lora_layers(model)
    assert isinstance(layers[paths[1]], LoraTiedEmbedding)
    ids = torch.tensor([[3, 4, 5]])

    def both(call: Any) -> Tensor:
        # Without gradients: then all take the same kernels.
        with torch.no_grad():
            result: Tensor = call(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
        return result

    y = both(model)
    save_adapter(model, tmp_path / "adapter")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "adapter")
    assert same_bits(both(again), y)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    for path, layer in layers.items():
        other, own = theirs.base_model.model.get_submodule(path), layer.update()
        embeds = len(other.lora_embedding_A) == 1
        A = other.lora_embedding_A["default"] if embeds else other.lora_A["default"].weight
        B = other.lora_embedding_B["default"] if embeds else other.lora_B["default"].weight
        assert embeds is (path != "lm_head")
        assert same_bits(A, own.lora_A)
        assert same_bits(B, own.lora_B)
        assert other.scaling["default"] == own.scaling
    expected = reference_weight(model, paths[0])
    merge(model)
    assert len({id(layer.weight) for layer in layers.values()}) == 1
    assert same_bits(model.lm_head.weight, expected)
    assert not same_bits(both(base), y)
    eject(model)
    assert same_bits(both(model), both(base))


def test_the_names_of_an_architecture_do_not_matter() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes)).eval()
    assert inject(model, LoraConfig(**{**TIED, "target_modules": ("lm_head",)})) == (
        "transformer.wte",
        "lm_head",
    )
    randomise(model)
    y = logits(model)
    adapter = adapter_of(model)
    eject(model)
    load_adapter(model, adapter)
    assert same_bits(logits(model), y)


def tampered(path: str, part: str) -> Adapter:
    adapter = adapter_of(adapted(target_modules=("embed_tokens", "lm_head")))
    pair = adapter.pairs[path]
    arrays = {"A": pair.A.copy(), "B": pair.B.copy()}
    arrays[part][0, 0] += 1
    changed = LoraPair(arrays["A"], arrays["B"], pair.scaling, kind=pair.kind)
    return Adapter(adapter.config, {**adapter.pairs, path: changed})


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("path", [EMBED, HEAD])
def test_two_updates_of_a_tied_weight_are_refused(path: str, part: str) -> None:
    model = llama()
    refused(
        lambda: load_adapter(model, tampered(path, part)),
        TargetError,
        f"{HEAD}: expected the update of {EMBED}, whose weight it shares, got another; one weight can't have "
        "two: train with ensure_weight_tying, or untie the model first",
    )
    assert not lora_layers(model)


def test_one_pair_is_enough_if_it_is_the_embeddings() -> None:
    whole = adapter_of(adapted())
    model = llama()
    load_adapter(model, Adapter(whole.config, {EMBED: whole.pairs[EMBED]}))
    assert same_bits(logits(model), logits(adapted()))
    head = Adapter(LoraConfig(**{**TIED, "target_modules": ("lm_head",)}), {HEAD: whole.pairs[HEAD]})
    with pytest.raises(
        TargetError, match=rf"{EMBED}: expected lora_A and lora_B for this target, got neither"
    ):
        load_adapter(llama(), head)


class Twice(nn.Module):
    """One embedding module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(5, 3)
        self.two = self.one


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


class Odd(nn.Linear):
    """An output layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 4) to (..., 6)."""
        return -super().forward(x)


def odd_head() -> Any:
    model = Both()
    model.head = Odd(4, 6, bias=False)
    model.head.weight = model.embed.weight
    return model


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "without the option": (
        llama,
        {"target_modules": ("lm_head",), "ensure_weight_tying": False},
        TargetError,
        f"{HEAD}.weight: expected a weight of its own, got one tied to {EMBED}; a merge would change both: "
        "leave it out of the targets, or set ensure_weight_tying for one update that counts in both",
    ),
    "no embedding": (
        TiedLinears,
        {"target_modules": ("first",)},
        TargetError,
        "first.weight: expected an embedding among the modules that it is tied to, got first, second; leave "
        "it out of the targets",
    ),
    "a head of its own kind": (
        odd_head,
        {"target_modules": ("embed",)},
        TargetError,
        "head: expected nn.Linear or an embedding to be tied to an adapted embedding, got Odd; leave the "
        "embedding out of the targets",
    ),
    "one module": (
        Twice,
        {"target_modules": ("one",)},
        TargetError,
        "one: expected a module with one path, got one that occurs as one, two; give each place a module, "
        "with the weight tied",
    ),
    "excluded": (
        llama,
        {"target_modules": ("lm_head",), "exclude_modules": ("embed_tokens",)},
        TargetError,
        f"{EMBED}: expected an embedding that may be adapted, got one that is excluded or saved whole, while "
        f"{HEAD}, which is tied to it, is targeted; target both or none",
    ),
    "magnitudes": (
        llama,
        {"use_dora": True},
        ConfigError,
        f"use_dora: expected False for {EMBED}, which {HEAD} is tied to, got True; rows and columns of one "
        "weight can't both have magnitudes",
    ),
    "another rank": (
        llama,
        {"rank_pattern": {"lm_head": 3}},
        ConfigError,
        f"r: expected 4 for {HEAD}, as for {EMBED}, which it is tied to, got 3; let rank_pattern and "
        "alpha_pattern say the same of both",
    ),
    "another scaling": (
        llama,
        {"alpha_pattern": {"lm_head": 8}},
        ConfigError,
        f"scaling: expected 1.0 for {HEAD}, as for {EMBED}, which it is tied to, got 2.0; let rank_pattern "
        "and alpha_pattern say the same of both",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_one_update_is_refused_and_changes_nothing(name: str) -> None:
    make, options, kind, message = REFUSED[name]
    model = make()
    refused(lambda: inject(model, LoraConfig(**{**TIED, **options})), kind, message)
    assert not lora_layers(model)


def test_a_refused_adapter_leaves_the_ones_that_are_there(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    with pytest.raises(ConfigError, match="rank_pattern and alpha_pattern"):
        inject(model, LoraConfig(**{**TIED, "rank_pattern": {"lm_head": 3}}), "other")
    assert set(model.model.embed_tokens.adapters) == set(model.lm_head.adapters) == {"default"}
    assert same_bits(logits(model), expected)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_weight_trained_whole_has_both_names_in_a_file(tmp_path: Path, saved: str) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ("q_proj",), "modules_to_save": (saved,)}
    model = llama()
    inject(model, LoraConfig(**options, ensure_weight_tying=True))
    nn.init.normal_(model.lm_head.weight)  # the updates beside it stay zero
    y = logits(model)
    save_adapter(model, tmp_path / "ours")
    assert set(read_adapter(tmp_path / "ours").tensors) == {f"{EMBED}.weight", f"{HEAD}.weight"}
    theirs: Any = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
    assert same_bits(logits(theirs), y)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    again = llama()
    load_adapter(again, tmp_path / "theirs")
    assert same_bits(logits(again), y)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    adapter = read_adapter(tmp_path / "ours")
    other = f"{HEAD if saved == 'embed_tokens' else EMBED}.weight"
    tensors = {**adapter.tensors, other: adapter.tensors[other] + np.float32(1)}
    refused(
        lambda: load_adapter(llama(), Adapter(adapter.config, adapter.pairs, tensors)),
        TargetError,
        f"{other}: expected the values of {EMBED if saved == 'embed_tokens' else HEAD}.weight, to which it "
        "is tied, got others; one tensor can't be two: untie the model first",
    )


def test_one_graph_gives_the_bits_of_eager_execution() -> None:
    model = both_uses()

    def step(call: Any) -> list[Tensor]:
        model.zero_grad()
        y = call(SHORT)
        y.sum().backward()
        update = model.embed.update()
        return [y.detach(), update.lora_A.grad, update.lora_B.grad]

    expected = step(model)
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    assert array_of(expected[1]).any()


@pytest.mark.gpu
def test_moving_the_model_keeps_it_tied() -> None:
    model, expected = both_uses().to("cuda"), both_uses()
    assert model.embed.weight is model.head.weight
    assert model.head.update().lora_A.data_ptr() == model.embed.update().lora_B.data_ptr()
    y = model(SHORT.cuda())
    y.sum().backward()
    expected(SHORT).sum().backward()
    assert same_bits(y.cpu(), expected(SHORT))
    assert same_bits(model.embed.update().lora_A.grad.cpu(), expected.embed.update().lora_A.grad)
    assert same_bits(model.embed.update().lora_B.grad.cpu(), expected.embed.update().lora_B.grad)
    merge(model)
    assert model.embed.weight is model.head.weight
    assert same_bits(model(SHORT.cuda()).cpu(), expected(SHORT))
