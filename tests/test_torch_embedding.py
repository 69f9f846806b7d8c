"""Adapted embeddings in a model: PEFT's starts, numbers and files; what is kept, merged and refused."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from refusal import refused
from torch import Tensor, nn
from torch_fixtures import fill_integers, same_bits, tiny_llama
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from loracle.files import Adapter, LoraConfig, LoraPair
from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    NonFiniteError,
    ShapeError,
    TargetError,
    embedding_forward,
    merge_embedding,
)
from loracle.torch_impl import (
    adapter_of,
    eject,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.embedding import LoraEmbedding
from loracle.torch_impl.embedding_function import EmbeddingTerm, lora_embedding
from loracle.torch_impl.optimizer import parameter_groups
from loracle.torch_impl.update import UpdateOptions

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IDS = torch.tensor([[1, 4, 1, 0], [2, 2, 3, 1]])
TRACED = "aot_eager"


class Model(nn.Module):
    """An embedding of six tokens and a projection."""

    def __init__(self, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4) if embedding is None else embedding
        self.proj = nn.Linear(4, 3, bias=False, dtype=self.embed.weight.dtype)
        fill_integers(self, 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...) to (..., 3)."""
        y: Tensor = self.proj(self.embed(ids))
        return y


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 1, "target_modules": ("embed",), "task_type": None, **options})


def adapted(embedding: nn.Embedding | None = None, **options: Any) -> Any:
    """The model with an adapter of integers."""
    model = Model(embedding)
    inject(model, config(**options))
    fill_integers(model, 1)
    return model


# PEFT writes the base's embedding along, and says so.
ANNOUNCED = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
EMBEDDINGS = {
    "plain": lambda: nn.Embedding(6, 4),
    "padding_idx": lambda: nn.Embedding(6, 4, padding_idx=1),
    "sparse": lambda: nn.Embedding(6, 4, sparse=True),
    "Gemma": lambda: Gemma3TextScaledWordEmbedding(6, 4, 1, 2.0),
    "BART": lambda: BartScaledWordEmbedding(6, 4, 1, 4.0),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_numbers_are_pefts(name: str) -> None:
    model = adapted(EMBEDDINGS[name]())
    # PEFT's gradients fail where they are sparse.
    theirs = Model(EMBEDDINGS["plain" if name == "sparse" else name]())
    theirs.embed.weight.data, theirs.proj.weight.data = (
        model.embed.weight.data.clone(),
        model.proj.weight.data,
    )
    wrapped: Any = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=1, target_modules=["embed"]))
    layer, own = wrapped.base_model.model.embed, model.embed.update()
    layer.lora_embedding_A["default"].data = own.lora_A.data.clone()
    layer.lora_embedding_B["default"].data = own.lora_B.data.clone()
    y, expected = model(IDS), wrapped(IDS)
    assert same_bits(y, expected)
    y.sum().backward()
    expected.sum().backward()
    dA, dB = (layer.lora_embedding_A["default"].grad, layer.lora_embedding_B["default"].grad)
    assert same_bits(own.lora_A.grad, dA)
    assert same_bits(own.lora_B.grad, dB)
    assert model.embed.base_layer.weight.grad is None


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_a_seed_draws_the_bits_that_it_draws_in_peft(init: bool | str) -> None:
    torch.manual_seed(7)
    theirs: Any = peft.get_peft_model(
        Model(), peft.LoraConfig(r=2, target_modules=["embed"], init_lora_weights=init)
    ).base_model.model.embed
    # The model itself has drawn from the generator first.
    torch.manual_seed(7)
    model = Model()
    inject(model, config(init_lora_weights=init))
    own = lora_layers(model)["embed"].update()
    assert same_bits(own.lora_A, theirs.lora_embedding_A["default"])
    assert same_bits(own.lora_B, theirs.lora_embedding_B["default"])
    assert bool(own.lora_A.any()) is (init is False)
    layer = LoraEmbedding(nn.Embedding(6, 4, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(3)
    drawn = [layer.start(UpdateOptions(2, 2, init=init), generator) for _ in range(2)]
    assert not same_bits(drawn[0].lora_B, drawn[1].lora_B)
    assert drawn[0].lora_A.dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_the_references_and_undone_a_hundred_times(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model(nn.Embedding(6, 4, dtype=dtype))
    for name, scale in (("one", 3), ("other", 0.7)):
        inject(model, config(lora_alpha=scale), name)
        nn.init.normal_(lora_layers(model)["embed"].update(name).lora_A)
    set_adapter(model, ("one", "other"))
    layer = lora_layers(model)["embed"]
    nn.init.normal_(layer.base_weight)
    before, bits = layer.weight, layer.weight.clone()
    adapters = [
        LowRank(array_of(own.lora_A), array_of(own.lora_B), own.scaling)
        for own in map(layer.update, layer.active)
    ]
    expected = tensor_of(merge_embedding(array_of(bits), adapters))
    for _ in range(100):
        assert merge(model) == ("embed",)
        assert same_bits(layer.weight, expected)
        assert unmerge(model) == ("embed",)
        assert layer.weight is before
        assert same_bits(before, bits)
    assert not same_bits(expected, bits)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_merged_unmerged_and_the_reference_agree_on_integers(name: str) -> None:
    model = adapted(EMBEDDINGS[name]())
    base = Model(EMBEDDINGS[name]())
    layer = model.embed
    y = layer(IDS)
    own = layer.low_rank("default")
    scale = None if layer.embed_scale is None else float(layer.embed_scale)
    expected = embedding_forward(IDS.numpy(), array_of(layer.weight), [own], embed_scale=scale)
    assert np.array_equal(array_of(y), expected)
    merge(model)
    assert same_bits(layer(IDS), y)
    eject(model)
    assert type(model.embed) is type(base.embed)


def test_dropout_is_none_of_an_embeddings() -> None:
    model = adapted(lora_dropout=0.5).train()
    expected = adapted()(IDS)
    assert same_bits(model(IDS), expected)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_gives_the_bits_of_eager_execution(dtype: torch.dtype, scaled: bool) -> None:
    embedding = Gemma3TextScaledWordEmbedding(6, 4, 1, 2.0) if scaled else nn.Embedding(6, 4)
    model = adapted(embedding.to(dtype))

    def step(call: Any) -> list[Tensor]:
        model.zero_grad()
        y = call(IDS)
        y.pow(2).sum().backward()
        update = model.embed.update()
        return [y.detach(), update.lora_A.grad, update.lora_B.grad]

    expected = step(model)
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True, backend=TRACED))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_leaves_the_embedding_in_the_bases_dtype() -> None:
    model = adapted()
    nn.init.normal_(model.embed.update().lora_B)  # not exact in bfloat16
    expected = model.embed(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.embed(IDS)
    assert same_bits(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fresh_layer_in_half_precision_computes_the_bits_of_its_base(dtype: torch.dtype) -> None:
    base = Gemma3TextScaledWordEmbedding(6, 4, 1, 1.7).to(dtype)
    base.embed_scale = torch.tensor(1.7)  # as where only the weight is cast
    layer = LoraEmbedding(base)
    layer.add_adapter("default", UpdateOptions(2, 2))
    layer.activate(["default"])
    assert same_bits(layer(IDS), base(IDS))


def test_a_frequent_ids_gradient_is_not_added_up_in_half_precision() -> None:
    """600 times one: in bfloat16 the sum would stay at 256."""
    A, B = torch.zeros(1, 6, requires_grad=True), torch.ones(4, 1)
    W0 = torch.zeros(6, 4, dtype=torch.bfloat16)
    y = lora_embedding(torch.full((600,), 2), W0, [EmbeddingTerm(A, B, 0.25)])
    y.sum().backward()
    assert A.grad is not None
    assert A.grad[0].tolist() == [0, 0, 600, 0, 0, 0]


def function_case(*wanted: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    A, B = torch.randn(2, 6, requires_grad="A" in wanted), torch.randn(4, 2, requires_grad="B" in wanted)
    W0 = torch.randn(6, 4)
    return W0, A, B, lora_embedding(IDS, W0, [EmbeddingTerm(A, B, 0.7)])


@pytest.mark.parametrize("wanted", [("A",), ("B",), ("A", "B")])
def test_only_what_a_wanted_gradient_needs_is_kept(wanted: tuple[str, ...]) -> None:
    _, A, B, y = function_case(*wanted)
    node: Any = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    kept = [None if tensor is None else tuple(tensor.shape) for tensor in node.saved_tensors]
    # ids, embed_scale, h, B: nothing of the size of y, nor of a column for each token.
    assert kept == [
        (8,) if "A" in wanted else None,
        None,
        (8, 2) if "B" in wanted else None,
        (4, 2) if "A" in wanted else None,
    ]
    y.sum().backward()
    assert (A.grad is not None, B.grad is not None) == ("A" in wanted, "B" in wanted)


def test_without_gradients_there_is_no_graph_and_no_ids_give_no_rows() -> None:
    assert function_case()[3].grad_fn is None
    _, A, B, y = function_case("A", "B")
    empty = lora_embedding(IDS[:0], torch.ones(6, 4), [EmbeddingTerm(A, B, 1.0)])
    assert empty.shape == (0, 4, 4)
    empty.sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert not A.grad.any()
    assert not B.grad.any()
    y.mul_(2)  # the result may be modified in place
    assert y.requires_grad


def test_differentiating_twice_is_refused() -> None:
    _, A, _, y = function_case("A", "B")
    seed = torch.ones_like(y).requires_grad_()
    with pytest.raises(ConfigError, match=r"create_graph: expected False, got True; .* once only"):
        torch.autograd.grad(y, A, seed, create_graph=True)


def test_what_does_not_fit_is_named() -> None:
    W0, A, B = torch.ones(6, 4), torch.ones(2, 6), torch.ones(4, 2)
    with pytest.raises(ShapeError, match=r"lora_A: expected shape \(2, 6\) .* got \(2, 5\)"):
        lora_embedding(IDS, W0, [EmbeddingTerm(A[:, :5], B, 1.0)])
    with pytest.raises(ShapeError, match=r"lora_B: expected shape \(4, 2\) .* got \(3, 2\)"):
        lora_embedding(IDS, W0, [EmbeddingTerm(A, B[:3], 1.0)])
    with pytest.raises(DTypeError, match=r"ids: expected torch\.int64 or torch\.int32, got torch\.float32"):
        lora_embedding(IDS.float(), W0, [EmbeddingTerm(A, B, 1.0)])
    with pytest.raises(TargetError, match="W0: expected a frozen weight"):
        lora_embedding(IDS, W0.requires_grad_(), [EmbeddingTerm(A, B, 1.0)])
    with pytest.raises(IndexError):
        lora_embedding(IDS + 5, W0.detach(), [EmbeddingTerm(A, B, 1.0)])


class Shifted(nn.Embedding):
    """An embedding of positions, as OPT's."""

    def forward(self, positions: Tensor) -> Tensor:
        """Look up what lies two further."""
        return super().forward(positions + 2)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "max_norm": (
        nn.Embedding(6, 4, max_norm=1.0),
        {},
        TargetError,
        "embed: expected an embedding without max_norm, got 1.0, which changes the frozen weight when it is "
        "called; set it to None, or leave it out of the targets",
    ),
    "frequencies": (
        nn.Embedding(6, 4, scale_grad_by_freq=True),
        {},
        TargetError,
        "embed: expected an embedding with scale_grad_by_freq False, got True, by which gradients would not "
        "be those of the loss; set it to False, or leave it out of the targets",
    ),
    "own forward": (
        Shifted(6, 4),
        {},
        TargetError,
        "embed: expected an nn.Embedding that looks up rows and multiplies them with its embed_scale, got "
        "Shifted with a forward of its own; leave it out of the targets",
    ),
    "bias": (
        None,
        {"lora_bias": True},
        ConfigError,
        "lora_bias: expected False for an embedding, got True; leave it out of the targets",
    ),
    "PiSSA": (
        None,
        {"init_lora_weights": "pissa"},
        ConfigError,
        "init_lora_weights: expected True, False, 'gaussian' or 'orthogonal' for an embedding, got 'pissa'; "
        "choose one of them, or leave the embedding out of the targets",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_embedding_can_not_do_is_refused(name: str) -> None:
    embedding, options, kind, message = REFUSED[name]
    model = Model(embedding)
    refused(lambda: inject(model, config(**options)), kind, message)
    assert not lora_layers(model)


def test_another_layer_is_no_embedding() -> None:
    refused(
        lambda: LoraEmbedding(nn.Linear(2, 2)),
        TargetError,
        "base_layer: expected nn.Embedding, got Linear; target embeddings",
    )


@pytest.mark.parametrize("tensor", ["A", "B"])
def test_nan_is_named_on_merge_and_nothing_is_merged(tensor: str) -> None:
    model = adapted()
    getattr(model.embed.update(), f"lora_{tensor}").data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"embed\.weight|A: |B: "):
        merge(model)
    assert not model.embed.merged


@ANNOUNCED
def test_peft_and_we_read_each_others_files(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    options: dict[str, Any] = {"r": 4, "target_modules": ("embed_tokens", "q_proj")}
    inject(model, LoraConfig(**options))
    fill_integers(model.model.embed_tokens.update(), 5)
    ids = torch.arange(12).reshape(2, 6)
    logits = model(input_ids=ids).logits
    save_adapter(model, tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    assert same_bits(theirs(input_ids=ids).logits, logits)
    assert not same_bits(tiny_llama()(input_ids=ids).logits, logits)
    # It writes the base's own embedding along, which is left aside.
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = tiny_llama()
    load_adapter(again, tmp_path / "theirs")
    assert same_bits(again(input_ids=ids).logits, logits)
    assert not adapter_of(again).tensors


def test_another_embedding_beside_the_update_is_refused() -> None:
    model: Any = tiny_llama()
    inject(model, LoraConfig(r=2, target_modules=("embed_tokens",)))
    adapter, name = adapter_of(model), "model.embed_tokens.weight"
    copied = array_of(tiny_llama().model.embed_tokens.weight).copy()
    same = Adapter(adapter.config, adapter.pairs, {name: copied})
    other = tiny_llama()
    load_adapter(other, same)
    eject(other)
    copied[3, 2] += 1
    refused(
        lambda: load_adapter(other, same),
        TargetError,
        f"{name}: expected the model's own values, got others for a tensor that the adapter's config does "
        "not train; put them into the model first, or name the module in modules_to_save if they were "
        "trained; is this adapter for another model?",
    )
    pair = adapter.pairs["model.embed_tokens"]
    wide = LoraPair(np.ones((2, 270), np.float32), pair.B, pair.scaling, kind="embedding")
    resized = Adapter(adapter.config, {"model.embed_tokens": wide}, {name: np.ones((270, 16), np.float32)})
    with pytest.raises(TargetError, match=r"embed_tokens\.lora_A: expected shape \(2, 264\)"):
        load_adapter(other, resized)
    grown = Adapter(adapter.config, adapter.pairs, {name: np.ones((270, 16), np.float32)})
    with pytest.raises(TargetError, match=r"got shape \(264, 16\); resize this model's vocabulary"):
        load_adapter(other, grown)
    assert not lora_layers(other)


def test_both_matrices_learn_at_the_embeddings_rate() -> None:
    model = adapted(target_modules=("embed", "proj"))
    groups = {name: set(group) for name, group in parameter_groups(model).items()}
    assert groups["embedding"] == {"embed.adapters.default.lora_A", "embed.adapters.default.lora_B"}
    assert groups["A"] == {"proj.adapters.default.lora_A"}


@pytest.mark.gpu
def test_a_model_on_a_gpu_computes_the_cpus_integers() -> None:
    model = adapted(Gemma3TextScaledWordEmbedding(6, 4, 1, 2.0))
    y = model(IDS)
    y.sum().backward()
    own = model.embed.update()
    gradients = [own.lora_A.grad.clone(), own.lora_B.grad.clone()]
    model.zero_grad()
    on_gpu = model.to("cuda")(IDS.cuda())
    on_gpu.sum().backward()
    assert same_bits(on_gpu.cpu(), y)
    found = (own.lora_A.grad.cpu(), own.lora_B.grad.cpu())
    assert all(same_bits(a, b) for a, b in zip(found, gradients, strict=True))
