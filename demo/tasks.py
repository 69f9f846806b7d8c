"""The demo's two tasks as JSONL files: real text, split so that held-out text was never trained on."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .catalogs import translation_pairs
from .docstrings import docstring_pairs, package_versions
from .settings import SUMMARIZE, TRANSLATE, Task
from .wheels import Progress, cached_wheel

DJANGO = "django==5.2.19"
DJANGO_SHA256 = "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"
PACKAGES = ("numpy", "scipy")

Pair = tuple[str, str]

_PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|\{\w*\}")
_WORD = re.compile(r"[^\W\d_]+")
_NEAR = 1 / 3


@dataclass(frozen=True)
class TaskFiles:
    """Where a task's examples are, how many there are, and what they came from."""

    train: Path
    heldout: Path
    train_rows: int
    heldout_rows: int
    origin: str


def build_tasks(
    out_dir: Path, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> dict[str, TaskFiles]:
    """Write ``<task>.train.jsonl`` and ``<task>.heldout.jsonl`` of *translate* and *summarize*.

    A row is ``{"system", "prompt", "completion"}``. The same versions of the sources give the same bytes.

    Args:
        out_dir: made where it is missing; files of these names are replaced, each whole.
        cache_dir: the download cache, default as in :func:`loracle.files.cache_folder`.
        progress: called with a line of text before each slow stage.

    Returns:
        The files of each task, by the task's name.

    Raises:
        FileError: a source is missing, is not the pinned one, or is malformed.
    """
    wheel = cached_wheel(DJANGO, DJANGO_SHA256, cache_dir, progress)
    if progress:
        progress("reading catalogs and docstrings")
    translate = translation_pairs(wheel, "fr")
    summarize = docstring_pairs(PACKAGES)
    versions = " and ".join(f"{name} {version}" for name, version in package_versions(PACKAGES).items())
    out_dir.mkdir(parents=True, exist_ok=True)
    django = DJANGO.replace("==", " ")
    return {
        TRANSLATE.name: _write(out_dir, TRANSLATE, translate, f"gettext catalogs of {django}"),
        SUMMARIZE.name: _write(out_dir, SUMMARIZE, summarize, f"docstrings of {versions}"),
    }


def split(pairs: Iterable[Pair], heldout_percent: int) -> tuple[list[Pair], list[Pair]]:
    """Return (train, held-out): the side is decided by the SHA-256 of the normalised source alone.

    Of the pairs with one normalised source the first is kept. Held-out pairs come in the order of their
    hashes, so that the first few are a fair sample; training pairs in the order given. From the training side
    are then taken the pairs that would give a held-out one away: those with the same normalised target, and
    those whose source shares more than a third of its three-word sequences (Jaccard) with a held-out source.
    """
    first: dict[str, Pair] = {}
    for source, target in pairs:
        if key := normalise(source):
            first.setdefault(key, (source, target))
    heldout = {key: first[key] for key in sorted(first, key=_digest) if _digest(key) % 100 < heldout_percent}
    targets = {normalise(target) for _, target in heldout.values()}
    shingles = [_shingles(key) for key in heldout]
    train = [
        pair
        for key, pair in first.items()
        if key not in heldout
        and normalise(pair[1]) not in targets
        and not any(_jaccard(_shingles(key), other) > _NEAR for other in shingles)
    ]
    return train, list(heldout.values())


def normalise(text: str) -> str:
    """Return the words of a text, case folded, one space between them; digits, signs and placeholders go."""
    return " ".join(_WORD.findall(_PLACEHOLDER.sub(" ", text).casefold()))


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")


def _shingles(key: str) -> frozenset[tuple[str, ...]]:
    words = key.split()
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _jaccard(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    common = len(left & right)
    return common / (len(left) + len(right) - common) if common else 0.0


def _write(out_dir: Path, task: Task, pairs: Sequence[Pair], origin: str) -> TaskFiles:
    train, heldout = split(pairs, task.heldout_percent)
    files = TaskFiles(
        out_dir / f"{task.name}.train.jsonl",
        out_dir / f"{task.name}.heldout.jsonl",
        len(train),
        len(heldout),
        origin,
    )
    _write_rows(files.train, task.system, train)
    _write_rows(files.heldout, task.system, heldout)
    return files


def _write_rows(path: Path, system: str, pairs: Iterable[Pair]) -> None:
    rows = (
        json.dumps({"system": system, "prompt": source, "completion": target}, ensure_ascii=False)
        for source, target in pairs
    )
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    temporary.replace(path)
