"""DoRA in torch against the reference: exact on whole norms, within its bounds elsewhere; in models too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from dora_problems import (
    GRADIENTS,
    DoraProblem,
    dora_problems,
    exact_dora_problems,
    exact_problems_of,
    gaussian_problem,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusal import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_fixtures import Chain, same_bits
from torch_modes import (
    LAYER_MODES,
    MODES,
    Mode,
    arithmetic,
    assert_bounded,
    assert_equal,
    autocast,
    cases,
    exactly,
    finite,
    placed,
    wide,
)
from transformers.pytorch_utils import Conv1D

from loracle.files import LoraConfig, read_adapter
from loracle.reference import (
    ConfigError,
    LowRank,
    NonFiniteError,
    ShapeError,
    adapter_start,
    dora_backward_bound,
    dora_forward_bound,
    dora_magnitude_start,
    dora_norm_bound,
    merge_dora,
)
from loracle.torch_impl import (
    LoraLinear,
    adapter_of,
    disable_adapter,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from loracle.torch_impl import dora as dora_module
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.dora import dora_linear, dora_norm
from loracle.torch_impl.dropout import SeededDropout
from loracle.torch_impl.update import UpdateOptions

LEAVES = ("x", "A", "B", "bias", "magnitude")


def tensors_of(p: DoraProblem, mode: Mode, device: str) -> dict[str, Tensor]:
    dtypes = {"A": mode.adapter, "B": mode.adapter, "magnitude": mode.adapter, "dy": mode.computes}
    present = {name: getattr(p, name) for name in (*LEAVES, "W0", "dropout", "dy")}
    tensors = {
        name: placed(array, dtypes.get(name, mode.base), device)
        for name, array in present.items()
        if array is not None
    }
    for name in LEAVES:
        tensors[name].requires_grad_()
    return tensors


def run(own: dict[str, Tensor], scaling: float, mode: Mode, *, turned: bool = False) -> dict[str, Tensor]:
    """y and the gradients by the reference's names; W0 as the view of a Conv1D's weight where ``turned``."""
    W0 = own["W0"].t().contiguous().t() if turned else own["W0"]
    operands = (own["x"], W0, own["bias"], own["A"], own["B"], scaling, own["magnitude"])
    device = own["x"].device.type
    with arithmetic(device, mode):
        with autocast(device, mode):
            y = dora_linear(*operands, own.get("dropout"))
        gradients = torch.autograd.grad(y, [own[name] for name in LEAVES], own["dy"])
    for name, gradient in zip(LEAVES, gradients, strict=True):
        assert gradient.dtype is own[name].dtype
        assert gradient.shape == own[name].shape
    assert array_of(y.detach()).dtype == mode.computes
    return {"y": y.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def expected_of(p: DoraProblem) -> dict[str, Any]:
    gradients = p.backward()
    return {"y": p.forward(), **{name: getattr(gradients, name) for name in GRADIENTS}}


def bounds_of(p: DoraProblem, mode: Mode) -> dict[str, Any]:
    """The reference's bounds; a problem with too uncertain a norm is none for this precision."""
    operands = (p.x, *p.weight, p.magnitude, mode.precision)
    try:
        own = dora_backward_bound(p.dy, *operands, bias=p.bias)
        y = dora_forward_bound(*operands, bias=p.bias)
    except ConfigError as error:
        assert "error of each norm" in str(error)  # noqa: PT017
        assume(False)
    return {"y": y, **{name: getattr(own, name) for name in GRADIENTS}}


def stored(own: dict[str, Tensor], p: DoraProblem, exact: bool) -> DoraProblem:
    """The problem in the numbers that the tensors hold: fractions, or float64."""
    values = {name: exactly(tensor) if exact else wide(tensor) for name, tensor in own.items()}
    return replace(p, **values)


def assert_within_bounds(own: dict[str, Tensor], p: DoraProblem, got: dict[str, Tensor], mode: Mode) -> None:
    assume(finite(*got.values()))
    bounds = bounds_of(stored(own, p, exact=False), mode)
    for exact in exact_problems_of(stored(own, p, exact=True)):
        for name, wanted in expected_of(exact).items():
            assert_bounded(got[name], wanted, bounds[name], mode, name)


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=40)
@given(data=st.data(), turned=st.booleans())
def test_whole_norms_come_out_exactly(device: str, mode: Mode, data: st.DataObject, turned: bool) -> None:
    p = data.draw(exact_dora_problems(mode.computes)).astype(np.float64)
    got = run(tensors_of(p, mode, device), p.scaling, mode, turned=turned)
    for name, wanted in expected_of(p).items():
        if name == "dmagnitude":
            # A quotient: rounded to float32 or wider, and to the magnitude's dtype.
            rounded = np.promote_types(np.float32, mode.base) if mode.base != MODES["bfloat16"].base else "f4"
            wanted = wanted.astype(rounded).astype(mode.adapter)
        assert_equal(got[name], wanted, name)


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=25)
@given(data=st.data(), turned=st.booleans())
def test_everything_else_stays_within_the_bounds(
    device: str, mode: Mode, data: st.DataObject, turned: bool
) -> None:
    p = data.draw(dora_problems(np.float64, most=6))
    own = tensors_of(p, mode, device)
    assert_within_bounds(own, p, run(own, p.scaling, mode, turned=turned), mode)


def case(*, dropout: bool = True) -> DoraProblem:
    return gaussian_problem(np.random.default_rng(3), (4, 24, 5, 3), 0.5, 1.0, dropout=dropout)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("wrong", ["magnitude", "A", "B", "scaling", "dropout", "norm"])
def test_the_bounds_tell_a_wrong_layer(wrong: str, dropout: bool) -> None:
    mode = MODES["float32"]
    p = case(dropout=dropout)
    own = tensors_of(p, mode, "cpu")
    assert_within_bounds(own, p, run(own, p.scaling, mode), mode)
    scaling = p.scaling
    changed = dict(own)
    if wrong == "scaling":
        scaling *= 1.001
    elif wrong == "norm":
        # The norm of W0 alone.
        norm = torch.linalg.vector_norm(own["W0"], dim=1) / dora_norm(own["W0"], own["A"], own["B"], scaling)
        changed["magnitude"] = (own["magnitude"] / norm).detach().requires_grad_()
    elif wrong == "dropout":
        changed["dropout"] = torch.full_like(own["x"], 1 / 0.9).detach()
    else:
        changed[wrong] = (own[wrong] * 1.001).detach().requires_grad_()
    with pytest.raises(AssertionError, match="above the bound"):
        assert_within_bounds(own, p, run(changed, scaling, mode), mode)


@pytest.mark.parametrize("name", ["float32", "autocast", "float64"])
def test_a_seeded_mask_is_the_multiplier(name: str) -> None:
    """Drawn again on the way back: the reference with the mask that the seed gives."""
    mode = MODES[name]
    p = replace(case(), dropout=None)
    own = tensors_of(p, mode, "cpu")
    seeded = SeededDropout(0.25, 11)
    operands = (own["x"], own["W0"], own["bias"], own["A"], own["B"], p.scaling, own["magnitude"])
    with autocast("cpu", mode):
        y = dora_linear(*operands, seeded)
    gradients = torch.autograd.grad(y, [own[leaf] for leaf in LEAVES], own["dy"])
    mask = seeded.mask(own["dy"], own["x"].shape)
    assert 0 < float(mask.mean()) < 1
    own["dropout"] = mask.double() * seeded.factor
    got = {"y": y.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}
    assert_within_bounds(own, p, got, mode)


def test_the_norm_is_computed_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tensors_of(case(), MODES["float32"], "cpu")
    factors = (own["W0"], own["A"], own["B"], 0.5)
    whole = dora_norm(*factors)
    monkeypatch.setattr(dora_module, "_BLOCK_ENTRIES", 2 * 24)
    in_blocks = dora_norm(*factors)
    bound = dora_norm_bound(wide(own["W0"]), LowRank(wide(own["A"]), wide(own["B"]), 0.5), np.float32)
    assert (np.abs(wide(in_blocks) - wide(whole)) <= 2 * bound).all()
    assert not whole.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(dora_norm(*factors), in_blocks)
    narrow = [tensor.detach().bfloat16() for tensor in factors[:3]]
    assert same_bits(dora_norm(*narrow, 0.5), dora_norm(*(tensor.float() for tensor in narrow), 0.5))


@pytest.mark.parametrize("dropout", [False, True])
def test_backward_ignores_an_autocast_that_forward_did_not_see(dropout: bool) -> None:
    p = case(dropout=dropout)
    own = tensors_of(p, MODES["float32"], "cpu")
    expected = run(own, p.scaling, MODES["float32"])
    operands = (own["x"], own["W0"], own["bias"], own["A"], own["B"], p.scaling, own["magnitude"])
    y = dora_linear(*operands, own.get("dropout"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(y, [own[name] for name in LEAVES], own["dy"])
    for name, gradient in zip(GRADIENTS, gradients, strict=True):
        assert same_bits(gradient, expected[name])


@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("magnitude",), ("bias",), ("x", "B"), LEAVES])
@pytest.mark.parametrize("dropout", [False, True])
def test_only_the_gradients_asked_for_are_computed_and_only_their_operands_kept(
    wanted: tuple[str, ...], dropout: bool
) -> None:
    mode = MODES["float32"]
    p = case(dropout=dropout)
    own = tensors_of(p, mode, "cpu")
    everything = run(own, p.scaling, mode)
    expected = dict(zip(LEAVES, (everything[name] for name in GRADIENTS), strict=True))
    inputs = {name: own[name].detach().requires_grad_(name in wanted) for name in LEAVES}
    y = dora_linear(
        inputs["x"],
        own["W0"],
        inputs["bias"],
        inputs["A"],
        inputs["B"],
        p.scaling,
        inputs["magnitude"],
        own.get("dropout"),
    )
    assert same_bits(y.detach(), everything["y"])
    node = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr,index]
    kept = [tensor is not None for tensor in node.saved_tensors]  # type: ignore[union-attr]
    x, A, B, m = ("x" in wanted, "A" in wanted, "B" in wanted, "magnitude" in wanted)
    # x, W0, A, g B, x A, the rescaled product, g, norm, dropout
    assert kept == [A, x, x, x or A, B, m, x or B, m, (x or A) and dropout]
    gradients = torch.autograd.grad(y, [inputs[name] for name in wanted], own["dy"])
    for name, gradient in zip(wanted, gradients, strict=True):
        assert same_bits(gradient, expected[name])


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("dropout", [None, SeededDropout(0.5, 1)])
def test_any_leading_dimensions(shape: tuple[int, ...], dropout: SeededDropout | None) -> None:
    leaves = {"x": torch.randn(shape), "A": torch.randn(2, 3), "B": torch.randn(4, 2), "m": torch.ones(4)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = dora_linear(
        leaves["x"], torch.eye(4)[:, :3], None, leaves["A"], leaves["B"], 1.0, leaves["m"], dropout
    )
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


def test_what_does_not_fit_is_refused() -> None:
    own = tensors_of(case(dropout=False), MODES["float32"], "cpu")
    operands = (own["x"], own["W0"], own["bias"], own["A"], own["B"], 0.5)
    with pytest.raises(ShapeError, match=r"lora_magnitude_vector: expected shape \(5,\) .* got \(1, 5\)"):
        dora_linear(*operands, own["magnitude"][None])
    with pytest.raises(ShapeError, match=r"lora_B: expected shape \(5, 3\)"):
        dora_linear(*operands[:4], own["B"].t(), 0.5, own["magnitude"])
    y = dora_linear(*operands, own["magnitude"])
    with pytest.raises(ConfigError, match=r"create_graph: expected False, got True; the DoRA layer"):
        torch.autograd.grad(y, own["A"], own["dy"].requires_grad_(), create_graph=True)


# In layers and models.


def base_of(mode: Mode, *, conv1d: bool = False, seed: int = 0) -> Any:
    """A linear layer of 7 inputs and 5 outputs."""
    torch.manual_seed(seed)
    base = Conv1D(5, 7) if conv1d else nn.Linear(7, 5)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    return base.to(tensor_of(np.zeros(0, mode.base)).dtype)


def dora_layer(base: Any, **options: Any) -> LoraLinear:
    torch.manual_seed(1)
    layer = LoraLinear(base)
    layer.add_adapter("default", UpdateOptions(3, 2.0, use_dora=True, **options))
    layer.activate(("default",))
    return layer


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("name", LAYER_MODES)
def test_the_magnitude_starts_as_the_norm_of_the_whole_update(name: str, init: Any, conv1d: bool) -> None:
    mode = MODES[name]
    base = base_of(mode, conv1d=conv1d)
    r = 4 if init == "orthogonal" else 3
    layer = LoraLinear(base)
    layer.add_adapter("default", UpdateOptions(r, 2.0, use_dora=True, init=init))
    layer.activate(("default",))
    update = layer.update()
    magnitude = update.lora_magnitude_vector
    assert magnitude is not None
    assert magnitude.requires_grad
    assert magnitude.shape == (5,)
    assert magnitude.dtype is update.lora_A.dtype
    own = LowRank(*(wide(matrix) for matrix in update.matrices()), update.scaling)
    expected = dora_magnitude_start(wide(layer.matrix), own)
    bound = dora_norm_bound(wide(layer.matrix), own, array_of(magnitude.detach()).dtype)
    assert (np.abs(wide(magnitude) - expected) <= 2 * bound).all()
    assert not layer.is_low_rank


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("init", [True, "pissa", "olora"])
@pytest.mark.parametrize("name", LAYER_MODES)
def test_a_fresh_layer_computes_what_its_base_does(name: str, init: Any, dropout: float) -> None:
    mode = MODES[name]
    layer = dora_layer(base_of(mode), init=init, dropout=dropout)
    x = torch.randn(6, 7).to(layer.weight.dtype)
    with autocast("cpu", mode):
        torch.manual_seed(9)
        seed = int(torch.randint(2**63 - 1, ()))
        torch.manual_seed(9)
        y = layer(x)
    mask = None
    if dropout:
        mask = wide(SeededDropout(dropout, seed).mask(y, x.shape)) / (1 - dropout)
    own = LowRank(*(wide(m) for m in layer.update().matrices()), layer.update().scaling, dropout=mask)
    # The bound of a layer whose magnitude is the norm it is divided by.
    magnitude = dora_magnitude_start(wide(layer.matrix), replace(own, dropout=None))
    operands = (wide(x), wide(layer.matrix), own, magnitude, mode.precision)
    bound = dora_forward_bound(*operands, bias=wide(layer.base_layer.bias))
    exact = exactly(x) @ exactly(layer.matrix).T + exactly(layer.base_layer.bias)
    assert_bounded(y, exact, bound, mode)
    if init is True and dropout:
        # g - 1 is exactly zero, and so is the update.
        with autocast("cpu", mode):
            assert same_bits(y, layer.base_layer(x))


@pytest.mark.parametrize("conv1d", [False, True])
def test_training_moves_everything_and_the_merge_is_the_references(conv1d: bool) -> None:
    for name in LAYER_MODES:
        mode = MODES[name]
        layer = dora_layer(base_of(mode, conv1d=conv1d), init=False)
        optimizer = torch.optim.SGD(layer.update().parameters(), lr=0.1)
        x = torch.randn(6, 7).to(layer.weight.dtype)
        before = [parameter.detach().clone() for parameter in layer.update().parameters()]
        with autocast("cpu", mode):
            layer(x).float().pow(2).mean().backward()
        optimizer.step()
        for parameter, old in zip(layer.update().parameters(), before, strict=True):
            assert not same_bits(parameter, old)
        update = layer.update()
        merged = layer.merged_arrays(("default",), "layer")
        factors = (array_of(update.lora_A), array_of(update.lora_B), update.scaling)
        wanted = merge_dora(array_of(layer.matrix), *factors, array_of(update.lora_magnitude_vector))
        assert set(merged) == {"weight"}
        assert merged["weight"].shape == tuple(layer.weight.shape)
        found = merged["weight"].T if conv1d else merged["weight"]
        assert same_bits(tensor_of(found), tensor_of(wanted))


def dora_config(**options: Any) -> LoraConfig:
    values = {"r": 2, "lora_alpha": 3, "target_modules": ("q_proj", "v_proj"), "task_type": None}
    return LoraConfig(**{**values, **options}, use_dora=True)


def adapted(config: LoraConfig, model: Any = None) -> Any:
    """The model with every tensor of the adapter moved away from its start."""
    model = Chain() if model is None else model
    inject(model, config)
    torch.manual_seed(5)
    for layer in lora_layers(model).values():
        for parameter in layer.update().parameters():
            parameter.data += torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same_from_our_files_and_we_from_theirs(
    tmp_path: Path, init: Any, rslora: bool
) -> None:
    model = adapted(dora_config(init_lora_weights=init, use_rslora=rslora))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Chain(), str(tmp_path / "ours"))
    again = Chain()
    load_adapter(again, tmp_path / "ours")
    x = torch.randn(6, 3)
    y = model(x)
    # A chain of layers: compared layer by layer, each with the same input.
    for path, layer in lora_layers(model).items():
        own = torch.randn(6, layer.in_features)
        bound = layer_bound(layer, own)
        found = theirs.base_model.model.get_submodule(path)(own)
        assert (np.abs(wide(found) - wide(layer(own))) <= 2 * bound).all()
        assert same_bits(lora_layers(again)[path](own), layer(own)) or init is not True
        assert (np.abs(wide(lora_layers(again)[path](own)) - wide(layer(own))) <= 2 * bound).all()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    saved = read_adapter(tmp_path / "theirs")
    for path, pair in adapter_of(model).pairs.items():
        for part in ("A", "B", "magnitude"):
            assert np.array_equal(getattr(pair, part), getattr(saved.pairs[path], part))
        assert pair.scaling == saved.pairs[path].scaling
    assert not same_bits(y, Chain()(x))


def layer_bound(layer: LoraLinear, x: Tensor) -> Any:
    """How far a layer in float32 may be from its exact value."""
    update = layer.update()
    own = LowRank(*(wide(matrix) for matrix in update.matrices()), update.scaling)
    magnitude = wide(update.lora_magnitude_vector)  # type: ignore[arg-type]
    bias = None if layer.bias is None else wide(layer.bias)
    return dora_forward_bound(wide(x), wide(layer.matrix), own, magnitude, np.float32, bias=bias)


def test_a_start_taken_from_the_weight_leaves_it_and_merges_as_one_update() -> None:
    model = Chain()
    nn.init.normal_(model.q_proj.weight)
    weight, bits = model.q_proj.weight, model.q_proj.weight.detach().clone()
    inject(model, dora_config(init_lora_weights="pissa", target_modules=("q_proj",)))
    layer = lora_layers(model)["q_proj"]
    update = layer.update()
    drawn = adapter_start("pissa", array_of(bits), 2, update.scaling, np.random.default_rng(0))
    assert np.array_equal(array_of(update.lora_A), drawn.A)
    assert np.array_equal(array_of(update.lora_B), drawn.B)
    update.lora_B.data += 1
    pair = adapter_of(model).pairs["q_proj"]
    assert pair.A.shape == (4, 3)
    assert pair.magnitude is not None
    merge(model)
    wanted = merge_dora(array_of(bits), pair.A, pair.B, update.scaling, pair.magnitude)
    assert same_bits(model.q_proj.weight, tensor_of(wanted))
    unmerge(model)
    assert model.q_proj.weight is weight
    assert same_bits(weight, bits)


def test_the_layers_of_a_model_share_nothing_and_checkpointing_changes_nothing() -> None:
    model = adapted(dora_config(lora_dropout=0.5), Chain())
    x = torch.randn(4, 3)
    results = []
    for wrapped in (False, True, False):
        torch.manual_seed(0)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if wrapped else model(x)
        y.sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + 2 * 3
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_graph_gives_the_bits_of_eager_execution(dropout: float) -> None:
    model = adapted(dora_config(lora_dropout=dropout, bias="all"), Chain())
    model.train(dropout == 0.0)
    x = torch.randn(4, 3)

    def step(call: Any) -> list[Tensor]:
        model.zero_grad()
        y = call(x)
        y.pow(2).sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = step(model)
    torch._dynamo.reset()
    found = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert len(found) == len(expected) == 1 + 2 * 3 + 2
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_is_drawn_in_a_compiled_graph() -> None:
    model = adapted(dora_config(lora_dropout=0.5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 3)
    one, other = compiled(x), compiled(x)
    assert not same_bits(one.detach(), other.detach())
    one.sum().backward()
    model.eval()
    assert same_bits(compiled(x).detach(), model(x).detach())


def test_two_adapters_of_a_layer_count_together_only_without_a_magnitude() -> None:
    model = adapted(dora_config())
    inject(model, LoraConfig(r=1, target_modules=("k_proj",)), "elsewhere")
    inject(model, LoraConfig(r=1, target_modules=("v_proj",)), "plain")
    x = torch.randn(4, 3)
    set_adapter(model, ("default", "elsewhere"))
    before = model(x)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    refused(
        lambda: set_adapter(model, ("plain", "default")),
        ConfigError,
        "use_dora: expected the one active adapter of v_proj, got default among plain, default; "
        "activate one of them",
    )
    assert same_bits(model(x), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    layer = lora_layers(model)["v_proj"]
    with pytest.raises(ConfigError, match="use_dora: expected the one active adapter of the layer"):
        layer.activate(("plain", "default"))
    set_adapter(model, "plain")
    assert lora_layers(model)["v_proj"].is_low_rank  # type: ignore[union-attr]
    with disable_adapter(model):
        assert same_bits(model(x), Chain()(x))


def test_a_row_of_zeros_has_no_direction() -> None:
    model = Chain()
    with torch.no_grad():
        model.v_proj.weight[1] = 0
    with pytest.raises(NonFiniteError, match=r"^v_proj: norm: expected finite .*, got 0\.0 for row 1 of W0"):
        inject(model, dora_config())
    assert not lora_layers(model)
    inject(model, dora_config(target_modules=("q_proj",)))


@pytest.mark.parametrize("module", [nn.Embedding(5, 3), nn.Conv2d(3, 4, 2)])
def test_other_layers_have_no_magnitude(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), module)
    config = dora_config(target_modules=("0", "1"))
    with pytest.raises(ConfigError, match="use_dora: expected False for this layer, got True"):
        inject(model, config)
    assert not lora_layers(model)
