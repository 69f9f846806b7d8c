"""Anybody's graph is called rightly, and its answers held to the bound around the unmerged model."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architecture_runs import make_adapter as make_any
from architectures import CASES, make
from export_fixtures import make_adapter, make_model
from foreign_graphs import TOKENS, genai_export, looked_up, torch_export, torch_export_encoder
from ml_dtypes import bfloat16
from refusal import refused

from loracle.export import export
from loracle.export.external import load_graph
from loracle.export.opening import open_session
from loracle.export.tasks import TASKS, Task
from loracle.export.texts import Texts
from loracle.export.verification.foreign_inputs import Interface, Role, read_interface
from loracle.export.verification.foreign_outputs import (
    _prompts,
    answer,
    check_foreign_outputs,
    encoder_answers,
    open_foreign,
)
from loracle.export.verification.foreign_session import ForeignDecoder, ForeignSession
from loracle.export.verification.outputs_check import OutputsResult
from loracle.export.verification.weight_products import is_quantized, multiplied_dtype
from loracle.files import read_adapter, write_merged_checkpoint
from loracle.files.json_file import read_json_object
from loracle.reference import ConfigError, FileError, ShapeError

TASK = {task.name: task for task in TASKS}
TEXT = TASK["text-generation"]
TEXTS = Texts(((5, 9, 77, 30, 12, 201, 8), (3, 40, 41, 99)), ((0,) * 7, (0,) * 4))
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 48}
PEERS = Path(__file__).parents[1] / ".venv-peers/bin/python"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, onnx (merged by loracle)."""
    root = tmp_path_factory.mktemp("foreign")
    make_adapter(root / "adapter", make_model(root / "base"))
    export(root / "base", root / "onnx", root / "adapter")
    return root


@pytest.fixture(scope="module")
def merged(made: Path) -> Path:
    """The merged checkpoint, for other exporters."""
    write_merged_checkpoint(made / "base", made / "adapter", made / "merged")
    return made / "merged"


def checked(graph: Path, root: Path, task: Task = TEXT, texts: Texts | None = TEXTS) -> OutputsResult:
    return check_foreign_outputs(
        graph,
        load_graph(graph),
        task,
        root / "base",
        read_adapter(root / "adapter"),
        read_json_object(root / "base" / "config.json"),
        texts,
        5,
    )


def passes(graph: Path, root: Path, task: Task = TEXT, texts: Texts | None = TEXTS) -> bool:
    """Whether all checks pass; then the bound is tight."""
    result = checked(graph, root, task, texts)
    if not all(check.passed for check in result.checks):
        return False
    assert result.error is not None
    assert result.tolerance is not None
    assert result.tolerance / 1000 < result.error <= result.tolerance
    return True


def renamed(graph: Path, out: Path, change: Callable[[str], str]) -> Path:
    """A copy of a graph beside its data, with other names of inputs and outputs."""
    model = ir.load(graph)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = change(str(value.name))
    ir.save(model, out)
    return out


def test_a_right_graph_passes_whatever_its_inputs_are_called(made: Path) -> None:
    names = {"input_ids": "input", "attention_mask": "mask", "logits": "answers"}
    result = checked(made / "onnx/model.onnx", made)
    assert all(check.passed for check in result.checks)
    assert "19 positions" in result.checks[0].figure
    other = renamed(
        made / "onnx/model.onnx",
        made / "onnx/renamed.onnx",
        lambda name: names.get(
            name, name.replace("past_key_values.", "past_").replace("present.", "present_")
        ),
    )
    again = checked(other, made)
    assert (again.error, again.checks) == (result.error, result.checks)
    assert passes(made / "onnx/model.onnx", made)


def test_a_wrong_weight_and_another_vocabulary_are_outside(made: Path, tmp_path: Path) -> None:
    model = ir.load(made / "onnx/model.onnx")
    name = next(name for name in model.graph.initializers if "layers.1.mlp.down_proj" in name)
    value = model.graph.initializers[name]
    wrong = value.const_value.numpy().copy()
    wrong[3, 3] += 0.05
    value.const_value = ir.tensor(wrong, name=name)
    ir.save(model, made / "onnx/wrong.onnx")
    result = checked(made / "onnx/wrong.onnx", made)
    assert not result.checks[0].passed
    assert result.checks[0].failures[0].startswith("prompt 1, position ")
    looked_up(tmp_path / "model.onnx")
    (failed,) = checked(tmp_path / "model.onnx", made, texts=Texts(((3, 4),), ((0, 0),))).checks
    assert failed.failures == ("prompt 1: expected logits (6, 264), got (6, 6)",)


def test_where_a_prompts_logits_are_the_last_ones_these_are_compared(made: Path) -> None:
    model = ir.load(made / "onnx/model.onnx")
    kept = model.graph.initializers["num_logits_to_keep"]
    kept.const_value = ir.tensor(np.array([1], np.int64), name=kept.name)
    ir.save(model, made / "onnx/last.onnx")
    result = checked(made / "onnx/last.onnx", made)
    assert all(check.passed for check in result.checks)
    assert "10 positions" in result.checks[0].figure
    assert result.checks[1].figure == checked(made / "onnx/model.onnx", made).checks[1].figure


def test_prompts_have_positions_for_their_answers(made: Path, tmp_path: Path) -> None:
    refused(
        lambda: checked(made / "onnx/model.onnx", made, texts=Texts(((5,) * 125,), ((0,) * 125,))),
        ShapeError,
        "prompt 1: expected at most 128 tokens with its answer, as many as the model has positions, got 129; "
        "shorten it",
    )
    looked_up(tmp_path / "model.onnx", width=6)
    texts = Texts(((1, 2, 3, 4), (1,) * 9), ((0,) * 4, (0,) * 9))
    # The last token is not read.
    assert _prompts(decoder_of(tmp_path / "model.onnx"), texts, {}, 5) == [((1, 2, 3, 4), 3), ((1,) * 6, 1)]


def decoder_of(path: Path, config: dict[str, Any] = CONFIG) -> ForeignDecoder:
    return ForeignDecoder(open_foreign(path, TEXT, config))


IDS = np.array([3, 1, 5, 0])


def test_a_graph_without_a_cache_reads_the_whole_text_each_time(tmp_path: Path) -> None:
    table = looked_up(tmp_path / "model.onnx", named={"input_ids": "x", "logits": "y"})
    decoder = decoder_of(tmp_path / "model.onnx")
    assert np.array_equal(decoder.step(IDS), table[IDS])
    assert np.array_equal(decoder.step(IDS[:2]), table[IDS[:2]])
    assert decoder.longest is None


@pytest.mark.parametrize("rows", ["batch", 3])
def test_a_graph_of_one_length_is_padded_behind(tmp_path: Path, rows: int | str) -> None:
    table = looked_up(tmp_path / "model.onnx", width=6, rows=rows)
    decoder = decoder_of(tmp_path / "model.onnx")
    assert np.array_equal(decoder.step(IDS), table[IDS])
    assert np.array_equal(decoder.step(IDS[2:3]), table[IDS[2:3]])
    assert decoder.longest == 6


@pytest.mark.parametrize("past", [("batch", 1, "past", 1), (1, 1, "old", 1), ("b", "heads", "past", "w")])
@pytest.mark.parametrize("width", ["sequence", 1])
def test_a_cache_begins_empty_and_grows(tmp_path: Path, past: tuple[Any, ...], width: int | str) -> None:
    """The logits have the sum of all tokens so far; where one token is read at a time that of each."""
    table = looked_up(tmp_path / "model.onnx", past=past, width=width)
    decoder = decoder_of(tmp_path / "model.onnx", {"num_attention_heads": 1, "head_dim": 1})
    sums = np.cumsum(IDS) if width == 1 else np.full(4, IDS.sum())
    for _ in range(2):
        decoder.reset()
        assert np.array_equal(decoder.step(IDS), table[IDS] + sums[:, None])
        assert np.array_equal(decoder.step(IDS[:1]), table[IDS[:1]] + IDS.sum() + IDS[0])
    assert decoder.longest is None


@pytest.mark.parametrize("past", [(), ("batch", 1, "past", 1)])
def test_where_logits_are_the_last_positions_alone_all_come_token_by_token(
    tmp_path: Path, past: tuple[Any, ...]
) -> None:
    table = looked_up(tmp_path / "model.onnx", past=past, last=True)
    decoder = decoder_of(tmp_path / "model.onnx")
    assert decoder.step(IDS).shape == (1, TOKENS)
    expected = table[IDS] + (np.cumsum(IDS)[:, None] if past else 0)
    assert np.array_equal(decoder.logits(IDS), expected)
    assert np.array_equal(decoder.logits(IDS), expected)


def test_a_cache_beside_a_fixed_number_of_tokens_is_refused(tmp_path: Path) -> None:
    looked_up(tmp_path / "model.onnx", past=("batch", 1, "past", 1), width=4)
    refused(
        lambda: decoder_of(tmp_path / "model.onnx"),
        FileError,
        f"{tmp_path}/model.onnx: expected any number of tokens beside a cache, found 4; export the model "
        "with a dynamic length",
    )


GRAPH = Path("m.onnx")


def node(name: str, kind: str, *axes: int | str | None) -> Any:
    return SimpleNamespace(name=name, type=f"tensor({kind})", shape=list(axes))


def interface(inputs: list[Any], outputs: list[Any], wanted: tuple[str, ...] = ("logits",)) -> Interface:
    session = SimpleNamespace(get_inputs=lambda: inputs, get_outputs=lambda: outputs)
    return read_interface(session, GRAPH, wanted, CONFIG)


IDS_INPUT, LOGITS = node("input_ids", "int64", "b", "s"), node("logits", "float", "b", "s", 9)


def test_inputs_are_told_by_name_type_and_axes() -> None:
    own = interface(
        [
            IDS_INPUT,
            node("attention_mask", "float", "b", "t"),
            node("position_ids", "int32", "b", "s"),
            node("cache_position", "int64", "s"),
            node("token_type_ids", "int64", "b", "s"),
            node("num_logits_to_keep", "int64"),
            node("past_length", "int64", 1),
            node("total_sequence_length", "int32"),
            node("use_cache_branch", "bool", 1),
        ],
        [LOGITS],
    )
    assert {role: entry.name for role, entry in own.inputs.items()} == {
        Role.TOKENS: "input_ids",
        Role.MASK: "attention_mask",
        Role.POSITIONS: "position_ids",
        Role.CACHE_POSITIONS: "cache_position",
        Role.SEGMENTS: "token_type_ids",
        Role.KEPT_LOGITS: "num_logits_to_keep",
        Role.PAST_LENGTH: "past_length",
        Role.TOTAL_LENGTH: "total_sequence_length",
        Role.HAS_PAST: "use_cache_branch",
    }


def test_each_role_is_fed_with_what_it_is() -> None:
    """Two tokens behind three cached ones."""
    names = {
        "input_ids": ("int32", ("b", "s")),
        "mask": ("bool", ("b", "t")),
        "position_ids": ("int64", ("s",)),
        "cache_position": ("int64", ("s",)),
        "segment_ids": ("int64", ("b", "s")),
        "logits_to_keep": ("int64", ()),
        "past_length": ("int64", (1,)),
        "total_length": ("int32", ()),
        "use_cache": ("bool", (2,)),
        "past.0.key": ("float16", ("b", 2, "p", 12)),
    }
    seen = {}

    def run(outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        seen.update(feeds)
        return outputs

    session = SimpleNamespace(
        get_inputs=lambda: [node(name, kind, *axes) for name, (kind, axes) in names.items()],
        get_outputs=lambda: [LOGITS, node("present.0.key", "float16", "b", 2, "t", 12)],
        run=run,
    )
    foreign = ForeignSession(session, read_interface(session, GRAPH, ["logits"], CONFIG))
    cache = [np.ones((1, 2, 3, 12), np.float16)]
    ids, mask = np.array([[7, 8]]), np.array([[1, 1, 1, 1, 0]])
    found = foreign.run_texts(ids, mask, cache=cache, more=["z"])
    assert found == ["logits", "present.0.key", "z"]
    assert {
        name: (array.tolist(), str(array.dtype)) for name, array in seen.items() if name != "past.0.key"
    } == {
        "input_ids": ([[7, 8]], "int32"),
        "mask": ([[True] * 4 + [False]], "bool"),
        "position_ids": ([3, 4], "int64"),
        "cache_position": ([3, 4], "int64"),
        "segment_ids": ([[0, 0]], "int64"),
        "logits_to_keep": (0, "int64"),
        "past_length": ([3], "int64"),
        "total_length": (5, "int32"),
        "use_cache": ([True, True], "bool"),
    }
    assert seen["past.0.key"] is cache[0]
    foreign.run_texts(ids, mask[:, :2])
    assert seen["past.0.key"].shape == (1, 2, 0, 12)
    assert seen["past.0.key"].dtype == np.float16
    assert seen["use_cache"].tolist() == [False, False]


def test_an_output_of_another_name_is_the_only_one_beside_the_cache_or_the_first() -> None:
    answers, key = node("answers", "float", "b", "s", 9), node("past_0_key", "float", "b", 2, "p", 12)
    present = node("3210", "float", "b", 2, "t", 12)
    own = interface([IDS_INPUT, key], [answers, present])
    assert (own.outputs, own.cache[0].present) == (("answers",), "3210")
    refused(
        lambda: interface(
            [IDS_INPUT], [node("a", "float", "b", 9), node("b", "float", "b", 9)], ("start", "end")
        ),
        FileError,
        "m.onnx: start: expected among the outputs, found a, b",
    )


def test_a_cache_goes_on_in_the_output_of_its_layer_whatever_the_order() -> None:
    axes = ("b", 2, "p", 12)
    pasts = [
        node(f"past_key_values.{name}", "float", *axes) for name in ("1.key", "1.value", "0.key", "0.value")
    ]
    presents = [node(f"present.{name}", "float", *axes) for name in ("0.key", "0.value", "1.key", "1.value")]
    own = interface([IDS_INPUT, *pasts], [LOGITS, *presents])
    assert [(place.past.name[16:], place.present[8:]) for place in own.cache] == [
        (name, name) for name in ("1.key", "1.value", "0.key", "0.value")
    ]
    unnamed = [node(name, "float", *axes) for name in ("w", "x", "y", "z")]
    own = interface([IDS_INPUT, *pasts], [LOGITS, *unnamed])
    assert [place.present for place in own.cache] == ["w", "x", "y", "z"]
    refused(
        lambda: interface([IDS_INPUT, *pasts], [LOGITS, *presents[:3]]),
        FileError,
        "m.onnx: past_key_values.1.key: expected an output for each of the cache's 4 inputs, found 3 outputs",
    )


@pytest.mark.parametrize(
    ("axes", "empty"),
    [
        (("b", 2, "past", 12), (1, 2, 0, 12)),
        ((None, 2, None, 12), (1, 2, 0, 12)),
        ((1, "past", 2, 12), (1, 0, 2, 12)),
        (("b", "past", 2, 12), (1, 0, 2, 12)),
        (("b", 2, "past", "width"), (1, 2, 0, 12)),
        (("b", "heads", "past", "width"), (1, 2, 0, 12)),
        ((2, "b", 4, "past", 12), (2, 1, 4, 0, 12)),
    ],
)
def test_the_axis_along_which_a_cache_grows_is_found(
    axes: tuple[int | str | None, ...], empty: tuple[int, ...]
) -> None:
    present = node("present", "float", *axes)
    assert interface([IDS_INPUT, node("past", "float", *axes)], [LOGITS, present]).cache[0].empty == empty


REFUSED: dict[str, tuple[list[Any], str]] = {
    "a float that is nothing": (
        [IDS_INPUT, node("alpha", "float", 1)],
        "alpha: expected inputs for tokens, their mask, positions and segments, pixels, or a cache, found "
        "float32 [1], which is not understood; export the model without it",
    ),
    "a scale of a cache": (
        [IDS_INPUT, node("past_key_scale", "float", 1)],
        "past_key_scale: expected inputs for tokens, their mask, positions and segments, pixels, or a cache, "
        "found float32 [1], which is not understood; export the model without it",
    ),
    "states of an encoder": (
        [IDS_INPUT, node("encoder_hidden_states", "float", "b", "s", 48)],
        "encoder_hidden_states: expected inputs for tokens, their mask, positions and segments, pixels, or a "
        "cache, found float32 ['b', 's', 48], which is not understood; export the model without it",
    ),
    "two of one role": (
        [IDS_INPUT, node("inputs", "int64", "b", "s")],
        "inputs: expected inputs for tokens, their mask, positions and segments, pixels, or a cache, found "
        "int64 ['b', 's'], which is not understood; export the model without it",
    ),
    "strings": (
        [node("text", "string", "b")],
        "text: expected an input of tensor(int64), tensor(int32), tensor(bool), tensor(double), "
        "tensor(float), tensor(float16), got tensor(string)",
    ),
    "a cache of a fixed size": (
        [IDS_INPUT, node("past", "float", "b", 2, 64, 12)],
        "past: expected a cache that grows along one axis, found ['b', 2, 64, 12]; export the model with a "
        "dynamic cache, or with none",
    ),
    "more tokens than memory holds": (
        [node("input_ids", "int64", 64, 512)],
        "input_ids: expected an input of at most 16384 entries, got [64, 512]; export the model with open "
        "axes",
    ),
    "a cache wider than memory": (
        [IDS_INPUT, node("past", "float", "b", 2**16, "past", 2**9)],
        "past: expected an input of at most 16777216 entries, got ['b', 65536, 'past', 512]; export the "
        "model with open axes",
    ),
    "an axis of no length": (
        [node("input_ids", "int64", 0, "s")],
        "input_ids: expected an input of at most 16384 entries, got [0, 's']; export the model with open "
        "axes",
    ),
    "no text": (
        [node("attention_mask", "int64", "b", "s")],
        "expected inputs of a text (input_ids and what belongs to it), or pixels alone, found attention_mask",
    ),
    "pixels and a text": (
        [IDS_INPUT, node("pixel_values", "float", "b", 3, 8, 8)],
        "expected inputs of a text (input_ids and what belongs to it), or pixels alone, found input_ids, "
        "pixel_values",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_named(what: str) -> None:
    inputs, message = REFUSED[what]
    outputs = [LOGITS, node("present", "float", "b", 2, 64, 12)]
    refused(lambda: interface(inputs, outputs), FileError, f"m.onnx: {message}")


def test_models_of_several_graphs_and_positions_that_do_not_begin_at_0_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    looked_up(path)
    refused(
        lambda: open_foreign(path, TASK["text2text-generation"], {}),
        ConfigError,
        f"{path}: expected a model of one graph, got one for text2text-generation; verify its weights alone",
    )
    looked_up(path, masked=True, named={"attention_mask": "position_ids"})
    refused(
        lambda: open_foreign(path, TASK["fill-mask"], {"model_type": "roberta"}),
        ConfigError,
        f"{path}: position_ids: expected a graph that counts positions itself, got one that is given them; "
        "export the model without it",
    )
    assert open_foreign(path, TASK["fill-mask"], {"model_type": "bert"}).has(Role.POSITIONS)


def test_a_dtype_is_that_of_most_entries_and_codes_are_told_from_weights() -> None:
    def graph(*products: tuple[str, np.dtype[Any], tuple[int, int], bool]) -> ir.Graph:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
        nodes, initializers = [], []
        for number, (kind, dtype, shape, cast) in enumerate(products):
            tensor = ir.tensor(np.zeros(shape, dtype), name=f"w{number}")
            weight = ir.Value(
                name=f"w{number}", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            initializers.append(weight)
            if cast:
                nodes.append(ir.node("Cast", [weight], {"to": int(ir.DataType.FLOAT)}))
                weight = nodes[-1].outputs[0]
                weight.dtype = ir.DataType.FLOAT
            inputs = [weight] if kind == "DequantizeLinear" else [x, weight]
            nodes.append(ir.node(kind, inputs))
        return ir.Graph(
            [x], [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports={"": 20}
        )

    single, half = np.dtype(np.float32), np.dtype(np.float16)
    assert (
        multiplied_dtype(graph(("MatMul", single, (4, 4), False), ("MatMul", half, (2, 4), False))) == single
    )
    assert multiplied_dtype(graph(("MatMul", single, (2, 4), False), ("Gemm", half, (4, 4), False))) == half
    # Stored in float16, multiplied in float32: the weights have the rounding of float16.
    assert multiplied_dtype(graph(("MatMul", half, (4, 4), True))) == half
    assert multiplied_dtype(graph(("Relu", half, (4, 4), False))) == single
    # Merged in one dtype, held in another.
    merged = np.dtype(bfloat16)
    assert multiplied_dtype(graph(("MatMul", single, (4, 4), False)), merged) == merged
    assert multiplied_dtype(graph(("MatMul", half, (4, 4), False)), single) == half
    assert not is_quantized(graph(("MatMul", single, (4, 4), False)))
    assert is_quantized(
        graph(("MatMul", single, (4, 4), False), ("MatMulNBits", np.dtype(np.uint8), (4, 4), False))
    )
    assert is_quantized(graph(("DequantizeLinear", np.dtype(np.int8), (4, 4), False)))
    # What is computed has codes too where activations are quantised; then the products tell.
    computed = graph(("DequantizeLinear", np.dtype(np.int8), (4, 4), True))
    computed.node(1).inputs[0].shape = ir.Shape((4, 4))
    assert not is_quantized(computed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_torchs_graph_with_a_cache(made: Path, merged: Path, tmp_path: Path, dtype: str) -> None:
    assert passes(torch_export(merged, tmp_path / "torch", dtype=dtype), made)


@pytest.mark.slow
def test_torchs_graph_without_a_cache(made: Path, merged: Path, tmp_path: Path) -> None:
    assert passes(torch_export(merged, tmp_path / "torch", cache=False), made)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_genais_graph(made: Path, merged: Path, tmp_path: Path, precision: str) -> None:
    assert passes(genai_export(merged, tmp_path / "genai", precision), made)
    # The base alone is another model.
    assert not passes(genai_export(made / "base", tmp_path / "base", precision), made)


@pytest.mark.slow
def test_genais_quantised_graph_is_measured(made: Path, merged: Path, tmp_path: Path) -> None:
    result = checked(genai_export(merged, tmp_path / "genai", "int4"), made)
    assert result.tolerance is None
    assert result.quality is not None
    assert result.quality.finite
    assert all(check.passed for check in result.checks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "gpt2"])
def test_optimums_graph(made: Path, merged: Path, tmp_path: Path, kind: str) -> None:
    if not PEERS.is_file():
        pytest.skip("needs .venv-peers")
    from benchmarks.peers import OFFLINE, compatible, optimum_exporter

    root, source = made, merged
    if kind == "gpt2":
        root = tmp_path
        make_any(make(root / "base", "gpt2"), "gpt2", root / "adapter")
        write_merged_checkpoint(root / "base", root / "adapter", root / "merged")
        command = optimum_exporter(PEERS, root / "merged", tmp_path / "optimum")
    else:
        command = optimum_exporter(PEERS, compatible(source, tmp_path / "older"), tmp_path / "optimum")
    subprocess.run(command, env={**os.environ, **OFFLINE}, check=True, capture_output=True)
    assert passes(tmp_path / "optimum/model.onnx", root)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, onnx and merged of a BERT that classifies texts."""
    root = tmp_path_factory.mktemp("classifier")
    make_any(make(root / "base", "bert_sequence"), "bert_sequence", root / "adapter")
    write_merged_checkpoint(root / "base", root / "adapter", root / "merged")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("length", [None, 7])
def test_torchs_classifier_with_open_axes_or_for_one_length(
    classifier: Path, tmp_path: Path, length: int | None
) -> None:
    auto, task = "AutoModelForSequenceClassification", TASK["text-classification"]
    graph = torch_export_encoder(classifier / "merged", auto, tmp_path / "onnx", length=length)
    texts = Texts(TEXTS.tokens[: 1 if length else 2], TEXTS.types[: 1 if length else 2])
    assert passes(graph, classifier, task, texts)
    wrong = torch_export_encoder(classifier / "base", auto, tmp_path / "wrong", length=length)
    assert not passes(wrong, classifier, task, texts)


def test_an_encoder_of_one_length_gets_texts_of_that_length(tmp_path: Path) -> None:
    """Cut, or repeated where nothing masks padding; with a mask padded, and what belongs to padding left
    out."""
    path, task = tmp_path / "model.onnx", TASK["token-classification"]
    table = looked_up(path, width=4, rows=2)
    texts = Texts(((5, 4, 3, 2, 1), (1, 2)), ((0,) * 5, (0,) * 2))
    session = open_foreign(path, task, {})
    batches, answers = encoder_answers(session, task, texts, {})
    assert [feeds["input_ids"].tolist() for feeds in batches] == [[[5, 4, 3, 2]], [[1, 2, 1, 2]]]
    for feeds, (logits,) in zip(batches, answers, strict=True):
        assert np.array_equal(logits, table[feeds["input_ids"]])
    refused(
        lambda: answer(session, task, {"input_ids": np.ones((1, 3), np.int64)}),
        ShapeError,
        f"{path}: expected a text of 4 tokens, for the graph reads so many and has no mask, got 3; give "
        "longer texts",
    )
    looked_up(path, width=4, rows=2, masked=True)
    batches, answers = encoder_answers(open_foreign(path, task, {}), task, texts, {})
    assert [feeds["input_ids"].tolist() for feeds in batches] == [[[5, 4, 3, 2]], [[1, 2]]]
    for feeds, (logits,) in zip(batches, answers, strict=True):
        # The graph adds the mask's sum.
        assert np.array_equal(logits, table[feeds["input_ids"]] + feeds["input_ids"].size)
    pooled = encoder_answers(open_foreign(path, task, {}), TASK["text-classification"], texts, {})[1]
    assert [logits.shape for (logits,) in pooled] == [(1, 4, TOKENS)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bert_sequence", "bert_token", "bert_question", "bert", "vit", "llama_sequence"]
)
def test_our_own_encoders_pass_as_anybodys(tmp_path: Path, name: str) -> None:
    make_any(make(tmp_path / "base", name), name, tmp_path / "adapter")
    export(tmp_path / "base", tmp_path / "onnx", tmp_path / "adapter")
    task = TASK[CASES[name].task]
    graph = tmp_path / "onnx/model.onnx"
    assert passes(graph, tmp_path, task, None if name == "vit" else TEXTS)
    assert open_session(graph).get_inputs()
