"""Adapted models under torch.compile: one graph, the numbers of eager execution."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_fixtures import Chain, fill_integers, same_bits, tiny_llama

from loracle.files import LoraConfig
from loracle.torch_impl import inject, lora_layers, merge, set_adapter

TRACED = "aot_eager"
"""A backend that traces forward and backward and then runs torch's own kernels: the same bits."""


def step(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = call(x)
    y.pow(2).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def adapted(**options: Any) -> Chain:
    model = Chain()
    inject(model, LoraConfig(r=2, lora_alpha=1, target_modules="all-linear", **options))
    fill_integers(model, 3)
    return model


X = torch.tensor([[1.0, -1.0, 2.0], [0.0, 1.0, 1.0], [2.0, 0.0, -1.0]])


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True}, {"bias": "all"}])
def test_one_graph_gives_the_bits_of_eager_execution(options: dict[str, Any]) -> None:
    model = adapted(**options)
    expected = step(model, model, X)
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True, backend=TRACED), model, X)
    assert len(found) == len(expected) > 3
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_a_whole_model_is_one_graph_and_its_layers_share_nothing_there() -> None:
    # Plain products: tracing takes the fused attention apart.
    model = tiny_llama(attn_implementation="eager")
    inject(model, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.arange(12).reshape(2, 6)

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False).logits
        return result

    torch._dynamo.reset()
    compiled = torch.compile(logits, fullgraph=True, backend=TRACED)
    found = [step(compiled, model, ids) for _ in range(3)][-1]
    for layer in lora_layers(model).values():
        layer.sharing = None  # type: ignore[assignment]
    expected = step(logits, model, ids)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_is_drawn_anew_in_every_call_of_the_graph() -> None:
    model = adapted(lora_dropout=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=TRACED)
    x = X.repeat(8, 1)
    outputs = [compiled(x) for _ in range(3)]
    assert not same_bits(outputs[0], outputs[1])
    assert not same_bits(outputs[1], outputs[2])
    model.eval()
    assert same_bits(compiled(x), model(x))


def test_the_graph_follows_a_change_of_adapters_and_a_merge() -> None:
    model = adapted()
    inject(model, LoraConfig(r=1, lora_alpha=1, target_modules=("k_proj",)), "other")
    fill_integers(model, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=TRACED)
    seen = []
    for names in ("default", "other", ("default", "other"), ()):
        set_adapter(model, names)
        seen.append(compiled(X).detach())
        assert same_bits(seen[-1], model(X).detach())
    assert all(not same_bits(a, b) for i, a in enumerate(seen) for b in seen[:i])
    set_adapter(model, "default")
    merge(model)
    assert same_bits(compiled(X), seen[0])


def test_the_compiled_code_computes_the_same() -> None:
    model = adapted()
    expected = step(model, model, X)
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True), model, X)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
