"""Quantised exports: codes are onnxruntime's own of the correctly rounded merge, their loss is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import make
from export_fixtures import VOCABULARY, make_adapter, make_model
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from refusal import refused
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.export import DecoderSession, export, verify
from loracle.export.block_codes import block_codes
from loracle.export.graphs import graph_template
from loracle.export.options import GraphOptions
from loracle.export.tasks import task_of
from loracle.export.verification.quality import Quality, measure_quality
from loracle.export.write import write_models
from loracle.files import Checkpoint, MergedWeights
from loracle.reference import ConfigError, NonFiniteError

Array = np.ndarray[Any, Any]

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
CASES = [(dtype, quantization) for dtype in ("fp32", "fp16") for quantization in BITS]
PROMPT = np.array([5, 77, 30, 12, 90, 41, 3])
EMBEDDING = "model.embed_tokens.weight"
GRAPH, CODES, FINITE = range(3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (tied), adapter, and an export for each dtype and quantisation; `fp32` and `fp16` have none."""
    root = tmp_path_factory.mktemp("quantized")
    make_model(root / "base")
    make_adapter(root / "adapter", root / "base")
    for dtype in ("fp32", "fp16"):
        export(root / "base", root / dtype, root / "adapter", dtype=dtype)
    for dtype, quantization in CASES:
        out = root / f"{dtype}-{quantization}"
        export(root / "base", out, root / "adapter", dtype=dtype, quantization=quantization)
    return root


def tensors(folder: Path, file: str = "model.onnx") -> dict[str, Array]:
    """Every initializer by the `onnx` package, an independent reader of the format."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(folder / file)).graph.initializer}


def nodes(folder: Path, operator: str) -> list[onnx.NodeProto]:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return [node for node in graph.node if node.op_type == operator]


def multiplied(folder: Path) -> dict[str, Array]:
    """The weights (out, in) of an unquantised export's products."""
    held = tensors(folder)
    return {node.input[1]: held[node.input[1]] for node in nodes(folder, "FusedMatMul")}


def quantised_by_onnxruntime(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(model, bits, BLOCK, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    return quantizer.model.model


@pytest.mark.parametrize(("dtype", "quantization"), CASES)
def test_codes_are_what_onnxruntimes_quantiser_makes_of_the_merged_export(
    made: Path, dtype: str, quantization: str
) -> None:
    """Rows of 48 and 80 entries, which fill no whole number of blocks, and rows of 64, which do."""
    bits = BITS[quantization]
    weights = multiplied(made / dtype)
    assert {weight.shape[1] for weight in weights.values()} == {48, 64, 80}
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[dtype]
    sizes = [len(weight) for weight in weights.values()]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [f"x{n}", name], [f"y{n}"], name=f"n{n}")
            for n, name in enumerate(weights)
        ],
        "products",
        [
            helper.make_tensor_value_info(f"x{n}", kind, [1, w.shape[1]])
            for n, w in enumerate(weights.values())
        ],
        [helper.make_tensor_value_info(f"y{n}", kind, [1, size]) for n, size in enumerate(sizes)],
        [numpy_helper.from_array(np.ascontiguousarray(w.T), name) for name, w in weights.items()],
    )
    model = quantised_by_onnxruntime(helper.make_model(graph), bits)
    theirs = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    ours = tensors(made / f"{dtype}-{quantization}")
    assert len(theirs) == 3 * len(weights)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        np.testing.assert_array_equal(ours[name], expected, name)
    got = {node.input[1]: node for node in nodes(made / f"{dtype}-{quantization}", "MatMulNBits")}
    for node in model.graph.node:
        own = got[node.input[1]]
        assert list(own.input[1:]) == list(node.input[1:])
        assert sorted(map(str, own.attribute)) == sorted(map(str, node.attribute))


@pytest.mark.parametrize("quantization", BITS)
def test_weights_stored_in_out_are_quantised_as_onnxruntimes_quantiser_does_it(
    quantization: str, tmp_path: Path
) -> None:
    """GPT-2 stores (in, out): its own file goes through onnxruntime's quantiser as it is."""
    base = make(tmp_path / "base", "gpt2")
    export(base, tmp_path / "plain")
    export(base, tmp_path / "quantized", quantization=quantization)
    model = quantised_by_onnxruntime(onnx.load(str(tmp_path / "plain/model.onnx")), BITS[quantization])
    ours = tensors(tmp_path / "quantized")
    theirs = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(theirs) == 8
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name in (name for node in theirs for name in node.input[1:]):
        np.testing.assert_array_equal(ours[name], held[name], name)
    assert verify(tmp_path / "quantized", base, new_tokens=2).passed


def test_whole_numbers_of_four_bits_are_their_own_codes() -> None:
    """From -8 to 7 in each block: scale 1, zero point 8. Two codes a byte, the first in the lower half; of a
    block that is not full the rest is 0."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (5, 40)).astype(np.float32)
    weight[:, [0, 35]], weight[:, [1, 36]] = -8, 7
    codes, scales, zero_points = block_codes([weight[:2], weight[2:]], ["a", "b"], 4, columns=False)
    np.testing.assert_array_equal(scales, np.ones((5, 2)))
    np.testing.assert_array_equal(zero_points, np.full((5, 1), 0x88))
    expected = np.zeros((5, 64), np.uint8)
    expected[:, :40] = weight + 8
    np.testing.assert_array_equal(codes, (expected[:, ::2] | expected[:, 1::2] << 4).reshape(5, 2, 16))
    turned = block_codes([np.ascontiguousarray(weight.T)], ["a"], 4, columns=True)
    for one, other in zip(turned, (codes, scales, zero_points), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_weight_of_many_parts_is_quantised_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((37, 70)).astype(np.float32)
    whole = block_codes([weight], ["a"], 4, columns=False)
    monkeypatch.setattr("loracle.export.block_codes._CHUNK_BYTES", 4 * 96 * 5)
    for one, other in zip(block_codes([weight], ["a"], 4, columns=False), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def _dequantised(held: dict[str, Array], name: str, bits: int, inputs: int) -> Array:
    codes, zero_points = held[f"{name}_Q{bits}"], held[f"{name}_zero_points"]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
        zero_points = np.stack([zero_points & 15, zero_points >> 4], -1)
    scales = held[f"{name}_scales"]
    outputs, blocks = scales.shape
    steps = codes.reshape(outputs, blocks, BLOCK) - zero_points.reshape(outputs, -1)[:, :blocks, None].astype(
        np.float64
    )
    return (steps * scales[..., None]).reshape(outputs, -1)[:, :inputs]


@pytest.mark.parametrize(("dtype", "quantization"), CASES)
def test_the_graph_computes_with_what_the_codes_stand_for(
    made: Path, tmp_path: Path, dtype: str, quantization: str
) -> None:
    """Beside an unquantised graph over the decoded weights only the rounding of activations to int8 differs:
    less than what the codes of 4 bits change. A wrong scale, zero point, row or turn is far outside."""
    bits = BITS[quantization]
    held = tensors(made / f"{dtype}-{quantization}")
    plain = tmp_path / "decoded"
    shutil.copytree(made / dtype, plain)
    model = onnx.load(str(plain / "model.onnx"))
    weights = multiplied(made / dtype)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            weight = weights[tensor.name]
            decoded = _dequantised(held, tensor.name, bits, weight.shape[1])
            tensor.CopyFrom(numpy_helper.from_array(decoded.astype(weight.dtype), tensor.name))
    onnx.save(model, str(plain / "model.onnx"))
    answers = []
    for folder in (made / f"{dtype}-{quantization}", plain, made / dtype):
        session = DecoderSession(folder, 16)
        first = session.step(PROMPT).astype(np.float64)
        second = session.step(np.array([9])).astype(np.float64)
        answers.append(np.concatenate([first, second]))
    coded, decoded, merged = answers
    activations = measure_quality([(coded, decoded)]).rms_error
    codes = measure_quality([(np.asarray(decoded), merged)]).rms_error
    assert activations > 0
    assert activations < (codes if bits == 4 else measure_quality([(merged, 0 * merged)]).rms_error / BLOCK)


@pytest.mark.parametrize("quantization", BITS)
def test_a_tied_embedding_is_one_copy_in_codes(made: Path, quantization: str) -> None:
    """The embedding is looked up in the codes that the output layer multiplies by."""
    folder, bits = made / f"fp32-{quantization}", BITS[quantization]
    held = tensors(folder)
    assert EMBEDDING not in held
    assert sorted(name for name in held if held[name].shape[:1] == (VOCABULARY,)) == [
        f"{EMBEDDING}_{suffix}" for suffix in (f"Q{bits}", "scales", "zero_points")
    ]
    (lookup,) = nodes(folder, "GatherBlockQuantized")
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    (rows,) = [node for node in graph.node if lookup.input[0] in node.output]
    assert rows.input[0] == f"{EMBEDDING}_Q{bits}"
    assert list(lookup.input[2:]) == [f"{EMBEDDING}_scales", f"{EMBEDDING}_zero_points"]


def test_an_embedding_of_its_own_keeps_its_values(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=False)
    export(base, tmp_path / "onnx", quantization="int4")
    held = tensors(tmp_path / "onnx")
    with Checkpoint(base) as checkpoint:
        np.testing.assert_array_equal(held[EMBEDDING], checkpoint.tensor(EMBEDDING))
        bias = "model.layers.0.self_attn.q_proj.bias"
        assert any(
            np.array_equal(checkpoint.tensor(bias), value[:64]) for value in held.values() if value.ndim
        )
    assert "lm_head.weight_Q4" in held
    assert verify(tmp_path / "onnx", base, new_tokens=2).passed


@pytest.mark.parametrize(("dtype", "quantization"), CASES)
def test_a_weight_takes_as_many_bytes_as_its_codes(made: Path, dtype: str, quantization: str) -> None:
    bits, held = BITS[quantization], tensors(made / f"{dtype}-{quantization}")
    for name, weight in multiplied(made / dtype).items():
        outputs, inputs = weight.shape
        blocks = -(-inputs // BLOCK)
        expected = outputs * (blocks * (BLOCK * bits // 8 + weight.itemsize) + -(-blocks * bits // 8))
        own = [value for key, value in held.items() if key.startswith(f"{name}_")]
        assert name not in held
        assert sum(value.nbytes for value in own if value.dtype != np.int64) == expected


class _Counted:
    """A source that counts how often each tensor is read."""

    def __init__(self, weights: MergedWeights) -> None:
        self.weights, self.reads = weights, dict.fromkeys(weights.names, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weights, name)

    def tensor(self, name: str, dtype: Any = None) -> Array:
        self.reads[name] += 1
        return self.weights.tensor(name, dtype)


def test_each_weight_is_merged_once_for_all_its_codes(made: Path, tmp_path: Path) -> None:
    with Checkpoint(made / "base") as checkpoint:
        options = GraphOptions(quantization="int4")
        task = task_of(checkpoint.config, "")
        template = graph_template(checkpoint, checkpoint.config, task, options)
        source = _Counted(MergedWeights(checkpoint, None))
        write_models({"model.onnx": template}, source, tmp_path)
        assert set(source.reads.values()) == {1}


@pytest.mark.parametrize(("dtype", "quantization"), CASES)
def test_a_right_quantised_export_passes_and_its_loss_is_measured(
    made: Path, dtype: str, quantization: str
) -> None:
    report = verify(made / f"{dtype}-{quantization}", made / "base", made / "adapter", new_tokens=4)
    assert [check.passed for check in report.checks] == [True] * 3
    assert report.checks[CODES].name.endswith(f"quantised to {quantization}")
    assert report.error is report.tolerance is None
    quality = report.quality
    assert quality is not None
    assert 0 < quality.rms_error < quality.largest_error
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))["quality"]
    assert told == {**quality.__dict__}


def test_fewer_bits_lose_more(made: Path) -> None:
    losses = [
        verify(made / f"fp32-{quantization}", made / "base", made / "adapter", new_tokens=2).quality
        for quantization in ("int8", "int4")
    ]
    few, many = losses
    assert few is not None
    assert many is not None
    assert few.rms_error < many.rms_error
    assert few.kl_divergence is not None
    assert many.kl_divergence is not None
    assert few.kl_divergence < many.kl_divergence


def _change(folder: Path, name: str, byte: int = 5) -> None:
    """Change the lowest bit of one byte of an initializer."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with open(folder / "model.onnx_data", "r+b") as data:
        data.seek(offset + byte)
        old = data.read(1)[0]
        data.seek(offset + byte)
        data.write(bytes([old ^ 1]))


@pytest.mark.parametrize("suffix", ["Q4", "scales", "zero_points"])
@pytest.mark.parametrize(
    "weight", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"]
)
def test_one_changed_code_scale_or_zero_point_is_found(
    made: Path, tmp_path: Path, weight: str, suffix: str
) -> None:
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "fp32-int4", candidate)
    _change(candidate, f"{weight}_{suffix}")
    report = verify(candidate, made / "base", made / "adapter", prompts=["a"], new_tokens=1)
    assert [check.passed for check in report.checks] == [True, False, True]
    assert report.checks[CODES].failures[0].startswith(f"{weight}_{suffix}: 1 of ")


def test_an_export_without_the_adapter_says_that_nothing_was_merged(made: Path, tmp_path: Path) -> None:
    export(made / "base", tmp_path / "onnx", quantization="int8")
    report = verify(tmp_path / "onnx", made / "base", made / "adapter", prompts=["a"], new_tokens=1)
    assert not report.checks[CODES].passed
    assert "the adapter was not merged" in report.checks[CODES].failures[0]
    assert verify(tmp_path / "onnx", made / "base", prompts=["a"], new_tokens=1).passed


def test_another_graph_than_the_quantised_one_is_found(made: Path, tmp_path: Path) -> None:
    """The unquantised graph under the name of a quantised one."""
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "fp32", candidate)
    model = onnx.load(str(candidate / "model.onnx"), load_external_data=False)
    (told,) = [entry for entry in model.metadata_props if entry.key == "loracle.options"]
    told.value = json.dumps({**json.loads(told.value), "quantization": "int8"})
    (candidate / "model.onnx").write_bytes(model.SerializeToString())
    report = verify(candidate, made / "base", made / "adapter", prompts=["a"], new_tokens=1)
    assert [check.passed for check in report.checks] == [False, False, True]


def test_an_output_that_is_no_number_fails(made: Path, tmp_path: Path) -> None:
    """An infinite scale of the output layer. A NaN before it would not do: rounded to int8 it is a number."""
    candidate = tmp_path / "onnx"
    shutil.copytree(made / "fp32-int4", candidate)
    model = onnx.load(str(candidate / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == f"{EMBEDDING}_scales")
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with open(candidate / "model.onnx_data", "r+b") as data:
        data.seek(offset)
        data.write(np.float32(np.inf).tobytes())
    report = verify(candidate, made / "base", made / "adapter", prompts=["a"], new_tokens=1)
    assert [check.passed for check in report.checks] == [True, False, False]
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))["quality"]
    assert told["rms_error"] is told["kl_divergence"] is told["agreement"] is None


def test_quality_is_what_its_definition_says() -> None:
    """Against sums written out; the second prompt has no error."""
    truth = np.array([[0.0, np.log(3.0)], [2.0, 0.0]])
    logits = np.array([[0.0, 0.0], [2.5, -1.0]])
    quality = measure_quality([(logits, truth), (truth, truth)])
    errors = [0.0, np.log(3.0), 0.5, 1.0]
    first = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    p, q = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-3.5))
    second = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert quality.rows == 4
    assert quality.rms_error == pytest.approx(np.sqrt(sum(error**2 for error in errors) / 8))
    assert quality.largest_error == np.log(3.0)
    assert quality.kl_divergence == pytest.approx((first + second) / 4)
    assert quality.agreement == 0.75
    assert measure_quality([(logits, truth)], logits=False) == Quality(
        2, pytest.approx(np.sqrt(sum(error**2 for error in errors) / 4)), np.log(3.0), None, None
    )


@pytest.mark.parametrize("name", ["bert", "bert_sequence", "bert_question", "bert_masked", "vit"])
def test_models_without_a_cache_are_quantised_and_verified(name: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", name)
    export(base, tmp_path / "onnx", quantization="int8")
    assert nodes(tmp_path / "onnx", "MatMulNBits")
    assert not nodes(tmp_path / "onnx", "FusedMatMul")
    report = verify(tmp_path / "onnx", base)
    assert [check.passed for check in report.checks] == [True] * 3
    assert report.quality is not None
    assert report.quality.rms_error > 0
    assert (report.quality.kl_divergence is None) == (name == "bert")


def test_an_embedding_shared_by_encoder_and_decoder_is_one_copy_in_codes(tmp_path: Path) -> None:
    """T5's encoder only looks it up, and finds it in the codes of the decoder's output layer."""
    base = make(tmp_path / "base", "t5")
    export(base, tmp_path / "onnx", quantization="int4")
    places = set()
    for file in ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"):
        onnxruntime.InferenceSession(str(tmp_path / "onnx" / file), providers=["CPUExecutionProvider"])
        model = onnx.load(str(tmp_path / "onnx" / file), load_external_data=False)
        held = {t.name: t for t in model.graph.initializer if t.dims and t.dims[0] == VOCABULARY}
        assert sorted(held) == ["shared.weight_Q4", "shared.weight_scales", "shared.weight_zero_points"]
        entries = held["shared.weight_Q4"].external_data
        places.add(next(entry.value for entry in entries if entry.key == "offset"))
    assert len(places) == 1
    report = verify(tmp_path / "onnx", base, new_tokens=2)
    assert [check.passed for check in report.checks] == [True] * 3
    assert report.quality is not None


def test_a_mixtures_router_and_experts_keep_their_values(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "mixtral")
    export(base, tmp_path / "onnx", quantization="int4")
    export(base, tmp_path / "plain")
    held, plain = tensors(tmp_path / "onnx"), tensors(tmp_path / "plain")
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        path = f"model.layers.0.mlp.{name}"
        np.testing.assert_array_equal(held[path], plain[path])
    assert "model.layers.0.self_attn.o_proj.weight_Q4" in held
    assert verify(tmp_path / "onnx", base, new_tokens=1).passed


def test_a_linked_task_costs_the_codes_that_its_adapter_changes(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "tasks"
    task = {"form": "linked", "quantization": "int4"}
    export(made / "base", out, made / "adapter", name="french", **task)
    make_adapter(tmp_path / "other", made / "base", seed=2)
    second = export(made / "base", out, tmp_path / "other", name="german", **task)
    assert second.bytes < (out / "model.onnx_data").stat().st_size
    for name, adapter in (("french", made / "adapter"), ("german", tmp_path / "other")):
        report = verify(out / f"{name}.onnx", made / "base", adapter, prompts=["a"], new_tokens=1)
        assert [check.passed for check in report.checks] == [True] * 4
    refused(
        lambda: export(made / "base", out, made / "adapter", form="linked", name="third"),
        ConfigError,
        "quantization: expected int4, as the deployment's base has it, got None; choose another --out",
    )


def test_the_commands_quantise_and_show_the_loss(made: Path, tmp_path: Path) -> None:
    model = ["--model", str(made / "base"), "--adapter", str(made / "adapter")]
    out = str(tmp_path / "onnx")
    said = CliRunner().invoke(app, ["export", *model, "--out", out, "--quantization", "int4"])
    assert said.exit_code == 0
    assert "weights in int4 and fp32, 4 of them merged" in said.stdout
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "onnx" / file).read_bytes() == (made / "fp32-int4" / file).read_bytes()
    shown = CliRunner().invoke(app, ["verify", out, *model])
    assert shown.exit_code == 0
    told = json.loads(CliRunner().invoke(app, ["verify", out, *model, "--json"]).stdout)
    assert f"quality: RMS error {told['quality']['rms_error']:.3g}, largest" in shown.stdout
    assert f"{told['quality']['rows']} rows" in shown.stdout


def test_a_quantisation_that_there_is_not_is_refused(made: Path, tmp_path: Path) -> None:
    refused(
        lambda: export(made / "base", tmp_path / "onnx", quantization="int3"),
        ConfigError,
        "quantization: expected one of int8, int4, got 'int3'",
    )
    with pytest.raises(ConfigError, match="quantization: expected none in a portable graph, got 'int8'"):
        GraphOptions(portable=True, quantization="int8")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_a_weight_without_a_code_is_refused_and_named(wrong: float) -> None:
    weight = np.zeros((70, 33), np.float32)
    weight[66, 32] = wrong
    refused(
        lambda: block_codes([weight[:60], weight[60:]], ["a", "b"], 8, columns=False),
        NonFiniteError,
        f"b: expected finite numbers to quantise, got {wrong} for output 6 and input 32; correct the weight, "
        "or export without quantization",
    )
