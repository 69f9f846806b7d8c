"""Whether a folder that `loracle export` has made is the base's graph with the merge in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loracle.files import MergedWeights
from loracle.files.mapped_view import MappedView

from ..deployed_base import split
from ..names import GRAPH_FILE
from ..template import GraphTemplate
from ..write import BoundTensors, Progress
from .candidate import Candidate
from .comparisons import Comparisons, comparable
from .graph_diff import first_difference
from .graph_tensors import mapped_view
from .judge import Judge
from .report import Check, named_first
from .task_verification import constants_again
from .verdict import Verdict, WeightVerdict, Witness
from .weight_check import TensorDifference, compare_computed, compare_tensor

Array = np.ndarray[Any, Any]

_INPUTS_NAMED = 2


@dataclass(frozen=True)
class Initializers:
    """The check of all initializers, and the verdicts on those that are weights."""

    check: Check
    weights: tuple[WeightVerdict, ...]


def check_graphs(candidate: Candidate, templates: Mapping[str, GraphTemplate]) -> Check:
    """Whether each graph is the base model's, node for node."""
    failures = []
    inputs: list[str] = []
    for file, template in templates.items():
        if candidate.weights:
            inputs += constants_again(candidate.models[file].graph, template.unbound)
        difference = first_difference(candidate.models[file], template.model, template.unbound)
        if difference is not None:
            failures.append(difference if len(templates) == 1 else f"{file}: {difference}")
    nodes = sum(len(list(model.graph)) for model in candidate.models.values())
    figure = f"{nodes} nodes"
    if inputs:
        more = f" and {len(inputs) - _INPUTS_NAMED} more" if len(inputs) > _INPUTS_NAMED else ""
        figure += f"; {len(inputs)} weights are inputs too: {', '.join(inputs[:_INPUTS_NAMED])}{more}"
    return Check("graph is the base model's, node for node", not failures, figure, tuple(failures))


def judge_initializers(
    candidate: Candidate,
    templates: Mapping[str, GraphTemplate],
    weights: MergedWeights,
    *,
    exact: bool,
    brought: frozenset[str] | None = None,
    progress: Progress | None = None,
) -> Initializers:
    """Compare every initializer with what the merged model has in its place.

    Args:
        exact: whether weights must be correctly rounded; what is computed of several must in any case.
        brought: the tensors in a swappable task's file, which must be those that the adapter changes.
    """
    tensors = BoundTensors(list(templates.values()), weights)
    failures: list[str] = []
    if brought is not None:
        own = {str(value.name) for value in split(templates[GRAPH_FILE], tensors)[0]}
        failures += [f"{name}: expected in the task's file, found none" for name in sorted(own - brought)]
        failures += [f"{name}: the adapter leaves it alone" for name in sorted(brought - own)]
    sound = _sound(candidate, templates, tensors, failures)
    computed = {
        name: held
        for initializer in sound
        for name, held in _parts(initializer, candidate, tensors)
        if name not in tensors.found
    }
    differences = compare_computed(tensors, computed, progress)
    del computed
    said: list[WeightVerdict] = []
    dtype = candidate.options.numpy_dtype
    views = {initializer: _views(initializer, candidate, tensors) for initializer in sound}
    stored = ((tensors.found.get(name, ""), view) for own in views.values() for name, view in own.items())
    held = comparable(weights, ((name, view) for name, view in stored if name in weights.names))
    with Comparisons(weights, held) as ahead:
        judge = Judge(weights, exact=exact, ahead=ahead)
        for done, initializer in enumerate(sound, 1):
            said += [
                _judged(name, array, views[initializer].get(name), dtype, tensors, weights, judge)
                for name, array in _parts(initializer, candidate, tensors)
                if name in tensors.found
            ]
            tensors.release(initializer)
            candidate.release(initializer)
            if progress is not None:
                progress(done, len(sound))
    title = "initializers are the correctly rounded merge" if exact else "initializers are the merge"
    if candidate.options.quantization is not None:
        title += f", quantised to {candidate.options.quantization}"
    lines = failures + [str(own) for own in differences] + [str(own) for own in said if not own.passed]
    bits = "bit for bit" if not any(own.unequal for own in said) else "not all bit for bit"
    figure = f"{len(tensors.found)} tensors, {len(tensors.source.merged_names)} merged, {bits}"
    return Initializers(Check(title, not lines, figure, named_first(lines, "tensors")), tuple(said))


def _sound(
    candidate: Candidate,
    templates: Mapping[str, GraphTemplate],
    tensors: BoundTensors,
    failures: list[str],
) -> list[str]:
    """The initializers that are there in their shape and dtype; `failures` gets the others."""
    sound: dict[str, None] = {}
    for file, template in templates.items():
        for name in sorted(template.unbound):
            if not candidate.is_shared(file, name):
                failures.append(f"{file}: {name}: expected the tensor of the other graphs, got another")
            tensor = candidate.tensor(name)
            expected = template.shape(name)
            value = template.model.graph.initializers[name]
            dtype = template.dtype if value.dtype is None else value.dtype.numpy()
            if tensor is None:
                failures.append(f"{name}: expected among the initializers, found none")
            elif tensor.shape != expected or tensor.dtype != dtype:
                failures.append(f"{name}: expected {expected} {dtype}, got {tensor.shape} {tensor.dtype}")
            else:
                sound[name] = None
    return list(sound)


def _parts(initializer: str, candidate: Candidate, tensors: BoundTensors) -> Iterable[tuple[str, Array]]:
    """The weights in an initializer, and their arrays; itself where it is computed of several."""
    tensor = candidate.tensor(initializer)
    assert tensor is not None
    return tensors.parts(initializer, tensor).items()


def _views(initializer: str, candidate: Candidate, tensors: BoundTensors) -> dict[str, MappedView | None]:
    """Where the weights in an initializer are mapped from."""
    value = None if initializer in candidate.weights else candidate.initializer(initializer)
    if value is None or value.const_value is None:
        return {}
    tensor = value.const_value
    whole = np.empty(tensor.shape.numpy(), tensor.dtype.numpy())
    names = tensors.parts(initializer, whole)

    def part(name: str) -> MappedView | None:
        return mapped_view(tensor, lambda array: tensors.parts(initializer, array)[name])

    return {name: part(name) for name in names}


def _judged(
    name: str,
    held: Array,
    view: MappedView | None,
    dtype: np.dtype[Any],
    tensors: BoundTensors,
    weights: MergedWeights,
    judge: Judge,
) -> WeightVerdict:
    """The verdict on a weight of the graph; one of a mixture's experts is compared, not explained."""
    stored = tensors.found[name]
    if stored in weights.names:
        return replace(
            judge.judge(stored, held, name, view), name=name, place="" if stored == name else stored
        )
    merged = stored in tensors.source.merged_names
    difference = compare_tensor(
        name,
        held,
        tensors.source.tensor(stored, dtype),
        (lambda: tensors.source.base_tensor(stored, dtype)) if merged else None,
    )
    right = Verdict.EXACT if merged else Verdict.UNTOUCHED
    said = WeightVerdict(name, right, True, merged=merged, entries=int(held.size))
    return said if difference is None else _different(said, difference)


def _different(said: WeightVerdict, difference: TensorDifference) -> WeightVerdict:
    verdict = Verdict.CHANGED
    if said.merged:
        verdict = Verdict.MISSING if difference.note else Verdict.UNEXPLAINED
    return replace(
        said,
        verdict=verdict,
        passed=False,
        unequal=difference.entries,
        witness=Witness(difference.index, difference.expected, difference.got),
        detail=difference.note.removeprefix("; "),
    )
