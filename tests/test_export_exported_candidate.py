"""The initializers and graphs of an exported model, one thing wrong at a time, each named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loracle.export import export
from loracle.export.architecture import check_supported
from loracle.export.graphs import graph_templates
from loracle.export.names import GRAPH_FILE
from loracle.export.template import GraphTemplate
from loracle.export.verification import exported_candidate as module
from loracle.export.verification.candidate import Candidate, open_candidate
from loracle.export.verification.exported_candidate import check_graphs, judge_initializers
from loracle.export.verification.verdict import Verdict
from loracle.files import Checkpoint, MergedWeights, read_adapter
from tests.export_fixtures import make_adapter, make_model

NORM = "model.norm.weight"
OTHER = "second.onnx"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    base = make_model(root / "base")
    export(base, root / "onnx", make_adapter(root / "adapter", base))
    return root


class Case:
    """An opened export, its templates, and the merged model."""

    def __init__(self, root: Path) -> None:
        checkpoint = Checkpoint(root / "base")
        self.weights = MergedWeights(checkpoint, read_adapter(root / "adapter"))
        self.candidate: Candidate = open_candidate(root / "onnx", [GRAPH_FILE])
        task = check_supported(self.weights.config, "config.json")
        self.templates = graph_templates(
            checkpoint, self.weights.config, task, self.candidate.options, trusted=False
        )

    @property
    def template(self) -> GraphTemplate:
        return self.templates[GRAPH_FILE]

    def put(self, name: str, change: Callable[[Any], Any]) -> None:
        """Exchange an initializer's tensor for what is made of it."""
        value = self.candidate.models[GRAPH_FILE].graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(change(np.array(value.const_value.numpy())), name=name)

    def again(self) -> None:
        """Add a second graph, of the same tensors."""
        second = ir.from_proto(ir.to_proto(self.candidate.models[GRAPH_FILE]))
        for name, value in self.candidate.models[GRAPH_FILE].graph.initializers.items():
            second.graph.initializers[name].const_value = value.const_value
        self.candidate = replace(self.candidate, models={**self.candidate.models, OTHER: second})
        self.templates = {**self.templates, OTHER: self.template}

    def judged(self, **options: Any) -> module.Initializers:
        given = {"exact": True, **options}
        return judge_initializers(self.candidate, self.templates, self.weights, **given)

    @property
    def weight_names(self) -> list[str]:
        return [name for name in self.template.unbound if name in self.weights.names]

    @property
    def packed(self) -> str:
        """An initializer of several weights."""
        return next(name for name in self.template.unbound if "+" in name)


@pytest.fixture
def case(made: Path) -> Case:
    return Case(made)


def test_a_right_export_has_a_verdict_on_each_weight_and_passes(case: Case) -> None:
    seen: list[tuple[int, int]] = []
    found = case.judged(progress=lambda done, total: seen.append((done, total)))
    assert found.check.passed
    assert found.check.failures == ()
    assert found.check.name == "initializers are the correctly rounded merge"
    names = {said.name for said in found.weights}
    assert set(case.weights.merged_names) <= names <= set(case.weights.names)
    for said in found.weights:
        merged = said.name in case.weights.merged_names
        assert (said.verdict, said.merged) == (Verdict.EXACT if merged else Verdict.UNTOUCHED, merged)
        assert said.entries == np.prod(case.weights.shape(said.name))
    assert found.check.figure == (
        f"{len(found.weights)} tensors, {len(case.weights.merged_names)} merged, bit for bit"
    )
    total = len(case.template.unbound)
    assert seen[-total:] == [(done, total) for done in range(1, total + 1)]


def test_the_title_says_what_is_asked(case: Case) -> None:
    assert case.judged(exact=False).check.name == "initializers are the merge"
    options = replace(case.candidate.options, quantization="int8")
    case.candidate = replace(case.candidate, options=options)
    names = case.judged().check.name
    assert names == "initializers are the correctly rounded merge, quantised to int8"


@pytest.mark.parametrize("exact", [True, False])
def test_one_step_in_a_weight_is_named_and_passes_only_where_rounding_may(case: Case, exact: bool) -> None:
    name = case.packed

    def stepped(array: Any) -> Any:
        array.reshape(-1).view(np.uint32)[0] += 1
        return array

    case.put(name, stepped)
    found = case.judged(exact=exact)
    (said,) = (own for own in found.weights if own.unequal)
    assert (said.unequal, said.passed, said.verdict) == (1, not exact, Verdict.WITHIN_ULPS)
    assert found.check.passed == (not exact)
    assert found.check.figure.endswith("merged, not all bit for bit")
    assert [line for line in found.check.failures if said.name in line] == ([str(said)] if exact else [])


def test_what_is_not_there_or_of_another_kind_is_named_and_the_rest_is_judged(case: Case) -> None:
    graph = case.candidate.models[GRAPH_FILE].graph
    shape = graph.initializers[NORM].const_value.shape.numpy()
    right = len(case.judged().weights)
    case.put(NORM, lambda array: array[:-1])
    found = case.judged()
    assert found.check.failures == (f"{NORM}: expected {shape} float32, got {(shape[0] - 1,)} float32",)
    assert len(found.weights) == right - 1
    case.put(NORM, lambda array: np.zeros(shape, np.float16))
    assert case.judged().check.failures == (f"{NORM}: expected {shape} float32, got {shape} float16",)
    graph.initializers[NORM].const_value = None
    found = case.judged()
    assert found.check.failures == (f"{NORM}: expected among the initializers, found none",)
    assert not found.check.passed
    assert NORM not in {said.name for said in found.weights}


def test_what_is_computed_of_weights_is_compared_too(made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "onnx", made / "adapter", quantization="int8")
    (tmp_path / "base").symlink_to(made / "base")
    (tmp_path / "adapter").symlink_to(made / "adapter")
    right = Case(tmp_path)
    seen: list[tuple[int, int]] = []
    assert right.judged(progress=lambda done, total: seen.append((done, total))).check.passed
    assert len(seen) > len(right.template.unbound)
    codes = [name for name in right.template.unbound if name not in right.weights.names]
    for name in codes[:3]:
        case = Case(tmp_path)
        case.put(name, lambda array: np.roll(array, 1))
        (line,) = case.judged().check.failures
        assert line.startswith(f"{name}: ")
    assert len(codes) > 3


def test_a_tasks_file_has_what_the_adapter_changes_and_nothing_else(case: Case) -> None:
    own = set(case.weights.merged_names)
    brought = frozenset(
        name
        for name in case.template.unbound
        if own & set(module.BoundTensors([case.template], case.weights).weights(name))
    )
    assert case.judged(brought=brought).check.passed
    missing = sorted(brought)[0]
    found = case.judged(brought=(brought - {missing}) | {NORM})
    assert found.check.failures == (
        f"{missing}: expected in the task's file, found none",
        f"{NORM}: the adapter leaves it alone",
    )


def test_graphs_share_their_tensors(case: Case) -> None:
    case.again()
    assert case.judged().check.passed
    second = case.candidate.models[OTHER].graph.initializers[NORM]
    second.const_value = ir.Tensor(np.zeros(3, np.float32), name=NORM)
    found = case.judged()
    assert found.check.failures == (f"{OTHER}: {NORM}: expected the tensor of the other graphs, got another",)


def test_the_graph_is_the_bases_node_for_node(case: Case) -> None:
    nodes = len(list(case.candidate.models[GRAPH_FILE].graph))
    check = check_graphs(case.candidate, case.templates)
    assert check.name == "graph is the base model's, node for node"
    assert (check.passed, check.figure, check.failures) == (True, f"{nodes} nodes", ())
    case.again()
    both = check_graphs(case.candidate, case.templates)
    assert (both.passed, both.figure) == (True, f"{2 * nodes} nodes")
    graph = case.candidate.models[OTHER].graph
    node = next(own for own in graph if own.op_type == "Add" or own.domain)
    node.name, node.op_type = node.name, "Sub"
    wrong = check_graphs(case.candidate, case.templates)
    assert not wrong.passed
    (line,) = wrong.failures
    assert line.startswith(f"{OTHER}: ")
    case.templates = {GRAPH_FILE: case.template}
    case.candidate = replace(case.candidate, models={GRAPH_FILE: case.candidate.models[OTHER]})
    (alone,) = check_graphs(case.candidate, case.templates).failures
    assert line == f"{OTHER}: {alone}"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_weights_that_are_inputs_too_are_counted_and_the_first_named(case: Case, count: int) -> None:
    graph = case.candidate.models[GRAPH_FILE].graph
    names = sorted(case.template.unbound)[:count]
    for name in names:
        graph.inputs.append(graph.initializers[name])
    case.candidate = replace(
        case.candidate, weights={name: graph.initializers[name].const_value.numpy() for name in names}
    )
    check = check_graphs(case.candidate, case.templates)
    assert check.passed
    more = f" and {count - 2} more" if count > 2 else ""
    assert check.figure.endswith(f"; {count} weights are inputs too: {', '.join(names[:2])}{more}")


def test_where_weights_are_mapped_is_where_they_lie(case: Case) -> None:
    tensors = module.BoundTensors([case.template], case.weights)
    for initializer in case.template.unbound:
        views = module._views(initializer, case.candidate, tensors)
        parts = dict(module._parts(initializer, case.candidate, tensors))
        assert views.keys() == parts.keys()
        for name, view in views.items():
            assert view is not None
            assert np.array_equal(view.open(), parts[name])
    case.candidate = replace(case.candidate, weights={NORM: np.zeros(3)})
    assert module._views(NORM, case.candidate, tensors) == {}
    case.candidate = replace(case.candidate, weights={})
    case.candidate.models[GRAPH_FILE].graph.initializers[NORM].const_value = None
    assert module._views(NORM, case.candidate, tensors) == {}


def test_every_weight_is_compared_ahead_once_and_what_was_read_is_given_back(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[str] = []
    asked: list[str] = []
    released: list[tuple[str, str]] = []

    class Ahead:
        def __init__(self, weights: Any, held: Any) -> None:
            assert weights is case.weights
            offered.extend(one.name for one in held)

        def __enter__(self) -> Ahead:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def of(self, held: Any) -> None:
            asked.append(held.name)

    monkeypatch.setattr(module, "Comparisons", Ahead)
    for kind in (Candidate, module.BoundTensors):
        monkeypatch.setattr(kind, "release", lambda own, name: released.append((type(own).__name__, name)))
    found = case.judged()
    assert found.check.passed
    assert sorted(offered) == sorted(asked) == sorted(said.name for said in found.weights)
    for kind in (Candidate, module.BoundTensors):
        own = [name for holder, name in released if holder == kind.__name__]
        assert sorted(set(own)) == sorted(case.template.unbound)


def test_of_many_failures_the_first_are_named_and_the_rest_counted(case: Case) -> None:
    wrong = sorted(case.template.unbound)
    for name in wrong:
        case.put(name, lambda array: array.astype(np.float16))
    found = case.judged().check
    assert not found.passed
    assert len(found.failures) < len(wrong)
    assert found.failures[-1] == f"and {len(wrong) - len(found.failures) + 1} more tensors"
