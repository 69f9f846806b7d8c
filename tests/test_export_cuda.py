"""Exported models where the installed onnxruntime runs them: on a GPU the bounds are those of the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from architecture_runs import TASK, compare, make_adapter
from architectures import CASES, make
from export_fixtures import make_model

from loracle.export import DecoderSession, export
from loracle.export.names import GRAPH_FILE
from loracle.export.providers import CPU, CUDA, PROVIDERS, device_of, providers_of
from loracle.export.verification.truth import Float64Model
from loracle.files import read_adapter

PROMPTS = ([5, 77, 30, 12, 90, 41, 3], [8], [200, 100, 50, 20], [17, 4])
FOLLOWING = np.array([[9, 30, 77], [1, 2, 3], [250, 249, 248], [60, 61, 62]])


@pytest.fixture(params=[CPU, pytest.param(CUDA, marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if PROVIDERS[name] not in onnxruntime.get_available_providers():
        pytest.skip(f"the installed onnxruntime has no {PROVIDERS[name]}")
    return name


def opened(folder: Path, device: str) -> onnxruntime.InferenceSession:
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = str(folder / GRAPH_FILE)
    session = onnxruntime.InferenceSession(path, options, providers=providers_of(device))
    assert device_of(session) == device
    return session


def test_a_float16_decoder_answers_a_batch_inside_the_bound(tmp_path: Path, device: str) -> None:
    """Prompts of all lengths, steps, rows that are left out: cache, tokens and mask are on the device."""
    base = make_model(tmp_path / "base")
    export(base, tmp_path / "onnx", dtype="fp16")
    session = DecoderSession(opened(tmp_path / "onnx", device), 12, batch=4)
    rows = [[own] for own in session.prefill(PROMPTS).copy()]
    for tokens in FOLLOWING.T[:2]:
        for row, own in zip(rows, session.decode(tokens), strict=True):
            row.append(own.copy())
    session.keep([2, 0])
    for at, own in zip((2, 0), session.decode(FOLLOWING[[2, 0], 2]), strict=True):
        rows[at].append(own.copy())
    texts = [[*prompt, *following] for prompt, following in zip(PROMPTS, FOLLOWING, strict=True)]
    for row, right, prompt in zip(
        rows, Float64Model(base, None).evaluate(texts, np.dtype(np.float16)), PROMPTS, strict=True
    ):
        expected = right.logits[len(prompt) - 1 :][: len(row)]
        assert np.abs(np.stack(row).astype(np.float64) - expected).max() <= right.tolerance


def test_a_merged_float32_encoder_answers_inside_the_bound(tmp_path: Path, device: str) -> None:
    """Products with 11 bits (TF32) are outside it."""
    name = "bert"
    base = make(tmp_path / "base", name)
    adapter = make_adapter(base, name, tmp_path / "adapter")
    export(base, tmp_path / "onnx", adapter)
    task = TASK[CASES[name].task]
    tuned, untuned = (Float64Model(base, own, task) for own in (read_adapter(adapter), None))
    for error, tolerance, difference in compare(name, [opened(tmp_path / "onnx", device)], tuned, untuned):
        assert error <= tolerance < difference
