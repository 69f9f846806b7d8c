"""Stacked parameters get their names from the module's order, and from nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import Array, random_array
from refusal import refused

from loracle.files import Adapter, LoraConfig, LoraPair, name_parameters, read_adapter, write_adapter
from loracle.reference import LoracleError, ShapeError, TargetError

E = "model.experts"


def _adapter(ranks: tuple[int, ...] = (2, 2), **options: Any) -> Adapter:
    """An adapter as read from a file: the wrappers of ``E``, outermost first, for three experts."""
    config = LoraConfig(r=2, target_modules=(), target_parameters=("experts.up", "experts.down"), **options)
    pairs = {}
    for depth, rank in enumerate(ranks):
        A: Array = random_array((3 * rank, 5 + depth), depth)
        path = E + ".base_layer" * depth
        pairs[path] = LoraPair(A, random_array((4, 3 * rank), 9), config.scaling_of(path), "parameter")
    return Adapter(config, pairs)


def test_the_innermost_wrapper_is_the_first_parameter_s() -> None:
    adapter = _adapter()
    named = name_parameters(adapter, {E: ("up", "down")})
    assert list(named.pairs) == [f"{E}.up", f"{E}.down"]
    np.testing.assert_array_equal(named.pairs[f"{E}.up"].A, adapter.pairs[f"{E}.base_layer"].A)
    np.testing.assert_array_equal(named.pairs[f"{E}.down"].A, adapter.pairs[E].A)


def test_ranks_and_scalings_are_the_parameters_own() -> None:
    adapter = _adapter((2, 4), rank_pattern={"up": 4}, alpha_pattern={"experts.down": 6})
    named = name_parameters(adapter, {E: ("up", "down")})
    assert named.pairs[f"{E}.up"].scaling == 8 / 4
    assert named.pairs[f"{E}.down"].scaling == 6 / 2
    with pytest.raises(ShapeError, match=r"experts\.base_layer\.lora_A\.weight: .*\(4 \* weights, in\)"):
        name_parameters(_adapter((2, 2), rank_pattern={"up": 4}), {E: ("up", "down")})


def test_pairs_with_names_are_put_in_order() -> None:
    named = name_parameters(_adapter(), {E: ("up", "down")})
    turned = Adapter(named.config, dict(reversed(named.pairs.items())))
    assert list(name_parameters(turned, {E: ("up", "down")}).pairs) == list(named.pairs)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (
            {},
            TargetError,
            f"{E}: expected lora_A and lora_B for 0 targeted parameters (none), got 2; is this adapter for "
            "another model?",
        ),
        (
            {E: ("up",)},
            TargetError,
            f"{E}: expected lora_A and lora_B for 1 targeted parameters (up), got 2; is this adapter for "
            "another model?",
        ),
        (
            {E: ("up", "up")},
            TargetError,
            f"{E}: expected lora_A and lora_B for 2 targeted parameters (up, up), got 2; is this adapter for "
            "another model?",
        ),
        (
            {E: ("up", "down"), "other": ("up",)},
            TargetError,
            "other: expected lora_A and lora_B for 1 targeted parameters (up), got 0; is this adapter for "
            "another model?",
        ),
        (
            {E: ("up", "gate")},
            TargetError,
            f"{E}.gate: not among target_parameters ('experts.up', 'experts.down'); leave it out",
        ),
    ],
)
def test_an_order_of_another_model_is_refused(
    order: dict[str, tuple[str, ...]], error: type[LoracleError], message: str
) -> None:
    refused(lambda: name_parameters(_adapter(), order), error, message)


def test_names_that_the_pairs_have_not_are_refused() -> None:
    named = name_parameters(_adapter(), {E: ("up", "down")})
    config = LoraConfig(r=2, target_modules=(), target_parameters=("up", "down", "gate"))
    other = Adapter(config, named.pairs)
    refused(
        lambda: name_parameters(other, {E: ("up", "gate")}),
        TargetError,
        f"{E}.gate: expected lora_A and lora_B for it, got {E}.up, {E}.down; correct the order",
    )


def test_wrappers_must_be_complete_and_named_alike() -> None:
    adapter = _adapter()
    outer, inner = adapter.pairs.values()
    with pytest.raises(TargetError, match="expected a wrapper within each of 1 at model"):
        Adapter(adapter.config, {f"{E}.base_layer": inner})
    with pytest.raises(TargetError, match="with and without their names"):
        Adapter(adapter.config, {E: outer, f"{E}.up": inner})
    config = LoraConfig(r=2, target_modules=("experts",), target_parameters=("experts.up",))
    linear = LoraPair(random_array((2, 5), 0), random_array((4, 2), 1), config.scaling_of(E))
    with pytest.raises(TargetError, match="of its own and of its parameter"):
        Adapter(config, {E: linear, f"{E}.up": inner})


def test_a_wrapper_within_another_is_a_parameter_s_whatever_the_targets(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", target_parameters=("up", "down"))
    named = name_parameters(_adapter(), {E: ("up", "down")})
    write_adapter(tmp_path / "a", Adapter(config, named.pairs))
    again = read_adapter(tmp_path / "a")
    assert {path: pair.kind for path, pair in again.pairs.items()} == dict.fromkeys(
        (E, f"{E}.base_layer"), "parameter"
    )
    np.testing.assert_array_equal(again.pairs[E].A, named.pairs[f"{E}.down"].A)
