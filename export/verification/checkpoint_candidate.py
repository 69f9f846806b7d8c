"""Whether the tensors of somebody's checkpoint are the merge, under whatever of a model's names they have."""

from __future__ import annotations

from pathlib import Path

from loracle.files import Checkpoint, MergedWeights
from loracle.files.architectures import architecture_of
from loracle.files.tensor_names import TensorNames
from loracle.files.ties import tied_twin
from loracle.files.updates import same_bits

from ..write import Progress
from .asked import Asked, Found
from .comparisons import Comparisons, comparable
from .input_files import checkpoint_files
from .judge import Judge
from .verdict import Verdict, WeightVerdict
from .weights_check import weights_check


def verify_checkpoint(folder: Path, asked: Asked) -> Found:
    """Verify a folder with a checkpoint. Arguments and errors as of `verify`."""
    exact = bool(asked.exact)
    with Checkpoint(folder) as candidate:
        asked.digest(checkpoint_files(candidate, "candidate", folder))
        names = held_names(candidate, asked.weights)
        views = ((name, candidate.view(held)) for name, held in names.items())
        with Comparisons(asked.weights, comparable(asked.weights, views)) as ahead:
            judge = Judge(asked.weights, exact=exact, ahead=ahead)
            verdicts = judge_checkpoint(candidate, asked.weights, judge, asked.progress)
    return Found((weights_check(verdicts, exact=exact),), verdicts, file=folder)


def judge_checkpoint(
    candidate: Checkpoint, weights: MergedWeights, judge: Judge, progress: Progress | None = None
) -> tuple[WeightVerdict, ...]:
    """The verdict on each weight of the model, in the order of its names, and on each tensor that is none.

    A tensor is found by its name, with or without the prefix of the model's body. Where input and output
    embeddings are one tensor, the candidate may hold it once or twice.
    """
    names = held_names(candidate, weights)
    said: list[WeightVerdict] = []
    seen: set[str] = set()
    for done, name in enumerate(weights.names, 1):
        held = names.get(name)
        if held is None:
            said.append(_absent(name, candidate, weights))
            continue
        seen.add(held)
        place = "" if held == name else held
        said.append(judge.judge(name, candidate.tensor(held), place, candidate.view(held)))
        candidate.release(held)
        weights.release(name)
        if progress is not None:
            progress(done, len(weights.names))
    extra = (name for name in candidate.names if name not in seen)
    return (*said, *(_added(name, candidate, weights) for name in extra))


def held_names(candidate: Checkpoint, weights: MergedWeights) -> dict[str, str]:
    """The weights of the model that a checkpoint holds, each with its tensor's name there."""
    names = TensorNames(candidate.names, architecture_of(weights.config))
    found = ((name, names.find(name)) for name in weights.names)
    return {name: held for name, held in found if held is not None}


def _absent(name: str, candidate: Checkpoint, weights: MergedWeights) -> WeightVerdict:
    twin = tied_twin(name, candidate.names, tied=weights.checkpoint.tied)
    if twin is not None:
        return WeightVerdict(name, Verdict.UNTOUCHED, True, twin, detail=f"it is tied to {twin}")
    merged = name in weights.merged_names
    detail = "expected in the checkpoint, found none"
    return WeightVerdict(name, Verdict.ABSENT, False, merged=merged, detail=detail)


def _added(name: str, candidate: Checkpoint, weights: MergedWeights) -> WeightVerdict:
    twin = tied_twin(name, candidate.names, tied=weights.checkpoint.tied)
    size = candidate.tensor(name).size
    if twin is not None:
        if same_bits(candidate.tensor(name), candidate.tensor(twin)):
            return WeightVerdict(name, Verdict.UNTOUCHED, True, entries=size, detail=f"the bits of {twin}")
        detail = f"config.json ties it to {twin}, but the two differ"
        return WeightVerdict(name, Verdict.TIE_BROKEN, False, entries=size, detail=detail)
    of_adapter = "lora_" in name or ".base_layer." in name
    detail = "an adapter's: it is beside the weights, not merged" if of_adapter else "not in the merged model"
    return WeightVerdict(name, Verdict.ADDED, False, entries=size, detail=detail)
