"""Measurements of tiny classifiers: what is written and refused, and going on after an interruption."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from refusal import refused
from task_fixtures import tiny_bert, write_words_model
from torch_fixtures import write_lines

from loracle.reference import ConfigError, DataError, FileError, LoracleError, NonFiniteError
from loracle.torch_impl.batches import IGNORED
from loracle.torch_impl.classification import LabelledRow, TaggedRow
from loracle.torch_impl.data import Labelled, Tagged
from loracle.torch_impl.encoded import EncodedData
from loracle.torch_impl.intrinsic import IntrinsicOptions, measure_intrinsic_dimension
from loracle.torch_impl.intrinsic import runner as runner_module
from loracle.torch_impl.intrinsic.baseline import class_counts, majority_score
from loracle.torch_impl.intrinsic.plot import dimension_plot
from loracle.torch_impl.intrinsic.run import Run
from loracle.torch_impl.intrinsic.splits import split

WORDS = [f"{first}{second}{third}" for first in "abcd" for second in "abcd" for third in "abcd"]
LABELLED = [{"text": word, "label": "early" if word[0] in "ab" else "late"} for word in WORDS]
TAGGED = [{"tokens": list(word), "tags": [int(letter == "a") for letter in word]} for word in WORDS]

Options = Callable[..., IntrinsicOptions]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    model = write_words_model(tmp_path / "model", tiny_bert())

    def make(records: list[Any] = LABELLED, **changes: Any) -> IntrinsicOptions:
        settings: dict[str, Any] = {
            "model": model,
            "data": write_lines(tmp_path / "data.jsonl", records),
            "out": tmp_path / "out",
            "dims": (2, 40),
            "lr": (0.01,),
            "full_lr": (0.01,),
            "max_steps": 12,
            "bf16": False,
        }
        return IntrinsicOptions(**{**settings, **changes})

    return make


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions and on time."""
    document: dict[str, Any] = json.loads((folder / "intrinsic.json").read_text())
    for values in (document, *document["runs"]):
        del values["seconds"]
    return {**document, "picture": (folder / "intrinsic.png").read_bytes()}


def test_a_measurement_is_written_whole(options: Options, tmp_path: Path) -> None:
    own = options(lr=(0.003, 0.03), seeds=(0, 1))
    steps: list[tuple[int, int]] = []
    result = measure_intrinsic_dimension(own, lambda done, total, _: steps.append((done, total)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model", "out"]
    assert sorted(path.name for path in own.out.iterdir()) == ["intrinsic.json", "intrinsic.png"]
    document = json.loads((own.out / "intrinsic.json").read_text())
    assert document == json.loads(json.dumps(result.to_json()))
    assert (document["kind"], document["version"]) == ("loracle intrinsic", 1)
    assert str(tmp_path) not in json.dumps(document)
    assert steps[-1] == (12 * 2 * (1 + 2 * 2), 12 * 2 * (1 + 2 * 2))
    assert steps == sorted(steps)
    data = document["data"]
    assert data["train"] + data["validation"] + data["test"] == len(LABELLED)
    assert data["labels"] == ["early", "late"]
    kinds = [run["kind"] for run in document["runs"]]
    assert [kinds.count(kind) for kind in ("start", "full", "subspace")] == [2, 2, 8]
    assert [run["steps"] for run in document["runs"]] == [0, 0, *[12] * 10]
    assert [point["d"] for point in document["points"]] == [2, 40]
    for run in document["runs"]:
        larger = 1 if run["d"] is None else math.sqrt(document["parameters"] / run["d"])
        assert run["rate"] == (None if run["lr"] is None else pytest.approx(run["lr"] * larger, rel=1e-12))
    assert document["threshold"] == pytest.approx(0.9 * document["full"]["score"])
    assert document["full"]["score"] > max(document["start"], document["majority"])
    chosen = document["points"][1]
    of_point = [run for run in document["runs"] if (run["d"], run["lr"]) == (40, chosen["lr"])]
    scores = [run["test"]["accuracy"] for run in of_point]
    assert (chosen["score"], chosen["low"]) == (pytest.approx(sum(scores) / 2), min(scores))
    assert chosen["projection"] == "dense"


def test_a_measurement_that_was_interrupted_goes_on_where_it_was(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = options(out=tmp_path / "whole")
    measure_intrinsic_dimension(whole)
    made: list[Run] = []
    make = runner_module.make_run

    def recorded(run: Run, *rest: Any) -> Any:
        made.append(run)
        return make(run, *rest)

    monkeypatch.setattr(runner_module, "make_run", recorded)

    def interrupt(done: int, total: int, loss: float | None) -> None:
        if done == 30 and loss is not None:  # in the third run of twelve steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_intrinsic_dimension(options(), interrupt)
    folder = tmp_path / "out.runs"
    assert not (tmp_path / "out").exists()
    assert len(list(folder.iterdir())) == 1 + 3  # run.json; the start, the whole model, and one subspace
    (folder / f".run-{'0' * 16}.json.00ff.partial").write_text("{")
    last = max(path.name for path in folder.glob("run-*"))
    message = (
        f"{folder}: expected no runs of an earlier measurement, got {last}; resume that measurement, or "
        "remove the folder"
    )
    refused(lambda: measure_intrinsic_dimension(options()), FileError, message)
    with pytest.raises(ConfigError, match="batch_size: expected 16 as in the measurement to resume, got 8"):
        measure_intrinsic_dimension(options(resume=True, batch_size=8))
    del made[:]
    measure_intrinsic_dimension(options(resume=True))
    assert [run.d for run in made] == [40]
    assert not folder.exists()
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def _killed(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)

    def kill(done: int, total: int, loss: float | None) -> None:
        if done == 30 and loss is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    measure_intrinsic_dimension(IntrinsicOptions(**settings), kill)


@pytest.mark.slow
def test_a_measurement_that_was_killed_goes_on_where_it_was(options: Options, tmp_path: Path) -> None:
    whole, own = options(out=tmp_path / "whole"), options()
    measure_intrinsic_dimension(whole)
    settings = {entry.name: getattr(own, entry.name) for entry in fields(own)}
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(settings,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out.runs").iterdir())) == 1 + 3
    measure_intrinsic_dimension(options(resume=True))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model", "out", "whole"]


@pytest.mark.slow
def test_further_dimensions_are_added_to_runs_that_are_there(options: Options, tmp_path: Path) -> None:
    def interrupt(done: int, *_: Any) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_intrinsic_dimension(options(), interrupt)
    result = measure_intrinsic_dimension(options(resume=True, dims=(2, 5)))
    assert [point.d for point in result.points] == [2, 5]


def test_a_damaged_record_is_named(options: Options, tmp_path: Path) -> None:
    def interrupt(done: int, *_: Any) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_intrinsic_dimension(options(), interrupt)
    for content in ("{", "{}"):
        record = sorted((tmp_path / "out.runs").glob("run-*"))[0]
        record.write_text(content)
        with pytest.raises(FileError, match=record.name):
            measure_intrinsic_dimension(options(resume=True))


@pytest.mark.slow
def test_words_and_their_tags_with_scales_for_layers(options: Options) -> None:
    result = measure_intrinsic_dimension(
        options(
            TAGGED, task="token-classification", projection="said", dims=(8, 60), lr=(0.01,), max_steps=30
        )
    )
    assert result.layers == (
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "classifier",
    )
    assert [point.d for point in result.points] == [8, 60]
    assert result.points[-1].score > result.start


@pytest.mark.slow
def test_test_data_of_its_own_and_another_metric(options: Options, tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "test.jsonl", LABELLED[::5])
    result = measure_intrinsic_dimension(options(test_data=held_out, metric="macro_f1", dims=(2,)))
    assert result.data["test"] == len(LABELLED[::5])
    assert set(result.data) >= {"data_sha256", "test_data_sha256"}
    assert result.metric == "macro_f1"
    # One class of two is never named: its F1 is 0, the other's 2 p / (1 + p).
    assert 0.0 < result.majority < 0.5


@pytest.mark.slow
def test_a_rate_that_diverges_is_left_out(options: Options) -> None:
    result = measure_intrinsic_dimension(options(dims=(40,), lr=(0.01, 1e30)))
    assert [(point.d, point.lr) for point in result.points] == [(40, 0.01)]
    assert [record.test is None for record in result.records][-1]
    assert result.records[-1].diverged
    only = measure_intrinsic_dimension(options(dims=(40,), lr=(1e30,), out=options().out.with_name("other")))
    assert (only.points, only.diverged, only.dimension.d90) == ((), (40,), None)


@pytest.mark.slow
def test_products_may_be_bfloat16(options: Options) -> None:
    result = measure_intrinsic_dimension(options(dims=(40,), bf16=True))
    losses = [record.loss for record in result.records if record.loss is not None]
    plain = measure_intrinsic_dimension(options(dims=(40,), bf16=False, out=options().out.with_name("other")))
    others = [record.loss for record in plain.records if record.loss is not None]
    assert losses != others
    assert losses == pytest.approx(others, rel=0.1)


def test_a_guess_names_the_class_that_is_most_frequent_in_training() -> None:
    def data(*labels: int) -> EncodedData:
        return EncodedData(tuple(LabelledRow((1,), label) for label in labels), 0, 0)

    train, test = data(0, 2, 2, 1), data(0, 0, 0, 2)
    assert majority_score(train, test, 4, "accuracy") == 0.25
    assert majority_score(train, test, 4, "macro_f1") == pytest.approx((0 + 2 / 5) / 2)
    words = EncodedData((TaggedRow((1, 2, 3), (IGNORED, 1, 0)), TaggedRow((1,), (1,))), 0, 0)
    assert class_counts(words, 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dims": (10**7,)}, ConfigError, "dims: expected numbers from 1 to .*, got 10000000; leave it out"),
        ({"dims": (5,), "projection": "said"}, ConfigError, "dims: expected numbers from 6 to .* 5 are the"),
        ({"full_lr": (1e30,)}, NonFiniteError, "full_lr: expected a rate that trains, got: "),
        (
            {"full_lr": (1e-12,)},
            ConfigError,
            "full_lr: expected training of all parameters to raise accuracy",
        ),
        ({"validation_share": 1e-9}, DataError, "none falls to the validation split; give more"),
        ({"test_share": 0.02}, DataError, "expected at least two classes in the test split, got one"),
    ],
)
def test_what_cannot_be_measured_is_named(
    options: Options, tmp_path: Path, changes: dict[str, Any], kind: type[LoracleError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        measure_intrinsic_dimension(options(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "expected at least one example, got an empty file"),
        ([{"text": "a"}], "expected the key 'label', got 'text'"),
        (
            [{"text": word, "label": "one"} for word in WORDS],
            "expected at least two classes, got 'one' alone",
        ),
    ],
)
def test_data_without_classes_is_named(options: Options, records: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_intrinsic_dimension(options(records))


def test_an_output_that_is_there_is_left_alone(options: Options, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileError, match="out: exists and is not empty"):
        measure_intrinsic_dimension(options())
    assert not (tmp_path / "out.runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "causal-lm"}, "task: expected one of sequence-classification, token-classification, got"),
        (
            {"task": "token-classification", "metric": "macro_f1"},
            "metric: expected accuracy, which token-classification has, got 'macro_f1'",
        ),
        ({"metric": "bleu"}, "metric: expected accuracy or macro_f1, which sequence-classification has, got"),
        ({"projection": "sparse"}, "projection: expected one of auto, dense, fastfood, said, got 'sparse'"),
        ({"dims": ()}, "dims: expected at least one value, got none"),
        ({"dims": (3, 0)}, "dims: expected integers of at least 1, got 0"),
        ({"seeds": (-1,)}, "seed: expected an integer of at least 0, got -1"),
        ({"lr": (0.1, -1.0)}, "lr: expected a number above 0, got -1.0"),
        ({"full_lr": (float("nan"),)}, "lr: expected a number above 0, got nan"),
        ({"validation_share": 0.0}, r"validation_share: expected a share in \(0, 1\), got 0.0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "test_share: expected less than 0.5"),
        ({"epochs": 0.0}, "epochs: expected a number above 0"),
    ],
)
def test_options_are_checked_when_they_are_made(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"model": "a/b", "data": "d", "out": "o"}
    with pytest.raises(ConfigError, match=f"^{message}"):
        IntrinsicOptions(**{**settings, **changes})


@pytest.mark.slow
def test_dimensions_are_those_that_suit_where_none_are_given(options: Options) -> None:
    result = measure_intrinsic_dimension(options(dims=None, projection="said"))
    found = [point.d for point in result.points]
    assert result.parameters > 3_000
    assert found == [10, 30, 100, 300, 1_000, 3_000]


def test_a_text_is_on_one_side_whatever_else_there_is() -> None:
    texts = [Labelled(at, word, None, "x") for at, word in enumerate(WORDS)]
    sides = split(texts, 0.2, 0.3)
    assert [len(side) for side in sides] == [len(set(map(id, side))) for side in sides]
    assert sum(map(len, sides)) == len(WORDS)
    assert all(len(side) > 5 for side in sides)
    again = split([Labelled(0, f"  {one.text.upper()} ", "", "y") for one in sides[2]], 0.2, 0.3)
    assert [len(side) for side in again] == [0, 0, len(sides[2])]
    tagged = split([Tagged(0, ("a", "b"), (0, 1)), Tagged(1, ("A", "b"), (1, 1))], 0.5, 0.25)
    assert sorted(map(len, tagged)) == [0, 0, 2]


def test_the_picture_has_the_lines_that_d90_is_read_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loracle.torch_impl.intrinsic.dimension import Point, intrinsic_dimension

    heights: list[float] = []
    marks: list[float] = []
    curves: list[tuple[list[float], list[float]]] = []
    horizontal, vertical, errorbar = Axes.axhline, Axes.axvline, Axes.errorbar
    monkeypatch.setattr(
        Axes, "axhline", lambda axes, y, **style: heights.append(y) or horizontal(axes, y, **style)
    )
    monkeypatch.setattr(
        Axes, "axvline", lambda axes, x, **style: marks.append(x) or vertical(axes, x, **style)
    )
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda axes, x, y, **style: curves.append((list(x), list(y))) or errorbar(axes, x, y, **style),
    )
    full = Point(None, 1e-4, 0.8, 0.7, 0.9, 0.8)
    points = [Point(10, 0.1, 0.5, 0.4, 0.6, 0.5), Point(100, 0.1, 0.75, 0.7, 0.8, 0.7)]
    found = intrinsic_dimension(points, 0.8, 0.3)
    for name in ("one", "same"):
        dimension_plot(points, full, 0.3, found, tmp_path / name, metric="accuracy", title="t")
    assert heights[:3] == [0.8, pytest.approx(0.72), 0.3]
    assert marks[:1] == [100]
    assert curves[0] == ([10, 100], [0.5, 0.75])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
