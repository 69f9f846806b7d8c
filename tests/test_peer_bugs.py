"""What PEFT and loralib get wrong, and that it is right here.

Each test shows first that the peer has the bug: one that fails there means that the peer has been fixed.
"""

import copy
from typing import Any

import loralib
import numpy as np
import peft
import pytest
import torch
from exact_linear import rational
from torch import Tensor, nn
from torch_fixtures import fill_integers, same_bits, tiny_llama

from loracle.files import LoraConfig
from loracle.reference import ConfigError, LowRank, merge_adapters, merge_exact, round_fraction
from loracle.torch_impl import inject, lora_layers, merge, set_adapter, unmerge
from loracle.torch_impl.arrays import array_of, tensor_of
from loracle.torch_impl.fused import LoraFusedLinear
from loracle.torch_impl.update import UpdateOptions

R, ALPHA = 4, 5


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def frozen(dtype: torch.dtype) -> One:
    torch.manual_seed(0)
    return One(nn.Linear(48, 40, bias=False)).to(dtype)


def factors(seed: int) -> tuple[Tensor, Tensor]:
    """A and B of gaussians, with an update that is felt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, 48, generator=generator), torch.randn(40, R, generator=generator)


def with_peft(dtype: torch.dtype, names: tuple[str, ...] = ("default",), **options: Any) -> Any:
    """PEFT's model, an adapter for each name with `factors` of its number; float32 beside any base."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"], **options)
    model = peft.get_peft_model(frozen(dtype), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model.layer
    for seed, name in enumerate(names):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = factors(seed)
    return model


def with_ours(dtype: torch.dtype, names: tuple[str, ...] = ("default",), **options: Any) -> One:
    model = frozen(dtype)
    for seed, name in enumerate(names):
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=("layer",), **options)
        inject(model, config, name)
        update = lora_layers(model)["layer"].update(name)
        update.lora_A.data, update.lora_B.data = factors(seed)
    return model


def exact_merge(dtype: torch.dtype) -> Tensor:
    """The exact sum, rounded once."""
    A, B = (array_of(matrix) for matrix in factors(0))
    weight = array_of(frozen(dtype).layer.weight)  # type: ignore[arg-type]
    return tensor_of(merge_exact(weight, A, B, ALPHA / R, weight.dtype))


def share_of_wrong(weight: Tensor, dtype: torch.dtype) -> float:
    return float((weight.detach() != exact_merge(dtype)).double().mean())


def test_pefts_merge_is_not_the_nearest_number() -> None:
    theirs = with_peft(torch.float32)
    theirs.merge_adapter()
    assert share_of_wrong(theirs.base_model.model.layer.base_layer.weight, torch.float32) > 0.05
    ours = with_ours(torch.float32)
    merge(ours)
    assert same_bits(lora_layers(ours)["layer"].weight.detach(), exact_merge(torch.float32))


def test_pefts_safe_merge_rounds_twice_in_bfloat16() -> None:
    plain, safe = with_peft(torch.bfloat16), with_peft(torch.bfloat16)
    plain.merge_adapter()
    safe.merge_adapter(safe_merge=True)
    wrong = share_of_wrong(safe.base_model.model.layer.base_layer.weight, torch.bfloat16)
    assert wrong > 10 * share_of_wrong(plain.base_model.model.layer.base_layer.weight, torch.bfloat16)
    assert wrong > 0.01
    ours = with_ours(torch.bfloat16)
    merge(ours)
    assert same_bits(lora_layers(ours)["layer"].weight.detach(), exact_merge(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_unmerge_does_not_restore_the_weight_and_drifts(dtype: torch.dtype) -> None:
    theirs = with_peft(dtype)
    layer = theirs.base_model.model.layer
    before = layer.base_layer.weight.detach().clone()
    offs = []
    for cycle in range(100):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        if cycle in (0, 99):
            offs.append(float((layer.base_layer.weight.detach() - before).abs().max()))
    assert offs[0] > 0
    if dtype is torch.bfloat16:
        assert offs[1] > 3 * offs[0]
    ours = with_ours(dtype)
    own = lora_layers(ours)["layer"]
    weight = own.weight
    for _ in range(100):
        merge(ours)
        unmerge(ours)
    assert own.weight is weight
    assert same_bits(weight.detach(), before)


@pytest.mark.parametrize(("combination", "of"), [("linear", ("one",)), ("cat", ("one", "two"))])
def test_pefts_weighted_adapters_are_off_by_a_root_with_rslora(combination: str, of: tuple[str, ...]) -> None:
    names = ("one", "two")
    theirs = with_peft(torch.float64, names, use_rslora=True)
    layer = theirs.base_model.model.layer
    right = sum(layer.get_delta_weight(name) for name in of)
    theirs.add_weighted_adapter(list(of), [1.0] * len(of), "sum", combination_type=combination)
    ratio = (layer.get_delta_weight("sum") / right).detach()
    # Too large by the root of the new rank; a right one would be near 1.
    assert float((ratio / layer.r["sum"] ** 0.5 - 1).abs().max()) < 1 / 8
    # Here several adapters count at once, and their merge is the exact sum, rounded once.
    ours = with_ours(torch.float64, names, use_rslora=True)
    set_adapter(ours, names)
    own = lora_layers(ours)["layer"]
    scaling = ALPHA / R**0.5
    assert [update.scaling for update in own.updates] == [scaling, scaling]
    bits = array_of(own.weight).copy()
    adapters = [LowRank(*(array_of(matrix) for matrix in factors(seed)), scaling) for seed in (0, 1)]
    merge(ours)
    merged = array_of(own.weight)
    assert np.array_equal(merged, merge_adapters(bits, adapters))
    row, column = 3, 5
    entry = rational(bits)[row, column] + sum(
        rational(scaling)[()] * (rational(own.B)[row] @ rational(own.A)[:, column]) for own in adapters
    )
    assert merged[row, column] == round_fraction(entry, np.float64)


REPLICATION = [[0, 2], [1, 2]]


def test_pefts_layer_replication_merges_to_other_logits() -> None:
    options = {"r": R, "target_modules": ["q_proj"], "layer_replication": REPLICATION}
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights=False, **options)).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = theirs(ids, use_cache=False).logits
        theirs.merge_adapter()
        after = theirs(ids, use_cache=False).logits
    assert float((after - before).abs().max()) > 0.01
    file = {"peft_type": "LORA", "r": R, "target_modules": ["q_proj"], "layer_replication": REPLICATION}
    with pytest.raises(
        ConfigError, match=r"layer_replication: \[\[0, 2\], \[1, 2\]\] changes the mathematics"
    ):
        LoraConfig.from_json(file)


def test_loralibs_fused_layer_crashes_without_a_slice() -> None:
    theirs = loralib.MergedLinear(3, 4, r=2, enable_lora=[False, False])
    x = torch.randn(5, 3)
    with pytest.raises(AttributeError, match="lora_A"):
        theirs(x)
    base = nn.Linear(3, 4)
    ours = LoraFusedLinear(base, widths=(2, 2), enabled=(False, False))
    ours.add_adapter("default", UpdateOptions(2, 1.0, dropout=0.5))
    ours.activate(("default",))
    assert same_bits(ours(x), base(x))


@pytest.mark.parametrize(
    ("theirs", "plain", "shape"),
    [
        (loralib.Conv1d, nn.Conv1d, (2, 3, 9)),
        (loralib.Conv3d, nn.Conv3d, (2, 3, 5, 6, 4)),
    ],
    ids=["Conv1d", "Conv3d"],
)
def test_loralibs_convolutions_work_in_two_dimensions_only(theirs: Any, plain: Any, shape: Any) -> None:
    x = torch.randint(-2, 3, shape).float()
    with pytest.raises(RuntimeError, match=r"invalid for input of size|shape"):
        theirs(3, 4, 3, r=2, lora_alpha=2)(x)
    model = One(plain(3, 4, 3))
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("layer",)))
    fill_integers(model, 1)
    layer = lora_layers(model)["layer"]
    update = layer.update()
    delta = torch.einsum("or,r...->o...", update.lora_B.flatten(1), update.lora_A)
    merged = copy.deepcopy(layer.base_layer)
    merged.weight.data += delta.detach()  # type: ignore[operator, union-attr]
    assert torch.equal(model(x), merged(x))
    assert delta.any()


def test_loralibs_state_dict_from_evaluation_merges_a_second_time() -> None:
    theirs = loralib.Linear(3, 4, r=2, lora_alpha=2)
    fill_integers(theirs, 2)
    x = torch.randint(-2, 3, (5, 3)).float()
    y = theirs(x)
    again = loralib.Linear(3, 4, r=2, lora_alpha=2)
    theirs.eval()
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(theirs(x), y)
    assert not torch.equal(again(x), y)
    again.eval()
    assert not torch.equal(again(x), y)
    # Here neither eval() nor a state dict merges.
    model, other = (One(nn.Linear(3, 4)) for _ in range(2))
    for own in (model, other):
        inject(own, LoraConfig(r=2, lora_alpha=2, target_modules=("layer",)))
    fill_integers(model, 2)
    y = model(x)
    other.load_state_dict(model.eval().state_dict())
    for own in (model, other, other.eval(), other.train()):
        assert torch.equal(own(x), y)
