"""Embeddings with updates and with trained rows: exact on small integers, within the bounds elsewhere."""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from exact_linear import error, rational
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_problems import EmbeddingProblem, LinearProblem, embedding_problems, linear_problems
from torch import Tensor

from loracle.reference import LowRank, Precision, unit_roundoff
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.embedding_function import EmbeddingTerm, lora_embedding
from loracle.torch_impl.row_function import embedding_with_rows, linear_with_rows

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
IDS = st.sampled_from([torch.int64, torch.int32])


@dataclass(frozen=True)
class Mode:
    """Dtypes of the base and of what trains, and what the products are summed in; autocast or not."""

    base: Any
    trained: Any
    accumulates: Any
    autocast: bool = False

    @property
    def precision(self) -> Precision:
        return Precision(self.base, accumulator=self.accumulates)


MODES = {
    "float64": Mode(np.float64, np.float64, np.float64),
    "float32": Mode(np.float32, np.float32, np.float32),
    "float16": Mode(np.float16, np.float32, np.float32),
    "bfloat16": Mode(BFLOAT16, np.float32, np.float32),
    "bfloat16 throughout": Mode(BFLOAT16, BFLOAT16, np.float32),
    "autocast": Mode(np.float32, np.float32, np.float32, autocast=True),
}
MODE = pytest.mark.parametrize("name", MODES)


def tensor(array: Any, dtype: Any, device: str) -> Tensor:
    return tensor_of(np.asarray(array).astype(dtype)).to(device)


def wide(t: Tensor) -> Any:
    return array_of(t.detach().double())


def within(got: Tensor, exact: Any, bound: Any, computes: Any) -> None:
    """Within the bound, and one rounding more where a gradient is stored in less than it is computed in."""
    stored = unit_roundoff(array_of(got).dtype) * (np.abs(exact).astype(np.float64) + bound)
    narrower = array_of(got).dtype.itemsize < np.dtype(computes).itemsize
    allowed = bound + stored if narrower else bound
    off = error(wide(got), exact)
    assert (off <= allowed).all(), f"{float((off - allowed).max())} above the bound"


def run_embedding(
    p: EmbeddingProblem, mode: Mode, device: str, ids_dtype: torch.dtype, scale_tensor: bool
) -> tuple[EmbeddingProblem, Tensor, dict[Any, Tensor]]:
    """The problem as torch sees it, y, and the gradients; the way back runs outside autocast."""
    ids = torch.from_numpy(p.ids).to(device, ids_dtype)
    W0, dy = tensor(p.W0, mode.base, device), tensor(p.dy, mode.base, device)
    factors = [
        (tensor(own.A, mode.trained, device), tensor(own.B, mode.trained, device)) for own in p.adapters
    ]
    leaves = {
        (i, n): t.requires_grad_() for i, AB in enumerate(factors) for n, t in zip("AB", AB, strict=True)
    }
    terms = [EmbeddingTerm(A, B, own.scaling) for (A, B), own in zip(factors, p.adapters, strict=True)]
    scale: Any = p.embed_scale
    if scale is not None and scale_tensor:
        scale = tensor(scale, mode.base, device)
        p = replace(p, embed_scale=float(scale.double()))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mode.autocast):
        y = lora_embedding(ids, W0, terms, scale, p.padding_idx)
    assert y.dtype is W0.dtype
    assert y.shape == dy.shape
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    for leaf, gradient in zip(leaves.values(), gradients, strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
    seen = replace(
        p,
        W0=wide(W0),
        dy=wide(dy),
        adapters=tuple(
            LowRank(wide(A), wide(B), own.scaling) for (A, B), own in zip(factors, p.adapters, strict=True)
        ),
    )
    return seen, y.detach(), dict(zip(leaves, gradients, strict=True))


@DEVICES
@MODE
@settings(max_examples=40)
@given(data=st.data(), ids=IDS, scale_tensor=st.booleans())
def test_small_integers_come_out_exactly(
    device: str, name: str, data: st.DataObject, ids: torch.dtype, scale_tensor: bool
) -> None:
    mode = MODES[name]
    p = data.draw(embedding_problems(mode.base, exact=True).filter(lambda p: p.adapters))
    p, y, gradients = run_embedding(p.astype(np.float64), mode, device, ids, scale_tensor)
    assert np.array_equal(wide(y), p.forward())
    expected = p.backward()
    assert expected.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert np.array_equal(wide(gradient), expected[key]), key


@DEVICES
@MODE
@settings(max_examples=25)
@given(data=st.data(), ids=IDS, scale_tensor=st.booleans())
def test_everything_else_stays_within_the_bounds(
    device: str, name: str, data: st.DataObject, ids: torch.dtype, scale_tensor: bool
) -> None:
    mode = MODES[name]
    p = data.draw(embedding_problems(np.float64).filter(lambda p: p.adapters))
    p, y, gradients = run_embedding(p, mode, device, ids, scale_tensor)
    assume(all(bool(t.isfinite().all()) for t in (y, *gradients.values())))  # float16 overflows at 65504
    exact, bounds = p.rational(), p.backward_bound(mode.precision)
    within(y, exact.forward(), p.forward_bound(mode.precision), mode.base)
    expected = exact.backward()
    assert expected.keys() == gradients.keys()
    for key, gradient in gradients.items():
        within(gradient, expected[key], bounds[key], mode.base)


@dataclass(frozen=True, eq=False)
class Rows:
    """A problem in which some tokens have rows of their own, and what the reference says of it.

    Seen as an update, the rows are ``W0 + onehot (rows - W0[tokens])``: lora_A is the difference, lora_B has
    a one for each token, and the gradient of the rows is that of lora_A.
    """

    tokens: Any
    rows: Any

    def weight(self, W0: Any) -> Any:
        W = W0.copy()
        W[self.tokens] = self.rows
        return W

    def update(self, W0: Any) -> LowRank:
        onehot = np.zeros((len(W0), len(self.tokens)), W0.dtype)
        onehot[self.tokens, range(len(self.tokens))] = 1
        if W0.dtype == object:
            onehot = rational(onehot.astype(np.float64))
        return LowRank(self.rows - W0[self.tokens], onehot, 1.0)


def drawn_rows(data: st.DataObject, W0: Any, exact: bool) -> Rows:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens = rng.permutation(len(W0))[: data.draw(st.integers(1, len(W0)))]
    # A permutation of W0's entries, which are as large as the tier allows.
    return Rows(tokens, rng.permutation(W0.ravel()).reshape(W0.shape)[tokens])


def run_embedding_rows(
    p: EmbeddingProblem, own: Rows, mode: Mode, device: str
) -> tuple[EmbeddingProblem, Rows, Tensor, Tensor]:
    ids = torch.from_numpy(p.ids).to(device)
    W0, dy = tensor(p.W0, mode.base, device), tensor(p.dy, mode.base, device)
    rows = tensor(own.rows, mode.trained, device).requires_grad_()
    places = torch.full((len(p.W0),), len(own.tokens), device=device)
    places[torch.from_numpy(own.tokens).to(device)] = torch.arange(len(own.tokens), device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mode.autocast):
        y = embedding_with_rows(ids, W0, rows, places, p.embed_scale, p.padding_idx)
    assert y.dtype is W0.dtype
    (gradient,) = torch.autograd.grad(y, rows, dy)
    assert (gradient.dtype, gradient.shape) == (rows.dtype, rows.shape)
    seen = Rows(own.tokens, wide(rows.to(W0.dtype)))
    return replace(p, W0=wide(W0), dy=wide(dy), adapters=()), seen, y.detach(), gradient


def row_gradient(p: EmbeddingProblem) -> EmbeddingProblem:
    """A problem whose dA is the transposed gradient of the whole weight: B is the identity."""
    d = p.W0.shape[1]
    return replace(p, adapters=(LowRank(np.zeros(p.W0.shape[::-1]), np.eye(d), 1.0),))


@DEVICES
@MODE
@settings(max_examples=30)
@given(data=st.data())
def test_rows_of_an_embedding_come_out_exactly_on_small_integers(
    device: str, name: str, data: st.DataObject
) -> None:
    mode = MODES[name]
    p = data.draw(embedding_problems(mode.base, exact=True)).astype(np.float64)
    p, own, y, gradient = run_embedding_rows(p, drawn_rows(data, p.W0, True), mode, device)
    assert np.array_equal(wide(y), replace(p, W0=own.weight(p.W0)).forward())
    expected = row_gradient(p).backward()[0, "A"].T[own.tokens]
    assert np.array_equal(wide(gradient), expected)


@DEVICES
@MODE
@settings(max_examples=20)
@given(data=st.data())
def test_rows_of_an_embedding_stay_within_the_bounds(device: str, name: str, data: st.DataObject) -> None:
    mode = MODES[name]
    p = data.draw(embedding_problems(np.float64))
    p, own, y, gradient = run_embedding_rows(p, drawn_rows(data, p.W0, False), mode, device)
    merged = replace(p, W0=own.weight(p.W0))
    within(y, merged.rational().forward(), merged.forward_bound(mode.precision), mode.base)
    problem = row_gradient(p)
    exact = problem.rational().backward()[0, "A"].T[own.tokens]
    within(gradient, exact, problem.backward_bound(mode.precision)[0, "A"].T[own.tokens], mode.base)


def run_linear_rows(
    p: LinearProblem, own: Rows, mode: Mode, device: str
) -> tuple[LinearProblem, Rows, Tensor, Tensor, Tensor]:
    computes = BFLOAT16 if mode.autocast else mode.base
    x = tensor(p.x, mode.base, device).requires_grad_()
    W0, dy = tensor(p.W0, mode.base, device), tensor(p.dy, computes, device)
    bias = None if p.bias is None else tensor(p.bias, mode.base, device)
    rows = tensor(own.rows, mode.trained, device).requires_grad_()
    tokens = torch.from_numpy(own.tokens).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mode.autocast):
        y = linear_with_rows(x, W0, bias, rows, tokens)
    assert array_of(y).dtype == computes
    dx, drows = torch.autograd.grad(y, (x, rows), dy)
    for leaf, gradient in ((x, dx), (rows, drows)):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
    seen = replace(p, x=wide(x), W0=wide(W0), dy=wide(dy), bias=None if bias is None else wide(bias))
    return seen, Rows(own.tokens, wide(rows.to(W0.dtype))), y.detach(), dx, drows


def plain_linear(data: st.DataObject, dtype: Any, exact: bool) -> LinearProblem:
    p = data.draw(linear_problems(dtype, exact=exact, rows=False)).astype(np.float64)
    W0 = p.W0.T.copy() if p.fan_in_fan_out else p.W0
    return replace(p, W0=W0, fan_in_fan_out=False, adapters=())


@DEVICES
@MODE
@settings(max_examples=30)
@given(data=st.data())
def test_rows_of_an_output_layer_come_out_exactly_on_small_integers(
    device: str, name: str, data: st.DataObject
) -> None:
    mode = MODES[name]
    p = plain_linear(data, BFLOAT16 if mode.autocast else mode.base, True)
    p, own, y, dx, drows = run_linear_rows(p, drawn_rows(data, p.W0, True), mode, device)
    merged = replace(p, W0=own.weight(p.W0))
    assert np.array_equal(wide(y), merged.forward())
    assert np.array_equal(wide(dx), merged.backward()["x"])
    update = replace(p, adapters=(own.update(p.W0),))
    assert np.array_equal(wide(drows), update.backward()[0, "A"])


@DEVICES
@MODE
@settings(max_examples=20)
@given(data=st.data())
def test_rows_of_an_output_layer_stay_within_the_bounds(device: str, name: str, data: st.DataObject) -> None:
    mode = MODES[name]
    precision = Precision(BFLOAT16, accumulator=np.float32) if mode.autocast else mode.precision
    p = plain_linear(data, np.float64, False)
    p, own, y, dx, drows = run_linear_rows(p, drawn_rows(data, p.W0, False), mode, device)
    merged = replace(p, W0=own.weight(p.W0))
    within(y, merged.rational().forward(), merged.forward_bound(precision), precision.dtype)
    exact = p.rational()
    exact_own = Rows(own.tokens, rational(own.rows))
    expected = replace(exact, adapters=(exact_own.update(exact.W0),)).backward()
    bounds = replace(p, adapters=(own.update(p.W0),)).backward_bound(precision)
    within(dx, expected["x"], bounds["x"], precision.dtype)
    within(drows, expected[0, "A"], bounds[0, "A"], precision.dtype)
