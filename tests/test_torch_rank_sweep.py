"""Sweeps over ranks of tiny models: what is written and refused, and going on after an interruption."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import refused
from task_fixtures import tiny_bert, write_words_model
from torch_fixtures import upper_pairs, write_lines, write_model

from loracle.files import read_adapter
from loracle.reference import ConfigError, DataError, FileError, NonFiniteError
from loracle.torch_impl import FinetuneOptions, finetune
from loracle.torch_impl.rank_sweep import RankSweepOptions, sweep_ranks
from loracle.torch_impl.rank_sweep import sweep as sweep_module
from loracle.torch_impl.rank_sweep.cell import Cell

WORDS = [f"{first}{second}{third}" for first in "abcd" for second in "abcd" for third in "abcd"]
LABELLED = [{"text": word, "label": "early" if word[0] in "ab" else "late"} for word in WORDS]
STEPS = 3

Options = Callable[..., RankSweepOptions]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    settings: dict[str, Any] = {
        "model": write_model(tmp_path / "model"),
        "data": write_lines(tmp_path / "data.jsonl", upper_pairs()),
        "eval_data": write_lines(tmp_path / "held.jsonl", upper_pairs()[:3]),
        "out": tmp_path / "out",
        "ranks": (1, 2),
        "targets": ("q", "qv"),
        "max_steps": STEPS,
        "batch_size": 4,
        "bf16": False,
    }
    return lambda **changes: RankSweepOptions(**{**settings, **changes})


@pytest.fixture
def classifier(tmp_path: Path) -> Options:
    settings: dict[str, Any] = {
        "model": write_words_model(tmp_path / "bert", tiny_bert()),
        "data": write_lines(tmp_path / "labelled.jsonl", LABELLED),
        "out": tmp_path / "out",
        "task": "sequence-classification",
        "max_steps": 30,
        "lr": 0.02,
        "bf16": False,
    }
    return lambda **changes: RankSweepOptions(**{**settings, **changes})


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions and on time."""
    document: dict[str, Any] = json.loads((folder / "rank.json").read_text())
    for values in (document, document["best"], *document["cells"], *document["table"]):
        del values["seconds"]
    return {**document, "picture": (folder / "rank.png").read_bytes()}


def interrupt(done: int, total: int, loss: float | None) -> None:
    if done == 2 * STEPS + 1 and loss is not None:  # in the third cell
        raise KeyboardInterrupt


def test_a_cell_is_what_finetune_makes_of_its_options(options: Options, tmp_path: Path) -> None:
    own = options(ranks=(2,), targets=("qv",), seeds=(5,), lr=0.01, schedule="constant", warmup=0.0)
    result = sweep_ranks(own)
    tuned = finetune(
        FinetuneOptions(
            model=own.model,
            data=own.data,
            out=tmp_path / "adapter",
            eval_data=own.eval_data,
            rank=2,
            targets=("q_proj", "v_proj"),
            seed=5,
            lr=0.01,
            schedule="constant",
            warmup=0.0,
            max_steps=STEPS,
            batch_size=4,
            bf16=False,
        )
    )
    (record,) = result.records
    assert record.cell == Cell("qv", 2, 5)
    assert record.after is not None
    assert record.before is not None
    assert record.before["loss"] == tuned.eval_before == result.before
    assert record.after["loss"] == tuned.eval_after == result.best.score
    assert record.after["perplexity"] == tuned.metrics["perplexity"]
    assert (record.loss, record.steps) == (tuned.losses[-1], STEPS)
    sizes = [pair.A.size + pair.B.size for pair in read_adapter(tmp_path / "adapter").pairs.values()]
    assert (record.parameters, record.layers) == (sum(sizes), len(sizes))
    assert record.trainable == record.parameters == tuned.trainable


def test_a_sweep_is_written_whole(options: Options, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    before = {path: path.read_bytes() for path in sorted((tmp_path / "model").iterdir())}
    own = options(seeds=(1, 0))
    result = sweep_ranks(own, lambda done, total, _: told.append((done, total)))
    names = ["data.jsonl", "held.jsonl", "model", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert before == {path: path.read_bytes() for path in sorted((tmp_path / "model").iterdir())}
    assert sorted(path.name for path in own.out.iterdir()) == ["rank.json", "rank.png"]
    document = json.loads((own.out / "rank.json").read_text())
    assert document == json.loads(json.dumps(result.to_json()))
    assert (document["kind"], document["version"]) == ("loracle rank sweep", 1)
    assert str(tmp_path) not in json.dumps(document)
    assert told == sorted(told)
    assert told[-1] == (8 * STEPS, 8 * STEPS)
    assert (document["data"]["train"], document["data"]["held_out"]) == (11, 3)
    expected = [(name, rank) for name in ("q", "qv") for rank in (1, 2)]
    assert [(entry["targets"], entry["rank"]) for entry in document["table"]] == expected
    cells = [(one["targets"], one["r"], one["seed"]) for one in document["cells"]]
    assert cells == [(*at, seed) for at in expected for seed in (0, 1)]
    scores = [one["after"]["loss"] for one in document["cells"][2:4]]
    entry = document["table"][1]
    assert (entry["low"], entry["high"]) == (min(scores), max(scores))
    assert entry["score"] == pytest.approx(sum(scores) / 2)
    assert document["best"]["score"] == min(one["score"] for one in document["table"])


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_ranks(options(out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        sweep_ranks(options(), interrupt)
    folder = tmp_path / "out.cells"
    assert not (tmp_path / "out").exists()
    kept = sorted(path.name for path in folder.iterdir())
    assert len(kept) == 1 + 2  # run.json and two cells; nothing of the third
    message = (
        f"{folder}: expected no cells of an earlier sweep, got {kept[1]}; resume that sweep, or remove the "
        "folder"
    )
    refused(lambda: sweep_ranks(options()), FileError, message)
    with pytest.raises(ConfigError, match=r"lr: expected 0\.002 as in the sweep to resume, got 0\.1;"):
        sweep_ranks(options(resume=True, lr=0.1))
    write_lines(tmp_path / "held.jsonl", upper_pairs()[:2])
    with pytest.raises(ConfigError, match="eval_data_sha256: expected "):
        sweep_ranks(options(resume=True))
    write_lines(tmp_path / "held.jsonl", upper_pairs()[:3])
    made: list[Cell] = []
    make = sweep_module.make_cell

    def recorded(cell: Cell, *rest: Any) -> Any:
        made.append(cell)
        return make(cell, *rest)

    monkeypatch.setattr(sweep_module, "make_cell", recorded)
    sweep_ranks(options(resume=True))
    assert made == [Cell("qv", 1, 0), Cell("qv", 2, 0)]
    assert not folder.exists()
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def _killed(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)

    def kill(done: int, total: int, loss: float | None) -> None:
        if done == 2 * STEPS + 1 and loss is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    sweep_ranks(RankSweepOptions(**settings), kill)


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_where_it_was(options: Options, tmp_path: Path) -> None:
    own = options()
    sweep_ranks(options(out=tmp_path / "whole"))
    settings = {entry.name: getattr(own, entry.name) for entry in fields(own)}
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(settings,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    # The files of the third cell are left as well.
    assert len(list((tmp_path / "out.cells").glob("cell-*"))) == 2
    assert len(list((tmp_path / "out.cells").iterdir())) == 1 + 2 + 1
    sweep_ranks(options(resume=True))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert not (tmp_path / "out.cells").exists()


def test_further_ranks_are_added_and_a_damaged_cell_is_named(options: Options, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep_ranks(options(), interrupt)
    path = min((tmp_path / "out.cells").glob("cell-*"))
    content = path.read_bytes()
    for broken in (b"{", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(FileError, match=re.escape(path.name)):
            sweep_ranks(options(resume=True))
    path.write_bytes(content)
    result = sweep_ranks(options(resume=True, targets=("q",), ranks=(2, 3), share=0.5))
    assert [(one.targets, one.rank) for one in result.table] == [("q", 2), ("q", 3)]


def test_every_set_may_have_the_parameters_of_the_first(options: Options) -> None:
    sets = ("q_proj", "q_proj,o_proj", "qv")
    result = sweep_ranks(options(targets=sets, ranks=(2, 4), constant_parameters=True))
    # 32 numbers a rank and layer of q and of o, 24 of v.
    assert [(one.rank, one.r, one.parameters) for one in result.table] == [
        (2, 2, 128),
        (4, 4, 256),
        (2, 1, 128),
        (4, 2, 256),
        (2, 1, 112),
        (4, 2, 224),
    ]


def test_a_scaling_may_be_the_same_at_every_rank(options: Options) -> None:
    paths = options().data, options().data, options().out
    fixed, alpha = options(scaling=2.0), options(alpha=8.0)
    assert [fixed.cell(*paths, ("q_proj",), r, 0).alpha for r in (1, 4)] == [2.0, 8.0]
    assert [alpha.cell(*paths, ("q_proj",), r, 0).alpha for r in (1, 4)] == [8.0, 8.0]


def test_a_classifier_is_compared_by_its_accuracy(classifier: Options) -> None:
    result = sweep_ranks(classifier(ranks=(4,), targets=("qkvo",)))
    (record,) = result.records
    assert (result.metric, result.lower_is_better) == ("accuracy", False)
    assert record.layers == 8
    assert record.after is not None
    assert record.after.keys() == {"loss", "accuracy", "macro_f1"}
    assert result.best.score == record.after["accuracy"] > result.before
    assert record.trainable is not None
    assert record.trainable > record.parameters == 8 * 4 * 32  # the head is trained too
    assert result.data["train"] + result.data["held_out"] == len(LABELLED)


def test_a_rate_that_diverges_is_named(options: Options, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"lr: expected a rate that trains, got 1e\+38, with which: "):
        sweep_ranks(options(lr=1e38, ranks=(1,), targets=("q",)))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_left_alone(options: Options, tmp_path: Path) -> None:
    sweep_ranks(options(ranks=(1,), targets=("q",)))
    written = (tmp_path / "out" / "rank.json").read_bytes()
    with pytest.raises(FileError, match="out: exists and is not empty"):
        sweep_ranks(options(ranks=(2,)))
    assert (tmp_path / "out" / "rank.json").read_bytes() == written
    assert not (tmp_path / "out.cells").exists()


def test_a_line_that_is_wrong_is_named(options: Options, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "broken.jsonl", [*upper_pairs(), {"prompt": "a"}])
    with pytest.raises(DataError, match=r"broken\.jsonl, line 12: "):
        sweep_ranks(options(data=data))
