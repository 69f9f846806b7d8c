"""Files and folders as the calls of a process leave them, step by step."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .calls import Call

Tree = dict[str, bytes]
"""Paths below a folder and their content; those of folders end in a slash and have none."""


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
    _made: dict[tuple[int, ...], bytes] = field(default_factory=dict)

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
        written: dict[int, list[Content]] = {}
        for step in steps:
            if isinstance(step, Names):
                _apply(step.changes, names)
            elif isinstance(step, Content):
                written.setdefault(step.file, []).append(step)
        tree: Tree = {}

        def walk(folder: int, path: str) -> None:
            for name, number in names[folder].items():
                if number in names:
                    tree[f"{path}{name}/"] = b""
                    walk(number, f"{path}{name}/")
                else:
                    tree[f"{path}{name}"] = self._content(number, written.get(number, ()))

        walk(0, "")
        return tree

    def _content(self, file: int, steps: Sequence[Content]) -> bytes:
        if not steps:
            return self.start[file]
        key = (file, *map(id, steps))
        if key not in self._made:
            content = bytearray(self.start[file])
            for step in steps:
                _write(content, step)
            self._made[key] = bytes(content)
        return self._made[key]


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
