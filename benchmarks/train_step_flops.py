"""Floating-point operations of one training step, counted: the floor that no implementation can go below.

Counted are the matrix products, two operations a multiplication and addition; with N = batch * length tokens:

    a linear layer (out, in):  2 N in out forward; as many for dx, as many for dW where it is trained
    A (r, in), B (out, r):     2 N r (in + out) forward; dy B, dB, dA and A's part of dx: 2 N r (2 out + 2 in)
    attention, d wide:         4 batch length^2 d forward; as many each for (dQ, dK) and (dP, dV)

A gradient that nothing depends on is not counted: without a trained weight below it, the first layer's input
needs none. Nothing is recomputed, causal masks spare nothing, and norms, softmax, the loss and the optimizer
count nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def step_flops(
    model: Any,
    batch: int,
    length: int,
    *,
    adapted: Collection[str] = (),
    r: int = 0,
    input_grad: bool = False,
    full: bool = False,
) -> int:
    """Operations of a step of a Llama model.

    Args:
        model: a model with Llama's layers, without adapters.
        batch, length: of the token ids.
        adapted: last components of the adapted layers' names; ``r`` is their rank.
        input_grad: the embedding's output requires a gradient.
        full: the weights are trained.
    """
    N = batch * length

    def linear(name: str, module: nn.Module, x_grad: bool) -> int:
        assert isinstance(module, nn.Linear), name
        out_features, in_features = module.weight.shape
        products = 1 + x_grad + full
        factors = r * (3 * out_features + (2 + x_grad) * in_features) if name in adapted else 0
        return 2 * N * (products * in_features * out_features + factors)

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    one_product = 2 * batch * length**2 * config.num_attention_heads * head_dim
    total: int = 0
    grad = input_grad
    for layer in model.model.layers:
        q, k, v = ((grad or full or name in adapted) for name in ("q_proj", "k_proj", "v_proj"))
        for name in ("q_proj", "k_proj", "v_proj"):
            total += linear(name, getattr(layer.self_attn, name), grad)
        # Forward 2; dV, dP, dQ, dK.
        total += one_product * (2 + v + (q or k) + q + k)
        total += linear("o_proj", layer.self_attn.o_proj, q or k or v)
        grad = grad or full or q or k or v or "o_proj" in adapted
        for name in ("gate_proj", "up_proj"):
            total += linear(name, getattr(layer.mlp, name), grad)
        inner = grad or full or "gate_proj" in adapted or "up_proj" in adapted
        total += linear("down_proj", layer.mlp.down_proj, inner)
        grad = inner or "down_proj" in adapted
    return total + linear("lm_head", model.lm_head, grad)
