"""The embedding: the reference, torch, PEFT and loralib agree, with padding_idx and embed_scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import loralib
import numpy as np
import peft
import pytest
import torch
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import EmbeddingProblem, Gradients, embedding_problems
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from loracle.reference import LowRank, merge

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# Each adapter after the first is announced.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
BOTH = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
EXAMPLES = settings(max_examples=30)


def tensor(array: Any, train: bool = True) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).requires_grad_(train)


def differentiate(
    p: EmbeddingProblem, y: torch.Tensor, leaves: dict[Any, torch.Tensor]
) -> tuple[Any, Gradients]:
    if leaves:
        y.backward(tensor(p.dy, train=False))
    gradients: Gradients = {}
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        gradients[key] = leaf.grad.numpy()
    return y.detach().numpy(), gradients


def by_autograd(p: EmbeddingProblem) -> tuple[Any, Gradients]:
    """y and the gradients of the layer as torch's own functions compose it."""
    ids, scale = tensor(p.ids, train=False), 1.0 if p.embed_scale is None else p.embed_scale
    leaves: dict[Any, torch.Tensor] = {}
    y = scale * functional.embedding(ids, tensor(p.W0, train=False))
    for number, own in enumerate(p.adapters):
        A, B = leaves[number, "A"], leaves[number, "B"] = tensor(own.A), tensor(own.B)
        h = functional.embedding(ids, A.T, padding_idx=p.padding_idx)
        y = y + scale * own.scaling * functional.linear(h, B)
    return differentiate(p, y, leaves)


def by_peft(p: EmbeddingProblem) -> tuple[Any, Gradients]:
    """y and the gradients by PEFT, with all adapters active at once; Gemma's embedding where it is scaled."""
    if p.embed_scale is None:
        base = torch.nn.Embedding(*p.W0.shape, padding_idx=p.padding_idx)
    else:
        base = Gemma3TextScaledWordEmbedding(*p.W0.shape, p.padding_idx, p.embed_scale)
    base.weight.data = tensor(p.W0, train=False)
    model = torch.nn.Sequential(base)
    names = [f"adapter{number}" for number in range(len(p.adapters))]
    for name, own in zip(names, p.adapters, strict=True):
        config = peft.LoraConfig(r=len(own.A), target_modules=["0"])
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    layer = model[0]
    layer.set_adapter(names)
    leaves: dict[Any, torch.Tensor] = {}
    for number, (name, own) in enumerate(zip(names, p.adapters, strict=True)):
        layer.scaling[name] = own.scaling
        layer.lora_embedding_A[name].data = tensor(own.A, train=False)
        layer.lora_embedding_B[name].data = tensor(own.B, train=False)
        leaves |= {(number, "A"): layer.lora_embedding_A[name], (number, "B"): layer.lora_embedding_B[name]}
    return differentiate(p, model(tensor(p.ids, train=False)), leaves)


def by_loralib(p: EmbeddingProblem) -> tuple[Any, Gradients]:
    """y and the gradients by loralib, which has one adapter and no scale of the embedding."""
    (own,) = p.adapters
    r = len(own.A)
    layer = loralib.Embedding(*p.W0.shape, r=r, lora_alpha=own.scaling * r, padding_idx=p.padding_idx)
    layer.weight.data = tensor(p.W0, train=False)
    layer.lora_A.data, layer.lora_B.data = tensor(own.A, train=False), tensor(own.B, train=False)
    leaves = {(0, "A"): layer.lora_A, (0, "B"): layer.lora_B}
    return differentiate(p, layer(tensor(p.ids, train=False)), leaves)


def same(left: Any, right: Any) -> None:
    """Equal numbers, dtypes and shapes; +0 and -0 are one number."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.array_equal(left, right)


def assert_same(computed: tuple[Any, Gradients], p: EmbeddingProblem) -> None:
    y, gradients = computed
    same(y, p.forward())
    own = p.backward()
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        same(gradient, own[key])


def assert_within(computed: tuple[Any, Gradients], p: EmbeddingProblem) -> None:
    y, gradients = computed
    exact, bounds = p.rational(), p.backward_bound(p.dy.dtype)
    assert (error(y, exact.forward()) <= p.forward_bound(p.dy.dtype)).all()
    expected = exact.backward()
    assert expected.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (error(gradient, expected[key]) <= bounds[key]).all(), key


@BOTH
@EXAMPLES
@given(data=st.data())
def test_exact_tier_torch_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(embedding_problems(dtype, exact=True))
    assert_same(by_autograd(p), p)


@BOTH
@EXAMPLES
@given(data=st.data())
def test_derived_tier_torch_stays_within_the_bounds(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(embedding_problems(dtype))
    assert_within(by_autograd(p), p)


@BOTH
@settings(max_examples=12)
@given(data=st.data())
def test_exact_tier_peft_with_all_adapters_active_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(embedding_problems(dtype, exact=True).filter(lambda p: p.adapters))
    assert_same(by_peft(p), p)


@BOTH
@settings(max_examples=12)
@given(data=st.data())
def test_derived_tier_peft_with_all_adapters_active_stays_within_the_bounds(
    dtype: Any, data: st.DataObject
) -> None:
    p = data.draw(embedding_problems(dtype).filter(lambda p: p.adapters))
    assert_within(by_peft(p), p)


@BOTH
@EXAMPLES
@given(data=st.data())
def test_exact_tier_loralib_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(embedding_problems(dtype, exact=True).filter(lambda p: p.adapters))
    p = replace(p, adapters=p.adapters[:1], embed_scale=None)
    assert_same(by_loralib(p), p)


@EXAMPLES
@given(embedding_problems(F32).filter(lambda p: p.adapters))
def test_derived_tier_loralib_stays_within_the_bounds(p: EmbeddingProblem) -> None:
    p = replace(p, adapters=p.adapters[:1], embed_scale=None)
    (own,) = p.adapters
    r = len(own.A)
    # loralib divides by r what it was given.
    p = p.with_adapter(0, scaling=own.scaling * r / r)
    assert_within(by_loralib(p), p)


@BOTH
@EXAMPLES
@given(data=st.data())
def test_exact_tier_the_merged_embedding_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    """Merged with A and B in each other's place: the update of W0 is ``scaling * A^T B^T``."""
    p = data.draw(embedding_problems(dtype, exact=True))
    W = p.W0
    for own in p.adapters:
        W = merge(W, np.ascontiguousarray(own.B.T), np.ascontiguousarray(own.A.T), own.scaling)
    scale = 1.0 if p.embed_scale is None else p.embed_scale
    y = functional.embedding(tensor(p.ids, train=False), tensor(W, train=False)) * scale
    same(y.numpy(), p.forward())


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@BOTH
def test_the_bounds_tell_pefts_layer_from_a_wrong_one(dtype: Any, padding_idx: int | None) -> None:
    rng = np.random.default_rng(9)
    data = embedding_case(rng, padding_idx).astype(dtype)
    assert_within(by_peft(data), data)
    wrong = [replace(data, adapters=data.adapters[:1]), data.with_adapter(1, scaling=1.701)]
    wrong += [replace(data, embed_scale=None), replace(data, padding_idx=1 if padding_idx is None else None)]
    for other in wrong:
        with pytest.raises(AssertionError):
            assert_within(by_peft(other), data)


def embedding_case(rng: np.random.Generator, padding_idx: int | None) -> EmbeddingProblem:
    return EmbeddingProblem(
        dy=rng.normal(size=(4, 8, 5)),
        W0=rng.normal(size=(6, 5)),
        adapters=tuple(
            LowRank(rng.normal(size=(r, 6)), rng.normal(size=(5, r)), s) for r, s in ((2, 1 / 3), (7, 1.7))
        ),
        ids=rng.integers(0, 6, (4, 8)),
        embed_scale=7.5,
        padding_idx=padding_idx,
    )
