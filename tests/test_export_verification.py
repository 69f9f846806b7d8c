"""`verify` passes what is right and names what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_fixtures import SHAPE, make_adapter, make_model

from loracle.export import VerifyReport, export, verify
from loracle.export.unmerged import export_unmerged
from loracle.export.verification.outputs_check import Generated, first_token_difference
from loracle.export.verification.verdict import Verdict
from loracle.files import Adapter, LoraPair, read_adapter, write_adapter, write_merged_checkpoint
from loracle.reference import FileError

GRAPH, BITS, LOGITS, TOKENS = range(4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, other (adapter), onnx (merged)."""
    root = tmp_path_factory.mktemp("verify")
    base = make_model(root / "base")
    make_adapter(root / "adapter", base)
    make_adapter(root / "other", base, seed=2)
    export(base, root / "onnx", root / "adapter")
    return root


def _verify(root: Path, candidate: Path, adapter: str | None = "adapter") -> VerifyReport:
    return verify(candidate, root / "base", None if adapter is None else root / adapter, new_tokens=6)


def _verdicts(report: VerifyReport) -> list[bool]:
    return [check.passed for check in report.checks]


def test_a_right_export_passes_every_check(made: Path) -> None:
    report = _verify(made, made / "onnx")
    assert _verdicts(report) == [True] * 4
    assert report.passed
    assert report.error is not None
    assert report.tolerance is not None
    assert 0 < report.error <= report.tolerance
    assert report.to_json()["passed"] is True


def test_the_base_alone_verifies_without_an_adapter(made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "plain")
    assert _verify(made, tmp_path / "plain", None).passed


def _offset(folder: Path, name: str) -> int:
    """Where a weight begins in the data file; the last of several in one initializer lies at its end."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    leaf = name.split(".")[-2]
    tensor = next(t for t in model.graph.initializer if _alike(t.name, name))
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset = int(place["offset"])
    if tensor.name == name or tensor.name.split(".")[-2].startswith(leaf):
        return offset
    assert tensor.name.split(".")[-2].endswith(leaf)
    rows = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    return offset + int(place["length"]) - 4 * rows * SHAPE["hidden_size"]


def _alike(initializer: str, weight: str) -> bool:
    """Whether an initializer holds a weight."""
    prefix, leaf, suffix = weight.rsplit(".", 2)
    held = initializer.rsplit(".", 2)
    return len(held) == 3 and held[0] == prefix and leaf in held[1].split("+") and held[2] == suffix


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"],
)
def test_one_flipped_bit_is_found_and_its_tensor_named(made: Path, tmp_path: Path, name: str) -> None:
    """The lowest bit of one entry: no output shows it, the comparison of bits must."""
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "onnx", candidate)
    with open(candidate / "model.onnx_data", "r+b") as data:
        position = _offset(candidate, name) + 4 * 11
        data.seek(position)
        byte = data.read(1)[0]
        data.seek(position)
        data.write(bytes([byte ^ 1]))
    report = _verify(made, candidate)
    assert _verdicts(report) == [True, False, True, True]
    (failure,) = report.checks[BITS].failures
    assert failure.startswith(f"{name}: ")
    assert "1 of " in failure
    (said,) = (own for own in report.weights if not own.passed)
    assert (said.name, said.unequal) == (name, 1)
    assert said.verdict is (Verdict.WITHIN_ULPS if "v_proj" in name else Verdict.CHANGED)


def test_an_export_with_another_adapter_fails_and_names_the_tensors(made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "onnx", made / "other")
    report = _verify(made, tmp_path / "onnx")
    assert _verdicts(report)[:3] == [True, False, False]
    assert "model.layers.0.self_attn.q_proj.weight" in report.checks[BITS].failures[0]
    assert "not merged" not in report.checks[BITS].failures[0]


def test_an_export_without_the_adapter_says_that_nothing_was_merged(made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "onnx")
    report = _verify(made, tmp_path / "onnx")
    assert _verdicts(report)[:3] == [True, False, False]
    assert "the adapter was not merged" in report.checks[BITS].failures[0]


def test_an_adapter_left_in_the_graph_is_found(made: Path, tmp_path: Path) -> None:
    """Right answers, but arithmetic that merging should have removed."""
    export_unmerged(made / "base", made / "adapter", tmp_path / "onnx")
    report = _verify(made, tmp_path / "onnx")
    assert _verdicts(report) == [False, False, True, True]
    assert "lora_A" in report.checks[GRAPH].failures[0]


def _change(adapter: Adapter, change: Callable[[str, LoraPair], LoraPair | None]) -> Adapter:
    changed = {path: change(path, pair) for path, pair in adapter.pairs.items()}
    return Adapter(adapter.config, {path: pair for path, pair in changed.items() if pair is not None})


FAULTS: dict[str, Callable[[str, LoraPair], LoraPair]] = {
    "delta dropped in one layer": lambda path, pair: (
        LoraPair(pair.A, np.zeros_like(pair.B), pair.scaling) if "layers.1.self_attn.v_proj" in path else pair
    ),
    "B transposed in sign": lambda path, pair: LoraPair(pair.A, -pair.B, pair.scaling),
    "delta twice": lambda path, pair: LoraPair(pair.A, 2 * pair.B, pair.scaling),
    "scaling of rsLoRA": lambda path, pair: LoraPair(pair.A, 2 * pair.B, pair.scaling),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_outputs_alone_catch_a_wrong_merge(made: Path, tmp_path: Path, fault: str) -> None:
    """The bound on the logits is tight enough to see each fault without looking at the weights."""
    wrong = _change(read_adapter(made / "adapter"), FAULTS[fault])
    (tmp_path / "wrong").mkdir()
    write_adapter(tmp_path / "wrong", wrong)
    export(made / "base", tmp_path / "onnx", tmp_path / "wrong")
    report = _verify(made, tmp_path / "onnx")
    assert not report.checks[LOGITS].passed


def test_one_matrix_rounded_to_bfloat16_is_outside_the_bound(made: Path, tmp_path: Path) -> None:
    from ml_dtypes import bfloat16

    candidate = tmp_path / "onnx"
    shutil.copytree(made / "onnx", candidate)
    name = "model.layers.0.self_attn.q_proj.weight"
    count = SHAPE["num_attention_heads"] * SHAPE["head_dim"] * SHAPE["hidden_size"]
    with open(candidate / "model.onnx_data", "r+b") as data:
        data.seek(_offset(candidate, name))
        weight = np.frombuffer(data.read(4 * count), np.float32)
        data.seek(_offset(candidate, name))
        data.write(weight.astype(bfloat16).astype(np.float32).tobytes())
    report = _verify(made, candidate)
    assert _verdicts(report)[:3] == [True, False, False]


def test_a_nan_in_the_weights_is_outside_the_bound(made: Path, tmp_path: Path) -> None:
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "onnx", candidate)
    with open(candidate / "model.onnx_data", "r+b") as data:
        data.seek(_offset(candidate, "model.norm.weight"))
        data.write(np.float32(np.nan).tobytes())
    report = _verify(made, candidate)
    assert not report.checks[LOGITS].passed
    assert not report.checks[BITS].passed


def test_checkpoints_are_compared_bit_for_bit(made: Path, tmp_path: Path) -> None:
    write_merged_checkpoint(made / "base", made / "adapter", tmp_path / "merged")
    assert _verify(made, tmp_path / "merged").passed
    report = _verify(made, made / "base")
    assert not report.passed
    assert "the adapter was not merged" in report.checks[0].failures[0]


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "sub/data", "missing"])
def test_external_data_outside_the_folder_are_refused(made: Path, tmp_path: Path, location: str) -> None:
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "onnx", candidate)
    (tmp_path / "outside.bin").write_bytes(b"\0" * 4096)
    model = onnx.load(str(candidate / "model.onnx"), load_external_data=False)
    outside = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    entry = next(e for e in outside.external_data if e.key == "location")
    entry.value = location
    (candidate / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match="expected its data in"):
        _verify(made, candidate)


def test_malformed_candidates_are_errors_not_verdicts(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="found neither"):
        _verify(made, tmp_path / "empty")
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "onnx", candidate)
    data = (candidate / "model.onnx_data").read_bytes()
    (candidate / "model.onnx_data").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError, match="in a file of"):
        _verify(made, candidate)
    (candidate / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(FileError, match="expected an ONNX model"):
        _verify(made, candidate)


def test_a_token_may_differ_only_where_the_margin_is_within_the_bound() -> None:
    truth = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.999], [5.0, 0.0, 0.0]])
    run = Generated((0, 1, 2, 0), 1, truth)
    assert first_token_difference(Generated((0, 1, 1, 0), 1, truth), truth, 0.1) is None
    position, margin, explained = first_token_difference(run, truth, 0.001) or (0, 0.0, False)
    assert (position, explained) == (2, True)
    assert margin == 1.0 - 0.999
    assert first_token_difference(run, truth, 0.0004) == (2, margin, False)


def test_the_bound_of_a_float16_graph_is_tight_enough_to_see_a_dropped_delta(
    made: Path, tmp_path: Path
) -> None:
    export(made / "base", tmp_path / "right", made / "adapter", dtype="fp16")
    report = _verify(made, tmp_path / "right")
    assert _verdicts(report) == [True] * 4
    assert report.error is not None
    assert report.tolerance is not None
    assert report.tolerance < 50 * report.error
    wrong = _change(read_adapter(made / "adapter"), FAULTS["delta dropped in one layer"])
    write_adapter(tmp_path / "wrong", wrong)
    export(made / "base", tmp_path / "dropped", tmp_path / "wrong", dtype="fp16")
    assert not _verify(made, tmp_path / "dropped").checks[LOGITS].passed
