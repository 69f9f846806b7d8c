"""How a budget is spent."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.torch_impl.extraction.budget import spend

SPECTRA = st.lists(st.floats(0, 100), min_size=1, max_size=5).map(lambda s: sorted(s, reverse=True))


def test_by_hand() -> None:
    """Gains per byte: wide 9/8, 4/8; narrow 4/4, 1/16."""
    spectra, costs = {"wide": [3.0, 2.0], "narrow": [2.0, 0.5]}, {"wide": 8, "narrow": 4}
    assert spend(spectra, costs, 7) == {"wide": 0, "narrow": 1}
    assert spend(spectra, costs, 8) == {"wide": 1, "narrow": 0}
    assert spend(spectra, costs, 12) == {"wide": 1, "narrow": 1}
    assert spend(spectra, costs, 19) == {"wide": 1, "narrow": 2}
    assert spend(spectra, costs, 20) == {"wide": 2, "narrow": 1}
    assert spend(spectra, costs, 3) == {"wide": 0, "narrow": 0}


def test_nothing_is_spent_on_zeros() -> None:
    assert spend({"a": [1.0, 0.0], "b": [0.0], "c": []}, {"a": 1, "b": 1, "c": 1}, 9) == {
        "a": 1,
        "b": 0,
        "c": 0,
    }


@settings(max_examples=100)
@given(st.lists(SPECTRA, min_size=1, max_size=4), st.data())
def test_the_budget_holds_and_no_step_was_better(spectra: list[list[float]], data: st.DataObject) -> None:
    own = {str(place): s for place, s in enumerate(spectra)}
    costs = {name: data.draw(st.integers(1, 6)) for name in own}
    budget = data.draw(st.integers(0, 60))
    ranks = spend(own, costs, budget)
    left = budget - sum(costs[name] * r for name, r in ranks.items())
    assert left >= 0
    for name, r in ranks.items():
        following = own[name][r] if r < len(own[name]) else 0
        assert not following or costs[name] > left
    taken = [own[name][r - 1] ** 2 / costs[name] for name, r in ranks.items() if r]
    if len(set(costs.values())) == 1:  # then what was left over is no better than what was taken
        missed = [own[name][r] ** 2 / costs[name] for name, r in ranks.items() if r < len(own[name])]
        assert not taken or not missed or min(taken) >= max(missed)
