"""`loracle rank sweep` as a user meets it: a table, JSON, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from task_fixtures import tiny_bert, write_words_model
from torch_fixtures import upper_pairs, write_lines, write_model
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.reference import ConfigError
from loracle.torch_impl.rank_sweep import RankSweepOptions

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
    root = tmp_path_factory.mktemp("rank-sweep")
    write_model(root / "llama")
    write_words_model(root / "bert", tiny_bert())
    write_lines(root / "data.jsonl", upper_pairs())
    write_lines(root / "labelled.jsonl", LABELLED)
    (root / "empty.jsonl").touch()
    return root


def call(made: Path, out: Path, *arguments: object) -> tuple[int, str, str]:
    common = ("--model", made / "llama", "--data", made / "data.jsonl", "--out", out, "--no-bf16")
    result = RUNNER.invoke(app, ["rank", "sweep", *map(str, (*common, *arguments))])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_it_prints_what_it_found(made: Path, tmp_path: Path) -> None:
    small = ("--ranks", "4,1", "--targets", "q;k_proj,v_proj", "--max-steps", 3)
    code, out, error = call(made, tmp_path / "table", *small)
    assert (code, error) == (0, "")
    title, *rows = [line.split() for line in out.splitlines()]
    assert title == ["targets", "rank", "r", "parameters", "loss", "seeds", "seconds"]
    # Two layers of width 16 with 2 of 4 heads for keys and values: q is 16 to 16, k and v are 16 to 8.
    assert [row[:4] for row in rows[:4]] == [
        ["q", "1", "1", "64"],
        ["q", "4", "4", "256"],
        ["k_proj,v_proj", "1", "1", "96"],
        ["k_proj,v_proj", "4", "4", "384"],
    ]
    code, printed, error = call(made, tmp_path / "json", *small, "--json")
    assert (code, error) == (0, "")
    document = json.loads(printed)
    assert document == json.loads((tmp_path / "json" / "rank.json").read_text())
    assert [f"{entry['score']:.4f}" for entry in document["table"]] == [row[4] for row in rows[:4]]
    assert f"before training {document['before']:.4f}\n" in out
    for one in document["enough"]:
        found = "no rank is" if one["r"] is None else f"r = {one['r']} is, {one['parameters']} parameters,"
        assert f"{one['targets']}: {found} enough for 0.95 of the best cell's gain\n" in out
    assert (tmp_path / "json" / "rank.png").read_bytes().startswith(b"\x89PNG")


def test_defaults_are_those_of_the_library(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RankSweepOptions] = []

    def stop(options: RankSweepOptions, progress: object) -> None:
        asked.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr("loracle.torch_impl.rank_sweep.sweep_ranks", stop)
    assert call(made, tmp_path / "out")[0] == 2
    settings = (str(made / "llama"), made / "data.jsonl", tmp_path / "out")
    assert asked == [RankSweepOptions(*settings, bf16=False)]
    given = {
        "eval_data": made / "data.jsonl",
        "eval_share": 0.3,
        "task": "masked-lm",
        "metric": "perplexity",
        "ranks": (2, 8),
        "targets": ("qv", "all-linear", "a,b"),
        "seeds": (0, 3),
        "alpha": 4.0,
        "scaling": 2.0,
        "share": 0.5,
        "epochs": 2.0,
        "max_steps": 9,
        "lr": 0.1,
        "schedule": "cosine",
        "warmup": 0.5,
        "batch_size": 2,
        "max_length": 9,
        "dropout": 0.1,
    }
    words: list[object] = ["--constant-parameters", "--resume"]
    for name, value in given.items():
        between = ";" if name == "targets" else ","
        shown = between.join(map(str, value)) if isinstance(value, tuple) else value
        words += [f"--{name.replace('_', '-')}", shown]
    assert call(made, tmp_path / "out", *words)[0] == 2
    # mypy does not see the types through a dictionary.
    rest: dict[str, object] = {**given, "constant_parameters": True, "resume": True, "bf16": False}
    assert asked[1] == RankSweepOptions(*settings, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "1,x"), "--ranks: expected integers with commas between, got '1,x'"),
        (("--ranks", "0"), "ranks: expected integers of at least 1, got 0"),
        (("--ranks", "9", "--targets", "q;v"), "ranks: expected at most 8, the smaller dimension of model."),
        (("--seeds", ""), "--seeds: expected integers with commas between, got ''"),
        (("--seeds", "-1"), "seeds: expected integers of at least 0, got -1"),
        (("--targets", ";"), "targets: expected sets such as q;qv;qkvo with semicolons between, got ';'"),
        (("--targets", "q;nothing"), "target_modules: expected the name of a linear layer, got 'nothing', "),
        (
            ("--targets", "q;all-linear", "--ranks", "1", "--constant-parameters"),
            "constant_parameters: expected ranks of 'q' of at least ",
        ),
        (("--metric", "chrf"), "metric: expected loss or perplexity, which causal-lm has, got 'chrf'"),
        (("--metric", "accuracy"), "metric: expected loss or perplexity, which causal-lm has, got "),
        (("--task", "regression"), "task: expected one of "),
        (("--share", "0"), "share: expected a share in (0, 1], got 0.0"),
        (("--eval-share", "1"), "eval_share: expected a share in (0, 1), got 1.0"),
        (("--scaling", "0"), "scaling: expected a number above 0, got 0.0"),
        (("--eval-share", "1e-9"), "{made}/data.jsonl: expected examples to learn from and to measure on, "),
        (("--data", "{made}/empty.jsonl"), "{made}/empty.jsonl: expected at least one example, "),
        (("--eval-data", "{made}/empty.jsonl"), "{made}/empty.jsonl: expected at least one example, "),
        (("--data", "{made}/none.jsonl"), "{made}/none.jsonl: expected a readable JSON Lines file, "),
        (("--model", "{made}/none"), "{made}/none: expected a model folder, "),
        (("--out", "{made}/llama"), "{made}/llama: exists and is not empty"),
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
