"""What a mistake makes of a weight: each with its verdict, its words, and the entries that it gives."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification.alternatives import (
    Alternative,
    alternatives,
    first_pair,
    scaled,
    with_pair,
)
from loracle.export.verification.one_weight import OneWeight
from loracle.export.verification.verdict import Verdict
from loracle.files import LoraPair
from loracle.files.experts import OwnUpdates
from loracle.files.updates import Bias, Convolution, Dora, Linear, Stacked, TokenRows, Update
from tests.files_fixtures import random_array

Array = NDArray[Any]
FLOAT32 = np.dtype(np.float32)


def pair_of(shape: tuple[int, int], r: int = 3, scaling: float = 0.5, seed: int = 1, **more: Any) -> LoraPair:
    return LoraPair(random_array((r, shape[1]), seed), random_array((shape[0], r), seed + 1), scaling, **more)


def weight_with(update: Update | None, shape: tuple[int, ...] = (6, 8), name: str = "w") -> OneWeight:
    W0 = random_array(shape, 9)
    return OneWeight(name, W0, update, W0)


def found(
    weight: OneWeight, *, use_rslora: bool = False, others: dict[str, Update] | None = None
) -> list[Alternative]:
    return list(alternatives(weight, use_rslora=use_rslora, others=others or {}))


def said(found: list[Alternative]) -> list[tuple[Verdict, str]]:
    return [(own.verdict, own.words) for own in found]


def factor_of(own: Alternative) -> float:
    assert isinstance(own.weight.update, Linear)
    return own.weight.update.pair.scaling


KINDS: dict[str, Update] = {
    "linear": Linear(pair_of((6, 8)), turned=True),
    "convolution": Convolution(pair_of((6, 8))),
    "DoRA": Dora(pair_of((6, 8), magnitude=np.ones(6, np.float32))),
    "stacked": Stacked(pair_of((6, 8), r=6), 2, turned=True),
    "bias": Bias(pair_of((6, 8), bias=np.ones(6, np.float32))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_changed_and_nothing_else(kind: str) -> None:
    update: Any = KINDS[kind]
    assert first_pair(update) is update.pair
    changed: Any = with_pair(update, lambda own: replace(own, scaling=7.0))
    assert type(changed) is type(update)
    assert changed.pair.scaling == 7.0
    assert changed.pair.A is update.pair.A
    for field in ("turned", "experts"):
        assert getattr(changed, field, None) == getattr(update, field, None)


def test_of_own_updates_each_is_changed() -> None:
    pairs = [pair_of((6, 8), seed=seed) for seed in (1, 5)]
    rows = TokenRows((1,), random_array((1, 8), 2))
    update = OwnUpdates({(0, 0): rows, (1, 0): Linear(pairs[0]), (2, 0): Linear(pairs[1])}, 1)
    assert first_pair(update) is pairs[0]
    changed = with_pair(update, lambda own: replace(own, scaling=own.scaling * 4))
    assert isinstance(changed, OwnUpdates)
    assert {place: own.pair.scaling for place, own in changed.updates.items()} == {(1, 0): 2.0, (2, 0): 2.0}
    assert changed.updates[2, 0].pair.A is pairs[1].A


def test_updates_without_a_pair() -> None:
    rows = TokenRows((1,), random_array((1, 8), 2))
    assert first_pair(rows) is None
    assert with_pair(rows, lambda own: own) is None
    assert first_pair(OwnUpdates({(0, 0): rows}, 1)) is None
    assert said(found(weight_with(rows))) == [(Verdict.MISSING, "it is the base's")]


def test_the_scalings_that_adapters_are_merged_with_by_mistake() -> None:
    weight = weight_with(Linear(pair_of((6, 8), r=3, scaling=0.75)))
    base, *rest = found(weight)
    assert (base.verdict, base.words) == (Verdict.MISSING, "it is the base's")
    assert base.weight.update is None
    assert base.weight.start is weight.base
    assert base.weight.name == "w"
    assert said(rest) == [
        (Verdict.TWICE, "the update is there twice"),
        (Verdict.OTHER_SCALING, "the update is subtracted"),
        (Verdict.OTHER_SCALING, "the scaling is alpha / sqrt(r) (1.29904 for 0.75)"),
        (Verdict.OTHER_SCALING, "the scaling is 1, as of alpha = r (1 for 0.75)"),
        (Verdict.OTHER_SCALING, "the scaling is alpha, not divided by r (2.25 for 0.75)"),
        (Verdict.OTHER_SCALING, "the scaling is 1 / r, as of alpha = 1 (0.333333 for 0.75)"),
        (Verdict.OTHER_SCALING, "the scaling is applied twice (0.5625 for 0.75)"),
    ]
    expected = [1.5, -0.75, 2.25 / 3**0.5, 1.0, 2.25, 1 / 3, 0.5625]
    assert [factor_of(own) for own in rest] == pytest.approx(expected, rel=1e-15)
    W0 = weight.start.astype(np.float64)
    delta = weight.wide(0, 6) - W0
    for own, factor in zip(rest, expected, strict=True):
        assert own.weight.start is weight.start
        assert np.allclose(own.weight.wide(0, 6) - W0, delta * (factor / 0.75), rtol=1e-12, atol=1e-14)


def test_with_rslora_the_other_scaling_is_the_plain_one() -> None:
    alpha = 1.5
    weight = weight_with(Linear(pair_of((6, 8), r=3, scaling=alpha / 3**0.5)))
    texts = [own.words for own in found(weight, use_rslora=True)]
    assert "the scaling is alpha / r (0.5 for 0.866025)" in texts
    assert "the scaling is alpha, not divided by r (1.5 for 0.866025)" in texts


def test_scalings_that_come_to_the_same_are_one_and_the_right_one_is_none() -> None:
    words = [own.words for own in found(weight_with(Linear(pair_of((6, 8), r=4, scaling=1.0))))]
    assert words == [
        "it is the base's",
        "the update is there twice, or the scaling is alpha / sqrt(r) (2 for 1)",
        "the update is subtracted",
        "the scaling is alpha, not divided by r (4 for 1)",
        "the scaling is 1 / r, as of alpha = 1 (0.25 for 1)",
    ]
    one = [own.words for own in found(weight_with(Linear(pair_of((6, 8), r=1, scaling=2.0))))]
    assert one == [
        "it is the base's",
        "the update is there twice, or the scaling is applied twice (4 for 2)",
        "the update is subtracted",
        "the scaling is 1, as of alpha = r (1 for 2), or the scaling is 1 / r, as of alpha = 1 (1 for 2)",
    ]


def test_a_scaling_of_zero_has_no_others() -> None:
    words = [own.words for own in found(weight_with(Linear(pair_of((6, 8), scaling=0.0))))]
    assert words == ["it is the base's", "the update is there twice", "the update is subtracted"]


def test_a_square_update_may_lie_transposed() -> None:
    weight = weight_with(Linear(pair_of((8, 8))), (8, 8))
    (turned,) = (own for own in found(weight) if own.verdict is Verdict.TRANSPOSED)
    assert turned.words == "B A is added transposed"
    W0 = weight.start.astype(np.float64)
    assert np.allclose(turned.weight.wide(0, 8) - W0, (weight.wide(0, 8) - W0).T, rtol=1e-12, atol=1e-14)
    others = [
        weight_with(Linear(pair_of((6, 8)))),
        weight_with(Dora(pair_of((8, 8), magnitude=np.ones(8, np.float32))), (8, 8)),
    ]
    for other in others:
        assert not any(own.verdict is Verdict.TRANSPOSED for own in found(other))


def test_dora_may_lack_its_magnitude() -> None:
    pair = pair_of((6, 8), magnitude=np.full(6, 3.0, np.float32))
    weight = weight_with(Dora(pair))
    (plain,) = (own for own in found(weight) if own.verdict is Verdict.OTHER_ADAPTER)
    assert plain.words == "it lacks DoRA's magnitude"
    expected = replace(weight, update=Linear(replace(pair, magnitude=None))).rows(0, 6, FLOAT32)
    assert np.array_equal(plain.weight.rows(0, 6, FLOAT32), expected)
    A, B = random_array((3, 8, 3), 1), random_array((6, 3, 1), 2)
    kernel = LoraPair(A, B, 0.5, "convolution", magnitude=np.ones((1, 6, 1), np.float32))
    convolution = weight_with(Dora(kernel), (6, 8, 3))
    (plain,) = (own for own in found(convolution) if own.verdict is Verdict.OTHER_ADAPTER)
    assert isinstance(plain.weight.update, Convolution)
    assert plain.weight.update.pair.magnitude is None
    assert plain.weight.rows(0, 6, FLOAT32).shape == (6, 8, 3)


def test_it_may_be_the_update_of_another_weight_of_the_same_kind_and_shape() -> None:
    own, other = Linear(pair_of((6, 8))), Linear(pair_of((6, 8), seed=5))
    others: dict[str, Update] = {
        "w": own,
        "bias": Bias(pair_of((6, 8), bias=np.ones(6, np.float32))),
        "narrow": Linear(pair_of((6, 7))),
        "rows": TokenRows((1,), random_array((1, 8), 2)),
        "other": other,
        "another": Linear(pair_of((6, 8), r=5, seed=7)),
    }
    swapped = [a for a in found(weight_with(own), others=others) if a.verdict is Verdict.OTHER_ADAPTER]
    assert [a.words for a in swapped] == ["it is the update of other", "it is the update of another"]
    assert swapped[0].weight.update is other
    assert swapped[0].weight.name == "w"


def test_of_dora_and_of_experts_others_are_not_tried() -> None:
    dora = Dora(pair_of((6, 8), magnitude=np.ones(6, np.float32)))
    words = [own.words for own in found(weight_with(dora), others={"other": dora})]
    assert not any("update of" in own for own in words)
    experts = OwnUpdates({(1, 0): Linear(pair_of((6, 8)))}, 1)
    weight = weight_with(experts, (2, 6, 8))
    words = [own.words for own in found(weight, others={"other": experts})]
    assert "the update is subtracted" in words
    assert not any("update of" in own for own in words)


def test_what_the_base_has_not_is_not_the_bases() -> None:
    weight = replace(weight_with(Linear(pair_of((6, 8)))), base=None)
    assert found(weight)[0].verdict is Verdict.TWICE
    assert found(replace(weight, update=None)) == []


def test_the_bases_is_the_bases_where_the_adapter_brings_its_own() -> None:
    own, base = random_array((6, 8), 9), random_array((6, 8), 10)
    (missing,) = found(OneWeight("w", own, None, base))
    assert missing.verdict is Verdict.MISSING
    assert missing.weight.start is base
    assert np.array_equal(missing.weight.rows(0, 6, FLOAT32), base)


def test_a_weight_is_scaled() -> None:
    weight = weight_with(Linear(pair_of((6, 8), scaling=0.5)))
    own = scaled(weight, 3.0, Verdict.DRIFTED, "three")
    assert (own.verdict, own.words, factor_of(own)) == (Verdict.DRIFTED, "three", 1.5)
    assert own.weight.start is weight.start
