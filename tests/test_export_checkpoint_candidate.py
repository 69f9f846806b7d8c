"""The tensors of somebody's checkpoint: found under their names, tied, absent, added, each with a verdict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loracle.export.verification.asked import Asked
from loracle.export.verification.checkpoint_candidate import judge_checkpoint, verify_checkpoint
from loracle.export.verification.judge import Judge
from loracle.export.verification.verdict import Verdict, WeightVerdict
from loracle.files import Checkpoint, MergedWeights
from tests.files_fixtures import Q0, V0, small_adapter, small_tensors, write_model

Array = NDArray[Any]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Case:
    """A base, an adapter on two of its weights, and the merged tensors."""

    def __init__(self, folder: Path, *, tied: bool = False, head: bool = True) -> None:
        tensors = {name: own for name, own in small_tensors().items() if head or name != HEAD}
        write_model(folder / "base", [tensors], {"tie_word_embeddings": tied})
        self.folder = folder
        self.checkpoint = Checkpoint(folder / "base")
        self.weights = MergedWeights(self.checkpoint, small_adapter())
        self.merged = {name: np.array(self.weights.tensor(name)) for name in self.weights.names}

    def candidate(self, tensors: Mapping[str, Array]) -> Path:
        return write_model(self.folder / "candidate", [tensors])

    def said(self, tensors: Mapping[str, Array], **options: Any) -> dict[str, WeightVerdict]:
        with Checkpoint(self.candidate(tensors)) as candidate:
            said = judge_checkpoint(candidate, self.weights, Judge(self.weights), **options)
        by_name = {own.name: own for own in said}
        assert len(by_name) == len(said)
        return by_name

    def asked(self, **options: Any) -> Asked:
        nothing: dict[str, Any] = dict.fromkeys(Asked.__dataclass_fields__)
        given = {"model_dir": self.folder, "checkpoint": self.checkpoint, "weights": self.weights}
        return Asked(**{**nothing, **given, **options})


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def without(tensors: Mapping[str, Array], *names: str) -> dict[str, Array]:
    return {name: own for name, own in tensors.items() if name not in names}


def test_each_weight_has_a_verdict_in_the_order_of_the_models(case: Case) -> None:
    said = case.said(dict(reversed(case.merged.items())))
    assert tuple(said) == case.weights.names
    for name, own in said.items():
        merged = name in (f"{Q0}.weight", f"{V0}.weight")
        expected = Verdict.EXACT if merged else Verdict.UNTOUCHED
        assert (own.verdict, own.passed, own.place, own.merged) == (expected, True, "", merged)


def test_names_may_have_or_lack_the_prefix_of_the_body(case: Case) -> None:
    said = case.said({name.removeprefix("model."): own for name, own in case.merged.items()})
    assert tuple(said) == case.weights.names
    assert said[HEAD].place == ""
    assert said[f"{Q0}.weight"].place == f"{Q0}.weight".removeprefix("model.")
    assert all(own.passed for own in said.values())


def test_what_is_not_there_is_absent(case: Case) -> None:
    said = case.said(without(case.merged, f"{Q0}.weight", "model.norm.weight"))
    assert tuple(said) == case.weights.names
    for name, merged in ((f"{Q0}.weight", True), ("model.norm.weight", False)):
        own = said[name]
        assert (own.verdict, own.passed, own.merged, own.place) == (Verdict.ABSENT, False, merged, "")
        assert own.detail == "expected in the checkpoint, found none"
    assert said[f"{V0}.weight"].verdict is Verdict.EXACT


def test_the_wrong_tensor_is_no_merge(case: Case) -> None:
    said = case.said({**case.merged, f"{Q0}.weight": case.checkpoint.tensor(f"{Q0}.weight")})
    assert (said[f"{Q0}.weight"].verdict, said[f"{Q0}.weight"].passed) == (Verdict.MISSING, False)


def test_what_is_no_weight_of_the_model_is_added(case: Case) -> None:
    more = {
        "model.extra.weight": np.ones((2, 3), np.float32),
        f"{Q0}.lora_A.weight": np.ones((2, 6), np.float32),
        f"{V0}.base_layer.weight": np.ones((4, 6), np.float32),
    }
    said = case.said({**case.merged, **more})
    assert tuple(said)[: len(case.weights.names)] == case.weights.names
    for name, size in (
        ("model.extra.weight", 6),
        (f"{Q0}.lora_A.weight", 12),
        (f"{V0}.base_layer.weight", 24),
    ):
        own = said[name]
        assert (own.verdict, own.passed, own.entries) == (Verdict.ADDED, False, size)
        of_adapter = name != "model.extra.weight"
        assert own.detail == (
            "an adapter's: it is beside the weights, not merged" if of_adapter else "not in the merged model"
        )


def test_of_tied_embeddings_one_may_be_left_out(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    said = case.said(without(case.merged, HEAD))
    own = said[HEAD]
    assert (own.verdict, own.passed, own.place) == (Verdict.UNTOUCHED, True, EMBEDDING)
    assert own.detail == f"it is tied to {EMBEDDING}"
    assert said[EMBEDDING].verdict is Verdict.UNTOUCHED


def test_embeddings_that_are_not_tied_may_not(case: Case) -> None:
    assert case.said(without(case.merged, HEAD))[HEAD].verdict is Verdict.ABSENT


def test_what_is_no_embedding_has_no_twin(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    said = case.said(without(case.merged, "model.norm.weight"))
    assert said["model.norm.weight"].verdict is Verdict.ABSENT


def test_without_either_both_are_absent(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True)
    said = case.said(without(case.merged, HEAD, EMBEDDING))
    assert said[HEAD].verdict is said[EMBEDDING].verdict is Verdict.ABSENT


def test_of_tied_embeddings_a_copy_may_be_added(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True, head=False)
    said = case.said({**case.merged, HEAD: case.merged[EMBEDDING]})
    own = said[HEAD]
    assert (own.verdict, own.passed, own.entries) == (Verdict.UNTOUCHED, True, case.merged[EMBEDDING].size)
    assert own.detail == f"the bits of {EMBEDDING}"


def test_a_copy_that_differs_breaks_the_pair(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=True, head=False)
    other = np.array(case.merged[EMBEDDING])
    other[3, 2] += 1
    own = case.said({**case.merged, HEAD: other})[HEAD]
    assert (own.verdict, own.passed, own.entries) == (Verdict.TIE_BROKEN, False, other.size)
    assert own.detail == f"config.json ties it to {EMBEDDING}, but the two differ"


def test_a_head_that_is_not_tied_is_added(tmp_path: Path) -> None:
    case = Case(tmp_path, tied=False, head=False)
    assert case.said({**case.merged, HEAD: case.merged[EMBEDDING]})[HEAD].verdict is Verdict.ADDED


def test_progress_counts_the_weights(case: Case) -> None:
    seen: list[tuple[int, int]] = []
    case.said(without(case.merged, HEAD), progress=lambda done, of: seen.append((done, of)))
    count = len(case.weights.names)
    held = [number for number, name in enumerate(case.weights.names, 1) if name != HEAD]
    assert seen == [(number, count) for number in held]


def test_memory_is_given_back_as_weights_are_done(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    released: dict[str, list[str]] = {"candidate": [], "base": []}
    prefixless = {name.removeprefix("model."): own for name, own in case.merged.items()}
    with Checkpoint(case.candidate(prefixless)) as candidate:
        monkeypatch.setattr(candidate, "release", released["candidate"].append)
        monkeypatch.setattr(case.weights, "release", released["base"].append)
        judge_checkpoint(candidate, case.weights, Judge(case.weights))
    assert tuple(released["base"]) == case.weights.names
    assert released["candidate"] == [name.removeprefix("model.") for name in case.weights.names]


@pytest.mark.parametrize("exact", [None, False, True])
def test_a_folder_is_verified_whole(case: Case, exact: bool | None) -> None:
    moved = np.array(case.merged[f"{Q0}.weight"])
    moved.view(np.uint32)[2, 3] += 1
    folder = case.candidate({**case.merged, f"{Q0}.weight": moved})
    found = verify_checkpoint(folder, case.asked(exact=exact))
    assert found.file == folder
    assert [own.name for own in found.weights] == list(case.weights.names)
    (check,) = found.checks
    assert check.passed is not bool(exact)
    assert check.name == (
        "weights are the correctly rounded merge" if exact else "weights are the merge, within rounding"
    )
    (said,) = (own for own in found.weights if own.unequal)
    assert said.passed is not bool(exact)


def test_progress_and_digests_are_handed_on(case: Case) -> None:
    seen: list[int] = []
    digested: list[Any] = []

    class Digests:
        def add(self, files: Any) -> None:
            digested.append(files)

    asked = case.asked(progress=lambda done, _: seen.append(done), digests=Digests())
    folder = case.candidate(case.merged)
    verify_checkpoint(folder, asked)
    assert len(seen) == len(case.weights.names)
    (files,) = digested
    assert files.role == "candidate"
