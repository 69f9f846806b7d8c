"""Pairs of every kind as matrices, and back."""

import numpy as np
import pytest
from files_fixtures import BFLOAT16, random_array

from loracle.files import Adapter, LoraConfig, LoraPair
from loracle.files.pair_matrices import joined, matrices_of, split
from loracle.reference import ConfigError, expert_factors_from_peft


def pairs() -> dict[str, LoraPair]:
    return {
        "linear": LoraPair(random_array((2, 6), 0), random_array((5, 2), 1), 0.5),
        "embedding": LoraPair(random_array((2, 9), 2), random_array((4, 2), 3), 0.5, "embedding"),
        "convolution": LoraPair(
            random_array((2, 3, 3, 2), 4), random_array((5, 2, 1, 1), 5), 0.5, "convolution"
        ),
        "parameter": LoraPair(random_array((6, 7), 6), random_array((5, 6), 7), 0.5, "parameter"),
    }


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution", "parameter"])
def test_split_and_joined_are_opposites(kind: str) -> None:
    pair = pairs()[kind]
    parts = split("p", pair, 3 if kind == "parameter" else 1)
    assert [part.r for part in parts] == [2] * len(parts)
    again = joined(pair, parts)
    assert (again.A.tobytes(), again.B.tobytes()) == (pair.A.tobytes(), pair.B.tobytes())
    assert (again.A.shape, again.B.shape, again.scaling) == (pair.A.shape, pair.B.shape, 0.5)


def test_experts_are_those_of_the_reference() -> None:
    pair = pairs()["parameter"]
    As, Bs = expert_factors_from_peft(pair.A, pair.B, 3)
    parts = split("p", pair, 3)
    assert [part.name for part in parts] == ["p[0]", "p[1]", "p[2]"]
    for part, A, B in zip(parts, As, Bs, strict=True):
        assert np.array_equal(part.A, A)
        assert np.array_equal(part.B, B)


def test_a_convolution_s_taps_are_columns() -> None:
    (part,) = split("c", pairs()["convolution"], 1)
    assert (part.A.shape, part.B.shape) == ((2, 18), (5, 2))


def test_factors_are_rounded_once_and_a_bias_keeps_what_it_adds() -> None:
    bias = np.array([2.0, 4.0], np.float32)
    pair = LoraPair(
        np.ones((1, 2), BFLOAT16), np.ones((2, 1), np.float32), 1.0, bias=bias, magnitude=bias + 1
    )
    own = split("p", pair, 1)[0]
    wide = type(own)("p", np.full((1, 2), 1 + 2.0**-8 + 2.0**-30), np.ones((2, 1)), 0.5)
    new = joined(pair, [wide])
    assert new.A.dtype == BFLOAT16
    assert new.A.tolist() == [[1 + 2.0**-7] * 2]  # by way of float32 it would be a tie, to 1
    assert new.bias is not None
    assert new.bias.tolist() == [4, 8]
    assert new.magnitude is pair.magnitude


def test_experts_that_a_pattern_may_mean_are_refused() -> None:
    pair = pairs()["parameter"]
    config = LoraConfig(r=2, lora_alpha=1, target_parameters=("mlp.experts.down",), target_modules=())
    adapter = Adapter(config, {"mlp.experts": pair})
    assert [part.name for part in matrices_of(adapter, "mlp.experts")] == [
        f"mlp.experts[{e}]" for e in range(3)
    ]
    config = LoraConfig(
        r=2, lora_alpha=1, target_parameters=("mlp.experts.down",), target_modules=(), rank_pattern={"x": 3}
    )
    with pytest.raises(ConfigError, match=r"^mlp\.experts: a stacked parameter without its name"):
        matrices_of(Adapter(config, {"mlp.experts": pair}), "mlp.experts")
