"""`verify` of an encoder and a decoder passes what is right and names what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from architecture_runs import make_adapter
from architectures import make
from refusal import refused

from loracle.export import VerifyReport, export, verify
from loracle.export.names import DATA_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE, ENCODER_FILE
from loracle.files import Adapter, LoraPair, read_adapter, write_adapter
from loracle.reference import ConfigError, FileError

GRAPH, BITS, LOGITS, TOKENS = range(4)
QUERY = "decoder.block.1.layer.0.SelfAttention.q"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, onnx (merged)."""
    root = tmp_path_factory.mktemp("verify")
    base = make(root / "base", "t5")
    export(base, root / "onnx", make_adapter(base, "t5", root / "adapter"))
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "onnx", tmp_path / "onnx"))


def _verify(root: Path, candidate: Path, new_tokens: int = 6) -> VerifyReport:
    return verify(candidate, root / "base", root / "adapter", new_tokens=new_tokens)


def _verdicts(report: VerifyReport) -> list[bool]:
    return [check.passed for check in report.checks]


def test_a_right_export_passes_every_check(made: Path) -> None:
    report = _verify(made, made / "onnx")
    assert _verdicts(report) == [True] * 4
    assert report.error is not None
    assert report.tolerance is not None
    assert 0 < report.error <= report.tolerance
    assert "18 positions" in report.checks[LOGITS].figure
    assert "18 tokens, 3 prompts" in report.checks[TOKENS].figure


def test_a_float16_export_lies_inside_its_own_bound(tmp_path: Path) -> None:
    """BART, whose encoder looks for infinities in float16."""
    base = make(tmp_path / "base", "bart")
    export(base, tmp_path / "onnx", dtype="fp16")
    report = verify(tmp_path / "onnx", base, new_tokens=6)
    assert _verdicts(report) == [True] * 4
    assert report.error is not None
    assert report.tolerance is not None
    assert report.tolerance < 50 * report.error


@pytest.mark.parametrize(
    "layer", ["encoder.block.1.layer.0.SelfAttention.v", "decoder.block.1.layer.1.EncDecAttention.k"]
)
def test_outputs_alone_catch_a_wrong_merge(made: Path, tmp_path: Path, layer: str) -> None:
    """One layer's delta is left out, in the encoder or in what the decoder computes of its states once."""
    adapter = read_adapter(made / "adapter")
    assert layer in adapter.pairs
    pairs = {
        path: LoraPair(pair.A, np.zeros_like(pair.B), pair.scaling) if path == layer else pair
        for path, pair in adapter.pairs.items()
    }
    (tmp_path / "wrong").mkdir()
    write_adapter(tmp_path / "wrong", Adapter(adapter.config, pairs))
    export(made / "base", tmp_path / "onnx", tmp_path / "wrong")
    report = _verify(made, tmp_path / "onnx")
    assert _verdicts(report)[:3] == [True, False, False]
    assert report.checks[BITS].failures[0].startswith(f"{layer}.weight: ")
    assert "the adapter was not merged" in report.checks[BITS].failures[0]


def _initializer(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name.endswith(ending))


def test_one_flipped_bit_is_found_and_its_tensor_named(made: Path, copied: Path) -> None:
    model = onnx.load(str(copied / DECODER_WITH_PAST_FILE), load_external_data=False)
    tensor = _initializer(model, "decoder.block.1.layer.2.DenseReluDense.wo.weight")
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with open(copied / DATA_FILE, "r+b") as data:
        data.seek(offset)
        byte = data.read(1)[0]
        data.seek(offset)
        data.write(bytes([byte ^ 1]))
    report = _verify(made, copied)
    assert _verdicts(report) == [True, False, True, True]
    assert report.checks[BITS].failures[0].startswith(f"{tensor.name}: ")
    assert "; 1 of " in report.checks[BITS].failures[0]


def test_a_later_graph_that_reads_another_tensor_is_found(made: Path, copied: Path) -> None:
    """The first graph's initializers are right, and so are all bytes of the data file."""
    model = onnx.load(str(copied / DECODER_WITH_PAST_FILE), load_external_data=False)
    own = _initializer(model, "decoder.block.1.layer.2.DenseReluDense.wo.weight")
    other = _initializer(model, "decoder.block.0.layer.2.DenseReluDense.wo.weight")
    del own.external_data[:]
    own.external_data.extend(other.external_data)
    (copied / DECODER_WITH_PAST_FILE).write_bytes(model.SerializeToString())
    report = _verify(made, copied)
    assert _verdicts(report)[:3] == [True, False, False]
    assert report.checks[BITS].failures == (
        f"{DECODER_WITH_PAST_FILE}: {own.name}: expected the tensor of the other graphs, got another",
    )


def test_a_later_graph_with_another_node_is_found(made: Path, copied: Path) -> None:
    """Cached steps scale what attention compares: the first step, and the encoder, are right."""
    model = onnx.load(str(copied / DECODER_WITH_PAST_FILE), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(attribute for attribute in node.attribute if attribute.name == "scale").f = 0.5
    (copied / DECODER_WITH_PAST_FILE).write_bytes(model.SerializeToString())
    report = _verify(made, copied)
    assert _verdicts(report)[:3] == [False, True, False]
    assert report.checks[GRAPH].failures[0].startswith(f"{DECODER_WITH_PAST_FILE}: ")
    assert all("position 0" not in failure for failure in report.checks[LOGITS].failures)


@pytest.mark.parametrize("file", [ENCODER_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE])
def test_a_missing_graph_is_named_in_one_line(made: Path, copied: Path, file: str) -> None:
    (copied / file).unlink()
    with pytest.raises(FileError, match=file) as caught:
        _verify(made, copied)
    assert "\n" not in str(caught.value)


def test_one_graph_of_several_is_no_candidate(made: Path, copied: Path) -> None:
    refused(
        lambda: _verify(made, copied / ENCODER_FILE),
        FileError,
        f"{copied / ENCODER_FILE}: expected the folder of a model with several graphs, got one of them",
    )


def test_the_form_linked_is_refused(made: Path, tmp_path: Path) -> None:
    refused(
        lambda: export(made / "base", tmp_path / "onnx", made / "adapter", form="linked", name="task"),
        ConfigError,
        "form: expected baked for a model with encoder and decoder, got linked for task",
    )
    assert not (tmp_path / "onnx").exists()
