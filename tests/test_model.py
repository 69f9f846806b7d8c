"""The real 135M-parameter model: the proof is tight on it, sharp on it, and finds one flipped bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from loracle.export import DecoderSession, TextModel, export, greedy, verify
from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair, write_adapter

pytestmark = pytest.mark.model

TARGETS = ("q_proj", "v_proj")
LAYER = "model.layers.17.self_attn"


@pytest.fixture(scope="module")
def made(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter (seeded, of a trained one's size) and onnx (merged)."""
    root = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    pairs = {}
    with Checkpoint(smollm2) as checkpoint:
        for name in checkpoint.names:
            path = name.removesuffix(".weight")
            if path.endswith(TARGETS):
                rows, columns = checkpoint.shape(name)
                A = rng.standard_normal((8, columns)) / columns**0.5
                B = rng.standard_normal((rows, 8)) * 0.01
                pairs[path] = LoraPair(A.astype(np.float32), B.astype(np.float32), 2.0)
    write_adapter(root / "adapter", Adapter(LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), pairs))
    export(smollm2, root / "onnx", root / "adapter")
    return root


def test_the_merged_model_verifies_and_the_bound_is_tight(made: Path, smollm2: Path) -> None:
    report = verify(made / "onnx", smollm2, made / "adapter")
    assert report.passed, [check.failures for check in report.checks]
    assert report.error is not None
    assert report.tolerance is not None
    assert report.error > report.tolerance / 50


def test_one_bit_and_one_bfloat16_matrix_are_found(made: Path, smollm2: Path) -> None:
    """One bit: by the comparison of bits alone. One matrix in bfloat16: by the logits as well."""
    name = f"{LAYER}.q_proj.weight"
    packed = f"{LAYER}.q_proj+k_proj+v_proj.weight"
    tensor = ir.load(made / "onnx/model.onnx").graph.initializers[packed].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.offset is not None
    right = tensor.numpy().copy()
    flipped = right.copy()
    flipped.view(np.uint32)[300, 200] ^= 1
    rounded = right.copy()
    queries = rounded[: rounded.shape[1]]
    queries[:] = queries.astype(ml_dtypes.bfloat16)
    verdicts = []
    with open(made / "onnx/model.onnx_data", "r+b") as data:
        for wrong in (flipped, rounded):
            data.seek(tensor.offset)
            data.write(wrong.tobytes())
            data.flush()
            report = verify(made / "onnx", smollm2, made / "adapter")
            verdicts.append([check.passed for check in report.checks[:3]])
            assert report.checks[1].failures[0].startswith(f"{name}: ")
        data.seek(tensor.offset)
        data.write(right.tobytes())
    assert verdicts == [[True, False, True], [True, False, False]]


def test_the_base_model_answers_from_onnxruntime_alone(smollm2: Path, tmp_path: Path) -> None:
    export(smollm2, tmp_path / "onnx")
    text = TextModel(tmp_path / "onnx")
    ids = text.encode_prompt("What is the capital of France?")
    session = DecoderSession(tmp_path / "onnx", len(ids) + 16)
    tokens = [token for token, _ in greedy(session, ids, 16, text.stop)]
    assert "Paris" in text.decode(tokens)
    assert tokens[-1] in text.stop
