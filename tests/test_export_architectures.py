"""Every architecture and head that can be exported, merged, against its unmerged self in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_runs import EXPORTED, run
from architectures_page import rows

SLOW = {"gptj", "bloom", "gpt_neox", "phi3", "qwen2_moe", "opt"}
"""Kinds of attention, position and mixture that others of every run have too, and that take longest."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXPORTED]
)
def test_the_merged_model_answers_within_the_bound_of_the_unmerged(name: str, tmp_path: Path) -> None:
    """Prefill with padding on either side, then cached steps, where there is a cache. Catches a layer that is
    not merged, a wrong scale, window, cap, rotation, position, mask or norm."""
    outcome = run(name, tmp_path)
    assert outcome.error <= outcome.tolerance
    assert outcome.effect > 10 * outcome.tolerance
    model, task, error, bound, fused = rows()[name]
    assert (model, task, fused) == (outcome.model, outcome.task, ", ".join(outcome.fused))
    assert float(error) <= float(bound)
    # The bound is sampled with fixed seeds: only roundings differ from machine to machine.
    assert outcome.tolerance / 1.2 <= float(bound) <= outcome.tolerance * 1.2


def test_the_page_has_every_architecture_once() -> None:
    assert list(rows()) == EXPORTED
