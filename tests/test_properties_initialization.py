"""Starts of adapters: the reference and PEFT.

Random starts have the support and the moments of PEFT's. Starts from the weight have its update and residual,
within what both decompositions and both roundings may be off by.
"""

import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from loracle.reference import (
    LowRank,
    adapter_start,
    embedding_start,
    gamma,
    lora_scaling,
    merge_bound,
    unit_roundoff,
)

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
U32, U64 = unit_roundoff(F32), unit_roundoff(F64)
SIGMAS = 6  # a mean of n draws strays farther once in 10^9 seeds


def peft_layer(base, value, r, seed=0, **config):
    """Return PEFT's layer around ``base`` with ``init_lora_weights=value``."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({"layer": base})
    config = {"r": r, "target_modules": ["layer"], "init_lora_weights": value} | config
    return peft.get_peft_model(model, peft.LoraConfig(**config)).base_model.model["layer"]


def linear(W0):
    base = torch.nn.Linear(W0.shape[1], W0.shape[0], bias=False)
    base.weight.data = torch.from_numpy(W0.copy())
    return base


def conv1d(W0):
    """GPT-2's layer, whose weight is (in, out)."""
    base = Conv1D(W0.shape[0], W0.shape[1])
    base.weight.data = torch.from_numpy(np.ascontiguousarray(W0.T))
    return base


def factors(layer):
    """A and B of the layer, as NumPy arrays."""
    tensors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return tuple(value.detach().numpy() for value in tensors)


def base_weight(layer):
    return layer.base_layer.weight.detach().numpy()


def check_same_distribution(ours, theirs, second, fourth):
    """Check that the mean squares of both are that of the distribution, and so are the means."""
    for values in (ours, theirs):
        values = values.astype(F64)
        assert abs(values.mean()) <= SIGMAS * math.sqrt(second / values.size)
        spread = SIGMAS * math.sqrt((fourth - second**2) / values.size)
        assert abs((values**2).mean() - second) <= spread


@pytest.mark.parametrize("value", [True, False])
def test_kaiming_has_pefts_support_and_moments(value):
    W0 = np.zeros((500, 400), F32)
    start = adapter_start(value, W0, 16, 1.0, np.random.default_rng(0))
    A, B = factors(peft_layer(linear(W0), value, 16))
    assert (A.shape, B.shape) == (start.A.shape, start.B.shape)
    pairs = [(start.A, A, 1 / 20)] + ([] if value else [(start.B, B, 1 / 4)])
    for ours, theirs, bound in pairs:
        for values in (ours, theirs):
            assert bound * (1 - 20 / values.size) <= np.abs(values).max() <= F32.type(bound)
        check_same_distribution(ours, theirs, bound**2 / 3, bound**4 / 5)
    assert B.any() == start.B.any() == (not value)


def test_gaussian_has_pefts_moments():
    W0 = np.zeros((5, 3000), F32)
    start = adapter_start("gaussian", W0, 8, 1.0, np.random.default_rng(0))
    A, B = factors(peft_layer(linear(W0), "gaussian", 8))
    check_same_distribution(start.A, A, 1 / 64, 3 / 64**2)
    assert not B.any()
    assert not start.B.any()


def test_orthogonal_has_pefts_norms_and_no_update():
    """100 times a factor's sum of squares is that of (r / 2) n normal numbers."""
    W0 = np.zeros((3000, 2000), F32)
    start = adapter_start("orthogonal", W0, 8, 1.0, np.random.default_rng(0))
    theirs = factors(peft_layer(linear(W0), "orthogonal", 8))
    for values in (start.A, start.B, *theirs):
        n = values.size // 2
        assert abs(100 * (values.astype(F64) ** 2).sum() - n) <= SIGMAS * math.sqrt(2 * n)
    for A, B, u in ((start.A, start.B, U64), (*theirs, U32)):
        A, B = A.astype(F64)[:, :50], B.astype(F64)[:50]
        sizes = np.abs(B) @ np.abs(A)
        # Stored factors, then Q by Householder's QR (Higham, theorem 19.4 with c = 10) and its products.
        computed = math.sqrt(8) * gamma(10 * 64, u) + 2 * gamma(8, u)
        norms = np.outer(np.linalg.norm(B, axis=1), np.linalg.norm(A, axis=0))
        assert (np.abs(B @ A) <= (2 * U32 + U32**2 + gamma(8, U64)) * sizes + 3 * computed * norms).all()


@pytest.mark.parametrize("value", [True, "gaussian", False])
def test_an_embedding_starts_as_pefts_does(value):
    base = torch.nn.Embedding(3000, 40)
    layer = peft_layer(base, value, 6)
    A = layer.lora_embedding_A["default"].detach().numpy()
    B = layer.lora_embedding_B["default"].detach().numpy()
    W0 = base_weight(layer)
    start = embedding_start(W0, 6, np.random.default_rng(0), zero_A=value is not False)
    assert (A.shape, B.shape) == (start.A.shape, start.B.shape)
    assert A.any() == start.A.any() == (value is False)
    check_same_distribution(start.B, B, 1.0, 3.0)
    if value is False:
        check_same_distribution(start.A, A, 1.0, 3.0)


def backward_error(W, u):
    """||E|| of a decomposition that is exact for W + E: p u ||W||_F with p = 10 m n.

    LAPACK Users' Guide, section 4.9, for singular values; Higham, theorem 19.4, for QR.
    """
    return 10 * W.size * u * np.linalg.norm(W)


def truncation_error(W, sharpness, u):
    """How far P' (W + E) may be from P W in the 2-norm, where ``||P' - P|| <= ||E|| / sharpness``."""
    E = backward_error(W, u)
    assert sharpness / 2 > E
    return E * (1 + np.linalg.norm(W, 2) / (sharpness - E))


def update(A, B, scaling):
    return scaling * (B.astype(F64) @ A.astype(F64))


def compare(W0, start, layer, truncation, scaling, fan_in_fan_out=False):
    """Check PEFT's update and residual against the reference's; return what the updates may differ by.

    ``truncation`` is what the two decompositions may move the update by.
    """
    A, B = factors(layer)
    theirs, ours = (np.abs(b.astype(F64)) @ np.abs(a.astype(F64)) for a, b in ((A, B), (start.A, start.B)))
    # PEFT rounds a quotient, a root, and a product with a diagonal matrix for each factor; the reference
    # rounds each factor once, and works in float64 otherwise, as `update` does.
    allowed = truncation + scaling * (gamma(6, U32) * theirs + gamma(2, U32) * ours)
    allowed = allowed + gamma(len(A) + 8, U64) * scaling * (theirs + ours)
    difference = np.abs(update(A, B, scaling) - update(start.A, start.B, scaling))
    assert (difference <= allowed).all()
    residual = base_weight(layer).T if fan_in_fan_out else base_weight(layer)
    own = start.W0.T if fan_in_fan_out else start.W0
    rounding = merge_bound(W0, [LowRank(A, B, -scaling)], F32) + U32 * np.abs(own)
    assert (np.abs(residual.astype(F64) - own) <= allowed + rounding).all()
    return allowed


@st.composite
def problems(draw):
    """W0 whose r-th singular value is at least three times the next, in float32, and r."""
    out_features, in_features = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    r = draw(st.integers(1, min(out_features, in_features)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = min(out_features, in_features)
    P, _ = np.linalg.qr(rng.standard_normal((out_features, rank)))
    Q, _ = np.linalg.qr(rng.standard_normal((in_features, rank)))
    S = np.concatenate([rng.uniform(3, 6, r), rng.uniform(0.5, 1, rank - r)])
    return (P * S @ Q.T).astype(F32), r


@pytest.mark.parametrize("config", [{"lora_alpha": 4}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@settings(max_examples=15)
@given(problem=problems())
def test_pissa_is_pefts_update_and_residual(layout, config, problem):
    W0, r = problem
    scaling = lora_scaling(r, config["lora_alpha"], config.get("use_rslora", False))
    turned = layout == "conv1d"
    layer = peft_layer((conv1d if turned else linear)(W0), "pissa", r, **config, fan_in_fan_out=turned)
    assert layer.scaling["default"] == scaling
    given_weight = np.ascontiguousarray(W0.T) if turned else W0
    start = adapter_start("pissa", given_weight, r, scaling, np.random.default_rng(0), fan_in_fan_out=turned)
    S = np.linalg.svd(W0.astype(F64), compute_uv=False)
    gap = S[r - 1] - (S[r] if r < len(S) else 0)
    truncation = sum(truncation_error(W0.astype(F64), gap, u) for u in (U32, U64))
    allowed = compare(W0, start, layer, truncation, scaling, turned)
    for wrong in (scaling * 1.01, -scaling):
        moved = np.abs(update(*factors(layer), wrong) - update(start.A, start.B, scaling))
        assert (moved > allowed).any()


@pytest.mark.parametrize("config", [{"lora_alpha": 4}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
@settings(max_examples=15)
@given(problem=problems())
def test_olora_is_pefts_update_and_residual(config, problem):
    W0, r = problem
    scaling = lora_scaling(r, config["lora_alpha"], config.get("use_rslora", False))
    layer = peft_layer(linear(W0), "olora", r, **config)
    start = adapter_start("olora", W0, r, scaling, np.random.default_rng(0))
    least = np.linalg.svd(W0[:, :r].astype(F64), compute_uv=False)[-1]
    assume(least > 4 * backward_error(W0.astype(F64), U32))
    truncation = scaling * sum(truncation_error(W0.astype(F64), least, u) for u in (U32, U64))
    allowed = compare(W0, start, layer, truncation, scaling)
    moved = np.abs(update(*factors(layer), 1.01 * scaling) - update(start.A, start.B, scaling))
    assert (moved > allowed).any()


def test_peft_forgets_the_layout_in_olora():
    """Its factors of a Conv1D are those of the transposed weight, and do not fit; the reference's do."""
    W0 = np.random.default_rng(1).standard_normal((3, 5)).astype(F32)
    layer = peft_layer(conv1d(W0), "olora", 2, fan_in_fan_out=True)
    A, B = factors(layer)
    assert (A.shape, B.shape) == ((2, 3), (5, 2))
    weight = np.ascontiguousarray(W0.T)
    start = adapter_start("olora", weight, 2, 1.0, np.random.default_rng(0), fan_in_fan_out=True)
    assert (start.A.shape, start.B.shape) == ((2, 5), (3, 2))


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_peft_shrinks_a_rank_that_the_reference_refuses(value):
    A, B = factors(peft_layer(linear(np.eye(3, 5, dtype=F32)), value, 4))
    assert (A.shape, B.shape) == ((3, 5), (3, 3))


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_the_layer_with_pefts_start_computes_what_it_did(value):
    """Both layers give x W0^T: the reference's stays within half a unit of its residual, times |x|."""
    rng = np.random.default_rng(2)
    W0 = rng.standard_normal((6, 8)).astype(F32)
    start = adapter_start(value, W0, 3, 2.0, rng)
    x = rng.standard_normal((5, 8))
    W = start.W0.astype(F64) + update(start.A, start.B, 2.0)
    rounding = U32 * np.abs(start.W0.astype(F64)) + gamma(5, U64) * (np.abs(W) + np.abs(start.W0))
    size = 2.0 * np.abs(start.B.astype(F64)) @ np.abs(start.A.astype(F64))
    allowed = np.abs(x) @ (rounding + gamma(5, U64) * size + gamma(8, U64) * (np.abs(W) + np.abs(W0))).T
    assert (np.abs(x @ W.T - x @ W0.astype(F64).T) <= allowed).all()
    assert (np.abs(x @ start.W0.astype(F64).T - x @ W0.astype(F64).T) > allowed).any()
