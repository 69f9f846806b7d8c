"""What the judge says of a weight in words and figures, and of tensors that are no floating-point numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification import judge as module
from loracle.export.verification.judge import Judge
from loracle.export.verification.verdict import Verdict, WeightVerdict, Witness
from loracle.files import Adapter, Checkpoint, LoraConfig, MergedWeights
from tests.files_fixtures import Q0, V0, random_array, write_model

Array = NDArray[Any]
ROWS, COLUMNS = 40, 50
QUERY, VALUE, STEPS, SCALAR = f"{Q0}.weight", f"{V0}.weight", "model.steps", "model.layers.0.scale"


@pytest.fixture
def weights(tmp_path: Path) -> MergedWeights:
    tensors = {
        QUERY: random_array((ROWS, COLUMNS), 1),
        VALUE: random_array((ROWS, COLUMNS), 2),
        STEPS: np.arange(12, dtype=np.int64).reshape(3, 4),
        SCALAR: np.array(0.5, np.float32),
    }
    write_model(tmp_path / "base", [tensors])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj",))
    pair = random_array((3, COLUMNS), 3), random_array((ROWS, 3), 4)
    return MergedWeights(Checkpoint(tmp_path / "base"), Adapter.from_arrays(config, {Q0: pair}))


def said(weights: MergedWeights, name: str, held: Array, **options: Any) -> WeightVerdict:
    return Judge(weights, **options).judge(name, held, "at x")


def merged(weights: MergedWeights, name: str = QUERY) -> Array:
    return np.array(weights.tensor(name))


def moved(held: Array, index: tuple[int, ...], steps: int) -> Array:
    changed = np.array(held)
    changed.view(f"u{held.dtype.itemsize}")[index] += steps
    return changed


def test_integers_are_equal_or_not(weights: MergedWeights) -> None:
    held = np.array(weights.tensor(STEPS))
    assert said(weights, STEPS, held) == WeightVerdict(STEPS, Verdict.UNTOUCHED, True, "at x", False, 12)
    assert said(weights, STEPS, np.asfortranarray(held)).passed
    held[1, 2] = -7
    held[2, 3] = 9
    expected = WeightVerdict(
        STEPS, Verdict.CHANGED, False, "at x", False, 12, 2, (), "", Witness((1, 2), 6.0, -7.0)
    )
    assert said(weights, STEPS, held) == expected
    assert all(type(place) is int for place in (expected.witness or Witness((), 0, 0)).index)


def test_other_dtypes_and_shapes_are_wrong(weights: MergedWeights) -> None:
    narrow = np.array(weights.tensor(STEPS)).astype(np.int32)
    wrong = WeightVerdict(STEPS, Verdict.WRONG_SHAPE, False, "at x", False, 12)
    found = said(weights, STEPS, narrow)
    assert (found.verdict, found.passed, found.entries) == (wrong.verdict, False, 12)
    assert found.detail == "expected dtype int64, got int32"
    found = said(weights, QUERY, np.zeros((ROWS, COLUMNS), np.int8))
    assert (found.verdict, found.detail) == (Verdict.WRONG_SHAPE, "expected dtype float32, got int8")
    found = said(weights, QUERY, np.zeros((2, 3), np.float32))
    assert (found.verdict, found.passed, found.merged, found.entries) == (Verdict.WRONG_SHAPE, False, True, 6)
    assert found.detail == f"expected shape ({ROWS}, {COLUMNS}), got (2, 3)"


def test_a_scalar(weights: MergedWeights) -> None:
    held = np.array(0.5, np.float32)
    assert said(weights, SCALAR, held) == WeightVerdict(
        SCALAR, Verdict.UNTOUCHED, True, "at x", False, 1, 0, ((0, 1),)
    )
    assert said(weights, SCALAR, held * 2).verdict is Verdict.CHANGED


def test_the_merge_has_no_words(weights: MergedWeights) -> None:
    assert said(weights, QUERY, merged(weights)) == WeightVerdict(
        QUERY, Verdict.EXACT, True, "at x", True, ROWS * COLUMNS, 0, ((0, ROWS * COLUMNS),)
    )


def test_what_is_not_finite_is_counted(weights: MergedWeights) -> None:
    held = merged(weights)
    held[3, 4], held[5, 6] = np.nan, np.inf
    found = said(weights, QUERY, held)
    assert (found.verdict, found.passed) == (Verdict.NOT_FINITE, False)
    assert found.detail == "2 entries are NaN or infinite"


def test_the_base_bit_for_bit(weights: MergedWeights) -> None:
    found = said(weights, QUERY, np.array(weights.checkpoint.tensor(QUERY)))
    assert (found.verdict, found.passed, found.merged) == (Verdict.MISSING, False, True)
    assert found.detail == "it is the base's, bit for bit: the adapter was not merged into it"


@pytest.mark.parametrize("exact", [False, True])
def test_other_roundings_are_said_with_the_most_steps(weights: MergedWeights, exact: bool) -> None:
    found = said(weights, QUERY, moved(moved(merged(weights), (1, 1), 1), (2, 2), 3), exact=exact)
    assert (found.verdict, found.passed) == (Verdict.WITHIN_ULPS, not exact)
    assert found.detail == "the update is there, rounded otherwise; at most 4 ulp"


def test_up_to_one_entry_in_a_thousand_is_a_damaged_one(weights: MergedWeights) -> None:
    far = merged(weights)
    for count in (1, 2, 3):
        far[count, count] += 100
        found = said(weights, QUERY, far)
        assert not found.passed
        if count == 3:
            assert found.verdict is not Verdict.DAMAGED
            continue
        assert found.verdict is Verdict.DAMAGED
        assert found.detail == f"the update is there, but {count} entries are further off than any rounding"


def test_noise_is_measured_beside_the_update(weights: MergedWeights) -> None:
    delta = weights.tensor(QUERY).astype(np.float64) - weights.checkpoint.tensor(QUERY)
    noise = random_array((ROWS, COLUMNS), 7).astype(np.float64)
    noise *= np.linalg.norm(delta) / np.linalg.norm(noise)
    found = said(weights, QUERY, (merged(weights) + 0.001 * noise).astype(np.float32))
    assert (found.verdict, found.passed) == (Verdict.DRIFTED, False)
    most = found.ulps[-1][0]
    assert found.detail == (
        f"the update is there, but noise of 0.001 times its size, up to {most} ulp: more than one merge's "
        "roundings; merged and unmerged many times, or in a narrower dtype?"
    )
    found = said(weights, QUERY, (merged(weights) + 0.5 * noise).astype(np.float32))
    assert (found.verdict, found.passed) == (Verdict.UNEXPLAINED, False)
    assert found.detail == "noise of 0.5 times the update's size lies over it"


def test_another_update_besides(weights: MergedWeights) -> None:
    other = random_array((ROWS, 1), 8) @ random_array((1, COLUMNS), 9)
    found = said(weights, QUERY, merged(weights) + other)
    assert (found.verdict, found.passed) == (Verdict.OTHER_ADAPTER, False)
    assert found.detail == "the update is there, and besides another of rank 1"


def test_another_update_in_the_place_of_the_adapters(weights: MergedWeights) -> None:
    other = random_array((ROWS, 3), 8) @ random_array((3, COLUMNS), 9)
    found = said(weights, QUERY, weights.checkpoint.tensor(QUERY) + other)
    assert (found.verdict, found.passed) == (Verdict.OTHER_ADAPTER, False)
    assert found.detail.startswith(
        "it differs from the base's by an update of rank 3 that is not the adapter's"
    )


def test_a_mistake_in_all_but_a_few_entries(weights: MergedWeights) -> None:
    base = weights.checkpoint.tensor(QUERY).astype(np.float64)
    delta = weights.tensor(QUERY).astype(np.float64) - base
    held = (base + 2 * delta).astype(np.float32)
    found = said(weights, QUERY, held)
    assert (found.verdict, found.detail) == (Verdict.TWICE, "the update is there twice")
    held[3, 3] += 0.05
    assert said(weights, QUERY, held).detail == (
        "the update is there twice; 1 of 2000 entries are further off than rounding"
    )
    held[4:8] += random_array((4, COLUMNS), 3) * np.float32(0.001)
    assert said(weights, QUERY, held).detail == (
        "the update is there twice; many of 2000 entries are further off than rounding"
    )


def test_how_a_weight_that_is_left_alone_was_changed(weights: MergedWeights) -> None:
    held = merged(weights, VALUE)
    found = said(weights, VALUE, held * np.float32(1.25))
    assert (found.verdict, found.passed) == (Verdict.CHANGED, False)
    assert found.detail == f"by 0.25 of its size, at most {found.ulps[-1][0]} ulp"
    found = said(weights, VALUE, moved(held, (1, 1), 3))
    assert found.detail.endswith("of its size, at most 4 ulp")
    found = said(weights, VALUE, held + random_array((ROWS, 1), 8) @ random_array((1, COLUMNS), 9))
    assert found.detail == "by an update of rank 1: was another adapter merged, or more of this one?"
    found = said(weights, VALUE, merged(weights))
    assert found.detail == f"it holds the base's {QUERY}"


def test_of_large_tensors_blocks_from_the_first_to_the_last_are_looked_at(
    weights: MergedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four blocks of five rows of the forty: what lies between them is compared, not explained."""
    monkeypatch.setattr(module, "SAMPLE_ENTRIES", 20 * COLUMNS)
    weight = module.weight_of(weights, QUERY)
    sample = module._sample(weight, merged(weights))
    assert sample.blocks == ((0, 5), (10, 15), (25, 30), (35, 40))
    assert sample.got.shape == (20, COLUMNS)
    assert np.array_equal(sample.got[5:10], merged(weights)[10:15])
    monkeypatch.setattr(module, "SAMPLE_ENTRIES", ROWS * COLUMNS)
    assert module._sample(weight, merged(weights)).blocks == ((0, ROWS),)
    base = weights.checkpoint.tensor(QUERY).astype(np.float64)
    delta = weights.tensor(QUERY).astype(np.float64) - base
    monkeypatch.setattr(module, "SAMPLE_ENTRIES", 20 * COLUMNS)
    assert said(weights, QUERY, (base + 2 * delta).astype(np.float32)).verdict is Verdict.TWICE
