"""A model in a random subspace: its start, its point, its gradient; and the toy problem of Li et al."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from task_fixtures import tiny_bert
from torch import Tensor, nn
from torch_fixtures import same_bits, tiny_llama

from loracle.reference import (
    ConfigError,
    Subspace,
    dense_projection,
    fastfood_projection,
    subspace_gradient,
    subspace_gradient_bound,
    subspace_parameters,
    subspace_parameters_bound,
)
from loracle.torch_impl import FinetuneOptions
from loracle.torch_impl.batches import collate
from loracle.torch_impl.classification import LabelledRow
from loracle.torch_impl.distributed import World
from loracle.torch_impl.intrinsic import SubspaceModel
from loracle.torch_impl.intrinsic.dimension import Score, best_points, intrinsic_dimension
from loracle.torch_impl.intrinsic.layers import layer_of, number_layers
from loracle.torch_impl.trainer import AdapterTrainer
from loracle.torch_impl.training_set import TrainingSet

INPUTS = {"input_ids": torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])}
LAYERS = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def classifier() -> Any:
    return tiny_bert("BertForSequenceClassification")


def moved(model: SubspaceModel, size: float = 0.1) -> SubspaceModel:
    """Put theta_d somewhere."""
    drawn = torch.randn(model.theta_d.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.theta_d.add_(drawn, alpha=size)
    return model


def flat(tensors: Any) -> Any:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy()


def reference_of(own: Any, model: SubspaceModel, d: int, seed: int, *, dense: bool) -> Subspace:
    """The same subspace in NumPy."""
    named = dict(own.named_parameters())
    start = flat(named.values())
    numbers, _ = number_layers(named)
    sizes = [tensor.numel() for tensor in named.values()]
    layers = np.repeat(numbers, sizes) if model.layers else None
    make = dense_projection if dense else fastfood_projection
    return Subspace(start, make(len(start), d - len(model.layers), seed), layers)


@pytest.mark.parametrize("projection", ["dense", "fastfood", "said"])
def test_it_starts_as_the_model_itself(projection: Any) -> None:
    plain = classifier()
    model = SubspaceModel(classifier(), projection, 12, 3)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["theta_d"]
    with torch.no_grad():
        assert same_bits(model(**INPUTS).logits, plain(**INPUTS).logits)
        assert not torch.equal(moved(model)(**INPUTS).logits, plain(**INPUTS).logits)
    for name, parameter in plain.named_parameters():
        assert same_bits(model.model.get_parameter(name), parameter), name


@pytest.mark.parametrize(("projection", "dense"), [("dense", True), ("fastfood", False), ("said", True)])
def test_the_point_and_the_gradient_are_the_references(projection: Any, dense: bool) -> None:
    own = classifier()
    model = moved(SubspaceModel(classifier(), projection, 40, 3))
    assert model.layers == (LAYERS if projection == "said" else ())
    reference = reference_of(own, model, 40, 3, dense=dense)
    theta = model.theta_d.detach().numpy()
    tensors = model.parameters_now()
    for tensor in tensors.values():
        tensor.retain_grad()
    logits = torch.func.functional_call(model.model, tensors, (), INPUTS).logits
    logits.square().sum().backward()
    wide = reference.astype(np.float64)
    point = subspace_parameters(wide, theta.astype(np.float64))
    bound = subspace_parameters_bound(reference, theta, np.float32)
    assert np.all(np.abs(flat(tensors.values()) - point) <= bound)
    gradient = flat(tensor.grad for tensor in tensors.values())
    assert model.theta_d.grad is not None
    pulled = subspace_gradient(wide, theta.astype(np.float64), gradient.astype(np.float64))
    off = np.abs(model.theta_d.grad.numpy() - pulled)
    bound = subspace_gradient_bound(reference, theta, gradient, np.float32)
    assert np.all(off <= bound)
    assert np.median(np.abs(pulled)) > 10 * bound.max()


@pytest.mark.parametrize("make", [tiny_bert, lambda: tiny_llama(tie_word_embeddings=True)])
def test_a_tied_weight_is_one(make: Any) -> None:
    plain = make()
    model = moved(SubspaceModel(copy.deepcopy(plain), "fastfood", 20, 0))
    own = dict(plain.named_parameters())
    assert sum(model._sizes) == sum(parameter.numel() for parameter in own.values())
    with torch.no_grad():
        for name, tensor in model.parameters_now().items():
            own[name].copy_(tensor)
        assert same_bits(model(**INPUTS).logits, plain(**INPUTS).logits)


def test_without_gradients_the_point_is_computed_once_while_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = moved(SubspaceModel(classifier(), "dense", 12, 3))
    calls: list[int] = []
    now = model.parameters_now

    def counted() -> dict[str, Tensor]:
        calls.append(1)
        return now()

    monkeypatch.setattr(model, "parameters_now", counted)
    with torch.no_grad():
        first = model(**INPUTS).logits
        assert same_bits(model(**INPUTS).logits, first)
        assert len(calls) == 1
        assert not torch.equal(moved(model)(**INPUTS).logits, first)
        assert len(calls) == 2
    model(**INPUTS)
    model(**INPUTS)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("projection", "d", "message"),
    [
        ("auto", 0, "dims: expected numbers from 1 to "),
        ("auto", 10**6, "the model's parameters, got 1000000; leave it out"),
        ("said", 5, "dims: expected numbers from 6 to .*, of which 5 are the layers' scales, got 5"),
    ],
)
def test_a_dimension_that_does_not_suit_the_model_is_named(projection: Any, d: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SubspaceModel(classifier(), projection, d, 0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "bert.encoder.layer.11"),
        ("bert.embeddings.LayerNorm.bias", "bert.embeddings"),
        ("model.layers.0.mlp.experts.3.w1.weight", "model.layers.0"),
        ("model.norm.weight", "model.norm"),
        ("score.weight", "score"),
        ("weight", "weight"),
    ],
)
def test_layers_by_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


class Toy(nn.Module):
    """Li et al.'s problem: of 1000 numbers the first 100 are to add up to 1, the next to 2, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1000))
        self.config = SimpleNamespace()

    def forward(self) -> Tensor:
        """Return the squared error."""
        sums = self.theta.view(10, 100).sum(dim=1)
        return (sums - torch.arange(1.0, 11.0)).square().sum()


def solved(tmp_path: Path, d: int | None, lr: float, seed: int) -> float:
    """Train, and return exp(-loss), which is 1 for a solution."""
    torch.manual_seed(0)
    model: nn.Module = Toy() if d is None else SubspaceModel(Toy(), "auto", d, seed)
    options = FinetuneOptions(
        model="a/toy",
        data=tmp_path,
        out=tmp_path,
        task="sequence-classification",
        lr=lr,
        max_steps=200,
        batch_size=1,
        max_grad_norm=0.0,
        seed=seed,
        save_steps=0,
    )
    rows = TrainingSet([LabelledRow((1,), 0)], (1,), collate, lambda own, *_: own())
    AdapterTrainer(model, options, rows, bf16=False, world=World(0, 1, torch.device("cpu"))).train()
    with torch.no_grad():
        return float(torch.exp(-model()))


def test_a_problem_of_intrinsic_dimension_ten_has_ten(tmp_path: Path) -> None:
    """Ten conditions on 1000 numbers: ten random directions solve them all, nine leave one unmet."""
    scores = [
        Score(d, lr, 1, score, score)
        for d, lr in [(None, 0.05), *((d, 8.0) for d in (1, 8, 9, 10, 11, 20))]
        for score in [solved(tmp_path, d, lr, 1)]
    ]
    points = best_points(scores)
    full = points[-1]
    assert full.d is None
    assert full.score > 0.9999
    with torch.no_grad():
        start = float(torch.exp(-Toy()()))
    found = intrinsic_dimension(points, full.score, start)
    assert (found.d90, found.d90_above_start) == (10, 10)
    assert [point.d for point in points if point.d is not None and point.score > 0.999] == [10, 11, 20]
    assert all(point.score < 0.001 for point in points if point.d is not None and point.d < 10)
