"""The result files in a folder and one level below: those of known commands are read, others left alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from loracle.files.json_file import MAX_BYTES, parse_json_object, read_regular_file
from loracle.reference import FileError

from . import bench, certificate, extraction, intrinsic, rank_analysis, rank_sweep
from .fields import Fields

_READERS: dict[str, tuple[str, ModuleType]] = {
    bench.KIND: ("bench", bench),
    rank_sweep.KIND: ("sweeps", rank_sweep),
    rank_analysis.KIND: ("analyses", rank_analysis),
    extraction.KIND: ("extractions", extraction),
    intrinsic.KIND: ("intrinsic", intrinsic),
    certificate.KIND: ("certificates", certificate),
}
_MARKS = (b'"loracle ', b'"loracle-certificate"')


@dataclass(frozen=True)
class Results:
    """What was found, each by the command that wrote it, in the order of the files' names.

    Attributes:
        others: names of JSON files that no command named here has written.
    """

    bench: tuple[bench.Bench, ...] = ()
    sweeps: tuple[rank_sweep.RankSweep, ...] = ()
    analyses: tuple[rank_analysis.RankAnalysis, ...] = ()
    extractions: tuple[extraction.Extraction, ...] = ()
    intrinsic: tuple[intrinsic.Intrinsic, ...] = ()
    certificates: tuple[certificate.Certified, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that were read."""
        own = (getattr(self, one.name) for one in fields(self) if one.name != "others")
        return tuple(sorted(document.file for documents in own for document in documents))


def read_results(folder: Path) -> Results:
    """Read the result files of a folder and of the folders in it.

    Raises:
        FileError: there is no folder, none of its files is a result, or one is malformed or of another
            version; the message names it.
    """
    if not folder.is_dir():
        raise FileError(f"{folder}: expected a folder with result files, found none; check the path")
    found: dict[str, list[Any]] = {}
    others: list[str] = []
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        name = str(path.relative_to(folder))
        content = read_regular_file(path, MAX_BYTES)
        if not any(mark in content for mark in _MARKS):
            others.append(name)
            continue
        document = parse_json_object(content, str(path))
        kind = document.get("kind", document.get("format"))
        if not isinstance(kind, str) or kind not in _READERS:
            others.append(name)
            continue
        where, reader = _READERS[kind]
        found.setdefault(where, []).append(_read(document, path, name, reader))
    if not found:
        raise FileError(
            f"{folder}: expected results of loracle bench, rank, extract, intrinsic or verify, here or in "
            "a folder in it, got none; give them --out or --json > FILE"
        )
    return Results(others=tuple(others), **{where: tuple(documents) for where, documents in found.items()})


def _read(document: dict[str, Any], path: Path, name: str, reader: ModuleType) -> Any:
    version = document.get("version")
    if type(version) is not int or version != reader.VERSION:
        raise FileError(
            f"{path}: version: expected {reader.VERSION} of a {reader.KIND!r} document, got "
            f"{str(version)[:40]!r}; make it again with `{reader.COMMAND}`"
        )
    return reader.read(Fields(document, str(path), f"make it again with `{reader.COMMAND}`"), name)
