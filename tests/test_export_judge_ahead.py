"""What was compared ahead is what is judged by; what was not is compared here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loracle.export.verification import judge as module
from loracle.export.verification.comparison import compare
from loracle.export.verification.comparisons import Held
from loracle.export.verification.judge import Judge
from loracle.export.verification.one_weight import weight_of
from loracle.export.verification.verdict import Verdict
from loracle.files import Checkpoint, MergedWeights
from tests.files_fixtures import Q0, small_adapter, write_model

Q = f"{Q0}.weight"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_what_was_compared_ahead_is_judged_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, mapped: bool
) -> None:
    weights = MergedWeights(Checkpoint(write_model(tmp_path / "base")), small_adapter())
    right = weights.tensor(Q)
    made, asked = compare(weight_of(weights, Q), right), []

    class Ahead:
        def of(self, held: Held) -> Any:
            asked.append(held)
            return made if known else None

    here: list[str] = []
    monkeypatch.setattr(
        module, "compare", lambda weight, held: here.append(weight.name) or compare(weight, held)
    )
    ahead: Any = Ahead()
    view: Any = ("a view",) if mapped else None
    said = Judge(weights, ahead=ahead).judge(Q, right, view=view)
    assert (said.name, said.verdict, said.passed, said.place) == (Q, Verdict.EXACT, True, "")
    assert asked == ([Held(Q, view)] if mapped else [])
    assert here == ([] if known and mapped else [Q])


def test_without_a_comparison_ahead_a_mapped_weight_is_compared_here(tmp_path: Path) -> None:
    weights = MergedWeights(Checkpoint(write_model(tmp_path / "base")), small_adapter())
    held = np.array(weights.tensor(Q))
    held[0, 0] *= 2
    view: Any = object()
    said = Judge(weights).judge(Q, held, "there", view)
    assert (said.unequal, said.passed, said.place) == (1, False, "there")
