"""docs/serving.md does what it says: its requests are answered, its options are there, its layout loads."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from serve_fixtures import make_deployment
from starlette.testclient import TestClient

from loracle.export import DecoderSession, Deployment, export, generate
from loracle.serve import Service, Settings, application
from loracle.serve.asked import _IGNORED
from loracle.serve.metrics import Metrics

PAGE = (Path(__file__).parent.parent / "docs/serving.md").read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory)


def blocks(info: str) -> list[str]:
    return re.findall(rf"^```{info}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_its_requests_are_answered(folder: Path) -> None:
    requests = [
        re.search(r"http://127\.0\.0\.1:8000(\S+) .* -d '(.*)'", block, re.DOTALL)
        for block in blocks("sh curl")
    ]
    assert len(requests) == 3
    with TestClient(application(Service(Deployment(folder, threads=1), Settings()))) as client:
        for request in requests:
            assert request is not None
            path, body = request.groups()
            response = client.post(path, json=json.loads(body))
            assert response.status_code == 200, response.text
        routes = re.findall(r"`GET (/\S+)`", PAGE)
        assert len(routes) == 5
        for route in routes:
            assert client.get(route.replace("NAME", "french")).status_code == 200


def test_its_defaults_are_the_servers() -> None:
    found = dict(
        re.findall(r"^\| `--([a-z-]+)`(?:, `--max-batch-tokens`)? \| ([^|]+) \|", PAGE, re.MULTILINE)
    )
    settings = Settings()
    assert found["max-batch"] == f"{settings.max_batch}, {settings.max_batch_tokens}"
    assert found["max-waiting"] == str(settings.max_waiting)
    assert found["max-body-bytes"] == f"{settings.max_body_bytes >> 20} MiB"
    assert found["timeout"] == f"{settings.timeout:g}"
    assert found["grace"] == f"{settings.grace:g}"
    assert f"connections are at most {settings.max_connections}" in PAGE


def test_the_fields_that_it_calls_ignored_are() -> None:
    (line,) = [line for line in PAGE.splitlines() if line.endswith("| ignored | |")]
    assert set(re.findall(r"`([a-z_]+)`", line)) == _IGNORED


def test_it_lists_the_metrics_that_there_are(folder: Path) -> None:
    service = Service(Deployment(folder, threads=1), Settings())
    service.preparing.shutdown()
    own = {family.name: family.type for family in service.metrics.registry.collect()}
    names = {f"{name}_total" if kind == "counter" else name for name, kind in own.items()}
    assert set(re.findall(r"`(loracle_[a-z_]+)`", PAGE)) == names
    assert isinstance(service.metrics, Metrics)


def test_its_layout_for_triton_loads_and_answers_without_a_shared_cache(folder: Path, tmp_path: Path) -> None:
    """As Triton runs it: each graph from its own folder, the cache handed back and forth."""
    base = folder.parent / "base"
    export(base, tmp_path / "deployment", folder.parent / "french", form="linked", name="french")
    (script,) = blocks("sh layout")
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True)
    model = tmp_path / "repository/french/1/model.onnx/model.onnx"
    shared = model.parent / "model.onnx_data"
    assert shared.stat().st_ino == (tmp_path / "deployment/model.onnx_data").stat().st_ino
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    prompt, count = [5, 6, 7, 30, 12], 8
    past = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    ids, total, found = np.array([prompt]), 0, []
    for _ in range(count):
        total += ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **past}
        names = [entry.name for entry in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        found.append(int(outputs["logits"][0, -1].argmax()))
        ids = np.array([[found[-1]]])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    decoder = DecoderSession(tmp_path / "deployment/french.onnx", len(prompt) + count)
    assert found == [token for _, token in generate(decoder, [prompt], count)]
