"""Data that the evidence is made of, out of installed packages: the same versions give the same bytes.

The classification task: which library is the first line of a docstring from? Six libraries that are there
wherever torch and the demo are; as many texts of each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracle.demo.docstrings import docstring_pairs, package_versions
from loracle.demo.tasks import split
from loracle.files import write_atomic

LIBRARIES = ("matplotlib", "networkx", "numpy", "scipy", "sympy", "torch")
HELD_OUT_PERCENT = 25


@dataclass(frozen=True)
class ClassificationFiles:
    """The classification task.

    Attributes:
        train, test: JSON Lines of ``{"text", "label"}``.
        train_rows, test_rows: how many.
        labels: the classes.
        origin: the libraries with their versions.
    """

    train: Path
    test: Path
    train_rows: int
    test_rows: int
    labels: tuple[str, ...]
    origin: str


def classification_files(
    folder: Path, *, libraries: Sequence[str] = LIBRARIES, most: int | None = None
) -> ClassificationFiles:
    """Write ``library.train.jsonl`` and ``library.test.jsonl``.

    No text of one side is on the other; within a library, nor one that shares a third of its word triples,
    see `loracle.demo.tasks.split`. Every class has as many rows as the smallest; rows take turns by class.

    Args:
        folder: made where it is missing; files of these names are replaced.
        libraries: packages that are installed, the classes.
        most: rows of a class to train on, at most.

    Raises:
        FileError: a package is not installed.
    """
    sides: tuple[list[list[str]], list[list[str]]] = ([], [])
    for library in libraries:
        texts = [summary for _, summary in docstring_pairs([library])]
        # The text decides its side, and has no target but itself.
        for side, pairs in zip(sides, split([(text, text) for text in texts], HELD_OUT_PERCENT), strict=True):
            side.append([text for text, _ in pairs])
    counts = [min(map(len, side)) for side in sides]
    counts[0] = min(counts[0], most or counts[0])
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "library.train.jsonl", folder / "library.test.jsonl")
    for path, side, count in zip(paths, sides, counts, strict=True):
        rows = [(side[at][row], libraries[at]) for row in range(count) for at in range(len(libraries))]
        lines = [
            json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows
        ]
        write_atomic(path, "".join(lines).encode())
    versions = ", ".join(f"{name} {version}" for name, version in package_versions(libraries).items())
    train_rows, test_rows = (count * len(libraries) for count in counts)
    return ClassificationFiles(*paths, train_rows, test_rows, tuple(libraries), f"docstrings of {versions}")


def files_in(work: Path, *, quick: bool) -> ClassificationFiles:
    """The task's files in a working folder.

    Those of a quick run are of two libraries: dividing all texts takes most of a minute.
    """
    folder, libraries = ("quick-data", LIBRARIES[1:3]) if quick else ("data", LIBRARIES)
    return classification_files(work / folder, libraries=libraries)
