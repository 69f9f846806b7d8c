"""The verdict on one weight: each way of merging and each mistake is told from all others, in each dtype."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification.comparison import EntriesApart, least_bound
from loracle.export.verification.judge import Judge
from loracle.export.verification.one_weight import weight_of
from loracle.export.verification.verdict import Verdict
from loracle.files import Adapter, Checkpoint, LoraConfig, MergedWeights
from loracle.reference import round_to
from tests.files_fixtures import write_model

Array = NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
DTYPES = [FLOAT32, np.dtype(np.float16), BFLOAT16]
SIZE, R = 96, 6
LAYERS = "model.layers.{}.self_attn.{}_proj"
Q0, Q1, V0 = LAYERS.format(0, "q"), LAYERS.format(1, "q"), LAYERS.format(0, "v")


def gaussian(shape: tuple[int, ...], seed: int, size: float) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


class Case:
    """A base of three weights, an adapter on two of them, and the exact numbers of the first."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], update: float = 0.02, **options: Any) -> None:
        shapes = {Q0: (SIZE, SIZE), Q1: (SIZE, SIZE), V0: (SIZE // 2, SIZE)}
        tensors = {
            f"{name}.weight": round_to(gaussian(shape, seed, 0.05), dtype)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        write_model(folder, [{**tensors, "model.norm.weight": round_to(gaussian((SIZE,), 9, 1.0), dtype)}])
        self.config = LoraConfig(**{"r": R, "lora_alpha": 32, "target_modules": ("q_proj",)} | options)
        factor = (update / self.config.scaling_of(Q0) / R**0.5) ** 0.5
        self.A, self.B = gaussian((R, SIZE), 11, factor), gaussian((SIZE, R), 12, factor)
        self.other = gaussian((R, SIZE), 13, factor), gaussian((SIZE, R), 14, factor)
        self.adapter = Adapter.from_arrays(self.config, {Q0: (self.A, self.B), Q1: self.other})
        self.weights = MergedWeights(Checkpoint(folder), self.adapter)
        self.dtype = dtype
        self.W0 = self.weights.checkpoint.tensor(f"{Q0}.weight")
        self.scaling = self.config.scaling_of(Q0)
        self.delta = self.scaling * (self.B.astype(np.float64) @ self.A.astype(np.float64))

    def added(self, delta: Array) -> Array:
        """W0 and an update, rounded once but for the last bit of float64."""
        return round_to(self.W0.astype(np.float64) + delta, self.dtype)

    def verdict(self, held: Array, name: str = f"{Q0}.weight", **options: Any) -> Any:
        return Judge(self.weights, **options).judge(name, held)


@pytest.fixture(params=DTYPES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(tmp_path / "base", request.param)


def peft(case: Case) -> Array:
    """As PEFT merges on a CPU: the update in float32, rounded to the weight's dtype, then the sum."""
    delta = (case.B @ case.A) * np.float32(case.scaling)
    return round_to(case.W0.astype(np.float32) + round_to(delta, case.dtype).astype(np.float32), case.dtype)


def by_hand(case: Case) -> Array:
    """Every operation in the weight's dtype."""
    A, B = round_to(case.A, case.dtype), round_to(case.B, case.dtype)
    product = round_to(B.astype(np.float32) @ A.astype(np.float32), case.dtype)
    delta = round_to(product.astype(np.float32) * np.float32(case.scaling), case.dtype)
    return round_to(case.W0.astype(np.float32) + delta.astype(np.float32), case.dtype)


def test_the_merge_and_what_is_left_alone(case: Case) -> None:
    own = case.verdict(case.weights.tensor(f"{Q0}.weight"))
    assert (own.verdict, own.passed, own.unequal, own.merged) == (Verdict.EXACT, True, 0, True)
    assert own.ulps == ((0, SIZE * SIZE),)
    for name in (f"{V0}.weight", "model.norm.weight"):
        left = case.verdict(case.weights.tensor(name), name)
        assert (left.verdict, left.passed, left.merged) == (Verdict.UNTOUCHED, True, False)


def test_merges_of_others_pass_unless_correct_rounding_is_demanded(case: Case) -> None:
    merged = peft(case)
    said = case.verdict(merged)
    kind = Verdict.WITHIN_ULPS if case.dtype == np.float32 else Verdict.ROUNDED_TWICE
    assert (said.verdict, said.passed) == (kind, True), str(said)
    assert said.unequal == np.count_nonzero(merged != case.weights.tensor(f"{Q0}.weight"))
    assert sum(count for _, count in said.ulps) == said.entries
    assert not case.verdict(merged, exact=True).passed


def test_a_merge_in_the_weights_own_dtype(case: Case) -> None:
    said = case.verdict(by_hand(case))
    assert said.verdict in (Verdict.WITHIN_ULPS, Verdict.ROUNDED_TWICE), str(said)
    assert said.passed


MISTAKES: dict[str, tuple[Callable[[Case], Array], Verdict]] = {
    "base": (lambda case: np.array(case.W0), Verdict.MISSING),
    "twice": (lambda case: case.added(2 * case.delta), Verdict.TWICE),
    "subtracted": (lambda case: case.added(-case.delta), Verdict.OTHER_SCALING),
    "root of r": (lambda case: case.added(case.delta * R**0.5), Verdict.OTHER_SCALING),
    "alpha is r": (lambda case: case.added(case.delta / case.scaling), Verdict.OTHER_SCALING),
    "three times": (lambda case: case.added(3 * case.delta), Verdict.OTHER_SCALING),
    "transposed": (lambda case: case.added(case.delta.T), Verdict.TRANSPOSED),
    "another layer's": (
        lambda case: case.added(case.scaling * (case.other[1] @ case.other[0]).astype(np.float64)),
        Verdict.OTHER_ADAPTER,
    ),
    "another adapter's": (
        lambda case: case.added(
            case.scaling * (gaussian((SIZE, R), 21, 0.05) @ gaussian((R, SIZE), 22, 0.05)).astype(np.float64)
        ),
        Verdict.OTHER_ADAPTER,
    ),
    "and another's": (
        lambda case: case.added(
            case.delta + (gaussian((SIZE, R), 21, 0.1) @ gaussian((R, SIZE), 22, 0.1)).astype(np.float64)
        ),
        Verdict.OTHER_ADAPTER,
    ),
    "noise": (
        lambda case: case.added(case.delta + gaussian((SIZE, SIZE), 23, 0.02).astype(np.float64)),
        Verdict.UNEXPLAINED,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_named(case: Case, mistake: str) -> None:
    make, verdict = MISTAKES[mistake]
    said = case.verdict(make(case))
    assert (said.verdict, said.passed) == (verdict, False), str(said)
    assert said.unequal > 0
    assert said.witness is not None
    expected = {
        "root of r": "alpha / sqrt(r)",
        "alpha is r": "scaling is 1,",
        "subtracted": "subtracted",
        "three times": "about 3",
        "another layer's": Q1,
        "another adapter's": f"rank {R}",
        "and another's": f"rank {R}",
    }
    assert expected.get(mistake, "") in said.detail, str(said)


def nothing_else(*_: Any) -> Any:
    raise AssertionError("looked for another explanation")


def test_what_is_plainly_the_merge_needs_no_other_explanation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path / "base", FLOAT32)
    monkeypatch.setattr(Judge, "_nearest", nothing_else)
    monkeypatch.setattr(Judge, "_right_but_for_noise", nothing_else)
    held = case.W0 + case.scaling * (case.B @ case.A)
    said = case.verdict(held)
    assert (said.verdict, said.passed) == (Verdict.WITHIN_ULPS, True)
    assert said.unequal > 0
    assert not case.verdict(held, exact=True).passed
    assert said.detail == f"the update is there, rounded otherwise; at most {said.ulps[-1][0]} ulp"


@pytest.mark.parametrize(
    ("dtype", "update", "noise"),
    [
        (FLOAT32, 0.02, 1.5),  # 1.3 in the mean of log2(1 + steps)
        (BFLOAT16, 0.0003, 0.3),  # an update of about one step
    ],
    ids=str,
)
def test_where_another_update_could_hide_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: np.dtype[Any], update: float, noise: float
) -> None:
    case = Case(tmp_path / "base", dtype, update)
    right = case.added(case.delta)
    steps = np.round(gaussian(right.shape, 5, noise)).astype(f"i{dtype.itemsize}")
    held = (right.view(f"i{dtype.itemsize}") + steps).view(dtype)
    monkeypatch.setattr(Judge, "_nearest", nothing_else)
    with pytest.raises(AssertionError, match="looked for another explanation"):
        case.verdict(held)


@pytest.mark.parametrize("mistake", ["base", "twice", "subtracted", "transposed", "another layer's"])
def test_an_update_smaller_than_the_spacing_is_still_told(tmp_path: Path, mistake: str) -> None:
    """In bfloat16 an update of 2^-11 of the weights changes few entries, and all are inside the bound."""
    case = Case(tmp_path / "base", BFLOAT16, update=0.05 * 2.0**-11)
    make, verdict = MISTAKES[mistake]
    said = case.verdict(make(case))
    assert (said.verdict, said.passed) == (verdict, False), str(said)
    assert case.verdict(peft(case)).passed


def test_an_update_that_vanishes_is_said_to(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", BFLOAT16, update=1e-9)
    said = case.verdict(np.array(case.W0))
    assert (said.verdict, said.passed) == (Verdict.EXACT, True)
    assert "vanishes" in said.detail


def test_a_hundred_merges_and_unmerges(case: Case) -> None:
    """Sums and differences soon repeat themselves: in 16 bits the last merge gives the bits of the first."""
    delta = round_to((case.B @ case.A) * np.float32(case.scaling), case.dtype).astype(np.float32)
    held = case.W0
    for _ in range(100):
        held = round_to(held.astype(np.float32) + delta, case.dtype)
        held = round_to(held.astype(np.float32) - delta, case.dtype)
    merged = round_to(held.astype(np.float32) + delta, case.dtype)
    said = case.verdict(merged)
    kind = Verdict.WITHIN_ULPS if case.dtype == np.float32 else Verdict.ROUNDED_TWICE
    assert (said.verdict, said.passed) == (kind, True), str(said)
    undone = case.verdict(held)
    assert undone.verdict is Verdict.MISSING, str(undone)


def test_more_noise_than_one_merge_makes_is_drift(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32))
    noise = gaussian((SIZE, SIZE), 41, 1e-5)
    said = case.verdict(case.added(case.delta + noise))
    assert (said.verdict, said.passed) == (Verdict.DRIFTED, False), str(said)


def test_single_entries(case: Case) -> None:
    merged = np.array(case.weights.tensor(f"{Q0}.weight"))
    merged[3, 5] = -2.0
    said = case.verdict(merged)
    assert (said.verdict, said.passed, said.unequal) == (Verdict.DAMAGED, False, 1)
    assert said.witness is not None
    assert (said.witness.index, said.witness.got) == ((3, 5), -2.0)
    merged[3, 5] = np.nan
    assert case.verdict(merged).verdict is Verdict.NOT_FINITE


def test_a_weight_that_is_left_alone_may_not_change_by_a_bit(case: Case) -> None:
    name = f"{V0}.weight"
    held = np.array(case.weights.tensor(name))
    unsigned = held.view(f"u{held.dtype.itemsize}")
    unsigned[1, 2] += 1
    said = case.verdict(held, name)
    assert (said.verdict, said.passed, said.unequal) == (Verdict.CHANGED, False, 1)
    assert said.ulps == ((0, held.size - 1), (1, 1))


def test_a_changed_weight_is_explained(case: Case) -> None:
    name = f"{V0}.weight"
    update = gaussian((SIZE // 2, 2), 31, 0.2) @ gaussian((2, SIZE), 32, 0.2)
    held = round_to(case.weights.tensor(name).astype(np.float32) + update, case.dtype)
    said = case.verdict(held, name)
    assert (said.verdict, said.passed) == (Verdict.CHANGED, False)
    assert "rank 2" in said.detail
    own = Case.verdict(case, case.weights.checkpoint.tensor(f"{Q1}.weight"))
    assert own.verdict is not Verdict.EXACT


def test_what_lies_in_another_weights_place_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32))
    plain = MergedWeights(case.weights.checkpoint, None)
    said = Judge(plain).judge(f"{Q0}.weight", plain.tensor(f"{Q1}.weight"))
    assert said.verdict is Verdict.CHANGED
    assert f"{Q1}.weight" in said.detail


@pytest.mark.parametrize("middle", [BFLOAT16, np.dtype(np.float16)], ids=str)
def test_a_candidate_that_passed_through_a_narrower_dtype(tmp_path: Path, middle: np.dtype[Any]) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32))
    for name in (f"{Q0}.weight", f"{V0}.weight"):
        said = case.verdict(round_to(round_to(case.weights.tensor(name), middle), np.float32), name)
        assert (said.verdict, said.passed) == (Verdict.ROUNDED_TWICE, False)
        assert str(middle) in said.detail


def test_a_dtype_narrower_than_both_fails_whatever_the_bound(tmp_path: Path) -> None:
    """bfloat16's rounding is inside the bound of so many roundings to float16."""
    case = Case(tmp_path / "base", np.dtype(np.float16))
    said = case.verdict(round_to(round_to(case.weights.tensor(f"{Q0}.weight"), BFLOAT16), np.float16))
    assert (said.verdict, said.passed) == (Verdict.ROUNDED_TWICE, False)
    assert "bfloat16" in said.detail


def test_a_weight_that_has_nothing_to_do_with_it_is_no_mistake_of_the_update(case: Case) -> None:
    """One mistake or another is always a little nearer than the merge."""
    for seed in range(4):
        said = case.verdict(round_to(gaussian((SIZE, SIZE), 50 + seed, 0.05), case.dtype))
        assert (said.verdict, said.passed) == (Verdict.UNEXPLAINED, False)


def test_a_bfloat16_merge_widened_passes_for_a_bfloat16_base_alone(tmp_path: Path) -> None:
    case = Case(tmp_path / "narrow", BFLOAT16)
    said = case.verdict(peft(case).astype(np.float32))
    assert (said.verdict, said.passed) == (Verdict.ROUNDED_TWICE, True), str(said)
    wide = case.weights.tensor(f"{Q0}.weight", np.float32)
    assert case.verdict(wide).verdict is Verdict.EXACT


def test_an_adapter_rounded_before_the_merge(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32))
    A, B = (round_to(factor, BFLOAT16).astype(np.float64) for factor in (case.A, case.B))
    said = case.verdict(case.added(case.scaling * (B @ A)))
    assert (said.verdict, said.passed) == (Verdict.ROUNDED_TWICE, False)
    assert "A and B to bfloat16" in said.detail


def test_shapes_and_dtypes(case: Case) -> None:
    assert case.verdict(np.zeros((2, 3), case.dtype)).verdict is Verdict.WRONG_SHAPE
    assert case.verdict(np.zeros((SIZE, SIZE), np.int8)).verdict is Verdict.WRONG_SHAPE


def test_rslora_is_told_from_the_plain_scaling(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32), use_rslora=True)
    said = case.verdict(case.added(case.delta / R**0.5))
    assert said.verdict is Verdict.OTHER_SCALING
    assert "alpha / r" in said.detail


def test_an_adapter_without_a_base_weight_is_not_needed(case: Case) -> None:
    plain = Judge(MergedWeights(case.weights.checkpoint, None))
    assert plain.judge(f"{Q0}.weight", case.W0).verdict is Verdict.UNTOUCHED
    said = plain.judge(f"{Q0}.weight", case.added(case.delta))
    assert said.verdict is Verdict.CHANGED
    assert f"rank {R}" in said.detail


def test_dora_without_its_magnitude(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32))
    pair = case.adapter.pairs[Q0]
    config = replace(case.config, use_dora=True)
    magnitude = np.linspace(0.5, 2, SIZE, dtype=np.float32)
    adapter = Adapter(
        config, {path: replace(own, magnitude=magnitude) for path, own in case.adapter.pairs.items()}
    )
    weights = MergedWeights(case.weights.checkpoint, adapter)
    judge = Judge(weights)
    w = case.W0.astype(np.float64) + case.delta
    dora = (magnitude[:, None] / np.linalg.norm(w, axis=1, keepdims=True) * w).astype(np.float32)
    narrow = magnitude[:, None] / np.linalg.norm(w.astype(np.float32), axis=1, keepdims=True)
    assert pair.magnitude is None
    assert judge.judge(f"{Q0}.weight", weights.tensor(f"{Q0}.weight")).verdict is Verdict.EXACT
    assert judge.judge(f"{Q0}.weight", dora).passed
    others = judge.judge(f"{Q0}.weight", narrow * w.astype(np.float32))
    assert (others.verdict, others.passed) == (Verdict.WITHIN_ULPS, True)
    without = judge.judge(f"{Q0}.weight", case.added(case.delta))
    assert without.verdict is Verdict.OTHER_ADAPTER
    assert "magnitude" in without.detail


def test_mistakes_that_come_to_the_same_are_all_named(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", np.dtype(np.float32))
    A, B = case.A[:4], case.B[:, :4]
    config = replace(case.config, r=4, lora_alpha=4)
    adapter = Adapter.from_arrays(config, {Q0: (A, B), Q1: (A, B)})
    judge = Judge(MergedWeights(case.weights.checkpoint, adapter))
    said = judge.judge(f"{Q0}.weight", case.added(2.0 * (B.astype(np.float64) @ A)))
    assert said.verdict is Verdict.TWICE
    assert "alpha / sqrt(r)" in said.detail


@pytest.mark.parametrize("r", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_quick_bound_is_below_the_derived_one(dtype: np.dtype[Any], r: int, tmp_path: Path) -> None:
    write_model(tmp_path / "base", [{f"{Q0}.weight": round_to(gaussian((24, 32), 1, 0.05), dtype)}])
    config = LoraConfig(r=r, lora_alpha=3, target_modules=("q_proj",))
    factors = gaussian((r, 32), 2, 0.3), gaussian((24, r), 3, 0.3)
    weights = MergedWeights(Checkpoint(tmp_path / "base"), Adapter.from_arrays(config, {Q0: factors}))
    weight = weight_of(weights, f"{Q0}.weight")
    want = weight.rows(0, 24, dtype).reshape(-1)
    block = EntriesApart(weight, 0, 24, np.arange(want.size), want, want)
    bound = weight.bound(0, 24, dtype, dtype).reshape(-1)
    least = least_bound(block, dtype)
    assert (least <= bound).all()
    assert (least > 0).all()
