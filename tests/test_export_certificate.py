"""A certificate says what was verified and what was found, and is what its schema says."""

from __future__ import annotations

import copy
import importlib.resources
import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from certificate_fixtures import CONTROLS, MARKUP, digests, harmful, report, weight
from deployments import add, make_models
from export_fixtures import make_adapter, make_model
from safetensors.numpy import load_file, save_file

from loracle.export import export
from loracle.export.verification.advice import ADVICE
from loracle.export.verification.certificate import certificate_bytes, certificate_of, write_certificate
from loracle.export.verification.verdict import Verdict
from loracle.export.verification.verify import verify
from loracle.files import write_merged_checkpoint
from loracle.reference import FileError

Q = "model.layers.{}.self_attn.q_proj.weight".format
V = "model.layers.{}.self_attn.v_proj.weight".format


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    path = importlib.resources.files("loracle.export") / "schemas" / "certificate.schema.json"
    content = json.loads(path.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, merged; and spoiled, with several mistakes."""
    root = tmp_path_factory.mktemp("certificate")
    make_model(root / "base")
    make_adapter(root / "adapter", root / "base")
    write_merged_checkpoint(root / "base", root / "adapter", root / "merged")
    shutil.copytree(root / "merged", root / "spoiled")
    path = root / "spoiled" / "model.safetensors"
    base, tensors = load_file(root / "base" / "model.safetensors"), load_file(path)
    tensors[Q(0)] = base[Q(0)]
    tensors[V(1)] = base[V(1)] + 2 * (tensors[V(1)] - base[V(1)])
    tensors[Q(1)] = np.where(np.arange(48) == 5, np.nan, tensors[Q(1)]).astype(np.float32)
    tensors[MARKUP] = np.zeros(3, np.float32)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    return root


def _certified(
    root: Path, candidate: Path, adapter: str | None = "adapter", **options: Any
) -> dict[str, Any]:
    found = verify(
        candidate,
        root / "base",
        None if adapter is None else root / adapter,
        digests=True,
        new_tokens=2,
        **options,
    )
    content: dict[str, Any] = json.loads(certificate_bytes(certificate_of(found, {"exact": None})))
    return content


@pytest.fixture(scope="module")
def right(made: Path) -> dict[str, Any]:
    return _certified(made, made / "merged")


@pytest.fixture(scope="module")
def wrong(made: Path) -> dict[str, Any]:
    return _certified(made, made / "spoiled")


def test_a_right_checkpoint(
    schema: jsonschema.Draft202012Validator, made: Path, right: dict[str, Any]
) -> None:
    schema.validate(right)
    assert (right["passed"], right["candidate"]) == (True, str(made / "merged"))
    assert (right["model"], right["adapter"]) == (str(made / "base"), str(made / "adapter"))
    assert right["summary"]["verdicts"] == {"exact": 4, "untouched": 16}
    assert right["summary"]["entries"] == sum(own["entries"] for own in right["weights"]) > 0
    assert right["lora"] == {
        **{"r": [4], "lora_alpha": 8, "scaling": [2.0], "use_rslora": False, "use_dora": False},
        **{"fan_in_fan_out": False, "kinds": ["linear"], "target_modules": ["q_proj", "v_proj"]},
        **{"pairs": 4, "parameters": 2 * (4 * (48 + 64) + 4 * (48 + 32))},
    }
    assert [own["number"] for own in right["clauses"]] == ["1", "2"]
    assert right["inputs"]["candidate"]["name"] == "merged"
    names = [file["name"] for file in right["inputs"]["base"]["files"]]
    assert names[:2] == ["config.json", "model.safetensors"]
    assert "tokenizer.json" in names
    assert [own["name"] for own in right["inputs"]["adapter"]["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_wrong_checkpoint(schema: jsonschema.Draft202012Validator, wrong: dict[str, Any]) -> None:
    schema.validate(wrong)
    found = {own["name"]: own for own in wrong["weights"] if not own["passed"]}
    assert {name: own["verdict"] for name, own in found.items()} == {
        **{Q(0): "missing", V(1): "twice", Q(1): "not_finite", MARKUP: "added", "model.norm.weight": "absent"}
    }
    assert found[Q(1)]["witness"]["got"] == "nan"
    assert wrong["passed"] is False
    assert wrong["summary"]["failed"] == 5
    assert sum(line["entries"] for line in found[Q(0)]["ulps"]) == found[Q(0)]["entries"]


def test_the_base_itself(schema: jsonschema.Draft202012Validator, made: Path) -> None:
    content = _certified(made, made / "base", None)
    schema.validate(content)
    assert (content["adapter"], content["lora"], content["inputs"]["adapter"]) == (None, None, None)
    assert content["clauses"] == []


@pytest.mark.slow
def test_an_exported_model(schema: jsonschema.Draft202012Validator, made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "onnx", made / "adapter")
    content = _certified(made, tmp_path / "onnx")
    schema.validate(content)
    assert [own["number"] for own in content["clauses"]] == ["1", "2", "7"]
    assert 0 < content["logits"]["largest_error"] <= content["logits"]["tolerance"]
    assert content["graph"]["nodes"] > 0
    assert content["graph"]["differences"] == []
    names = [file["name"] for file in content["inputs"]["candidate"]["files"]]
    assert names[:2] == ["model.onnx", "model.onnx_data"]
    assert content["inputs"]["candidate"]["kind"] == "onnx"


@pytest.mark.slow
def test_a_quantised_model(schema: jsonschema.Draft202012Validator, made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "onnx", made / "adapter", quantization="int8")
    content = _certified(made, tmp_path / "onnx")
    schema.validate(content)
    assert content["quality"]["rms_error"] > 0
    assert content["clauses"][-1]["number"] == "7.1"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["linked", "swappable"])
def test_a_task(schema: jsonschema.Draft202012Validator, tmp_path: Path, form: str) -> None:
    models = make_models(tmp_path / "models")
    add(models, tmp_path / "out", "french", form)
    found = verify(
        tmp_path / "out", models / "base", models / "attention", name="french", digests=True, new_tokens=2
    )
    content = json.loads(certificate_bytes(certificate_of(found, {})))
    schema.validate(content)
    candidate = content["inputs"]["candidate"]
    names = [file["name"] for file in candidate["files"]]
    assert candidate["kind"] == "task"
    assert candidate["path"] == content["candidate"]
    assert "model.onnx_data" in names
    assert Path(candidate["path"]).name in names
    assert ("swappable.onnx" in names) == (form == "swappable")


@pytest.mark.slow
def test_anybodys_graph_beside_the_bases_and_on_data(
    schema: jsonschema.Draft202012Validator, made: Path, tmp_path: Path
) -> None:
    from foreign_graphs import torch_export

    torch_export(made / "merged", tmp_path / "onnx")
    base = torch_export(made / "base", tmp_path / "base")
    rows = [{"prompt": f"say {i}", "completion": f"{i}{i}"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = _certified(made, tmp_path / "onnx", base_graph=base, data=tmp_path / "data.jsonl", rows=2)
    schema.validate(content)
    assert content["passed"] is True
    assert content["candidate"] == content["inputs"]["candidate"]["path"] == str(tmp_path / "onnx")
    assert [own["number"] for own in content["clauses"]] == ["1", "2", "7", "7.3"]
    assert content["metric"]["trained"]["perplexity"] != content["metric"]["base"]["perplexity"]
    assert content["graph"]["found"].keys() == {"by name", "by content"}
    assert (content["graph"]["adapter"], content["graph"]["added"]) == (None, {})
    assert any(own["place"].startswith("transpose of ") for own in content["weights"])


def test_whatever_the_names_are(schema: jsonschema.Draft202012Validator) -> None:
    for text in (MARKUP, CONTROLS):
        content = json.loads(certificate_bytes(harmful(text)))
        schema.validate(content)
        assert content["weights"][0]["name"] == text


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda c: c.update(format="loracle"),
    "another version": lambda c: c.update(version=2),
    "a field more": lambda c: c.update(note=""),
    "no verdicts": lambda c: c.pop("weights"),
    "a local time": lambda c: c.update(time="2026-11-28T18:00:00"),
    "no checks": lambda c: c.update(checks=[]),
    "a short digest": lambda c: c["inputs"]["base"].update(sha256="ab12"),
    "an input without files": lambda c: c["inputs"]["candidate"].update(files=[]),
    "no candidate": lambda c: c["inputs"].update(candidate=None),
    "an unknown verdict": lambda c: c["weights"][0].update(verdict="fine"),
    "an unknown verdict in the summary": lambda c: c["summary"]["verdicts"].update(fine=1),
    "a verdict that no weight has": lambda c: c["summary"]["verdicts"].update(twice=0),
    "passed, with a weight that does not": lambda c: c["weights"][0].update(passed=False),
    "passed, with a check that does not": lambda c: c["checks"][0].update(passed=False),
    "passed, with failed weights": lambda c: c["summary"].update(failed=1),
    "fewer than no entries": lambda c: c["weights"][0].update(entries=-1),
    "an index of text": lambda c: c["weights"][0].update(witness={"index": ["1"], "expected": 1, "got": 1}),
    "a number that is a word": lambda c: c["weights"][0].update(
        witness={"index": [1], "expected": "one", "got": 1}
    ),
    "no version of loracle": lambda c: c["versions"].pop("loracle"),
    "a clause by name": lambda c: c["clauses"][0].update(number="scaling"),
    "no rank": lambda c: c["lora"].update(r=[]),
    "an error below 0": lambda c: c["logits"].update(largest_error=-1.0),
    "a graph of a text": lambda c: c.update(graph="equal"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_certificate_is_none(
    schema: jsonschema.Draft202012Validator, right: dict[str, Any], case: str
) -> None:
    content = copy.deepcopy(right)
    BROKEN[case](content)
    assert not schema.is_valid(content)


def test_schema_and_advice_know_every_verdict(schema: jsonschema.Draft202012Validator) -> None:
    assert schema.schema["$defs"]["verdict"]["enum"] == [verdict.name.lower() for verdict in Verdict]
    assert list(ADVICE) == list(Verdict)


def test_the_schema_describes_no_field_that_nobody_writes(
    schema: jsonschema.Draft202012Validator, right: dict[str, Any]
) -> None:
    assert schema.schema["required"] == list(schema.schema["properties"])
    assert set(schema.schema["properties"]) == set(right)


def test_it_is_written_whole_in_the_place_of_another(tmp_path: Path) -> None:
    certificate = certificate_of(report(weight(Verdict.EXACT)), {})
    (tmp_path / "old.json").write_text("old")
    write_certificate(tmp_path / "old.json", certificate)
    assert (tmp_path / "old.json").read_bytes() == certificate_bytes(certificate)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    with pytest.raises(FileError, match="does not exist"):
        write_certificate(tmp_path / "none" / "c.json", certificate)


def test_the_document_is_json_and_no_more() -> None:
    text = certificate_bytes(certificate_of(report(weight(Verdict.EXACT)))).decode("ascii")
    assert text.startswith('{\n "format": "loracle-certificate",\n "version": 1,\n "time": ')
    assert text.endswith("}\n")
    assert json.loads(text)["options"] == {}
    with pytest.raises(ValueError, match="not JSON compliant"):
        certificate_bytes(certificate_of(report(weight(Verdict.EXACT)), {"alpha": float("nan")}))


def test_versions_are_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("onnxruntime", "onnx-ir"):
            raise PackageNotFoundError(package)
        return f"of {package}"

    monkeypatch.setattr("loracle.export.verification.certificate.version", version)
    versions = dict(certificate_of(report(weight(Verdict.EXACT))).versions)
    assert versions.pop("python") == platform.python_version()
    assert versions.pop("platform") == f"{platform.system()} {platform.machine()}"
    names = [
        "loracle",
        "numpy",
        "ml_dtypes",
        "safetensors",
        "onnx",
        "onnxruntime-gpu",
        "torch",
        "transformers",
    ]
    assert versions == {name: f"of {name}" for name in names}


def test_digests_are_by_role() -> None:
    certificate = certificate_of(report(weight(Verdict.EXACT), inputs=digests()[::2]), {"a": 1})
    content = certificate.to_json()
    assert content["inputs"]["adapter"] is None
    assert content["inputs"]["candidate"]["path"] == "some/candidate"
    assert content["options"] == {"a": 1}
