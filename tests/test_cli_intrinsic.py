"""`loracle intrinsic` as a user meets it: a table, JSON, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from task_fixtures import tiny_bert, write_words_model
from torch_fixtures import write_lines
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.reference import ConfigError
from loracle.torch_impl.intrinsic import IntrinsicOptions

RUNNER = CliRunner()
WORDS = [f"{first}{second}{third}" for first in "abcd" for second in "abcd" for third in "abcd"]
LABELLED = [{"text": word, "label": "early" if word[0] in "ab" else "late"} for word in WORDS]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intrinsic")
    write_words_model(root / "model", tiny_bert())
    write_lines(root / "data.jsonl", LABELLED)
    (root / "empty.jsonl").touch()
    return root


def call(made: Path, out: Path, *arguments: object) -> tuple[int, str, str]:
    common = ("--model", made / "model", "--data", made / "data.jsonl", "--out", out, "--no-bf16")
    result = RUNNER.invoke(app, ["intrinsic", *map(str, (*common, *arguments))])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_it_prints_what_it_found(made: Path, tmp_path: Path) -> None:
    small = ("--dims", "40,2", "--lr", "0.01", "--full-lr", "0.01", "--max-steps", 12)
    code, out, error = call(made, tmp_path / "table", *small)
    assert (code, error) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows[1:3]] == [["2", "0.01"], ["40", "0.01"]]
    assert rows[3][3] == "100%"
    assert "d90 " in out
    assert "d90 above the start " in out
    code, printed, error = call(made, tmp_path / "json", *small, "--json")
    assert (code, error) == (0, "")
    document = json.loads(printed)
    assert document == json.loads((tmp_path / "json" / "intrinsic.json").read_text())
    d90 = document["d90"]
    assert f"d90 {'above 40' if d90 is None else d90}: reaches {document['threshold']:.3f}" in out
    assert (tmp_path / "json" / "intrinsic.png").read_bytes().startswith(b"\x89PNG")


def test_defaults_are_those_of_the_library(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[IntrinsicOptions] = []

    def stop(options: IntrinsicOptions, progress: object) -> None:
        asked.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr("loracle.torch_impl.intrinsic.measure_intrinsic_dimension", stop)
    assert call(made, tmp_path / "out")[0] == 2
    settings = (str(made / "model"), made / "data.jsonl", tmp_path / "out")
    assert asked == [IntrinsicOptions(*settings, bf16=False)]
    given = (
        "--test-data",
        made / "data.jsonl",
        "--seeds",
        "3,1",
        "--lr",
        "0.5,1e-3",
        "--full-lr",
        "1",
        "--resume",
    )
    more = (
        "--dims",
        "7",
        "--projection",
        "said",
        "--metric",
        "macro_f1",
        "--epochs",
        "2",
        "--max-steps",
        "9",
    )
    last = ("--batch-size", "2", "--max-length", "9", "--validation-share", "0.1", "--test-share", "0.2")
    rest = ("--schedule", "cosine", "--warmup", "0.5", "--task", "sequence-classification")
    assert call(made, tmp_path / "out", *given, *more, *last, *rest)[0] == 2
    assert asked[1] == IntrinsicOptions(
        *settings,
        test_data=made / "data.jsonl",
        metric="macro_f1",
        dims=(7,),
        projection="said",
        lr=(1e-3, 0.5),
        full_lr=(1.0,),
        seeds=(1, 3),
        epochs=2.0,
        max_steps=9,
        batch_size=2,
        max_length=9,
        validation_share=0.1,
        test_share=0.2,
        schedule="cosine",
        warmup=0.5,
        bf16=False,
        resume=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dims", "10,x"), "--dims: expected integers with commas between, got '10,x'"),
        (("--dims", ""), "--dims: expected integers with commas between, got ''"),
        (("--lr", "0.1;1"), "--lr: expected numbers with commas between, got '0.1;1'"),
        (("--seeds", "0.5"), "--seeds: expected integers with commas between, got '0.5'"),
        (("--dims", "9999999"), "dims: expected numbers from 1 to "),
        (("--dims", "5", "--projection", "said"), "dims: expected numbers from 6 to "),
        (("--projection", "sparse"), "projection: expected one of "),
        (("--metric", "bleu"), "metric: expected accuracy or macro_f1, "),
        (("--task", "token-classification", "--metric", "macro_f1"), "metric: expected accuracy, "),
        (("--task", "causal-lm"), "task: expected one of "),
        (("--schedule", "steps"), "schedule: expected one of "),
        (("--data", "{made}/empty.jsonl"), "{made}/empty.jsonl: expected at least one example, "),
        (("--data", "{made}/none.jsonl"), "{made}/none.jsonl: expected a readable JSON Lines file, "),
        (("--test-data", "{made}/empty.jsonl"), "{made}/empty.jsonl: expected at least one example, "),
        (("--model", "{made}/none"), "{made}/none: expected a model folder, "),
        (("--out", "{made}/model"), "{made}/model: exists and is not empty"),
        (("--out", "{made}/none/out"), "{made}/none/out: the folder {made}/none does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(
    made: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    filled = [argument.replace("{made}", str(made)) for argument in arguments]
    code, out, error = call(made, tmp_path / "out", *filled)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {message.replace('{made}', str(made))}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
