"""Where sessions run: CUDA where onnxruntime has it, and no TF32 there."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from export_fixtures import make_model

from loracle.export import export, open_session
from loracle.export.bench.graphs import MethodGraph
from loracle.export.bench.runner import open_method
from loracle.export.names import GRAPH_FILE
from loracle.export.providers import CPU, CUDA, best_device, device_of, providers_of

ON_CUDA = [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]


def test_a_device_is_asked_for_with_the_cpu_behind_it() -> None:
    assert providers_of(CPU) == [("CPUExecutionProvider", {})]
    assert providers_of(CUDA) == ON_CUDA


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What sessions ask for in an onnxruntime that says to have CUDA."""
    found: list[Any] = []
    opened = onnxruntime.InferenceSession

    def recording(*arguments: Any, providers: Any) -> onnxruntime.InferenceSession:
        found.append(providers)
        return opened(*arguments, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    return found


def test_every_session_asks_for_float32_products_of_float32(tmp_path: Path, asked: list[Any]) -> None:
    export(make_model(tmp_path / "base"), tmp_path / "onnx")
    del asked[:]
    assert best_device() == CUDA
    session = open_session(tmp_path / "onnx")
    assert asked == [ON_CUDA]
    # What it got counts.
    assert device_of(session) == CPU
    graph = MethodGraph("full", tmp_path / "onnx" / GRAPH_FILE, 0, 0, 0)
    open_method(graph, CPU, 1)
    assert asked[1:] == [[("CPUExecutionProvider", {})]]
