"""nn.MultiheadAttention with updates against the reference's attention and linear layers.

Exact tier: integers, and scores that softmax takes exactly. Derived tier: each projection within the linear
layer's bound, the whole block within the attention's.
"""

from typing import Any

import numpy as np
import pytest
import torch
from exact_attention import Block, everything, exactly, flat, tied_probabilities
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_problems import LinearProblem, linear_problems
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_layers import frozen, give, gradients_of
from torch_modes import (
    DEVICES,
    LAYER_MODES,
    MODES,
    Mode,
    arithmetic,
    assert_bounded,
    assert_equal,
    autocast,
    cases,
    finite,
    placed,
    wide,
)

from loracle.reference import (
    Attention,
    LowRank,
    Projection,
    Projections,
    attention_backward_bound,
    attention_forward_bound,
)
from loracle.torch_impl.multihead import LoraMultiheadAttention, LoraProjection

F64 = MODES["float64"]


def projection_of(problem: LinearProblem, mode: Mode, device: str) -> LoraProjection:
    """A projection of the problem's numbers."""
    base = nn.Linear(problem.W0.shape[1], len(problem.W0), bias=problem.bias is not None)
    base.weight = frozen(problem.W0, mode.base, device)
    if problem.bias is not None:
        base.bias = frozen(problem.bias, mode.base, device)
    layer = LoraProjection(base, "weight", "bias")
    give(layer, problem.adapters, mode.adapter, device)
    return layer


def straight(problem: LinearProblem) -> LinearProblem:
    """The problem without what a projection has not: dropout, and weights stored (in, out)."""
    W0 = problem.W0.T.copy() if problem.fan_in_fan_out else problem.W0
    adapters = tuple(
        LowRank(own.A, own.B, own.scaling, bias=own.bias) for own in problem.adapters if own.scaling
    )
    return LinearProblem(problem.dy, W0, adapters, problem.x, problem.bias)


def as_given(problem: LinearProblem, mode: Mode) -> LinearProblem:
    """The problem with the numbers that the tensors have, in float64."""

    def rounded(array: Any, dtype: Any) -> Any:
        return None if array is None else array.astype(dtype).astype(float)

    adapters = tuple(
        LowRank(
            rounded(own.A, mode.adapter),
            rounded(own.B, mode.adapter),
            own.scaling,
            bias=rounded(own.bias, mode.adapter),
        )
        for own in problem.adapters
    )
    return LinearProblem(
        rounded(problem.dy, mode.computes),
        rounded(problem.W0, mode.base),
        adapters,
        rounded(problem.x, mode.base),
        rounded(problem.bias, mode.base),
    )


def run(problem: LinearProblem, mode: Mode, device: str) -> tuple[Tensor, dict[Any, Tensor]]:
    """What a module computes that multiplies by the weight it reads, and the gradients."""
    layer = projection_of(problem, mode, device)
    leaves: dict[Any, Tensor] = {"x": placed(problem.x, mode.base, device).requires_grad_()}
    for number, update in enumerate(layer.updates):
        leaves |= {(number, "A"): update.lora_A, (number, "B"): update.lora_B}
        if update.lora_bias is not None:
            leaves[number, "bias"] = update.lora_bias
    with arithmetic(device, mode), autocast(device, mode):
        y = nn.functional.linear(leaves["x"], layer.weight, layer.bias)
    with arithmetic(device, mode):
        return y.detach(), gradients_of(y, placed(problem.dy, mode.computes, device), leaves)


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=20)
@given(data=st.data())
def test_a_projection_of_small_integers_is_exact(device: str, mode: Mode, data: st.DataObject) -> None:
    problem = straight(data.draw(linear_problems(mode.computes, exact=True, rows=False)).astype(float))
    y, gradients = run(problem, mode, device)
    assert_equal(y, problem.forward())
    expected = problem.backward()
    for key, gradient in gradients.items():
        assert_equal(gradient, expected[key], key)


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=15)
@given(data=st.data())
def test_a_projection_stays_within_the_linear_bound(device: str, mode: Mode, data: st.DataObject) -> None:
    problem = straight(data.draw(linear_problems(np.float64, rows=False)))
    y, gradients = run(problem, mode, device)
    assume(finite(y, *gradients.values()))
    given_numbers = as_given(problem, mode)
    exact, bounds = given_numbers.rational(), given_numbers.backward_bound(mode.precision)
    assert_bounded(y, exact.forward(), given_numbers.forward_bound(mode.precision), mode, "y")
    expected = exact.backward()
    for key, gradient in gradients.items():
        assert_bounded(gradient, expected[key], bounds[key], mode, key)


# Embedding, heads and tokens; a head of one number is scaled by 1, of sixteen by 1/4.
SIZES = [(1, 1, 2), (2, 2, 2), (4, 4, 4), (16, 1, 2), (3, 3, 1)]


def attention_layer(block: Block, mode: Mode, device: str) -> LoraMultiheadAttention:
    """The block as torch's module, whose first three projections are one matrix and have one A."""
    q, k, v, o = block.projections
    base = nn.MultiheadAttention(len(o.W0), block.attention.heads, batch_first=True)
    base.in_proj_weight = frozen(np.concatenate([q.W0, k.W0, v.W0]), mode.base, device)
    base.in_proj_bias = frozen(np.concatenate([q.bias, k.bias, v.bias]), mode.base, device)
    base.out_proj.weight = frozen(o.W0, mode.base, device)
    base.out_proj.bias = frozen(o.bias, mode.base, device)
    layer = LoraMultiheadAttention(base)
    own = [each.adapters[0] for each in (q, k, v)]
    joint = LowRank(own[0].A, np.concatenate([each.B for each in own]), own[0].scaling)
    for part, adapter in zip(layer.lora_layers().values(), (joint, o.adapters[0]), strict=True):
        give(part, [adapter], mode.adapter, device)
    return layer


def attend(block: Block, mode: Mode, device: str, *, need_weights: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients of x and the factors."""
    layer = attention_layer(block, mode, device)
    inner, outer = (part.update("adapter0") for part in layer.lora_layers().values())
    leaves = {
        "dx": placed(block.x, mode.base, device).requires_grad_(),
        "dA": inner.lora_A,
        "dB": inner.lora_B,
        "o.dA": outer.lora_A,
        "o.dB": outer.lora_B,
    }
    mask = torch.from_numpy(np.repeat(~block.counts()[:, 0], block.attention.heads, axis=0)).to(device)
    x = leaves["dx"]
    with sdpa_kernel(SDPBackend.MATH), arithmetic(device, mode):
        y, _ = layer(x, x, x, attn_mask=mask, need_weights=need_weights)
        return y.detach(), gradients_of(y, placed(block.dy, mode.computes, device), leaves)


def joined(values: dict[str, Any]) -> dict[str, Any]:
    """The gradients of the parts as those of the one matrix; a sum of A's, B's one after the other."""
    return {
        "dx": values["dx"],
        "dA": values["q.dA"] + values["k.dA"] + values["v.dA"],
        "dB": np.concatenate([values["q.dB"], values["k.dB"], values["v.dB"]]),
        "o.dA": values["o.dA"],
        "o.dB": values["o.dB"],
    }


@st.composite
def integer_blocks(draw: st.DrawFn, *, half: bool = False) -> Block:
    """Small integers; each query attends to one key, or to several whose scores are equal.

    With ``half`` to one key, and so few that no sum but those for dx and dA leaves bfloat16's integers.
    """
    width, heads, length = draw(st.sampled_from(SIZES[:2] if half else SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    several = not half and draw(st.booleans())
    r = 1 if half else draw(st.integers(1, 2))

    def integers(*shape: int) -> Any:
        return rng.integers(-1, 2, shape).astype(float)

    A = integers(r, width)

    def projection(A: Any) -> Projection:
        return Projection(integers(width, width), (LowRank(A, integers(width, r), 0.5),), integers(width))

    q, k, v = (projection(A) for _ in range(3))
    if several:
        # Scores of zero: either side's numbers are, and the other's gradient is not.
        zero = draw(st.sampled_from([q, k]))
        for array in (zero.W0, zero.adapters[0].B, zero.bias):
            array[:] = 0
    mask = np.zeros((length, length), bool)
    count = draw(st.sampled_from([n for n in (1, 2, 4) if n <= length])) if several else 1
    for row in mask:
        row[rng.permutation(length)[:count]] = True
    n = 1 if half else draw(st.integers(1, 2))
    x, dy = integers(n, length, width), integers(n, length, width)
    attention = Attention(heads, heads, width // heads, causal=False)
    return Block(x, dy, Projections(q, k, v, projection(integers(r, width))), attention, None, mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["float32", "float64"])
@settings(max_examples=40)
@given(block=integer_blocks())
def test_attention_of_small_integers_is_exact(
    device: str, need_weights: bool, name: str, block: Block
) -> None:
    y, gradients = attend(block, MODES[name], device, need_weights=need_weights)
    exact = everything(exactly(block), tied_probabilities(block))
    assert_equal(y, exact["y"])
    expected = joined(exact)
    for key, gradient in gradients.items():
        assert_equal(gradient, expected[key], key)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@settings(max_examples=40)
@given(block=integer_blocks(half=True))
def test_attention_to_one_key_is_exact_in_half_precision(name: str, block: Block) -> None:
    y, gradients = attend(block, MODES[name], "cpu", need_weights=True)
    exact = everything(exactly(block), tied_probabilities(block))
    assert_equal(y, exact["y"])
    expected = joined(exact)
    for key in ("dB", "o.dA", "o.dB"):
        assert_equal(gradients[key], expected[key], key)


@st.composite
def gaussian_blocks(draw: st.DrawFn) -> Block:
    width, heads = draw(st.sampled_from([(4, 2), (6, 3), (8, 1), (12, 2)]))
    n, length, r = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scaling = draw(st.sampled_from([0.5, 1 / 3, -1.7]))

    def projection(A: Any) -> Projection:
        own = LowRank(A, rng.normal(0, r**-0.5, (width, r)), scaling)
        return Projection(rng.normal(0, width**-0.5, (width, width)), (own,), rng.normal(0, 0.3, width))

    A, other = rng.normal(0, width**-0.5, (2, r, width))
    mask = (rng.random((n, 1, length, length)) < 0.7) | np.eye(length, dtype=bool)
    x, dy = rng.normal(0, 1, (2, n, length, width))
    projections = Projections(projection(A), projection(A), projection(A), projection(other))
    return Block(x, dy, projections, Attention(heads, heads, width // heads, causal=False), None, mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["float32", "float64"])
@settings(max_examples=20)
@given(block=gaussian_blocks())
def test_attention_stays_within_the_bound(device: str, need_weights: bool, name: str, block: Block) -> None:
    """In float64 stands for the exact value, with its own bound added; dA's sum of three has none."""
    mode = MODES[name]
    block = block.astype(mode.base)
    y, gradients = attend(block, mode, device, need_weights=need_weights)
    exact = everything(block.astype(np.float64))
    allowed, own = _bounds(block, mode.precision), _bounds(block, F64.precision)
    assert (np.abs(wide(y) - exact["y"]) <= allowed["y"] + own["y"]).all()
    expected, allowed, own = joined(exact), joined(allowed), joined(own)
    for key in ("dx", "dB", "o.dA", "o.dB"):
        error = np.abs(wide(gradients[key]) - expected[key])
        assert (error <= allowed[key] + own[key]).all(), key


def _bounds(block: Block, precision: Any) -> dict[str, Any]:
    arguments = block.projections, block.attention, precision
    gradients = attention_backward_bound(block.dy, block.x, *arguments, mask=block.mask)
    return {"y": attention_forward_bound(block.x, *arguments, mask=block.mask), **flat(gradients)}
