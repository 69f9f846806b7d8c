"""What `loracle run` says with models that do not generate is what transformers says of the same texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from architectures import AUTO, CASES, make
from export_fixtures import write_tokenizer
from refusal import refused
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.export import export
from loracle.export.encoder_answers import _scores, answer_texts, encoder_task
from loracle.reference import ConfigError, DataError, FileError

RUNNER = CliRunner()
MASK = "<mask>"
TEXTS = ("a short text", "another, of more letters than the first")


def write_masked_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for what is masked, which puts a text between two special tokens."""
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([MASK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": {"content": MASK}}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("answers")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            base = make(root / name / "base", name)
            write_masked_tokenizer(base)
            export(base, root / name / "onnx")
        return root / name / "onnx"

    return folder


def probabilities(folder: Path, name: str, text: str) -> tuple[Any, list[int]]:
    """The softmax of torch's logits for one text without padding, and its tokens."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    model = getattr(hf, AUTO[CASES[name].task]).from_pretrained(folder.parent / "base").eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.softmax(logits.double(), -1).numpy(), ids


@pytest.mark.parametrize("name", ["bert_sequence", "llama_sequence"])
def test_all_classes_come_by_their_probability(exported: Callable[[str], Path], name: str) -> None:
    folder = exported(name)
    answers = answer_texts(folder, TEXTS)
    for text, answer in zip(TEXTS, answers, strict=True):
        expected, _ = probabilities(folder, name, text)
        assert [one.label for one in answer] == [f"LABEL_{index}" for index in np.argsort(-expected)]
        np.testing.assert_allclose([one.score for one in answer], np.sort(expected)[::-1], rtol=1e-4)


def test_each_token_but_special_ones_has_its_class(exported: Callable[[str], Path], tmp_path: Path) -> None:
    folder = exported("bert_token")
    text = "abcd"
    expected, ids = probabilities(folder, "bert_token", text)
    chosen = expected.argmax(-1)
    (answer,) = answer_texts(folder, [text])
    places = [(0, 1), (1, 2), (2, 3), (3, 4)]
    rows = [1, 2, 3, 4]
    assert len(ids) == 6
    assert [(one.label, one.place) for one in answer] == [
        (f"LABEL_{chosen[row]}", place) for row, place in zip(rows, places, strict=True)
    ]
    np.testing.assert_allclose([one.score for one in answer], expected.max(-1)[rows], rtol=1e-4)
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["id2label"][str(chosen[1])] = "O"
    (copy / "config.json").write_text(json.dumps(config))
    (without,) = answer_texts(copy, [text])
    assert [one.place for one in without] == [
        place for row, place in zip(rows, places, strict=True) if chosen[row] != chosen[1]
    ]
    del config["id2label"]["4"]
    (copy / "config.json").write_text(json.dumps(config))
    refused(
        lambda: answer_texts(copy, [text]),
        FileError,
        f"{copy / 'config.json'}: id2label: expected 5 labels, one for each output, got 4",
    )


def test_each_mask_has_its_most_likely_tokens(exported: Callable[[str], Path]) -> None:
    folder = exported("bert_masked")
    text = f"{MASK} and {MASK}"
    expected, ids = probabilities(folder, "bert_masked", text)
    (answer,) = answer_texts(folder, [text], top=3)
    scores = [score for row, token in zip(expected, ids, strict=True) if token == 258 for score in row]
    best = np.sort(np.reshape(scores, (2, -1)))[:, ::-1][:, :3]
    np.testing.assert_allclose([one.score for one in answer], best.reshape(-1), rtol=1e-4)
    refused(
        lambda: answer_texts(folder, [text, "none"]),
        DataError,
        f"prompt 2: expected {MASK} for each token to fill in, found none",
    )


def test_classes_that_do_not_exclude_each_other_have_probabilities_of_their_own() -> None:
    logits = np.array([0.0, np.log(3.0)])
    assert np.allclose(_scores(logits, None), [0.25, 0.75])
    assert np.allclose(_scores(logits, "multi_label_classification"), [0.5, 0.75])
    assert np.array_equal(_scores(logits, "regression"), logits)
    assert np.allclose(_scores(logits[1:], None), [0.75])


def test_the_command_prints_a_line_a_class_or_token(exported: Callable[[str], Path]) -> None:
    for name in ("bert_sequence", "bert_token"):
        folder = exported(name)
        expected = answer_texts(folder, TEXTS)
        given = [part for text in TEXTS for part in ("--prompt", text)]
        result = RUNNER.invoke(app, ["run", str(folder), *given])
        assert result.exit_code == 0
        lines = [
            f"[{number}] {one.label}  {one.score:.3f}"
            + ("" if one.place is None else f"  {text[slice(*one.place)]!r}")
            for number, (text, answer) in enumerate(zip(TEXTS, expected, strict=True), 1)
            for one in answer
        ]
        assert result.stdout.splitlines() == lines
        result = RUNNER.invoke(app, ["run", str(folder), *given, "--json"])
        told = json.loads(result.stdout)["answers"]
        assert [[one["score"] for one in answer] for answer in told] == [
            [one.score for one in answer] for answer in expected
        ]
    assert told[1][0] == {
        "label": expected[1][0].label,
        "score": expected[1][0].score,
        "start": expected[1][0].place[0],
        "end": expected[1][0].place[1],
    }


def test_other_tasks_name_what_runs_them(exported: Callable[[str], Path]) -> None:
    folder = exported("bert_question")
    refused(
        lambda: answer_texts(folder, TEXTS),
        ConfigError,
        f"{folder}: expected a model that classifies, fills masks or generates, got question-answering; run "
        "it with optimum.onnxruntime.ORTModelForQuestionAnswering",
    )


def test_a_prompt_without_tokens_is_refused(exported: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported("bert_sequence"), tmp_path / "onnx")
    write_tokenizer(folder)
    refused(
        lambda: answer_texts(folder, ["a", ""]),
        DataError,
        "prompt 2: expected some text, got no token",
    )
    assert encoder_task(Path("nowhere")) is None
