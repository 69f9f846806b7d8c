"""What a disk may hold after the power has gone: of what was not flushed, anything.

A file's bytes are on the disk once the file was flushed after them; a name, of a file or folder, once the
folder was flushed that it is in. Until then each is there or not, whatever came before or after: file systems
write them in an order of their own. A rename is one step. Of a file's bytes that were not flushed there are
none, half, or zeros in their place. This is what POSIX allows, and more than journaling file systems do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from .calls import Call

Tree = dict[str, bytes]
"""Paths below a folder and their content; those of folders end in a slash and have none."""

_ALL_SUBSETS = 5
Bytes = Callable[[bytearray], None]


def read_tree(root: Path) -> Tree:
    """What is in a folder. Links are told by what they say."""
    tree: Tree = {}
    for path in root.rglob("*"):
        name, kind = str(path.relative_to(root)), path.lstat().st_mode
        if stat.S_ISDIR(kind):
            tree[f"{name}/"] = b""
        else:
            tree[name] = os.readlink(path).encode() if stat.S_ISLNK(kind) else path.read_bytes()
    return tree


def write_tree(tree: Tree, root: Path) -> None:
    """Make an empty folder hold what a tree says, without links."""
    for name in sorted(tree):
        if name.endswith("/"):
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(tree[name])


@dataclass(frozen=True)
class Names:
    """A change of names: in which folder, which name, and what it is from then on. On the disk when `by` is
    flushed."""

    changes: tuple[tuple[int, str, int | None], ...]
    by: int


@dataclass(frozen=True)
class Content:
    """Bytes of a file: `data` at `offset`, or, without, its new length."""

    file: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Flush:
    """A wait for a file's bytes, or a folder's names."""

    what: int


Step = Names | Content | Flush


@dataclass
class Disk:
    """Files and folders by numbers, the root's is 0, and the steps that calls have made of them."""

    start: dict[int, bytes] = field(default_factory=dict)
    held: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    steps: list[Step] = field(default_factory=list)
    _names: dict[int, dict[str, int]] = field(default_factory=dict)

    @staticmethod
    def replay(root: str, before: Tree, calls: Sequence[Call]) -> Disk:
        """The steps of calls in the folder `root` that held `before`. Raises ValueError: one is unknown."""
        disk = Disk()
        for name in sorted(before):
            folder, last = disk._split(name, disk.held)
            number = disk._new()
            disk.held[folder][last] = number
            if name.endswith("/"):
                disk.held[number] = {}
            else:
                disk.start[number] = before[name]
        disk._names = {number: dict(names) for number, names in disk.held.items()}
        for call in calls:
            disk._make(call, os.path.realpath(root))
        return disk

    def _new(self) -> int:
        return 1 + max(*self.held, *self.start, *self._names, 0, 0)

    def _split(self, path: str, names: Mapping[int, Mapping[str, int]]) -> tuple[int, str]:
        *folders, last = [part for part in path.split("/") if part]
        at = 0
        for part in folders:
            at = names[at][part]
        return at, last

    def _place(self, path: str, root: str) -> tuple[int, str, int | None]:
        """The folder that a path is in, its name there, and what is there."""
        if path == root:
            return 0, "", 0
        if not path.startswith(f"{root}/"):
            raise ValueError(f"{path}: outside {root}")
        folder, last = self._split(path.removeprefix(f"{root}/"), self._names)
        return folder, last, self._names[folder].get(last)

    def _make(self, call: Call, root: str) -> None:
        try:
            folder, name, there = self._place(call.path, root)
        except KeyError:  # no such folder: the call fails
            return
        is_folder = there in self._names
        if call.kind == "open":
            if there is None and call.creates:
                there = self._new()
                self.start[there] = b""
                self._change(folder, (folder, name, there))
            elif there is not None and call.empties:
                self.steps.append(Content(there, 0, None))
        elif call.kind == "write" and there is not None:
            self.steps.append(Content(there, call.offset, call.data))
        elif call.kind == "truncate" and there is not None:
            self.steps.append(Content(there, call.offset, None))
        elif call.kind == "flush" and there is not None:
            self.steps.append(Flush(there))
        elif call.kind == "mkdir":
            if there is None:
                number = self._new()
                self.held[number] = {}
                self._names[number] = {}
                self._change(folder, (folder, name, number))
        elif call.kind in ("unlink", "rmdir"):
            fits = is_folder and not self._names[there or 0] if call.kind == "rmdir" else not is_folder
            if there is not None and fits:
                self._change(folder, (folder, name, None))
        elif call.kind in ("rename", "link"):
            to, new, other = self._place(call.to, root)
            blocked = other is not None and (
                call.kind == "link"
                or (other in self._names) != is_folder
                or bool(self._names.get(other) and is_folder)
            )
            if there is not None and there != other and not blocked:
                gone = ((folder, name, None),) if call.kind == "rename" else ()
                self._change(to, *gone, (to, new, there))
        else:
            raise ValueError(f"{call.name} of {call.path}: not a call that the model of a disk knows")

    def _change(self, by: int, *changes: tuple[int, str, int | None]) -> None:
        self.steps.append(Names(changes, by))
        _apply(changes, self._names)

    def after(self, steps: Sequence[Step]) -> Tree:
        """What a tree is when these steps, and no others, are on the disk."""
        names = {number: dict(held) for number, held in self.held.items()}
        files = {number: bytearray(content) for number, content in self.start.items()}
        for step in steps:
            if isinstance(step, Names):
                _apply(step.changes, names)
            elif isinstance(step, Content):
                _write(files[step.file], step)
        tree: Tree = {}

        def walk(folder: int, path: str) -> None:
            for name, number in names[folder].items():
                if number in names:
                    tree[f"{path}{name}/"] = b""
                    walk(number, f"{path}{name}/")
                else:
                    tree[f"{path}{name}"] = bytes(files[number])

        walk(0, "")
        return tree

    def crashes(self, without: int | None = None) -> Iterator[tuple[int, Tree]]:
        """How many steps were made, and what may be on the disk when the power goes then.

        Args:
            without: the number of a step, a flush, that is taken to be left out.
        """
        seen: set[object] = set()
        counts = range(len(self.steps) + 1)
        # Without a flush it is the last steps that do harm.
        for count in counts if without is None else reversed(counts):
            done = [step for at, step in enumerate(self.steps[:count]) if at != without]
            sure = _flushed(done)
            open_names = [at for at, step in enumerate(done) if isinstance(step, Names) and not sure[at]]
            open_files = sorted(
                {step.file for at, step in enumerate(done) if isinstance(step, Content) and not sure[at]}
            )
            for lost in _lost(open_names):
                for how in _ways(open_files, few=bool(lost)):
                    kept = tuple(_kept(done, sure, lost, how))
                    key = tuple(map(id, kept)) if not how else (len(done), lost, tuple(how.items()))
                    last = count == len(self.steps)
                    if (key, last) not in seen:
                        seen.add((key, last))
                        yield count, self.after(kept)


def _apply(changes: Sequence[tuple[int, str, int | None]], names: dict[int, dict[str, int]]) -> None:
    for folder, name, number in changes:
        if number is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = number


def _write(file: bytearray, step: Content) -> None:
    if step.data is None:
        del file[step.offset :]
        file.extend(bytes(step.offset - len(file)))
        return
    file.extend(bytes(max(0, step.offset - len(file))))
    file[step.offset : step.offset + len(step.data)] = step.data


def _flushed(steps: Sequence[Step]) -> list[bool]:
    """Of each step, whether it is on the disk for sure."""
    flushed: set[int] = set()
    sure = []
    for step in reversed(steps):
        if isinstance(step, Flush):
            flushed.add(step.what)
            sure.append(True)
        else:
            sure.append((step.by if isinstance(step, Names) else step.file) in flushed)
    return sure[::-1]


def _lost(at: Sequence[int]) -> Iterator[frozenset[int]]:
    """Which of some changes are lost: any, or, of many, all but the first few, all but one, and one alone."""
    if len(at) <= _ALL_SUBSETS:
        for size in range(len(at) + 1):
            yield from map(frozenset, combinations(at, size))
        return
    yield from (frozenset(at[start:]) for start in range(len(at) + 1))
    for one in at:
        yield frozenset({one})
        yield frozenset(at) - {one}


def _ways(files: Sequence[int], *, few: bool) -> Iterator[dict[int, str]]:
    """What becomes of the bytes of files that were not flushed; nothing is said of those that are whole."""
    yield {}
    if files:
        for way in ("none", "zeros", "half"):
            yield dict.fromkeys(files, way)
        if len(files) > 1 and not few:
            yield from ({file: "none"} for file in files)


def _kept(
    steps: Sequence[Step], sure: Sequence[bool], lost: frozenset[int], how: Mapping[int, str]
) -> Iterator[Step]:
    """The steps that are on the disk, or what there is of them."""
    for at, step in enumerate(steps):
        if isinstance(step, Content) and not sure[at] and step.file in how:
            way, data = how[step.file], step.data
            if way == "none":
                continue
            if data is not None and way == "zeros":
                yield Content(step.file, step.offset, bytes(len(data)))
            elif data is not None:
                yield Content(step.file, step.offset, data[: len(data) // 2])
            else:
                yield step
        elif at not in lost:
            yield step
