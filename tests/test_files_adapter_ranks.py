"""Configurations that give each module its own rank and scaling."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.files import LoraConfig
from loracle.files.adapter_ranks import alpha_for, with_ranks

PATHS = ("layers.0.q", "layers.1.q", "decoder.layers.0.q", "layers.10.q", "axlayers.0.q")


def check(config: LoraConfig, ranks: dict[str, int], scalings: dict[str, float]) -> None:
    assert {path: config.rank_of(path) for path in ranks} == ranks
    assert {path: config.scaling_of(path) for path in ranks} == scalings
    again = LoraConfig.from_json(config.to_json())
    assert {path: again.rank_of(path) for path in ranks} == ranks


def test_the_rank_that_most_have_is_r() -> None:
    ranks = dict(zip(PATHS, (4, 2, 4, 4, 7), strict=True))
    config = with_ranks(LoraConfig(use_rslora=True, bias="all"), ranks, dict.fromkeys(ranks, 2.0))
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (4, 8.0, False, "all")
    assert config.rank_pattern == {r"axlayers\.0\.q": 7, r"layers\.1\.q": 2}
    check(config, ranks, dict.fromkeys(ranks, 2.0))


def test_a_path_that_is_the_end_of_another_has_a_key_of_its_own() -> None:
    ranks = {"layers.0.q": 2, "decoder.layers.0.q": 4, "layers.1.q": 4}
    config = with_ranks(LoraConfig(), ranks, dict.fromkeys(ranks, 1.0))
    assert list(config.rank_pattern.items()) == [(r"decoder\.layers\.0\.q", 4), (r"layers\.0\.q", 2)]
    check(config, ranks, dict.fromkeys(ranks, 1.0))


def test_old_patterns_are_gone() -> None:
    before = LoraConfig(rank_pattern={"q": 3}, alpha_pattern={"q": 5})
    config = with_ranks(before, {"layers.0.q": 6}, {"layers.0.q": 0.5})
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (6, {}, {})
    check(config, {"layers.0.q": 6}, {"layers.0.q": 0.5})


def test_a_pair_without_a_name_has_the_rank_r() -> None:
    ranks = {"a": 4, "b": 4, "experts": 2}
    config = with_ranks(LoraConfig(), ranks, {"a": 1.0, "b": 1.0, "experts": 3.0}, unnamed="experts")
    assert (config.r, config.lora_alpha) == (2, 6.0)
    assert config.rank_pattern == {"a": 4, "b": 4}


@given(st.lists(st.integers(1, 4), min_size=5, max_size=5), st.sampled_from((0.5, 2.0, -4.0, 0.0)))
def test_every_path_has_its_rank_and_scaling(ranks: list[int], scaling: float) -> None:
    own = dict(zip(PATHS, ranks, strict=True))
    check(with_ranks(LoraConfig(), own, dict.fromkeys(own, scaling)), own, dict.fromkeys(own, scaling))


@given(st.integers(1, 300), st.floats(0.01, 1000), st.integers(1, 300))
def test_alpha_over_r_is_the_scaling_or_its_neighbour(r_before: int, alpha: float, r: int) -> None:
    scaling = alpha / r_before
    assert abs(alpha_for(scaling, r) / r - scaling) <= math.ulp(scaling)


@pytest.mark.parametrize("r", range(1, 65))
def test_a_scaling_that_is_some_alpha_over_r_is_kept(r: int) -> None:
    """0.1 / 3 times 3 is not 0.1, and its neighbour over 3 is not the scaling."""
    for alpha in (0.1, 1.0, 16.0, 0.7):
        assert alpha_for(alpha / r, r) / r == alpha / r
