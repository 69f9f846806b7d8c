"""A graph that does not say how it was made is verified by what is in it, and located where it is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_fixtures import make_adapter, make_model

from loracle.export import VerifyReport, export, verify
from loracle.export.verification.foreign_candidate import needless
from loracle.export.verification.verdict import Verdict, WeightVerdict
from loracle.files import Checkpoint, write_merged_checkpoint
from loracle.reference import ConfigError, FileError

V1 = "model.layers.1.self_attn.v_proj.weight"


def nameless(folder: Path) -> Path:
    """Take from a graph what it says of its making."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    del model.metadata_props[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, onnx (merged), plain (the base), own (merged, says how it was made)."""
    root = tmp_path_factory.mktemp("foreign")
    base = make_model(root / "base")
    make_adapter(root / "adapter", base)
    export(base, root / "own", root / "adapter")
    shutil.copytree(root / "own", root / "onnx")
    nameless(root / "onnx")
    export(base, root / "plain")
    nameless(root / "plain")
    return root


def _verify(root: Path, candidate: Path, base_graph: Path | None = None) -> VerifyReport:
    return verify(candidate, root / "base", root / "adapter", new_tokens=4, base_graph=base_graph)


def test_a_right_graph_passes(made: Path) -> None:
    report = _verify(made, made / "onnx")
    assert report.passed, [check.failures for check in report.checks]
    assert [weight.name for weight in report.weights] == list(Checkpoint(made / "base").names)
    said = {weight.name: weight for weight in report.weights}
    assert said[V1].verdict is Verdict.EXACT
    assert "rows" in said[V1].place
    assert said["model.norm.weight"].verdict is Verdict.UNTOUCHED
    assert _verify(made, made / "onnx" / "model.onnx").passed


def test_beside_the_base_graph_of_the_same_exporter(made: Path) -> None:
    report = _verify(made, made / "onnx", made / "plain" / "model.onnx")
    assert report.passed
    assert report.graph is not None
    assert report.graph.beside == "the base's graph that was given"


def test_a_graph_without_the_merge(made: Path) -> None:
    report = _verify(made, made / "plain")
    assert not report.passed
    merged = [weight for weight in report.weights if weight.merged]
    assert {weight.verdict for weight in merged} == {Verdict.MISSING}
    assert all(weight.passed for weight in report.weights if not weight.merged)


def test_one_wrong_weight_is_named_and_located(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "onnx", tmp_path / "onnx")
    with Checkpoint(made / "base") as base:
        without = base.tensor(V1)
    model = onnx.load(str(made / "onnx" / "model.onnx"), load_external_data=False)
    packed = next(t for t in model.graph.initializer if "layers.1" in t.name and "v_proj" in t.name)
    place = {entry.key: int(entry.value) for entry in packed.external_data if entry.key != "location"}
    with open(tmp_path / "onnx" / "model.onnx_data", "r+b") as data:
        data.seek(place["offset"] + place["length"] - without.nbytes)
        data.write(np.ascontiguousarray(without).tobytes())
    report = _verify(made, tmp_path / "onnx")
    (wrong,) = (weight for weight in report.weights if not weight.passed)
    assert (wrong.name, wrong.verdict) == (V1, Verdict.MISSING)
    failed = next(check for check in report.checks if check.name.startswith("logits"))
    assert not failed.passed
    assert failed.failures[-1].startswith(f"{V1.removesuffix('.weight')}: its output is off")


def test_what_right_answers_do_without_is_not_needed() -> None:
    absent = WeightVerdict("pooler.dense.weight", Verdict.ABSENT, False)
    merged = WeightVerdict("query.weight", Verdict.ABSENT, False, merged=True)
    wrong = WeightVerdict("key.weight", Verdict.CHANGED, False)
    passed = [said.passed for said in needless([absent, merged, wrong])]
    assert passed == [True, False, False]


def test_what_cannot_be_asked_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        _verify(made, made / "own", made / "plain" / "model.onnx")
    shutil.copytree(made / "onnx", tmp_path / "two")
    (tmp_path / "two" / "model.onnx").rename(tmp_path / "two" / "one.onnx")
    shutil.copy(tmp_path / "two" / "one.onnx", tmp_path / "two" / "other.onnx")
    with pytest.raises(FileError, match=r"one\.onnx, other\.onnx"):
        _verify(made, tmp_path / "two")


def test_outputs_may_be_left_out_and_that_is_said(made: Path) -> None:
    report = verify(made / "onnx", made / "base", made / "adapter", outputs=False)
    assert report.passed
    assert [check.asked for check in report.checks] == [True, True, False]
    own = verify(made / "own", made / "base", made / "adapter", outputs=False)
    assert own.passed
    assert [check.asked for check in own.checks] == [True, True, False]
    assert "left out by choice" in own.checks[-1].figure


def test_a_merge_in_bfloat16_may_answer_as_one_in_a_float32_graph(tmp_path: Path) -> None:
    """Its weights are rounded to bfloat16; one that is rounded to float32 is held to float32's bound."""
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(tmp_path / "adapter", base)
    write_merged_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "narrow")
    narrow = _verify(tmp_path, nameless(tmp_path / "narrow"))
    assert {weight.verdict for weight in narrow.weights if weight.merged} == {Verdict.ROUNDED_TWICE}
    assert narrow.passed, [check.failures for check in narrow.checks]
    export(base, tmp_path / "wide", tmp_path / "adapter")
    wide = _verify(tmp_path, nameless(tmp_path / "wide"))
    assert wide.passed
    assert narrow.tolerance is not None
    assert wide.tolerance is not None
    assert narrow.tolerance > 100 * wide.tolerance
