"""Whether the weights of anybody's ONNX graph are the merge, whatever they are called, however they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from loracle.files import MergedWeights
from loracle.files.checkpoint import is_module
from loracle.files.mapped_view import MappedView
from loracle.files.ties import EMBEDDINGS, tied_twin

from ..write import Progress
from .graph_tensors import HeldTensor, held_tensors
from .judge import Judge
from .verdict import Verdict, WeightVerdict
from .weight_matching import Match, Matches


def judge_foreign(
    graph: ir.Graph, matches: Matches, weights: MergedWeights, judge: Judge, progress: Progress | None = None
) -> tuple[WeightVerdict, ...]:
    """The verdict on each weight of the model, in the order of its names.

    A weight that lies in several places has the verdict of the worst of them; the places of a tied pair that
    differ break it. A weight in codes is not judged, the graph's answers are.
    """
    held = held_tensors(graph)
    said = []
    for done, name in enumerate(weights.names, 1):
        places = matches.found.get(name, ())
        own = [_judged(name, match, held, judge) for match in places]
        if own:
            said.append(_worst(own, places, tied=weights.checkpoint.tied and is_module(name, EMBEDDINGS)))
        elif name in matches.quantized:
            detail = "in codes: what the graph answers is measured"
            said.append(WeightVerdict(name, Verdict.QUANTIZED, True, detail=detail))
        elif name in matches.missing:
            said.append(_missing(name, matches, weights))
        weights.release(name)
        if progress is not None:
            progress(done, len(weights.names))
    return tuple(said)


def mapped_weights(graph: ir.Graph, matches: Matches) -> Iterator[tuple[str, MappedView | None]]:
    """Where each weight that a graph holds is mapped from, in the order of `judge_foreign`."""
    held = held_tensors(graph)
    for name, places in matches.found.items():
        for match in places:
            yield name, held[match.initializer].mapped(match.view)


def needless(verdicts: Sequence[WeightVerdict]) -> tuple[WeightVerdict, ...]:
    """The verdicts on the weights of a graph whose answers are right: what the adapter leaves alone and lies
    nowhere, as the pooler of a model that answers without it, is not needed."""
    detail = "not in the graph, whose answers are right without it"
    return tuple(
        replace(said, passed=True, detail=detail)
        if said.verdict is Verdict.ABSENT and not said.merged
        else said
        for said in verdicts
    )


def _judged(name: str, match: Match, held: Mapping[str, HeldTensor], judge: Judge) -> WeightVerdict:
    tensor = held[match.initializer]
    place = "" if str(match) == name else f"{match}, {match.how}"
    view = tensor.mapped(match.view)
    return tensor.read(lambda array: judge.judge(name, match.view(array), place, view))


def _worst(own: list[WeightVerdict], places: tuple[Match, ...], *, tied: bool) -> WeightVerdict:
    worst = min(own, key=lambda said: (said.passed, -said.unequal))
    if len(own) == 1:
        return worst
    listed = "; ".join(said.place or said.name for said in own)
    if tied and len({said.unequal for said in own}) > 1:
        detail = f"config.json makes one tensor of {listed}, but they differ: {worst.verdict}, {worst.detail}"
        return replace(worst, verdict=Verdict.TIE_BROKEN, passed=False, place=listed, detail=detail)
    return replace(worst, place=listed)


def _missing(name: str, matches: Matches, weights: MergedWeights) -> WeightVerdict:
    found = (other for other in weights.names if other in matches.found)
    twin = tied_twin(name, found, tied=weights.checkpoint.tied)
    if twin is not None:
        return WeightVerdict(name, Verdict.UNTOUCHED, True, twin, detail=f"it is tied to {twin}")
    merged = name in weights.merged_names
    detail = "expected in the graph, found none like it"
    return WeightVerdict(name, Verdict.ABSENT, False, merged=merged, detail=detail)
