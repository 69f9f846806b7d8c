"""`verify` of a task passes what is right, and names what is wrong with its file, its base or its graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from deployments import SUFFIXES, add, make_models
from export_fixtures import make_adapter
from refusal import refused
from safetensors.numpy import load_file, save_file
from task_fixtures import tiny_bert, write_words_model

from loracle.export import VerifyReport, export, verify
from loracle.export.deployed_tasks import deployed_task
from loracle.export.task_changes import add_task, record_verification
from loracle.files import Adapter, LoraConfig, LoraPair, read_adapter, write_adapter
from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import ConfigError, FileError

GRAPH, BITS, DOCUMENT, BOUND, TOKENS = range(5)
MERGED = {"french": "linked", "german": "swappable"}
QUERY = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def made(models: Path) -> Path:
    """`french` is linked, `german` swappable, both of the adapter `attention`; `polish` is of `mlp`."""
    for name, form in MERGED.items():
        add(models, models / "deployment", name, form)
    return add(models, models / "deployment", "polish", "swappable", "mlp")


@pytest.fixture
def deployment(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "deployment"))


def checked(models: Path, candidate: Path, name: str | None, adapter: str = "attention") -> VerifyReport:
    return verify(candidate, models / "base", models / adapter, name=name, new_tokens=4)


def verdicts(report: VerifyReport) -> list[bool]:
    return [check.passed for check in report.checks]


def failures(report: VerifyReport, check: int) -> tuple[str, ...]:
    return report.checks[check].failures


def rewrite(path: Path, change: Any, document: Any = None) -> None:
    """Change a swappable task's tensors, and its document, in place."""
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    told = json.loads(SafetensorsFile(path).metadata["loracle.task"])
    change(tensors)
    save_file(tensors, path, {"loracle.task": json.dumps({**told, **(document or {})})})


@pytest.mark.parametrize("name", MERGED)
def test_a_right_task_passes_every_check(models: Path, made: Path, name: str) -> None:
    report = checked(models, made, name)
    assert verdicts(report) == [True] * 5
    path = made / f"{name}{SUFFIXES[MERGED[name]]}"
    assert report.candidate == str(path)
    document = deployed_task(made, name).document
    assert document is not None
    assert report.sha256 == document.sha256
    assert report.checks[DOCUMENT].figure == f"SHA-256 {document.sha256[:12]}"
    assert verdicts(checked(models, path, None)) == [True] * 5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"portable": True}, {"dtype": "fp16"}])
def test_a_right_task_passes_on_every_kind_of_base(
    models: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    out = add(models, tmp_path / "out", "german", "swappable", **options)
    add_task(out, "french", models / "base", models / "attention")
    add_task(out, "polish", models / "base", models / "mlp", form="swappable")
    for name, adapter in (("german", "attention"), ("french", "attention"), ("polish", "mlp")):
        report = checked(models, out, name, adapter)
        assert report.passed, report
        assert record_verification(out, name, report)
        assert deployed_task(out, name).verified is not None
        assert not checked(models, out, name, "mlp" if adapter == "attention" else "attention").passed


def test_inputs_more_than_the_base_has_are_counted_and_named(models: Path, made: Path) -> None:
    figure = checked(models, made, "german").checks[GRAPH].figure
    assert figure.endswith(f"; 6 weights are inputs too: {GATE}, {QUERY} and 4 more")
    assert "inputs" not in checked(models, made, "french").checks[GRAPH].figure


@pytest.mark.parametrize("name", MERGED)
def test_a_task_of_another_adapter_fails(models: Path, made: Path, name: str, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", models / "base", r=3, alpha=5, seed=9)
    report = verify(made, models / "base", other, name=name, new_tokens=4)
    assert verdicts(report)[:3] == [True, False, False]
    named = {failure.partition(":")[0] for failure in failures(report, DOCUMENT)}
    assert named == {"r", "lora_alpha", "adapter_sha256"}


def test_a_bit_of_a_swappable_task_is_noticed(models: Path, deployment: Path) -> None:
    path = deployment / "german.task.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = checked(models, deployment, "german")
    assert verdicts(report)[:3] == [True, False, False]
    assert "1 of " in failures(report, BITS)[0]
    assert failures(report, DOCUMENT)[0].startswith("sha256: expected ")


def test_a_bit_of_the_bases_data_is_noticed(models: Path, deployment: Path) -> None:
    model = onnx.load(deployment / "model.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if "down_proj" in tensor.name][:1]
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    with (deployment / "model.onnx_data").open("r+b") as file:
        file.seek(place["offset"])
        byte = file.read(1)[0]
        file.seek(place["offset"])
        file.write(bytes([byte ^ 1]))
    for name in MERGED:
        report = checked(models, deployment, name)
        assert verdicts(report)[:3] == [True, False, True]
        assert failures(report, BITS)[0].startswith(f"{tensor.name}: changed")
        assert "; 1 of " in failures(report, BITS)[0]


def test_a_tensor_that_is_missing_is_named(models: Path, deployment: Path) -> None:
    rewrite(deployment / "german.task.safetensors", lambda tensors: tensors.pop(QUERY))
    report = checked(models, deployment, "german")
    assert verdicts(report)[:3] == [True, False, False]
    assert failures(report, BITS)[0] == f"{QUERY}: expected in the task's file, found none"
    assert "the adapter was not merged into it" in failures(report, BITS)[1]
    assert {failure.partition(":")[0] for failure in failures(report, DOCUMENT)} == {
        *("tensors", "bytes", "sha256")
    }


def test_a_tensor_too_many_is_named_although_it_is_the_bases(models: Path, deployment: Path) -> None:
    base = load_file(models / "base" / "model.safetensors")
    rewrite(deployment / "german.task.safetensors", lambda tensors: tensors.update({GATE: base[GATE]}))
    report = checked(models, deployment, "german")
    assert verdicts(report) == [True, False, False, True, True]
    assert failures(report, BITS) == (f"{GATE}: the adapter leaves it alone",)


def test_a_tensor_that_an_adapter_of_zeros_leaves_as_it_was_is_missed_too(
    models: Path, tmp_path: Path
) -> None:
    """Its bits are the base's: only the names tell."""
    adapter = read_adapter(models / "attention")
    zeros = {
        path: LoraPair(pair.A, np.zeros_like(pair.B), pair.scaling) for path, pair in adapter.pairs.items()
    }
    write_adapter(models / "zeros", Adapter(adapter.config, zeros))
    out = add(models, tmp_path / "out", "zeros", "swappable", "zeros")
    assert checked(models, out, "zeros", "zeros").passed
    rewrite(out / "zeros.task.safetensors", lambda tensors: tensors.pop(QUERY))
    report = checked(models, out, "zeros", "zeros")
    assert failures(report, BITS) == (f"{QUERY}: expected in the task's file, found none",)


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", [5]), ("use_dora", True), ("target_modules", ["o_proj"]), ("tensors", 3), ("sha256", "0" * 64)],
)
def test_a_wrong_document_is_noticed_by_field(
    models: Path, deployment: Path, field: str, value: object
) -> None:
    rewrite(deployment / "german.task.safetensors", lambda _: None, {field: value})
    report = checked(models, deployment, "german")
    assert verdicts(report) == [True, True, False, True, True]
    assert [failure.partition(":")[0] for failure in failures(report, DOCUMENT)] == [field]


def test_another_node_in_the_graph_of_inputs_is_noticed(models: Path, deployment: Path) -> None:
    path = deployment / "swappable.onnx"
    model = onnx.load(path, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.op_type == "Sigmoid"][:1] or [
        node for node in model.graph.node if node.op_type == "Mul"
    ][:1]
    node.op_type = "Tanh" if node.op_type == "Sigmoid" else "Add"
    path.write_bytes(model.SerializeToString())
    assert verdicts(checked(models, deployment, "german"))[0] is False
    assert verdicts(checked(models, deployment, "french"))[0] is True


def test_an_input_that_is_no_weight_is_noticed(models: Path, deployment: Path) -> None:
    path = deployment / "swappable.onnx"
    model = onnx.load(path, load_external_data=False)
    held = {value.name for value in model.graph.input}
    constant = next(tensor for tensor in model.graph.initializer if "weight" not in tensor.name)
    assert constant.name not in held
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(constant.name, constant.data_type, list(constant.dims))
    )
    path.write_bytes(model.SerializeToString())
    report = checked(models, deployment, "german")
    assert failures(report, GRAPH) == (f"input {constant.name}: added to the candidate",)


def test_a_tensor_that_the_graph_does_not_take_is_refused(models: Path, deployment: Path) -> None:
    path = deployment / "german.task.safetensors"
    rewrite(path, lambda tensors: tensors.update(other=np.zeros(1, np.float32)))
    message = (
        f"{path}: other: expected one of the inputs of swappable.onnx, found none; is the task another "
        "model's?"
    )
    refused(lambda: checked(models, deployment, "german"), FileError, message)


def test_a_task_with_an_unmerged_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    out = add(models, tmp_path / "out", "dutch", "adapter-inputs")
    message = "dutch: expected a task whose adapter is merged, got the form adapter-inputs"
    refused(lambda: checked(models, out, "dutch"), ConfigError, message)


def test_a_record_is_kept_of_what_passed_and_goes_with_what_did_not(models: Path, deployment: Path) -> None:
    right, wrong = checked(models, deployment, "german"), checked(models, deployment, "german", "mlp")
    assert record_verification(deployment, "german", right)
    verified = deployed_task(deployment, "german").verified
    assert verified is not None
    assert [check["name"] for check in verified.checks] == [check.name for check in right.checks]
    assert (verified.largest_error, verified.tolerance) == (right.error, right.tolerance)
    assert verified.versions.keys() >= {"loracle", "onnxruntime"}
    assert not record_verification(deployment, "german", wrong)
    assert deployed_task(deployment, "german").verified is None
    assert not (deployment / "german.verified.json").exists()


def test_a_task_that_was_exchanged_meanwhile_is_not_recorded(models: Path, deployment: Path) -> None:
    report = checked(models, deployment, "german")
    add(models, deployment, "german", "swappable", "mlp", replace=True)
    message = (
        f"{deployment / 'german.task.safetensors'}: expected the document of what was verified, found "
        "another; add the task again, or verify it again"
    )
    refused(lambda: record_verification(deployment, "german", report), FileError, message)
    assert not (deployment / "german.verified.json").exists()


def test_a_task_without_a_document_passes_and_is_not_recorded(models: Path, deployment: Path) -> None:
    path = deployment / "german.task.safetensors"
    save_file(load_file(path), path)
    report = checked(models, deployment, "german")
    assert report.passed
    assert report.checks[DOCUMENT].figure == "no document; add the task again to have one"
    with pytest.raises(FileError, match="expected the document of what was verified, found none"):
        record_verification(deployment, "german", report)


def test_what_passed_without_the_adapter_is_no_verified_task(models: Path, tmp_path: Path) -> None:
    """An adapter of zeros leaves the base as it is, which is not what was asked."""
    adapter = read_adapter(models / "mlp")
    zeros = {
        path: LoraPair(pair.A, np.zeros_like(pair.B), pair.scaling) for path, pair in adapter.pairs.items()
    }
    write_adapter(models / "nothing", Adapter(adapter.config, zeros))
    out = add(models, tmp_path / "out", "nothing", "linked", "nothing")
    report = verify(out, models / "base", name="nothing", new_tokens=2)
    assert report.sha256 is None
    with pytest.raises(FileError, match="expected the document of what was verified, found another"):
        record_verification(out, "nothing", report)


@pytest.mark.parametrize("head", [False, True])
def test_a_classifiers_task_is_verified_with_its_tensors(tmp_path: Path, head: bool) -> None:
    """With and without a head of its own, whose few entries a base may have in its graph."""
    base = write_words_model(tmp_path / "base", tiny_bert("BertForSequenceClassification", num_labels=3))
    rng = np.random.default_rng(0)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=("query", "value"),
        task_type="SEQ_CLS" if head else None,
        modules_to_save=("classifier",) if head else None,
    )
    tensors = {
        f"classifier.{name}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("weight", (3, 16)), ("bias", (3,)))
        if head
    }
    pairs = {
        f"bert.encoder.layer.{layer}.attention.self.{target}": LoraPair(
            rng.standard_normal((2, 16)).astype(np.float32),
            rng.standard_normal((16, 2)).astype(np.float32),
            2.0,
        )
        for layer in range(2)
        for target in ("query", "value")
    }
    write_adapter(tmp_path / "adapter", Adapter(config, pairs, tensors))
    out = tmp_path / "out"
    export(base, out, tmp_path / "adapter", form="swappable", name="french")
    assert len(load_file(out / "french.task.safetensors")) == len(pairs) + len(tensors)
    assert verify(out, base, tmp_path / "adapter", name="french").passed
    assert verify(out, base).passed
    assert not verify(out, base, name="french").passed
