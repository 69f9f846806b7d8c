"""What the update of one weight has to look like: each part that does not, by name and in full."""

import re
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, random_array

from loracle.files import LoraConfig, LoraPair
from loracle.files.lora_pair import check_dtype, check_finite, check_pair
from loracle.reference import DTypeError, LoracleError, NonFiniteError, ShapeError, TargetError

PATH = "m.q_proj"
PLAIN = LoraConfig(r=2, lora_alpha=6, target_modules=("q_proj",))
DORA = LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=("q_proj",))
BIAS = LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=("q_proj",))
KERNEL: dict[str, Any] = {
    "A": random_array((2, 6, 3, 3), 0),
    "B": random_array((8, 2, 1, 1), 1),
    "kind": "convolution",
}
EMBEDDING: dict[str, Any] = {"kind": "embedding"}
STACK: dict[str, Any] = {"A": random_array((6, 5), 0), "B": random_array((7, 6), 1), "kind": "parameter"}
ONES = np.ones(8, np.float32)
OF_TWO = "config and weights are of different adapters"
CORRECT = "correct r or rank_pattern"
TRAIN = "holds NaN or infinity, expected finite numbers; train the adapter again"


def pair_of(**changed: Any) -> LoraPair:
    given = {"A": random_array((2, 6), 0), "B": random_array((8, 2), 1), "scaling": 3.0}
    return LoraPair(**{**given, **changed})


def with_nan(array: Any) -> Any:
    array = np.array(array)
    array.reshape(-1)[-1] = np.nan
    return array


def check(config: LoraConfig, pair: LoraPair, rank: int | None = 2) -> None:
    check_pair(config, PATH, pair, rank, lambda part: f"the {part}")


@pytest.mark.parametrize(
    ("config", "changed", "rank"),
    [
        (PLAIN, {}, 2),
        (PLAIN, {}, None),
        (PLAIN, {"A": random_array((1, 1), 0, BFLOAT16), "B": random_array((1, 1), 0, np.float64)}, 1),
        (PLAIN, {**EMBEDDING}, 2),
        (PLAIN, {**KERNEL}, 2),
        (PLAIN, {**KERNEL, "A": random_array((2, 6, 3), 0), "B": random_array((8, 2, 1), 1)}, 2),
        (PLAIN, {**KERNEL, "A": random_array((2, 6, 1, 2, 3), 0), "B": random_array((8, 2, 1, 1, 1), 1)}, 2),
        (PLAIN, {**STACK}, 2),
        (PLAIN, {**STACK}, 3),
        (PLAIN, {**STACK}, None),
        (BIAS, {"bias": ONES}, 2),
        (BIAS, {**KERNEL, "bias": ONES}, 2),
        (DORA, {"magnitude": ONES}, 2),
        (DORA, {**EMBEDDING, "magnitude": ONES}, 2),
        (DORA, {**KERNEL, "magnitude": np.ones((1, 8, 1, 1), np.float32)}, 2),
    ],
)
def test_what_fits_is_accepted(config: LoraConfig, changed: dict[str, Any], rank: int | None) -> None:
    check(config, pair_of(**changed), rank)


FACTORS: list[tuple[dict[str, Any], int | None, type[LoracleError], str]] = [
    (
        {"kind": "magic"},
        2,
        TargetError,
        "m.q_proj: expected a kind among linear, embedding, convolution, parameter, got 'magic'; correct it",
    ),
    ({"A": np.ones((2, 6), int)}, 2, DTypeError,
     "the A: expected a floating-point dtype, got int64; convert the adapter"),
    ({}, 3, ShapeError, f"the A: expected shape (3, in) by the adapter's config, got (2, 6); {CORRECT}"),
    ({"A": np.ones(2)}, 2, ShapeError,
     f"the A: expected shape (2, in) by the adapter's config, got (2,); {CORRECT}"),
    ({"A": np.ones(())}, 2, ShapeError,
     f"the A: expected shape (2, in) by the adapter's config, got (); {CORRECT}"),
    ({"A": np.ones(())}, None, ShapeError,
     f"the A: expected shape (r, in) by the adapter's config, got (); {CORRECT}"),
    ({"A": np.ones((2, 0))}, 2, ShapeError,
     f"the A: expected shape (2, in) by the adapter's config, got (2, 0); {CORRECT}"),
    ({"A": np.ones((0, 6))}, None, ShapeError,
     f"the A: expected shape (r, in) by the adapter's config, got (0, 6); {CORRECT}"),
    ({"A": np.ones((2, 6, 3))}, 2, ShapeError,
     f"the A: expected shape (2, in) by the adapter's config, got (2, 6, 3); {CORRECT}"),
    ({**EMBEDDING}, 3, ShapeError,
     f"the A: expected shape (3, V) by the adapter's config, got (2, 6); {CORRECT}"),
    ({**KERNEL, "A": np.ones((2, 6))}, 2, ShapeError,
     f"the A: expected shape (2, in, *kernel) by the adapter's config, got (2, 6); {CORRECT}"),
    ({**KERNEL, "A": np.ones((2, 6, 1, 1, 1, 1))}, 2, ShapeError,
     f"the A: expected shape (2, in, *kernel) by the adapter's config, got (2, 6, 1, 1, 1, 1); {CORRECT}"),
    ({**STACK}, 4, ShapeError,
     f"the A: expected shape (4 * weights, in) by the adapter's config, got (6, 5); {CORRECT}"),
    ({**STACK, "A": np.ones(())}, 2, ShapeError,
     f"the A: expected shape (2 * weights, in) by the adapter's config, got (); {CORRECT}"),
    ({"A": with_nan(np.ones((2, 6)))}, 2, NonFiniteError, f"the A: {TRAIN}"),
    ({"B": np.ones((8, 2), bool)}, 2, DTypeError,
     "the B: expected a floating-point dtype, got bool; convert the adapter"),
    ({"B": np.ones((8, 3))}, 2, ShapeError,
     f"the B: expected shape (out, 2) by the adapter's config, got (8, 3); {CORRECT}"),
    ({"B": np.ones((0, 2))}, 2, ShapeError,
     f"the B: expected shape (out, 2) by the adapter's config, got (0, 2); {CORRECT}"),
    ({"B": np.ones((8, 2, 1))}, 2, ShapeError,
     f"the B: expected shape (out, 2) by the adapter's config, got (8, 2, 1); {CORRECT}"),
    ({"B": np.ones(2)}, 2, ShapeError,
     f"the B: expected shape (out, 2) by the adapter's config, got (2,); {CORRECT}"),
    ({**EMBEDDING, "B": np.ones((8, 1))}, 2, ShapeError,
     f"the B: expected shape (d, 2) by the adapter's config, got (8, 1); {CORRECT}"),
    ({**KERNEL, "B": np.ones((8, 2))}, 2, ShapeError,
     f"the B: expected shape (out, 2, 1, 1) by the adapter's config, got (8, 2); {CORRECT}"),
    ({**KERNEL, "B": np.ones((8, 2, 3, 3))}, 2, ShapeError,
     f"the B: expected shape (out, 2, 1, 1) by the adapter's config, got (8, 2, 3, 3); {CORRECT}"),
    ({"B": with_nan(np.ones((8, 2)))}, 2, NonFiniteError, f"the B: {TRAIN}"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "rank", "error", "message"), FACTORS)
def test_factors_that_do_not_fit(
    changed: dict[str, Any], rank: int | None, error: type[LoracleError], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        check(PLAIN, pair_of(**changed), rank)
    assert type(caught.value) is error


def grouped(groups: int, r: int = 6) -> LoraPair:
    kernel = {**KERNEL, "A": random_array((r, 6, 3, 3), 0), "B": random_array((8, r // groups, 1, 1), 1)}
    return pair_of(**kernel)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_a_grouped_convolution_is_named_as_one(groups: int) -> None:
    message = (
        f"the B: (8, {6 // groups}, 1, 1) is of a convolution in {groups} groups, whose lora_A sees the "
        "channels of all groups at once, and no grouped weight can hold that update; train without it"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        check(PLAIN, grouped(groups), 6)


@pytest.mark.parametrize(
    "changed",
    [
        {**KERNEL, "A": np.ones((6, 6, 3, 3)), "B": np.ones((8, 4, 1, 1))},
        {**KERNEL, "A": np.ones((6, 6, 3, 3)), "B": np.ones((8, 0, 1, 1))},
        {**KERNEL, "A": np.ones((6, 6, 3, 3)), "B": np.ones((8, 12, 1, 1))},
        {**KERNEL, "A": np.ones((6, 6, 3, 3)), "B": np.ones((8, 3))},
        {"A": np.ones((6, 6)), "B": np.ones((8, 3))},
    ],
)
def test_other_shapes_are_not(changed: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=r"^the B: expected shape \(out, 6.*\) by the adapter's config"):
        check(PLAIN, pair_of(**changed), 6)


EXTRAS: list[tuple[LoraConfig, dict[str, Any], type[LoracleError], str]] = [
    (BIAS, {**EMBEDDING}, TargetError,
     "the A: an embedding has no lora_bias; leave it out of the targets"),
    (BIAS, {}, TargetError,
     f"the bias: expected one by the adapter's config (lora_bias True), got none; {OF_TWO}"),
    (PLAIN, {"bias": ONES}, TargetError,
     f"the bias: expected none by the adapter's config (lora_bias False), got shape (8,); {OF_TWO}"),
    (BIAS, {"bias": ONES[:6]}, ShapeError,
     "the bias: expected shape (8,) to fit lora_B, got (6,); check its axes"),
    (BIAS, {"bias": np.ones(8, int)}, DTypeError,
     "the bias: expected a floating-point dtype, got int64; convert the adapter"),
    (BIAS, {"bias": with_nan(ONES)}, NonFiniteError, f"the bias: {TRAIN}"),
    (DORA, {}, TargetError,
     f"the magnitude: expected one by the adapter's config (use_dora True), got none; {OF_TWO}"),
    (PLAIN, {"magnitude": ONES}, TargetError,
     f"the magnitude: expected none by the adapter's config (use_dora False), got shape (8,); {OF_TWO}"),
    (DORA, {"magnitude": np.ones((1, 8), np.float32)}, ShapeError,
     "the magnitude: expected shape (8,) to fit lora_B, got (1, 8); check its axes"),
    (DORA, {**KERNEL, "magnitude": ONES}, ShapeError,
     "the magnitude: expected shape (1, 8, 1, 1) to fit lora_B, got (8,); check its axes"),
    (DORA, {"magnitude": with_nan(ONES)}, NonFiniteError, f"the magnitude: {TRAIN}"),
    (PLAIN, {"scaling": 1.5}, TargetError,
     "m.q_proj: scaling is 1.5, the adapter's config says 3.0; use its value"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "changed", "error", "message"), EXTRAS)
def test_what_lies_beside_the_factors_and_does_not_fit(
    config: LoraConfig, changed: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        check(config, pair_of(**changed))
    assert type(caught.value) is error


def test_a_module_s_own_scaling_counts() -> None:
    config = LoraConfig(r=2, lora_alpha=6, alpha_pattern={"q_proj": 9}, target_modules=("q_proj",))
    check(config, pair_of(scaling=4.5))
    with pytest.raises(TargetError, match=r"says 4\.5"):
        check(config, pair_of())


def test_shapes_ranks_and_sizes() -> None:
    assert (pair_of().shape, pair_of().r, pair_of().size) == ((8, 6), 2, 28)
    assert pair_of(**EMBEDDING).shape == (6, 8)
    assert pair_of(**KERNEL).shape == (8, 6, 3, 3)
    assert (pair_of(**STACK).shape, pair_of(**STACK).r) == ((7, 5), 6)
    assert pair_of(bias=ONES, magnitude=ONES).size == 44


def test_single_arrays() -> None:
    for dtype in (np.float16, BFLOAT16, np.float32, np.float64):
        check_dtype("x", np.ones(2, dtype))
        check_finite("x", np.ones(2, dtype))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteError, match=f"^x: {TRAIN}$"):
            check_finite("x", np.array([1.0, value]))
