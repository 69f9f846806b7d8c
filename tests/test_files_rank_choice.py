"""Ranks by one number, by energy, and by a pattern in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import Q0, V0, random_array, small_adapter

from loracle.files import Adapter, LoraConfig, LoraPair
from loracle.files.rank_choice import (
    RankPattern,
    ranks_for_energy,
    ranks_for_pattern,
    ranks_for_rank,
    read_pattern,
)
from loracle.reference import ConfigError, FileError


def adapter(**spectra: list[float]) -> Adapter:
    """Updates with these singular values, in scalings of 2."""
    arrays = {
        path: (np.eye(len(values), 6), np.diag(np.array(values) / 2)) for path, values in spectra.items()
    }
    ranks = {path: len(values) for path, values in spectra.items()}
    config = LoraConfig(
        target_modules=tuple(spectra), rank_pattern=ranks, alpha_pattern={p: 2 * r for p, r in ranks.items()}
    )
    return Adapter.from_arrays(config, arrays)


def test_one_rank_for_all_that_have_more() -> None:
    own = adapter(a=[1, 1, 1], b=[1])
    assert ranks_for_rank(own, 2) == {"a": 2, "b": 1}
    for r, allowed in ((3, "1 to 2, below"), (0, "1 to 2, below"), (-1, "1 to 2, below")):
        with pytest.raises(ConfigError, match=re.escape(f"expected {allowed} the adapter's 3, got {r};")):
            ranks_for_rank(own, r)
    with pytest.raises(ConfigError, match="expected none, as no rank is below the adapter's 1, got 1"):
        ranks_for_rank(adapter(b=[1]), 1)


def test_by_energy() -> None:
    """Energies 16, 4, 4 and 0: half is one, 5/6 is two; of an update of zero one rank is left."""
    own = adapter(a=[2, 4, 0, 2], b=[0, 0])
    assert ranks_for_energy(own, 0.5) == {"a": 1, "b": 1}
    assert ranks_for_energy(own, 0.75) == {"a": 2, "b": 1}
    assert ranks_for_energy(own, 1) == {"a": 3, "b": 1}
    with pytest.raises(ConfigError, match=r"expected a number above 0 and at most 1, got 1\.5"):
        ranks_for_energy(own, 1.5)


def test_of_experts_the_most_that_one_needs() -> None:
    A = np.zeros((4, 5), np.float32)
    A[[0, 1, 2, 3], [0, 1, 0, 1]] = [1, 1, 1, 1e-3]  # two experts of rank 2; the second needs one
    B = np.zeros((3, 4), np.float32)
    B[0, [0, 1]], B[1, [2, 3]] = 1, 1
    config = LoraConfig(r=2, lora_alpha=2, target_modules=(), target_parameters=("experts.down",))
    own = Adapter(config, {"mlp.experts.down": LoraPair(A, B, 1.0, "parameter")})
    assert ranks_for_energy(own, 0.9) == {"mlp.experts.down": 2}


def test_by_pattern() -> None:
    own = small_adapter()
    assert ranks_for_pattern(own, RankPattern({"q_proj": 1})) == {Q0: 1, V0: 2}
    assert ranks_for_pattern(own, RankPattern({"q_proj": 2}, 1)) == {Q0: 2, V0: 1}
    assert ranks_for_pattern(own, RankPattern({}, 1)) == {Q0: 1, V0: 1}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (RankPattern({"k_proj": 1}), "rank_pattern 'k_proj': matches no layer of the adapter; correct it"),
        (RankPattern({"q_proj": 0}), "rank_pattern 'q_proj': expected an integer of at least 1, got 0"),
        (RankPattern({"q_proj": True}), "rank_pattern 'q_proj': expected an integer of at least 1, got True"),
        (RankPattern({"q_proj": "1"}), "rank_pattern 'q_proj': expected an integer of at least 1, got '1'"),
        (RankPattern({}, 1.0), "r: expected an integer of at least 1, got 1.0"),
        (RankPattern({"q_proj": 3}), f"{Q0}: expected a rank from 1 to 2, which it has, got 3"),
        (RankPattern({}, 3), f"{Q0}: expected a rank from 1 to 2, which it has, got 3"),
        (RankPattern({"(": 1}), "module pattern "),
    ],
)
def test_a_wrong_pattern(pattern: RankPattern, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ranks_for_pattern(small_adapter(), pattern)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"q_proj": 1}, RankPattern({"q_proj": 1})),
        ({"r": 4, "rank_pattern": {"q_proj": 1}, "peft_type": "LORA"}, RankPattern({"q_proj": 1}, 4)),
        ({"proposal": {"r": 4, "rank_pattern": {}}, "layers": []}, RankPattern({}, 4)),
    ],
)
def test_a_pattern_s_file(tmp_path: Path, content: dict[str, Any], pattern: RankPattern) -> None:
    (tmp_path / "pattern.json").write_text(json.dumps(content))
    assert read_pattern(tmp_path / "pattern.json") == pattern


@pytest.mark.parametrize(
    "content", ["{}", '{"proposal": 4}', '{"rank_pattern": {}}', '{"rank_pattern": [1]}', "["]
)
def test_a_file_without_a_pattern(tmp_path: Path, content: str) -> None:
    (tmp_path / "pattern.json").write_text(content)
    with pytest.raises(FileError, match=r"^\S*pattern\.json: "):
        read_pattern(tmp_path / "pattern.json")


def test_random_adapters_need_all_of_their_ranks() -> None:
    own = Adapter.from_arrays(
        LoraConfig(r=3, target_modules=("q",)), {"q": (random_array((3, 40), 1), random_array((50, 3), 2))}
    )
    assert ranks_for_energy(own, 0.999) == {"q": 3}
