"""The attention block against torch: eager, fused, and transformers' Llama with PEFT's adapters.

Exact tier: integers, quarter turns, scores that are equal or so far apart that softmax is exact: bit for bit.
Derived tier: gaussians; torch stays within the a-priori bound around the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exact_attention import (
    NAMES,
    Block,
    everything,
    exact_blocks,
    exactly,
    flat,
    gaussian_block,
    tied_probabilities,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from loracle.reference import attention_backward_bound, attention_forward_bound

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray[Any, Any]]
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# torch's fused kernel on a CPU takes a fast exponential, which it states to be within 20 ulps.
FUSED_EXP_ULPS = 20.0


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def leaves(block: Block) -> Tensors:
    """x and every trained tensor of the block, as leaves with gradients; named as `flat` names gradients."""
    arrays = {"dx": block.x}
    for name in NAMES:
        own = getattr(block.projections, name)
        if own.bias is not None:
            arrays[f"{name}.dbias"] = own.bias
        for number, adapter in enumerate(own.adapters):
            suffix = str(number) if number else ""
            arrays |= {f"{name}.dA{suffix}": adapter.A, f"{name}.dB{suffix}": adapter.B}
            if adapter.bias is not None:
                arrays[f"{name}.dbias{suffix}B"] = adapter.bias
    return {name: tensor(array).requires_grad_() for name, array in arrays.items()}


def projected(x: torch.Tensor, block: Block, name: str, own: Tensors) -> torch.Tensor:
    """The projection in PEFT's order."""
    projection = getattr(block.projections, name)
    y = torch.nn.functional.linear(x, tensor(projection.W0), own.get(f"{name}.dbias"))
    for number, adapter in enumerate(projection.adapters):
        suffix = str(number) if number else ""
        h = x if adapter.dropout is None else x * tensor(adapter.dropout)
        h = torch.nn.functional.linear(h, own[f"{name}.dA{suffix}"])
        y = (
            y
            + torch.nn.functional.linear(h, own[f"{name}.dB{suffix}"], own.get(f"{name}.dbias{suffix}B"))
            * adapter.scaling
        )
    return y


def rotated(x: torch.Tensor, block: Block) -> torch.Tensor:
    if block.rotary is None:
        return x
    a, b = x.chunk(2, dim=-1)
    return x * tensor(block.rotary[0]) + torch.cat((-b, a), dim=-1) * tensor(block.rotary[1])


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> torch.Tensor:
    group = block.attention.group
    k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * block.attention.score_scale
    scores = scores.masked_fill(~tensor(block.counts()), -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def fused(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> torch.Tensor:
        alone = block.attention.causal and block.mask is None
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if alone else tensor(block.counts()),
                is_causal=alone,
                scale=block.attention.score_scale,
                enable_gqa=True,
            )

    return attend


ATTEND = {
    "eager": eager,
    "math": fused(SDPBackend.MATH),
    "flash": fused(SDPBackend.FLASH_ATTENTION),
}


def in_torch(block: Block, kind: str) -> Arrays:
    """y and the gradients by autograd."""
    own = leaves(block)
    n, length, _ = block.x.shape

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(n, length, -1, block.attention.head_dim).transpose(1, 2)

    q, k, v = (heads(projected(own["dx"], block, name, own)) for name in "qkv")
    context = ATTEND[kind](rotated(q, block), rotated(k, block), v, block)
    y = projected(context.transpose(1, 2).reshape(n, length, -1), block, "o", own)
    y.backward(tensor(block.dy))
    return {"y": y.detach().numpy(), **{name: leaf.grad.numpy() for name, leaf in own.items()}}


class Times(torch.nn.Module):
    """A dropout that multiplies by a given array."""

    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def in_llama(block: Block, kind: str) -> Arrays:
    """transformers' LlamaAttention with PEFT's adapters, which hold the block's numbers."""
    attention, (n, length, d) = block.attention, block.x.shape
    config = LlamaConfig(
        hidden_size=attention.heads,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.key_value_heads,
        head_dim=attention.head_dim,
        attention_bias=True,
        attn_implementation=kind,
    )
    config.hidden_size = d
    layer = LlamaAttention(config, 0).to(tensor(block.x).dtype)
    layer.scaling = attention.score_scale
    ranks = {f"{name}_proj": getattr(block.projections, name).adapters[0].A.shape[0] for name in NAMES}
    inject_adapter_in_model(LoraConfig(target_modules=list(ranks), rank_pattern=ranks), layer)
    for name in NAMES:
        projection, module = getattr(block.projections, name), getattr(layer, f"{name}_proj")
        own = projection.adapters[0]
        module.base_layer.weight.data, module.base_layer.bias.data = (
            tensor(projection.W0),
            tensor(projection.bias),
        )
        module.base_layer.bias.requires_grad_()
        module.lora_A["default"].weight.data = tensor(own.A)
        module.lora_B["default"].weight.data = tensor(own.B)
        module.scaling["default"] = own.scaling
        if own.dropout is not None:
            module.lora_dropout["default"] = Times(tensor(own.dropout))
    x = tensor(block.x).requires_grad_()
    cos, sin = (tensor(table)[None] for table in block.rotary)
    counts = tensor(np.broadcast_to(block.counts()[:, :1], (n, 1, length, length)))
    additive = torch.zeros(counts.shape, dtype=x.dtype).masked_fill(~counts, torch.finfo(x.dtype).min)
    y, _ = layer(x, position_embeddings=(cos, sin), attention_mask=additive)
    y.backward(tensor(block.dy))
    result = {"y": y, "dx": x.grad}
    for name in NAMES:
        module = getattr(layer, f"{name}_proj")
        result[f"{name}.dbias"] = module.base_layer.bias.grad
        result[f"{name}.dA"] = module.lora_A["default"].weight.grad
        result[f"{name}.dB"] = module.lora_B["default"].weight.grad
    return {name: array.detach().numpy() for name, array in result.items()}


def same(left: Arrays, right: Arrays) -> None:
    """Equal numbers, dtypes and shapes; +0 and -0 are one number (a sum's order decides its zero)."""
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert np.array_equal(array, right[name]), name


@pytest.mark.parametrize("kind", ATTEND)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_exact_tier_torch_agrees_bit_for_bit(dtype: np.dtype[Any], kind: str, data: st.DataObject) -> None:
    block = data.draw(exact_blocks({F32: 24, F64: 53}[dtype])).astype(dtype)
    computed, theirs = everything(block), in_torch(block, kind)
    probabilities = tied_probabilities(block)
    if kind == "flash" and (probabilities % 1 != 0).any():
        # Its backward pass takes exp(scores - log sum exp): log 2 is rounded. Its forward pass is exact.
        same({"y": theirs["y"]}, {"y": computed["y"]})
    else:
        same(theirs, computed)
    exact = everything(exactly(block), probabilities)
    for name, array in computed.items():
        assert array.tolist() == exact[name].tolist(), name


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@settings(max_examples=10)
@given(data=st.data())
def test_exact_tier_llama_with_peft_agrees_bit_for_bit(
    dtype: np.dtype[Any], kind: str, data: st.DataObject
) -> None:
    block = data.draw(exact_blocks({F32: 24, F64: 53}[dtype]).filter(lambda block: block.rotary is not None))
    block = block.astype(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = in_llama(block, kind)
    same(theirs, everything(block))


def bounds_of(block: Block, dtype: np.dtype[Any], exp_ulps: float) -> Arrays:
    arguments = (block.projections, block.attention, dtype)
    options: dict[str, Any] = {"rotary": block.rotary, "mask": block.mask, "exp_ulps": exp_ulps}
    backward = attention_backward_bound(block.dy, block.x, *arguments, **options)
    return {"y": attention_forward_bound(block.x, *arguments, **options), **flat(backward)}


def outside(computed: Arrays, block: Block, dtype: np.dtype[Any], exp_ulps: float = 4.0) -> list[str]:
    """Which of y and the gradients are outside the bound around the reference in float64, its own added."""
    exact = everything(block.astype(F64))
    allowed, own = bounds_of(block, dtype, exp_ulps), bounds_of(block, F64, 4.0)
    return [
        name
        for name, array in computed.items()
        if not np.all(np.abs(array.astype(F64) - exact[name]) <= allowed[name] + own[name])
    ]


@st.composite
def gaussian_blocks(draw: st.DrawFn, dtype: np.dtype[Any], most: int = 12) -> Block:
    return gaussian_block(
        draw(st.integers(0, 2**32 - 1)),
        n=draw(st.integers(1, 2)),
        length=draw(st.integers(1, most)),
        d=draw(st.integers(1, 24)),
        heads=draw(st.sampled_from([(1, 1, 8), (4, 2, 4), (3, 3, 2), (4, 1, 6)])),
        r=draw(st.sampled_from([1, 2, 9])),
        rotary=True,
        masked=draw(st.booleans()),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0])),
        size=draw(st.sampled_from([0.1, 1.0, 3.0])),
        keep=draw(st.sampled_from([0.5, 1.0])),
        dtype=dtype,
    )


@pytest.mark.parametrize("kind", ATTEND)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_derived_tier_torch_stays_within_the_bounds(
    dtype: np.dtype[Any], kind: str, data: st.DataObject
) -> None:
    block = data.draw(gaussian_blocks(dtype))
    ulps = FUSED_EXP_ULPS if kind == "flash" else 4.0
    assert not outside(in_torch(block, kind), block, dtype, ulps)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@settings(max_examples=15)
@given(data=st.data())
def test_derived_tier_llama_with_peft_stays_within_the_bounds(kind: str, data: st.DataObject) -> None:
    block = data.draw(gaussian_blocks(F32))
    assert not outside(in_llama(block, kind), block, F32, FUSED_EXP_ULPS)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_derived_tier_a_fused_pass_over_several_blocks_stays_within_the_bounds(dtype: np.dtype[Any]) -> None:
    block = gaussian_block(5, length=64, d=8, heads=(2, 1, 4), adapters=2, dtype=dtype)
    for kind in ATTEND:
        assert not outside(in_torch(block, kind), block, dtype, FUSED_EXP_ULPS)


def bfloat16_projection(name: str) -> Callable[[Block], Arrays]:
    """One projection's output is rounded to bfloat16, in the forward pass and in the backward pass."""

    def run(block: Block) -> Arrays:
        with pytest.MonkeyPatch.context() as patch:

            def rounded(x: torch.Tensor, block: Block, which: str, own: Tensors) -> torch.Tensor:
                y = right(x, block, which, own)
                return y.bfloat16().float() if which == name else y

            right = projected
            patch.setitem(globals(), "projected", rounded)
            return in_torch(block, "eager")

    return run


@pytest.mark.parametrize("name", NAMES)
def test_one_projection_rounded_to_bfloat16_is_outside_the_bounds(name: str) -> None:
    block = gaussian_block(3, length=12, d=24, heads=(4, 2, 8))
    assert not outside(in_torch(block, "eager"), block, F32)
    assert "y" in outside(bfloat16_projection(name)(block), block, F32)
