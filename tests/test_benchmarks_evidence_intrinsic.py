"""The evidence's data, and the settings that it is measured with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence_intrinsic
from benchmarks.evidence_data import LIBRARIES, ClassificationFiles, classification_files
from loracle.torch_impl.data import read_examples


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_as_many_texts_of_each_library_on_either_side(tmp_path: Path) -> None:
    files = classification_files(tmp_path / "data", libraries=("hypothesis", "peft"), most=40)
    train, test = rows(files.train), rows(files.test)
    assert (len(train), len(test)) == (files.train_rows, files.test_rows) == (80, files.test_rows)
    for side in (train, test):
        labels = [row["label"] for row in side]
        assert labels == ["hypothesis", "peft"] * (len(side) // 2)
        assert len(side) > 20
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert len(read_examples(files.train, ("labelled",))) == 80
    assert files.origin.startswith("docstrings of hypothesis ")
    again = classification_files(tmp_path / "again", libraries=("hypothesis", "peft"), most=40)
    assert [path.read_bytes() for path in (files.train, files.test)] == [
        path.read_bytes() for path in (again.train, again.test)
    ]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("projection", ["auto", "said"])
def test_the_settings_are_valid_and_a_quick_run_writes_elsewhere(quick: bool, projection: str) -> None:
    arguments = evidence_intrinsic.parse([*(["--quick"] if quick else []), "--projection", projection])
    assert arguments.out == (Path("build/evidence") if quick else Path("benchmarks/results"))
    files = ClassificationFiles(Path("a"), Path("b"), 10, 5, LIBRARIES, "")
    options = evidence_intrinsic.options_of(files, Path("m"), Path("o"), projection=projection, quick=quick)
    assert (options.projection, options.resume) == (projection, True)
    assert (options.seeds, options.max_steps) == (((0,), 10) if quick else ((0, 1), None))
