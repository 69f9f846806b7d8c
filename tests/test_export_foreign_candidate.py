"""The weights in anybody's graph, once it is known where they lie: each has its worst place's verdict."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification.foreign_candidate import judge_foreign
from loracle.export.verification.judge import Judge
from loracle.export.verification.verdict import Verdict, WeightVerdict
from loracle.export.verification.weight_matching import Match, Matches
from loracle.files import Checkpoint, MergedWeights
from tests.files_fixtures import Q0, V0, small_adapter, small_tensors, write_model
from tests.matching_fixtures import Chain

Array = NDArray[Any]
EMBEDDING, HEAD, QUERY, VALUE = "model.embed_tokens.weight", "lm_head.weight", f"{Q0}.weight", f"{V0}.weight"
NAMES = (HEAD, EMBEDDING, QUERY, VALUE)


class Case:
    """A base of four weights, the merged ones, and a graph with them under their names."""

    def __init__(self, folder: Path, *, tied: bool = False) -> None:
        tensors = {name: own for name, own in small_tensors().items() if name in NAMES}
        if tied:
            tensors[HEAD] = tensors[EMBEDDING]
        write_model(folder / "base", [tensors], {"tie_word_embeddings": tied})
        self.weights = MergedWeights(Checkpoint(folder / "base"), small_adapter())
        self.held = {name: np.array(self.weights.tensor(name)) for name in NAMES}
        self.places: dict[str, tuple[Match, ...]] = {name: (by_name(name),) for name in NAMES}

    def said(self, missing: tuple[str, ...] = (), quantized: tuple[str, ...] = (), **options: Any) -> Any:
        chain = Chain()
        for name, array in self.held.items():
            chain.then("Add", name, array)
        matches = Matches(self.places, missing, quantized, ())
        said = judge_foreign(chain.graph, matches, self.weights, Judge(self.weights), **options)
        assert isinstance(said, tuple)
        return {own.name: own for own in said}


def by_name(name: str) -> Match:
    return Match(name, name, "by name", False, None)


def of(own: WeightVerdict) -> tuple[Verdict, bool, str]:
    return own.verdict, own.passed, own.place


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_weights_under_their_names(case: Case) -> None:
    said = case.said()
    assert tuple(said) == case.weights.names
    for name, own in said.items():
        assert of(own) == (Verdict.EXACT if own.merged else Verdict.UNTOUCHED, True, "")
        assert own.merged == (name in (QUERY, VALUE))


def test_weights_elsewhere_are_read_through_their_match(case: Case) -> None:
    case.held["packed"] = np.ascontiguousarray(np.concatenate([case.held[QUERY], case.held[VALUE]]).T)
    case.places[QUERY] = (Match(QUERY, "packed", "by content", True, (0, 8)),)
    case.places[VALUE] = (Match(VALUE, "packed", "by content", True, (8, 12)),)
    said = case.said()
    for name, rows in ((QUERY, "0:8"), (VALUE, "8:12")):
        place = f"rows {rows} of the transpose of packed, by content"
        assert of(said[name]) == (Verdict.EXACT, True, place)
    case.places[VALUE] = (Match(VALUE, "packed", "by content", True, (4, 8)),)
    assert not case.said()[VALUE].passed


def test_of_copies_the_worst_counts(case: Case) -> None:
    case.held["copy"] = np.array(case.held[QUERY])
    case.held["copy"].view(np.uint32)[1, 2] += 1
    case.held["base"] = np.array(case.weights.checkpoint.tensor(QUERY))
    copy, base = (Match(QUERY, name, "by content", False, None) for name in ("copy", "base"))
    case.places[QUERY] = (by_name(QUERY), copy)
    own = case.said()[QUERY]
    assert of(own) == (Verdict.WITHIN_ULPS, True, f"{QUERY}; copy, by content")
    assert own.unequal == 1
    case.places[QUERY] = (base, by_name(QUERY), copy)
    own = case.said()[QUERY]
    assert of(own) == (Verdict.MISSING, False, f"base, by content; {QUERY}; copy, by content")
    case.places[QUERY] = (copy, by_name(QUERY))
    assert case.said()[QUERY].unequal == 1


def test_places_of_a_tied_pair_that_differ_break_it(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    case.held["copy"] = np.array(case.held[EMBEDDING])
    places = (by_name(EMBEDDING), Match(EMBEDDING, "copy", "by content", False, None))
    case.places[EMBEDDING] = places
    assert of(case.said()[EMBEDDING]) == (Verdict.UNTOUCHED, True, f"{EMBEDDING}; copy, by content")
    case.held["copy"][2, 2] *= 2
    own = case.said()[EMBEDDING]
    listed = f"{EMBEDDING}; copy, by content"
    assert of(own) == (Verdict.TIE_BROKEN, False, listed)
    assert own.detail.startswith(
        f"config.json makes one tensor of {listed}, but they differ: {Verdict.CHANGED}, by "
    )
    assert own.unequal == 1


def test_copies_of_what_is_not_tied_may_differ_in_rounding(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    case.held["copy"] = np.array(case.held[QUERY])
    case.held["copy"].view(np.uint32)[1, 2] += 1
    case.places[QUERY] = (by_name(QUERY), Match(QUERY, "copy", "by content", False, None))
    assert case.said()[QUERY].verdict is Verdict.WITHIN_ULPS
    (tmp_path / "untied").mkdir()
    untied = Case(tmp_path / "untied")
    untied.held["copy"] = untied.held[EMBEDDING] * 2
    untied.places[EMBEDDING] = (by_name(EMBEDDING), Match(EMBEDDING, "copy", "by content", False, None))
    assert untied.said()[EMBEDDING].verdict is Verdict.CHANGED


def test_weights_in_codes_are_not_judged(case: Case) -> None:
    del case.places[QUERY]
    own = case.said(quantized=(QUERY,))[QUERY]
    assert of(own) == (Verdict.QUANTIZED, True, "")
    assert own.detail == "in codes: what the graph answers is measured"


def test_weights_that_lie_nowhere_are_absent(case: Case) -> None:
    for name in (QUERY, HEAD):
        del case.places[name]
    said = case.said(missing=(QUERY, HEAD))
    for name in (QUERY, HEAD):
        assert of(said[name]) == (Verdict.ABSENT, False, "")
        assert said[name].detail == "expected in the graph, found none like it"
    assert tuple(said) == case.weights.names


def test_of_a_tied_pair_one_may_lie_nowhere(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    del case.places[HEAD]
    own = case.said(missing=(HEAD,))[HEAD]
    assert of(own) == (Verdict.UNTOUCHED, True, EMBEDDING)
    assert own.detail == f"it is tied to {EMBEDDING}"
    del case.places[EMBEDDING]
    said = case.said(missing=(HEAD, EMBEDDING))
    assert said[HEAD].verdict is said[EMBEDDING].verdict is Verdict.ABSENT


def test_of_a_tied_model_what_is_no_embedding_is_absent(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    del case.places[QUERY]
    assert case.said(missing=(QUERY,))[QUERY].verdict is Verdict.ABSENT


def test_what_is_neither_found_nor_missed_has_no_verdict(case: Case) -> None:
    del case.places[QUERY]
    assert QUERY not in case.said()


def test_progress_and_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    released: list[str] = []
    monkeypatch.setattr(case.weights, "release", released.append)
    case.said(progress=lambda done, of: seen.append((done, of)))
    count = len(case.weights.names)
    assert seen == [(number, count) for number in range(1, count + 1)]
    assert tuple(released) == case.weights.names
