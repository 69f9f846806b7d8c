"""`verify` of models without a cache: what is right passes, and a wrong weight is seen in the outputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architecture_runs import make_adapter
from architectures import make
from export_fixtures import write_tokenizer
from refusal import refused

from loracle.export import export, verify
from loracle.export.encoder_inputs import text_inputs
from loracle.export.tasks import TASKS
from loracle.export.texts import Texts, texts_of
from loracle.export.verification.encoder_check import Compared, _answers_check, _judged
from loracle.reference import ConfigError, DataError, FileError, ShapeError

TASK = {task.name: task for task in TASKS}
NOTE = "tokens drawn from a seed, for there is no tokenizer.json"
CASES = (
    "bert",
    "bert_sequence",
    "bert_token",
    "bert_question",
    "roberta",
    "vit",
    "llama_sequence",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with base, adapter and onnx (merged) of a case, made once."""
    root = tmp_path_factory.mktemp("encoders")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            base = make(root / name / "base", name)
            if name == "bert_sequence":
                write_tokenizer(base)
            make_adapter(base, name, root / name / "adapter")
            export(base, root / name / "onnx", root / name / "adapter")
        return root / name

    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_right_export_passes_every_check_and_the_bound_is_tight(
    made: Callable[[str], Path], name: str
) -> None:
    root = made(name)
    report = verify(root / "onnx", root / "base", root / "adapter")
    assert report.passed, report.checks
    assert len(report.checks) == (3 if name == "bert" else 4)
    assert report.error is not None
    assert report.tolerance is not None
    assert report.tolerance / 1000 < report.error <= report.tolerance
    assert (NOTE in report.checks[2].figure) == (name not in ("bert_sequence", "vit"))


@pytest.mark.parametrize("name", ["bert_sequence", "bert_question", "vit"])
def test_the_outputs_alone_catch_a_changed_row(
    made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    root = made(name)
    shutil.copytree(root / "onnx", tmp_path / "onnx")
    graph = ir.load(tmp_path / "onnx/model.onnx").graph
    tensor = next(
        value.const_value
        for key, value in graph.initializers.items()
        if key.endswith(("layer.1.output.dense.weight", "layers.1.mlp.fc2.weight"))
    )
    assert isinstance(tensor, ir.ExternalTensor)
    with open(tmp_path / "onnx/model.onnx_data", "r+b") as data:
        data.seek(tensor.offset or 0)
        data.write(np.full(8, 0.5, np.float32).tobytes())
    report = verify(tmp_path / "onnx", root / "base", root / "adapter")
    assert [check.passed for check in report.checks[:3]] == [True, False, False]


def test_prompts_need_the_tokenizer(made: Callable[[str], Path]) -> None:
    root = made("bert_token")
    path = root / "onnx" / "tokenizer.json"
    refused(
        lambda: verify(root / "onnx", root / "base", root / "adapter", prompts=["a"]),
        FileError,
        f"{path}: expected a fast tokenizer's file, found none",
    )


def test_texts_are_prompts_or_pairs_of_them_or_drawn(tmp_path: Path) -> None:
    config = {"vocab_size": 12, "pad_token_id": 0, "eos_token_id": 5}
    drawn = texts_of(tmp_path, config, None, pairs=True)
    assert drawn.note == NOTE
    assert {token for text in drawn.tokens for token in text}.isdisjoint({0, 5})
    assert all(0 in types and 1 in types for types in drawn.types)
    assert texts_of(tmp_path, config, None).types[0] == (0,) * len(drawn.tokens[0])
    refused(
        lambda: texts_of(tmp_path, {}, None),
        ConfigError,
        f"{tmp_path}: expected tokenizer.json, or vocab_size in config.json to draw tokens from, got "
        "neither; put the model's tokenizer beside it",
    )
    write_tokenizer(tmp_path)
    alone = texts_of(tmp_path, config, ["ab", "c"])
    assert [len(text) for text in alone.tokens] == [2, 1]
    assert alone.note == ""
    paired = texts_of(tmp_path, config, ["ab", "c"], pairs=True)
    assert paired.tokens == (alone.tokens[0] + alone.tokens[1], alone.tokens[1] + alone.tokens[0])
    assert paired.types == ((0, 0, 1), (0, 1, 1))
    refused(
        lambda: texts_of(tmp_path, config, ["ab", ""]),
        DataError,
        "prompt 2: expected some text, got no token; leave it out",
    )


def test_texts_are_one_batch_where_the_model_can_pad() -> None:
    texts = Texts(((7, 8, 9), (4,)), ((0, 1, 1), (0,)))
    (batch,) = text_inputs(texts, ("input_ids", "attention_mask", "token_type_ids"), {"pad_token_id": 3})
    assert batch["input_ids"].tolist() == [[7, 8, 9], [4, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    alone = text_inputs(texts, ("input_ids", "attention_mask"), {"pad_token_id": None})
    assert [one["input_ids"].tolist() for one in alone] == [[[7, 8, 9]], [[4]]]
    assert all(set(one) == {"input_ids", "attention_mask"} for one in alone)
    config = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 5}
    assert text_inputs(texts, ("input_ids",), config)
    refused(
        lambda: text_inputs(texts, ("input_ids",), {**config, "max_position_embeddings": 4}),
        ShapeError,
        "text 1: expected at most 2 tokens, as many as the model has positions, got 3; shorten it",
    )


def _one(got: Any, truth: Any, tolerance: float = 0.5, counted: Any = None) -> Compared:
    return Compared(np.array(got, np.float32), np.array(truth, np.float64), tolerance, counted)


def test_only_entries_that_count_are_judged_and_nan_is_outside() -> None:
    mask = np.array([[True, False]])
    states = [[[1.0, 2.0], [9.0, np.nan]]], [[[1.25, 2.0], [0.0, 0.0]]]
    result = _judged(TASK["feature-extraction"], [_one(*states, counted=mask)])
    assert result.checks[0].passed
    assert (result.error, result.tolerance) == (0.25, 0.5)
    outside = _judged(TASK["feature-extraction"], [_one(*states)]).checks[0]
    assert outside.failures == ("output 1 [0,1,1]: error nan, tolerance 0.5",)
    wrong = _judged(TASK["text-classification"], [_one([[1.0]], [[1.0, 0.0]])]).checks[0]
    assert wrong.failures == ("output 1: expected shape (1, 2), got (1, 1)",)


def test_an_answer_may_differ_only_where_the_margin_is_within_the_bound() -> None:
    task = TASK["text-classification"]
    check = _answers_check(task, [_one([[0.0, 1.0], [3.0, 0.0]], [[0.75, 0.0], [0.0, 1.25]])])
    assert check.failures == ("output 1 [1]: margin 1.25",)
    assert check.figure == "2 answers; ties within the bound: output 1 [0]: margin 0.75"
    mask = np.array([[True, True, False]])
    starts = _one([[0.0, 4.0, 9.0]], [[0.0, 3.0, 8.0]], counted=mask)
    assert _answers_check(TASK["question-answering"], [starts]).passed
    starts = _one([[4.0, 0.0, 9.0]], [[0.0, 3.0, 8.0]], counted=mask)
    assert _answers_check(TASK["question-answering"], [starts]).failures == ("output 1 [0]: margin 3",)
    tokens = _one([[[1.0, 0.0]] * 3], [[[1.0, 0.0], [1.0, 0.0], [0.0, 9.0]]], counted=mask)
    assert _answers_check(TASK["token-classification"], [tokens]).passed
